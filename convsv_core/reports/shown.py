"""Show a network's Lipschitz constant in a notebook, in pandas, in a figure and in a page for a browser."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from convsv_core.reports.curves import Plot

__all__ = ["Shown"]

VIEWS = "convsv_core.reports.constant_views"
"""The module with the views, which is imported when something is shown, because the reports import this package."""


class Shown:
    """Gives a `Lipschitz` the ways in which a `Report` shows itself, under the same names."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON has them."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        """Return the table of the nodes as a notebook shows it."""
        notebook, views = importlib.import_module("convsv_core.reports.notebook"), importlib.import_module(VIEWS)
        return notebook.table_html(views.nodes_table(self))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print the table where IPython has no HTML."""
        printer.text(repr(self) if cycle else str(self))

    def to_json(self) -> str:
        """Return the figures as JSON, as ``convsv lipschitz --json`` writes them, without the name of the model.

        JSON has no infinity: a figure is null where a node has no bound and where it is infinite.
        """
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with a row for each node: name, op, log10_factor, log10_upper and note.

        Raises
        ------
        ModuleNotFoundError
            pandas is not installed.
        """
        return importlib.import_module(VIEWS).nodes_frame(self)

    def plot(self, figure: Any = None, *, title: str = "") -> Plot:
        """Draw the decimal logarithm of the bound along the graph, and of each node's factor.

        Parameters
        ----------
        figure : matplotlib.figure.Figure, optional
            An empty figure to draw in. By default `pyplot` makes one, which a notebook displays.
        title : str, default ""
            The name of the network. By default the name of its output.

        Returns
        -------
        figure : matplotlib.figure.Figure
        axes : matplotlib.axes.Axes

        Raises
        ------
        ModuleNotFoundError
            matplotlib is not installed.
        """
        return importlib.import_module(VIEWS).plot_constant(self, figure, title)

    def to_html(self, path: str | os.PathLike[str], *, title: str = "") -> None:
        """Write a page to read in a browser, offline: the bound along the graph, residual blocks and a table of nodes.

        Parameters
        ----------
        path : path
            The file to write. It needs no other file and no network.
        title : str, default ""
            The name of the network. By default the name of its output.

        Raises
        ------
        ModuleNotFoundError
            The libraries of the extra ``html``, whose scripts the page contains, are not installed.
        OSError
            The file cannot be written.
        """
        Path(path).write_text(self.page(title), encoding="utf-8")

    def page(self, title: str = "") -> str:
        """Return the content of the file that `to_html` writes."""
        reports = importlib.import_module("convsv_core.reports")
        return reports.import_for("convsv_core.reports.constant_page", "to_html()", "html").constant_page(self, title)
