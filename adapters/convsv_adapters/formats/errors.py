"""The errors of the readers: one line that names the file and the reason."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from convsv_core.layers import ModelError
from convsv_core.plugins import one_line

__all__ = ["damaged", "load_library"]


def load_library(name: str, path: Path, extra: str) -> Any:
    """Import the library that the format of `path` needs.

    Raises `ModelError` with the command that installs convsv's `extra` if the library is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModelError(f"{path}: reading it needs {error.name}: pip install 'convsv[{extra}]'") from None


def damaged(path: Path, kind: str, error: BaseException) -> ModelError:
    """Return the error for a file that cannot be read as `kind`, such as "an .npz archive"."""
    reason = one_line(error, with_type=isinstance(error, LookupError))  # whose text is the key alone
    return ModelError(f"{path}: not {kind}, or a damaged one: {reason}")
