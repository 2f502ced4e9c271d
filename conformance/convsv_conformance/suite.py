"""Choose what a run of the suite does: which checks on which cases, for which libraries, devices and dtypes."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import convsv_core as convsv
from convsv_conformance.cases import Case
from convsv_conformance.checks.drawn import Drawn
from convsv_conformance.checks.operations import Operation
from convsv_conformance.features import ALL_DTYPES, FEATURES, Feature
from convsv_conformance.table import by_name, geometry_of
from convsv_conformance.target import Ledger, Target
from convsv_core.plugins import get_backend, plugins

__all__ = ["Depth", "Item", "Selection", "Skip", "select"]

Depth: TypeAlias = Literal["quick", "usual", "thorough"]
"""How much a run asks.

- "quick": every feature on every library, with each kind of geometry and each dtype; one case stands for several.
- "usual": every case in every dtype; fewer on libraries that take seconds for a case.
- "thorough": every case in every dtype on every library.
"""

KEY = frozenset(
    case.name
    for case in by_name(
        "1d", "rectangular", "keras-layout", "kernel-larger-than-input", "one-tap", "stride-beyond-taps", "groups",
        "transposed-stride", "zero", "graded",
    )
)  # fmt: skip
"""The cases that stand for all cases on a library that takes seconds for a case; chosen by hand, one a geometry."""

BRIEF = {
    "float32": frozenset(feature.name for feature in FEATURES)
    - {"bounds, flat", "bounds, peaks", "penalties, gradients", "project, every size", "project, steps"},
    "complex64": frozenset({"values", "symbol", "singular vectors"}),
}
"""The features that such a library is asked for, by dtype. In a dtype that is not listed it is asked for `values`."""

WHOLE = frozenset({"values", "frequencies", "symbol"})
"""The features that a library of lazy arrays is asked for on every case, in float32."""


@dataclass(frozen=True)
class Item:
    """One check of one subject on one target."""

    feature: Feature
    subject: Any
    target: Target

    @property
    def key(self) -> str:
        """Return ``feature/subject/dtype``, which an entry of a file of known failures matches."""
        return f"{self.feature.name}/{self.subject.name}/{self.target.dtype}".replace(" ", "-").replace(",", "")

    @property
    def id(self) -> str:
        """Return a name that is unique in a run."""
        return f"{self.target.backend.name}/{self.target.device}/{self.key}"

    def verify(self) -> Ledger:
        """Run the check, and raise what it raises."""
        ledger = Ledger(self.target.eps)
        target = replace(self.target, made=[])
        self.feature.check(target, self.subject, ledger)
        target.check_unchanged()
        ledger.cases = max(ledger.cases, 1)
        return ledger


@dataclass(frozen=True)
class Skip:
    """Something that a run does not try, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """A part of the suite: targets, features, depth, and skips for libraries, devices and dtypes that are not there."""

    targets: tuple[Target, ...]
    skips: tuple[Skip, ...]
    depth: Depth = "usual"
    features: tuple[Feature, ...] = FEATURES

    def items(self) -> Iterator[Item | Skip]:
        """Yield every check to run, and a skip for each feature that a library has no transformation for."""
        yield from self.skips
        missing = {one.name for one in self.features if one.imports and not importlib.util.find_spec(one.imports)}
        for feature in self.features:
            if feature.name in missing:
                yield Skip(feature.name, f"{feature.imports} is not installed")
        for backend in {target.backend.name: target.backend for target in self.targets}.values():
            for feature in self.features:
                lacking = [trait for trait in feature.needs if not _has(backend, trait)]
                if lacking:
                    yield Skip(f"{backend.name}/{feature.name}", f"{backend.name} has no {' and no '.join(lacking)}")
        for target, feature in itertools.product(self.targets, self.features):
            if feature.name in missing:
                continue
            if target.dtype in feature.dtypes and all(_has(target.backend, trait) for trait in feature.needs):
                for subject in self._subjects(feature, target):
                    yield Item(feature, subject, target)

    def _subjects(self, feature: Feature, target: Target) -> Iterable[Any]:
        asked = self._of_depth(feature, target)
        return [s for s in asked if not (isinstance(s, Operation) and target.backend.lazy and not s.lazy)]

    def _of_depth(self, feature: Feature, target: Target) -> Iterable[Any]:
        if self.depth == "thorough":
            return feature.subjects
        subjects = _usual(feature, target)
        if self.depth == "usual":
            return subjects
        beside = [other for other in self.targets if other.backend is target.backend]
        if _is_slow(target.backend) or target.device != beside[0].device:
            return _few(feature, subjects)
        there = {other.dtype for other in beside if other.device == target.device}
        fewer = tuple(_with_fewer_examples(subject, 4) for subject in subjects)
        return _by_turns(feature, fewer, target.dtype, [dtype for dtype in feature.dtypes if dtype in there])


def _by_turns(feature: Feature, subjects: Iterable[Any], dtype: str, dtypes: Sequence[str]) -> Iterator[Any]:
    """Yield the subjects whose turn is `dtype`: every subject has a turn, and every dtype meets each geometry.

    A feature that is `costly` takes turns over the subjects of all geometries.
    """
    turn, place = FEATURES.index(feature), dtypes.index(dtype)
    for cases in [list(subjects)] if feature.costly else _by_geometry(subjects):
        for count in range(max(len(cases), len(dtypes))):
            if (count + turn) % len(dtypes) == place:
                yield cases[count % len(cases)]


def _few(feature: Feature, subjects: Iterable[Any]) -> Iterator[Any]:
    """Yield the first case of each geometry, or the first of all if the feature is `costly`; keep other subjects."""
    for cases in [list(subjects)] if feature.costly else _by_geometry(subjects):
        yield from cases[:1] if cases and isinstance(cases[0], Case) else cases


def _by_geometry(subjects: Iterable[Any]) -> Iterable[list[Any]]:
    """Return the subjects in one list for each geometry of the table, with the subjects outside the table in one."""
    groups: dict[str, list[Any]] = {}
    for subject in subjects:
        groups.setdefault(geometry_of(subject.name), []).append(subject)
    return groups.values()


def _is_slow(backend: convsv.Backend) -> bool:
    """Return whether one case takes seconds: the library compiles for each shape, or makes a graph for each result."""
    return backend.lazy or _has(backend, "jit")


def _usual(feature: Feature, target: Target) -> tuple[Any, ...]:
    """Return the subjects of `feature` that `target` is asked for, unless the run is thorough.

    A library that compiles each operation for each shape takes seconds for a case where its operations run one by
    one. It gets, in float32, every case compiled as a whole, and the features of `BRIEF` on the cases of `KEY`. A
    library of lazy arrays makes and runs a graph for each result. It gets, in float32, the features of `WHOLE` on
    every case, and the features of `BRIEF` on the cases of `KEY`.
    """
    whole = target.backend.lazy and feature.name in WHOLE and target.dtype == "float32"
    if whole or not _is_slow(target.backend):
        return feature.subjects
    if feature.name not in BRIEF.get(target.dtype, {"values"}):
        return ()
    fewer = (_with_fewer_examples(subject, 20) for subject in feature.subjects)
    return tuple(s for s in fewer if feature.needs or not isinstance(s, Case) or s.name in KEY)


def _with_fewer_examples(subject: Any, divisor: int) -> Any:
    return replace(subject, examples=subject.examples // divisor) if isinstance(subject, Drawn) else subject


def _has(backend: convsv.Backend, trait: str) -> bool:
    return getattr(backend, trait)(lambda array: array) is not None


def select(
    backends: Iterable[str] = (),
    devices: Iterable[str] = (),
    dtypes: Iterable[str] = (),
    *,
    features: Iterable[str] = (),
    depth: Depth = "usual",
) -> Selection:
    """Return the selection of the named backends, devices, dtypes and features: all where none is named.

    Raises
    ------
    ValueError
        For a backend that is not installed, and for a dtype or feature that does not exist.
    """
    names, devices, dtypes, features = tuple(backends), tuple(devices), tuple(dtypes), tuple(features)
    for dtype in dtypes:
        if dtype not in ALL_DTYPES:
            raise ValueError(f"dtype={dtype!r}: wanted one of {', '.join(ALL_DTYPES)}")
    known = {feature.name: feature for feature in FEATURES}
    for feature in features:
        if feature not in known:
            raise ValueError(f"feature={feature!r}: wanted one of {'; '.join(known)}")
    chosen = tuple(known[feature] for feature in features) or FEATURES
    targets, skips = [], []
    for name in names or plugins().backends:
        backend = get_backend(name)
        reason = _unavailable(backend)
        if reason:
            skips.append(Skip(name, reason))
            continue
        found = backend.devices()
        skips += [Skip(f"{name}-{d}", f"{name} has {', '.join(found)} here") for d in devices if d not in found]
        for device in [d for d in found if not devices or d in devices]:
            there = backend.dtypes(device)
            for dtype in dtypes or ALL_DTYPES:
                if dtype in there:
                    targets.append(Target(backend, device, dtype))
                else:
                    skips.append(Skip(f"{name}-{device}-{dtype}", f"{name} has no {dtype} on {device} here"))
    return Selection(tuple(targets), tuple(skips), depth, chosen)


def _unavailable(backend: convsv.Backend) -> str:
    """Return why a backend cannot be used here, or ""; ask no other backend, since that imports its library."""
    try:
        return backend.unavailable()
    except Exception as error:  # the fault of one plugin must not end the run of the others
        return f"the plugin failed: {type(error).__name__}: {error}"
