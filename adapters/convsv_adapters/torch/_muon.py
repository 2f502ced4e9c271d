"""Muon for convolutions: an optimizer whose steps are steepest in the operator norm of each layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from convsv_adapters._layers import COLD_ITERATIONS, check_scaling
from convsv_adapters.torch._exchange import is_sharded, make_exchange, refuse_flat_parameters
from convsv_adapters.torch._layers import without_autocast
from convsv_adapters.torch._muon_layers import find_geometries
from convsv_core.conv import as_float, as_int
from convsv_core.plugins import backend_of
from convsv_core.training import DirectionMethod, check_direction_method, steepest_together

__all__ = ["ConvMuon"]

OPERATIONS = {"exact": 100.0, "polar": 50.0, "flat": 10.0}
"""Operations of a direction, by method, over the number of a weight's entries times its smaller side.

For "exact", after the times of one iteration for ResNet-32, to an order of magnitude. The others are guesses.
"""


class ConvMuon(torch.optim.Optimizer):  # type: ignore[misc]
    """Muon with the operator norm of each convolution, and AdamW for all other parameters.

    The step of a convolution or a linear layer is the kernel of a given operator norm with the largest inner product
    with the momentum. Muon takes this step for matrices. For convolutions it takes the flattened kernel, whose norm is
    not the layer's; here it is the norm of the convolution, for every stride, dilation, grouping and transposition.

    Parameters
    ----------
    model : torch.nn.Module
        The geometry of its layers is read once. The weights of convolutions and `Linear` layers that are parameters
        take steepest steps. All other parameters are left to AdamW, parametrised weights among them.
    lr : float, default 0.02
        The certified operator norm of a step, in units of the layer's factor; see `scaling`.
    momentum : float, default 0.95
    nesterov : bool, default True
    weight_decay : float, default 0.0
        Decoupled: a weight is multiplied by ``1 - lr * weight_decay``. Not for AdamW's parameters.
    method : {"exact", "polar", "flat"}, default "exact"
        As for `convsv_core.steepest_direction`.
    iterations : int, default 1
        Iterations of "exact" for each step. They start from the matrices of the step before.
    scaling : {"rms", "operator"}, default "rms"
        The factor of the learning rate. "operator": 1. "rms": the root of the number of output elements of an image
        for each input element, ``sqrt(outputs / (inputs * prod(stride)))``, with the stride in the numerator for a
        transposed convolution. A step of rate lr then changes outputs by at most lr times the inputs, as root mean
        squares. So a rate carries over between widths, kernel sizes and strides.
    adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay : float, default 3e-4, (0.9, 0.95), 1e-8, 0.0
        The options of AdamW.
    params : iterable, optional
        Parameters or parameter groups to train, in place of all parameters of the model, with their names or without.
        A group may have options of its own, by the names above, and ``"algorithm"``: "steepest" or "adamw" for all of
        its parameters. Beside "adamw", ``"lr"`` and ``"weight_decay"`` are AdamW's.
    process_group : torch.distributed.ProcessGroup, optional
        As for `project_after_step`: ranks that hold the same weights share the layers out.

    Raises
    ------
    TypeError
        `model` is not a module, or holds flat parameters of FSDP1.
    ValueError
        An option is impossible, a group wants steepest steps for another kind of parameter, or a lazy layer has no
        weight yet.

    Notes
    -----
    Each group of `param_groups` holds either steepest or AdamW's parameters, and has its own ``lr``. So learning rate
    schedulers, `torch.amp.GradScaler` and accumulated gradients work as with any optimizer. NaN or infinity in a
    gradient that takes steepest steps is a ValueError of `step`, which then changes nothing.

    The norm of a step is certified on a grid, so the true norm is at most ``lr`` times the factor, and at least 0.84
    times as much. It is the norm with zero or circular padding, and padding that repeats pixels can raise it. For
    weights of 16 bits, rounding the step adds to its norm. A subclass of a layer counts as the layer.

    "exact" keeps complex matrices at 34 frequencies for 3 x 3 taps: in bytes 7.6 times a real kernel of 32 bits. With
    several ranks, only the rank that computes a layer has them, and a checkpoint of another rank begins anew. Weights
    that FSDP2 shards are gathered for each step.

    The source of the steps is `convsv_core.steepest_direction`'s; of the factor Yang, Simon and Bernstein, 2023.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(512, 2))
    >>> optimizer = ConvMuon(model, lr=0.1)
    >>> [(group["algorithm"], len(group["params"])) for group in optimizer.param_groups]
    [('steepest', 2), ('adamw', 4)]
    >>> model(torch.ones(4, 3, 8, 8)).square().mean().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        method: DirectionMethod = "exact",
        iterations: int = 1,
        scaling: str = "rms",
        adamw_lr: float = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        params: Iterable[Any] | None = None,
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is a {type(model).__qualname__}: wanted a torch.nn.Module, whose layers have geometry"
            )
        refuse_flat_parameters(model)
        found = find_geometries(model)
        self._geometries = {layer.parameter: layer.geometry for layer in found}
        self._exchange = make_exchange(model, process_group, [layer.module for layer in found])
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "method": method,
            "iterations": iterations,
            "scaling": scaling,
            "adamw_lr": adamw_lr,
            "adamw_betas": tuple(adamw_betas),
            "adamw_eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
        }
        _check(defaults)
        chosen = model.parameters() if params is None else params
        super().__init__(list(chosen), defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle takes along: also the geometry of the layers."""
        own = {"_geometries": self._geometries, "_exchange": self._exchange}
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: its convolutions and linear layers, and its other parameters, each as a group of its own."""
        options = {**self.defaults, **param_group}
        _check(options)
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError(
                "params is a set, whose order changes from run to run: wanted a list, so that checkpoints fit"
            )
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        known = [(one[1] if isinstance(one, tuple) else one) in self._geometries for one in params]
        wanted = param_group.get("algorithm")
        if wanted not in (None, "steepest", "adamw"):
            raise ValueError(f"algorithm={wanted!r}: wanted 'steepest' or 'adamw'")
        if wanted == "steepest" and not all(known):
            raise ValueError(
                "algorithm='steepest' with a parameter that is not the weight of a convolution or a Linear of the model"
            )
        parts = {
            "steepest": [one for one, is_known in zip(params, known, strict=True) if is_known and wanted != "adamw"],
            "adamw": [one for one, is_known in zip(params, known, strict=True) if not is_known or wanted == "adamw"],
        }
        for algorithm, members in parts.items():
            if members:
                group = {**param_group, "params": members, "algorithm": algorithm}
                if algorithm == "adamw":
                    own = param_group if wanted == "adamw" else {}  # An lr beside the algorithm is AdamW's.
                    for name in ("lr", "weight_decay"):
                        group[name] = own.get(name, options[f"adamw_{name}"])
                super().add_param_group(group)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, and return what `closure` returns; with several ranks, all of them have to call it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        steepest: list[tuple[nn.Parameter, dict[str, Any]]] = []
        others: list[tuple[list[nn.Parameter], dict[str, Any]]] = []
        for group in self.param_groups:
            params = [one for one in group["params"] if one.grad is not None]
            if any(one.grad.is_sparse for one in params):
                raise RuntimeError("ConvMuon does not support sparse gradients: wanted SparseAdam for their parameters")
            if group["algorithm"] == "adamw":
                others.append((params, group))
            else:
                steepest += [(one, group) for one in params]
        if steepest:
            self._steepest_step([one for one, _ in steepest], [group for _, group in steepest])
        for params, group in others:
            _adamw_step(self.state, params, group)
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _steepest_step(self, params: Sequence[nn.Parameter], groups: Sequence[dict[str, Any]]) -> None:
        """Move the weights of convolutions and linear layers, which the ranks share out."""
        exchange = self._exchange
        exchange.raise_together(_infinite_gradient(params), params[0].device, "step of ConvMuon")
        moments = [_moment(self.state[one], one, group) for one, group in zip(params, groups, strict=True)]
        gathered = [one.full_tensor() if is_sharded(one) else one for one in moments]
        calls = self._calls(params, gathered, groups)
        costs = [one.numel() * min(one.shape[0], one[0].numel()) for one in gathered]
        owners = exchange.share_out(costs, calls)
        for one, owner in zip(params, owners, strict=True):
            if owner != exchange.rank:
                self.state[one].pop("matrices", None)  # from a checkpoint of another rank, or soon out of date
        directions: list[torch.Tensor | None] = [None] * len(params)

        def directions_of(members: Sequence[int]) -> list[torch.Tensor | Exception]:
            try:
                found = self._directions(
                    [params[i] for i in members], [gathered[i] for i in members], groups[members[0]]
                )
                return [one.to(gathered[index].dtype) for index, one in zip(members, found, strict=True)]
            except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
                error.add_note(f"in a step of ConvMuon, for a weight of shape {tuple(gathered[members[0]].shape)}")
                return [error] * len(members)  # The other ranks would wait for this one: it is raised on all ranks.

        # The owners may not depend on the matrices: each rank has those of its own layers alone.
        parts = (
            [i for i in call if owners[i] == exchange.rank and ("matrices" in self.state[params[i]]) == warm]
            for call in calls
            for warm in (True, False)
        )
        mine = [part for part in parts if part]
        work = [sum(OPERATIONS[groups[own[0]]["method"]] * costs[index] for index in own) for own in mine]
        found = backend_of(gathered[0]).map_groups(directions_of, mine, work, gathered[0])
        failure: Exception | None = None
        for index, one in zip(itertools.chain(*mine), itertools.chain(*found), strict=True):
            if isinstance(one, Exception):
                failure = failure or one
            else:
                directions[index] = one
        exchange.raise_together(failure, gathered[0].device, "step of ConvMuon")
        for one, group, direction in zip(params, groups, exchange.broadcast(directions, gathered, owners), strict=True):
            lr = float(group["lr"])
            one.mul_(1 - lr * group["weight_decay"])
            if is_sharded(one):
                from torch.distributed.tensor import distribute_tensor

                direction = distribute_tensor(direction, one.device_mesh, one.placements, src_data_rank=None)
            one.add_(direction, alpha=-lr * self._geometries[one].factor(one, group["scaling"]))

    def _calls(
        self, params: Sequence[nn.Parameter], moments: Sequence[torch.Tensor], groups: Sequence[dict[str, Any]]
    ) -> list[list[int]]:
        """Return the indices of the parameters in groups, each of which one call serves."""
        calls: dict[Any, list[int]] = {}
        for index, (one, moment, group) in enumerate(zip(params, moments, groups, strict=True)):
            alike = (tuple(moment.shape), moment.dtype, moment.device, self._geometries[one], group["method"])
            calls.setdefault((*alike, group["iterations"]), []).append(index)
        return list(calls.values())

    def _directions(
        self, params: Sequence[nn.Parameter], moments: Sequence[torch.Tensor], group: dict[str, Any]
    ) -> list[torch.Tensor]:
        """Return the directions of weights of one shape and geometry, and keep what the next step goes on from."""
        geometry, states = self._geometries[params[0]], [self.state[one] for one in params]
        matrices = None
        iterations = max(group["iterations"], COLD_ITERATIONS)
        if group["method"] == "exact" and all("matrices" in state for state in states):
            wide = torch.float64 if moments[0].dtype in (torch.float64, torch.complex128) else torch.float32
            matrices = [torch.view_as_complex(state["matrices"].to(wide)) for state in states]
            iterations = group["iterations"]
        kernels = [geometry.as_kernel(one) for one in moments]
        with without_autocast(moments[0]):
            found = steepest_together(
                kernels, None, geometry.conv, method=group["method"], iterations=iterations, matrices=matrices
            )
        for state, one, moment in zip(states, found, moments, strict=True):
            # The search for a gradient of zero finds nothing that a later search could start from.
            if one.matrices is not None and (matrices is not None or bool(moment.any())):
                # `load_state_dict` would drop imaginary parts, because the weights are real.
                state["matrices"] = torch.view_as_real(one.matrices.contiguous())
        return [one.direction.reshape(moment.shape) for one, moment in zip(found, moments, strict=True)]


def _infinite_gradient(params: Sequence[nn.Parameter]) -> ValueError | None:
    """Return an error if a gradient holds NaN or infinity, which would stay in the momentum for ever."""
    gradients = [one.grad.to_local() if is_sharded(one) else one.grad for one in params]
    device = gradients[0].device
    finite = torch.stack([torch.isfinite(one).all().to(device) for one in gradients])
    if bool(finite.all()):
        return None
    shape = tuple(params[int(finite.to(torch.uint8).argmin())].shape)
    return ValueError(
        f"a gradient holds NaN or infinity, for a weight of shape {shape}: wanted finite numbers (has training "
        f"diverged?); no parameter was changed"
    )


def _moment(state: dict[str, Any], parameter: nn.Parameter, group: dict[str, Any]) -> torch.Tensor:
    """Return the momentum after this gradient, or Nesterov's mean of gradient and momentum."""
    gradient = parameter.grad
    assert gradient is not None
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
    buffer, share = state["momentum_buffer"], group["momentum"]
    buffer.mul_(share).add_(gradient, alpha=1 - share)
    return gradient * (1 - share) + buffer * share if group["nesterov"] else buffer


def _adamw_step(states: Any, params: list[nn.Parameter], group: dict[str, Any]) -> None:
    """Take a step of AdamW, by torch's own function, for the parameters of a group."""
    if not params:
        return
    for one in params:
        if not states[one]:
            states[one]["step"] = torch.zeros(())
            states[one]["exp_avg"] = torch.zeros_like(one, memory_format=torch.preserve_format)
            states[one]["exp_avg_sq"] = torch.zeros_like(one, memory_format=torch.preserve_format)
    beta1, beta2 = group["adamw_betas"]
    adamw(
        params,
        [one.grad for one in params],
        [states[one]["exp_avg"] for one in params],
        [states[one]["exp_avg_sq"] for one in params],
        [],
        [states[one]["step"] for one in params],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["adamw_eps"],
        maximize=False,
        has_complex=any(torch.is_complex(one) for one in params),
    )


def _check(options: dict[str, Any]) -> None:
    """Raise an error unless the options of a group are possible."""
    check_direction_method(options["method"])
    as_int("iterations", options["iterations"], least=1)
    check_scaling(options["scaling"])
    for name in ("lr", "weight_decay", "adamw_lr", "adamw_weight_decay", "adamw_eps"):
        if not as_float(name, float(options[name])) >= 0:
            raise ValueError(f"{name}={options[name]!r}: wanted a number of at least 0")
    for name, share in (("momentum", options["momentum"]), *(("adamw_betas", one) for one in options["adamw_betas"])):
        if not 0 <= share < 1:
            raise ValueError(f"{name}={share!r}: wanted a number from 0 to less than 1")
