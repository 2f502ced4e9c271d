"""Projection of a model's convolutions after optimizer steps, in one process or shared out over several."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from convsv_adapters._torch_exchange import is_sharded, make_exchange, refuse_flat_parameters, write_shard
from convsv_adapters._torch_layers import (
    CIRCULAR_NEEDS_EXTENTS,
    COMPUTED_IN_FORWARD,
    ConvLayer,
    Extents,
    circular_geometry,
    conv_layers,
    without_autocast,
)
from convsv_core import Conv, ProjectionState, project
from convsv_core.bounds import check_repeats_no_pixel
from convsv_core.conv import as_int
from convsv_core.operand import make_operand
from convsv_core.padded import padding_norm

ProcessGroup: TypeAlias = Any

ROUNDINGS = 16
"""Attempts to round a kernel to 16 bits within the bound; each gives up more, the last ones half of the norm."""

STEP_OPTIONS = {"rtol": 1e-2, "max_iterations": 10}
"""How far one projection goes, where the next step's begins from the dual variables of this one."""

DRIFT_ROUNDING = 1e-6
"""Far above the rounding error, in float64, of the norm of a kernel's change; relative."""

POINTS = 16
"""Frequencies that a projection visits along an axis for each unit of the kernel's span, for an estimate of work."""


@dataclass(frozen=True)
class Operator:
    """One operator that a weight stands for.

    Attributes
    ----------
    name : str
        Of the layer.
    conv, input_shape
        As `convsv_core.project` takes them.
    padding_norm : float
        By how much the layer's own padding can raise the norm of that operator, as a factor.
    """

    name: str
    conv: Conv
    input_shape: Extents | None
    padding_norm: float


@dataclass(frozen=True, eq=False)
class Certified:
    """A kernel that the norms of a weight's operators are known for, and these upper bounds."""

    kernel: torch.Tensor
    uppers: list[float]


@dataclass(eq=False)
class Target:
    """One weight, and the operators that it stands for: several where modules share it, or inputs differ."""

    module: nn.Module
    operators: list[Operator]
    state: ProjectionState | None = None
    reference: Certified | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The module's weight."""
        return self.module.weight

    def cost(self) -> float:
        """Of a projection, roughly: the work of a decomposition at each frequency."""
        operator, shape = self.operators[0], tuple(self.weight.shape)
        conv, taps = operator.conv, shape[2:]
        if operator.input_shape is None:
            grid = [max(1, POINTS * (-(-k // s) - 1)) for k, s in zip(taps, conv.strides, strict=True)]
        else:
            strides = (1,) * conv.ndim if conv.transposed else conv.strides
            grid = [n // s for n, s in zip(operator.input_shape, strides, strict=True)]
        rows = shape[0] // conv.groups
        columns = shape[1] * math.prod(min(k, s) for k, s in zip(taps, conv.strides, strict=True))
        return float(math.prod(grid) * conv.groups * rows * columns * min(rows, columns))


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
        method: str = "dykstra",
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
        self._owners = self._exchange.share_out([target.cost() for target in self._targets])
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
            for index, (target, owner) in enumerate(zip(self._targets, self._owners, strict=True)):
                if owner != exchange.rank or failure is not None:
                    continue
                try:
                    with without_autocast(weights[index]):
                        kernels[index], found = _projected(target, weights[index], self.bound, self._options)
                    norms |= found
                except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
                    error.add_note(f"in the projection of the layer {target.operators[0].name!r}")
                    failure = error  # raised once the other ranks know, which would wait otherwise
            exchange.raise_together(failure, weights[0].device)
            names = [operator.name for target in self._targets for operator in target.operators]
            self._norms = exchange.collect(norms, names, weights[0].device)
            for target, kernel, weight in zip(
                self._targets, exchange.broadcast(kernels, weights, self._owners), weights, strict=True
            ):
                if not torch.equal(kernel, weight):
                    _store(target.module, kernel)
        return self.norms

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
    method: str = "dykstra",
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
    method : str, default "dykstra"
        As for `convsv_core.project`, which starts from the dual variables of the step before.
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
    bound. The stored weights satisfy the bound, to the relative 1e-6 of the certificate, also those of 16 bits, whose
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
            raise ValueError(f"circular=True: {CIRCULAR_NEEDS_EXTENTS.format(name=layer.name)}")
        geometries = [circular_geometry(layer, extents) for extents in layer.input_shapes]
        return [Operator(layer.name, conv, extents, 1.0) for extents, conv in geometries]
    shape = tuple(layer.weight.shape)
    lattice = dataclasses.replace(layer.conv, padding="same", padding_mode="circular")
    if layer.conv.padding_mode == "zeros":
        return [Operator(layer.name, lattice, None, 1.0)]
    if layer.input_shapes:
        largest = max(padding_norm(shape, extents, layer.conv) for extents in layer.input_shapes)
        return [Operator(layer.name, lattice, None, largest)]
    try:
        check_repeats_no_pixel(make_operand(_whole(layer.weight.detach()), None, layer.conv), layer.conv)
    except NotImplementedError as error:
        raise ValueError(
            f"the layer {layer.name!r} has padding that repeats pixels, and no extents are known: wanted an "
            f"example_input or input_shapes ({error})"
        ) from None
    return [Operator(layer.name, lattice, None, 1.0)]


# ---- one layer ---------------------------------------------------------------------------------------------


def _projected(
    target: Target, weight: torch.Tensor, bound: float, options: Mapping[str, Any]
) -> tuple[torch.Tensor, dict[str, float]]:
    """The weight, in its own dtype, within the bound for each operator; and the certified norms."""
    bounds = [bound / operator.padding_norm for operator in target.operators]
    uppers = _still_certified(target.reference, weight, bounds)
    kernel = weight
    if uppers is None:
        kernel, norms = _nearest(target, weight, bound, options)
        uppers = [float(norm) for norm in norms]
        target.reference = Certified(kernel.clone(), uppers)
    certified: dict[str, float] = {}
    for operator, upper in zip(target.operators, uppers, strict=True):
        certified[operator.name] = max(certified.get(operator.name, 0.0), upper * operator.padding_norm)
    return kernel, certified


def _still_certified(reference: Certified | None, weight: torch.Tensor, bounds: list[float]) -> list[float] | None:
    """Upper bounds that follow from those of an earlier kernel, if all of them are within the bounds.

    No norm changes by more than the sum over the taps of the norms of the changes' matrices, for any stride,
    dilation, grouping or input size; Frobenius norms stand for these.
    """
    if reference is None or reference.kernel.shape != weight.shape or reference.kernel.device != weight.device:
        return None
    wide = torch.complex128 if weight.is_complex() else torch.float64
    change = (weight.to(wide) - reference.kernel.to(wide)).flatten(2)
    drift = float(torch.linalg.vector_norm(change, dim=(0, 1)).sum()) * (1 + DRIFT_ROUNDING)
    uppers = [upper + drift for upper in reference.uppers]
    return uppers if all(upper <= limit for upper, limit in zip(uppers, bounds, strict=True)) else None


def _nearest(
    target: Target, weight: torch.Tensor, bound: float, options: Mapping[str, Any]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The projected weight, in its own dtype, and the certified norm of each operator, its padding left out."""
    first, *others = target.operators
    found = project(weight, first.input_shape, first.conv, bound / first.padding_norm, state=target.state, **options)
    target.state = found.state
    kernel, norms = found.kernel, [found.norm]
    if kernel.dtype != weight.dtype:
        return _rounded(kernel, weight.dtype, target.operators, bound)
    for operator in others:
        kernel, norm = _rescaled(kernel, operator, bound)
        norms.append(norm)
    return kernel, norms


def _rescaled(kernel: torch.Tensor, operator: Operator, bound: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel, smaller if the operator's norm demands it, which leaves it within every other bound."""
    found = project(kernel, operator.input_shape, operator.conv, bound / operator.padding_norm, method="rescale")
    return found.kernel, found.norm


def _rounded(
    kernel: torch.Tensor, dtype: torch.dtype, operators: list[Operator], bound: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A kernel near the given one that is within the bound after rounding to 16 bits."""
    for attempt in range(ROUNDINGS):
        stored = kernel.to(dtype)
        norms = []
        within = True
        for operator in operators:
            smaller, norm = _rescaled(stored, operator, bound)
            norms.append(norm)
            within = within and torch.equal(smaller, stored.to(smaller.dtype))
            kernel = smaller if not within else kernel
        if within:
            return stored, norms
        kernel = kernel * (1 - min(0.5, 2**attempt * torch.finfo(dtype).eps / 8))
    raise ArithmeticError(f"no kernel of {dtype} was found within the bound {bound}")


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
