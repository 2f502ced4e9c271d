"""Find checkpoints by patterns, with the run and the step that each belongs to."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from convsv_core.layers import ModelError
from convsv_core.reports import files_of_model

__all__ = ["Checkpoint", "find", "run_and_step"]

OF_ONE_STEP = re.compile(r"(step|epoch|iter|checkpoint|ckpt)\D*\d", re.IGNORECASE)
"""Names of folders that hold one step each, as trainers call them."""


@dataclass(frozen=True)
class Checkpoint:
    """A model file of a training run.

    Attributes
    ----------
    path : Path
        The path as it was found.
    model : str
        The path relative to the folder of the table, which is the model's name in the table.
    run : str
        The folder of the run, relative to the folder of the table.
    step : int or None
        The training step; see `run_and_step`.
    size : int or None
        The size of the file in bytes, with the files that it lists; None if one of them has gone.
    modified : int or None
        The time of the last change of one of them in microseconds since 1970; None if one of them has gone.
    """

    path: Path
    model: str
    run: str
    step: int | None
    size: int | None
    modified: int | None


def find(patterns: Iterable[str], base: Path) -> list[Checkpoint]:
    """Return every file that matches a pattern or a name, once, in the order of runs and steps.

    Parameters
    ----------
    patterns : iterable of str
        Names of files, and patterns of `glob`.
    base : Path
        The folder of the table.

    Raises
    ------
    FileNotFoundError
        A pattern matches no file; the message is one line.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        names = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        files = [name for name in names if os.path.isfile(name)]
        if not files:
            hint = " (folders only: add a pattern for the files in them, such as '/*')" if names else ""
            raise FileNotFoundError(f"no file matches {pattern!r}{hint}")
        found.update((os.path.abspath(name), Path(name)) for name in files)
    checkpoints = [_checkpoint(path, base) for path in found.values()]
    return sorted(checkpoints, key=lambda one: (one.run, -1 if one.step is None else one.step, one.model))


def run_and_step(model: str) -> tuple[str, int | None]:
    """Return the run and the step of a checkpoint from its path.

    The run is the folder. The step is the number behind "step" in the file's name, or else the last number in the name.
    If the name has no number and the folder is called step, epoch, iter, checkpoint or ckpt with a number, then this
    number is the step, and the run is the folder above. The numbers of a checkpoint's parts, as in
    ``model-00001-of-00003``, do not count.

    Examples
    --------
    >>> run_and_step("runs/a/step_000100.safetensors")
    ('runs/a', 100)
    >>> run_and_step("runs/a/epoch=3-step=4000-v1.ckpt")
    ('runs/a', 4000)
    >>> run_and_step("runs/a/checkpoint-500/model.safetensors")
    ('runs/a', 500)
    """
    folder, name = os.path.split(model)
    step, (above, parent) = _step(os.path.splitext(name)[0]), os.path.split(folder)
    if step is None and OF_ONE_STEP.search(parent):
        step, folder = _step(parent), above
    return folder or ".", step


def _step(name: str) -> int | None:
    name = re.sub(r"-\d+-of-\d+$", "", name)
    numbers = re.findall(r"step\D?(\d+)", name, re.IGNORECASE) or re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else None


def _checkpoint(path: Path, base: Path) -> Checkpoint:
    try:
        model = os.path.relpath(path, base)
    except ValueError:  # the two paths are on different drives of Windows
        model = os.path.abspath(path)
    run, step = run_and_step(model)
    try:
        statuses = [file.stat() for file in files_of_model(path)]
    except (OSError, ModelError):  # the report of this file will say the reason
        return Checkpoint(path, model, run, step, None, None)
    size, modified = sum(status.st_size for status in statuses), max(status.st_mtime_ns for status in statuses)
    return Checkpoint(path, model, run, step, size, modified // 1000)
