"""Messages between the ranks of a process group that share a projection."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed, nn

__all__ = [
    "Exchange",
    "GroupExchange",
    "is_sharded",
    "make_exchange",
    "process_rank",
    "refuse_flat_parameters",
    "write_shard",
]


class Exchange:
    """Exchange of one process that does all the work itself."""

    rank = 0
    size = 1

    def share_out(self, costs: Sequence[float], calls: Sequence[Sequence[int]]) -> list[int]:
        """Return the rank that does each piece of work.

        The next largest call goes to the rank with the least work so far. Pieces of one call stay together, since each
        call has a cost of its own, unless they are more than one rank's share of all the work.

        Parameters
        ----------
        costs : sequence of float
            Cost of each piece, positive, in any unit.
        calls : sequence of sequence of int
            Indices of the pieces that one call does together.
        """
        share = sum(costs) / self.size  # positive
        parts: list[tuple[float, Sequence[int]]] = []
        for call in calls:
            count = min(len(call), math.ceil(sum(costs[index] for index in call) / share))
            parts += [(sum(costs[index] for index in part), part) for part in (call[i::count] for i in range(count))]
        loads = [(0.0, rank) for rank in range(self.size)]
        owners = [0] * len(costs)
        for cost, part in sorted(parts, key=lambda item: -item[0]):
            load, owner = heapq.heappop(loads)
            for index in part:
                owners[index] = owner
            heapq.heappush(loads, (load + cost, owner))
        return owners

    def raise_together(self, failure: Exception | None, device: torch.device, task: str = "projection") -> None:
        """Raise an error on every rank if one rank has failed at a task, which the error names."""
        if failure is not None:
            raise failure

    def collect(self, values: dict[str, float], names: list[str], device: torch.device) -> dict[str, float]:
        """Return the values of all ranks, in the order of `names`; each value is known to one rank."""
        return {name: values[name] for name in names}

    def broadcast(
        self, kernels: Sequence[torch.Tensor | None], like: Sequence[torch.Tensor], owners: Sequence[int]
    ) -> list[torch.Tensor]:
        """Return every kernel, from the rank that owns it."""
        return [kernel for kernel in kernels if kernel is not None]

    def smallest(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the smallest value among the ranks of each entry of some tensors."""
        return [tensor.detach() for tensor in tensors]


class GroupExchange(Exchange):
    """Exchange of one rank of a process group."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)

    def __deepcopy__(self, memo: Any) -> GroupExchange:
        """Return an exchange of the same group, which cannot be copied."""
        return GroupExchange(self.group)

    def __reduce__(self) -> tuple[Callable[[], Exchange], tuple[()]]:
        """Return what a pickle holds: the group of all processes that load it, as `DistributedDataParallel` has it."""
        return _whole_exchange, ()

    def raise_together(self, failure: Exception | None, device: torch.device, task: str = "projection") -> None:
        """Raise an error on every rank if one rank has failed at a task, which the error names."""
        failed = torch.tensor(0 if failure is None else self.rank + 1, device=device)
        distributed.all_reduce(failed, distributed.ReduceOp.MAX, group=self.group)
        if failure is not None:
            raise failure
        if int(failed):
            raise RuntimeError(f"the {task} failed on rank {int(failed) - 1}, which says why")

    def collect(self, values: dict[str, float], names: list[str], device: torch.device) -> dict[str, float]:
        """Return the values of all ranks, in the order of `names`; each value is known to one rank."""
        unique = list(dict.fromkeys(names))
        table = torch.tensor([values.get(name, 0.0) for name in unique], dtype=torch.float64, device=device)
        distributed.all_reduce(table, group=self.group)
        return dict(zip(unique, table.tolist(), strict=True))

    def broadcast(
        self, kernels: Sequence[torch.Tensor | None], like: Sequence[torch.Tensor], owners: Sequence[int]
    ) -> list[torch.Tensor]:
        """Return every kernel, from the rank that owns it, by one message for each owner, dtype and device."""
        found: dict[int, torch.Tensor] = {}
        parts: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
        for index, (one, owner) in enumerate(zip(like, owners, strict=True)):
            parts.setdefault((owner, one.dtype, one.device), []).append(index)
        for (owner, dtype, device), members in parts.items():
            sizes = [like[index].numel() for index in members]
            if owner == self.rank:
                flat = torch.cat([kernels[index].reshape(-1) for index in members])  # type: ignore[union-attr]
            else:
                flat = torch.empty(sum(sizes), dtype=dtype, device=device)
            source = distributed.get_global_rank(self.group or distributed.group.WORLD, owner)
            distributed.broadcast(flat.view(torch.uint8), source, group=self.group)
            for index, piece in zip(members, flat.split(sizes), strict=True):
                found[index] = piece.reshape(like[index].shape)
        return [found[index] for index in range(len(like))]

    def smallest(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the smallest value among the ranks of each entry of some tensors, by one message for each device."""
        found: dict[int, torch.Tensor] = {}
        parts: dict[torch.device, list[int]] = {}
        for index, tensor in enumerate(tensors):
            parts.setdefault(tensor.device, []).append(index)
        for members in parts.values():
            flat = torch.cat([tensors[index].detach().to(torch.float64).reshape(-1) for index in members])
            distributed.all_reduce(flat, distributed.ReduceOp.MIN, group=self.group)
            sizes = [tensors[index].numel() for index in members]
            for index, piece in zip(members, flat.split(sizes), strict=True):
                found[index] = piece.reshape(tensors[index].shape)
        return [found[index] for index in range(len(tensors))]


def make_exchange(model: nn.Module, group: Any, modules: Sequence[nn.Module]) -> Exchange:
    """Return the exchange of the ranks that hold the same weights: of `group`, or else of the group of the model."""
    if not _is_distributed():
        return Exchange()
    if group is None and isinstance(model, nn.parallel.DistributedDataParallel):
        group = model.process_group
    for module in modules:
        parameter = module._parameters.get("weight")
        if parameter is None or not is_sharded(parameter):
            continue
        mesh = parameter.device_mesh
        if mesh.size() != distributed.get_world_size():
            raise TypeError(
                f"a weight is sharded over {mesh.size()} of {distributed.get_world_size()} processes: wanted a device "
                f"mesh of all of them"
            )
        group = distributed.group.WORLD
    if group is None or distributed.get_world_size(group) == 1:
        return Exchange()
    return GroupExchange(group)


def _whole_exchange() -> Exchange:
    """Return the exchange of all processes."""
    return GroupExchange(None) if _is_distributed() and distributed.get_world_size() > 1 else Exchange()


def process_rank() -> int:
    """Return the rank of this process among all; 0 if there is one."""
    return distributed.get_rank() if _is_distributed() else 0


def is_sharded(weight: torch.Tensor) -> bool:
    """Return whether a tensor is a `DTensor`, which FSDP2 makes of parameters."""
    return hasattr(weight, "full_tensor") and hasattr(weight, "placements")


def write_shard(weight: torch.Tensor, kernel: torch.Tensor) -> None:
    """Write this rank's part of a kernel, which every rank has as a whole, to its weight."""
    from torch.distributed.tensor import distribute_tensor

    part = distribute_tensor(kernel, weight.device_mesh, weight.placements, src_data_rank=None)
    weight.to_local().copy_(part.to_local())


def refuse_flat_parameters(model: nn.Module) -> None:
    """Raise TypeError for a model whose kernels are not whole parameters."""
    if _is_distributed():
        from torch.distributed.fsdp import FullyShardedDataParallel

        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise TypeError(
                "model is wrapped by FullyShardedDataParallel, which flattens kernels into one parameter and shards "
                "them: wanted torch.distributed.fsdp.fully_shard (FSDP2), DistributedDataParallel or no wrapper"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise TypeError(
                f"the parameter {name!r} is sharded by DeepSpeed's ZeRO-3, so its kernel is not on this rank"
            )


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
