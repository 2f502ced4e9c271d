"""Read the convolutions of a model file, and write the file with other kernels, by the plugin that knows the format."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from convsv_core._geometry.plan import HostArray
from convsv_core.layers import LayerList, ModelError, ReadOptions
from convsv_core.plugins import plugin_names, plugins

__all__ = ["files_of_model", "read_model", "write_model"]


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

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "model.npz")
    ...     np.savez(path, first=np.ones((4, 3, 3, 3)))
    ...     (layer,) = read_model(path, ReadOptions(layout="OIHW"))
    >>> layer.name, layer.kernel.shape
    ('first', (4, 3, 3, 3))
    """
    try:
        layers = plugins().manager.hook.convsv_read_model(path=path, options=options or ReadOptions())
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    if layers is None:
        readers = plugin_names("convsv.readers") or "no reader is installed"
        raise ModelError(f"{path}: in no format that is known here ({readers})")
    return layers if isinstance(layers, LayerList) else LayerList(layers)


def files_of_model(path: Path) -> tuple[Path, ...]:
    """Return the files that hold a model, `path` first: more than one if `path` is the index of several files.

    Raises
    ------
    ModelError
        The file cannot be read, or does not tell its other files. One line.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "model.npz")
    ...     _ = path.write_bytes(b"")
    ...     files_of_model(path) == (path,)
    True
    """
    try:
        files = plugins().manager.hook.convsv_model_files(path=path)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    return (path,) if files is None else tuple(files)


def write_model(path: Path, kernels: Mapping[str, HostArray], target: Path) -> None:
    """Write the model at `path` to `target` with other kernels, and nothing else changed.

    The other files of a model in several files are written beside `target`, under their own names.

    Parameters
    ----------
    path, target : Path
        Two different files. If `path` is the index of several files, in two different folders.
    kernels : mapping from str to numpy.ndarray
        Kernels by the key of ``layer.stored``. The stored dtype holds their entries exactly.

    Raises
    ------
    ModelError
        No plugin writes the format, or the plugin cannot write this model. One line.
    OSError
        A file cannot be read or written.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path, target = Path(folder, "model.npz"), Path(folder, "half.npz")
    ...     np.savez(path, first=np.ones((4, 3, 3, 3)))
    ...     (layer,) = read_model(path, ReadOptions(layout="OIHW"))
    ...     write_model(path, {layer.stored.key: layer.kernel / 2}, target)
    ...     float(np.load(target)["first"].max())
    0.5
    """
    files = files_of_model(path)
    if len(files) > 1 and path.parent.resolve() == target.parent.resolve():
        raise ModelError(f"{path}: its files are not replaced: wanted a target in another folder than theirs")
    if not kernels:
        for file in files:
            shutil.copyfile(file, target if file is files[0] else target.parent / file.name)
    elif plugins().manager.hook.convsv_write_model(path=path, kernels=kernels, target=target) is None:
        raise ModelError(f"{path}: in no format that can be written here")
