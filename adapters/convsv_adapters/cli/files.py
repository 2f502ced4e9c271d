"""Writing a file whole: a reader sees the old content or the new, and no part of it."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing", "write_whole"]


def write_whole(path: Path, content: bytes, beside: Path | None = None) -> None:
    """Write a file so that another program sees the old content or the new one, never a part.

    `beside` is as for `replacing`.
    """
    if path.exists() and not path.is_file():  # such as /dev/null
        path.write_bytes(content)
        return
    with replacing(path, beside=beside) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path, like: Path | None = None, beside: Path | None = None) -> Iterator[Path]:
    """Yield the path of a new file, which takes the place of `path` at the end of the block.

    An error in the block removes the new file, and `path` is as before. If `path` is a link, the link stays and the
    file that it leads to is replaced.

    Parameters
    ----------
    path : Path
        The file to replace or to make.
    like : Path, optional
        The file whose suffix the new file has, and whose permissions if there is no file at `path`. Without it the
        new file has the suffix of `path`, and the permissions that the system gives if there is no file at `path`.
    beside : Path, optional
        The new file is made in the folder of this path, and not in that of `path`. Both must be in one file system.
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
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
