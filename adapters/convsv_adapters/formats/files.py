"""The beginning of a file, by which a reader recognises its format, and what damaged archives raise."""

from __future__ import annotations

import contextlib
import lzma
import zipfile
import zlib
from pathlib import Path

__all__ = ["DAMAGED_ZIP", "first_bytes", "zip_members"]

DAMAGED_ZIP = (EOFError, OSError, RuntimeError, ValueError, lzma.LZMAError, zipfile.BadZipFile, zlib.error)
"""These are the errors of `zipfile` for an archive that is damaged, or encrypted, or compressed in an unknown way."""


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first `count` bytes of a file, or all bytes of a shorter file."""
    with path.open("rb") as file:
        return file.read(count)


def zip_members(path: Path) -> list[str]:
    """Return the names in a zip archive; only the first name if it is truncated, [] if the file is no archive."""
    with path.open("rb") as file:
        with contextlib.suppress(*DAMAGED_ZIP), zipfile.ZipFile(file) as archive:
            return archive.namelist()
        file.seek(0)
        header = file.read(30)  # a local file header: its signature comes first, the length of the name at byte 26
        if header[:4] != b"PK\x03\x04" or len(header) < 30:
            return []
        return [file.read(int.from_bytes(header[26:28], "little")).decode(errors="replace")]
