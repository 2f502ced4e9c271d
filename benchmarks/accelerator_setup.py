"""Say what the benchmark of an accelerator measures, how its time is shared, and what its processes tell each other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.command import Size
from benchmarks.comparison import Comparison, Effort
from benchmarks.shapes import DEPTHWISE_960, QUICK, RESNET_32, RESNET_50, Shape, square

__all__ = [
    "AMOUNTS",
    "CONFORMANCE",
    "DERIVATIVES",
    "LAYERS",
    "TRAINING",
    "WEIGHTS",
    "Amount",
    "Clock",
    "MethodRow",
    "Network",
    "Request",
    "StepRow",
]

CONFORMANCE, LAYERS, DERIVATIVES, TRAINING = "conformance", "layers", "derivatives", "training"

WEIGHTS: dict[str, dict[str, float]] = {
    "torch": {CONFORMANCE: 40, LAYERS: 90, DERIVATIVES: 40, TRAINING: 110},
    "cupy": {CONFORMANCE: 25, LAYERS: 60},
    "jax": {CONFORMANCE: 55, LAYERS: 80, DERIVATIVES: 30},
}
"""Sections of each library, in order, with their shares of the time: guesses in seconds of a run of eight minutes.

The three suites together have two minutes. What a section leaves, and what a library that is not there would have
had, goes to the later ones.
"""


@dataclass(frozen=True)
class Network:
    """Describe a network that is trained.

    Attributes
    ----------
    name : str
    widths : tuple of int
    blocks : int or tuple of int
        An int makes a `ResNet`, a tuple a `BottleneckResNet`.
    batch, extent : int
        Images of a step, and their pixels along an axis.
    paper_clip : bool
        Whether the paper's clip after every step is measured too.
    """

    name: str
    widths: tuple[int, ...]
    blocks: int | tuple[int, ...]
    batch: int
    extent: int
    paper_clip: bool


@dataclass(frozen=True)
class Amount:
    """Say what is measured, and how thoroughly.

    Attributes
    ----------
    minutes : float
        Time of the whole command.
    checks : int or None
        Checks of the conformance suite at most; None for as many as the time allows.
    shapes : sequence of Shape
        Layers.
    effort : Effort
        Repeats are fewer where the time runs out.
    product_seconds : float
        The matrices whose product tells the speed of the device are so large that a product takes this long.
    iterations : int
        Iterations of "dykstra" at most.
    networks : sequence of Network
    settle, turns : int
        Steps of each method that are not measured, and steps that are, at most.
    """

    minutes: float
    checks: int | None
    shapes: Sequence[Shape]
    effort: Effort
    product_seconds: float
    iterations: int
    networks: Sequence[Network]
    settle: int
    turns: int


AMOUNTS = {
    Size.FULL: Amount(
        minutes=8.0,
        checks=None,
        shapes=[
            *(shape for shape in RESNET_50 if shape.taps == (3, 3) and shape.stride == (1, 1)),
            *DEPTHWISE_960,
        ],
        effort=Effort(repeats=5, full_seconds=1.0, sample_seconds=0.3),
        product_seconds=0.005,
        iterations=20,
        networks=[
            Network("ResNet-32", (16, 32, 64), 5, batch=128, extent=32, paper_clip=True),
            Network("ResNet-50", (64, 128, 256, 512), (3, 4, 6, 3), batch=32, extent=224, paper_clip=False),
        ],
        settle=3,
        turns=20,
    ),
    Size.QUICK: Amount(
        minutes=2.0,
        checks=None,
        shapes=[RESNET_32[1], RESNET_32[5], *(shape for shape in QUICK if shape.groups == 96)],
        effort=Effort(repeats=3, full_seconds=0.3, sample_seconds=0.1),
        product_seconds=0.002,
        iterations=5,
        networks=[
            Network("ResNet-32", (16, 32, 64), 5, batch=16, extent=32, paper_clip=True),
            Network("ResNet-50", (64, 128, 256, 512), (3, 4, 6, 3), batch=2, extent=64, paper_clip=False),
        ],
        settle=1,
        turns=5,
    ),
    Size.TINY: Amount(
        minutes=2.0,
        checks=6,
        shapes=[square("tiny", 3, 4, 4, 8), square("tiny", 3, 6, 6, 8, groups=6)],
        effort=Effort(repeats=1, full_seconds=0.02, sample_seconds=0.005),
        product_seconds=0.0,
        iterations=2,
        networks=[
            Network("ResNet-32", (4, 8), 1, batch=2, extent=8, paper_clip=True),
            Network("ResNet-50", (4, 8), (1, 1), batch=2, extent=16, paper_clip=False),
        ],
        settle=1,
        turns=2,
    ),
}


@dataclass(frozen=True)
class Request:
    """Ask a process to run some sections of one library.

    Attributes
    ----------
    library : str
    device : str or None
        None for the first accelerator.
    size : str
        The value of a `Size`.
    sections : dict of str to float
        Names and weights, in order.
    until : float
        When all of them should be over, as `time.time` counts.
    """

    library: str
    device: str | None
    size: str
    sections: dict[str, float]
    until: float


@dataclass
class Clock:
    """Tell how much of the time of a section is left, and collect what it has no time for.

    Attributes
    ----------
    seconds : float
    left_out : list of str
        Measurements that the section had no time for.
    failures : list of str
        Measurements that raised an exception, with its text.
    """

    seconds: float
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _began: float = field(default_factory=time.perf_counter)

    def spent(self) -> float:
        """Return the seconds since the section began."""
        return time.perf_counter() - self._began

    def left(self) -> float:
        """Return the seconds that are left, which may be negative."""
        return self.seconds - self.spent()

    def part(self, count: int) -> Clock:
        """Return the clock of the first of `count` equal parts of the time that is left; its lists are these."""
        return Clock(self.left() / count, self.left_out, self.failures)

    def begins(self, name: str, reserve: float = 0.0) -> bool:
        """Tell whether more than `reserve` seconds are left for the measurement called `name`; note it if not."""
        if self.left() > reserve:
            return True
        self.left_out.append(name)
        return False

    def fail(self, name: str, error: Exception) -> None:
        """Note that a measurement has raised an exception."""
        self.failures.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}")

    def repeats(self, wanted: int, seconds: float) -> int:
        """Return how often something that takes so many seconds can be repeated: once at least."""
        return max(1, min(wanted, int(self.left() / max(seconds, 1e-6))))


@dataclass(frozen=True, kw_only=True)
class MethodRow(Comparison):
    """Record one method on one layer in one library: an entry of ``methods`` in the JSON.

    Attributes
    ----------
    section : str
    method, baseline : str
    first_seconds : float
        Time of the first call, with its compilation.
    compile_seconds, baseline_compile_seconds : float or None
        Time of tracing and compilation alone; None where the library compiles nothing by itself.
    operations : float or None
        Real operations of the method, simply counted: those of the decompositions for singular values, those of the
        Gram matrices in complex64 for norms. None for other methods, for closed forms, and for norms on processors,
        whose decompositions are in complex128.
    peak_share : float or None
        Operations a second over those of a matrix product in the same library on the same device, in the dtype of the
        decompositions and the library's default precision.
    error_eps : float or None
        Largest difference from NumPy's result in float64, in units of float32's eps times the largest singular value.
    """

    section: str
    method: str
    baseline: str
    first_seconds: float
    compile_seconds: float | None
    baseline_compile_seconds: float | None
    operations: float | None
    peak_share: float | None
    error_eps: float | None


@dataclass(frozen=True)
class StepRow:
    """Record training steps under one method: an entry of ``steps`` in the JSON.

    Attributes
    ----------
    library, network, method : str
    bound : float
    first_seconds : float
        Time of the first step.
    seconds : float
        Median of the measured steps.
    overhead : float
        Median of the steps' times over those of the plain step of the same turn, less 1.
    quartiles : tuple of float
    norm : float or None
        The largest norm after the last step over the bound, certified for each layer's own padding and every input
        size; None where the time did not suffice.
    times, plain_times : list of float
        Times of the steps, and of the plain steps of the same turns.
    """

    library: str
    network: str
    method: str
    bound: float
    first_seconds: float
    seconds: float
    overhead: float
    quartiles: tuple[float, float]
    norm: float | None
    times: list[float]
    plain_times: list[float]
