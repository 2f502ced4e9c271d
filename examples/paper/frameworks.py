"""The experiment on frameworks: each trains from the same weights over the same batches, in float32."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from matplotlib.figure import Figure

from convsv_core import Conv, operator_norm
from examples.paper.data import load
from examples.paper.results import experiment_options, write
from examples.paper.training import Recipe, make_model

__all__ = ["Layer", "Outcome", "Problem", "draw", "frameworks"]

FRAMEWORKS = {"torch": "torch_run", "jax": "jax_run", "keras": "keras_run"}
"""Modules of this package with a function ``run(problem)``, by the name of the framework's distribution."""

BOUND = 1.0
"""The bound of the operator norms: the one of a layer that enlarges nothing."""

MARGIN = 1e-3
"""Relative distance that projected norms may keep from the bound: the tolerance of the core's certificates."""

LEARNING_RATE = 0.01
"""At five times this rate, an eps in the initial weights changes the norms by 1 to 4 % after 63 steps: measured."""

FACTOR = 10
"""Frameworks may differ by this many times the difference of PyTorch from PyTorch after a disturbance. A guess."""

LARGEST_TOLERANCE = 0.05
"""The largest relative difference to allow: a comparison that allows more says nothing, and is an error. A guess."""


@dataclass(frozen=True)
class Layer:
    """A convolution of the network, with its name in PyTorch and the extents of its input."""

    name: str
    stride: int
    extents: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Problem:
    """A training run as NumPy arrays, which every framework can take.

    Attributes
    ----------
    images : numpy.ndarray of float32, shape (n, channels, height, width)
    labels : numpy.ndarray of int64, shape (n,)
    batches : list of numpy.ndarray of int64
        The indices of each step's images.
    weights : dict of str to numpy.ndarray of float32
        The initial weights, with PyTorch's names and layout: OIHW.
    layers : list of Layer
    recipe : Recipe
        Learning rate and bound. The momentum is `MOMENTUM`; there is no schedule and no weight decay.
    """

    images: np.ndarray
    labels: np.ndarray
    batches: list[np.ndarray]
    weights: dict[str, np.ndarray]
    layers: list[Layer]
    recipe: Recipe


@dataclass(frozen=True)
class Outcome:
    """The run of one framework: an entry of ``runs`` in the JSON.

    Attributes
    ----------
    norms : dict of str to float
        The operator norm of each layer's circular convolution after training, computed with NumPy.
    seconds : float
        Wall-clock time, compilation included.
    """

    framework: str
    bound: float | None
    norms: dict[str, float]
    seconds: float


@click.command()
@experiment_options
@click.option(
    "--framework", "frameworks", type=click.Choice(list(FRAMEWORKS)), multiple=True, default=tuple(FRAMEWORKS)
)
def frameworks(
    quick: bool,
    cifar10: Path | None,
    seeds: int,
    epochs: int | None,
    output: Path,
    threads: int,
    frameworks: Sequence[str],
) -> None:
    """Train one network in several frameworks, with a bound of 1 and without, and compare the norms.

    Each framework is compared with PyTorch. Keras runs on the backend that KERAS_BACKEND names.
    """
    recipe = Recipe(widths=(4, 8), batch=16) if quick else Recipe()
    recipe = replace(recipe, batch_norm=False, learning_rate=LEARNING_RATE, epochs=epochs or (1 if quick else 3))
    outcomes: list[Outcome] = []
    rows: list[dict[str, Any]] = []
    for seed, bound in ((seed, bound) for seed in range(seeds) for bound in (None, BOUND)):
        problem = _problem(load(cifar10, 128 if quick else None), replace(recipe, seed=seed, bound=bound))
        reference = _outcome("torch", problem)
        others = [_outcome(name, problem) for name in frameworks if name != "torch"]
        disturbed = [_outcome("torch", other) for other in _disturbances(problem)]
        tolerance = FACTOR * max(_difference(reference, other) for other in disturbed)
        outcomes += [reference, *others]
        for other in others:
            difference = _difference(reference, other)
            rows.append(
                {
                    "framework": other.framework,
                    "seed": seed,
                    "bound": bound,
                    "steps": len(problem.batches),
                    "difference": difference,
                    "tolerance": tolerance,
                    "largest_norm": max(other.norms.values()),
                }
            )
            click.echo(
                f"{other.framework:6} seed {seed}, {'no bound' if bound is None else f'bound {bound}':9}: norms differ "
                f"from PyTorch's by at most {difference:.1e} of themselves, {tolerance:.1e} allowed; largest "
                f"{rows[-1]['largest_norm']:.6f}"
            )
    arguments = {"cifar10": cifar10, "quick": quick, "factor": FACTOR} | asdict(recipe)
    content = {"comparisons": rows, "runs": [asdict(outcome) for outcome in outcomes]}
    write("frameworks", output, draw(outcomes), arguments, content, *[name for name in frameworks if name != "torch"])
    for row in rows:
        if not row["difference"] <= row["tolerance"]:
            raise click.ClickException(f"{row['framework']} differs from PyTorch by {row['difference']:.1e}")
        if row["tolerance"] > LARGEST_TOLERANCE:
            raise click.ClickException(f"PyTorch differs from itself by {row['tolerance'] / FACTOR:.1e}")


def _problem(images: Any, recipe: Recipe) -> Problem:
    """Return a training run whose weights and order of images come from the recipe's seed."""
    model = make_model(images, recipe)
    order = np.random.default_rng(recipe.seed)
    count = len(images.train_images) // recipe.batch  # batches of one size, so that nothing is compiled twice
    batches = [
        batch
        for _ in range(recipe.epochs)
        for batch in order.permutation(len(images.train_images))[: count * recipe.batch].reshape(count, -1)
    ]
    layers = [
        Layer(layer.name, layer.conv.strides[0], layer.input_shape)
        for layer in _conv_layers(model, images.train_images[:1])
    ]
    weights = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    return Problem(images.train_images.numpy(), images.train_labels.numpy(), batches, weights, layers, recipe)


def _conv_layers(model: Any, example: Any) -> Any:
    from convsv_adapters.torch import conv_layers

    return conv_layers(model, example)


def _disturbances(problem: Problem) -> Iterator[Problem]:
    """Yield the problem with small changes, to measure how much of a difference to allow between frameworks.

    First, every initial weight is off by one eps, which is the size of a rounding error. Then the bound is larger by
    `MARGIN`: PyTorch's adapter keeps norms below the bound by `MARGIN`, the other adapters by a rounding error.
    """
    signs = np.random.default_rng(0)
    eps = np.finfo(np.float32).eps
    weights = {
        name: (value * (1 + eps * signs.choice([-1, 1], value.shape))).astype(np.float32)
        for name, value in problem.weights.items()
    }
    yield replace(problem, weights=weights)
    if problem.recipe.bound is not None:
        yield replace(problem, recipe=replace(problem.recipe, bound=problem.recipe.bound * (1 + MARGIN)))


def _outcome(framework: str, problem: Problem) -> Outcome:
    began = time.perf_counter()
    kernels = importlib.import_module(f"examples.paper.{FRAMEWORKS[framework]}").run(problem)
    seconds = time.perf_counter() - began
    norms = {
        layer.name: float(
            operator_norm(np.float64(kernels[layer.name]), layer.extents, Conv("OIHW", stride=layer.stride))
        )
        for layer in problem.layers
    }
    return Outcome(framework, problem.recipe.bound, norms, seconds)


def _difference(one: Outcome, other: Outcome) -> float:
    """Return the largest relative difference of a layer's norm."""
    return max(abs(other.norms[name] / norm - 1) for name, norm in one.norms.items())


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Draw the norm of every layer for each framework."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    names = list(outcomes[0].norms)
    for number, framework in enumerate(dict.fromkeys(outcome.framework for outcome in outcomes)):
        for bound, marker in ((None, "o"), (BOUND, "s")):
            chosen = [o for o in outcomes if (o.framework, o.bound) == (framework, bound)]
            if not chosen:
                continue
            points = [(i + 0.15 * number, o.norms[name]) for o in chosen for i, name in enumerate(names)]
            axes.plot(
                *zip(*points, strict=True), marker, color=f"C{number}", fillstyle="none",
                label=f"{framework}, {'no bound' if bound is None else f'bound {bound}'}",
            )  # fmt: skip
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize="small")
    axes.set(ylabel="norm after training")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
