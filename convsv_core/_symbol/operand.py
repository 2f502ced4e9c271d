"""An operand is the user's kernel, checked, in the dtype of the computation, scaled, with its geometry."""

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
from convsv_core._geometry.shapes import channel_letters, check_input_shape
from convsv_core._symbol.kernel_values import check_finite, normalise
from convsv_core.backend import Array, ArraySpec, Backend
from convsv_core.conv import Conv
from convsv_core.dtypes import COMPLEX_OF, REAL_OF, answer_dtype
from convsv_core.plugins import backend_of

__all__ = ["Operand", "check_conv", "make_operand", "shape_of"]


@dataclass(frozen=True)
class Operand:
    """Hold a kernel that is ready for computing.

    Attributes
    ----------
    backend : Backend
        The backend that owns the kernel.
    xp : module
        The kernel's array namespace.
    plan : Plan
        The geometry, resolved to integers.
    kernel : array
        The user's array in the dtype of the computation, divided by `scale`. The axes are those of the user's array.
    computed_in, answered_in : str
        Names of the real dtypes of the computation and of the results.
    scale : 0-d array
        A power of two near the largest entry. With it, squares of entries neither overflow nor vanish. It is a
        constant for differentiation, which is right because every result is homogeneous in the kernel.
    finite : 0-d boolean array or None
        Whether all entries of a traced kernel are finite. If not, `kernel` is 0. None if the entries have been checked.
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
        """Tell whether the dtype of the computation is wider than the dtype of the answer."""
        return self.computed_in != self.answered_in

    @property
    def is_double(self) -> bool:
        """Tell whether the computation is in double precision."""
        return self.computed_in == "float64"

    @property
    def real_dtype(self) -> Any:
        """Return the library's own object for the real dtype of the computation."""
        return getattr(self.xp, self.computed_in)

    @property
    def complex_dtype(self) -> Any:
        """Return the library's own object for the complex dtype of the computation."""
        return getattr(self.xp, COMPLEX_OF[self.computed_in])

    @property
    def kernel_dtype(self) -> str:
        """Return the name of the kernel's dtype, real or complex."""
        return self.computed_in if self.plan.real else COMPLEX_OF[self.computed_in]

    @property
    def complex_bytes(self) -> int:
        """Return the bytes of one complex number of the computation."""
        return int(2 * self.xp.finfo(self.real_dtype).bits // 8)

    @property
    def kernel_bytes(self) -> int:
        """Return the bytes of one entry of the kernel."""
        return self.complex_bytes // (2 if self.plan.real else 1)

    @property
    def eps(self) -> float:
        """Return the spacing of numbers at 1 in the dtype of the computation."""
        return float(self.xp.finfo(self.real_dtype).eps)

    @property
    def answer_eps(self) -> float:
        """Return the spacing of numbers at 1 in the dtype of the answer."""
        return float(self.xp.finfo(getattr(self.xp, self.answered_in)).eps)

    def run(self, function: Callable[..., Any], *static: Any, arrays: tuple[Array, ...] = ()) -> Any:
        """Return ``function(self, *arrays, *static)``, compiled if the library compiles."""
        own = (self.kernel, self.scale) if self.finite is None else (self.kernel, self.scale, self.finite)
        with self.backend.computation_context(self.kernel):
            return self.backend.run(_call, (*own, *arrays), (function, self._frame(len(own)), static))

    def map_blocks(
        self, prepare: Callable[..., Any], rows: IntArray, *static: Any, arrays: tuple[Array, ...] = (), budget: int
    ) -> Any:
        """Map the work that ``prepare(self, *arrays, *static)`` returns, a `BlockWork`, over blocks of `rows`.

        The operand that `prepare` gets has no `finite`. `budget` is the bytes of working memory for all blocks
        computed at one time.
        """
        own = (self.kernel, self.scale)
        return self.backend.map_prepared(_call, rows, (*own, *arrays), (prepare, self._frame(len(own)), static), budget)

    def call_host(
        self,
        function: Callable[..., tuple[Any, ...]],
        *static: Any,
        arrays: tuple[Array, ...] = (),
        results: tuple[ArraySpec, ...],
        otherwise: Callable[..., tuple[Array, ...]],
        gradient: Callable[..., tuple[Any, ...]] | None = None,
    ) -> tuple[Array, ...]:
        """Return ``function(operand, *arrays, *static)`` from the host, or the results of `otherwise` from the program.

        See `Backend.call_host`. The operand that `function` and `gradient` get has NumPy arrays. No operand has
        `finite`: its kernel is 0 where the user's is not finite.
        """
        own, frame = (self.kernel, self.scale), self._frame(2)

        def with_operand(function: Callable[..., Any], frame: _Frame) -> Callable[..., Any]:
            return lambda *arrays: _call(*arrays, function, frame, static)

        bare = frame._replace(backend=None)
        return self.backend.call_host(
            with_operand(function, bare),
            (*own, *arrays),
            results,
            with_operand(otherwise, frame),
            gradient=None if gradient is None else with_operand(gradient, bare),
        )

    def _frame(self, arrays: int) -> _Frame:
        """Return the static part of the operand; `arrays` is the number of its own arrays."""
        backend = None if self.backend.lazy else self.backend
        return _Frame(backend, self.plan, self.computed_in, self.answered_in, arrays)

    def on(self, input_shape: tuple[int, ...] | None, *, all_residues: bool = False) -> Operand:
        """Return the operand of the same kernel for an input of another shape.

        None stands for the infinite lattice. See `make_plan` for the arguments.
        """
        shape = tuple(int(extent) for extent in self.kernel.shape)
        plan = make_plan(shape, self.plan.real, input_shape, self.plan.conv, all_residues=all_residues)
        return dataclasses.replace(self, plan=plan)

    def of(self, kernel: Array) -> Operand:
        """Return the operand of another kernel, given in the dtype and at the scale of this one."""
        return dataclasses.replace(self, kernel=kernel)

    def complex_zeros(self, shape: tuple[int, ...]) -> Array:
        """Return zeros of this shape in the complex dtype of the computation, on the device of the kernel."""
        xp = self.xp
        return xp.broadcast_to(xp.astype(xp.zeros_like(self.scale), self.complex_dtype), shape)

    def widen(self) -> Operand:
        """Return the operand in float64 if the library computes fast in it, with the dtype of the answer kept."""
        if self.is_double or not self.backend.has_fast_float64(self.kernel):
            return self
        xp = self.xp
        kernel = xp.astype(self.kernel, xp.float64 if self.plan.real else xp.complex128)
        return dataclasses.replace(self, kernel=kernel, scale=xp.astype(self.scale, xp.float64), computed_in="float64")

    def answer(self, values: Array, *, scaled: bool = True) -> Array:
        """Return `values` in the dtype of the answer, multiplied by the operand's scale if `scaled`.

        The values are NaN if the kernel is traced and not finite.
        """
        xp = self.xp
        if scaled:
            values = values * self.scale
        values = self.or_nan(values)
        is_complex = xp.isdtype(values.dtype, "complex floating")
        wanted = COMPLEX_OF[self.answered_in] if is_complex else self.answered_in
        return xp.astype(values, getattr(xp, wanted), copy=False)

    def answer_upper(self, values: Array, *, scaled: bool = True) -> Array:
        """Return what `answer` does for upper bounds, of at least the smallest normal number where they are positive.

        A subnormal number may be rounded by more than any share of it, and some devices take it for 0.
        """
        xp, found = self.xp, self.answer(values, scaled=scaled)
        known = self.backend.stop_gradient(found)
        least = xp.full_like(known, float(xp.finfo(known.dtype).smallest_normal))
        return found + xp.where((values > 0) & (known < least), least - known, xp.zeros_like(known))

    def answer_lower(self, values: Array, *, scaled: bool = True) -> Array:
        """Return what `answer` does for lower bounds, of at most the largest finite number.

        Where a positive one would be subnormal it is 0; see `answer_upper`.
        """
        xp, found = self.xp, self.answer(values, scaled=scaled)
        limits = xp.finfo(found.dtype)
        found = xp.minimum(found, xp.full_like(found, float(limits.max)))
        return xp.where((found > 0) & (found < float(limits.smallest_normal)), xp.zeros_like(found), found)

    def or_nan(self, values: Array) -> Array:
        """Return `values`, or NaN if the kernel is traced and not finite."""
        if self.finite is None:
            return values
        return self.xp.where(self.finite, values, self.xp.full_like(values, math.nan))

    def taps(self) -> Array:
        """Return the kernel as one matrix for each offset: shape (offsets, groups, rows, columns of a block)."""
        xp, plan = self.xp, self.plan
        conv = plan.conv
        ndim = conv.ndim
        order = [conv.layout.index(letter) for letter in (*conv.spatial, *channel_letters(conv))]
        taps = xp.permute_dims(self.kernel, tuple(order))
        if conv.transposed:
            # The layer is the transpose of a convolution, which is the adjoint of the conjugate kernel's convolution.
            taps = self.backend.conj(taps)
        classes = [len(axis.residues) for axis in plan.axes]
        for index, axis in enumerate(plan.axes):
            # The slots of the spatial axis `index` stand for pairs (offset, class), which are split below.
            if axis.tap_of_slot is not None:
                taps = self.take_or_zero(taps, axis.tap_of_slot, index)
        shape = tuple(itertools.chain.from_iterable((len(a.offsets), len(a.residues)) for a in plan.axes))
        taps = xp.reshape(taps, (*shape, plan.groups, plan.rows, plan.columns))
        offset_axes = range(0, 2 * ndim, 2)
        class_axes = range(1, 2 * ndim, 2)
        taps = xp.permute_dims(taps, (*offset_axes, 2 * ndim, 2 * ndim + 1, *class_axes, 2 * ndim + 2))
        taps = xp.reshape(taps, (plan.offset_count, plan.groups, plan.rows, math.prod(classes) * plan.columns))
        return self.backend.contiguous(taps)

    def take_or_zero(self, array: Array, places: IntArray, axis: int) -> Array:
        """Return the entries of `array` along `axis` at `places`, and zeros where a place equals the axis's extent."""
        xp, extent = self.xp, array.shape[axis]
        if extent in places:
            nothing = xp.zeros_like(self.backend.take(array, np.zeros(1, int), axis))
            array = xp.concat([array, nothing], axis=axis)
        return self.backend.take(array, places, axis)

    def from_taps(self, taps: Array) -> Array:
        """Return an array of the kernel's shape from one matrix for each offset: the inverse of `taps`."""
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
        letters = (*conv.spatial, *channel_letters(conv))
        return xp.permute_dims(taps, tuple(letters.index(letter) for letter in conv.layout))


class _Frame(NamedTuple):
    """Hold the static part of an operand, which a backend passes along with the arrays.

    Attributes
    ----------
    backend : Backend or None
        The backend of the arrays, which saves asking all backends. None where tasks get arrays of another library.
    plan, computed_in, answered_in
        As in `Operand`.
    arrays : int
        The number of the operand's own arrays, which come first: kernel, scale and, under tracing, `finite`.
    """

    backend: Backend | None
    plan: Plan
    computed_in: str
    answered_in: str
    arrays: int


def _call(*arguments: Any) -> Any:
    """Build an operand from its parts and return what a function of the operand returns.

    The arguments are the operand's own arrays, further arrays, the function, the `_Frame`, and a tuple of static
    arguments.
    """
    *arrays, function, frame, static = arguments
    kernel, scale, *finite = arrays[: frame.arrays]
    backend = frame.backend or backend_of(kernel)
    xp = backend.namespace(kernel)
    operand = Operand(backend, xp, frame.plan, kernel, frame.computed_in, frame.answered_in, scale, *(finite or [None]))
    return function(operand, *arrays[frame.arrays :], *static)


def make_operand(
    kernel: Array,
    input_shape: object,
    conv: Conv,
    *,
    lattice: bool = False,
    all_residues: bool = False,
    name: str = "kernel",
) -> Operand:
    """Check the arguments of a call and return the operand.

    Parameters
    ----------
    kernel : array
        The user's kernel.
    input_shape : object
        The user's spatial extents, or None for the infinite lattice.
    conv : Conv
        The geometry.
    lattice : bool, default False
        Whether None is taken. Most numbers of an operator are those of one input size.
    all_residues : bool, default False
        As for `make_plan`.
    name : str, default "kernel"
        The name of the user's argument in an error.

    Raises
    ------
    TypeError
        `kernel` is not an array of an installed library or not of a floating dtype, `conv` is not a `Conv`, or
        `input_shape` is None without `lattice`.
    ValueError
        The shapes do not fit each other, or the kernel holds NaN or infinity.
    """
    backend = backend_of(kernel)
    xp = backend.namespace(kernel)
    check_conv(conv)
    dtype = answer_dtype(kernel)
    is_complex = dtype in REAL_OF
    answered_in = computed_in = REAL_OF.get(dtype, dtype)
    shape = tuple(int(extent) for extent in kernel.shape)
    extents = None if lattice and input_shape is None else check_input_shape(input_shape, conv)
    plan = make_plan(shape, not is_complex, extents, conv, all_residues=all_residues)
    kernel = xp.astype(
        backend.in_one_piece(kernel), getattr(xp, COMPLEX_OF[computed_in] if is_complex else computed_in), copy=False
    )
    kernel, finite = check_finite(backend, kernel, name)
    kernel, scale = backend.run(normalise, (kernel,), (backend,))
    return Operand(backend, xp, plan, kernel, computed_in, answered_in, scale, finite)


def shape_of(kernel: Array, conv: object) -> tuple[int, ...]:
    """Return the shape of a kernel as ints, after a check that it is an array and that `conv` is a `Conv`."""
    backend_of(kernel)
    check_conv(conv)
    return tuple(int(extent) for extent in kernel.shape)


def check_conv(conv: object) -> None:
    """Raise TypeError unless `conv` is a `Conv`."""
    if not isinstance(conv, Conv):
        hint = f"; did you mean Conv({conv!r})?" if isinstance(conv, str) else ""
        raise TypeError(f"conv={conv!r}: wanted a convsv.Conv, not {type(conv).__name__}{hint}")
