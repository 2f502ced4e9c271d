"""What the core asks of an array library, with an answer for each question from the array API standard."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""An array of any library; the standard has no common class to name."""

BlockFunction: TypeAlias = Callable[[Array], "Array | tuple[Array, ...]"]

Prepare: TypeAlias = Callable[..., tuple[BlockFunction, int]]
"""A pure function of arrays to a function of blocks and the bytes of working memory that one row needs."""

DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")


class Backend:
    """An array library as a plugin describes it.

    Everything here is written with the array API standard, through array-api-compat, so that a new
    backend sets `name` and `module` and overrides what its library does otherwise or better. A
    backend's own module must not import its library: `module` names it, and it is imported at first use.

    Attributes
    ----------
    name : str
        What users call it, as in ``convsv spectrum --backend NAME``.
    module : str
        Import name of the array library.
    lazy : bool
        Whether an array has no values until its user asks for them, so that none can be looked at before.
    compiles : bool
        Whether the library compiles its operations anew for each shape, which makes batches of many sizes slow.
    """

    name: str = ""
    module: str = ""
    lazy: bool = False
    compiles: bool = False

    # ---- what it owns and has, here and now ------------------------------------------------------

    def owns_array(self, array: object) -> bool:
        """Whether `array` belongs to this library; must not import it."""
        return type(array).__module__.partition(".")[0] == self.module

    def unavailable(self) -> str:
        """Why the library cannot be used on this machine, or "" if it can. Imports the library."""
        try:
            importlib.import_module(self.module)
        except Exception as error:  # whatever an import raises is the reason that is reported
            return f"{self.module} cannot be imported: {error}"
        return ""

    def devices(self) -> tuple[str, ...]:
        """Names of the devices there are, the default first."""
        return ("cpu",)

    def dtypes(self, device: str | None = None) -> tuple[str, ...]:
        """Names of the kernel dtypes that `asarray` can make on `device`."""
        xp = self.library()
        return tuple(name for name in DTYPES if hasattr(xp, name))

    # ---- arrays ----------------------------------------------------------------------------------

    def library(self) -> ModuleType:
        """The library's array namespace, for making arrays."""
        return importlib.import_module(self.module)

    def namespace(self, array: Array) -> ModuleType:
        """The standard-conforming namespace of `array`."""
        import array_api_compat

        namespace: ModuleType = array_api_compat.array_namespace(array)
        return namespace

    def asarray(self, array: Any, *, dtype: str | None = None, device: str | None = None) -> Array:
        """Make an array of this library from a NumPy array, of `dtype` and on `device` if given."""
        xp = self.library()
        return xp.asarray(array, dtype=None if dtype is None else getattr(xp, dtype), device=device)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """Copy `array` to the host as a NumPy array (bfloat16 as float32)."""
        return np.asarray(array)

    def asarray_like(self, array: np.ndarray[Any, Any], like: Array) -> Array:
        """Make a host table, such as angles or indices, an array beside `like`: its library and device."""
        import array_api_compat

        return self.namespace(like).asarray(array, device=array_api_compat.device(like))

    def in_one_piece(self, kernel: Array) -> Array:
        """`kernel` in one piece, where an array may lie in many."""
        return kernel

    def take(self, array: Array, places: np.ndarray[Any, Any], axis: int) -> Array:
        """Entries of `array` along `axis` at the places of a host table."""
        return self.namespace(array).take(array, self.asarray_like(places, array), axis=axis)

    def contiguous(self, array: Array) -> Array:
        """`array` laid out in the order of its axes, where that is the user's to say."""
        return array

    def has_values(self, array: Array) -> bool:
        """Tell whether the numbers of `array` can be read now: not under tracing."""
        return not self.lazy

    def truth(self, condition: Array) -> bool | None:
        """Return a 0-d boolean array as a bool, or None where tracing leaves it without a value."""
        return bool(condition)

    def stop_gradient(self, array: Array) -> Array:
        """`array` as a constant to automatic differentiation."""
        return array

    def has_fast_float64(self, array: Array) -> bool:
        """Whether float64 arithmetic is to be had beside `array` at no more than about twice the cost."""
        return False

    # ---- dispatched operations -------------------------------------------------------------------

    def fftn(self, array: Array, axes: tuple[int, ...]) -> Array:
        """Discrete Fourier transform over `axes`, complex to complex, unnormalised."""
        return self.namespace(array).fft.fftn(array, axes=axes)

    def ifftn(self, array: Array, axes: tuple[int, ...]) -> Array:
        """Inverse of `fftn`."""
        return self.namespace(array).fft.ifftn(array, axes=axes)

    def conj(self, array: Array) -> Array:
        """Complex conjugate; `array` itself where it is real."""
        xp = self.namespace(array)
        return xp.conj(array) if xp.isdtype(array.dtype, "complex floating") else array

    def complex(self, real: Array, imaginary: Array) -> Array:
        """Complex numbers from their parts, which are of one dtype."""
        xp = self.namespace(real)
        kind = xp.complex64 if real.dtype == xp.float32 else xp.complex128
        return xp.astype(real, kind) + 1j * xp.astype(imaginary, kind)

    def adjoint(self, array: Array) -> Array:
        """Conjugate transposes of the matrices in the last two axes."""
        return self.conj(self.namespace(array).matrix_transpose(array))

    def svd(self, array: Array) -> tuple[Array, Array, Array]:
        """Reduced singular value decompositions U, S, Vh of the matrices in the last two axes."""
        u, s, vh = self.namespace(array).linalg.svd(array, full_matrices=False)
        return u, s, vh

    def svdvals(self, array: Array) -> Array:
        """Singular values, descending, of the matrices in the last two axes."""
        return self.namespace(array).linalg.svdvals(array)

    def eigh(self, array: Array) -> tuple[Array, Array]:
        """Eigenvalues, ascending, and eigenvectors of the Hermitian matrices in the last two axes."""
        values, vectors = self.namespace(array).linalg.eigh(array)
        return values, vectors

    def eigvalsh(self, array: Array) -> Array:
        """Eigenvalues, ascending, of the Hermitian matrices in the last two axes."""
        return self.namespace(array).linalg.eigvalsh(array)

    def is_positive_definite(self, array: Array) -> Array:
        """Whether each Hermitian matrix in the last two axes is positive definite, to rounding."""
        return self.eigvalsh(array)[..., 0] > 0

    def map_blocks(
        self, function: BlockFunction, rows: np.ndarray[Any, Any], like: Array, *, row_bytes: int, budget: int
    ) -> Array | tuple[Array, ...]:
        """Apply `function` to consecutive blocks of `rows` and concatenate what it returns.

        Parameters
        ----------
        function : callable
            Takes a block of `rows` as an array beside `like`; returns an array, or a tuple of arrays,
            whose first axis is the block's.
        rows : numpy.ndarray
            A host table with one row an item of work.
        like : array
            Says which library and device the blocks belong to.
        row_bytes : int
            Bytes of working memory that one row needs.
        budget : int
            Bytes of working memory that all blocks held at once may take. A block has one row at least.
        """
        results = [
            function(self.asarray_like(block, like)) for block in split_rows(rows, max(1, budget // max(1, row_bytes)))
        ]
        return self.concatenate(results)

    def map_prepared(
        self,
        prepare: Prepare,
        rows: np.ndarray[Any, Any],
        arrays: tuple[Array, ...],
        static: tuple[Any, ...],
        budget: int,
    ) -> Array | tuple[Array, ...]:
        """Make a function of blocks from arrays, once, and map it over `rows` as `map_blocks` does.

        A library whose arrays lie on many machines sends the arrays to each, and not what is made from them.

        Parameters
        ----------
        prepare : callable
            ``prepare(*arrays, *static)`` returns the function and its `row_bytes`; of a module's top level.
        rows : numpy.ndarray
            As for `map_blocks`.
        arrays : tuple of arrays
            A kernel, and others of at most about its size.
        static : tuple
            Further arguments, hashable.
        budget : int
            As for `map_blocks`.
        """
        function, row_bytes = prepare(*arrays, *static)
        return self.map_blocks(function, rows, arrays[0], row_bytes=row_bytes, budget=budget)

    def single_threaded(self) -> AbstractContextManager[object]:
        """Hold the library, while it is entered, to the caller's thread: where blocks have threads of their own."""
        return contextlib.nullcontext()

    def products_context(self, side: int) -> AbstractContextManager[object]:
        """What holds while blocks of many matrices of this side are multiplied and factorised, not decomposed."""
        return contextlib.nullcontext()

    def batch_size(self, count: int) -> int:
        """To how many rows a batch of `count`, which differs from call to call, is best filled up."""
        return count

    def run(self, function: Callable[..., Any], arrays: tuple[Array, ...], static: tuple[Any, ...]) -> Any:
        """Call ``function(*arrays, *static)``, a pure function of the array API.

        A library that compiles does so here, once for each combination of shapes and of the `static` arguments, which
        are hashable.
        """
        return function(*arrays, *static)

    def run_with_host(
        self,
        function: Callable[..., tuple[np.ndarray[Any, Any], ...]],
        templates: tuple[np.ndarray[Any, Any], ...],
        arrays: tuple[Array, ...],
        use: Callable[..., Any],
        otherwise: Callable[..., Any],
    ) -> Any:
        """Use what a function of NumPy arrays gives in traced code, where that is cheap.

        Parameters
        ----------
        function : callable
            From `arrays`, as NumPy arrays, to NumPy arrays; a constant to differentiation. It looks at values.
        templates : tuple of numpy.ndarray
            Arrays of the shapes and dtypes that `function` returns.
        arrays : tuple of arrays
        use, otherwise : callables
            Pure functions of the array API. ``use(*arrays, *results)`` takes arrays like the `templates`, and
            ``otherwise(*arrays)`` does without. Both return a tuple of arrays of the same shapes and dtypes.

        Returns
        -------
        tuple of arrays
            What `use` returns in a library that can call the host from compiled code, on a CPU. Here, what `otherwise`
            returns.
        """
        return otherwise(*arrays)

    def run_on_values(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
        """Call ``function(*arguments, **options)``, which looks at values to decide how it goes on.

        A library that is `lazy` computes the arrays among the arguments, and makes those of the answer its own.
        """
        return function(*arguments, **options)

    def run_to_number(self, function: Callable[..., Any], kernel: Array, *static: Any) -> Array:
        """Call ``function(kernel, *static)``, which looks at values and returns a real 0-d array in the answer's dtype.

        As `run_on_values`, but a library that is `lazy` does so when it is asked for the number.
        """
        return function(kernel, *static)

    def concatenate(self, results: list[Any]) -> Array | tuple[Array, ...]:
        """Join the results of blocks, arrays or tuples of arrays, along the first axis."""
        if len(results) == 1:
            return results[0]
        if isinstance(results[0], tuple):
            return tuple(self.concatenate(list(parts)) for parts in zip(*results, strict=True))
        return self.namespace(results[0]).concat(results, axis=0)

    def repeat(
        self, function: Callable[..., tuple[Array, ...]], state: tuple[Array, ...], count: int, like: Array
    ) -> tuple[Array, ...]:
        """Apply `function` `count` times: ``state = function(*state)``, of constant shapes and dtypes.

        Where `like`, an array that `function` uses, is traced, a library may trace `function` once only, so that
        the program's size does not grow with `count`.
        """
        for _ in range(count):
            state = function(*state)
        return state

    def computation_context(self, like: Array) -> AbstractContextManager[object]:
        """What holds while a call computes with arrays such as `like`: products keep the digits of their dtype."""
        return contextlib.nullcontext()

    # ---- transformations of functions, None where the library has none ----------------------------

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Compile `function` of arrays."""
        return None

    def grad(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return the gradient, by its first argument, of a scalar function."""
        return None

    def vmap(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Map `function` over a new leading axis of its argument."""
        return None


def split_rows(rows: np.ndarray[Any, Any], size: int) -> Iterator[np.ndarray[Any, Any]]:
    """Consecutive blocks of at most `size` rows, as equal as may be."""
    count = max(1, -(-len(rows) // size))
    return iter(np.array_split(rows, count))
