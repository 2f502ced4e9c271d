"""Build the whole matrix of a convolutional layer from the definition, in plain NumPy: the judge of all results.

Nothing here is fast, clever or shared with the library under test. A loop over output pixels, taps and groups of
channels finds every entry. The project's tests check products with the matrix against the convolutions of PyTorch
and JAX.
"""

from __future__ import annotations

import itertools
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Pairs", "accurate_singular_values", "dense_matrix", "same_pads", "source"]

Array: TypeAlias = NDArray[Any]
Pairs: TypeAlias = tuple[tuple[int, int], ...]


def same_pads(taps: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Pairs:
    """Return the elements before and after each axis that give ``extent // stride`` outputs.

    Where their number is odd, one more stands after the axis than before it.

    Examples
    --------
    >>> same_pads((3, 4), stride=(1, 1), dilation=(1, 1))
    ((1, 1), (1, 2))
    >>> same_pads((3, 3), stride=(2, 4), dilation=(1, 1))
    ((0, 1), (0, 0))
    """
    pads = []
    for k, s, d in zip(taps, stride, dilation, strict=True):
        total = max(d * (k - 1) + 1 - s, 0)
        pads.append((total // 2, total - total // 2))
    return tuple(pads)


def source(index: int, extent: int, padding_mode: str) -> int | None:
    """Return which of `extent` elements stands at `index` of the padded axis, or None where a zero stands.

    Indices outside ``range(extent)`` belong to the padding, which may be wider than the axis itself.

    Examples
    --------
    >>> [source(i, 4, "reflect") for i in range(-3, 8)]
    [3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]
    """
    if padding_mode == "circular":
        return index % extent
    if padding_mode == "zeros":
        return index if 0 <= index < extent else None
    if padding_mode == "replicate":
        return min(max(index, 0), extent - 1)
    if padding_mode == "reflect":
        period = max(2 * (extent - 1), 1)
        return min(index % period, -index % period)
    raise ValueError(f"padding_mode={padding_mode!r}: wanted circular, zeros, reflect or replicate")


def dense_matrix(
    kernel: Array,
    input_shape: tuple[int, ...],
    layout: str,
    *,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
    pads: Pairs | None = None,
    padding_mode: str = "circular",
    transposed: bool = False,
    output_shape: tuple[int, ...] | None = None,
) -> Array:
    """Return the matrix of the layer that takes an image of ``(channels, *input_shape)`` to its output.

    Parameters
    ----------
    kernel : array
        Taps, with the axes of `layout`. The axis ``I`` (``O`` when `transposed`) holds one group.
    input_shape : tuple of int
        Spatial extents of the input, in the order of the spatial letters of `layout`.
    layout : str
        ``O``, ``I`` and the spatial letters, in the order of the kernel's axes.
    stride, dilation : tuple of int
        One value for each spatial axis.
    groups : int
        Number of groups of channels.
    pads : pairs of int, optional
        Elements before and after each axis, by default those of `same_pads`.
    padding_mode : str
        "circular", "zeros", "reflect" or "replicate".
    transposed : bool
        Whether to return the transpose of the convolution described, without conjugation. That
        convolution then goes from `output_shape` to `input_shape`.
    output_shape : tuple of int, optional
        Spatial extents of the output of a transposed convolution, by default ``input_shape * stride``.

    Returns
    -------
    array of float64 or complex128
        Rows are the outputs and columns the inputs. In both, the channel is the slowest index, and the pixels are
        in row-major order.

    Examples
    --------
    >>> dense_matrix(np.array([[[1.0, 2.0, 3.0]]]), (4,), "OIW", stride=(1,), dilation=(1,))
    array([[2., 3., 0., 1.],
           [1., 2., 3., 0.],
           [0., 1., 2., 3.],
           [3., 0., 1., 2.]])
    """
    dtype = np.complex128 if np.iscomplexobj(kernel) else np.float64
    spatial_axes = [axis for axis, letter in enumerate(layout) if letter not in "OI"]
    rows_letter, columns_letter = ("I", "O") if transposed else ("O", "I")
    order = [layout.index(rows_letter), layout.index(columns_letter), *spatial_axes]
    weights = np.asarray(kernel, dtype=dtype).transpose(order)
    rows_all, columns_of_group, *taps = weights.shape
    rows_of_group = rows_all // groups

    wide = input_shape  # extents of the strided convolution's input, which is the output of a transposed one
    if transposed:
        wide = output_shape or tuple(n * s for n, s in zip(input_shape, stride, strict=True))
    pads = same_pads(tuple(taps), stride, dilation) if pads is None else pads
    outputs = tuple(
        (n + before + after - d * (k - 1) - 1) // s + 1
        for n, (before, after), d, k, s in zip(wide, pads, dilation, taps, stride, strict=True)
    )
    if transposed and outputs != tuple(input_shape):
        raise ValueError(f"the convolution takes {wide} to {outputs}, so its transpose does not start at {input_shape}")

    matrix: Array = np.zeros((rows_all, *outputs, columns_of_group * groups, *wide), dtype=dtype)
    for pixel in itertools.product(*map(range, outputs)):
        for tap in itertools.product(*map(range, taps)):
            seen = [
                source(y * s + p * d - before, n, padding_mode)
                for y, s, p, d, (before, _), n in zip(pixel, stride, tap, dilation, pads, wide, strict=True)
            ]
            if None in seen:
                continue  # a zero of the padding
            for group in range(groups):
                rows = slice(group * rows_of_group, (group + 1) * rows_of_group)
                columns = slice(group * columns_of_group, (group + 1) * columns_of_group)
                entries: Any = (rows, *pixel, columns, *seen)
                block: Any = (rows, slice(None), *tap)
                matrix[entries] += weights[block]
    flat: Array = matrix.reshape(rows_all * np.prod(outputs, dtype=int), -1)
    return flat.T if transposed else flat


CLUSTER = 1e-9
"""The least distance of two singular values, relative to the largest, that first-order terms tell apart.

The second-order terms that are left out are of the order of ``eps**2 / CLUSTER``, far below the rounding of doubles.
"""


def accurate_singular_values(matrix: Array) -> Array:
    """Return the singular values, in descending order, with an error far below the rounding of double precision.

    LAPACK's values of a dense matrix of a hundred rows are off by ten units of eps times the largest and more. This
    is too much for the judge of results in double precision. So LAPACK's factors are made orthonormal, and
    ``C = U* A V`` is formed in extended precision. C is diagonal up to rounding, so its singular values are its
    diagonal, to second order in the other entries. Values closer than `CLUSTER` share a small block of C instead.
    Where NumPy's long double is a double, the function returns LAPACK's values.

    Examples
    --------
    >>> accurate_singular_values(np.array([[3.0, 0.0], [4.0, 5.0]])) ** 2
    array([45.,  5.])
    """
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    if not s[0] or np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
        return s
    extended = np.clongdouble if np.iscomplexobj(matrix) else np.longdouble
    left = _orthonormal(u.astype(extended))
    right = _orthonormal(vh.conj().T.astype(extended))
    core = left.conj().T @ matrix.astype(extended) @ right
    values = np.empty_like(s)
    start = 0
    for stop in [*(np.flatnonzero(s[:-1] - s[1:] > CLUSTER * s[0]) + 1), len(s)]:
        block, middle = core[start:stop, start:stop], s[start]
        if middle > np.sqrt(CLUSTER) * s[0]:
            rest = block - middle * np.eye(stop - start)  # so small that double precision suffices
            rest = ((rest + rest.conj().T) / 2).astype(matrix.dtype)
            values[start:stop] = middle + np.linalg.eigvalsh(rest)[::-1]
        else:
            values[start:stop] = np.linalg.svd(block.astype(matrix.dtype), compute_uv=False)
        start = stop
    return np.sort(values)[::-1]


def _orthonormal(columns: Array) -> Array:
    """Return the orthonormal columns nearest to nearly orthonormal ones, by one step of Newton and Schulz."""
    return columns @ (3 * np.eye(columns.shape[1]) - columns.conj().T @ columns) / 2
