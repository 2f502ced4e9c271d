"""Read the convolutions of a model file, and write the file with other kernels, by the plugin that knows the format."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from convsv_core._geometry.plan import HostArray
from convsv_core.layers import LayerList, ModelError, ReadOptions
from convsv_core.plugins import plugins

__all__ = ["read_model", "write_model"]


def read_model(path: Path, options: ReadOptions | None = None) -> LayerList:
    """Read every convolution of a trained network with the first reader that knows its format.

    Parameters
    ----------
    path : Path
    options : ReadOptions, optional
        Shapes of the network's inputs, and other facts that the file may leave open.

    Returns
    -------
    LayerList
        The layers, in the order of the network, from its input on; and what the reader says of the file.

    Raises
    ------
    ModelError
        No reader knows the format, or the file cannot be read. One line.
    """
    loaded = plugins()
    try:
        layers = loaded.manager.hook.convsv_read_model(path=path, options=options or ReadOptions())
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    if layers is None:
        known = [name for name, _ in loaded.manager.list_name_plugin() if name.startswith("convsv.readers:")]
        readers = ", ".join(sorted(name.partition(":")[2] for name in known))
        raise ModelError(f"{path}: in no format that is known here ({readers or 'no reader is installed'})")
    return layers if isinstance(layers, LayerList) else LayerList(layers)


def write_model(path: Path, kernels: Mapping[str, HostArray], target: Path) -> None:
    """Write the model at `path` to `target` with other kernels, and nothing else changed.

    Parameters
    ----------
    path, target : Path
        Two different files.
    kernels : mapping from str to numpy.ndarray
        Kernels by the key of ``layer.stored``. The stored dtype holds their entries exactly.

    Raises
    ------
    ModelError
        No plugin writes the format, or the plugin cannot write this model. One line.
    OSError
        A file cannot be read or written.
    """
    if not kernels:
        shutil.copyfile(path, target)
    elif plugins().manager.hook.convsv_write_model(path=path, kernels=kernels, target=target) is None:
        raise ModelError(f"{path}: in no format that can be written here")
