"""The matrix of a resizing along one axis, as ONNX defines it."""

from __future__ import annotations

import math

import numpy as np

from convsv_adapters._networks import Undescribed
from convsv_adapters.parameters import HostArray

__all__ = ["resize_matrix"]


def resize_matrix(
    extent: int,
    outputs: int,
    scale: float,
    *,
    method: str,
    coordinates: str,
    nearest: str,
    cubic: float = -0.75,
    inside: bool = False,
) -> HostArray:
    """Return the matrix that resizes along one axis, shape (outputs, extent).

    Parameters
    ----------
    extent, outputs : int
    scale : float
        Outputs for each input, as the node states it; `outputs` is its product with `extent`, rounded down.
    method : {"nearest", "linear", "cubic"}
    coordinates : str
        ONNX's coordinate_transformation_mode.
    nearest : str
        ONNX's nearest_mode.
    cubic : float, default -0.75
        ONNX's cubic_coeff_a.
    inside : bool, default False
        Whether weights of elements outside are left out, and the other weights divided by their sum.

    Raises `Undescribed` for modes that are not known.
    """
    places = np.array([_place(index, extent, outputs, scale, coordinates) for index in range(outputs)])
    matrix = np.zeros((outputs, extent))
    for row, place in enumerate(places):
        if method == "nearest":
            matrix[row, min(max(_nearest(place, nearest), 0), extent - 1)] = 1.0
            continue
        first = math.floor(place)
        share = place - first
        if method == "linear":
            weights = {first: 1 - share, first + 1: share}
        elif method == "cubic":
            weights = {first + step: _cubic(share - step, cubic) for step in (-1, 0, 1, 2)}
        else:
            raise Undescribed(f"resizing by {method!r} has no rule")
        if inside:
            kept = {index: weight for index, weight in weights.items() if 0 <= index < extent}
            weights = {index: weight / sum(kept.values()) for index, weight in kept.items()}
        for index, weight in weights.items():
            matrix[row, min(max(index, 0), extent - 1)] += weight
    return matrix


def _place(index: int, extent: int, outputs: int, scale: float, coordinates: str) -> float:
    """Return the place in the input that an output stands for."""
    if coordinates == "asymmetric":
        return index / scale
    if coordinates == "align_corners":
        return index * (extent - 1) / (outputs - 1) if outputs > 1 else 0.0
    if coordinates == "pytorch_half_pixel" and outputs == 1:
        return -0.5
    if coordinates == "half_pixel_symmetric":
        adjusted = outputs / (scale * extent)
        return extent / 2 * (1 - adjusted) + (index + 0.5) / scale - 0.5
    if coordinates in ("half_pixel", "pytorch_half_pixel"):
        return (index + 0.5) / scale - 0.5
    if coordinates == "tf_half_pixel_for_nn":
        return (index + 0.5) / scale
    raise Undescribed(f"resizing with the coordinates {coordinates!r} has no rule")


def _nearest(place: float, mode: str) -> int:
    if mode == "floor":
        return math.floor(place)
    if mode == "ceil":
        return math.ceil(place)
    if mode == "round_prefer_floor":
        return math.ceil(place - 0.5)
    if mode == "round_prefer_ceil":
        return math.floor(place + 0.5)
    raise Undescribed(f"resizing with the nearest_mode {mode!r} has no rule")


def _cubic(distance: float, a: float) -> float:
    """Return the weight of an element at a distance, by cubic convolution."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0
