"""The images that the experiments train on: scikit-learn's digits, or CIFAR-10 from a folder that the user names."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
from torch import Tensor

from examples.train_digits import load_split

__all__ = ["Images", "load", "read_cifar10"]

SIDE, CHANNELS, CLASSES = 32, 3, 10
RECORD = 1 + CHANNELS * SIDE * SIDE
"""Bytes of an image in CIFAR-10's binary version: the label, then red, green and blue, each row by row."""

TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILE = "test_batch.bin"


class Images(NamedTuple):
    """Training and test images: float32 (n, channels, height, width) in [0, 1]. Their labels are int64 (n,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(cifar10: Path | None, most: int | None = None) -> Images:
    """Return CIFAR-10 from the folder `cifar10`, or the digits if it is None.

    At most the first `most` images of the training part, and of the test part, are returned.
    """
    if cifar10 is None:
        parts = load_split()
    else:
        train = [read_cifar10(cifar10 / name) for name in TRAIN_FILES]
        parts = (*(np.concatenate(arrays) for arrays in zip(*train, strict=True)), *read_cifar10(cifar10 / TEST_FILE))
    return Images(*(torch.from_numpy(array[:most]) for array in parts))


def read_cifar10(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one file of CIFAR-10's binary version, which holds no pickles, unlike the Python version.

    Returns
    -------
    images : numpy.ndarray of float32, shape (n, 3, 32, 32), in [0, 1]
    labels : numpy.ndarray of int64, shape (n,)

    Raises
    ------
    click.ClickException
        There is no such file, or it is not of that format.
    """
    if not path.is_file():
        hint = ""
        if path.with_suffix("").is_file():
            hint = f" ({path.with_suffix('').name} is of the Python version, whose pickles are not read)"
        raise click.ClickException(f"{path}: no such file; wanted the folder of CIFAR-10's binary version{hint}")
    content = np.fromfile(path, np.uint8)
    if not content.size or content.size % RECORD:
        raise click.ClickException(
            f"{path}: {content.size} bytes, wanted a multiple of {RECORD}: label and 3 x 32 x 32"
        )
    records = content.reshape(-1, RECORD)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= CLASSES:
        raise click.ClickException(f"{path}: a label of {labels.max()}, wanted 0 to {CLASSES - 1}")
    return records[:, 1:].reshape(-1, CHANNELS, SIDE, SIDE).astype(np.float32) / 255, labels
