"""Elementwise functions, sums, products, matrix products and reductions of ONNX as kinds of maps."""

from __future__ import annotations

from typing import Any

import numpy as np

from convsv_adapters._networks import Undescribed
from convsv_adapters.formats.onnx.graph import Node
from convsv_adapters.formats.onnx.operators import Reading, operator
from convsv_adapters.parameters import HostArray
from convsv_core.networks import (
    AxisMaps,
    BranchMatmul,
    Elementwise,
    Extremum,
    LogSoftmax,
    Matmul,
    Permute,
    Product,
    Quotient,
    Reduce,
    Scale,
    Shape,
    Softmax,
    Sum,
)

__all__: list[str] = []

FUNCTIONS: dict[str, tuple[str, dict[str, float]]] = {
    "Relu": ("relu", {}),
    "LeakyRelu": ("leaky_relu", {"alpha": 0.01}),
    "Elu": ("elu", {"alpha": 1.0}),
    "Selu": ("selu", {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875}),
    "Celu": ("celu", {"alpha": 1.0}),
    "HardSigmoid": ("hard_sigmoid", {"alpha": 0.2, "beta": 0.5}),
    "HardSwish": ("hard_swish", {}),
    "Mish": ("mish", {}),
    "Swish": ("silu", {}),
    "Sigmoid": ("sigmoid", {}),
    "Softplus": ("softplus", {}),
    "Softsign": ("softsign", {}),
    "Tanh": ("tanh", {}),
    "Abs": ("abs", {}),
    "Erf": ("erf", {}),
    "Sin": ("sin", {}),
    "Cos": ("cos", {}),
    "Atan": ("atan", {}),
    "Asinh": ("asinh", {}),
    "Exp": ("exp", {}),
    "Log": ("log", {}),
    "Sqrt": ("sqrt", {}),
    "Reciprocal": ("reciprocal", {}),
}
"""The function of the core for each operator, and its parameters with ONNX's defaults."""


@operator(*FUNCTIONS)
def _function(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    name, defaults = FUNCTIONS[node.op_type]
    parameters = {key: float(values.get(key, default)) for key, default in defaults.items()}
    if node.op_type == "Swish":
        parameters["beta"] = float(values.get("alpha", 1.0))
    reading.add(node, Elementwise(name, parameters), node.input[:1])


@operator("PRelu")
def _prelu(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    slope, shape = reading.constant(node.input[1]), reading.shape(node.input[0])
    if reading.opset < 7 and slope.ndim == 1 and len(shape) > 2:
        slope = slope.reshape(-1, *(1,) * (len(shape) - 2))
    if np.broadcast_shapes(slope.shape, shape) != shape:
        raise Undescribed("its slopes enlarge the tensor")
    reading.add(node, Elementwise("leaky_relu", {"alpha": slope}), node.input[:1])


@operator("Gelu")
def _gelu(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    name = "gelu_tanh" if values.get("approximate", "none") == "tanh" else "gelu"
    reading.add(node, Elementwise(name), node.input[:1])


@operator("Clip")
def _clip(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    low, high = reading.optional(node, 1), reading.optional(node, 2)
    ends = (values.get("min") if low is None else low), (values.get("max") if high is None else high)
    parameters = {
        name: float(np.reshape(end, ())) for name, end in zip(("low", "high"), ends, strict=True) if end is not None
    }
    reading.add(node, Elementwise("clip", parameters), node.input[:1])


@operator("Shrink")
def _shrink(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    threshold, shift = values.get("lambd", 0.5), values.get("bias", 0.0)
    if threshold != shift:
        raise Undescribed("its values jump, so that no constant exists")
    reading.add(node, Elementwise("soft_shrink", {"alpha": threshold}), node.input[:1])


@operator("Neg")
def _negative(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    reading.add(node, Scale(np.asarray(-1.0)), node.input[:1])


@operator("Pow")
def _power(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    exponent = reading.constant(node.input[1])
    if exponent.size != 1:
        raise Undescribed("it has several exponents")
    number = float(exponent.reshape(()))
    kind = Elementwise("square") if number == 2 else Elementwise("power", {"exponent": number})
    reading.add(node, kind, node.input[:1])


@operator("Softmax", "LogSoftmax")
def _softmax(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    rank = len(reading.shape(node.input[0]))
    # Before operator set 13, the axes from this one on count as one.
    early = reading.opset < 13
    axes = tuple(range(values.get("axis", 1) % rank, rank)) if early else (values.get("axis", -1) % rank,)
    reading.add(node, Softmax(axes) if node.op_type == "Softmax" else LogSoftmax(axes), node.input[:1])


# ---- sums and products ----------------------------------------------------------------


def _aligned(reading: Reading, node: Node, values: dict[str, Any], array: HostArray) -> HostArray:
    """Return a constant operand as NumPy broadcasts it: operator sets before 7 state an axis."""
    axis = values.get("axis")
    if reading.opset >= 7 or axis is None:
        return array
    rank = len(reading.shape(node.input[0]))
    return array.reshape(*array.shape, *(1,) * (rank - axis - array.ndim))


@operator("Add", "Sub", "Mul", "Div")
def _binary(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    x, y = node.input
    op = node.op_type
    if reading.is_constant(y):
        number = np.asarray(_aligned(reading, node, values, reading.constant(y)), np.float64)
        with np.errstate(divide="ignore"):
            kind = {
                "Add": lambda: Scale(shift=number),
                "Sub": lambda: Scale(shift=-number),
                "Mul": lambda: Scale(number),
                "Div": lambda: Scale(1 / number),
            }[op]()
        reading.add(node, kind, [x])
    elif reading.is_constant(x) and op != "Div":
        number = np.asarray(reading.constant(x), np.float64)
        kind = {
            "Add": lambda: Scale(shift=number),
            "Sub": lambda: Scale(np.asarray(-1.0), number),
            "Mul": lambda: Scale(number),
        }[op]()
        reading.add(node, kind, [y])
    else:
        reading.add(node, {"Add": Sum(), "Sub": Sum((1.0, -1.0)), "Mul": Product(), "Div": Quotient()}[op], [x, y])


@operator("Sum", "Mean")
def _sum(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    weight = 1.0 if node.op_type == "Sum" else 1 / len(node.input)
    reading.add(node, Sum((weight,) * len(node.input)), node.input)


@operator("Max", "Min")
def _extremum(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    reading.add(node, Extremum("max" if node.op_type == "Max" else "min"), node.input)


@operator("Where")
def _where(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    if not reading.is_constant(node.input[0]):
        raise Undescribed("which branch is taken depends on the input, and its values may jump")
    chosen = reading.constant(node.input[0]).astype(np.float64)
    x, y = node.input[1:]
    shape = reading.shape(node.output[0])
    if reading.is_constant(y):
        other = np.asarray(reading.constant(y), np.float64)
        reading.add(node, Scale(chosen, np.where(chosen > 0, 0.0, other)), [x])
    elif reading.is_constant(x):
        other = np.asarray(reading.constant(x), np.float64)
        reading.add(node, Scale(1 - chosen, np.where(chosen > 0, other, 0.0)), [y])
    else:
        parts = [
            reading.step(node, "first", Scale(chosen), [x], shape),
            reading.step(node, "second", Scale(1 - chosen), [y], shape),
        ]
        reading.add(node, Sum(), parts)


# ---- matrices ----------------------------------------------------------------


@operator("MatMul")
def _matmul(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    x, y = node.input
    if reading.is_constant(y):
        reading.add(node, Matmul(reading.constant(y)), [x])
    elif reading.is_constant(x):
        reading.add(node, Matmul(reading.constant(x), "left"), [y])
    else:
        reading.add(node, BranchMatmul(), [x, y])


@operator("Gemm")
def _gemm(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    x, y = node.input[:2]
    alpha, beta = values.get("alpha", 1.0), values.get("beta", 1.0)
    transposed = [bool(values.get(key, 0)) for key in ("transA", "transB")]
    bias = None
    if len(node.input) > 2 and node.input[2]:
        bias = beta * np.asarray(reading.constant(node.input[2]), np.float64)
    if reading.is_constant(y) or reading.is_constant(x):
        right = reading.is_constant(y)
        matrix = np.asarray(reading.constant(y if right else x), np.float64) * alpha
        matrix = matrix.T if transposed[1 if right else 0] else matrix
        source = _transposed_input(reading, node, x if right else y, transposed[0 if right else 1])
        reading.add(node, Matmul(matrix, "right" if right else "left", bias), [source])
        return
    parts = [_transposed_input(reading, node, name, flipped) for name, flipped in zip((x, y), transposed, strict=True)]
    product = reading.step(node, "product", BranchMatmul(), parts, reading.shape(node.output[0]))
    reading.add(node, Scale(np.asarray(alpha), np.zeros(()) if bias is None else bias), [product])


def _transposed_input(reading: Reading, node: Node, name: str, flipped: bool) -> str:
    if not flipped:
        return name
    rows, columns = reading.shape(name)
    return reading.step(node, f"transposed-{name}", Permute((1, 0)), [name], (columns, rows))


# ---- reductions ----------------------------------------------------------------

REDUCTIONS = {
    "ReduceSum": "sum",
    "ReduceMean": "mean",
    "ReduceMax": "max",
    "ReduceMin": "min",
    "ReduceL1": "l1",
    "ReduceL2": "l2",
    "ReduceLogSumExp": "logsumexp",
}
"""The function of the core for each reduction."""


def _axes(reading: Reading, node: Node, values: dict[str, Any], shape: Shape) -> tuple[int, ...]:
    axes = values.get("axes")
    given = reading.optional(node, 1)
    if given is not None:
        axes = tuple(int(axis) for axis in given.reshape(-1))
    if not axes:
        return () if values.get("noop_with_empty_axes", 0) else tuple(range(len(shape)))
    return tuple(sorted(axis % len(shape) for axis in axes))


@operator(*REDUCTIONS)
def _reduce(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    axes = _axes(reading, node, values, reading.shape(node.input[0]))
    reading.add(node, Reduce(REDUCTIONS[node.op_type], axes), node.input[:1])  # type: ignore[arg-type]


@operator("ReduceSumSquare")
def _sum_of_squares(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    shape = reading.shape(node.input[0])
    squares = reading.step(node, "square", Elementwise("square"), node.input[:1], shape)
    reading.add(node, Reduce("sum", _axes(reading, node, values, shape)), [squares])


@operator("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    axes = tuple(range(2, len(reading.shape(node.input[0]))))
    reading.add(node, Reduce("mean" if node.op_type == "GlobalAveragePool" else "max", axes), node.input[:1])


@operator("CumSum")
def _cumulative(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    shape = reading.shape(node.input[0])
    axis = int(reading.constant(node.input[1]).reshape(())) % len(shape)
    matrix = np.tri(shape[axis], k=-1 if values.get("exclusive", 0) else 0)
    reading.add(node, AxisMaps({axis: matrix.T if values.get("reverse", 0) else matrix}), node.input[:1])


@operator("Trilu")
def _triangle(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    shape, diagonal = reading.shape(node.input[0]), reading.optional(node, 1)
    k = 0 if diagonal is None else int(diagonal.reshape(()))
    kept = np.triu(np.ones(shape[-2:]), k) if values.get("upper", 1) else np.tril(np.ones(shape[-2:]), k)
    reading.add(node, Scale(kept), node.input[:1])
