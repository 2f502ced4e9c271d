"""The suite as data: which checks run on which cases, for which libraries, devices and dtypes."""

from __future__ import annotations

import fnmatch
import importlib.resources
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import convsv_core as convsv
from convsv_conformance.cases import TABLE, Case, by_name, make_case, random_cases
from convsv_conformance.checks import bounds, derivatives, errors, penalties, projection, spectrum, traps
from convsv_conformance.target import Ledger, Target
from convsv_core.plugins import get_backend, plugins

ALL_DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
WIDE_DTYPES = ("float32", "float64", "complex64", "complex128")  # 16 bits become float32 on entry
REAL_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Drawn:
    """A number of cases that hypothesis draws, the same ones in every run of that number."""

    name: str
    examples: int


@dataclass(frozen=True)
class Feature:
    """One question, and what it is asked of.

    Parameters
    ----------
    name : str
    check : callable
        Takes a target, a subject and a ledger; raises where the answer is wrong.
    subjects : tuple
        Cases, or whatever else `check` takes; each has a name.
    dtypes : tuple of str
        Dtypes of the kernel that it is asked in.
    needs : tuple of str
        Transformations that a library must have, of `Backend`'s ``jit``, ``grad`` and ``vmap``.
    """

    name: str
    check: Callable[[Target, Any, Ledger], None]
    subjects: tuple[Any, ...]
    dtypes: tuple[str, ...] = WIDE_DTYPES
    needs: tuple[str, ...] = ()


def drawn(target: Target, subject: Drawn, ledger: Ledger) -> None:
    """Values, symbol and vectors of convolutions that hypothesis draws, and shrinks where one fails."""
    from hypothesis import HealthCheck, Phase, given, settings

    @settings(
        max_examples=subject.examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(random_cases())
    def hold(case: Case) -> None:
        ledger.cases += 1
        spectrum.values(target, case, ledger)
        spectrum.symbol(target, case, ledger)
        spectrum.singular_vectors(target, case, ledger)

    hold()


_SMOOTH = by_name(
    "1d", "2d", "rectangular", "tall", "one-output-channel", "even", "one-tap", "kernel-larger-than-input",
    "stride", "stride-beyond-taps", "dilation-stride", "groups", "depthwise", "transposed-stride", "3d",
)  # fmt: skip
_COMPILED = by_name(
    "1d", "rectangular", "keras-layout", "kernel-larger-than-input", "stride", "depthwise", "transposed-groups",
    "3d", "zero", "deficient", "orthogonal",
)  # fmt: skip
_MEETING = by_name(
    "zero", "identity", "one-hot", "orthogonal", "orthogonal-1d", "repeated", "zero-stride", "zero-depthwise"
)
_HARD = by_name(
    "graded", "graded-two-channels", "graded-three-channels", "deficient", "deficient-two-channels",
    "deficient-three-channels", "repeated", "orthogonal", "2d", "stride", "wide", "zero",
)  # fmt: skip
_FLAT = by_name(
    "one-tap", "stride-of-one-tap", "stride-of-the-taps", "stride-beyond-taps", "zero", "identity", "one-hot",
    "orthogonal", "orthogonal-1d", "graded", "repeated",
)  # fmt: skip
_CLIPPED = by_name(
    "1d", "rectangular", "tall", "wide", "keras-layout", "even", "one-tap", "kernel-larger-than-input",
    "dilated-onto-itself", "stride", "stride-taps-3-4", "stride-beyond-taps", "dilation", "groups", "depthwise",
    "depthwise-stride", "transposed-stride", "transposed-groups", "padding-on-one-side", "3d", "zero", "orthogonal",
    "deficient",
)  # fmt: skip
# Large enough for the leading vectors of many matrices to be looked for together.
_LEADING = (
    make_case("leading", (64, 64), (3,), (4,), fill="leading"),
    make_case("leading-tall", (72, 64), (3,), (4,), fill="leading"),
)
_PENALISED = by_name(
    *(case.name for case in _SMOOTH), "transposed-groups", "identity", "orthogonal", "orthogonal-1d", "deficient",
    "repeated", "graded", "zero", "zero-stride", "zero-depthwise",
)  # fmt: skip
_PROJECTED = by_name(
    "1d-flax-layout", "2d", "wide", "mlx-layout", "kernel-larger-in-one-axis", "stride", "stride-beyond-taps",
    "dilation", "groups-3", "depthwise", "transposed-stride", "transposed-groups", "3d", "orthogonal", "deficient",
)  # fmt: skip
_STEPPED = by_name("1d", "2d", "stride", "stride-beyond-taps", "dilation", "groups-3", "transposed-groups", "3d")
_NEAREST = by_name("1d-even", "1d-stride", "1d-transposed", "1d-depthwise-dilated", "two-pixels", "stride-one-axis")
_ANY_SIZE = by_name("1d", "keras-layout", "stride-beyond-taps", "dilation", "depthwise", "transposed-stride", "3d")

FEATURES = (
    Feature("values", spectrum.values, TABLE, ALL_DTYPES),
    Feature("values, compiled", derivatives.compiled_values, TABLE, ("float32",), ("jit",)),
    Feature("methods", spectrum.methods, _HARD),
    Feature("frequencies", spectrum.frequencies, TABLE),
    Feature("symbol", spectrum.symbol, TABLE),
    Feature("svd", spectrum.svd, TABLE),
    Feature("singular vectors", spectrum.singular_vectors, TABLE),
    Feature("scalars", spectrum.scalars, TABLE),
    Feature("clip", spectrum.clip, (*_CLIPPED, *_LEADING), ALL_DTYPES),
    Feature("project", projection.of_one_size, _PROJECTED, ALL_DTYPES),
    Feature("project, nearest", projection.nearest, _NEAREST),
    Feature("project, every size", projection.of_every_size, _ANY_SIZE),
    Feature("project, zero", projection.of_nothing, by_name("1d", "transposed-groups"), ALL_DTYPES),
    Feature("project, steps", projection.steps, _STEPPED),
    Feature("project, compiled", projection.compiled, by_name("1d", "transposed-groups"), ("float32",), ("jit",)),
    Feature("project, products", projection.without_decompositions, _PROJECTED),
    Feature("extremes", spectrum.extremes, by_name("2d", "wide", "depthwise", "stride"), ALL_DTYPES),
    Feature("random", drawn, (Drawn("drawn", 40),), ("float32", "complex128")),
    Feature("bounds", bounds.of_one_size, TABLE, ALL_DTYPES),
    Feature("bounds, every size", bounds.of_every_size, TABLE, ALL_DTYPES),
    Feature("bounds, fixed grid", bounds.of_a_fixed_grid, TABLE, ALL_DTYPES),
    Feature("bounds, fixed grid, compiled", bounds.of_a_fixed_grid_compiled, _COMPILED, ("float32",), ("jit",)),
    Feature(
        "bounds, fixed grid, gradients",
        bounds.gradients_of_a_fixed_grid,
        (*_MEETING, *by_name("1d", "stride", "depthwise", "transposed-groups", "3d")),
        ("float32", "float64"),
        ("grad",),
    ),
    Feature("bounds, flat", bounds.of_flat_symbols, _FLAT),
    Feature("bounds, peaks", bounds.of_peaks, bounds.PEAKS),
    Feature("traps", traps.norms, traps.TRAPS),
    Feature("trap of zero", traps.zero_kernel, (traps.ZERO,), ALL_DTYPES),
    Feature("trap of clip", traps.clip_leaves_more, (traps.CLIPPED,)),
    Feature("gradients", derivatives.gradients, _SMOOTH, REAL_DTYPES, ("grad",)),
    Feature("gradients, equal values", derivatives.gradients_where_values_meet, _MEETING, REAL_DTYPES, ("grad",)),
    Feature("penalties", penalties.values, TABLE, ALL_DTYPES),
    # Not float16, which the true gradient of an eighth power overflows.
    Feature("penalties, gradients", penalties.gradients, _PENALISED, ("bfloat16", "float32", "float64"), ("grad",)),
    Feature(
        "penalties, gradients compiled",
        penalties.gradients,
        by_name("rectangular", "stride", "transposed-groups", "zero", "orthogonal", "deficient"),
        ("float32",),
        ("jit", "grad"),
    ),
    Feature("jit", derivatives.compiled, _COMPILED, ("float32", "float64", "complex64"), ("jit",)),
    Feature(
        "gradients, not compiled",
        derivatives.gradients_not_compiled,
        by_name("1d", "one-tap"),
        ("float32",),
        ("jit", "grad"),
    ),
    Feature("vmap", derivatives.batched, _COMPILED, ("float32", "float64", "complex64"), ("vmap",)),
    Feature("errors", errors.mistakes, errors.MISTAKES, ("float32",)),
)


KEY = frozenset(
    case.name
    for case in by_name(
        "1d", "rectangular", "keras-layout", "kernel-larger-than-input", "one-tap", "stride-beyond-taps", "groups",
        "transposed-stride", "zero", "graded",
    )
)  # fmt: skip
"""The cases that stand for the others where each costs seconds."""

BRIEF = {
    "float32": frozenset(feature.name for feature in FEATURES)
    - {"bounds, flat", "bounds, peaks", "penalties, gradients", "project, every size", "project, steps"},
    "complex64": frozenset({"values", "symbol", "singular vectors"}),
}
"""The features that are asked where each case costs seconds, by dtype; of other dtypes, `values` alone."""


WHOLE = frozenset({"values", "frequencies", "symbol"})
"""The features that stand for the others where arrays are lazy."""


@dataclass(frozen=True)
class Item:
    """One check of one subject on one target."""

    feature: Feature
    subject: Any
    target: Target

    @property
    def key(self) -> str:
        """What an entry of a file of known failures matches: ``feature/subject/dtype``."""
        return f"{self.feature.name}/{self.subject.name}/{self.target.dtype}".replace(" ", "-").replace(",", "")

    @property
    def id(self) -> str:
        """Unique in a run."""
        return f"{self.target.backend.name}/{self.target.device}/{self.key}"

    def verify(self) -> Ledger:
        """Run the check; raises what it raises."""
        ledger = Ledger(self.target.eps)
        self.feature.check(self.target, self.subject, ledger)
        ledger.cases = max(ledger.cases, 1)
        return ledger


@dataclass(frozen=True)
class Skip:
    """What was not tried, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """The targets that a run covers, and those that it cannot."""

    targets: tuple[Target, ...]
    skips: tuple[Skip, ...]
    thorough: bool = False

    def items(self) -> Iterator[Item | Skip]:
        """Every check to run, and a skip for each feature that a library has no transformation for.

        A library that compiles each operation for each shape takes seconds a case where its operations run one
        by one. Unless `thorough`, it gets every case compiled as a whole, in float32, and the features of
        `BRIEF` on the cases of `KEY` besides. One whose arrays are lazy makes and runs a graph for each result. It gets
        the features of `WHOLE` on every case, in float32, and those of `BRIEF` too.
        """
        yield from self.skips
        for backend in {target.backend.name: target.backend for target in self.targets}.values():
            for feature in FEATURES:
                lacking = [trait for trait in feature.needs if not _has(backend, trait)]
                if lacking:
                    yield Skip(f"{backend.name}/{feature.name}", f"{backend.name} has no {' and no '.join(lacking)}")
        for target, feature in itertools.product(self.targets, FEATURES):
            if target.dtype not in feature.dtypes:
                continue
            if not all(_has(target.backend, trait) for trait in feature.needs):
                continue
            lazy = target.backend.lazy
            brief = not self.thorough and (lazy or _has(target.backend, "jit"))
            if lazy and feature.name in WHOLE and target.dtype == "float32":
                brief = False
            if brief and feature.name not in BRIEF.get(target.dtype, {"values"}):
                continue
            for subject in feature.subjects:
                if brief and isinstance(subject, Drawn):
                    yield Item(feature, Drawn(subject.name, subject.examples // 20), target)
                elif not brief or feature.needs or not isinstance(subject, Case) or subject.name in KEY:
                    yield Item(feature, subject, target)


def _has(backend: convsv.Backend, trait: str) -> bool:
    return getattr(backend, trait)(lambda array: array) is not None


def select(
    backends: Iterable[str] = (),
    devices: Iterable[str] = (),
    dtypes: Iterable[str] = (),
    *,
    thorough: bool = False,
) -> Selection:
    """The targets of the named backends, devices and dtypes: all that there are where none is named.

    Raises ValueError for a backend that is not installed, and for a dtype that there is not.
    """
    names, devices, dtypes = tuple(backends), tuple(devices), tuple(dtypes)
    for dtype in dtypes:
        if dtype not in ALL_DTYPES:
            raise ValueError(f"dtype={dtype!r}: wanted one of {', '.join(ALL_DTYPES)}")
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
    return Selection(tuple(targets), tuple(skips), thorough)


def _unavailable(backend: convsv.Backend) -> str:
    """Why a backend cannot be used here, or ""; asks no other, since that imports its library."""
    try:
        return backend.unavailable()
    except Exception as error:  # the fault of one plugin must not end the run of the others
        return f"the plugin failed: {type(error).__name__}: {error}"


# ---- known failures ------------------------------------------------------------------------------------


class KnownFailures:
    """The cases that a library cannot do, each with its reason.

    One entry a line, ``feature/subject/dtype: reason``, with ``*`` for any part; text after ``#`` at the start
    of a line is a comment. Every case that an entry matches must fail: one that passes is an error, and so is an
    entry that matches no case there is.
    """

    def __init__(self, text: str, source: str) -> None:
        self.entries: dict[str, str] = {}
        known_keys = set(_all_keys())
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            pattern, colon, reason = (part.strip() for part in line.partition(":"))
            if not colon or not reason:
                raise ValueError(f"{source}, line {number}: wanted 'feature/subject/dtype: reason', not {line!r}")
            if not fnmatch.filter(known_keys, pattern):
                raise ValueError(f"{source}, line {number}: {pattern!r} matches no case of the suite")
            self.entries[pattern] = reason

    @classmethod
    def of(cls, backend: str, path: Path | None = None) -> KnownFailures:
        """Those in the file at `path`, or in the file that the suite brings for a backend, if there is one."""
        if path is not None:
            return cls(path.read_text(encoding="utf-8"), str(path))
        packaged = importlib.resources.files("convsv_conformance") / "known_failures" / f"{backend}.txt"
        return cls(packaged.read_text(encoding="utf-8") if packaged.is_file() else "", packaged.name)

    def reason(self, item: Item) -> str | None:
        """Why `item` is known to fail; None where it must pass."""
        return next((why for pattern, why in self.entries.items() if fnmatch.fnmatchcase(item.key, pattern)), None)


def _all_keys() -> Iterator[str]:
    for feature in FEATURES:
        for subject, dtype in itertools.product(feature.subjects, feature.dtypes):
            yield Item(feature, subject, Target(convsv.Backend(), "", dtype)).key
