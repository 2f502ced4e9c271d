"""A penalty on the singular values of a model's convolutions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from convsv_adapters._layers import ConvLayer, check_penalty, layer_penalty
from convsv_adapters.torch._folding import KernelParts, kernel_of
from convsv_adapters.torch._layers import conv_layers, kernel_parts, without_autocast
from convsv_adapters.torch._norm_terms import norm_term
from convsv_adapters.torch._norms import WeightGroup, can_share, norms_of
from convsv_adapters.torch._operators import compiled_number, conv_arguments, in_compiler, register
from convsv_core import Conv

__all__ = ["penalty"]


@register()
def sum_of_penalties(
    tensors: list[torch.Tensor], kind: str, options: dict[str, Any], layers: tuple[tuple[Any, ...], ...]
) -> torch.Tensor:
    """Return the sum of a penalty over layers, each given as `_described` describes it."""
    left = iter(tensors)
    rebuilt, kernels = [], []
    for name, arguments, extents, note, there, epsilon, linear in layers:
        conv = None if arguments is None else Conv(*arguments)
        weight, gamma, variance = [next(left) if one else None for one in there]
        parts = KernelParts(weight, gamma, variance, epsilon, linear)
        kernel = kernel_of(parts, conv)
        shape = tuple(kernel.shape)
        rebuilt.append(ConvLayer(name=name, kernel_shape=shape, conv=conv, input_shapes=extents, note=note))
        kernels.append(kernel)
    return _sum(rebuilt, kernels, kind, options)


def _described(layer: ConvLayer, parts: KernelParts) -> tuple[Any, ...]:
    """Return what is static about a layer and its kernel, as Python literals."""
    there = (parts.weight is not None, parts.gamma is not None, parts.variance is not None)
    conv = None if layer.conv is None else conv_arguments(layer.conv)
    return (layer.name, conv, layer.input_shapes, layer.note, there, parts.epsilon, parts.linear)


def _sum(
    layers: Sequence[ConvLayer], weights: Sequence[torch.Tensor], kind: str, options: Mapping[str, Any]
) -> torch.Tensor:
    """Return the sum of a penalty over layers and their weights.

    The norms of layers of one shape and geometry are computed by one call, because a call for each layer would take
    more time than the work. The calls are shared out to threads.
    """
    values: list[Any] = [None] * len(layers)
    groups: dict[Any, list[int]] = {}
    for place, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        term = norm_term(layer, kind, options)
        if term is not None and can_share(weight):
            groups.setdefault((term, tuple(weight.shape), weight.dtype), []).append(place)
        else:
            with without_autocast(weight):
                values[place] = layer_penalty(layer, weight, kind, options)
    if groups:
        shared = [WeightGroup([weights[i] for i in places], key[0].norm) for key, places in groups.items()]
        with without_autocast(shared[0].weights[0]):  # All of them are on the CPU.
            for (key, places), norms in zip(groups.items(), norms_of(shared), strict=True):
                for place, value in zip(places, key[0].penalty(norms).unbind(), strict=True):
                    values[place] = value
    return torch.stack([value.to(values[0].device) for value in values]).sum()


def penalty(
    model: nn.Module,
    kind: str = "norm_hinge",
    *,
    example_input: object = None,
    layers: Iterable[ConvLayer] | None = None,
    **options: Any,
) -> torch.Tensor:
    """Sum a penalty on the singular values over a model's convolutions, to add to a loss.

    The operator of each layer is the circular one at the largest of its extents, whatever padding the layer has. But
    "log_lipschitz" is the logarithm of the product of certified upper bounds. Its factors are every convolution with
    its own padding, every linear layer, and every batch normalisation as it is in evaluation mode, together with the
    layer that it follows. In a network without branches, whose other layers enlarge nothing, the product bounds the
    Lipschitz constant.

    Parameters
    ----------
    model : torch.nn.Module
    kind : str, default "norm_hinge"
        A function of `convsv_core.penalties`.
    example_input : tensor, tuple, list or mapping, optional
        As for `conv_layers`, which each call of the penalty then calls. In a training loop, call `conv_layers` once and
        pass its result as `layers`. "log_lipschitz" needs one of both if the model has batch normalisations.
    layers : iterable of ConvLayer, optional
        The result of `conv_layers`, or a part of it. "log_lipschitz" is of these layers alone: list them with
        ``linear=True, batch_norm="fold"``.
    **options
        Arguments of the penalty, such as ``bound=1.0``.

    Returns
    -------
    0-d tensor
        Differentiable. `torch.compile` keeps the penalty in its graph as one operator, with a first derivative, if
        `layers` are given and the options are numbers. For layers without extents, "norm_hinge" and "squared_norm" take
        the upper bound for every input size, and "orthogonality" takes the infinite lattice.

    Raises
    ------
    ValueError
        There is no such `kind`, the model has no convolution, or the penalty needs extents that are not known.
    TypeError, ValueError
        In `torch.compile` an option is no finite number.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    >>> layers = conv_layers(model, torch.zeros(1, 3, 16, 16))
    >>> loss = penalty(model, "norm_hinge", layers=layers, bound=0.1)
    >>> loss.backward()

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    >>> layers = conv_layers(model, torch.zeros(1, 3, 3, 3), linear=True, batch_norm="fold")
    >>> penalty(model, "log_lipschitz", layers=layers).backward()
    """
    check_penalty(kind)
    kinds: dict[str, Any] = {"linear": True, "batch_norm": "fold"} if kind == "log_lipschitz" else {}
    chosen = conv_layers(model, example_input, **kinds) if layers is None else list(layers)
    if not chosen:
        raise ValueError("model has no convolution")
    if not in_compiler():
        return _sum(chosen, [layer.weight for layer in chosen], kind, options)
    parts = [kernel_parts(layer) for layer in chosen]
    tensors = [tensor for one in parts for tensor in (one.weight, one.gamma, one.variance) if tensor is not None]
    described = tuple([_described(layer, one) for layer, one in zip(chosen, parts, strict=True)])
    return compiled_number(tensors, "sum_of_penalties", kind, options, described)
