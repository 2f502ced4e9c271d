"""Files that come into being whole."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: Path, content: bytes, beside: Path | None = None) -> None:
    """Write a file so that another program sees the old content or the new one, never a part; see `replacing`."""
    if path.exists() and not path.is_file():  # such as /dev/null
        path.write_bytes(content)
        return
    with replacing(path, beside=beside) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path, like: Path | None = None, beside: Path | None = None) -> Iterator[Path]:
    """Lend a file beside `path`, which takes its place at the end; if an error comes first, all is as before.

    It lies beside `beside` instead, in the same file system, where that is given.

    A link stays, and what it leads to is replaced. The permissions are those of the old file; of `like` where
    there is none, and where that is not given as the system makes them. The name ends as that of `like` or `path`.
    """
    target = path.resolve()
    example = target if target.exists() else like
    place = beside.resolve() if beside is not None else target
    partial = place.with_name(f".{place.name}.{secrets.token_hex(4)}.part{(like or target).suffix}")
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if example else 0o666))
    try:
        yield partial
        _to_disk(partial)
        if example is not None:
            partial.chmod(stat.S_IMODE(example.stat().st_mode))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":
        _to_disk(target.parent)


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
