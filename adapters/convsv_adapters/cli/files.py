"""Files that are written as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["replacing", "replacing_together", "why_not_writable", "write_whole"]


def write_whole(path: Path, content: bytes, beside: Path | None = None) -> None:
    """Write a file so that another program sees the old content or the new content, never a part.

    A device such as /dev/null is written to directly. For `beside` see `replacing`.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    with replacing(path, beside=beside) as partial:
        partial.write_bytes(content)


def why_not_writable(path: Path) -> str:
    """Return why no file can be written in the folder that holds `path`, or "" if one can.

    A file is made in the folder and removed, because permissions alone do not tell of a disk that is read-only.
    A folder or a device at `path` is asked for its own permission.
    """
    target = path.resolve()
    if target.exists() and not target.is_file() and not target.is_dir():
        return "" if os.access(target, os.W_OK) else "no permission to write"
    folder = target if target.is_dir() else target.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"no file can be written in {folder}: {error.strerror or error}"


@contextlib.contextmanager
def replacing(path: Path, like: Path | None = None, beside: Path | None = None) -> Iterator[Path]:
    """Yield the path of a new file, which replaces the file at `path` when the block ends without an error.

    After an error the new file is removed, and the file at `path` is as before. If `path` is a symbolic link, the
    link stays and the file that it leads to is replaced.

    Parameters
    ----------
    path : Path
        The file to replace or to make.
    like : Path, optional
        The example for the permissions of a file that does not exist yet, and for the suffix of the new file's
        temporary name. Without it, the permissions are the system's default and the suffix is that of `path`.
    beside : Path, optional
        A path in the same file system. The new file lies in its folder until it is complete; by default it lies in
        the folder of `path`.

    Raises
    ------
    OSError
        A file cannot be made, written or replaced.
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


@contextlib.contextmanager
def replacing_together(targets: Sequence[Path], like: Sequence[Path]) -> Iterator[Path]:
    """Yield the path of a new index, which with the files beside it replaces an index and its files at the end.

    The new files are written to a folder of their own, and take their places when the block ends without an error.
    After an error the folder is removed, and the files are as before. The old index is removed before the first file
    is replaced, and the new index comes last. So no index ever stands beside files of which some are old.

    Parameters
    ----------
    targets : sequence of Path
        The index, and the files that it lists. They lie in one folder, which is made unless it exists.
    like : sequence of Path
        The example for the permissions of each file.

    Raises
    ------
    OSError
        A file cannot be made, written or replaced.
    """
    index, folder = targets[0], targets[0].parent
    place = folder if folder.is_dir() else folder.parent
    partial = place / f".{folder.name}.{secrets.token_hex(4)}.part"
    partial.mkdir()
    try:
        yield partial / index.name
        for target, example in zip(targets, like, strict=True):
            _to_disk(partial / target.name)
            (partial / target.name).chmod(stat.S_IMODE(example.stat().st_mode))
        folder.mkdir(exist_ok=True)
        index.unlink(missing_ok=True)
        for target in (*targets[1:], index):
            os.replace(partial / target.name, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if os.name == "posix":
        _to_disk(folder)


def _to_disk(path: Path) -> None:
    """Wait until the content of a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
