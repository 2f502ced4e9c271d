"""List the features of the suite: which check runs on which cases, and in which dtypes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convsv_conformance.cases import make_case
from convsv_conformance.checks import (
    bounds,
    derivatives,
    direction,
    drawn,
    errors,
    operations,
    padded,
    penalties,
    projection,
    spectrum,
    traps,
)
from convsv_conformance.table import TABLE, by_name
from convsv_conformance.target import Ledger, Target

__all__ = ["ALL_DTYPES", "FEATURES", "Feature"]

ALL_DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
"""Every dtype that a kernel may have."""

WIDE_DTYPES = ("float32", "float64", "complex64", "complex128")
"""The dtypes that results are computed in; kernels of 16 bits become float32 on entry."""

REAL_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Feature:
    """One question, and the subjects that it is asked of.

    Parameters
    ----------
    name : str
    check : callable
        The check takes a target, a subject and a ledger, and raises where the answer is wrong.
    subjects : tuple
        Cases, or other objects that `check` takes; each has a name.
    dtypes : tuple of str
        Dtypes of the kernel in which the question is asked.
    needs : tuple of str
        Transformations that a library must have, of `Backend`'s ``jit``, ``grad`` and ``vmap``.
    costly : bool
        Whether one subject takes a tenth of a second or more on NumPy, or several seconds in a compiler.
    imports : str
        A library that the check imports. The feature is skipped where it is not installed.
    """

    name: str
    check: Callable[[Target, Any, Ledger], None]
    subjects: tuple[Any, ...]
    dtypes: tuple[str, ...] = WIDE_DTYPES
    needs: tuple[str, ...] = ()
    costly: bool = False
    imports: str = ""


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
# These cases are so large that `clip` looks for the leading vectors of many matrices together.
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
_STEEPEST = by_name(
    "1d-flax-layout", "rectangular", "kernel-larger-than-input", "one-tap", "stride", "depthwise", "transposed-groups",
    "3d",
)  # fmt: skip
_ANY_SIZE = by_name("1d", "keras-layout", "stride-beyond-taps", "dilation", "depthwise", "transposed-stride", "3d")

FEATURES: tuple[Feature, ...] = (
    # A backend that is wrong fails here first, with the name of the method.
    Feature("operations", operations.check, operations.OPERATIONS, ("float32", "float64")),
    Feature("values", spectrum.values, TABLE, ALL_DTYPES),
    Feature("values, compiled", derivatives.compiled_values, TABLE, ("float32",), ("jit",)),
    Feature("methods", spectrum.methods, _HARD),
    Feature("frequencies", spectrum.frequencies, TABLE),
    Feature("symbol", spectrum.symbol, TABLE),
    Feature("svd", spectrum.svd, TABLE),
    Feature("singular vectors", spectrum.singular_vectors, TABLE),
    Feature("scalars", spectrum.scalars, TABLE),
    Feature("views", spectrum.views, by_name("rectangular", "groups", "transposed-stride")),
    Feature("clip", spectrum.clip, (*_CLIPPED, *_LEADING), ALL_DTYPES),
    Feature("project", projection.of_one_size, _PROJECTED, ALL_DTYPES, costly=True),
    Feature("project, nearest", projection.nearest, _NEAREST, costly=True),
    Feature("project, every size", projection.of_every_size, _ANY_SIZE, costly=True),
    Feature("project, zero", projection.of_nothing, by_name("1d", "transposed-groups"), ALL_DTYPES, costly=True),
    Feature("project, steps", projection.steps, _STEPPED, costly=True),
    Feature(
        "project, compiled",
        projection.compiled,
        by_name("1d", "transposed-groups"),
        ("float32",),
        ("jit",),
        costly=True,
    ),
    Feature("project, products", projection.without_decompositions, _PROJECTED, costly=True),
    Feature("extremes", spectrum.extremes, by_name("2d", "wide", "depthwise", "stride"), ALL_DTYPES),
    Feature(
        "random", drawn.of_drawn_cases, (drawn.Drawn("drawn", 40),), ("float32", "complex128"), imports="hypothesis"
    ),
    Feature("bounds", bounds.of_one_size, TABLE, ALL_DTYPES),
    Feature("bounds, every size", bounds.of_every_size, TABLE, ALL_DTYPES),
    Feature("bounds, fixed grid", bounds.of_a_fixed_grid, TABLE, ALL_DTYPES),
    Feature(
        "bounds, fixed grid, compiled",
        bounds.of_a_fixed_grid_compiled,
        _COMPILED,
        ("float32",),
        ("jit",),
        costly=True,
    ),
    Feature(
        "bounds, fixed grid, gradients",
        bounds.gradients_of_a_fixed_grid,
        (*_MEETING, *by_name("1d", "stride", "depthwise", "transposed-groups", "3d")),
        ("float32", "float64"),
        ("grad",),
    ),
    Feature("norms, output padding", padded.norms, padded.OUTPUT_PADDED, costly=True),
    Feature("norms, long kernels", padded.norms, padded.LONG, costly=True),
    Feature("direction", direction.of_one_size, _STEEPEST, ALL_DTYPES, costly=True),
    Feature(
        "direction, every size", direction.of_every_size, by_name("1d", "stride-beyond-taps", "depthwise"), costly=True
    ),
    Feature("direction, zero", direction.of_nothing, by_name("1d", "transposed-groups"), ALL_DTYPES, costly=True),
    Feature(
        "direction, compiled",
        direction.compiled,
        by_name("stride", "transposed-groups"),
        ("float32",),
        ("jit",),
        costly=True,
    ),
    Feature("bounds, flat", bounds.of_flat_symbols, _FLAT),
    Feature("bounds, peaks", bounds.of_peaks, bounds.PEAKS),
    Feature("traps", traps.norms, traps.TRAPS),
    Feature("trap of zero", traps.zero_kernel, (traps.ZERO,), ALL_DTYPES),
    Feature("trap of clip", traps.clip_leaves_more, (traps.CLIPPED,)),
    Feature("gradients", derivatives.gradients, _SMOOTH, REAL_DTYPES, ("grad",)),
    Feature("gradients, equal values", derivatives.gradients_where_values_meet, _MEETING, REAL_DTYPES, ("grad",)),
    Feature("penalties", penalties.values, TABLE, ALL_DTYPES),
    # float16 is left out: the true gradient of an eighth power overflows it.
    Feature("penalties, gradients", penalties.gradients, _PENALISED, ("bfloat16", "float32", "float64"), ("grad",)),
    Feature(
        "penalties, gradients compiled",
        penalties.gradients,
        by_name("rectangular", "stride", "transposed-groups", "zero", "orthogonal", "deficient"),
        ("float32",),
        ("jit", "grad"),
        costly=True,
    ),
    Feature("jit", derivatives.compiled, _COMPILED, ("float32", "float64", "complex64"), ("jit",)),
    Feature(
        "gradients, not compiled",
        derivatives.gradients_not_compiled,
        by_name("1d", "one-tap"),
        ("float32",),
        ("jit", "grad"),
        costly=True,
    ),
    Feature("vmap", derivatives.batched, _COMPILED, ("float32", "float64", "complex64"), ("vmap",), costly=True),
    Feature("errors", errors.mistakes, errors.MISTAKES, ("float32",)),
)
"""Every feature, in the order of reports."""
