"""Projection of a model's convolutions after optimizer steps, in one process or shared out over several."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from convsv_adapters._operators import NEEDS_EXTENTS, circular_geometry, lattice
from convsv_adapters.torch._exchange import is_sharded, make_exchange, refuse_flat_parameters, write_shard
from convsv_adapters.torch._layers import (
    COMPUTED_IN_FORWARD,
    ConvLayer,
    Extents,
    conv_layers,
    without_autocast,
)
from convsv_adapters.torch._targets import (
    Operator,
    Projected,
    Target,
    is_simple,
    projected,
    rescaled,
    still_certified,
    together,
)
from convsv_core._geometry.padding import check_repeats_no_pixel, padding_norm
from convsv_core.certificate import CERTIFICATE_RTOL
from convsv_core.conv import as_int

ProcessGroup: TypeAlias = Any

HEADROOM = 0.01
"""Share of the bound that a layer which was above it is left below."""

STEP_OPTIONS = {"rtol": 1e-2, "max_iterations": 10}
"""How far one projection goes, where the next step's begins from the dual variables of this one."""


class StepProjection:
    """Projects convolutions after every so many optimizer steps: see `project_after_step`, which makes it.

    An optimizer's step hooks are lost by `copy.deepcopy` and by pickling, and are no part of its `state_dict`. After
    either, or where a checkpoint is resumed in a new process, the projection is to be attached again:
    ``projection.attach(optimizer)``.

    Attributes
    ----------
    layers : list of ConvLayer
        What is projected.
    bound : float
    headroom : float
    every : int
    steps : int
        Optimizer steps so far.
    """

    def __init__(
        self,
        model: nn.Module,
        bound: float,
        every: int = 1,
        *,
        method: str = "rescale",
        headroom: float = HEADROOM,
        circular: bool = False,
        example_input: object = None,
        input_shapes: Mapping[str, Extents] | None = None,
        layers: Iterable[ConvLayer] | None = None,
        process_group: ProcessGroup = None,
        **options: Any,
    ) -> None:
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not bound >= 0:
            raise ValueError(f"bound={bound!r}: wanted a number that is not negative")
        self.bound = float(bound)
        if isinstance(headroom, bool) or not isinstance(headroom, int | float) or not 0 <= headroom < 1:
            raise ValueError(f"headroom={headroom!r}: wanted a number from 0 to less than 1, a share of the bound")
        self.headroom = float(headroom)
        self.every = as_int("every", every, least=1)
        self.steps = 0
        refuse_flat_parameters(model)
        self.layers = conv_layers(model, example_input) if layers is None else list(layers)
        if not self.layers:
            raise ValueError("model has no convolution to project")
        self.layers = _with_extents(self.layers, input_shapes or {})
        self._circular = circular
        self._options = {"method": method, **STEP_OPTIONS, **options}
        self._targets = _targets(self.layers, circular)
        self._exchange = make_exchange(model, process_group, [target.module for target in self._targets])
        calls = self._calls(list(range(len(self._targets))), [target.weight for target in self._targets])
        self._owners = self._exchange.share_out([target.cost() for target in self._targets], calls)
        self._norms: dict[str, float] = {}
        self._handle: Any = None

    @property
    def norms(self) -> dict[str, float]:
        """Certified upper bound of each layer's norm at the last projection, by name; empty before the first.

        Certified is the operator that was bounded: the layer with its own padding, or the circular one.
        """
        return dict(self._norms)

    def attach(self, optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> StepProjection:
        """Project after the steps of `optimizer`, and no longer after those of another one.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
        model : torch.nn.Module, optional
            A copy of the model, whose layers of the same names are to be projected from now on.

        Returns
        -------
        StepProjection
            This one.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__qualname__}: wanted a torch.optim.Optimizer")
        if model is not None:
            self._move_to(model)
        self.remove()
        self._handle = optimizer.register_step_post_hook(lambda *_: self.step())
        return self

    def remove(self) -> None:
        """Project no more."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def step(self) -> bool:
        """Count an optimizer step, and project where it is due; returns whether it was."""
        self.steps += 1
        if self.steps % self.every:
            return False
        self.project()
        return True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def project(self) -> dict[str, float]:
        """Project now, every layer; returns `norms`. On several ranks, all of them have to call it."""
        exchange = self._exchange
        kernels: list[torch.Tensor | None] = [None] * len(self._targets)
        norms: dict[str, float] = {}
        failure: Exception | None = None
        with torch.no_grad():
            weights = [_whole(target.weight) for target in self._targets]
            mine = [index for index, owner in enumerate(self._owners) if owner == exchange.rank]
            for chosen in self._calls(mine, weights):
                try:
                    with without_autocast(weights[chosen[0]]):
                        for index, (kernel, found) in zip(chosen, self._projected(chosen, weights), strict=True):
                            kernels[index] = kernel
                            norms |= found
                except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
                    layers = ", ".join(repr(self._targets[index].operators[0].name) for index in chosen)
                    error.add_note(f"in the projection of {'the layer' if len(chosen) == 1 else 'a layer of'} {layers}")
                    failure = error  # raised once the other ranks know, which would wait otherwise
                    break
            exchange.raise_together(failure, weights[0].device)
            names = [operator.name for target in self._targets for operator in target.operators]
            self._norms = exchange.collect(norms, names, weights[0].device)
            for target, kernel, weight in zip(
                self._targets, exchange.broadcast(kernels, weights, self._owners), weights, strict=True
            ):
                if not torch.equal(kernel, weight):
                    _store(target.module, kernel)
        return self.norms

    def _calls(self, chosen: list[int], weights: list[torch.Tensor]) -> list[list[int]]:
        """Targets that are projected by one call each."""
        if self._options["method"] != "rescale":
            return [[index] for index in chosen]
        return together({i: self._targets[i] for i in chosen}, {i: weights[i] for i in chosen})

    def _projected(self, chosen: list[int], weights: list[torch.Tensor]) -> list[Projected]:
        bound = self.bound / (1 + CERTIFICATE_RTOL)
        found = {index: still_certified(self._targets[index], weights[index], bound) for index in chosen}
        left = [index for index in chosen if found[index] is None]
        if left and self._options["method"] == "rescale" and is_simple(self._targets[left[0]], weights[left[0]]):
            targets = [self._targets[index] for index in left]
            found |= zip(left, rescaled(targets, [weights[index] for index in left], bound, self.headroom), strict=True)
        else:
            for index in left:
                found[index] = projected(self._targets[index], weights[index], bound, self.headroom, self._options)
        return [one for index in chosen if (one := found[index]) is not None]

    def _move_to(self, model: nn.Module) -> None:
        refuse_flat_parameters(model)
        known = {layer.name: layer for layer in conv_layers(model)}
        if missing := [layer.name for layer in self.layers if layer.name not in known]:
            raise ValueError(f"model has no convolution of the name {missing[0]!r}: wanted a copy of the model")
        self.layers = [dataclasses.replace(layer, module=known[layer.name].module) for layer in self.layers]
        states = [target.state for target in self._targets]
        self._targets = _targets(self.layers, self._circular)
        for target, state in zip(self._targets, states, strict=True):
            target.state = state


def project_after_step(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    bound: float,
    every: int = 1,
    *,
    method: str = "rescale",
    headroom: float = HEADROOM,
    circular: bool = False,
    example_input: object = None,
    input_shapes: Mapping[str, Extents] | None = None,
    layers: Iterable[ConvLayer] | None = None,
    process_group: ProcessGroup = None,
    **options: Any,
) -> StepProjection:
    """Project a model's convolutions onto those of norm at most a bound, after each step of an optimizer.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Its steps are followed by a projection. A step that a gradient scaler skips is none.
    model : torch.nn.Module
        Every convolution in it is projected, whether the optimizer knows its weight or not.
    bound : float
        Largest operator norm, not negative.
    every : int, default 1
        Project after every so many steps.
    method : str, default "rescale"
        As for `convsv_core.project`. "rescale" multiplies a layer that is above the bound by one number, and costs a
        few per cent of a training step. "dykstra" moves it to the nearest kernel that is within, from the dual
        variables of the step before, and costs many times more; "alternating", with ``max_iterations=1`` the
        paper's step before a rescaling, lies between them.
    headroom : float, default 0.01
        A layer that was above the bound is left this share of it below, as a whole. Until the weights may have moved so
        far again, the last certificate holds, and nothing is computed but the size of that change. With 0, a layer at
        its bound is certified anew after every step.
    circular : bool, default False
        What is bounded. By default the layer with its own padding, for every input size. Otherwise the circular
        convolution at the layer's extents, as in the paper (where a stride does not divide them, at the next
        multiples): less work for small images. It can let the norm with other padding exceed the bound a little.
    example_input : tensor, tuple, list or mapping, optional
        As for `conv_layers`. Extents are needed where `circular`, for padding that repeats pixels (reflect,
        replicate), and for lazy modules.
    input_shapes : mapping from str to tuple of int, optional
        Extents by the layer's name, in place of those that the forward pass shows.
    layers : iterable of ConvLayer, optional
        What to project: part of what `conv_layers` finds.
    process_group : torch.distributed.ProcessGroup, optional
        Ranks that hold the same weights, to share the work. That of `model`, if it is a `DistributedDataParallel`;
        without either, each process projects all layers.
    **options
        `rtol` and `max_iterations` of `convsv_core.project`, here 1e-2 and 10 unless given: the bound holds in any
        case, and the kernel is so much further from the nearest.

    Returns
    -------
    StepProjection
        A handle: `remove()`, `attach(optimizer)` (hooks are lost by copies of the optimizer, and are not in its
        `state_dict`), `project()`, and the certified `norms` of the last projection.

    Raises
    ------
    TypeError
        `model` holds flat parameters of FSDP1, or weights that another library has sharded.
    ValueError
        An argument is impossible; a layer's weight is computed in its forward pass; or extents are missing.

    Notes
    -----
    A layer costs next to nothing while its last certificate, and the change of its weight since, leave it within the
    bound. The stored weights satisfy the bound with room for the default gap of `norm_bounds`, 1e-3, so that this
    finds them to be within it too. So do, to the relative 1e-6 of the certificate, those of 16 bits, whose
    rounding is part of it. A parametrised weight is assigned, so that its parametrizations' `right_inverse` has to
    return it; what they round may be added. A weight that several modules share is brought within the bound
    for each, by a rescaling after the first. Ranks share the layers out by their cost, broadcast, and are bit-identical
    afterwards. Weights that FSDP2 shards are gathered, projected and written back. The constraint is that of Sedghi,
    Gupta and Long, ICLR 2019; see `convsv_core.project` for what is nearest.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.LazyLinear(2))
    >>> _ = model(torch.zeros(1, 3, 8, 8))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    >>> projection = project_after_step(optimizer, model, 1.0)
    >>> model(torch.ones(4, 3, 8, 8)).sum().backward()
    >>> optimizer.step()
    >>> projection.norms["0"] <= 1.0 * (1 + 1e-6)
    True
    """
    projection = StepProjection(
        model,
        bound,
        every,
        method=method,
        headroom=headroom,
        circular=circular,
        example_input=example_input,
        input_shapes=input_shapes,
        layers=layers,
        process_group=process_group,
        **options,
    )
    return projection.attach(optimizer)


# ---- what is projected -------------------------------------------------------------------------------------


def _with_extents(layers: list[ConvLayer], input_shapes: Mapping[str, Extents]) -> list[ConvLayer]:
    names = {layer.name for layer in layers}
    if unknown := sorted(set(input_shapes) - names):
        raise ValueError(f"input_shapes names {unknown[0]!r}: wanted names of layers, such as {sorted(names)[0]!r}")
    return [
        dataclasses.replace(layer, input_shapes=(tuple(input_shapes[layer.name]),))
        if layer.name in input_shapes
        else layer
        for layer in layers
    ]


def _targets(layers: list[ConvLayer], circular: bool) -> list[Target]:
    found: dict[int, Target] = {}
    for layer in layers:
        if COMPUTED_IN_FORWARD in layer.note:
            raise ValueError(
                f"the layer {layer.name!r} cannot be projected: {COMPUTED_IN_FORWARD}; wanted a weight that is a "
                f"parameter or parametrised, as by torch.nn.utils.parametrizations.weight_norm, or layers without it"
            )
        if layer.note and "subclass" in layer.note:
            warnings.warn(f"the layer {layer.name!r} is {layer.note}", stacklevel=4)
        parameter = layer.module._parameters.get("weight")
        if parameter is None and is_sharded(layer.weight):
            raise TypeError(f"the layer {layer.name!r} has a weight that is both parametrised and sharded: wanted one")
        target = found.setdefault(id(layer.module if parameter is None else parameter), Target(layer.module, []))
        for operator in _operators(layer, circular):
            same = [o for o in target.operators if o.name == operator.name]
            if operator not in same:
                target.operators.append(operator)
    return list(found.values())


def _operators(layer: ConvLayer, circular: bool) -> list[Operator]:
    if circular:
        if not layer.input_shapes:
            raise ValueError(f"circular=True: {NEEDS_EXTENTS.format(name=layer.name)}")
        geometries = [circular_geometry(layer.conv, extents) for extents in layer.input_shapes]
        return [Operator(layer.name, conv, extents, 1.0) for extents, conv in geometries]
    shape = tuple(layer.weight.shape)
    if layer.conv.padding_mode == "zeros":
        return [Operator(layer.name, lattice(layer.conv), None, 1.0)]
    if layer.input_shapes:
        largest = max(padding_norm(shape, extents, layer.conv) for extents in layer.input_shapes)
        return [Operator(layer.name, lattice(layer.conv), None, largest)]
    try:
        check_repeats_no_pixel(shape, layer.conv)
    except NotImplementedError as error:
        raise ValueError(
            f"the layer {layer.name!r} has padding that repeats pixels, and no extents are known: wanted an "
            f"example_input or input_shapes ({error})"
        ) from None
    return [Operator(layer.name, lattice(layer.conv), None, 1.0)]


# ---- weights ---------------------------------------------------------------------------------------------


def _whole(weight: torch.Tensor) -> torch.Tensor:
    return weight.full_tensor() if is_sharded(weight) else weight.detach()


def _store(module: nn.Module, kernel: torch.Tensor) -> None:
    parameter = module._parameters.get("weight")
    if parameter is None:
        module.weight = kernel.clone()
    elif is_sharded(parameter):
        write_shard(parameter, kernel)
    else:
        parameter.copy_(kernel)
