"""Weights that a file keeps in parts: weight and spectral normalisation, and pruning by a mask."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from convsv_core.layers import Stored

__all__ = ["HostArray", "Named", "Shard", "form_of", "needs_numbers", "put_together"]

HostArray: TypeAlias = np.ndarray[Any, Any]

Named: TypeAlias = dict[str, HostArray | str]
"""Arrays by name. A string in place of an array says why there is none."""


class Shard(NamedTuple):
    """A file that holds a network or a part of one.

    Attributes
    ----------
    arrays : dict of str to (array or str)
        The arrays that can matter, by name. A string in place of an array says why the array could not be read.
    stored : dict of str to Stored
        Where the file stores each array that can be replaced.
    names : tuple of str
        The names of all that the file holds.
    """

    arrays: Named
    stored: dict[str, Stored]
    names: tuple[str, ...]


PARTS = re.compile(
    r"(?P<stem>.*?)"
    r"(?:(?:^|(?<=[./]))parametrizations\.(?P<new>[^./]+)\.(?P<part>original[01]?|\d+\..+)"
    r"|(?P<old>[^./]+?)_(?P<suffix>g|v|u|orig|mask|bar))$"
)
"""The names under which PyTorch, its wrappers and pruning keep a part of a weight."""

ALIGNED, ASTRAY = 0.1, 0.3
"""Sine of the angle between ``W v`` and ``u`` for the axis of a spectral normalisation, and for any other axis.

After power iteration ``u`` is along ``W v`` if the rows of W are along the right axis. An axis is chosen only if its
sine is at most the first number and that of every other axis is at least the second. Both are guesses.
"""

UNDECIDED = (
    "its spectral normalisation divides by u . W v, and neither the lengths nor the directions of u and v tell which "
    "axis of the weight holds the rows"
)


class _Whole(NamedTuple):
    """A weight that was put together, the names of its parts, and the part whose place it takes."""

    name: str
    weight: HostArray | str
    place: str
    parts: tuple[str, ...]


def put_together(named: Mapping[str, HostArray | str], *, least_rank: int = 3) -> Named:
    """Return named arrays with each weight that is kept in parts put together, or the reason why it is not.

    The weight takes the place of the part that has its shape, under its own name, such as ``conv.weight``. The other
    parts are left out. Known are weight normalisation along any axis or none, spectral normalisation, and a mask of
    `torch.nn.utils.prune`, as `torch.nn.utils` and its parametrizations store them and as wrappers of PyTorch 0.4 did.
    A weight behind any other parametrization is not known. Names that only look like parts stay, and so do the parts of
    weights of fewer axes than `least_rank`.
    """
    found = dict(named)
    while whole := next(
        _wholes(found, least_rank), None
    ):  # a part may itself be in parts: a mask on the v of a normalisation
        merged: Named = {}
        for name, array in found.items():
            if name == whole.place:
                merged[whole.name] = whole.weight
            elif name not in whole.parts and name != whole.name:
                merged[name] = array
        found = merged
    return found


def needs_numbers(name: str, ndim: int, ranks: Collection[int]) -> bool:
    """Return whether the numbers of an array can matter for weights that have as many axes as `ranks` say.

    Of a matrix only the form matters where dense layers are not listed, unless its name is that of a part of a weight.
    Language models are mostly such matrices, which need not be in memory.

    Examples
    --------
    >>> needs_numbers("embed.weight", 2, {3, 4, 5}), needs_numbers("conv.weight_u", 2, {3, 4, 5})
    (False, True)
    """
    return ndim != 2 or ndim in ranks or PARTS.fullmatch(name) is not None


def form_of(shape: tuple[int, ...], dtype: Any) -> HostArray:
    """Return an array of zeros that takes no memory, in place of an array of which only the form matters."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def _wholes(named: Named, least_rank: int) -> Any:
    """Yield each weight whose parts are all there."""
    families: dict[tuple[str, str, bool], dict[str, str]] = {}
    for name in named:
        if match := PARTS.fullmatch(name):
            is_new = match["new"] is not None
            key = (match["stem"], match["new"] or match["old"], is_new)
            families.setdefault(key, {})[match["part"] or match["suffix"]] = name
    for (stem, base, is_new), names in families.items():
        parts = {part: named[name] for part, name in names.items()}
        whole = stem + base
        place = next((part for part in ("orig", "bar", "v", "original", "original1") if part in parts), None)
        if place is None:
            continue
        reasons = [part for part in parts.values() if isinstance(part, str)]
        if not reasons and np.ndim(parts[place]) < least_rank:
            continue
        arrays = {part: array for part, array in parts.items() if isinstance(array, np.ndarray)}
        weight = reasons[0] if reasons else (_new if is_new else _old)(arrays, named.get(whole))
        if weight is not None:
            yield _Whole(whole, weight, names[place], tuple(names.values()))


def _old(parts: Mapping[str, HostArray], stored: HostArray | str | None) -> HostArray | str | None:
    """Return the weight of parts that stand beside it, or the reason why not; None if they are no known family."""
    kinds = frozenset(parts)
    if kinds == {"g", "v"}:
        return _weight_normalised(parts["v"], parts["g"])
    if kinds == {"orig", "mask"}:
        if parts["orig"].shape != parts["mask"].shape:
            return "its mask has another shape"
        return np.asarray(parts["orig"] * parts["mask"].astype(parts["orig"].dtype))
    if kinds == {"orig", "u", "v"}:
        return _spectrally_normalised(parts["orig"], parts["u"], parts["v"])
    if kinds == {"orig", "u"}:  # PyTorch 0.4 stored the weight of the last pass in place of v
        return _rescaled(parts["orig"], stored)
    if kinds in ({"bar", "u", "v"}, {"bar", "u"}):
        return _iterated(parts["bar"], parts["u"])
    if "orig" in kinds or "bar" in kinds or kinds >= {"g", "v"}:
        return f"how its parts {', '.join(sorted(kinds))} make the weight is not known" if len(kinds) > 1 else None
    return None


def _new(parts: Mapping[str, HostArray], stored: HostArray | str | None) -> HostArray | str:
    """Return the weight of a parametrization, or the reason why it is not known."""
    kinds = set(parts)
    if kinds == {"original0", "original1"}:
        return _weight_normalised(parts["original1"], parts["original0"])
    if kinds == {"original", "0._u", "0._v"}:
        return _spectrally_normalised(parts["original"], parts["0._u"], parts["0._v"])
    if kinds == {"original", "0.base"}:
        return "orthogonal parametrization: the file does not say by which map it makes the weight"
    return (
        "a parametrization makes the weight of the stored tensor, and the file does not say how "
        "(torch.nn.utils.parametrize.remove_parametrizations stores the weight itself)"
    )


def _weight_normalised(v: HostArray, g: HostArray) -> HostArray | str:
    """Scale v to the norms g: one norm for each index of the axis along which g has more than one entry."""
    if g.size == 1:
        axes, g = tuple(range(v.ndim)), g.reshape((1,) * v.ndim)
    elif g.ndim == v.ndim and sum(extent != 1 for extent in g.shape) == 1:
        axes = tuple(axis for axis, extent in enumerate(g.shape) if extent == 1)
        if any(extent not in (1, of_v) for extent, of_v in zip(g.shape, v.shape, strict=True)):
            return "its norms have another shape than its directions"
    else:
        return "its two parts are not those of weight normalisation"
    wide = v.astype(np.result_type(v.dtype, np.float64))
    norms = np.sqrt(np.sum(np.abs(wide) ** 2, axis=axes, keepdims=True))
    return np.asarray(wide * (g / norms), dtype=v.dtype)


def _matrices(weight: HostArray, rows: int, columns: int) -> list[HostArray]:
    """Return the weight as a matrix of so many rows and columns, for each axis that can hold the rows."""
    wide = weight.astype(np.result_type(weight.dtype, np.float64))
    axes = [axis for axis, extent in enumerate(weight.shape) if extent == rows and weight.size == rows * columns]
    return [np.moveaxis(wide, axis, 0).reshape(rows, -1) for axis in axes]


def _spectrally_normalised(weight: HostArray, u: HostArray, v: HostArray) -> HostArray | str:
    """Divide W by u . W v, where the rows of W are along the axis that u and v fit."""
    u, v = (np.ravel(part).astype(np.result_type(part.dtype, np.float64)) for part in (u, v))
    found = []
    for matrix in _matrices(weight, u.size, v.size):
        image = matrix @ v
        sigma = np.vdot(u, image)
        length = np.linalg.norm(image) * np.linalg.norm(u)
        sine = float(np.sqrt(max(0.0, 1 - (abs(sigma) / length) ** 2))) if length else 1.0
        found.append((sine, sigma))
    found.sort(key=lambda item: item[0])
    if not found:
        return "its spectral normalisation has vectors of lengths that fit no axis of the weight"
    alike = all(np.isclose(sigma, found[0][1], rtol=1e-6) for _, sigma in found)
    if not alike and not (found[0][0] <= ALIGNED and found[1][0] >= ASTRAY):
        return UNDECIDED
    return np.asarray(weight / found[0][1], dtype=weight.dtype)


def _rescaled(weight: HostArray, stored: HostArray | str | None) -> HostArray | str:
    """Return the normalised weight that stands beside the original one, if it is a multiple of it."""
    if not isinstance(stored, np.ndarray) or stored.shape != weight.shape:
        return "its spectral normalisation is stored without its vector v, and without the weight of the last pass"
    wide, other = weight.astype(np.float64), stored.astype(np.float64)
    scale = np.vdot(wide, other) / max(float(np.vdot(wide, wide)), np.finfo(np.float64).tiny)
    if not np.allclose(other, scale * wide, rtol=0, atol=1e-2 * float(np.max(np.abs(other)))):
        return "the weight beside its spectral normalisation is no multiple of the original one"
    return stored


def _iterated(weight: HostArray, u: HostArray) -> HostArray | str:
    """Return the weight of a wrapper that iterates once at each pass, as the next pass has it.

    The rows are along the first axis, in transposed convolutions too.
    """
    if u.size != weight.shape[0]:
        return "its spectral normalisation has a vector of a length that fits no axis of the weight"
    wide = weight.astype(np.float64).reshape(u.size, -1)
    v = wide.T @ np.ravel(u).astype(np.float64)
    sigma = np.linalg.norm(wide @ (v / max(float(np.linalg.norm(v)), 1e-12)))
    return np.asarray(weight / sigma, dtype=weight.dtype)
