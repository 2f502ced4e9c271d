"""State what the core asks of an array library, with default answers from the array API standard.

The author of a backend reads the class `Backend`. The functions and aliases beside it serve backends and the core.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import numpy as np

from convsv_core.blocks import Array, ArraySpec, BlockFunction, BlockWork, Prepare, split_rows
from convsv_core.dtypes import DTYPES

__all__ = ["Array", "ArraySpec", "Backend", "BlockFunction", "BlockWork", "Prepare", "split_rows"]


class Backend:
    """Describe an array library to the core.

    Every method has a default that is written with the array API standard, through array-api-compat. A new backend
    sets `name` and `module`, and overrides only the methods that its library must answer in another way, or can
    answer faster. The module that defines a backend must not import the array library. The class attribute `module`
    names the library, which is imported at first use.

    Arguments called `array`, `kernel` and `like` are arrays of this library. "Host" means NumPy arrays in the memory
    of the CPU. "Matrices" means the last two axes of an array; the axes before them are a batch.

    Attributes
    ----------
    name : str
        The name that users pass, as in ``convsv spectrum --backend NAME``.
    module : str
        Import name of the array library.
    lazy : bool, default False
        Whether an array has no values until its user computes it. The core then reads no values. A lazy library must
        override `map_prepared`, `run_on_values` and `run_to_number`.
    compiles : bool, default False
        Whether the library compiles its operations anew for each shape. The core then avoids batches of many
        different sizes.
    """

    name: str = ""
    module: str = ""
    lazy: bool = False
    compiles: bool = False

    # ---- the library on this machine -------------------------------------------------------------

    def owns_array(self, array: object) -> bool:
        """Tell whether `array` belongs to this library.

        The core asks this of every installed backend for each call, so it must be quick and must not import the
        library. The default compares the module of the array's type with `module`. Override it if arrays have types
        of other modules.
        """
        return type(array).__module__.partition(".")[0] == self.module

    def unavailable(self) -> str:
        """Return why the library cannot be used on this machine, or "" if it can.

        It imports the library. Override it if the import can succeed where no array can be made, as without a GPU.
        """
        try:
            importlib.import_module(self.module)
        except Exception as error:  # Whatever an import raises is the reason that is reported.
            return f"{self.module} cannot be imported: {error}"
        return ""

    def devices(self) -> tuple[str, ...]:
        """Return the names of the devices that `asarray` accepts on this machine, the default device first."""
        return ("cpu",)

    def dtypes(self, device: str | None = None) -> tuple[str, ...]:
        """Return the names of the kernel dtypes that `asarray` can make on `device`, or on the default device.

        They are the names in `DTYPES` that `library` has. Override it if the library or a device has others by name.
        """
        xp = self.library()
        return tuple(name for name in DTYPES if hasattr(xp, name))

    # ---- arrays ----------------------------------------------------------------------------------

    def library(self) -> ModuleType:
        """Return the library's array namespace, which makes new arrays.

        It imports `module`. Override it if another namespace is closer to the array API standard.
        """
        return importlib.import_module(self.module)

    def namespace(self, array: Array) -> ModuleType:
        """Return the standard-conforming namespace of `array`. Override it if the namespace is known without asking."""
        import array_api_compat

        namespace: ModuleType = array_api_compat.array_namespace(array)
        return namespace

    def asarray(self, array: Any, *, dtype: str | None = None, device: str | None = None) -> Array:
        """Return a host array, or a nested list, as an array of this library.

        `dtype` is a name in `dtypes`, `device` a name in `devices`. None means the array's dtype, and the default
        device. Override it if the library's own ``asarray`` takes no names of devices. bfloat16 arrives as float32.
        """
        xp = self.library()
        return xp.asarray(array, dtype=None if dtype is None else getattr(xp, dtype), device=device)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """Return `array` on the host as a NumPy array, with bfloat16 as float32.

        The result may share the memory of `array`, and nobody writes to it. Override it if ``numpy.asarray`` refuses
        arrays on another device, or arrays recorded for gradients.
        """
        return np.asarray(array)

    def asarray_like(self, array: np.ndarray[Any, Any], like: Array) -> Array:
        """Return a host table, such as angles or indices, as an array of the library on the device of `like`.

        The dtype is kept. Override it if arrays have no single device, or if `like` has no device under tracing.
        """
        import array_api_compat

        return self.namespace(like).asarray(array, device=array_api_compat.device(like))

    def in_one_piece(self, kernel: Array) -> Array:
        """Return `kernel` as one piece.

        Override it if an array may lie in pieces, as in chunks or on several devices.
        """
        return kernel

    def take(self, array: Array, places: np.ndarray[Any, Any], axis: int) -> Array:
        """Return the entries of `array` along `axis` at the indices in `places`, a host table, shape (count,)."""
        return self.namespace(array).take(array, self.asarray_like(places, array), axis=axis)

    def contiguous(self, array: Array) -> Array:
        """Return `array` laid out in the order of its axes. Override it if the library's users choose the layout."""
        return array

    def has_values(self, array: Array) -> bool:
        """Tell whether the numbers in `array` can be read now.

        Override it if the library traces functions: return False for an array that stands for unknown values.
        """
        return not self.lazy

    def truth(self, condition: Array) -> bool | None:
        """Return a 0-d boolean array as a bool, or None if it has no value yet.

        Override it if the library is lazy or traces: return None where ``bool`` would raise or start a computation.
        """
        return bool(condition)

    def stop_gradient(self, array: Array) -> Array:
        """Return `array` as a constant for automatic differentiation. Override it if the library has gradients."""
        return array

    def has_fast_float64(self, array: Array) -> bool:
        """Tell whether float64 takes at most about twice the time of float32, so that the core may compute in it."""
        return False

    # ---- dispatched operations -------------------------------------------------------------------

    def fftn(self, array: Array, axes: tuple[int, ...]) -> Array:
        """Return the unnormalised discrete Fourier transform over `axes`, complex to complex."""
        return self.namespace(array).fft.fftn(array, axes=axes)

    def ifftn(self, array: Array, axes: tuple[int, ...]) -> Array:
        """Return the inverse of `fftn`, which divides by the number of entries of `axes`."""
        return self.namespace(array).fft.ifftn(array, axes=axes)

    def conj(self, array: Array) -> Array:
        """Return the complex conjugate; for a real array, the array itself."""
        xp = self.namespace(array)
        return xp.conj(array) if xp.isdtype(array.dtype, "complex floating") else array

    def complex(self, real: Array, imaginary: Array) -> Array:
        """Return complex numbers from their real and imaginary parts, two real arrays of one dtype.

        Override it if the library has a function for it: the default is a product and a sum.
        """
        xp = self.namespace(real)
        kind = xp.complex64 if real.dtype == xp.float32 else xp.complex128
        return xp.astype(real, kind) + 1j * xp.astype(imaginary, kind)

    def adjoint(self, array: Array) -> Array:
        """Return the conjugate transposes of the matrices."""
        return self.conj(self.namespace(array).matrix_transpose(array))

    def svd(self, array: Array) -> tuple[Array, Array, Array]:
        """Return the reduced singular value decompositions U, S, Vh of the matrices, with S descending."""
        u, s, vh = self.namespace(array).linalg.svd(array, full_matrices=False)
        return u, s, vh

    def svdvals(self, array: Array) -> Array:
        """Return the singular values of the matrices, descending: shape (..., min(rows, columns))."""
        return self.namespace(array).linalg.svdvals(array)

    def eigh(self, array: Array) -> tuple[Array, Array]:
        """Return the eigenvalues, ascending, and the eigenvectors, as columns, of Hermitian matrices."""
        values, vectors = self.namespace(array).linalg.eigh(array)
        return values, vectors

    def eigvalsh(self, array: Array) -> Array:
        """Return the eigenvalues of Hermitian matrices, ascending."""
        return self.namespace(array).linalg.eigvalsh(array)

    def is_positive_definite(self, array: Array) -> Array:
        """Tell whether each Hermitian matrix is positive definite, up to rounding.

        The result is a boolean array without the last two axes. Override it if a Cholesky factorisation of the
        library reports which matrices of a batch fail: it is several times faster than eigenvalues.
        """
        return self.eigvalsh(array)[..., 0] > 0

    def map_blocks(
        self, function: BlockFunction, rows: np.ndarray[Any, Any], like: Array, *, row_bytes: int, budget: int
    ) -> Array | tuple[Array, ...]:
        """Apply `function` to consecutive blocks of `rows` and join the results along their first axis.

        Override it to compute several blocks at once, or to make one loop of a traced program. Results keep the order.

        Parameters
        ----------
        function : callable
            Takes a block of `rows` as an array on the device of `like`. Returns an array, or a tuple of arrays, whose
            first axis is that of the block. If all blocks have one result each, as for a sum over a block, that axis
            has extent 1.
        rows : numpy.ndarray
            A host table with one row for each item of work.
        like : array
            Gives the device of the blocks.
        row_bytes : int
            Bytes of working memory that one row needs.
        budget : int
            Bytes of working memory that all blocks computed at one time may take. A block has at least one row.
        """
        blocks = split_rows(rows, max(1, budget // max(1, row_bytes)))
        return self.concatenate([function(self.asarray_like(block, like)) for block in blocks])

    def map_prepared(
        self,
        prepare: Prepare,
        rows: np.ndarray[Any, Any],
        arrays: tuple[Array, ...],
        static: tuple[Any, ...],
        budget: int,
    ) -> Array | tuple[Array, ...]:
        """Make a function of blocks from arrays, once, and map it over `rows` as `map_blocks` does.

        Override it if a lazy library computes blocks as separate tasks, or if arrays lie on several devices. Each
        task or device then gets the arrays, which are small, and calls `prepare` itself.

        Parameters
        ----------
        prepare : callable
            ``prepare(*arrays, *static)`` returns a `BlockWork`. It is defined at the top level of a module, so it can
            be pickled.
        rows : numpy.ndarray
            As for `map_blocks`.
        arrays : tuple of arrays
            A kernel first, and then arrays of at most about its size.
        static : tuple
            Further arguments, which are hashable and can be pickled.
        budget : int
            As for `map_blocks`.
        """
        work = prepare(*arrays, *static)
        return self.map_blocks(work.function, rows, arrays[0], row_bytes=work.row_bytes, budget=budget)

    def map_groups(
        self, function: Callable[[Any], list[Any]], groups: Sequence[Any], costs: Sequence[float], like: Array
    ) -> list[list[Any]]:
        """Return ``function(group)`` for each group, a sequence: a list with one result for each member.

        Override it if threads gain: `function` may get parts of a group, and be called in several threads at once.
        `costs` are operations on each group, to an order of magnitude. `like` is an array that `function` uses.
        """
        return [function(group) for group in groups]

    def single_threaded(self) -> AbstractContextManager[object]:
        """Return a context manager that keeps the library to the caller's thread.

        Override it if the library uses threads of its own, which would slow down the threads that compute other blocks.
        """
        return contextlib.nullcontext()

    def products_context(self, side: int) -> AbstractContextManager[object]:
        """Return a context manager for products and Cholesky factorisations of many matrices of shape (side, side).

        Override it if such work needs another number of threads than decompositions do.
        """
        return contextlib.nullcontext()

    def batch_size(self, count: int) -> int:
        """Return the number of rows, at least `count`, to which a batch of `count` rows should be filled up.

        Override it if the library compiles for each shape, to have few different sizes.
        """
        return count

    def run(self, function: Callable[..., Any], arrays: tuple[Array, ...], static: tuple[Any, ...]) -> Any:
        """Return ``function(*arrays, *static)``.

        `function` is pure. Override it to compile it once for each combination of shapes and static arguments.
        """
        return function(*arrays, *static)

    def prefers_host(self, arguments: Any, *, search: bool = False) -> bool:
        """Tell whether a call with these arguments, a tree, should be made by `run_on_host`.

        Override it if NumPy is faster: return True where all arrays have values in host memory. A `search` makes many
        calls on small arrays, and its results have no derivatives.
        """
        return False

    def run_on_host(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
        """Return ``function(*arguments, **options)``, computed with NumPy arrays, as arrays of this library."""
        raise NotImplementedError

    def call_host(
        self,
        function: Callable[..., tuple[Any, ...]],
        arrays: tuple[Array, ...],
        results: tuple[ArraySpec, ...],
        otherwise: Callable[..., tuple[Array, ...]],
        *,
        gradient: Callable[..., tuple[Any, ...]] | None = None,
    ) -> tuple[Array, ...]:
        """Return ``otherwise(*arrays)``, or in code that is traced for a CPU ``function(*arrays)``.

        Override it if a program of the library, or the library itself, can call the host. `function` takes NumPy
        arrays and may read their values; `results` describes its results. `otherwise` is pure, returns the same
        up to rounding, and gives the derivatives. `gradient` returns the results and an array D like the first
        argument: the first result changes by ``Re sum(D * change)``, and everything else is constant.
        """
        return otherwise(*arrays)

    def run_on_values(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
        """Return ``function(*arguments, **options)`` for a function whose control flow depends on array values.

        Override it if the library is lazy: compute the arrays among the arguments, and return arrays of this library.
        """
        return function(*arguments, **options)

    def run_to_number(self, function: Callable[..., Any], kernel: Array, *static: Any) -> Array:
        """Return ``function(kernel, *static)`` for a function whose control flow depends on array values.

        The result is a real 0-d array with the precision of `answer_dtype`. Override it if the library is lazy:
        return a lazy number, and call the function only when the number is computed.
        """
        return function(kernel, *static)

    def concatenate(self, results: list[Any]) -> Array | tuple[Array, ...]:
        """Join the results of blocks, either arrays or tuples of arrays, along their first axis."""
        if len(results) == 1:
            return results[0]
        if isinstance(results[0], tuple):
            return tuple(self.concatenate(list(parts)) for parts in zip(*results, strict=True))
        return self.namespace(results[0]).concat(results, axis=0)

    def repeat(
        self, function: Callable[..., tuple[Array, ...]], state: tuple[Array, ...], count: int, like: Array
    ) -> tuple[Array, ...]:
        """Apply ``state = function(*state)`` `count` times and return the last state.

        The state keeps its shapes and dtypes. `like` is an array that `function` uses. If it is traced, a library may
        override this method with a loop of its own, which traces `function` once.
        """
        for _ in range(count):
            state = function(*state)
        return state

    def computation_context(self, like: Array) -> AbstractContextManager[object]:
        """Return a context manager that the core enters while it computes with `like`, a kernel.

        Override it if products must be told to keep all digits, or to set a number of threads.
        """
        return contextlib.nullcontext()

    # ---- transformations of functions -------------------------------------------------------------

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return `function`, a function of arrays, compiled; None if the library does not compile.

        The conformance suite calls the compiled function to test what the core does under tracing.
        """
        return None

    def grad(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return the gradient of a scalar function by its first argument; None if the library has no gradients."""
        return None

    def vmap(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return `function` mapped over a new leading axis of its argument; None if the library cannot."""
        return None
