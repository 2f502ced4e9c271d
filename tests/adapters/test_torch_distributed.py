"""Tests of a projection, and of steps of `ConvMuon`, that processes share."""

from __future__ import annotations

import copy
import datetime
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convsv_adapters.torch import ConvMuon, SpectrumMonitor, conv_layers, project_after_step
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import convsv_core as convsv

RANKS = 2
SLACK = 1 + 1e-6

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="PyTorch is built without gloo"
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1, dtype=torch.float32),
        nn.Flatten(),
        nn.Linear(100, 2),
    )
    with torch.no_grad():
        for layer in conv_layers(model):
            layer.weight.mul_(5)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 10, 10, generator=generator)).square().mean().backward()
        optimizer.step()


def run_on_ranks(function: Callable[[int, Path], None], ranks: int = RANKS) -> list[Any]:
    """Return the result of each rank, from processes that run `function`."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (function, Path(folder), ranks), nprocs=ranks)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, function: Callable[[int, Path], None], folder: Path, ranks: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = distributed.FileStore(str(folder / "store"), ranks)
    timeout = datetime.timedelta(seconds=120)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    torch.save(function(rank, folder), folder / f"{rank}.pt")
    distributed.barrier()
    os._exit(0)  # a process that ends in the usual way is aborted at times by a thread of gloo's that is still there


def _data_parallel(rank: int, folder: Path) -> Any:
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    projection = project_after_step(optimizer, model, 1.0)
    train(model, optimizer, 20, seed=rank)
    return model.module.state_dict(), projection.norms, projection._owners


def test_ranks_share_the_work_and_stay_bit_identical() -> None:
    (first, norms, owners), (second, other_norms, other_owners) = run_on_ranks(_data_parallel)
    assert set(owners) == set(range(RANKS))
    assert owners == other_owners
    assert norms == other_norms
    assert set(norms) == {"0", "2", "4"}
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = network()
    model.load_state_dict(first)
    for layer in conv_layers(model):
        assert float(convsv.norm_bounds(layer.weight.detach(), layer.conv).upper) <= SLACK


def _fails_on_one_rank(rank: int, folder: Path) -> Any:
    model = DistributedDataParallel(network())
    projection = project_after_step(torch.optim.SGD(model.parameters()), model, 1.0)
    owner = projection._owners[0]
    if rank == owner:
        with torch.no_grad():
            model.module[0].weight[0] = float("nan")
    try:
        projection.project()
    except (RuntimeError, ValueError) as error:
        return owner, f"{type(error).__name__}: {error}"
    return owner, "no error"


@pytest.mark.thorough
def test_a_failure_on_one_rank_is_raised_on_all() -> None:
    found = run_on_ranks(_fails_on_one_rank)
    owner = found[0][0]
    assert found[owner][1].startswith("ValueError: kernel holds NaN")
    assert found[1 - owner][1] == f"RuntimeError: the projection failed on rank {owner}, which says why"


def _sharded(rank: int, folder: Path) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    projection = project_after_step(optimizer, model, 1.0, method="rescale")
    train(model, optimizer, 3, seed=rank)
    numbers = SpectrumMonitor(model).measure()
    return {name: value.full_tensor() for name, value in model.state_dict().items()}, projection.norms, numbers


def test_sharded_tensors_are_projected_and_measured_whole() -> None:
    (first, norms, numbers), (second, other_norms, other_numbers) = run_on_ranks(_sharded)
    assert norms == other_norms
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = network()
    model.load_state_dict(first)
    for layer in conv_layers(model):
        assert float(convsv.norm_bounds(layer.weight.detach(), layer.conv).upper) <= SLACK
    assert numbers == SpectrumMonitor(model).measure()
    assert other_numbers == {}


def _flat(rank: int, folder: Path) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    try:
        project_after_step(optimizer, model, 1.0)
    except TypeError as error:
        return str(error)
    return "no error"


@pytest.mark.thorough
def test_flat_parameters_are_refused() -> None:
    for found in run_on_ranks(_flat):
        assert "FullyShardedDataParallel" in found
        assert "fully_shard" in found


def normalised_network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(400, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 2),
    )
    with torch.no_grad():
        for layer in conv_layers(model, linear=True):
            layer.module.weight.mul_(5)
    return model


def _normalised(model: nn.Module, rank: int) -> Any:
    """Train with every layer and normalisation within a bound, and return what each rank has afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options: dict[str, Any] = {"linear": True, "batch_norm": "fold", "example_input": torch.zeros(1, 3, 10, 10)}
    projection = project_after_step(optimizer, model, 1.0, **options)
    train(model, optimizer, 5, seed=rank)
    whole = {
        name.removeprefix("module."): value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }
    return whole, projection.norms, projection._owners, projection._part_owners


def _normalised_data_parallel(rank: int, folder: Path) -> Any:
    return _normalised(DistributedDataParallel(normalised_network()), rank)


def _normalised_sharded(rank: int, folder: Path) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = normalised_network()
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    return _normalised(model, rank)


@pytest.mark.parametrize(
    "function", [_normalised_data_parallel, pytest.param(_normalised_sharded, marks=pytest.mark.thorough)]
)
def test_normalisations_are_bounded_with_the_running_variances_of_every_rank(
    function: Callable[[int, Path], Any],
) -> None:
    (first, norms, owners, part_owners), (second, other_norms, *_) = run_on_ranks(function)
    assert set(owners) == set(part_owners) == set(range(RANKS))
    assert norms == other_norms
    assert set(norms) == {"0", "1", "4", "6", "9"}
    assert not torch.equal(first["2.running_var"], second["2.running_var"])
    for name in first:
        assert "running" in name or torch.equal(first[name], second[name])
    for state in (first, second):
        model = normalised_network()
        model.load_state_dict(state)
        for layer in conv_layers(model, torch.zeros(1, 3, 10, 10), linear=True, batch_norm="fold"):
            found = convsv.norm_bounds(layer.kernel.detach(), layer.conv)
            assert float(found.lower) <= norms[layer.name] <= SLACK
            assert float(found.upper) <= SLACK


def _muon(rank: int, folder: Path) -> Any:
    model = DistributedDataParallel(network())
    optimizer = ConvMuon(model, lr=0.05)
    train(model, optimizer, 4, seed=rank)
    own = sum("matrices" in state for state in optimizer.state.values())
    return model.module.state_dict(), own


def test_ranks_share_the_layers_of_muon_and_stay_bit_identical() -> None:
    (first, own), (second, other) = run_on_ranks(_muon)
    assert own >= 1
    assert other >= 1
    assert own + other == 3
    assert all(torch.equal(first[name], second[name]) for name in first)


def _sharded_muon(rank: int, folder: Path) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    train(model, ConvMuon(model, lr=0.05), 3, seed=0)
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


@pytest.mark.thorough
def test_muon_steps_sharded_tensors_as_whole_ones() -> None:
    first, second = run_on_ranks(_sharded_muon)
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = network()
    train(model, ConvMuon(model, lr=0.05), 3, seed=0)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-3)


def alike_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))


def _train_alike(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 4, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()


def _muon_of_alike_layers(rank: int, folder: Path) -> Any:
    """Return weights before and after steps of an optimizer's copies, and how many layers have matrices in the end."""
    model = DistributedDataParallel(alike_layers())
    optimizer = ConvMuon(model, lr=0.05)
    _train_alike(model, optimizer, 3)
    before = copy.deepcopy(model.module.state_dict())
    copy.deepcopy(optimizer).step()
    _, loaded = pickle.loads(pickle.dumps((model.module, optimizer)))
    loaded.step()
    after = copy.deepcopy(model.module.state_dict())
    saved = [optimizer.state_dict()]
    distributed.broadcast_object_list(saved)
    optimizer.load_state_dict(saved[0])
    _train_alike(model, optimizer, 2)
    return before, after, sum("matrices" in state for state in optimizer.state.values())


@pytest.mark.thorough
def test_three_ranks_share_layers_of_one_shape_as_one_process_steps_them() -> None:
    found = run_on_ranks(_muon_of_alike_layers, ranks=3)
    model = alike_layers()
    _train_alike(model, ConvMuon(model, lr=0.05), 3)
    assert sum(own for *_, own in found) == 3
    for before, after, _ in found:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(before[name], value, rtol=0, atol=1e-3)
            assert torch.equal(before[name], after[name])
