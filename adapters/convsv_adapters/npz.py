"""Reader of NumPy's .npz archives of kernels."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from convsv_adapters.parameters import layers_from_arrays, one_line, zip_members
from convsv_core.layers import Layer, ModelError, ReadOptions
from convsv_core.plugins import hookimpl


@hookimpl
def convsv_read_model(path: Path, options: ReadOptions) -> list[Layer] | None:
    """Read the kernels among the arrays of an .npz archive, in the archive's order."""
    members = zip_members(path)
    if path.suffix.lower() != ".npz" and not (members and all(name.endswith(".npy") for name in members)):
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ModelError(f"{path}: not an .npz archive")
            arrays = [(name, archive[name]) for name in archive.files]
    except (EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):
            reason = "is no archive, or holds pickled objects, which are never loaded"
            raise ModelError(f"{path}: {reason}") from None
        raise ModelError(f"{path}: not an .npz archive, or a damaged one: {one_line(error)}") from None
    return layers_from_arrays([(n, a) for n, a in arrays if isinstance(a, np.ndarray)], options, path)
