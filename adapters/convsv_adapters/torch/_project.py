"""Projection of a model's convolutions after optimizer steps, in one process or shared among several."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from convsv_adapters._layers import ConvLayer
from convsv_adapters.torch._exchange import make_exchange, refuse_flat_parameters
from convsv_adapters.torch._layers import listed_modules, renewed_layers, without_autocast
from convsv_adapters.torch._options import StepOptions
from convsv_adapters.torch._own_forward import uses_its_weight
from convsv_adapters.torch._scales import PartFactor, make_parts, multiply, part_factors
from convsv_adapters.torch._share import bounded_graph, share_weights, shared_bounds
from convsv_adapters.torch._step_hook import OptimizerHook, check_optimizer
from convsv_adapters.torch._targets import (
    ProjectedWeight,
    Target,
    is_simple,
    make_targets,
    projected,
    rescaled,
    still_certified,
    together,
)

__all__ = ["StepProjection", "project_after_step"]


class StepProjection(OptimizerHook):
    """Projects convolutions after every so many optimizer steps; `project_after_step` makes one.

    `copy.deepcopy` and pickling of an optimizer lose its step hooks, and its `state_dict` does not contain them. After
    either, or where a checkpoint is resumed in a new process, attach the projection again:
    ``projection.attach(optimizer)``.

    Parameters
    ----------
    model : torch.nn.Module
    bound, every, **options
        As for `project_after_step`.

    Attributes
    ----------
    layers : list of ConvLayer
        The layers that are projected; with ``batch_norm="fold"`` normalisations too, as `conv_layers` lists them.
    bound, network_bound : float or None
    headroom : float
    every : int
    steps : int
        Number of optimizer steps so far.
    """

    def __init__(self, model: nn.Module, bound: float | None = None, every: int = 1, **options: Any) -> None:
        if isinstance(model, torch.optim.Optimizer):
            raise TypeError(f"model is a {type(model).__qualname__}: wanted a torch.nn.Module; are arguments swapped?")
        chosen = StepOptions(bound, every, **options)
        self.bound, self.headroom, self.every, self.steps = chosen.bound, chosen.headroom, chosen.every, 0
        self._circular, self._arguments = chosen.circular, chosen.project_arguments
        self._process_group, self._selected = chosen.process_group, chosen.layers is not None
        self._norms: dict[str, float] = {}
        layers = chosen.find_layers(model)
        folds = chosen.network_bound is not None or any(layer.normalisation is not None for layer in layers)
        self._kinds: dict[str, Any] = {
            "linear": any(layer.linear for layer in layers),
            "batch_norm": "fold" if folds else None,
        }
        self.network_bound, self._share, self._graph = chosen.network_bound, chosen.share, None
        self._bounds = [chosen.bound or 0.0] * len(layers)
        if chosen.network_bound is not None:
            modules = listed_modules(model, **self._kinds)
            self._graph = bounded_graph(model, layers, modules, chosen.example_input)
            self._bounds = self._shared_out(layers)
        self._set_up(model, layers)

    def _shared_out(self, layers: Sequence[ConvLayer]) -> list[float]:
        """Return the bound of each layer, from the bound of the network."""
        assert self._graph is not None
        assert self.network_bound is not None
        return shared_bounds(self._graph, self.network_bound, share_weights(layers, self._share))

    def _set_up(self, model: nn.Module, layers: list[ConvLayer]) -> None:
        """Make the targets of a model's layers, and share them out over the ranks."""
        refuse_flat_parameters(model)
        self._model, self._modules = model, listed_modules(model, **self._kinds)
        self.layers, self._unknown = layers, {layer.name for layer in layers if not uses_its_weight(layer)}
        if self._graph is None:
            self._bounds = [self.bound or 0.0] * len(layers)
        pairs = list(zip(layers, self._bounds, strict=True))
        self._targets = make_targets([pair for pair in pairs if pair[0].normalisation is None], self._circular)
        self._parts = make_parts([pair for pair in pairs if pair[0].normalisation is not None], self._circular)
        every = [*self._targets, *self._parts]
        self._exchange = make_exchange(model, self._process_group, [target.module for target in every])
        calls = self._calls(list(range(len(self._targets))), [target.weight for target in self._targets])
        self._owners = self._exchange.share_out([target.cost() for target in self._targets], calls)
        groups = together(dict(enumerate(self._parts)), {i: part.weight for i, part in enumerate(self._parts)})
        self._part_owners = self._exchange.share_out([part.cost() for part in self._parts], groups)

    @property
    def bounds(self) -> dict[str, float]:
        """The bound of each layer, by name: the smallest, if a layer is bounded with and without a normalisation."""
        found: dict[str, float] = {}
        for layer, bound in zip(self.layers, self._bounds, strict=True):
            found[layer.name] = min(bound, found.get(layer.name, math.inf))
        return found

    @property
    def norms(self) -> dict[str, float]:
        """Certified upper bound of each layer's norm at the last projection, by name; empty before the first.

        The norm is of the operator that was bounded: the layer with its own padding, or the circular convolution. Where
        a normalisation follows the layer, it is the norm of both in evaluation mode, with the running variance at that
        time. The next forward pass in training mode moves this variance: call `project` for a new certificate.

        A layer of a user's class that may change the kernel in its forward pass is left out: its kernel is bounded, and
        the norm of what it computes is not known.
        """
        return dict(self._norms)

    def attach(self, optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> StepProjection:
        """Project after the steps of `optimizer`, and no longer after the steps of another one.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
        model : torch.nn.Module, optional
            A copy of the model. From now on its layers of the same names are projected.

        Returns
        -------
        StepProjection
            This one.
        """
        check_optimizer(optimizer)
        if model is not None:
            self._follow(model)
        self._follow_steps(optimizer)
        return self

    def step(self) -> bool:
        """Count an optimizer step, project if it is due, and return whether it was."""
        self.steps += 1
        if self.steps % self.every:
            return False
        self.project()
        return True

    def finish(self) -> None:
        """Project the final weights of a training, unless the last step did so."""
        if self.steps % self.every:
            self.project()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def project(self) -> dict[str, float]:
        """Project every layer now and return `norms`; with several ranks, all of them have to call it."""
        self._follow(self._model)
        with torch.no_grad():
            norms = self._project_kernels()
            for name, norm in self._bound_parts().items():
                norms[name] = max(norms.get(name, 0.0), norm)
        names = dict.fromkeys(layer.name for layer in self.layers if layer.name not in self._unknown)
        self._norms = {name: norms[name] for name in names}
        return self.norms

    def _project_kernels(self) -> dict[str, float]:
        """Project the kernels of the layers without normalisations, and return their norms."""
        exchange, weights = self._exchange, [target.gathered() for target in self._targets]
        if not weights:
            return {}
        kernels: list[torch.Tensor | None] = [None] * len(self._targets)
        norms: dict[str, float] = {}
        mine = [index for index, owner in enumerate(self._owners) if owner == exchange.rank]

        def work(chosen: list[int]) -> None:
            for index, found in zip(chosen, self._projected(chosen, weights), strict=True):
                kernels[index] = found.kernel
                norms.update(found.norms)

        self._do(work, self._calls(mine, weights), self._targets, weights)
        names = [name for target in self._targets for name in target.names]
        norms = exchange.collect(norms, names, weights[0].device)
        whole = exchange.broadcast(kernels, weights, self._owners)
        for target, kernel, weight in zip(self._targets, whole, weights, strict=True):
            if not torch.equal(kernel, weight):
                target.store(kernel)
        return norms

    def _bound_parts(self) -> dict[str, float]:
        """Bound normalisations, with the layers that they follow as these are now, and return the norms."""
        exchange, parts = self._exchange, self._parts
        if not parts:
            return {}
        # In training each rank has running variances of its own. Smaller ones give larger norms.
        variances = exchange.smallest([part.normalisation.running_var for part in parts])
        measured = [part.measure(variance) for part, variance in zip(parts, variances, strict=True)]
        kernels = [one.kernel for one in measured]
        mine = [index for index, owner in enumerate(self._part_owners) if owner == exchange.rank]
        groups = together({index: parts[index] for index in mine}, {index: kernels[index] for index in mine})
        numbers: dict[str, float] = {}

        def work(chosen: list[int]) -> None:
            some = {index: parts[index] for index in chosen}
            for index, found in part_factors(some, {index: measured[index] for index in chosen}, self.headroom):
                numbers[f"factor {index}"], numbers[f"norm {index}"] = found

        self._do(work, groups, parts, kernels)
        names = [f"{what} {index}" for index in range(len(parts)) for what in ("factor", "norm")]
        numbers = exchange.collect(numbers, names, kernels[0].device)
        found = [PartFactor(numbers[f"factor {i}"], numbers[f"norm {i}"]) for i in range(len(parts))]
        return multiply(parts, found)

    def _do(
        self,
        work: Callable[[list[int]], None],
        calls: list[list[int]],
        targets: Sequence[Target],
        weights: Sequence[torch.Tensor],
    ) -> None:
        """Do this rank's calls of a piece of work; if one fails, on any rank, raise an error on every rank."""
        failure: Exception | None = None
        for chosen in calls:
            try:
                with without_autocast(weights[chosen[0]]):
                    work(chosen)
            except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
                layers = ", ".join(repr(targets[index].names[0]) for index in chosen)
                error.add_note(f"in the projection of {'the layer' if len(chosen) == 1 else 'a layer of'} {layers}")
                failure = error  # raised below, once the other ranks know: they would wait for this one
                break
        self._exchange.raise_together(failure, weights[0].device)

    def _calls(self, chosen: list[int], weights: list[torch.Tensor]) -> list[list[int]]:
        """Return the chosen targets in groups that are projected by one call each."""
        if self._arguments["method"] != "rescale":
            return [[index] for index in chosen]
        return together({i: self._targets[i] for i in chosen}, {i: weights[i] for i in chosen})

    def _projected(self, chosen: list[int], weights: list[torch.Tensor]) -> list[ProjectedWeight]:
        """Return the projected weights of one group of targets."""
        found = {index: still_certified(self._targets[index], weights[index]) for index in chosen}
        left = [index for index in chosen if found[index] is None]
        if left and self._arguments["method"] == "rescale" and is_simple(self._targets[left[0]], weights[left[0]]):
            targets = [self._targets[index] for index in left]
            found |= zip(left, rescaled(targets, [weights[index] for index in left], self.headroom), strict=True)
        else:
            for index in left:
                found[index] = projected(self._targets[index], weights[index], self.headroom, self._arguments)
        return [one for index in chosen if (one := found[index]) is not None]

    def _follow(self, model: nn.Module) -> None:
        """Project the convolutions that a model has now: some may have been replaced, added or removed.

        Extents are known by a layer's name. Dual variables stay with the layers that stay.
        """
        modules = listed_modules(model, **self._kinds)
        if model is self._model and modules == self._modules:
            return
        refuse_flat_parameters(model)
        known = {layer.name for layer in self.layers}
        moved = model is not self._model
        if moved and (missing := known - modules.keys()):
            raise ValueError(f"model has no convolution of the name {min(missing)!r}: wanted a copy of the model")
        if not modules:
            raise ValueError("model has no convolution left to project: wanted one, or `remove()` the projection")
        before = {_identity(target): target for target in [*self._targets, *self._parts]}
        self._set_up(model, renewed_layers(model, self.layers, self._modules, every=not self._selected, **self._kinds))
        for target in [*self._targets, *self._parts]:
            old = before.get(_identity(target))
            if old is not None and (moved or old.module is target.module):
                target.state = old.state


def _identity(target: Target) -> tuple[str, bool]:
    """Return by what a target is known when modules are replaced: its first layer, and whether it is normalised."""
    return target.names[0], target.layer.normalisation is not None


def project_after_step(
    optimizer: torch.optim.Optimizer, model: nn.Module, bound: float | None = None, every: int = 1, **options: Any
) -> StepProjection:
    """Project a model's convolutions onto the kernels of norm at most `bound`, after each step of an optimizer.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        A projection follows each of its steps. A step that a gradient scaler skips is none.
    model : torch.nn.Module
        Every convolution in it is projected, whether the optimizer knows its weight or not. With ``linear=True`` this
        holds for every linear layer too, and with ``batch_norm="fold"`` for every batch normalisation.
    bound : float, optional
        Largest operator norm, finite and not negative. Either this or a `network_bound` is needed.
    every : int, default 1
        Project after every `every`-th step.
    **options
        `network_bound`, `share`, `linear`, `batch_norm`, `method`, `headroom`, `circular`, `example_input`,
        `input_shapes`, `layers`, `process_group`, `rtol`, `max_iterations` and `steps`: see `StepOptions`.

    Returns
    -------
    StepProjection
        A handle, with the methods `project()`, `remove()` and `attach(optimizer)`, and the certified `norms` of the
        last projection. Copies of the optimizer and its `state_dict` do not have the hook: `attach` it again.

    Raises
    ------
    TypeError
        `model` holds flat parameters of FSDP1 or weights that another library has sharded, or there is no such option.
    ValueError
        An argument is impossible; a layer's weight is computed in its forward pass; or extents are missing. With
        ``batch_norm="fold"``, for the reasons of `conv_layers`, or a normalisation has no weight. With a
        `network_bound`, the network cannot be traced, a part of it has no bound, parameters of no bounded layer matter,
        or the bound cannot be reached.

    Notes
    -----
    A layer costs next to nothing while its last certificate, and the change of its weight since then, prove that it is
    within the bound.

    The stored weights are at least 1e-3 below the bound, the default gap of `norm_bounds`, which thus finds them
    within the bound too. This holds to a relative 1e-6, the rounding of the certificate, for weights of 16 bits too.
    A parametrised weight is assigned: its parametrizations need a `right_inverse` that returns the weight, and their
    rounding comes on top. A weight that several modules share is brought within the bound for each of them, by a
    rescaling after the first.

    With ``batch_norm="fold"``, a layer and the normalisation behind it are bounded as one map, as they are in
    evaluation mode. The weight of the normalisation is multiplied by a number, and the layer's own weight is left
    alone: in training a smaller kernel soon has a smaller running variance, and the map would be as large as before.
    The bound holds with the running variance at the time of the projection, which the next forward pass in training
    mode moves. So call ``projection.project()`` before an evaluation, or before weights are saved: the network in
    evaluation mode is then within the bounds. In training, each rank has running variances of its own. The bound then
    holds for each of them.

    With a `network_bound`, the graph of the network (see `convsv_core.lipschitz`) says how large its Lipschitz constant
    can be with a bound for each layer. One factor makes these bounds as large as the network's bound allows. Parts of
    the network that no layer bounds, such as activations and pooling, count with their own factors, and may have no
    parameters. After ``projection.project()`` the constant in evaluation mode is at most the bound, for inputs of the
    shape of the `example_input`. `projection.bounds` holds the bound of each layer.

    Ranks share the layers by their cost, broadcast the results, and have the same bits afterwards. Weights that FSDP2
    shards are gathered, projected and written back. The constraint is that of Sedghi, Gupta and Long, ICLR 2019;
    `convsv_core.project` says in which sense a kernel is nearest.

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
    return StepProjection(model, bound, every, **options).attach(optimizer)


def _explicit_signature() -> inspect.Signature:
    """Return the signature of `project_after_step` with each of its options, for `help` and for editors."""
    own = inspect.signature(project_after_step)
    fixed = [parameter for parameter in own.parameters.values() if parameter.kind != inspect.Parameter.VAR_KEYWORD]
    named = [one for one in inspect.signature(StepOptions).parameters.values() if one.name not in own.parameters]
    return own.replace(parameters=[*fixed, *named])


project_after_step.__signature__ = _explicit_signature()  # type: ignore[attr-defined]
