"""Plugins: array backends and model readers, found by entry point, reported when broken, never raised."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar, overload

from convsv_core.backend import Array, Backend

if TYPE_CHECKING:
    import pluggy

    from convsv_core.layers import Layer, ReadOptions

ENTRY_POINT_GROUPS = ("convsv.backends", "convsv.readers", "convsv.models")

P = ParamSpec("P")
R = TypeVar("R")
Hook = TypeVar("Hook", bound=Callable[..., Any])

_loading = threading.Lock()


@overload
def hookimpl(function: Hook, /) -> Hook: ...
@overload
def hookimpl(**options: Any) -> Callable[[Hook], Hook]: ...
def hookimpl(function: Any = None, /, **options: Any) -> Any:
    """Mark a plugin's function as the implementation of the hook in `Hooks` that has its name.

    Use it as ``@hookimpl``, or as ``@hookimpl(tryfirst=True)`` with the options of `pluggy.HookimplMarker`.
    """
    import pluggy

    return pluggy.HookimplMarker("convsv")(function, **options)


class Hooks:
    """The hooks that a plugin of `convsv` may implement."""

    def convsv_backend(self) -> Backend:  # type: ignore[empty-body]
        """Hand over the `Backend` of one array library. Must not import that library."""

    def convsv_read_model(self, path: Path, options: ReadOptions) -> Sequence[Layer] | None:
        """Read every convolution of the model at `path`, or return None if the format is another.

        Layers come in the order of the network, from its input on. Raises `ModelError` for a file of
        this format that cannot be read.
        """

    def convsv_model_layers(self, model: object, example_input: object) -> Sequence[Layer] | None:
        """Find every convolution of a model object, or return None if it is of another framework.

        Must not import the framework before it knows that `model` is of it. Kernels may be arrays of any
        library that a backend owns. Layers come in the order of the model.
        """

    def convsv_write_model(self, path: Path, kernels: Mapping[str, Array], target: Path) -> bool | None:
        """Write the model at `path` to `target` with other kernels, or return None if the format is another.

        `kernels` maps ``layer.stored.key`` to a NumPy array of the kernel's shape, whose entries the stored
        dtype holds exactly. Nothing else may differ from `path`, which stays as it is. Returns True. Raises
        `ModelError` for a model of this format that cannot be written, `OSError` for a file that cannot.
        """


class BackendInfo(NamedTuple):
    """One row of `backends()`."""

    name: str
    available: bool
    reason: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]


class Plugins(NamedTuple):
    """The loaded plugins, and the reason for each that could not be loaded."""

    manager: pluggy.PluginManager
    backends: dict[str, Backend]
    broken: dict[str, str]


def plugins() -> Plugins:
    """Every installed plugin; entry points are read once, at first use."""
    with _loading:
        return _load()


@functools.cache
def _load() -> Plugins:
    import importlib.metadata

    import pluggy

    specify = pluggy.HookspecMarker("convsv")
    specify(Hooks.convsv_backend)
    for hook in (Hooks.convsv_read_model, Hooks.convsv_model_layers, Hooks.convsv_write_model):
        specify(hook, firstresult=True)
    manager = pluggy.PluginManager("convsv")
    manager.add_hookspecs(Hooks)
    installed = importlib.metadata.entry_points()
    found: dict[str, Backend] = {}
    broken: dict[str, str] = {}
    for group in ENTRY_POINT_GROUPS:
        for entry_point in sorted(installed.select(group=group), key=lambda e: (e.name, e.value)):
            try:
                plugin = entry_point.load()
                if manager.is_registered(plugin):  # the same distribution seen twice on sys.path
                    continue
                manager.register(plugin, name=f"{group}:{entry_point.name}")
                if group == "convsv.backends":
                    backend = plugin.convsv_backend()
                    found.setdefault(backend.name, backend)
            except Exception as error:  # a broken plugin is reported by backends() and harms no other
                broken[entry_point.name] = f"the plugin {entry_point.value} failed: {_one_line(error)}"
    return Plugins(manager, found, broken)


def backends() -> tuple[BackendInfo, ...]:
    """Report each array library that a plugin brings: whether it can be used here, or why not.

    Imports every library to see, so the first call takes seconds.

    Returns
    -------
    tuple of BackendInfo
        Named tuples with ``name``, ``available``, ``reason`` ("" when available), ``devices`` and
        ``dtypes`` (names; empty when unavailable). A plugin that failed to load has a row too.

    Examples
    --------
    >>> {row.name: row.available for row in backends()}["numpy"]
    True
    """
    loaded = plugins()
    rows = [_inspect(backend) for backend in loaded.backends.values()]
    rows += [BackendInfo(name, False, reason, (), ()) for name, reason in loaded.broken.items()]
    return tuple(rows)


def get_backend(name: str) -> Backend:
    """Return the backend called `name`; ValueError with the installed ones if there is none."""
    loaded = plugins()
    if name in loaded.backends:
        return loaded.backends[name]
    reason = loaded.broken.get(name, f"installed: {', '.join(loaded.backends)}")
    raise ValueError(f"backend={name!r}: no such backend ({reason})")


def backend_of(array: Array, argument: str = "kernel") -> Backend:
    """Return the backend that owns `array`; TypeError that says what is installed if none does."""
    loaded = plugins()
    for backend in loaded.backends.values():
        if backend.owns(array):
            return backend
    raise TypeError(
        f"{argument} is a {type(array).__module__}.{type(array).__qualname__}, not an array: wanted an array of "
        f"one of the installed libraries ({', '.join(loaded.backends)})"
        + (f", for example numpy.asarray({argument})" if isinstance(array, list | tuple | float | int) else "")
    )


def on_values(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function of a kernel and more, which looks at values to decide how it goes on, get arrays with values."""

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        # A task finds the function by its name, and that is this one.
        backend = backend_of(arguments[0] if arguments else options.get("kernel"))
        if backend.lazy:
            return backend.run_on_values(call, *arguments, **options)
        return function(*arguments, **options)

    return call


def _inspect(backend: Backend) -> BackendInfo:
    try:
        reason = backend.unavailable()
        if not reason:
            return BackendInfo(backend.name, True, "", backend.devices(), backend.dtypes())
    except Exception as error:  # as above: the fault of one plugin is that plugin's row
        reason = f"the plugin failed: {_one_line(error)}"
    return BackendInfo(backend.name, False, reason, (), ())


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
