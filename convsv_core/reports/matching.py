"""Match the layers of two models by name, and tell for every other layer why it has no partner."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core.conv import Conv
from convsv_core.layers import Layer

__all__ = ["Matching", "Pair", "Unmatched", "match_layers"]

FACTS = {
    "layout": ("layout",),
    "stride": ("stride",),
    "dilation": ("dilation",),
    "groups": ("groups",),
    "transposed": ("transposed",),
    "padding": ("padding", "padding_mode", "output_padding"),
}
"""The fields of a `Conv` that stand or fall with each of the fields in `Layer.assumed`."""

WEIGHT_NAMES = re.compile(r"[./](weight|kernel|w)$")
"""How names of stored weights end behind the name of their layer."""

WRAPPERS = ("module", "_orig_mod", "params", "model")
"""The first parts of names that wrappers and checkpoints add. They count where nothing else matches. A guess."""


@dataclass(frozen=True)
class Unmatched:
    """A layer of one of two models that was not compared.

    Attributes
    ----------
    name : str
        Its name in its own model.
    model : {"a", "b", "both"}
        The model that has it: the first one, the second one, or both.
    reason : str
        For people.
    """

    name: str
    model: str
    reason: str


class Pair(NamedTuple):
    """A layer that two models have.

    Attributes
    ----------
    name, other_name : str
        The layer's name in the first and in the second model.
    layer : Layer
        The layer of the first model, with the geometry that is known of both.
    other : numpy.ndarray
        The kernel of the second model, with the axes of the first one's layout.
    """

    name: str
    other_name: str
    layer: Layer
    other: HostArray


class Matching(NamedTuple):
    """The layers that two models share, in the order of the first model, and the other layers of both."""

    pairs: list[Pair]
    unmatched: list[Unmatched]


def match_layers(first: Sequence[Layer], second: Sequence[Layer]) -> Matching:
    """Match the layers of two models.

    Two layers are one if they have one name, or if their names agree without the last part that names a weight and
    without the parts that wrappers add. The key under which a file stores a weight counts as a name of its layer. A
    name that several layers of a model have matches none.

    Parameters
    ----------
    first, second : sequence of Layer
        With kernels on the host.

    Returns
    -------
    Matching
        Every layer of both models is in a pair, or unmatched with a reason.

    Examples
    --------
    >>> from convsv_core.layers import dense_layer
    >>> old = [dense_layer("fc.weight", np.ones((2, 3)), "OI")]
    >>> new = [dense_layer("fc", np.zeros((2, 3)), "OI"), dense_layer("head", np.zeros((4, 2)), "OI")]
    >>> found = match_layers(old, new)
    >>> len(found.pairs), found.unmatched[0].name
    (1, 'head')
    """
    partners: dict[int, int] = {}
    for names in (_own_names, _short_names, _shortest_names):
        _add_partners(partners, first, second, names)
    found = Matching([], [])
    for place, layer in enumerate(first):
        if place in partners:
            pair = _pair(layer, second[partners[place]])
            (found.pairs if isinstance(pair, Pair) else found.unmatched).append(pair)  # type: ignore[arg-type]
        else:
            found.unmatched.append(Unmatched(layer.name, "a", "only in the first model"))
    taken = set(partners.values())
    found.unmatched.extend(
        Unmatched(layer.name, "b", "only in the second model")
        for place, layer in enumerate(second)
        if place not in taken
    )
    return found


def _own_names(layer: Layer) -> set[str]:
    return {layer.name}


def _short_names(layer: Layer) -> set[str]:
    stored = () if layer.stored is None else (layer.stored.key,)
    return {WEIGHT_NAMES.sub("", name).replace("/", ".").strip(".") for name in (layer.name, *stored)} - {""}


def _shortest_names(layer: Layer) -> set[str]:
    return {_without_wrappers(name) for name in _short_names(layer)}


def _without_wrappers(name: str) -> str:
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def _add_partners(partners: dict[int, int], first: Sequence[Layer], second: Sequence[Layer], names: Any) -> None:
    """Add the layers without partners that share a name which no other such layer of their model has."""
    taken = set(partners.values())
    known = _unique(names(layer) if place not in partners else () for place, layer in enumerate(first))
    others = _unique(names(layer) if place not in taken else () for place, layer in enumerate(second))
    found = {(place, others[name]) for name, place in known.items() if name in others}
    for place, other in sorted(found):
        alone = sum(place == one for one, _ in found) == 1 and sum(other == one for _, one in found) == 1
        if alone:
            partners[place] = other


def _unique(names: Iterable[Iterable[str]]) -> dict[str, int]:
    """Return the place of each name that occurs at one place only."""
    places: dict[str, list[int]] = {}
    for place, found in enumerate(names):
        for name in found:
            places.setdefault(name, []).append(place)
    return {name: found[0] for name, found in places.items() if len(found) == 1}


# ---- the geometry of two layers -------------------------------------------------------------------------------------


def _pair(layer: Layer, other: Layer) -> Pair | Unmatched:
    """Return two layers of one name as a pair, or the reason why they cannot be compared."""
    name = layer.name if layer.name == other.name else f"{layer.name} and {other.name}"
    for one, which in ((layer, "first"), (other, "second")):
        if one.kernel is None or one.conv is None:
            return Unmatched(name, "both", f"in the {which} model: {one.note or 'its geometry is not known'}")
    assert layer.conv is not None
    assert other.conv is not None
    first, second = layer.conv, other.conv
    if first.ndim != second.ndim or layer.linear != other.linear:
        kinds = [
            "dense" if one.linear else f"of {conv.ndim} spatial axes" for one, conv in ((layer, first), (other, second))
        ]
        return Unmatched(name, "both", f"different layers: {' in the first model and '.join(kinds)} in the second one")
    kernel, moved = np.asarray(layer.kernel), np.asarray(other.kernel)
    if "layout" not in (*layer.assumed, *other.assumed):
        moved = moved.transpose([second.layout.index(letter) for letter in first.layout])
    if kernel.shape != moved.shape:
        shapes = ["x".join(map(str, array.shape)) for array in (kernel, moved)]
        return Unmatched(name, "both", f"different shapes: {' in the first model and '.join(shapes)} in the second one")
    geometry = _common(layer, other, first, second)
    if isinstance(geometry, str):
        return Unmatched(name, "both", geometry)
    extents, assumed = layer.input_shape, layer.assumed_extents
    if extents is None or (assumed and other.input_shape is not None and not other.assumed_extents):
        extents, assumed = other.input_shape, other.assumed_extents
    common = set(layer.assumed) & set(other.assumed)
    known = replace(
        layer,
        conv=geometry,
        input_shape=extents,
        assumed_extents=assumed,
        note="" if layer.assumed and not common else layer.note,
    )
    return Pair(layer.name, other.name, known, moved)


def _common(layer: Layer, other: Layer, first: Conv, second: Conv) -> Conv | str:
    """Return the geometry of both layers, or the reason why they have none in common.

    A field that one of the readers assumed is taken from the other layer.
    """
    taken: dict[str, Any] = {}
    differing = []
    for field, facts in FACTS.items():
        assumed, other_assumed = field in layer.assumed, field in other.assumed
        if assumed and not other_assumed:
            taken |= {fact: getattr(second, fact) for fact in facts}
        elif not assumed and not other_assumed and not _alike(field, first, second, _taps(layer, first)):
            differing.append(field)
    if differing:
        values = [", ".join(f"{field} {getattr(conv, field)}" for field in differing) for conv in (first, second)]
        return f"different geometry: {' in the first model and '.join(values)} in the second one"
    if taken.get("output_padding") is not None and not taken.get("transposed", first.transposed):
        return "different geometry: an output padding is that of a transposed layer"
    return replace(first, **taken)


def _taps(layer: Layer, conv: Conv) -> tuple[int, ...]:
    assert layer.kernel is not None
    return tuple(layer.kernel.shape[conv.layout.index(letter)] for letter in conv.spatial)


def _alike(field: str, first: Conv, second: Conv, taps: tuple[int, ...]) -> bool:
    """Return whether two geometries agree in a field that was not assumed; kernels may have different layouts."""
    if field == "layout":
        return True
    if field != "padding":
        return bool(getattr(first, field) == getattr(second, field))
    if first.output_padding != second.output_padding:
        return False
    pads = first.pads(taps)
    return pads == second.pads(taps) and (first.padding_mode == second.padding_mode or not any(map(any, pads)))
