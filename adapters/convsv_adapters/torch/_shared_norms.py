"""Norms that several parametrizations ask for one after another, computed together when the first of them asks.

PyTorch computes each parametrised weight when the forward pass reaches its layer. A call of NumPy for each layer takes
longer than one call for all layers of a shape, and the calls for several shapes can be shared out to threads. So the
first layer that asks for its norm has the norms of the others computed too.

A norm depends on the entries of its weight alone. Each result is kept with a copy of the entries that it was computed
from, and is given out only for a weight with equal entries. So no change of a weight, by whatever means, can bring out
a norm of its former values: the norm is then computed anew.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from convsv_adapters.torch._norms import NormOf, as_numpy, can_share
from convsv_core.training import Norms, norms_of_groups

__all__ = ["Asked", "Known", "asked_for", "shared_norm"]


class Known(NamedTuple):
    """Hold a norm whose derivative is known.

    Attributes
    ----------
    norm : NumPy scalar
        float32 for weights of 32 bits or fewer, else float64.
    slope : tensor or None
        The derivative, of the weight's shape; None if it was not asked for. The caller must not write to it.
    """

    norm: Any
    slope: torch.Tensor | None


class Asked(NamedTuple):
    """Hold a parametrization, or what stands for it, and the weight whose norm it asked for last."""

    owner: object
    weight: torch.Tensor


class _Result(NamedTuple):
    """Hold the norm of a weight of certain entries.

    Attributes
    ----------
    which : NormOf
    entries : numpy.ndarray
        A copy of the weight. Nothing writes to it.
    value : NumPy scalar
    slope : numpy.ndarray or None
        The derivative, where one was asked for.
    """

    which: NormOf
    entries: Any
    value: Any
    slope: Any

    def answers(self, which: NormOf, entries: Any, derivative: bool) -> bool:
        """Tell whether this is the norm of a weight with these entries."""
        return (
            self.which == which
            and (self.slope is not None or not derivative)
            and self.entries.dtype == entries.dtype
            and self.entries.flat[0] == entries.flat[0]  # Most often one entry tells that a step has changed them all.
            and np.array_equal(self.entries, entries)
        )


@dataclass(eq=False)
class _Asker:
    """Hold what is known of one parametrization.

    Attributes
    ----------
    weight : weakref.ref
        The tensor whose norm it asked for last.
    which : NormOf
    wanted : bool
        Whether it has asked since others last had its norm computed, or tried to.
    result : _Result or None
    """

    weight: weakref.ref[torch.Tensor]
    which: NormOf
    wanted: bool = True
    result: _Result | None = None


_askers: weakref.WeakKeyDictionary[object, _Asker] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def shared_norm(owner: object, weight: torch.Tensor, which: NormOf) -> Known:
    """Return the norm of the weight of a parametrization, with its derivative if the weight is differentiated now.

    Parameters
    ----------
    owner : object
        The parametrization. It must be possible to refer to it weakly.
    weight : tensor
        It passes `can_share`.
    which : NormOf
        One with `shareable`.
    """
    derivative = torch.is_grad_enabled() and weight.requires_grad
    asker = _askers.get(owner)
    if asker is None:
        asker = _Asker(weakref.ref(weight), which)
        with _lock:
            _askers[owner] = asker
    elif asker.weight() is not weight:
        asker.weight = weakref.ref(weight)
    asker.which, asker.wanted = which, True
    entries, result = as_numpy(weight), asker.result
    if result is None or not result.answers(which, entries, derivative):
        result = _computed(asker, entries.copy(), derivative)
    return Known(result.value, torch.from_numpy(result.slope) if derivative else None)


def asked_for(copy: torch.Tensor, which: NormOf) -> Asked | None:
    """Return a stored weight that has the entries of a copy, with its owner, or None if none is known.

    A compiled graph may hand on copies of weights. The copy passes `can_share`.
    """
    entries = as_numpy(copy)
    with _lock:
        known = list(_askers.items())
    for owner, asker in known:
        weight = asker.weight()
        if asker.which == which and weight is not None and weight.shape == copy.shape and weight.dtype == copy.dtype:
            array = _array_of(weight)
            # Most often one entry tells two weights apart.
            if array is not None and array.flat[0] == entries.flat[0] and np.array_equal(array, entries):
                return Asked(owner, weight)
    return None


def _computed(asker: _Asker, entries: Any, derivative: bool) -> _Result:
    """Return the norm of a weight with these entries, and keep it and those of other weights that may be asked for."""
    work: dict[Any, list[_Work]] = {}
    _add(work, _Work(asker, entries))
    with _lock:
        others = list(_askers.values())
    for other in others:
        if other is not asker and other.wanted:
            array, known = _array_of(other.weight()), other.result
            if array is not None and (known is None or not known.answers(other.which, array, derivative)):
                other.wanted = False
                _add(work, _Work(other, array.copy()))
    groups = list(work.values())
    try:
        found = _norms_of(groups, derivative)
    except (ArithmeticError, NotImplementedError, TypeError, ValueError):
        if len(groups) == 1 and len(groups[0]) == 1:
            raise
        groups = [groups[0][:1]]  # Another weight may be at fault. Its own layer will say so when it asks.
        found = _norms_of(groups, derivative)
    for group, norms in zip(groups, found, strict=True):
        for one, norm in zip(group, norms.of_each(), strict=True):
            one.asker.result = _Result(one.asker.which, one.entries, norm.value, norm.slope)
    assert asker.result is not None
    return asker.result


class _Work(NamedTuple):
    """Hold a parametrization and a copy of the entries whose norm is computed for it."""

    asker: _Asker
    entries: Any


def _add(work: dict[Any, list[_Work]], one: _Work) -> None:
    """Add a weight to the weights of its shape, dtype and geometry."""
    work.setdefault((one.asker.which, one.entries.shape, one.entries.dtype), []).append(one)


def _norms_of(groups: Sequence[Sequence[_Work]], derivatives: bool) -> list[Norms]:
    """Return the norms of groups of weights."""
    arrays = [group[0].asker.which.group([one.entries for one in group]) for group in groups]
    return norms_of_groups(arrays, derivatives=derivatives)


def _array_of(weight: torch.Tensor | None) -> Any:
    """Return a weight as an array, or None if it is gone or NumPy cannot read it."""
    return as_numpy(weight) if weight is not None and can_share(weight) and not weight.is_complex() else None


def _renew_lock() -> None:
    """Make a new lock in a child process: a thread of the parent may have held the old one."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
