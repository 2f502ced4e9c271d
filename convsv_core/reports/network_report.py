"""The report on a network: a list of its layers' figures, which shows itself wherever people look at it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, SupportsIndex, TypeVar, overload

from convsv_core.reports import texts
from convsv_core.reports.curves import Plot
from convsv_core.reports.extras import import_for
from convsv_core.reports.notebook import table_html
from convsv_core.reports.plain_table import lay_out, plain_text
from convsv_core.reports.report import Row
from convsv_core.reports.views import SPECTRUM, View

__all__ = ["Report", "figures_of", "finite"]

R = TypeVar("R", bound=Row)


class Report(list[R]):
    """The figures of every convolution of a network, in the order of the network.

    A report is a list of rows, such as `LayerReport`. Printed, it is the table of the command line. In a notebook it
    displays itself.

    Parameters
    ----------
    rows : iterable of Row
    view : View
        The columns of the table, and the fields of the JSON. `View.fitting` leaves out what no row has.
    title : str, default ""
        The line above the table: the network, and what computed the figures.
    about : mapping, optional
        The facts that the JSON has about the whole network, as values of JSON.

    Examples
    --------
    >>> from convsv_core.reports import LayerReport, spectrum_view
    >>> report = Report([LayerReport("conv1", (8, 3, 3, 3), operator_norm=2.5)], view=spectrum_view("none"))
    >>> report[0].operator_norm
    2.5
    >>> report
    <Report of 1 convolution; print it for the table>
    >>> print(report)  # doctest: +ELLIPSIS
    figures of the circular convolution at each layer's extents
    <BLANKLINE>
                                               stable  reshaped
    layer  kernel   extents  norm  min  cond.    rank      norm  factor
    -----  -------  -------  ----  ---  -----  ------  --------  ------
    conv1  8x3x3x3  -         2.5    -      -       -         -       -
    <BLANKLINE>
    kernel: its shape, ...
    """

    def __init__(
        self,
        rows: Iterable[R] = (),
        *,
        view: View = SPECTRUM,
        title: str = "",
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(rows)
        self.view, self.title, self.about = view.fitting(self), title, dict(about or {})

    @overload
    def __getitem__(self, index: SupportsIndex) -> R: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: SupportsIndex | slice) -> R | Self:
        """Return a row, or the report of the rows of a slice."""
        return self.of(super().__getitem__(index)) if isinstance(index, slice) else super().__getitem__(index)

    def of(self, rows: Iterable[R]) -> Self:
        """Return the report of other rows, with the title and the columns of this one."""
        return type(self)(rows, view=self.view, title=self.title, about=self.about)

    def ordered(self, by: str) -> Self:
        """Return the report with its rows in the order of this name in ``view.sort_keys``.

        Raises
        ------
        ValueError
            There is no such order.
        """
        if by not in self.view.sort_keys:
            raise ValueError(f"by={by!r}: wanted one of {', '.join(self.view.sort_keys)}")
        keys = [self.view.sort_keys[by](row) for row in self]
        # Rows without a key come last, in their own order.
        places = sorted(range(len(self)), key=lambda place: (keys[place] is None, keys[place] or 0))
        return self.of(self[place] for place in places)

    # ---- for people ----------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        """Return one line, because a test or a debugger may print many reports."""
        return f"<Report of {texts.layers(self)}{f': {self.title}' if self.title else ''}; print it for the table>"

    def __str__(self) -> str:
        """Return the table, its legend and the notes of the layers."""
        return plain_text(lay_out(self, self.title, self.view))

    def _repr_html_(self) -> str:
        """Return the table as a notebook shows it."""
        return table_html(lay_out(self, self.title, self.view))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print the table where IPython has no HTML."""
        printer.text(repr(self) if cycle else str(self))

    def plot(self, figure: Any = None, *, scale: Literal["linear", "log"] = "linear") -> Plot:
        """Draw the singular values of every layer by rank, as figure 1 of the paper does.

        A report of bounds draws the certified interval of every layer's norm. A comparison draws the layers with the
        largest shares.

        Parameters
        ----------
        figure : matplotlib.figure.Figure, optional
            An empty figure to draw in. By default `pyplot` makes one, which a notebook displays.
        scale : "linear" or "log", default "linear"
            The axis of the singular values, norms or shares.

        Returns
        -------
        figure : matplotlib.figure.Figure
        axes : matplotlib.axes.Axes or numpy.ndarray of Axes
            As `pyplot.subplots` returns them: one, or a grid of them if there are too many curves for one.

        Raises
        ------
        ModuleNotFoundError
            matplotlib is not installed.

        Notes
        -----
        Source: Sedghi, Gupta and Long, *The Singular Values of Convolutional Layers*, ICLR 2019, figure 1.
        """
        return self.view.draw(self, figure, scale)

    # ---- for programs --------------------------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """Return what `to_json` writes: `about`, and a dictionary for each row under ``view.rows_key``."""
        return {**self.about, self.view.rows_key: figures_of(self, self.view.fields)}

    def to_json(self) -> str:
        """Return the report as JSON, as ``--json`` of the command line writes it.

        JSON has no infinity: a figure is null where there is none and where it is infinite.

        Examples
        --------
        >>> from convsv_core.reports import LayerReport
        >>> json.loads(Report([LayerReport("conv1", operator_norm=2.5)]).to_json())["layers"][0]["operator_norm"]
        2.5
        """
        return json.dumps(self.document(), indent=2, allow_nan=False)

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with a row for each layer, and the fields of the JSON and "factor" as columns.

        Shapes are tuples. A figure that could not be computed is missing (NaN). An infinite one is infinite.

        Raises
        ------
        ModuleNotFoundError
            pandas is not installed.
        """
        pandas = import_for("pandas", "to_pandas()", "pandas")
        fields = [*self.view.fields, "factor"]
        frame = pandas.DataFrame([[getattr(row, field) for field in fields] for row in self], columns=fields)
        numbers = [column.field for column in self.view.columns if column.figure and column.origin]
        for name in set(numbers) & set(fields):
            frame[name] = frame[name].astype(float)
        return frame

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page to read in a browser, offline: figures, images of the layers and a table that sorts.

        Parameters
        ----------
        path : path
            The file to write. It needs no other file and no network.

        Raises
        ------
        ModuleNotFoundError
            The libraries of the extra ``html``, whose scripts the page contains, are not installed.
        OSError
            The file cannot be written.
        """
        Path(path).write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """Return the content of the file that `to_html` writes."""
        return import_for("convsv_core.reports.page", "to_html()", "html").page(self)


def figures_of(rows: Sequence[Row], fields: Sequence[str]) -> list[dict[str, Any]]:
    """Return the named fields of each row as JSON has them.

    JSON has no infinity. A figure is null where there is none and where it is infinite. A condition number is infinite
    if and only if `smallest_singular_value` is 0, and the note then says that the operator is singular. The note of a
    transposed convolution says `transposed`. `norm_lower` and `norm_upper` are null too where ``--bounds`` did not ask
    for them.

    Examples
    --------
    >>> figures_of([Row("first", reshaped_norm=float("inf"))], ("name", "reshaped_norm"))
    [{'name': 'first', 'reshaped_norm': None}]
    """
    figures = [{field: finite(getattr(row, field)) for field in fields} for row in rows]
    for row, found in zip(rows, figures, strict=True):
        if row.transposed:
            found["note"] = "; ".join(filter(None, ("transposed", row.note)))
    return figures


def finite(value: Any) -> Any:
    """Return a value as JSON has it: None in place of a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
