"""The paper's future work, a GAN: its critic's true Lipschitz constant, by the step hook and by `spectral_norm`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from convsv_core import lipschitz
from examples.paper.data import Images, load
from examples.paper.gan_training import Gan, GanRecipe, train_gan
from examples.paper.results import experiment_options, mean_and_deviation, write

__all__ = ["Measurement", "Run", "draw", "energy_distance", "gan", "gradient_norms", "measure", "wasserstein"]

KINDS: dict[str, dict[str, Any]] = {
    "spectral_norm": {"spectral_norm": True},
    "bound 1, rescaled": {"network_bound": 1.0},
    "bound 1, nearest": {"network_bound": 1.0, "method": "dykstra", "max_iterations": 1},
}
"""How the critic is bounded, as fields of `GanRecipe`.

One iteration of Dykstra's algorithm after a step took a third of the time of the default ten. The dual variables stay
from step to step.
"""

EVALUATED = 450
"""Images of each sort in a measurement: all held-out digits. The optimal matching takes time with the cube."""

WATCHES = 12
"""Measurements of a run after the first one. A guess."""

SHOWN = 25
"""Images of each kind in the figure: a square number. A guess."""


@dataclass(frozen=True)
class Measurement:
    """The networks after some steps, on held-out real images and as many generated ones.

    Attributes
    ----------
    step : int
        The critic's steps so far.
    upper, lower : float
        The certified bounds of the critic's Lipschitz constant, as from `convsv_core.lipschitz`.
    real, generated, between : float
        The largest norm of the critic's gradient at real images, at generated ones, and at points between both.
    difference : float
        The critic's mean at real images less its mean at generated ones. It is at most the critic's Lipschitz constant
        times the `wasserstein` distance.
    wasserstein, energy : float
        The Wasserstein-1 distance of the two sets of images, and an unbiased estimate of the energy distance of their
        distributions, by Euclidean distances of pixels.
    """

    step: int
    upper: float
    lower: float
    real: float
    generated: float
    between: float
    difference: float
    wasserstein: float
    energy: float

    @property
    def attained(self) -> float:
        """The largest norm of a gradient that was found. The Lipschitz constant is at least that."""
        return max(self.lower, self.real, self.generated, self.between)

    @property
    def share(self) -> float:
        """The critic's difference over the distance that it estimates: at most 1 for a 1-Lipschitz critic."""
        return self.difference / self.wasserstein


@dataclass(frozen=True)
class Run:
    """One training run: an entry of ``runs`` in the JSON. `seconds` is the processor time of its steps."""

    kind: str
    seed: int
    seconds: float
    measurements: list[Measurement]


@click.command()
@experiment_options
def gan(quick: bool, cifar10: Path | None, seeds: int, epochs: int | None, output: Path, threads: int) -> None:
    """Train a GAN whose critic is bounded by the hook or by spectral_norm: the critic's constant, and the images."""
    images = load(cifar10, 64 if quick else None)
    recipe = GanRecipe(width=2, batch=16, epochs=1) if quick else GanRecipe()
    recipe = replace(recipe, epochs=epochs or recipe.epochs)
    runs, samples = [], {}
    for (kind, bound), seed in itertools.product(KINDS.items(), range(seeds)):
        run, trained = _run(images, replace(recipe, seed=seed, **bound), kind, 1 if quick else WATCHES)
        last = run.measurements[-1]
        click.echo(
            f"{kind}, seed {seed}: constant at most {last.upper:.3g}, at least {last.attained:.3g}, "
            f"energy distance {last.energy:.3g}, {run.seconds:.1f} s",
            err=True,
        )
        runs.append(run)
        samples.setdefault(kind, _samples(trained, SHOWN))
    reference = _reference(images)
    _show(runs, reference)
    arguments = {"cifar10": cifar10, "quick": quick} | asdict(recipe) | {"kinds": KINDS}
    content = {"reference": reference, "runs": [asdict(run) for run in runs]}
    write("gan", output, draw(runs, {"held out": images.test_images[:SHOWN]} | samples), arguments, content, "scipy")


def _run(images: Images, recipe: GanRecipe, kind: str, watches: int) -> tuple[Run, Gan]:
    measurements: list[Measurement] = []
    trained = train_gan(images, recipe, lambda now: measurements.append(measure(now, images)), watches)
    return Run(kind, recipe.seed, trained.seconds, measurements), trained


def _samples(trained: Gan, count: int) -> Tensor:
    """Return generated images, of the same latents in every call."""
    with torch.no_grad():
        return trained.generator.sample(count, torch.Generator().manual_seed(0))


def _reference(images: Images) -> dict[str, float]:
    """Return the distances of held-out images from as many that the networks are trained on."""
    real = images.test_images[:EVALUATED]
    some = images.train_images[: len(real)]
    return {"wasserstein": wasserstein(real, some), "energy": energy_distance(real, some)}


def measure(trained: Gan, images: Images) -> Measurement:
    """Measure both networks, and leave them as they are, in training mode.

    Distances and gradients are computed in float64, with a copy of the critic.
    """
    critic = trained.critic.eval()
    found = lipschitz(critic, images.test_images[:1])
    double = copy.deepcopy(critic).double()
    critic.train()
    real = images.test_images[:EVALUATED].double()
    generated = _samples(trained, len(real)).double()
    places = torch.rand(len(real), 1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        difference = float(double(real).mean() - double(generated).mean())
    assert found.lower is not None
    return Measurement(
        trained.steps,
        found.upper,
        found.lower,
        *(
            float(gradient_norms(double, points).max())
            for points in (real, generated, torch.lerp(real, generated, places))
        ),
        difference,
        wasserstein(real, generated),
        energy_distance(real, generated),
    )


def gradient_norms(critic: nn.Module, points: Tensor) -> Tensor:
    """Return the Euclidean norm of the critic's gradient at each point: the norm of its Jacobian."""
    points = points.clone().requires_grad_()
    (gradients,) = torch.autograd.grad(critic(points).sum(), points)
    return gradients.flatten(1).norm(dim=1)


def wasserstein(first: Tensor, second: Tensor) -> float:
    """Return the Wasserstein-1 distance of two sets of equally many images: the mean distance in the best matching."""
    distances = _distances(first, second).numpy()
    return float(distances[linear_sum_assignment(distances)].mean())


def energy_distance(first: Tensor, second: Tensor) -> float:
    """Return an unbiased estimate of the energy distance of the distributions of two sets of images.

    The energy distance is ``2 E|X - Y| - E|X - X'| - E|Y - Y'|``. It is 0 for equal distributions alone; the estimate
    can be a little below 0.

    Source: Székely and Rizzo, *Energy statistics: A class of statistics based on distances*, 2013.
    """
    within = (float(_distances(some, some).sum()) / (len(some) * (len(some) - 1)) for some in (first, second))
    return 2 * float(_distances(first, second).mean()) - sum(within)


def _distances(first: Tensor, second: Tensor) -> Tensor:
    """Return the Euclidean distances of all pairs in float64, by differences: exactly 0 for equal images."""
    flat = (some.double().flatten(1) for some in (first, second))
    return torch.cdist(*flat, compute_mode="donot_use_mm_for_euclid_dist")


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {kind: [run for run in runs if run.kind == kind] for kind in dict.fromkeys(run.kind for run in runs)}


COLUMNS: dict[str, Callable[[Run], float]] = {
    "at most": lambda run: run.measurements[-1].upper,
    "at least": lambda run: run.measurements[-1].attained,
    "real": lambda run: run.measurements[-1].real,
    "generated": lambda run: run.measurements[-1].generated,
    "between": lambda run: run.measurements[-1].between,
    "most, at least": lambda run: max(one.attained for one in run.measurements),
    "largest share": lambda run: max(one.share for one in run.measurements),
    "energy": lambda run: run.measurements[-1].energy,
    "wasserstein": lambda run: run.measurements[-1].wasserstein,
    "seconds": lambda run: run.seconds,
}
"""The columns of the table. Two of them, with the largest figure of the training, are not about its end."""


def _show(runs: Sequence[Run], reference: Mapping[str, float]) -> None:
    """Print means and standard deviations over the seeds."""
    click.echo(f"{'':17} " + " ".join(f"{name:>16}" for name in COLUMNS))
    for kind, some in _groups(runs).items():
        cells = (mean_and_deviation([of(run) for run in some]) for of in COLUMNS.values())
        click.echo(f"{kind:17} " + " ".join(f"{mean:7.3f} +- {deviation:5.3f}" for mean, deviation in cells))
    click.echo("training images: " + ", ".join(f"{name} {value:.4f}" for name, value in reference.items()))


def draw(runs: Sequence[Run], samples: Mapping[str, Tensor]) -> Figure:
    """Draw constants, differences and distances over the steps, and images of each kind below."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(5, 4), hspace=0.04)
    constants, shares, distances = above.subplots(1, 3)
    colors = {kind: f"C{number}" for number, kind in enumerate(_groups(runs))}
    for kind, some in _groups(runs).items():
        color = colors[kind]
        _line(constants, some, lambda one: one.upper, color=color, label=kind)
        _line(constants, some, lambda one: one.attained, color=color, linestyle="--")
        _line(shares, some, lambda one: one.share, color=color)
        _line(distances, some, lambda one: one.energy, color=color)
    constants.set(title="the critic's Lipschitz constant", yscale="log")
    constants.plot([], [], color="0.4", label="certified: at most")
    constants.plot([], [], color="0.4", linestyle="--", label="attained: at least")
    shares.set(title="the critic's difference, over the distance")
    distances.set(title="energy distance of the images", yscale="log")
    for axes in (constants, shares):
        axes.axhline(1, color="black", linewidth=1, linestyle=":")
    for axes in (constants, shares, distances):
        axes.title.set_fontsize("medium")
        axes.set_xlabel("steps of the critic")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    above.legend(loc="outside lower center", ncols=len(colors) + 2, fontsize="small", frameon=False)
    for axes, (name, images) in zip(below.subplots(1, len(samples)), samples.items(), strict=True):
        axes.imshow(_mosaic(images), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(name, fontsize="medium", color=colors.get(name, "black"))
        axes.axis("off")
    return figure


def _line(axes: Axes, runs: Sequence[Run], of: Callable[[Measurement], float], **style: Any) -> None:
    """Draw the mean over the seeds as a line, and the range as a band."""
    steps = [one.step for one in runs[0].measurements]
    values = np.asarray([[of(one) for one in run.measurements] for run in runs])
    axes.plot(steps, values.mean(axis=0), **style)
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)


def _mosaic(images: Tensor) -> np.ndarray:
    """Return images (n, channels, side, side) in a square, with a gap between them: (height, width, channels)."""
    across = int(len(images) ** 0.5)
    tiles = nn.functional.pad(images[: across * across], (0, 1, 0, 1), value=0.0).numpy()
    channels, height, width = tiles.shape[1:]
    rows = tiles.reshape(across, across, channels, height, width).transpose(0, 3, 1, 4, 2)
    return rows.reshape(across * height, across * width, channels)
