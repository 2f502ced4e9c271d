"""Import the libraries of the extras, which a report needs for one of its calls."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["import_for"]


def import_for(module: str, call: str, extra: str) -> Any:
    """Import a module for one call, or say which extra brings the library that is missing.

    Raises
    ------
    ModuleNotFoundError
        Its `name` is the name of the missing library.

    Examples
    --------
    >>> import_for("json", "to_json", "all").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        message = f"{call} needs {error.name}: pip install 'convsv[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from None
