"""Types of the work that a backend maps over blocks of frequencies; `convsv_core.backend` exports them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

__all__ = ["Array", "ArraySpec", "BlockFunction", "BlockWork", "Prepare", "split_rows"]

Array: TypeAlias = Any
"""An array of any library. The standard has no common class to name."""

BlockFunction: TypeAlias = Callable[[Array], "Array | tuple[Array, ...]"]
"""A function from a block of rows to an array, or to a tuple of arrays, whose first axis is the block's."""


class ArraySpec(NamedTuple):
    """Hold the shape of an array, and the name of its dtype."""

    shape: tuple[int, ...]
    dtype: str


class BlockWork(NamedTuple):
    """Hold work that is done block by block.

    Attributes
    ----------
    function : callable
        Takes a block of rows, as `Backend.map_blocks` describes.
    row_bytes : int
        Bytes of working memory that one row needs.
    """

    function: BlockFunction
    row_bytes: int


Prepare: TypeAlias = Callable[..., BlockWork]
"""A pure function that makes the work on blocks from arrays and static arguments."""


def split_rows(rows: np.ndarray[Any, Any], size: int) -> Iterator[np.ndarray[Any, Any]]:
    """Yield consecutive blocks of at most `size` rows. Their lengths differ by at most 1.

    Examples
    --------
    >>> [len(block) for block in split_rows(np.zeros((10, 2)), 4)]
    [4, 3, 3]
    """
    count = max(1, -(-len(rows) // size))
    return iter(np.array_split(rows, count) if count > 1 else [rows])  # `array_split` takes longer than small blocks.
