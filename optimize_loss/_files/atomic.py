"""Write a file atomically: completely or not at all."""

import contextlib
import errno
import glob
import os
import pathlib
import secrets
from collections.abc import Iterable
from typing import Any, BinaryIO


def write_whole(path: pathlib.Path, parts: Iterable[Any]) -> None:
    """Put a file in the place of the one at `path`, if any, once all of it is on the disk.

    The parts go to a temporary file beside it, which is synced and renamed; then the folder is
    synced. If anything fails, the old file stays and the temporary one is removed. Where the
    process was killed, the next write of that name removes it. Of several writers at once the last
    wins; each writes a file of its own.

    Args:
      path: of the file; its folder must exist.
      parts: objects with the buffer protocol, in order.

    Raises:
      OSError: the disk is full, or there is no right to write; it has the path.
      ValueError: `path` is a symbolic link or a device, whose place the file would take.
    """
    _check_replaceable(path)
    sweep(path.parent, glob.escape(path.name))
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(8)}")
    try:
        with _created(temporary) as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # while the lock is held
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            _name(error, path)
        raise
    _sync_folder(path.parent)


def _name(error: OSError, path: pathlib.Path) -> None:
    """Make an error tell of the file that the user knows, and not of the temporary one."""
    error.filename = str(path)
    if error.filename2 is not None:
        del error.filename2


def _check_replaceable(path: pathlib.Path) -> None:
    if path.is_symlink():
        raise ValueError(f"`path` must not be a symbolic link. Received: path={str(path)!r}.")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise ValueError(f"`path` must not be a device. Received: path={str(path)!r}.")


def sweep(folder: pathlib.Path, names: str) -> None:
    """Remove temporary files that killed processes have left.

    Args:
      folder: where to look.
      names: a glob of the names that were to be written.
    """
    for stray in folder.glob(f".{names}.tmp-*"):
        with contextlib.suppress(OSError), stray.open("rb") as file:
            if _locked(file, wait=False):  # its writer, while it lives, holds the lock
                stray.unlink()


def _created(path: pathlib.Path) -> BinaryIO:
    """Return a new file, locked, with the rights that the user's mask leaves."""
    while True:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb")
        # Another writer may be about to sweep it, and has it locked then. Once that is done, what
        # has a name still is not swept any more.
        _locked(file, wait=True)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()


def _locked(file: BinaryIO, *, wait: bool) -> bool:
    """Lock a file, if no other has it locked or once none has. False where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync_folder(folder: pathlib.Path) -> None:
    """Make the new name last, where folders can be synced."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
