"""The layers of a PyTorch module as a report of the core takes them, with the normalisation directly behind each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from convsv_adapters._layers import ConvLayer, model_layer
from convsv_adapters.torch._folding import FollowingWatch, is_batch_norm, scale_of
from convsv_adapters.torch._layers import CONVOLUTIONS, found_layers, has_torch_forward, listed_modules
from convsv_adapters.torch._own_forward import convolves_with_its_weight
from convsv_core.layers import Layer, Normalisation

__all__ = ["model_layers"]


class Behind(NamedTuple):
    """A normalisation and the layer that it follows."""

    layer: nn.Module
    normalisation: nn.Module


def model_layers(model: nn.Module, example_input: object, linear: bool = False) -> list[Layer]:
    """Return the convolutions with their weights, and with `linear` the linear layers.

    A layer has a `normalisation` if the forward pass hands each of its outputs to this batch normalisation and to
    nothing else. Without an `example_input`, the convolution and the normalisation have to stand next to each other in
    a `torch.nn.Sequential`, and nowhere else.
    """
    found = listed_modules(model, linear=linear, batch_norm="fold")
    norms = [module for module in found.values() if is_batch_norm(module) and module.running_var is not None]
    watch = FollowingWatch(norms) if norms and example_input is not None else None
    layers = found_layers(model, found, example_input, watch)
    pairs = _in_sequences(model) if watch is None else _in_the_pass(watch)
    names = {module: name for name, module in found.items()}
    behind = {pair.layer: pair.normalisation for pair in pairs if pair.normalisation in norms}
    return [_reported(layer, behind.get(module), names) for module, layer in layers.items()]


def _reported(layer: ConvLayer, norm: nn.Module | None, names: dict[nn.Module, str]) -> Layer:
    known = layer.unknown_forward and not layer.linear and convolves_with_its_weight(layer.module)
    row = model_layer(layer, layer.kernel.detach(), sure=known)
    if norm is None or layer.unknown_forward or not has_torch_forward(norm) or norm.running_var.is_meta:
        return row
    weight = None if norm.weight is None else norm.weight.detach().cpu()
    scale = scale_of(norm, weight, norm.running_var.cpu()).to(torch.float64).numpy()
    return replace(row, normalisation=Normalisation(names[norm], scale))


def _in_the_pass(watch: FollowingWatch) -> Iterator[Behind]:
    """Yield the layers whose outputs went to one normalisation alone."""
    following = watch.result()
    norms = defaultdict(list)
    for layer, norm in following.pairs:
        norms[layer].append(norm)
    for layer, found in norms.items():
        if len(found) == 1 and layer not in following.bare:
            yield Behind(layer, found[0])


def _in_sequences(model: nn.Module) -> Iterator[Behind]:
    """Yield the convolutions that stand at one place, before a normalisation in a sequence."""
    places: dict[nn.Module, list[nn.Module | None]] = defaultdict(list)
    for parent in model.modules():
        children = [child for child in parent._modules.values() if child is not None]
        calls_in_turn = type(parent).forward is nn.Sequential.forward and type(parent).__call__ is nn.Module.__call__
        after = [*children[1:], None] if calls_in_turn else [None] * len(children)
        for child, behind in zip(children, after, strict=True):
            places[child].append(behind)
    for child, found in places.items():
        behind = found[0]
        if behind is None or len(found) > 1 or not (isinstance(child, CONVOLUTIONS) and is_batch_norm(behind)):
            continue
        if not (child._forward_hooks or behind._forward_pre_hooks):  # hooks may change what passes
            yield Behind(child, behind)
