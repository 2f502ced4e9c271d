"""Random PyTorch modules under wrappings that change how a checkpoint stores their weights, and random checkpoints."""

from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

__all__ = ["Case", "dense_norm", "random_case"]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
PIXELS = 5
"""Extent of the images on which norms are compared."""


class Unknown(nn.Module):
    """A parametrization that leaves no trace in a state dict but the name of the stored tensor."""

    def forward(self, weight):
        return weight * 3

    def right_inverse(self, weight):
        return weight


class BarSpectral(nn.Module):
    """The spectral normalisation that GANs of PyTorch 0.4 used: one iteration at each pass."""

    def __init__(self, module):
        super().__init__()
        weight = module.weight
        del module._parameters["weight"]
        module.weight_bar = nn.Parameter(weight.data)
        module.weight_u = nn.Parameter(torch.randn(weight.shape[0]), requires_grad=False)
        module.weight_v = nn.Parameter(torch.randn(weight[0].numel()), requires_grad=False)
        self.module = module

    @property
    def in_channels(self):
        return self.module.in_channels

    def forward(self, images):
        return images

    @property
    def weight(self):
        matrix = self.module.weight_bar.detach().double().flatten(1)
        v = nn.functional.normalize(matrix.T @ self.module.weight_u.double(), dim=0)
        u = nn.functional.normalize(matrix @ v, dim=0)
        return self.module.weight_bar.detach().double() / (u @ matrix @ v)


@dataclass
class Network:
    """A network of a checkpoint: its module, the keys of its state dict in the file, and what its names begin with."""

    module: nn.Module
    keys: tuple[str, ...]
    prefix: str


@dataclass
class Case:
    """A file, and the truth about it.

    Attributes
    ----------
    content : object
        The checkpoint.
    networks : list of Network
    weights : dict from name of a layer to array
        The true weight of each convolution, in float64.
    transposed : set of str
        The names of transposed layers.
    wrapped : dict from name of a layer to str
        How its weight is stored.
    owners : dict from name of a layer to (Network, int)
        Its network, and its index there.
    """

    content: Any = None
    networks: list[Network] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)
    wrapped: dict[str, str] = field(default_factory=dict)
    owners: dict[str, tuple[Network, int]] = field(default_factory=dict)

    def reload(self, content: Any) -> None:
        """Load a checkpoint of the same form into the modules."""
        for network in self.networks:
            state = content
            for key in network.keys:
                state = state[key]
            bare = {name.removeprefix(network.prefix): tensor for name, tensor in state.items()}
            network.module.load_state_dict(bare)

    def live_weight(self, name: str) -> np.ndarray:
        """Return the weight that the module of a layer computes, in float64."""
        network, index = self.owners[name]
        return _weight(network.module[index])

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the network of a layer."""
        return next(self.owners[name][0].module.parameters()).dtype

    def key(self, name: str) -> tuple[str, ...]:
        """Return where the file keeps the weight of a layer that is stored as it is."""
        network, index = self.owners[name]
        return (*network.keys, f"{network.prefix}{index}.weight")


def random_case(seed: int) -> Case:
    """Return a random checkpoint: networks, averaged copies, optimizer state and metrics."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    case = Case()
    names = [str(name) for name in rng.permutation(["netG", "netD", "model", "state_dict"])[: 1 + int(rng.integers(2))]]
    tree: dict[str, Any] = {}
    networks = {}
    for name in names:
        networks[name] = _network(rng)
    if rng.random() < 0.4:
        model, kinds = networks[names[0]]
        average = copy.deepcopy(model)
        for parameter in average.parameters():
            parameter.data.mul_(0.5 + rng.random())
        networks[f"{names[0]}_ema"] = average, kinds
    nested = rng.random() < 0.5
    alone = len(networks) == 1
    prefix = str(rng.choice(["", "", "module.", "_orig_mod.", "module._orig_mod."]))
    extras: dict[str, Any] = {}
    if rng.random() < 0.5:
        extras["optimizer" if rng.random() < 0.5 else "opt_g"] = _optimizer_state(networks[names[0]][0])
    if rng.random() < 0.5:
        extras |= {"epoch": 3, "best_acc1": torch.tensor(76.0), "args": {"lr": 0.1}}
    if rng.random() < 0.2:
        extras["fixed_noise"] = torch.randn(4, 3, 5, 5)
    for name, (model, kinds) in networks.items():
        state = {f"{prefix}{key}": tensor for key, tensor in model.state_dict().items()}
        tree[name] = {"weights": state, "config": {"a": 1}} if nested else state
        keys = (name, "weights") if nested else (name,)
        case.networks.append(Network(model, keys, prefix))
        _add_truth(case, "" if alone else f"{'/'.join(keys)}/", case.networks[-1], kinds)
    order = [str(key) for key in rng.permutation([*tree, *extras])]
    case.content = {key: tree[key] if key in tree else extras[key] for key in order}
    if alone and not extras and not nested and rng.random() < 0.7:
        case.content = next(iter(tree.values()))
        case.networks[0].keys = ()
    return case


def dense_norm(weight: np.ndarray, transposed: bool) -> float:
    """Return the norm of the circular convolution of stride 1 on small images, from its matrix."""
    weight = torch.from_numpy(weight).double()
    if transposed:
        weight = weight.transpose(0, 1)  # the adjoint has the same norm, and the same taps but for their order
    ndim = weight.ndim - 2
    function = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[ndim]
    shape = (weight.shape[1], *(PIXELS,) * ndim)
    count = int(np.prod(shape))
    images = torch.eye(count, dtype=torch.float64).reshape(count, *shape)
    pads = [side for taps in reversed(weight.shape[2:]) for side in ((taps - 1) // 2, taps // 2)]
    if any(taps > PIXELS for taps in weight.shape[2:]):
        raise AssertionError("kernels of these tests are smaller than their images")
    outputs = function(nn.functional.pad(images, pads, mode="circular"), weight)
    return float(torch.linalg.matrix_norm(outputs.reshape(count, -1), 2))


def _network(rng: np.random.Generator) -> tuple[nn.Module, list[str]]:
    channels = [int(rng.integers(2, 5)) for _ in range(4)]
    ndim = int(rng.integers(1, 3))
    conv = {1: nn.Conv1d, 2: nn.Conv2d}[ndim]
    up = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}[ndim]
    layers: list[nn.Module] = []
    kinds: list[str] = []
    for inputs, outputs in itertools.pairwise(channels):
        taps = int(rng.integers(1, 4))
        layer = (up if rng.random() < 0.3 else conv)(inputs, outputs, taps, bias=bool(rng.random() < 0.7))
        with torch.no_grad():
            layer.weight.mul_(0.5 + 2 * rng.random())
        kind = str(rng.choice(list(WRAPPINGS)))
        layers.append(WRAPPINGS[kind](layer, rng))
        kinds.append(kind)
        if rng.random() < 0.3:
            layers.append({1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[ndim](outputs))
            kinds.append("other")
        if rng.random() < 0.2:
            layers.append(nn.LayerNorm([outputs, *(PIXELS,) * ndim]))
            kinds.append("other")
    if rng.random() < 0.2 and kinds[0] == "plain" and type(layers[0]) is conv:
        layers.append(conv(*layers[0].weight.shape[1::-1], layers[0].weight.shape[2], bias=False))
        layers[-1].weight = layers[0].weight
        kinds.append("plain")
    model = nn.Sequential(*layers)
    dtype = DTYPES[int(rng.choice(4, p=[0.7, 0.1, 0.1, 0.1]))]
    if "orthogonal" in kinds and dtype.itemsize < 4:  # PyTorch has no QR decomposition of half precision
        dtype = torch.float32
    model = model.eval().to(dtype)
    for layer, kind in zip(model, kinds, strict=True):
        if kind != "other":
            _pass(layer)
    return model, kinds


def _add_truth(case: Case, start: str, network: Network, kinds: list[str]) -> None:
    for index, (layer, kind) in enumerate(zip(network.module, kinds, strict=True)):
        if kind.startswith("other"):
            continue
        name = f"{start}{index}.weight"
        inner = layer.module if isinstance(layer, BarSpectral) else layer
        if isinstance(inner, nn.ConvTranspose1d | nn.ConvTranspose2d):
            case.transposed.add(name)
        case.weights[name] = _weight(layer)
        case.wrapped[name] = kind
        case.owners[name] = network, index


def _weight(layer: nn.Module) -> np.ndarray:
    """Return the weight that a layer computes from the stored numbers, in float64."""
    _pass(layer)
    wide = copy.deepcopy(layer).double()
    _pass(wide)
    return wide.weight.detach().numpy()


def _pass(layer: nn.Module) -> None:
    """Call a layer: the old normalisations compute the weight at each pass, and keep it with its graph."""
    with torch.no_grad():
        layer(torch.zeros(1, layer.in_channels, *(7,) * (layer.weight.ndim - 2), dtype=next(layer.parameters()).dtype))


def _optimizer_state(model: nn.Module) -> Any:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    with torch.no_grad():
        before = [parameter.clone() for parameter in parameters]
        optimizer.step()
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)
            parameter.grad = None
    return optimizer.state_dict()


# ---- wrappings ----------------------------------------------------------------------------------------------


def _trained_spectral(layer: nn.Module, wrap: Any, **options: Any) -> nn.Module:
    layer = wrap(layer, **options)
    images = torch.randn(1, layer.in_channels, *(7,) * (layer.weight.ndim - 2))
    layer.train()
    with torch.no_grad():
        for _ in range(60):
            layer(images)
    return layer.eval()


def _orthogonal(layer: nn.Module, rng: Any) -> nn.Module:
    return parametrizations.orthogonal(layer) if layer.weight.shape[-1] > 1 else layer


def _pruned(layer: nn.Module, rng: Any) -> nn.Module:
    mask = torch.from_numpy(rng.random(tuple(layer.weight.shape)) < 0.6)
    return prune.custom_from_mask(layer, "weight", mask if rng.random() < 0.3 else mask.float())


def _old_weight_norm(layer: nn.Module, rng: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(layer, dim=_dim(layer, rng))
    with torch.no_grad():
        layer.weight_g.mul_(1.7)
        layer(torch.zeros(1, layer.in_channels, *(7,) * (layer.weight.ndim - 2)))
    return layer


def _new_weight_norm(layer: nn.Module, rng: Any) -> nn.Module:
    layer = parametrizations.weight_norm(layer, dim=_dim(layer, rng))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.7)
    return layer


def _dim(layer: nn.Module, rng: Any) -> int | None:
    axis = int(rng.integers(-1, layer.weight.ndim))
    return None if axis < 0 else axis


def _unknown(layer: nn.Module, rng: Any) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Unknown())
    return layer


def _masked_in_place(layer: nn.Module, rng: Any) -> nn.Module:
    layer.register_buffer("mask", torch.ones_like(layer.weight))
    return layer


WRAPPINGS = {
    "plain": lambda layer, rng: layer,
    "mask beside": _masked_in_place,
    "pruned": _pruned,
    "old weight norm": _old_weight_norm,
    "weight norm": _new_weight_norm,
    "old spectral norm": lambda layer, rng: _trained_spectral(layer, nn.utils.spectral_norm),
    "spectral norm": lambda layer, rng: _trained_spectral(layer, parametrizations.spectral_norm),
    "spectral norm of any axis": lambda layer, rng: _trained_spectral(
        layer, parametrizations.spectral_norm, dim=int(rng.integers(layer.weight.ndim))
    ),
    "bar": lambda layer, rng: BarSpectral(layer),
    "orthogonal": _orthogonal,
    "unknown": _unknown,
}
