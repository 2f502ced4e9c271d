"""Values of graphs of maps, and Jacobian norms of functions, to check front ends with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from convsv_core._network.jacobian import linearize
from convsv_core.networks import Graph, Unsupported

__all__ = ["RandomNetwork", "difference", "torch_jacobian_norm", "unsupported"]


def difference(graph: Graph, inputs: list[Any], wanted: Any) -> float:
    """Return the largest difference of a graph's first output from the network's, in units of its largest element."""
    named = {node.name: np.asarray(one, np.float64) for node, one in zip(graph.inputs, inputs, strict=True)}
    found = linearize(graph, named).values[graph.outputs[0]]
    wanted = np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def unsupported(graph: Graph) -> list[str]:
    """Return the operators without a rule."""
    return [node.op for node in graph if isinstance(node.kind, Unsupported)]


def torch_jacobian_norm(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """Return the largest singular value of a function's Jacobian at x."""
    jacobian = torch.func.jacrev(lambda flat: function(flat.reshape(x.shape)).flatten())(x.flatten())
    return float(torch.linalg.matrix_norm(jacobian, 2))


ACTIVATIONS = (
    *(torch.nn.ReLU, torch.nn.Hardswish, torch.nn.SiLU, torch.nn.GELU, torch.nn.ELU, torch.nn.SELU, torch.nn.Mish),
    *(torch.nn.LeakyReLU, torch.nn.Sigmoid, torch.nn.Tanh, torch.nn.Hardtanh, torch.nn.Softplus, torch.nn.PReLU),
)


class RandomNetwork(torch.nn.Module):
    """A small network of random layers, geometries and branches, in evaluation mode and double precision."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.blocks = torch.nn.ModuleList()
        self.joins: list[str] = []
        channels = 2
        for _ in range(int(random.integers(2, 5))):
            join = str(random.choice(["none", "sum", "concatenate", "product"], p=[0.4, 0.3, 0.2, 0.1]))
            wanted = channels if join in ("sum", "product") else int(random.integers(1, 4))
            self.blocks.append(torch.nn.Sequential(*self._layers(channels, wanted, keep=join != "none")))
            self.joins.append(join)
            channels = channels + wanted if join == "concatenate" else wanted
        self.head = torch.nn.Linear(channels, 3) if random.random() < 0.5 else None
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 2)
                torch.nn.init.normal_(module.weight)
        self.double().eval()

    def _layers(self, inputs: int, outputs: int, *, keep: bool) -> list[torch.nn.Module]:
        """Return layers from `inputs` to `outputs` channels, which keep the extents if `keep`."""
        random = self.random
        mode = str(random.choice(["zeros", "circular", "reflect", "replicate"]))
        taps, stride, dilation = int(random.choice([1, 3])), 1 if keep else int(random.integers(1, 3)), 1
        if keep:
            dilation = int(random.integers(1, 3))
        kind = "convolution" if keep else str(random.choice(["convolution", "transposed", "pool", "resize"]))
        padding = dilation * (taps // 2)
        found: list[torch.nn.Module] = []
        if kind == "transposed":
            found.append(torch.nn.ConvTranspose2d(inputs, outputs, taps, 2, padding, output_padding=1))
        else:
            geometry = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode}
            found.append(torch.nn.Conv2d(inputs, outputs, taps, **geometry))
        if random.random() < 0.6:
            found.append(torch.nn.BatchNorm2d(outputs))
        if random.random() < 0.8:
            found.append(ACTIVATIONS[int(random.integers(len(ACTIVATIONS)))]())
        if kind == "pool":
            pools = [torch.nn.AvgPool2d(2, 1), torch.nn.MaxPool2d(2, 1), torch.nn.AdaptiveAvgPool2d(3)]
            found.append(pools[int(random.integers(3))])
        elif kind == "resize":
            found.append(torch.nn.Upsample(size=5, mode=str(random.choice(["nearest", "bilinear"]))))
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, join in zip(self.blocks, self.joins, strict=True):
            branch = block(x)
            if join == "sum":
                x = x + branch
            elif join == "concatenate":
                x = torch.cat([x, branch], 1)
            elif join == "product":
                x = x * torch.sigmoid(x) - branch
            else:
                x = branch
        return x if self.head is None else self.head(x.mean((2, 3)))
