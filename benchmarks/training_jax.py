"""``python -m benchmarks training-jax``: measure what a bound adds to a compiled step and to its compilation."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np

import convsv_core as convsv
from benchmarks.command import Size, json_option, progress, size_options, write_json
from benchmarks.libraries import open_library
from benchmarks.machine import describe, load_average, show_machine
from benchmarks.tables import duration, figures, integers, show_table, words
from benchmarks.timing import in_turns

__all__ = ["BOUND", "COLUMNS", "PLAIN", "SETUPS", "Row", "Setup", "Timed", "make_row", "training_jax"]

PLAIN = "plain step"

BOUND = 1.0
"""Bound of the norms in the paper. The random weights exceed it, but for the first layer's."""

COLUMNS = (
    words("method"),
    figures("compile", lambda row: duration(row.compile_seconds)),
    figures("added", lambda row: duration(row.compile_added)),
    figures("first step", lambda row: duration(row.first_seconds)),
    integers("steps"),
    figures("step", lambda row: duration(row.seconds)),
    figures("added", lambda row: f"{row.overhead:+.1%}"),
    figures("from", lambda row: f"{row.quartiles[0]:+.1%}"),
    figures("to", lambda row: f"{row.quartiles[1]:+.1%}"),
    figures("norm", lambda row: f"{row.norm:.3f}"),
    figures("circular", lambda row: f"{row.circular_norm:.3f}"),
)
EXPLANATION = (
    "compile: tracing, lowering and compilation, with the seconds that a method adds; first step: the first call of "
    "the compiled step; added: to the time of the plain step of the same turn, median and quartiles; norm: the largest "
    "after the last step over the bound, certified for every input size; circular: norm of the paper's operator."
)


@dataclass(frozen=True)
class Setup:
    """Say how much is trained and measured.

    Attributes
    ----------
    channels : tuple of int
        Channels of the image and of each convolution.
    batch, extent : int
        Images of a step, and their pixels along an axis.
    turns : int
        Measured steps.
    limit : float
        A method is measured no more when its measured steps have taken so many seconds.
    """

    channels: tuple[int, ...]
    batch: int
    extent: int
    turns: int
    limit: float


SETUPS = {
    Size.FULL: Setup((3, 32, 64, 64, 128), 64, 32, turns=20, limit=60.0),
    Size.QUICK: Setup((3, 32, 64, 64, 128), 64, 32, turns=5, limit=15.0),
    Size.TINY: Setup((3, 4, 8), 2, 8, turns=3, limit=60.0),
}


@dataclass(frozen=True)
class Row:
    """Hold the figures of one method.

    Attributes
    ----------
    method : str
    compile_seconds, compile_added : float
        Seconds of tracing, lowering and compilation, and how many more they are than for the plain step.
    first_seconds : float
    steps : int
    seconds : float
        Median of the measured steps.
    overhead : float
        Median of the steps' times over those of the plain step of the same turn, less 1.
    quartiles : tuple of float
    norm, circular_norm : float
        The largest of all layers over the bound.
    times : list of float
    """

    method: str
    compile_seconds: float
    compile_added: float
    first_seconds: float
    steps: int
    seconds: float
    overhead: float
    quartiles: tuple[float, float]
    norm: float
    circular_norm: float
    times: list[float]


class Timed(Protocol):
    """Hold the seconds of a method's steps, and of what came before them."""

    compile_seconds: float
    first_seconds: float
    times: list[float]


class Training:
    """Hold one method's compiled step and its own parameters, and take the times of its steps."""

    def __init__(self, transformation: Any, params: Any, loss: Callable[[Any], Any]) -> None:
        import jax
        import optax

        optimizer = optax.chain(optax.sgd(0.05, 0.9), *([] if transformation is None else [transformation]))

        def step(params: Any, state: Any) -> Any:
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        self.carried = params, optimizer.init(params)
        started = time.perf_counter()
        self._step = jax.jit(step).lower(*self.carried).compile()
        self.compile_seconds = time.perf_counter() - started
        self.first_seconds = self._timed()
        self.times: list[float] = []

    def step(self) -> None:
        """Take one step and its time."""
        self.times.append(self._timed())

    def _timed(self) -> float:
        import jax

        started = time.perf_counter()
        self.carried = jax.block_until_ready(self._step(*self.carried))
        return time.perf_counter() - started


@click.command("training-jax")
@size_options("A few steps of each method, in about a minute.")
@json_option()
def training_jax(size: Size, json_path: Path | None) -> None:
    """Time compiled training steps of a small network with JAX, with and without a bound on the norms.

    Every method trains its own copy of one network of four convolutions, a step of each in turn.
    """
    if find_spec("jax") is None or find_spec("optax") is None:
        raise click.ClickException("the benchmark trains with optax: pip install 'convsv[optax]'")
    setup = SETUPS[size]
    load_before = load_average()
    with progress() as tell:
        rows = _measure(setup, tell)
    machine = describe([open_library("jax")], load_before)
    show_machine(machine)
    show_table(rows, COLUMNS, EXPLANATION)
    arguments = {"size": size.value, "quick": size is Size.QUICK} | asdict(setup)
    write_json(json_path, "training-jax", arguments, machine=machine, rows=rows)


def _measure(setup: Setup, tell: Callable[[str], None]) -> list[Row]:
    """Compile every method, and take the times of their steps in turns, every other turn backwards."""
    import jax
    import jax.numpy as jnp
    import optax
    from convsv_adapters.optax import operator_norm_bound, penalty

    rng = np.random.default_rng(0)
    pairs = list(zip(setup.channels, setup.channels[1:], strict=False))
    params = {
        f"conv{place}": jnp.asarray(rng.normal(size=(3, 3, a, b)) * math.sqrt(2 / (9 * a)), jnp.float32)
        for place, (a, b) in enumerate(pairs)
    }
    names = tuple(params)
    params["dense"] = jnp.asarray(rng.normal(size=(setup.channels[-1], 10)) * 0.1, jnp.float32)
    extents = (setup.extent, setup.extent)
    images = jnp.asarray(rng.normal(size=(setup.batch, *extents, setup.channels[0])), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, setup.batch))
    layers = {name: (convsv.Conv("HWIO", padding_mode="zeros"), extents) for name in names}

    def loss(params: Any) -> Any:
        hidden = images
        for name in names:
            layout = ("NHWC", "HWIO", "NHWC")
            hidden = jax.nn.relu(
                jax.lax.conv_general_dilated(hidden, params[name], (1, 1), "SAME", dimension_numbers=layout)
            )
        scores = hidden.mean((1, 2)) @ params["dense"]
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    def penalised(params: Any) -> Any:
        return loss(params) + 0.01 * penalty(params, layers, "norm_hinge", bound=BOUND)

    def bound(**options: Any) -> Any:
        return operator_norm_bound(BOUND, layers, **options)

    methods: dict[str, tuple[Any, Callable[[Any], Any]]] = {
        PLAIN: (None, loss),
        "rescale, circular": (bound(circular=True), loss),
        "rescale, every size": (bound(), loss),
        "norm_hinge": (None, penalised),
        "dykstra, circular": (bound(method="dykstra", circular=True), loss),
        "dykstra, every size": (bound(method="dykstra"), loss),
    }
    # The first compilation of a process loads and traces what all share, which the plain step should not pay for.
    Training(None, params, loss)
    trained = {}
    for name, (transformation, function) in methods.items():
        tell(f"compiling: {name}")
        trained[name] = Training(transformation, params, function)
    for turn in range(setup.turns):
        tell(f"turn {turn + 1} of {setup.turns}")
        for name in in_turns(trained, turn):
            if sum(trained[name].times) < setup.limit:
                trained[name].step()
    plain, rows = trained[PLAIN], []
    for name, one in trained.items():
        kernels = [np.asarray(one.carried[0][layer]) for layer in names]
        rows.append(make_row(name, one, plain, kernels, extents))
    return rows


def make_row(
    method: str, found: Timed, plain: Timed, kernels: Sequence[np.ndarray[Any, Any]], extents: tuple[int, int]
) -> Row:
    """Return the figures of one method beside the plain steps of the same turns.

    Parameters
    ----------
    method : str
    found, plain : Timed
        The method, and the plain steps, which began in the same turn.
    kernels : sequence of numpy.ndarray
        The kernels of all layers after the last step, in the layout HWIO.
    extents : tuple of int
        Extents of the input of each layer.
    """
    added = np.asarray(found.times) / plain.times[: len(found.times)] - 1
    low, high = np.percentile(added, [25, 75])
    zeros, circular = convsv.Conv("HWIO", padding_mode="zeros"), convsv.Conv("HWIO")
    return Row(
        method=method,
        compile_seconds=found.compile_seconds,
        compile_added=found.compile_seconds - plain.compile_seconds,
        first_seconds=found.first_seconds,
        steps=len(found.times),
        seconds=statistics.median(found.times),
        overhead=float(np.median(added)),
        quartiles=(float(low), float(high)),
        norm=max(float(convsv.norm_bounds(kernel, zeros).upper) for kernel in kernels) / BOUND,
        circular_norm=max(float(convsv.operator_norm(kernel, extents, circular)) for kernel in kernels) / BOUND,
        times=found.times,
    )
