"""Plugins: array backends and model readers, found by entry point.

A broken plugin is recorded and reported by `backends`. Its error is never raised.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar, overload

from convsv_core.backend import Array, Backend

if TYPE_CHECKING:
    import pluggy

    from convsv_core._network.graph import Graph
    from convsv_core._network.kinds import Kind
    from convsv_core._network.rule_types import KindRule
    from convsv_core.layers import Layer, ReadOptions

__all__ = [
    "ENTRY_POINT_GROUPS",
    "BackendInfo",
    "Hooks",
    "Plugins",
    "backend_of",
    "backends",
    "get_backend",
    "hookimpl",
    "on_host",
    "on_values",
    "one_line",
    "plugin_names",
    "plugins",
]

ENTRY_POINT_GROUPS = ("convsv.backends", "convsv.readers", "convsv.models", "convsv.networks")
"""The groups of entry points in which plugins are looked for, in this order."""

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

    Examples
    --------
    >>> @hookimpl
    ... def convsv_read_model(path, options):
    ...     return None
    """
    import pluggy

    return pluggy.HookimplMarker("convsv")(function, **options)


class Hooks:
    """Declare the hooks that a plugin of `convsv` may implement."""

    def convsv_backend(self) -> Backend:  # type: ignore[empty-body]
        """Return the `Backend` of one array library, without importing that library."""

    def convsv_read_model(self, path: Path, options: ReadOptions) -> Sequence[Layer] | None:
        """Return every convolution of the model at `path`, or None if the file has another format.

        With ``options.linear`` the dense layers are among them.

        The layers are in the order of the network, the input first. A `LayerList` also says what was left out.
        Raise `ModelError` for a file of this format that cannot be read.
        """

    def convsv_model_layers(self, model: object, example_input: object, linear: bool) -> Sequence[Layer] | None:
        """Return every convolution of a model object, or None if the model is of another framework.

        The layers are in the order of the model. Kernels may be arrays of any library that has a backend. With
        `linear` the dense layers are among them; an implementation without this argument leaves them out.
        Import the framework only after it is clear that `model` is of that framework.
        """

    def convsv_read_graph(self, path: Path, options: ReadOptions) -> Graph | None:
        """Return the network in the file at `path` as a graph, or None if the file has another format.

        Raise `ModelError` for a file of this format that cannot be read, or that holds no graph.
        """

    def convsv_model_graph(self, model: object, example_input: object) -> Graph | None:
        """Return a model object as a graph at inference, or None if the model is of another framework.

        `example_input` has the form that `convsv_model_layers` of the framework takes; trace a batch of one example.
        Import the framework only after it is clear that `model` is of that framework. Raise ValueError or TypeError
        where the call is wrong, such as for a model in training mode.
        """

    def convsv_network_rules(self) -> Mapping[type[Kind], KindRule]:  # type: ignore[empty-body]
        """Return the rules of further kinds of maps, which are subclasses of `convsv_core.networks.Kind`."""

    def convsv_write_model(self, path: Path, kernels: Mapping[str, Array], target: Path) -> bool | None:
        """Write the model at `path` to `target` with other kernels and return True, or None for another format.

        `kernels` maps ``layer.stored.key`` to a NumPy array of the kernel's shape, which for a dense layer has an axis
        more than the stored matrix. The stored dtype holds its entries exactly. Write nothing else that differs from
        `path`, and leave `path` unchanged. Write the other files of a model in several files beside `target`, under
        their own names. Raise `ModelError` for a model of this format that cannot be written, and `OSError` for a file
        that cannot be written.
        """

    def convsv_model_files(self, path: Path) -> Sequence[Path] | None:
        """Return the files of a model in several files, `path` first; None for one file or another format.

        The other files are in the folder of `path`. Raise `ModelError` if `path` does not tell them.
        """


class BackendInfo(NamedTuple):
    """Hold what `backends` reports about one array library.

    Attributes
    ----------
    name : str
    available : bool
        Whether the library can be used on this machine.
    reason : str
        Why the library cannot be used; "" if it can.
    devices, dtypes : tuple of str
        Names of the devices and dtypes; empty if the library cannot be used.
    """

    name: str
    available: bool
    reason: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]


class Plugins(NamedTuple):
    """Hold the loaded plugins.

    Attributes
    ----------
    manager : pluggy.PluginManager
    backends : dict
        Backends by name.
    broken : dict
        For each entry point that failed, by name, the reason.
    """

    manager: pluggy.PluginManager
    backends: dict[str, Backend]
    broken: dict[str, str]


def plugins() -> Plugins:
    """Return every installed plugin; the entry points are read once, at first use.

    Examples
    --------
    >>> sorted(plugins().backends)[-2:]
    ['numpy', 'torch']
    """
    with _loading:
        return _load()


@functools.cache
def _load() -> Plugins:
    """Load every installed plugin. The caller holds `_loading`, so that no two threads load at once."""
    import importlib.metadata

    import pluggy

    specify = pluggy.HookspecMarker("convsv")
    specify(Hooks.convsv_backend)
    specify(Hooks.convsv_network_rules)
    for hook in (
        Hooks.convsv_read_model,
        Hooks.convsv_read_graph,
        Hooks.convsv_model_layers,
        Hooks.convsv_model_graph,
        Hooks.convsv_write_model,
        Hooks.convsv_model_files,
    ):
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
                if manager.is_registered(plugin):  # A distribution may be on sys.path twice.
                    continue
                manager.register(plugin, name=f"{group}:{entry_point.name}")
                if group == "convsv.backends":
                    backend = plugin.convsv_backend()
                    found.setdefault(backend.name, backend)
            except Exception as error:  # Whatever a plugin raises, the other plugins must load.
                broken[entry_point.name] = f"the plugin {entry_point.value} failed: {one_line(error, with_type=True)}"
    return Plugins(manager, found, broken)


def backends() -> tuple[BackendInfo, ...]:
    """Report whether each array library that has a plugin can be used on this machine, or why not.

    The function imports every library, so the first call takes seconds.

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


def plugin_names(group: str) -> str:
    """Return the names of the installed plugins of a group of entry points, for a message; "" if there are none.

    Examples
    --------
    >>> "onnx" in plugin_names("convsv.readers")
    True
    """
    known = [name.partition(":") for name, _ in plugins().manager.list_name_plugin()]
    return ", ".join(sorted(name for place, _, name in known if place == group))


def get_backend(name: str) -> Backend:
    """Return the backend called `name`; raise ValueError, which lists the installed backends, if there is none.

    Examples
    --------
    >>> get_backend("numpy").devices()
    ('cpu',)
    """
    loaded = plugins()
    if name in loaded.backends:
        return loaded.backends[name]
    reason = loaded.broken.get(name, f"installed: {', '.join(loaded.backends)}")
    raise ValueError(f"backend={name!r}: no such backend ({reason})")


def backend_of(array: Array, argument: str = "kernel") -> Backend:
    """Return the backend that owns `array`; raise TypeError, which lists the installed libraries, if none does.

    `argument` is the name of the array in the error.

    Examples
    --------
    >>> import numpy as np
    >>> backend_of(np.zeros(3)).name
    'numpy'
    """
    loaded = plugins()
    for backend in loaded.backends.values():
        if backend.owns_array(array):
            return backend
    raise TypeError(
        f"{argument} is a {type(array).__module__}.{type(array).__qualname__}, not an array: wanted an array of "
        f"one of the installed libraries ({', '.join(loaded.backends)})"
        + (f", for example numpy.asarray({argument})" if isinstance(array, list | tuple | float | int) else "")
    )


def on_values(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: compute lazy arguments before calling a function whose control flow depends on array values.

    The function's first argument is a kernel, and its results have no derivatives. The kernel's backend computes the
    arguments if it is lazy. JAX and PyTorch hand arrays in the memory of the host over to NumPy.

    Examples
    --------
    >>> import numpy as np
    >>> on_values(lambda kernel: float(kernel.max()))(np.ones(3))
    1.0
    """
    return _elsewhere(function, search=True)


def on_host(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: call a function with NumPy arrays if its first argument is a kernel whose backend prefers that.

    Lazy arguments stay lazy.

    Examples
    --------
    >>> import numpy as np
    >>> on_host(lambda kernel: type(kernel).__name__)(np.ones(3))
    'ndarray'
    """
    return _elsewhere(function, search=False)


def _elsewhere(function: Callable[P, R], *, search: bool) -> Callable[P, R]:
    """Return the function, called in another library where the backend of its first argument wants that."""

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        # A task on another machine imports the function by its name, and this name is bound to `call`.
        backend = backend_of(arguments[0] if arguments else options.get("kernel"))
        if backend.lazy and search:
            return backend.run_on_values(call, *arguments, **options)
        if backend.prefers_host((arguments, options), search=search):
            return backend.run_on_host(call, *arguments, **options)
        return function(*arguments, **options)

    return call


def _inspect(backend: Backend) -> BackendInfo:
    """Return what `backends` reports about one backend."""
    try:
        reason = backend.unavailable()
        if not reason:
            return BackendInfo(backend.name, True, "", backend.devices(), backend.dtypes())
    except Exception as error:  # Whatever a plugin raises, the other plugins are reported.
        reason = f"the plugin failed: {one_line(error, with_type=True)}"
    return BackendInfo(backend.name, False, reason, (), ())


def one_line(error: BaseException, *, with_type: bool = False) -> str:
    r"""Return an error's message on one line, or the name of its type if the message is empty.

    With `with_type` the name of the type always comes first, as in "ValueError: not a kernel".

    Examples
    --------
    >>> one_line(ValueError("not a\nkernel"), with_type=True)
    'ValueError: not a kernel'
    """
    name = type(error).__name__
    return " ".join((f"{name}: {error}" if with_type else str(error)).split()) or name
