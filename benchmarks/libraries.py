"""What the benchmarks ask of an array library beyond a `convsv` backend: its own names, its clock, its compiler."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

import click
import numpy as np

from benchmarks.shapes import Shape
from convsv_core.backend import Array
from convsv_core.plugins import get_backend

Function: TypeAlias = Callable[..., Any]


class Library:
    """NumPy, and every library with its interface and eager execution.

    The two lines of the paper are written with each library's own functions, as its users would write
    them: this class holds what differs.

    Parameters
    ----------
    name : str
        A `convsv` backend.
    device : str or None
        As the backend names it; None for its default.
    """

    compiles = False

    def __init__(self, name: str, device: str | None = None) -> None:
        self.name = name
        self.device = device
        self.backend = get_backend(name)
        reason = self.backend.unavailable()
        if reason:
            raise click.ClickException(f"backend {name}: {reason}")

    @property
    def native(self) -> ModuleType:
        """The library itself."""
        import numpy

        return numpy

    def version(self) -> str:
        """The library's version."""
        return str(self.native.__version__)

    def asarray(self, array: np.ndarray[Any, Any]) -> Array:
        """Copy to the device that is measured."""
        return self.backend.asarray(array, device=self.device)

    def fft(self, array: Array, extents: tuple[int, ...]) -> Array:
        """Transform the first axes, padded with zeros to `extents`."""
        return self.native.fft.fftn(array, s=extents, axes=tuple(range(len(extents))))

    def ifft(self, array: Array, extents: tuple[int, ...]) -> Array:
        """Invert `fft`."""
        return self.native.fft.ifftn(array, s=extents, axes=tuple(range(len(extents))))

    def rfft(self, array: Array, extents: tuple[int, ...]) -> Array:
        """Transform the first two axes of a real array, padded with zeros to `extents`: half of the frequencies."""
        return self.native.fft.rfftn(array, s=extents, axes=(0, 1))

    def irfft(self, array: Array, extents: tuple[int, ...]) -> Array:
        """Invert `rfft`."""
        return self.native.fft.irfftn(array, s=extents, axes=(0, 1))

    def convolution(self, kernel: Array, shape: Shape, image: np.ndarray[Any, Any]) -> tuple[Function, Function, Array]:
        """Return a two-dimensional convolution with zero padding, its adjoint, and an image to begin with.

        Each tap is a matrix product with a slice of the flattened image, whose margins hold the padding.

        Parameters
        ----------
        kernel : array, shape (*taps, inputs, outputs)
        shape : Shape
            The geometry. The padding is ``dilation * (taps - 1) // 2`` on both sides.
        image : numpy.ndarray, shape (inputs, *extents)
        """
        xp, flat = self.native, TapProducts(shape)
        held = xp.zeros((math.prod(shape.stride), shape.inputs, *flat.extents), dtype=kernel.dtype)
        for number, (row, column) in enumerate(np.ndindex(*shape.stride)):
            part = image[:, row :: shape.stride[0], column :: shape.stride[1]]
            held[number][flat.window(part.shape[1:])] = xp.asarray(part)
        window = flat.window(shape.grid)
        inside = xp.zeros(flat.extents, dtype=kernel.dtype)
        inside[window[1:]] = 1
        outputs = xp.zeros(flat.extents, dtype=kernel.dtype)
        outputs[flat.window(flat.outputs)[1:]] = 1
        inside, outputs = inside.reshape(-1), outputs.reshape(-1)

        def apply(image: Array) -> Array:
            result = xp.zeros((shape.outputs, inside.size), dtype=kernel.dtype)
            for tap, number, shift in flat.taps:
                result[:, flat.run(0)] += kernel[tap].T @ image[number][:, flat.run(shift)]
            return result * outputs

        def adjoint(image: Array) -> Array:
            result = xp.zeros((math.prod(shape.stride), shape.inputs, inside.size), dtype=kernel.dtype)
            for tap, number, shift in flat.taps:
                result[number][:, flat.run(shift)] += kernel[tap] @ image[:, flat.run(0)]
            return result * inside

        return apply, adjoint, held.reshape(*held.shape[:2], -1)

    def svdvals(self, matrices: Array) -> Array:
        """Singular values of the matrices in the last two axes."""
        return self.native.linalg.svd(matrices, compute_uv=False)

    def svd(self, matrices: Array) -> tuple[Array, Array, Array]:
        """Singular values and vectors, without those of the null space, of the matrices in the last two axes."""
        u, s, vh = self.native.linalg.svd(matrices, full_matrices=False)
        return u, s, vh

    def wait(self, result: Any) -> None:
        """Return when `result` has been computed."""

    def compile(self, function: Function, *arguments: Array) -> tuple[Function, float | None]:
        """Compile `function` for such arguments; seconds it took, or None where nothing is compiled."""
        return function, None

    def threads(self) -> int | None:
        """Threads of the library's own pool, beside those of BLAS; None where it has or tells none."""
        return None


class Torch(Library):
    """PyTorch."""

    @property
    def native(self) -> ModuleType:
        """The library itself."""
        import torch

        return torch

    def fft(self, array: Array, extents: tuple[int, ...]) -> Array:
        """Transform the first axes, padded with zeros to `extents`."""
        return self.native.fft.fftn(array, s=extents, dim=tuple(range(len(extents))))

    def ifft(self, array: Array, extents: tuple[int, ...]) -> Array:
        """Invert `fft`."""
        return self.native.fft.ifftn(array, s=extents, dim=tuple(range(len(extents))))

    def rfft(self, array: Array, extents: tuple[int, ...]) -> Array:
        """Transform the first two axes of a real array, padded with zeros to `extents`: half of the frequencies."""
        return self.native.fft.rfftn(array, s=extents, dim=(0, 1))

    def irfft(self, array: Array, extents: tuple[int, ...]) -> Array:
        """Invert `rfft`."""
        return self.native.fft.irfftn(array, s=extents, dim=(0, 1))

    def convolution(self, kernel: Array, shape: Shape, image: np.ndarray[Any, Any]) -> tuple[Function, Function, Array]:
        """Return a two-dimensional convolution with zero padding, its adjoint, and an image to begin with."""
        functional = self.native.nn.functional
        weight = kernel.permute(3, 2, 0, 1).contiguous()
        geometry = {"stride": shape.stride, "padding": half_pads(shape), "dilation": shape.dilation}
        extra = unread(shape)

        def apply(image: Array) -> Array:
            return functional.conv2d(image, weight, **geometry)

        def adjoint(image: Array) -> Array:
            return functional.conv_transpose2d(image, weight, output_padding=extra, **geometry)

        return apply, adjoint, self.asarray(image[None])

    def svdvals(self, matrices: Array) -> Array:
        """Singular values of the matrices in the last two axes."""
        return self.native.linalg.svdvals(matrices)

    def wait(self, result: Any) -> None:
        """Return when `result` has been computed."""
        if result.device.type == "cuda":
            self.native.cuda.synchronize(result.device)

    def threads(self) -> int | None:
        """Threads that one operation of the CPU may use."""
        return int(self.native.get_num_threads())


class Jax(Library):
    """JAX, everything under `jax.jit`."""

    compiles = True

    @property
    def native(self) -> ModuleType:
        """`jax.numpy`."""
        import jax.numpy

        return jax.numpy

    def version(self) -> str:
        """The library's version."""
        import jax

        return str(jax.__version__)

    def convolution(self, kernel: Array, shape: Shape, image: np.ndarray[Any, Any]) -> tuple[Function, Function, Array]:
        """Return a two-dimensional convolution with zero padding, its adjoint, and an image to begin with."""
        import jax

        def apply(image: Array) -> Array:
            return jax.lax.conv_general_dilated(
                image,
                kernel,
                shape.stride,
                [(pad, pad) for pad in half_pads(shape)],
                rhs_dilation=shape.dilation,
                dimension_numbers=("NCHW", "HWIO", "NCHW"),
            )

        start = self.native.asarray(image[None])
        transpose = jax.linear_transpose(apply, start)
        return apply, lambda image: transpose(image)[0], start

    def wait(self, result: Any) -> None:
        """Return when `result` has been computed."""
        result.block_until_ready()

    def compile(self, function: Function, *arguments: Array) -> tuple[Function, float | None]:
        """Compile `function` for such arguments; seconds it took, tracing included."""
        import jax

        start = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        return compiled, time.perf_counter() - start


class Cupy(Library):
    """CuPy."""

    @property
    def native(self) -> ModuleType:
        """The library itself."""
        import cupy

        return cupy

    def wait(self, result: Any) -> None:
        """Return when `result` has been computed."""
        with result.device:
            self.native.cuda.get_current_stream().synchronize()


def half_pads(shape: Shape) -> tuple[int, ...]:
    """Zeros on each side of each axis: "same", for odd extents."""
    return tuple(d * (k - 1) // 2 for k, d in zip(shape.taps, shape.dilation, strict=True))


def output_extents(shape: Shape) -> tuple[int, ...]:
    """Outputs along each axis with that padding."""
    return tuple(
        (n + 2 * pad - d * (k - 1) - 1) // s + 1
        for n, pad, d, k, s in zip(
            shape.extents, half_pads(shape), shape.dilation, shape.taps, shape.stride, strict=True
        )
    )


def unread(shape: Shape) -> tuple[int, ...]:
    """Padded elements at the end of each axis that no output reads, because of the stride."""
    return tuple(
        (n + 2 * pad - d * (k - 1) - 1) % s
        for n, pad, d, k, s in zip(
            shape.extents, half_pads(shape), shape.dilation, shape.taps, shape.stride, strict=True
        )
    )


class TapProducts:
    """Where the taps of a two-dimensional convolution read, in flattened images with margins of zeros.

    An image is held as one for each class of places modulo the stride, so that every tap reads one class
    at a constant shift of the flattened places.

    Attributes
    ----------
    extents : tuple of int
        Of an image of one class, with its margins.
    outputs : tuple of int
        Of the result, without them.
    taps : list of (place, class, shift)
    """

    def __init__(self, shape: Shape) -> None:
        self.outputs = output_extents(shape)
        pads = half_pads(shape)
        moves = {
            tap: [divmod(t * d - pad, s) for t, d, pad, s in zip(tap, shape.dilation, pads, shape.stride, strict=True)]
            for tap in np.ndindex(*shape.taps)
        }
        shifts = np.asarray([[shift for shift, _ in move] for move in moves.values()])
        self._low = np.maximum(-shifts.min(axis=0), 0)
        needed = np.maximum(np.asarray(shape.grid), np.asarray(self.outputs) + shifts.max(axis=0))
        self.extents = tuple(int(n) for n in self._low + needed)
        width = self.extents[1]
        self._start = int(self._low[0]) * width + int(self._low[1])
        self._count = (self.outputs[0] - 1) * width + self.outputs[1]
        self.taps = [
            (tap, int(np.ravel_multi_index([r for _, r in move], shape.stride)), move[0][0] * width + move[1][0])
            for tap, move in moves.items()
        ]

    def window(self, extents: tuple[int, ...]) -> tuple[slice, ...]:
        """The image itself, of shape (channels, *extents), within its margins."""
        return (slice(None), *(slice(int(a), int(a) + n) for a, n in zip(self._low, extents, strict=True)))

    def run(self, shift: int) -> slice:
        """The flattened places that a tap at that shift reads for all outputs."""
        return slice(self._start + shift, self._start + shift + self._count)


LIBRARIES: dict[str, type[Library]] = {"numpy": Library, "torch": Torch, "jax": Jax, "cupy": Cupy}


def open_library(name: str, device: str | None = None) -> Library:
    """Return the library called `name`, ready for `device`."""
    return LIBRARIES[name](name, device)
