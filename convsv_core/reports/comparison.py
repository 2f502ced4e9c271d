"""Compare the weights of two models, layer by layer."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from convsv_core._network.difference import output_difference
from convsv_core.backend import Backend
from convsv_core.layers import Layer, Operator, ReadOptions, UnknownExtents, lattice
from convsv_core.plugins import get_backend, one_line
from convsv_core.reports.certified import certified_bounds, layer_operator
from convsv_core.reports.constant import checked_range, network_graph
from convsv_core.reports.constant import lipschitz as network_constant
from convsv_core.reports.constant_report import Lipschitz
from convsv_core.reports.live_models import COMPUTING_FAILS, model_layers
from convsv_core.reports.matching import Pair, Unmatched, match_layers
from convsv_core.reports.model_files import read_model
from convsv_core.reports.network_report import Report, finite
from convsv_core.reports.placement import Placement
from convsv_core.reports.report import DifferenceReport
from convsv_core.reports.views import DIFFERENCE, View

__all__ = ["Comparison", "compare", "difference_reports"]

DIFFERENCE_EPS = float(np.finfo(np.float64).eps)
"""Relative error of the difference of two numbers in float64: half an eps, doubled for complex numbers."""


def difference_reports(
    pairs: Sequence[Pair], backend: Backend, *, dtype: str | None = None, device: str | None = None
) -> Iterator[DifferenceReport]:
    """Yield the figures of each layer that two models share, in turn.

    The difference is taken in double precision. Its rounding and the rounding to the computing dtype are part of the
    bounds.

    Parameters
    ----------
    pairs : sequence of Pair
    backend : Backend
        The library to compute with.
    dtype, device : str, optional
        As for `layer_reports`.

    Examples
    --------
    >>> from convsv_core import Conv
    >>> from convsv_core.plugins import get_backend
    >>> conv = Conv("OIHW", padding_mode="zeros")
    >>> first, second = (Layer("first", np.full((1, 1, 3, 3), value), conv, (8, 8)) for value in (1.0, 0.75))
    >>> (report,) = difference_reports(match_layers([first], [second]).pairs, get_backend("numpy"))
    >>> round(report.difference_upper, 2), round(report.share, 2)
    (2.25, 0.25)
    """
    placement = Placement(backend, dtype, device)
    for place, pair in enumerate(pairs):
        row = DifferenceReport.of(pair.layer, other_name=pair.other_name, place=place)
        try:
            yield _measured(row, pair, placement)
        except COMPUTING_FAILS as error:
            yield row.with_note(one_line(error))


def _measured(row: DifferenceReport, pair: Pair, placement: Placement) -> DifferenceReport:
    layer, note = pair.layer, ""
    kernel, conv = np.asarray(layer.kernel), layer.conv
    assert conv is not None
    operator, padded = Operator(lattice(conv), None), None
    try:
        operator = padded = layer_operator(layer)
    except UnknownExtents as error:
        note = one_line(error)
    wide = np.result_type(kernel.dtype, pair.other.dtype, np.float64)
    difference = kernel.astype(wide) - pair.other.astype(wide)
    changed = certified_bounds(
        difference, [operator], placement, placement.dtype_of(difference), entry_eps=DIFFERENCE_EPS
    )[operator]
    original = certified_bounds(kernel, [operator], placement, placement.dtype_of(kernel))[operator]
    if not difference.any():
        changed = changed._replace(upper=0.0)
    share = changed.upper / original.lower if original.lower > 0 else math.inf if changed.upper else 0.0
    return replace(
        row.with_note(note),
        difference_upper=None if padded is None else padded.layer_upper(changed.upper),
        norm_upper=None if padded is None else padded.layer_upper(original.upper),
        share=math.nextafter(share, math.inf) if changed.upper else 0.0,
    )


class Comparison(Report[DifferenceReport]):
    """The differences between the weights of two models, as a `Report` with the largest share first.

    Parameters
    ----------
    rows : iterable of DifferenceReport
    view, title, about
        As for `Report`.
    unmatched : iterable of Unmatched
        The layers that were not compared, each with the reason.
    lipschitz : sequence of Lipschitz
        The certified Lipschitz constants of the two networks, or nothing.
    output_difference : float, optional
        Upper bound of the distance between the two networks' outputs, for all inputs in a range.
    """

    def __init__(
        self,
        rows: Iterable[DifferenceReport] = (),
        *,
        view: View = DIFFERENCE,
        title: str = "",
        about: Mapping[str, Any] | None = None,
        unmatched: Iterable[Unmatched] = (),
        lipschitz: Sequence[Lipschitz] = (),
        output_difference: float | None = None,
    ) -> None:
        self.unmatched, self.lipschitz = tuple(unmatched), tuple(lipschitz)
        self.output_difference = output_difference
        facts = {**(about or {}), "unmatched": [dataclasses.asdict(one) for one in self.unmatched]}
        if self.lipschitz:
            facts["log10_lipschitz"] = [finite(one.log10_upper) for one in self.lipschitz]
        if output_difference is not None:
            facts["output_difference"] = finite(output_difference)
        summary = functools.partial(
            _summary, unmatched=self.unmatched, lipschitz=self.lipschitz, output_difference=output_difference
        )
        super().__init__(rows, view=replace(view, summary=summary), title=title, about=facts)

    def of(self, rows: Iterable[DifferenceReport]) -> Self:
        """Return the comparison of other rows, with the title and the unmatched layers of this one."""
        return type(self)(
            rows,
            view=self.view,
            title=self.title,
            about=self.about,
            unmatched=self.unmatched,
            lipschitz=self.lipschitz,
            output_difference=self.output_difference,
        )


def _summary(
    rows: Sequence[DifferenceReport],
    unmatched: Sequence[Unmatched],
    lipschitz: Sequence[Lipschitz],
    output_difference: float | None,
) -> str:
    """Return a paragraph: how many layers differ, which were not compared and why, and figures of the networks."""
    reasons: dict[str, list[str]] = {}
    for one in unmatched:
        reasons.setdefault(one.reason, []).append(one.name)
    lacking = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    constants = " and ".join(one.upper_text for one in lipschitz)
    return (
        DIFFERENCE.summary(rows)
        + (f" Not compared: {lacking}." if lacking else "")
        + (f" Lipschitz constants of the networks, at most: {constants}." if constants else "")
        + _distance(output_difference)
    )


def _distance(output_difference: float | None) -> str:
    if output_difference is None:
        return ""
    if math.isinf(output_difference):
        return " The distance between the outputs has no bound over the range of the input."
    return f" For inputs in the range the outputs are at most {output_difference:.4g} apart."


def compare(
    model_a: object,
    model_b: object,
    example_input: object = None,
    *,
    linear: bool = False,
    lipschitz: bool = False,
    input_range: tuple[float, float] | None = None,
    backend: str = "numpy",
    dtype: str | None = None,
    device: str | None = None,
) -> Comparison:
    """Certify, layer by layer, how far the weights of one model are from the weights of another.

    The difference of two layers of one geometry is the layer with the difference of their weights. Its norm tells how
    much the outputs can differ for an input of norm 1. So the models may be a network and the same network quantised,
    fine-tuned, pruned, or merged with a low-rank adaptation.

    Parameters
    ----------
    model_a, model_b : str, path, or model object
        Files of any format that an installed plugin reads, or models as for `analyze`. They may be of different kinds:
        layers are matched by name, and axes by the layouts. The names in a state dict match the names in its module.
    example_input : object, optional
        As for `analyze`, for both models. Only padding that repeats pixels needs it.
    linear : bool, default False
        Whether to compare dense layers too.
    lipschitz : bool, default False
        Whether to certify the Lipschitz constant of each whole network too, as `convsv_core.lipschitz` does. Both
        models must have a graph, which a file of weights alone has not.
    input_range : tuple of float, optional
        The least and the largest value of every element of the input. Then `output_difference` bounds the Euclidean
        distance between the outputs of the two networks, for all inputs in this range. The networks must have graphs of
        one structure, and the bound is useful for networks of moderate Lipschitz constants alone.
    backend : str, default "numpy"
        Name of the library to compute with.
    dtype, device : str, optional
        As for `convsv_core.reports.layer_reports`.

    Returns
    -------
    Comparison
        A list of `DifferenceReport`, the largest share of the norm first. `unmatched` names the layers that were not
        compared, because one model alone has them, or because shape or geometry differ. `lipschitz` holds the
        constants of the two networks, and `output_difference` the bound of the distance between their outputs, if asked
        for. Printed, it is the table of `convsv compare`.

    Raises
    ------
    TypeError
        A model is of no framework that an installed plugin knows.
    convsv_core.layers.ModelError
        A file cannot be read.
    ValueError
        There is no such backend, or with `lipschitz` or `input_range` a model has no graph, or with `input_range` the
        graphs differ in more than weights.

    Notes
    -----
    Neither traceable nor differentiable. The difference is taken in double precision. The bounds include its rounding,
    and hold for every input size with zero padding.

    Examples
    --------
    >>> import copy, torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
    >>> other = copy.deepcopy(model)
    >>> with torch.no_grad():
    ...     _ = other[2].weight.mul_(0.75)
    >>> [(layer.name, 0.25 <= layer.share <= 0.2503) for layer in compare(model, other) if layer.share]
    [('2', True)]
    """
    computing = get_backend(backend)
    input_range = checked_range(input_range)
    layers = [_layers(model, example_input, linear) for model in (model_a, model_b)]
    names = [
        str(model) if isinstance(model, str | os.PathLike) else type(model).__name__ for model in (model_a, model_b)
    ]
    matching = match_layers(*layers)
    rows = difference_reports(matching.pairs, computing, dtype=dtype, device=device)
    return Comparison(
        rows,
        title=f"{names[0]} and {names[1]}, with {computing.name}",
        about={"model": names[0], "other": names[1], "backend": computing.name},
        unmatched=matching.unmatched,
        lipschitz=[network_constant(one, example_input, lower=False) for one in (model_a, model_b)]
        if lipschitz
        else (),
        output_difference=None
        if input_range is None
        else output_difference(
            network_graph(model_a, example_input), network_graph(model_b, example_input), input_range
        ),
    ).ordered("share")


def _layers(model: object, example_input: object, linear: bool) -> list[Layer]:
    if isinstance(model, str | os.PathLike):
        return read_model(Path(model), ReadOptions(linear=linear))
    return model_layers(model, example_input, linear=linear)
