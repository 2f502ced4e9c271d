"""Convolutions, products with constant matrices, pooling and reductions of JAX functions as kinds of maps."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from convsv_adapters._jax.calls import Call, Result, Rule
from convsv_adapters._jax.equations import Value
from convsv_adapters._networks import Traced, Undescribed
from convsv_core import Conv
from convsv_core.conv import SPATIAL_LETTERS, transposed_conv
from convsv_core.networks import (
    AveragePool,
    AxisMaps,
    BranchMatmul,
    Convolution,
    Identity,
    Matmul,
    MaxPool,
    Pad,
    Permute,
    Reduce,
    Reshape,
    Scale,
)

__all__ = ["LAYER_RULES", "average_of"]


# ---- convolutions ------------------------------------------------------------------------------------------


def _convolution(call: Call) -> Result:
    params = call.params
    numbers = params["dimension_numbers"]
    kernel = np.transpose(call.constant(1), numbers.rhs_spec)
    ndim = kernel.ndim - 2
    if ndim not in SPATIAL_LETTERS:
        raise Undescribed(f"a convolution with {ndim} spatial axes")
    if params["batch_group_count"] != 1:
        raise Undescribed("a convolution that mixes the examples of a batch")
    x, pads, spread = call.x, params["padding"], params["lhs_dilation"]
    letters = SPATIAL_LETTERS[ndim]
    layout = _letters(numbers.lhs_spec, letters)
    stride, dilation, groups = params["window_strides"], params["rhs_dilation"], params["feature_group_count"]
    if all(step == 1 for step in spread) or any(step != 1 for step in stride):
        x, pads = _padded(call, x, numbers.lhs_spec, pads, spread)
        conv = Conv(f"OI{letters}", stride=stride, dilation=dilation, groups=groups, padding=pads, padding_mode="zeros")
    else:
        reach = [d * (k - 1) for k, d in zip(kernel.shape[2:], dilation, strict=True)]
        sides = [(r - before, r - after) for r, (before, after) in zip(reach, pads, strict=True)]
        kernel = _adjoint(kernel, groups)
        conv = transposed_conv(f"IO{letters}", kernel.shape[2:], sides, stride=spread, dilation=dilation, groups=groups)
    kind = Convolution(kernel, conv, layout=layout)
    if numbers.out_spec == numbers.lhs_spec:
        return call.result(kind, x)
    made = _letters(numbers.out_spec, letters)
    order = tuple(layout.index(letter) for letter in made)
    shape = [call.shape[made.index(letter)] for letter in layout]
    return call.result(Permute(order), call.step(kind, x, shape=shape))


def _letters(spec: tuple[int, ...], letters: str) -> str:
    """Return the letter of each axis of an array, from the axes of batch, channels and extents."""
    named = dict(zip(spec, f"NC{letters}", strict=True))
    return "".join(named[axis] for axis in range(len(spec)))


def _padded(call: Call, x: Traced, spec: Any, pads: Any, spread: Any) -> tuple[Traced, Any]:
    """Return the input with zeros between its elements, or cropped, where a `Conv` cannot say so, and other pads."""
    if all(step == 1 for step in spread) and min((min(pair) for pair in pads), default=0) >= 0:
        return x, tuple((int(before), int(after)) for before, after in pads)
    around, between = [(0, 0)] * len(x.shape), [0] * len(x.shape)
    for axis, pair, step in zip(spec[2:], pads, spread, strict=True):
        around[axis], between[axis] = (int(pair[0]), int(pair[1])), int(step) - 1
    shape = [
        n + (n - 1) * between[axis] + sum(around[axis]) if n else sum(around[axis]) for axis, n in enumerate(x.shape)
    ]
    kind = Pad(tuple(around), interior=tuple(between) if any(between) else None)
    return call.step(kind, x, shape=shape), ((0, 0),) * len(pads)


def _adjoint(kernel: Any, groups: int) -> Any:
    """Return the kernel (I, O of a group, taps) of the transposed layer that convolves with a kernel (O, I, taps)."""
    flipped = np.flip(kernel, tuple(range(2, kernel.ndim)))
    outputs, inputs, *taps = flipped.shape
    split = flipped.reshape(groups, outputs // groups, inputs, *taps)
    return np.swapaxes(split, 1, 2).reshape(groups * inputs, outputs // groups, *taps)


# ---- products ------------------------------------------------------------------------------------------------


def _dot_general(call: Call) -> Result:
    """Describe a product over some axes: both operands become stacks of matrices, of which one may be constant."""
    (contract, batch) = call.params["dimension_numbers"]
    x, y = call.operands
    sides = [_axes(one, contract[side], batch[side]) for side, one in enumerate((x, y))]
    if isinstance(x, Traced) and not isinstance(y, Traced) and not batch[0] and sides[0].is_matrix_last:
        return call.result(Matmul(_stack(y, sides[1], rows_first=False)), x)
    left = _matrices(call, x, sides[0], rows_first=True)
    right = _matrices(call, y, sides[1], rows_first=False)
    shape = (*sides[0].batch_shape, sides[0].rows, sides[1].rows)
    if isinstance(left, Traced) and isinstance(right, Traced):
        product = call.step(BranchMatmul(), left, right, shape=shape)
    elif isinstance(left, Traced):
        product = call.step(Matmul(right), left, shape=shape)
    else:
        product = call.step(Matmul(left, "left"), right, shape=shape)
    return call.result(Reshape(), product)


class _axes:
    """The axes of one operand of a product: the batch axes, the kept axes, and the axes that are summed over."""

    def __init__(self, operand: Any, contract: Any, batch: Any) -> None:
        shape = np.shape(operand) if not isinstance(operand, Traced) else operand.shape
        self.batch, self.contract = tuple(batch), tuple(contract)
        self.free = tuple(axis for axis in range(len(shape)) if axis not in (*self.batch, *self.contract))
        self.batch_shape = tuple(shape[axis] for axis in self.batch)
        self.rows = math.prod(shape[axis] for axis in self.free)
        self.columns = math.prod(shape[axis] for axis in self.contract)
        self.is_matrix_last = self.contract == (len(shape) - 1,)

    def order(self, *, rows_first: bool) -> tuple[int, ...]:
        middle = (*self.free, *self.contract) if rows_first else (*self.contract, *self.free)
        return (*self.batch, *middle)

    def shape(self, *, rows_first: bool) -> tuple[int, ...]:
        return (*self.batch_shape, *((self.rows, self.columns) if rows_first else (self.columns, self.rows)))


def _stack(array: Any, axes: _axes, *, rows_first: bool) -> Any:
    return np.transpose(array, axes.order(rows_first=rows_first)).reshape(axes.shape(rows_first=rows_first))


def _matrices(call: Call, operand: Any, axes: _axes, *, rows_first: bool) -> Any:
    """Return an operand as a stack of matrices."""
    if not isinstance(operand, Traced):
        return _stack(operand, axes, rows_first=rows_first)
    order, shape = axes.order(rows_first=rows_first), axes.shape(rows_first=rows_first)
    if order != tuple(range(len(order))):
        operand = call.step(Permute(order), operand, shape=[operand.shape[axis] for axis in order])
    return operand if operand.shape == shape else call.step(Reshape(), operand, shape=shape)


# ---- pooling and reductions --------------------------------------------------------------------------------------


def _window_sum(call: Call) -> Result:
    kind = _windows(call.params)
    average = call.step(kind, call.x, shape=call.shape)
    return call.result(Scale(np.asarray(float(math.prod(kind.window)))), average)


def _windows(params: Any) -> AveragePool:
    if any(step != 1 for step in params["base_dilation"]):
        raise Undescribed("a pooling with gaps between the elements of its input")
    names = ("window_dimensions", "window_strides", "window_dilation")
    window, strides, dilations = (tuple(int(one) for one in params[name]) for name in names)
    pads = tuple((int(before), int(after)) for before, after in params["padding"])
    return AveragePool(window, strides, dilations, pads, pads)


def _window_max(call: Call) -> Result:
    kind = _windows(call.params)
    return call.result(MaxPool(kind.window, kind.strides, kind.dilations, kind.padding), call.x)


def average_of(call: Call, value: Value, divisor: Any) -> Result | None:
    """Describe a sum over windows or axes that is divided by the number of its elements, or return None."""
    equation = value.equation
    if equation is None or not isinstance(x := equation.operands[0], Value):
        return None
    if equation.primitive == "reduce_sum":
        axes = tuple(int(axis) for axis in equation.params["axes"])
        count = math.prod(x.shape[axis] for axis in axes)
        fits = bool(axes) and np.all(divisor == count)
        return call.result(Reduce("mean", axes), call.known[x]) if fits else None
    if equation.primitive != "reduce_window_sum" or any(step != 1 for step in equation.params["base_dilation"]):
        return None
    kind = _windows(equation.params)
    if np.all(divisor == math.prod(kind.window)):
        return call.result(kind, call.known[x])
    if np.array_equal(np.broadcast_to(divisor, value.shape), _counts(kind, x.shape)):
        none = ((0, 0),) * len(x.shape)
        kind = AveragePool(kind.window, kind.strides, kind.dilations, kind.padding, none)
        return call.result(kind, call.known[x])
    return None


def _counts(kind: AveragePool, shape: tuple[int, ...]) -> Any:
    """Return the number of elements of each window that are not padding."""
    counts = np.ones(())
    for n, k, s, d, (before, after) in zip(shape, kind.window, kind.strides, kind.dilations, kind.padding, strict=True):
        inside = np.pad(np.ones(n), (before, after))
        starts = np.arange((len(inside) - d * (k - 1) - 1) // s + 1) * s
        row = inside[starts[:, None] + d * np.arange(k)].sum(axis=1)
        counts = counts[..., None] * row
    return counts


def _reduction(function: Literal["sum", "max", "min"]) -> Rule:
    def rule(call: Call) -> Result:
        axes = tuple(int(axis) for axis in call.params["axes"])
        return call.result(Reduce(function, axes) if axes else Identity(), call.x)

    return rule


def _cumulative_sum(call: Call) -> Result:
    axis = call.params["axis"]
    matrix = np.tril(np.ones((call.shape[axis],) * 2))
    return call.result(AxisMaps({axis: matrix.T if call.params["reverse"] else matrix}), call.x)


def _control_flow(call: Call) -> Result:
    raise Undescribed("control flow")


LAYER_RULES: dict[str, Rule] = {
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "reduce_window_sum": _window_sum,
    "reduce_window_max": _window_max,
    "reduce_sum": _reduction("sum"),
    "reduce_max": _reduction("max"),
    "reduce_min": _reduction("min"),
    "cumsum": _cumulative_sum,
    **dict.fromkeys(("cond", "while", "scan"), _control_flow),
}
"""The rules of primitives that multiply by kernels and matrices, or take sums and maxima, by their names in JAX."""
