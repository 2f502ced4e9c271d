"""The options of a projection after optimizer steps, checked once."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import nn

from convsv_adapters._layers import ConvLayer, check_bound, check_method
from convsv_adapters.torch._layers import BatchNormMode, conv_layers
from convsv_adapters.torch._share import Share
from convsv_core.conv import as_int
from convsv_core.layers import Extents
from convsv_core.training import ProjectionMethod

__all__ = ["StepOptions"]


@dataclass(frozen=True, eq=False)
class StepOptions:
    """The options of a projection after optimizer steps.

    Parameters
    ----------
    bound : float, optional
        Largest operator norm, finite and not negative. Either this or a `network_bound` is needed.
    every : int, default 1
        Project after every `every`-th step.
    linear : bool, default False
        Bound linear layers too.
    batch_norm : "fold", optional
        Bound batch normalisations too, as they are in evaluation mode: with the layer that they follow directly, whose
        own norm is then free, or alone. A composition above the bound gets a smaller weight of its normalisation,
        whatever the `method`. Needs an `example_input`.
    network_bound : float, optional
        Largest Lipschitz constant of the network in evaluation mode, in place of one `bound` for each layer. It is
        shared out over the layers, with ``linear=True`` and ``batch_norm="fold"``. Then the graph of the network
        certifies it for all weights that are within their layers' bounds. Needs an `example_input` of the shape for
        which it is to hold, as a rule of one example.
    share : {"equal", "norms"}, default "equal"
        How a `network_bound` is shared out: "equal" gives every layer one bound, "norms" gives bounds in proportion to
        the norms that the layers have when the projection is made.
    method : {"rescale", "dykstra", "alternating", "newton-schulz"}, default "rescale"
        As for `convsv_core.project`. "rescale" multiplies a layer above the bound by one number, and costs a few per
        cent of a training step. "dykstra" moves the layer to the nearest kernel within the bound, from the dual
        variables of the step before, and costs many times more. "alternating" lies between them; with
        ``max_iterations=1`` it is the paper's step before a rescaling.
    headroom : float, default 0.01
        Share of the bound, from 0 to less than 1. A layer that was above the bound is left this share below it. The
        last certificate then holds until the weights may have moved so far again, and a step computes nothing but the
        size of the change. With 0, a layer at its bound is certified anew after every step.
    circular : bool, default False
        Bound the circular convolution at the layer's extents, as in the paper, in place of the layer with its own
        padding for every input size. Extents that the stride does not divide are rounded up to multiples. The circular
        convolution is less work for small images. With other padding, the norm of the layer can exceed the bound a
        little.
    example_input : tensor, tuple, list or mapping, optional
        As for `conv_layers`. Extents are needed for `circular`, for padding that repeats pixels (reflect, replicate),
        and for lazy modules.
    input_shapes : mapping from str to tuple of int, optional
        Extents by the layer's name, in place of the extents of the forward pass.
    layers : iterable of ConvLayer, optional
        The layers to project: a part of the result of `conv_layers`, which has options `linear` and `batch_norm` too.
    process_group : torch.distributed.ProcessGroup, optional
        Ranks that hold the same weights, to share the work. By default the group of the model if it is a
        `DistributedDataParallel`; without either, each process projects all layers.
    rtol : float, default 1e-2
        As for `convsv_core.project`. The bound holds in any case; a larger value leaves the kernel further from the
        nearest one. A guess: the next step's projection begins from the dual variables of this one.
    max_iterations : int, default 10
        As for `convsv_core.project`. A guess, for the same reason.
    steps : int, optional
        As for `convsv_core.project`.

    Raises
    ------
    TypeError, ValueError
        An option is of the wrong kind, or impossible.
    """

    bound: float | None = None
    every: int = 1
    _: KW_ONLY
    network_bound: float | None = None
    share: Share = "equal"
    linear: bool = False
    batch_norm: BatchNormMode | None = None
    method: ProjectionMethod = "rescale"
    headroom: float = 0.01
    circular: bool = False
    example_input: object = None
    input_shapes: Mapping[str, Extents] | None = None
    layers: Iterable[ConvLayer] | None = None
    process_group: Any = None
    rtol: float = 1e-2
    max_iterations: int = 10
    steps: int | None = None

    def __post_init__(self) -> None:
        headroom = self.headroom
        if isinstance(headroom, bool) or not isinstance(headroom, int | float) or not 0 <= headroom < 1:
            raise ValueError(f"headroom={headroom!r}: wanted a number from 0 to less than 1, a share of the bound")
        check_method(self.method)
        if self.layers is not None and (self.linear or self.batch_norm):
            raise ValueError(
                "layers are given beside linear or batch_norm: wanted these options for conv_layers, which lists layers"
            )
        set_field = object.__setattr__  # the dataclass is frozen; numbers are normalised once, here
        if (self.bound is None) == (self.network_bound is None):
            raise ValueError(
                f"bound={self.bound!r} and network_bound={self.network_bound!r}: wanted a number for one of them"
            )
        if self.share not in typing.get_args(Share):
            raise ValueError(f"share={self.share!r}: wanted one of {', '.join(typing.get_args(Share))}")
        if self.network_bound is None:
            set_field(self, "bound", check_bound(self.bound, positive=False))
        else:
            set_field(self, "network_bound", check_bound(self.network_bound, positive=True, name="network_bound"))
            self._check_network_options()
        set_field(self, "every", as_int("every", self.every, least=1))
        set_field(self, "headroom", float(headroom))

    def _check_network_options(self) -> None:
        """Take all kinds of layers in; raise ValueError for options with which a network cannot be bounded."""
        if self.layers is not None or self.circular:
            given = "circular=True" if self.circular else "layers"
            raise ValueError(f"network_bound with {given}: wanted every layer, with its own padding")
        if self.example_input is None:
            raise ValueError("network_bound needs an example_input, from which the graph of the network is found")
        set_field = object.__setattr__
        set_field(self, "linear", True)
        set_field(self, "batch_norm", "fold")

    @property
    def project_arguments(self) -> dict[str, Any]:
        """The arguments of `convsv_core.project` besides the kernel, its operator and the state."""
        names = ("method", "rtol", "max_iterations", "steps")
        return {name: getattr(self, name) for name in names}

    def find_layers(self, model: nn.Module) -> list[ConvLayer]:
        """Return the layers of a model that are to be projected, with the extents of `input_shapes`."""
        if self.layers is None:
            layers = conv_layers(model, self.example_input, linear=self.linear, batch_norm=self.batch_norm)
        else:
            layers = list(self.layers)
        if not layers:
            raise ValueError(f"model has no convolution{' or linear layer' if self.linear else ''} to project")
        given = self.input_shapes or {}
        names = {layer.name for layer in layers}
        if unknown := sorted(set(given) - names):
            raise ValueError(f"input_shapes names {unknown[0]!r}: wanted names of layers, such as {sorted(names)[0]!r}")
        return [
            dataclasses.replace(layer, input_shapes=(tuple(given[layer.name]),)) if layer.name in given else layer
            for layer in layers
        ]
