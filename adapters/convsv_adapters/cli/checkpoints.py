"""Checkpoints by pattern: which files there are, of which run and step each is, and whether it has changed."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

OF_ONE_STEP = re.compile(r"(step|epoch|iter|checkpoint|ckpt)\D*\d", re.IGNORECASE)
"""Names of folders that hold one step each."""


@dataclass(frozen=True)
class Checkpoint:
    """A model file of a training run.

    Attributes
    ----------
    path : Path
        As it was found.
    model : str
        The path from the folder of the table, which is its name there.
    run : str
        The folder, from there too.
    step : int or None
        See `run_and_step`.
    size, modified : int or None
        Bytes, and microseconds since 1970; None if the file has gone.
    """

    path: Path
    model: str
    run: str
    step: int | None
    size: int | None
    modified: int | None


def find(patterns: Iterable[str], base: Path) -> list[Checkpoint]:
    """Every file that a pattern, or a name, stands for, once, in the order of runs and steps.

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
    """The folder of a checkpoint, and the number behind "step" in its name, or else the last number there.

    A name without a number leaves it to that of a folder that is called step, epoch, iter, checkpoint or ckpt, and the
    run is the folder above. The numbers of a checkpoint's own parts, as in ``model-00001-of-00003``, do not count.

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
    except ValueError:  # on another drive
        model = os.path.abspath(path)
    run, step = run_and_step(model)
    try:
        status = path.stat()
    except OSError:
        return Checkpoint(path, model, run, step, None, None)
    return Checkpoint(path, model, run, step, status.st_size, status.st_mtime_ns // 1000)
