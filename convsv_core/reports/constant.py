"""`lipschitz`: the certified Lipschitz constant of a network, from its graph."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convsv_core._network import kinds
from convsv_core._network.attained import attained_norm
from convsv_core._network.blocks import residual_blocks
from convsv_core._network.bounds import Bounds
from convsv_core._network.graph import Graph, Node
from convsv_core._network.kinds import NumberArray
from convsv_core._network.logarithms import log_of, log_root, power_of_ten
from convsv_core._network.patterns import simplify
from convsv_core.conv import as_float, as_int
from convsv_core.layers import ModelError, ReadOptions
from convsv_core.plugins import plugins
from convsv_core.reports.constant_report import Lipschitz, LipschitzNode

__all__ = ["checked_range", "lipschitz", "network_graph", "network_lipschitz"]


def lipschitz(
    model: object,
    example_input: object = None,
    *,
    output: str | None = None,
    input_range: tuple[float, float] | None = None,
    lower: bool = True,
    search: int = 32,
    seed: int = 0,
) -> Lipschitz:
    r"""Certify the Lipschitz constant of a network at inference, in Euclidean norms of whole tensors.

    Parameters
    ----------
    model : object
        A model of a framework that an installed plugin knows, such as a `torch.nn.Module` in evaluation mode; an ONNX
        model or the path of a file that holds a network's graph; or a `convsv_core.networks.Graph`.
    example_input : object, optional
        An input of one example, from which the shapes of all tensors follow. The adapter of the framework says in
        which form; for a file it is an array for the first input, or a mapping from names of inputs to arrays. The
        lower bound is measured at it.
    output : str, optional
        The name of the tensor to bound, such as the logits before a softmax. By default the network's outputs, all
        together if there are several.
    input_range : tuple of float, optional
        The least and the largest value of every element of the input. Interval arithmetic then bounds all activations,
        and products of activations have a bound. The constant holds between inputs in that range.
    lower : bool, default True
        Whether to measure a lower bound too.
    search : int, default 32
        Largest number of inputs at which the lower bound is measured: the example, random ones of several sizes or
        from the `input_range`, and steps from the best of them. Large networks get fewer, so that the search takes
        some five processor seconds at most. With 1 it is measured at the example alone. Random changes of 1e-6 of
        its size keep the example off points where the derivative jumps.
    seed : int, default 0
        The seed of the search, which decides its result.

    Returns
    -------
    Lipschitz
        A dataclass with ``upper``, ``log10_upper``, ``log10_product``, ``lower``, ``nodes``, ``blocks`` and
        ``missing``. ``str`` gives a table. Where a node has no bound, ``upper`` is infinite, and ``missing`` names the
        node, the reason and the bound up to it.

    Raises
    ------
    TypeError
        `model` is of no framework that an installed plugin knows.
    ValueError
        There is no such `output`, the `input_range` is empty, `search` is below 1, or the front end refuses the call,
        such as for a model in training mode.
    ModelError
        The file cannot be read.

    Notes
    -----
    One pass in topological order bounds every tensor as a function of the network's inputs. Maps in a row multiply
    their bounds, a sum of branches adds them, and a concatenation takes the root of the sum of squares. Before norms
    are taken, linear maps in a row, and sums of them, are put together where that is sound: a batch normalisation goes
    into the convolution in front of it, and convolutions multiply where the second one pads nothing. The bound is the
    least bound that is found, so it is never above the plain product. Norms of convolutions are certified for every
    frequency (see `norm_bounds`), and all rounding is included.

    Neither traceable nor differentiable. Weights are copied to the host and computed there in float64.

    Examples
    --------
    >>> import numpy as np
    >>> from convsv_core.networks import Elementwise, Graph, Input, Matmul, Node, Sum
    >>> half = Node("f", Matmul(np.eye(4) / 2), ("x",), (1, 4))
    >>> act = Node("g", Elementwise("tanh"), ("f",), (1, 4))
    >>> graph = Graph((Node("x", Input(), (), (1, 4)), half, act, Node("y", Sum(), ("x", "g"), (1, 4))), ("y",))
    >>> found = lipschitz(graph)
    >>> round(found.upper, 6), round(found.blocks[0].branch_upper, 6)
    (1.5, 0.5)
    """
    input_range = checked_range(input_range)
    graph = network_graph(model, example_input)
    return network_lipschitz(graph, output=output, input_range=input_range, lower=lower, search=search, seed=seed)


def checked_range(input_range: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return the range of the input's elements as floats; raise ValueError if it is empty or infinite."""
    if input_range is None:
        return None
    low, high = (as_float("input_range", end) for end in input_range)
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"input_range={input_range}: wanted a least and a largest finite value")
    return low, high


def network_graph(model: object, example_input: object = None, options: ReadOptions | None = None) -> Graph:
    """Return the graph of maps of a model object, or of the file at a path.

    Parameters
    ----------
    model, example_input
        As for `lipschitz`. A `Graph` is returned itself.
    options : ReadOptions, optional
        Facts about the model that its file may leave open. By default the shapes of `example_input`.

    Returns
    -------
    Graph
        Its arrays are on the host. The inputs of a file's graph have the examples whose sizes fit.

    Raises
    ------
    TypeError
        `model` is of no framework that an installed plugin knows.
    ModelError
        The file cannot be read, or no installed plugin reads a graph from it.

    Examples
    --------
    >>> graph = Graph((Node("x", kinds.Input(), (), (1, 4)),), ("x",))
    >>> network_graph(graph) is graph
    True
    """
    if isinstance(model, Graph):
        return model
    hook = plugins().manager.hook
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        examples = _examples(example_input)
        shapes = {name: example.shape for name, example in examples.items()}
        graph = hook.convsv_read_graph(path=path, options=options or ReadOptions(shapes))
        if graph is None:
            raise ModelError(
                f"{path}: no installed plugin reads a network's graph from it; most such files hold weights alone: "
                "give lipschitz the model itself"
            )
        return _with_examples(graph, examples)
    graph = hook.convsv_model_graph(model=model, example_input=example_input)
    if graph is None:
        raise TypeError(
            f"model is a {type(model).__module__}.{type(model).__qualname__}: wanted a model of a framework that a "
            f"plugin knows, the path of a file with a network's graph, or a convsv_core.networks.Graph"
        )
    return graph


def _examples(example_input: object) -> dict[str, NumberArray]:
    """Return the examples of a file's inputs by their names; "" stands for the first input."""
    given = example_input if isinstance(example_input, Mapping) else {"": example_input}
    return {name: np.asarray(example) for name, example in given.items() if example is not None}


def _with_examples(graph: Graph, examples: Mapping[str, NumberArray]) -> Graph:
    """Return the graph with examples at its inputs, as far as their shapes fit."""
    if not examples:
        return graph
    first = graph.inputs[0].name if graph.inputs else ""
    by_name = {name or first: example for name, example in examples.items()}
    nodes = [
        dataclasses.replace(node, kind=kinds.Input(by_name[node.name].reshape(node.shape)))
        if isinstance(node.kind, kinds.Input) and node.name in by_name and by_name[node.name].size == node.size
        else node
        for node in graph
    ]
    return Graph(tuple(nodes), graph.outputs)


def network_lipschitz(
    graph: Graph,
    *,
    output: str | None = None,
    input_range: tuple[float, float] | None = None,
    lower: bool = True,
    search: int = 32,
    seed: int = 0,
) -> Lipschitz:
    """Certify the Lipschitz constant of a graph.

    Parameters
    ----------
    graph : Graph
    output, input_range, lower, search, seed
        As for `lipschitz`, which checks the range.

    Returns
    -------
    Lipschitz
        As from `lipschitz`, whose notes say how it is computed.

    Raises
    ------
    ValueError
        There is no such `output`.

    Examples
    --------
    >>> twice = Node("y", kinds.Scale(np.asarray(2.0)), ("x",), (1, 4))
    >>> graph = Graph((Node("x", kinds.Input(), (), (1, 4)), twice), ("y",))
    >>> round(network_lipschitz(graph).upper, 6)
    2.0
    """
    search = as_int("search", search, least=1)
    outputs = graph.outputs if output is None else (graph.find(output),)
    graph = simplify(graph.until(outputs))
    bounds = Bounds(graph, input_range)
    logs, plain = bounds.from_inputs(), bounds.plain()
    log10_upper = log_root([logs[name] for name in outputs])
    attained = attained_norm(graph, input_range, search=search, seed=seed) if lower else None
    return Lipschitz(
        upper=power_of_ten(log10_upper),
        log10_upper=log10_upper,
        log10_product=log_root([plain[name] for name in outputs]),
        lower=None if attained is None else attained.norm,
        nodes=tuple(_node(node, bounds, logs[node.name]) for node in graph),
        blocks=tuple(residual_blocks(graph, bounds)),
        missing=tuple(bounds.missing_before(logs)),
        output=", ".join(outputs),
        lower_inputs=0 if attained is None else attained.inputs,
    )


def _node(node: Node, bounds: Bounds, log10_upper: float) -> LipschitzNode:
    if node.name in bounds.missing:
        return LipschitzNode(node.name, node.op, math.inf, log10_upper, bounds.missing[node.name])
    factors = bounds.factors.get(node.name)
    values = factors.values if factors is not None else (1.0,)
    log10_factor = log_of(max(values)) if values else -math.inf
    return LipschitzNode(node.name, node.op, log10_factor, log10_upper, factors.note if factors is not None else "")
