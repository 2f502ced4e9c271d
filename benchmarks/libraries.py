"""Give the benchmarks what they need of an array library beyond a `convsv` backend: its names, clock and compiler."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import click
import numpy as np

from benchmarks.shapes import HostArray, Shape
from benchmarks.zero_padding import TapProducts, pad
from convsv_core.backend import Array
from convsv_core.plugins import get_backend

__all__ = [
    "LIBRARIES",
    "Compiled",
    "Function",
    "Library",
    "PaddedConvolution",
    "Vectors",
    "open_library",
]

Function: TypeAlias = Callable[..., Any]


class Compiled(NamedTuple):
    """Hold a function to run, and the seconds that compiling it took (None where nothing is compiled)."""

    run: Function
    seconds: float | None


class PaddedConvolution(NamedTuple):
    """Hold a convolution with zero padding, its adjoint, and an image to begin with."""

    apply: Function
    adjoint: Function
    start: Array


class Vectors(NamedTuple):
    """Hold the singular values and vectors of matrices, without the vectors of the null space."""

    u: Array
    s: Array
    vh: Array


class Library:
    """Call NumPy, or a library with NumPy's interface and eager execution.

    The two lines of the paper are written with each library's own functions, as its users would write
    them. This class holds what differs between libraries.

    Parameters
    ----------
    name : str
        A `convsv` backend.
    device : str or None
        As the backend names it; None for its default.
    """

    axes = "axes"
    """Name of the argument of the FFTs that lists the axes."""

    def __init__(self, name: str, device: str | None = None) -> None:
        self.name = name
        self.device = device
        self.backend = get_backend(name)
        reason = self.backend.unavailable()
        if reason:
            raise click.ClickException(f"backend {name}: {reason}")

    @property
    def native(self) -> ModuleType:
        """Return the namespace of the library that holds the functions which are timed."""
        import numpy

        return numpy

    def version(self) -> str:
        """Return the library's version."""
        return str(self.native.__version__)

    def asarray(self, array: HostArray) -> Array:
        """Copy an array to the device that is measured."""
        return self.backend.asarray(array, device=self.device)

    def fft(self, array: Array, extents: tuple[int, ...]) -> Array:
        """Transform the first axes, padded with zeros to `extents`."""
        return self._transform("fftn", array, extents)

    def ifft(self, array: Array, extents: tuple[int, ...]) -> Array:
        """Invert `fft`."""
        return self._transform("ifftn", array, extents)

    def rfft(self, array: Array, extents: tuple[int, ...]) -> Array:
        """Transform the first axes of a real array, padded with zeros to `extents`: half of the frequencies."""
        return self._transform("rfftn", array, extents)

    def irfft(self, array: Array, extents: tuple[int, ...]) -> Array:
        """Invert `rfft`."""
        return self._transform("irfftn", array, extents)

    def _transform(self, name: str, array: Array, extents: tuple[int, ...]) -> Array:
        return getattr(self.native.fft, name)(array, s=extents, **{self.axes: tuple(range(len(extents)))})

    def convolution(self, kernel: Array, shape: Shape, image: HostArray) -> PaddedConvolution:
        """Return a two-dimensional convolution with zero padding.

        Each tap is a matrix product with a slice of the flattened image, whose margins hold the padding.

        Parameters
        ----------
        kernel : array, shape (*taps, inputs, outputs)
        shape : Shape
            The geometry. The padding is ``dilation * (taps - 1) // 2`` on both sides.
        image : numpy.ndarray, shape (inputs, *extents)
        """
        xp, flat = self.native, TapProducts(shape)
        start = xp.asarray(flat.classes(shape, image.astype(kernel.dtype)))
        inside, outputs = (xp.asarray(flat.mask(extents), dtype=kernel.dtype) for extents in (shape.grid, flat.outputs))

        def apply(image: Array) -> Array:
            result = xp.zeros((shape.outputs, inside.size), dtype=kernel.dtype)
            for tap in flat.taps:
                result[:, flat.run(0)] += kernel[tap.place].T @ image[tap.residue][:, flat.run(tap.shift)]
            return result * outputs

        def adjoint(image: Array) -> Array:
            result = xp.zeros((math.prod(shape.stride), shape.inputs, inside.size), dtype=kernel.dtype)
            for tap in flat.taps:
                result[tap.residue][:, flat.run(tap.shift)] += kernel[tap.place] @ image[:, flat.run(0)]
            return result * inside

        return PaddedConvolution(apply, adjoint, start.reshape(*start.shape[:2], -1))

    def svdvals(self, matrices: Array) -> Array:
        """Return the singular values of the matrices in the last two axes."""
        return self.native.linalg.svd(matrices, compute_uv=False)

    def svd(self, matrices: Array) -> Vectors:
        """Return the singular values and vectors of the matrices in the last two axes."""
        return Vectors(*self.native.linalg.svd(matrices, full_matrices=False))

    def wait(self, result: Any) -> None:
        """Return when `result` has been computed."""

    def compile(self, function: Function, *arguments: Array) -> Compiled:
        """Compile `function` for arguments like these, where the library compiles."""
        return Compiled(function, None)

    def threads(self) -> int | None:
        """Return the threads of the library's own pool, beside those of BLAS; None where it tells no number."""
        return None

    def accelerator(self) -> str:
        """Return the model of the accelerator that is measured, or "" where it is the processor."""
        return ""


class Torch(Library):
    """Call PyTorch."""

    axes = "dim"

    @property
    def native(self) -> ModuleType:
        """Return the library itself."""
        import torch

        return torch

    def convolution(self, kernel: Array, shape: Shape, image: HostArray) -> PaddedConvolution:
        """Return a two-dimensional convolution with zero padding."""
        functional, padding = self.native.nn.functional, pad(shape)
        weight = kernel.permute(3, 2, 0, 1).contiguous()
        geometry = {"stride": shape.stride, "padding": padding.pads, "dilation": shape.dilation}

        def apply(image: Array) -> Array:
            return functional.conv2d(image, weight, **geometry)

        def adjoint(image: Array) -> Array:
            return functional.conv_transpose2d(image, weight, output_padding=padding.unread, **geometry)

        return PaddedConvolution(apply, adjoint, self.asarray(image[None]))

    def svdvals(self, matrices: Array) -> Array:
        """Return the singular values of the matrices in the last two axes."""
        return self.native.linalg.svdvals(matrices)

    def wait(self, result: Any) -> None:
        """Return when `result` has been computed."""
        if result.device.type == "cuda":
            self.native.cuda.synchronize(result.device)

    def threads(self) -> int | None:
        """Return the threads that one operation of the CPU may use."""
        return int(self.native.get_num_threads())

    def accelerator(self) -> str:
        """Return the model of the accelerator that is measured, or "" where it is the processor."""
        device = self.asarray(np.zeros(1)).device
        return str(self.native.cuda.get_device_name(device)) if device.type == "cuda" else ""


class Jax(Library):
    """Call JAX, with everything under `jax.jit`."""

    @property
    def native(self) -> ModuleType:
        """Return `jax.numpy`."""
        import jax.numpy

        return jax.numpy

    def version(self) -> str:
        """Return the library's version."""
        import jax

        return str(jax.__version__)

    def convolution(self, kernel: Array, shape: Shape, image: HostArray) -> PaddedConvolution:
        """Return a two-dimensional convolution with zero padding."""
        import jax

        def apply(image: Array) -> Array:
            return jax.lax.conv_general_dilated(
                image,
                kernel,
                shape.stride,
                [(before, before) for before in pad(shape).pads],
                rhs_dilation=shape.dilation,
                dimension_numbers=("NCHW", "HWIO", "NCHW"),
            )

        start = self.native.asarray(image[None])
        transpose = jax.linear_transpose(apply, start)
        return PaddedConvolution(apply, lambda image: transpose(image)[0], start)

    def wait(self, result: Any) -> None:
        """Return when `result` has been computed."""
        result.block_until_ready()

    def compile(self, function: Function, *arguments: Array) -> Compiled:
        """Compile `function` for arguments like these; the seconds include tracing."""
        import jax

        start = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        return Compiled(compiled, time.perf_counter() - start)

    def accelerator(self) -> str:
        """Return the model of the accelerator that is measured, or "" where it is the processor."""
        (device,) = self.asarray(np.zeros(1)).devices()
        return "" if device.platform == "cpu" else str(device.device_kind)


class Cupy(Library):
    """Call CuPy, whose operations run on the current device: the device that is measured becomes the current one."""

    def __init__(self, name: str, device: str | None = None) -> None:
        super().__init__(name, device)
        if device is not None:
            self.native.cuda.Device(int(device.partition(":")[2] or 0)).use()

    @property
    def native(self) -> ModuleType:
        """Return the library itself."""
        import cupy

        return cupy

    def wait(self, result: Any) -> None:
        """Return when `result` has been computed."""
        with result.device:
            self.native.cuda.get_current_stream().synchronize()

    def accelerator(self) -> str:
        """Return the model of the accelerator that is measured, or "" where it is the processor."""
        name = self.native.cuda.runtime.getDeviceProperties(self.asarray(np.zeros(1)).device.id)["name"]
        return name.decode() if isinstance(name, bytes) else str(name)


LIBRARIES: dict[str, type[Library]] = {"numpy": Library, "torch": Torch, "jax": Jax, "cupy": Cupy}
"""The libraries that are measured, by the names of their backends."""


def open_library(name: str, device: str | None = None) -> Library:
    """Return the library called `name`, ready for `device`."""
    return LIBRARIES[name](name, device)
