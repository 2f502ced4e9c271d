"""From a user's array to an operand: checked, in a computing dtype, scaled, and in the plan's order of axes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from convsv_core._geometry.plan import IntArray, Plan, make_plan
from convsv_core._geometry.shapes import check_input_shape
from convsv_core.backend import Array, Backend
from convsv_core.conv import Conv
from convsv_core.plugins import backend_of

COMPLEX_OF = {"float32": "complex64", "float64": "complex128"}
REAL_OF = {"complex64": "float32", "complex128": "float64"}
ANSWERED_IN = {"float16": "float32", "bfloat16": "float32"}


@dataclass(frozen=True)
class Operand:
    """A kernel ready for computing.

    Attributes
    ----------
    kernel : array
        The user's array in the computing dtype, divided by `scale`.
    computed_in, answered_in : str
        Names of the real dtypes of the computation and of the results.
    scale : 0-d array
        A power of two near the largest entry, so that squares neither overflow nor vanish. A constant to
        differentiation, which is right because every result here is homogeneous in the kernel.
    finite : 0-d boolean array or None
        Under tracing, whether all entries are finite (those that are not were replaced); None where
        that has been checked.
    """

    backend: Backend
    xp: ModuleType
    plan: Plan
    kernel: Array
    computed_in: str
    answered_in: str
    scale: Array
    finite: Array | None

    @property
    def widened(self) -> bool:
        """Whether the arithmetic is wider than the answer."""
        return self.computed_in != self.answered_in

    @property
    def real_dtype(self) -> Any:
        """The computation's real dtype, as the library has it."""
        return getattr(self.xp, self.computed_in)

    @property
    def complex_dtype(self) -> Any:
        """The computation's complex dtype, as the library has it."""
        return getattr(self.xp, COMPLEX_OF[self.computed_in])

    @property
    def eps(self) -> float:
        """The spacing of numbers at 1 in the computation's dtype."""
        return float(self.xp.finfo(self.real_dtype).eps)

    @property
    def answer_eps(self) -> float:
        """The spacing of numbers at 1 in the answer's dtype."""
        return float(self.xp.finfo(getattr(self.xp, self.answered_in)).eps)

    def run(self, function: Callable[..., Any], *static: Any, arrays: tuple[Array, ...] = ()) -> Any:
        """Call ``function(self, *arrays, *static)``, compiled where the library compiles."""
        own = (self.kernel, self.scale) if self.finite is None else (self.kernel, self.scale, self.finite)
        with self.backend.computation_context(self.kernel):
            return self.backend.run(_call, (*own, *arrays), (function, self._frame(len(own)), static))

    def map_blocks(
        self, prepare: Callable[..., Any], rows: IntArray, *static: Any, arrays: tuple[Array, ...] = (), budget: int
    ) -> Any:
        """Map the function that ``prepare(self, *arrays, *static)`` returns over blocks of `rows`.

        `prepare` gets an operand without `finite`.
        """
        own = (self.kernel, self.scale)
        return self.backend.map_prepared(_call, rows, (*own, *arrays), (prepare, self._frame(len(own)), static), budget)

    def _frame(self, arrays: int) -> _Frame:
        return _Frame(self.plan, self.computed_in, self.answered_in, arrays)

    def on(self, input_shape: tuple[int, ...] | None, *, all_residues: bool = False) -> Operand:
        """Return the same kernel on an input of other extents, or on the infinite lattice; see `make_plan`."""
        shape = tuple(int(extent) for extent in self.kernel.shape)
        plan = make_plan(shape, self.plan.real, input_shape, self.plan.conv, all_residues=all_residues)
        return dataclasses.replace(self, plan=plan)

    def widen(self) -> Operand:
        """The same operand in float64 where the library has it at hand, to be answered as before."""
        if self.computed_in == "float64" or not self.backend.has_fast_float64(self.kernel):
            return self
        xp = self.xp
        kind = "complex128" if not self.plan.real else "float64"
        kernel, scale = xp.astype(self.kernel, getattr(xp, kind)), xp.astype(self.scale, xp.float64)
        return dataclasses.replace(self, kernel=kernel, scale=scale, computed_in="float64")

    def answer(self, values: Array, *, scaled: bool = True) -> Array:
        """`values` at the user's scale and in the answer's dtype; NaN where the kernel was not finite."""
        xp = self.xp
        if scaled:
            values = values * self.scale
        if self.finite is not None:
            values = xp.where(self.finite, values, xp.full_like(values, math.nan))
        is_complex = xp.isdtype(values.dtype, "complex floating")
        wanted = COMPLEX_OF[self.answered_in] if is_complex else self.answered_in
        return xp.astype(values, getattr(xp, wanted), copy=False)

    def taps(self) -> Array:
        """The kernel as matrices by offset: shape (offsets, groups, rows, columns of a block)."""
        xp, plan = self.xp, self.plan
        conv = plan.conv
        ndim = conv.ndim
        whole, grouped = ("I", "O") if conv.transposed else ("O", "I")
        order = [conv.layout.index(letter) for letter in (*conv.spatial, whole, grouped)]
        taps = xp.permute_dims(self.kernel, tuple(order))
        if conv.transposed:
            taps = self.backend.conj(taps)  # the layer is the transpose: the adjoint of the conjugate's convolution
        classes = [len(axis.residues) for axis in plan.axes]
        for index, axis in enumerate(plan.axes):
            # The spatial axis `index` becomes (offset, class); the class moves behind the axes still to do.
            if axis.tap_of_slot is not None:
                taps = self.take_or_zero(taps, axis.tap_of_slot, index)
        shape = tuple(itertools.chain.from_iterable((len(a.offsets), len(a.residues)) for a in plan.axes))
        taps = xp.reshape(taps, (*shape, plan.groups, plan.rows, plan.columns))
        offset_axes = range(0, 2 * ndim, 2)
        class_axes = range(1, 2 * ndim, 2)
        taps = xp.permute_dims(taps, (*offset_axes, 2 * ndim, 2 * ndim + 1, *class_axes, 2 * ndim + 2))
        count = math.prod(len(axis.offsets) for axis in plan.axes)
        taps = xp.reshape(taps, (count, plan.groups, plan.rows, math.prod(classes) * plan.columns))
        return self.backend.contiguous(taps)

    def take_or_zero(self, array: Array, places: IntArray, axis: int) -> Array:
        """Entries of `array` along `axis`; zeros where a place is the extent of that axis."""
        xp, extent = self.xp, array.shape[axis]
        if extent in places:
            nothing = xp.zeros_like(self.backend.take(array, np.zeros(1, int), axis))
            array = xp.concat([array, nothing], axis=axis)
        return self.backend.take(array, places, axis)

    def from_taps(self, taps: Array) -> Array:
        """Put matrices by offset back into an array of the kernel's shape: the inverse of `taps`."""
        xp, plan = self.xp, self.plan
        conv, ndim = plan.conv, plan.conv.ndim
        offsets = [len(axis.offsets) for axis in plan.axes]
        classes = [len(axis.residues) for axis in plan.axes]
        taps = xp.reshape(taps, (*offsets, plan.groups, plan.rows, *classes, plan.columns))
        pairs = itertools.chain.from_iterable((i, ndim + 2 + i) for i in range(ndim))
        taps = xp.permute_dims(taps, (*pairs, ndim, ndim + 1, 2 * ndim + 2))
        merged = [q * r for q, r in zip(offsets, classes, strict=True)]
        taps = xp.reshape(taps, (*merged, plan.groups * plan.rows, plan.columns))
        for index, axis in enumerate(plan.axes):
            if axis.slot_of_tap is not None:
                taps = self.backend.take(taps, axis.slot_of_tap, index)
        if conv.transposed:
            taps = self.backend.conj(taps)
        letters = (*conv.spatial, *(("I", "O") if conv.transposed else ("O", "I")))
        return xp.permute_dims(taps, tuple(letters.index(letter) for letter in conv.layout))


class _Frame(NamedTuple):
    """The static part of an operand: a backend passes it beside the arrays without a look at it.

    `arrays` counts the operand's own arrays, which come first: kernel, scale and, under tracing, `finite`.
    """

    plan: Plan
    computed_in: str
    answered_in: str
    arrays: int


def _call(*arguments: Any) -> Any:
    """Put an operand together again and call a function of it.

    The arguments are arrays, the operand's own first, then the function, the `_Frame` and a tuple of static arguments.
    """
    *arrays, function, frame, static = arguments
    kernel, scale, *finite = arrays[: frame.arrays]
    backend = backend_of(kernel)
    xp = backend.namespace(kernel)
    operand = Operand(backend, xp, frame.plan, kernel, frame.computed_in, frame.answered_in, scale, *(finite or [None]))
    return function(operand, *arrays[frame.arrays :], *static)


def make_operand(kernel: Array, input_shape: object, conv: Conv, *, all_residues: bool = False) -> Operand:
    """Check a call's arguments and prepare the kernel."""
    backend = backend_of(kernel)
    xp = backend.namespace(kernel)
    check_conv(conv)
    dtype = check_dtype(kernel)
    is_complex = dtype in REAL_OF
    answered_in = computed_in = REAL_OF.get(dtype, dtype)
    shape = tuple(int(extent) for extent in kernel.shape)
    extents = None if input_shape is None else check_input_shape(input_shape, conv)
    plan = make_plan(shape, not is_complex, extents, conv, all_residues=all_residues)
    kernel = xp.astype(
        backend.in_one_piece(kernel), getattr(xp, COMPLEX_OF[computed_in] if is_complex else computed_in), copy=False
    )
    kernel, finite = check_finite(backend, kernel)
    kernel, scale = backend.run(normalise, (kernel,), (backend,))
    return Operand(backend, xp, plan, kernel, computed_in, answered_in, scale, finite)


def shape_of(kernel: Array, conv: object) -> tuple[int, ...]:
    """Return the shape of a kernel as ints, after checking that it is an array and `conv` a `Conv`."""
    backend_of(kernel)
    check_conv(conv)
    return tuple(int(extent) for extent in kernel.shape)


def check_conv(conv: object) -> None:
    """Raise TypeError unless `conv` is a `Conv`."""
    if not isinstance(conv, Conv):
        hint = f"; did you mean Conv({conv!r})?" if isinstance(conv, str) else ""
        raise TypeError(f"conv={conv!r}: wanted a convsv.Conv, not {type(conv).__name__}{hint}")


def dtype_name(dtype: Any) -> str:
    """Name of an array's dtype, of any library, such as "float32"."""
    name: str = getattr(dtype, "name", "") or str(dtype).rpartition(".")[2]
    return name


def check_dtype(kernel: Array) -> str:
    """Name of the dtype that the kernel's results are answered in; TypeError for integers and the like."""
    name = dtype_name(kernel.dtype)
    answered = ANSWERED_IN.get(name, name)
    if answered not in COMPLEX_OF and answered not in REAL_OF:
        raise TypeError(
            f"kernel has dtype {name}: wanted one of {', '.join((*ANSWERED_IN, *COMPLEX_OF, *REAL_OF))}; "
            f"convert it first, for integers to a floating-point dtype with the scale that they stand for"
        )
    return answered


def check_finite(backend: Backend, kernel: Array) -> tuple[Array, Array | None]:
    """Raise ValueError for NaN or infinity; under tracing replace them and say so in the second result."""
    xp = backend.namespace(kernel)
    finite = xp.all(xp.isfinite(kernel))
    known = backend.truth(finite)
    if known is None:
        return xp.where(finite, kernel, xp.zeros_like(kernel)), finite
    if not known:
        raise ValueError("kernel holds NaN or infinity: wanted finite numbers (has training diverged?)")
    return kernel, None


def normalise(kernel: Array, backend: Backend) -> tuple[Array, Array]:
    """The kernel divided by a power of two near its largest entry, and that power."""
    xp = backend.namespace(kernel)
    largest = xp.max(xp.abs(backend.stop_gradient(kernel)))
    # Half an exponent of room on each side keeps the power itself and its reciprocal normal numbers.
    limits = xp.finfo(largest.dtype)
    least, most = (xp.full_like(largest, x) for x in (4 * float(limits.smallest_normal), float(limits.max) / 4))
    largest = xp.where(largest <= least, xp.ones_like(largest), xp.minimum(largest, most))
    scale = xp.pow(xp.full_like(largest, 2.0), xp.floor(xp.log2(largest)))
    return kernel / scale, scale
