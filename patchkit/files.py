"""Files that survive a kill or a power cut: write, move, copy, and make durable.

Promises: a file written here is the old one or the new one, whole, at every moment; when a call
returns, its effect is on the disk. A copy never shares storage that a later write would reach
(reflinks do copy on write; hard links are never made). Failures are `NotWritten`, in one line.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from patchkit.errors import BadInput, NotFound, NotWritten, WouldOverwrite

__all__ = [
    "clone_file",
    "fsync_folder",
    "fsync_tree",
    "is_held",
    "is_temporary",
    "mark_used",
    "move_durably",
    "reading",
    "standard_input",
    "sync",
    "temporary_beside",
    "write_durably",
    "writing",
]

_FICLONE = 0x40049409  # linux/fs.h: share a file's extents, copied on write
_PIECE = 8 << 20
_TEMPORARY = (".patchkit-", ".tmp")
_CANNOT_SHARE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say every failure of the operating system inside as one `NotWritten` line about ``path``."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise NotWritten(f"{where}: {reason}; make room or give write access, then try again") from error


def standard_input(limit: int = -1) -> bytes:
    """All of standard input, or its first ``limit`` bytes; `NotFound` where it is closed."""
    if sys.stdin is None:
        raise NotFound("standard input: is closed; name a file, or give something to read")
    return sys.stdin.buffer.read(limit)


@contextmanager
def reading(path: Path, *, follow: bool = True) -> Iterator[BufferedReader]:
    """Open a regular file to read it; ``follow`` symbolic links or refuse them.

    `NotFound` when it cannot be opened or read, `BadInput` when it is a folder, a pipe or the like.
    """
    extra = os.O_NONBLOCK if follow else os.O_NONBLOCK | os.O_NOFOLLOW  # a pipe must not hang us
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | extra)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadInput(f"{path}: is not a regular file; take it out of the folder")
            yield file
    except IsADirectoryError:
        raise BadInput(f"{path}: is a folder, not a file") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise NotFound(f"{path}: cannot be read ({reason})") from error


def write_durably(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``: a temporary file beside it, fsync, rename, fsync of the folder."""
    temporary = temporary_beside(path)
    with writing(path):
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                sync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        fsync_folder(path.parent)


def move_durably(src: Path, dst: Path) -> None:
    """Rename ``src`` (a file or a folder, fsynced already) to ``dst``, which must not exist.

    Across file systems the tree is copied beside ``dst``, made durable and renamed there, so that
    ``dst`` is never seen half there.
    """
    if os.path.lexists(dst):
        raise WouldOverwrite(f"{dst}: is there already; move it away first")
    with writing(dst):
        try:
            os.rename(src, dst)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _move_across(src, dst)
        fsync_folder(dst.parent)
        fsync_folder(src.parent)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    with writing(path):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            sync(handle)
        finally:
            os.close(handle)


def fsync_tree(path: Path) -> None:
    """Make every file and folder at and below ``path`` durable; symbolic links are not followed."""
    with writing(path):
        if not path.is_dir():
            _fsync_file(path)
            return
        for folder, _, names in os.walk(path, topdown=False):
            for name in names:
                _fsync_file(Path(folder, name))
            fsync_folder(Path(folder))


def clone_file(src: Path, dst: Path, report: Callable[[int], None] | None = None) -> None:
    """Copy the regular file that ``src`` leads to (links followed) to ``dst``, which must not exist.

    Shares extents where the file system can (a reflink), else copies inside the kernel, else by
    reading and writing. ``report`` is told the bytes of each piece copied. Not fsynced.
    """
    with reading(src) as file:
        source = file.fileno()
        with writing(dst):
            target = os.open(dst, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                _fill(source, target, os.fstat(source).st_size, report or _silent)
            finally:
                os.close(target)


def sync(handle: int) -> None:
    """fsync that reaches the platter on every system (macOS keeps it for F_FULLFSYNC)."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        os.fsync(handle)
    else:
        fcntl.fcntl(handle, full)


def mark_used(path: Path) -> None:
    """Say by its time that a file that may be collected was used now; where that cannot be said, nothing."""
    with suppress(OSError):
        os.utime(path)


def is_temporary(name: str) -> bool:
    """Whether a file's name is one that an interrupted write of ours leaves behind."""
    return name.startswith(_TEMPORARY[0]) and name.endswith(_TEMPORARY[1])


def is_held(path: Path) -> bool:
    """Whether a process holds the lock of a file or folder."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def temporary_beside(path: Path) -> Path:
    """A new name in the same folder, which `is_temporary` knows."""
    return path.parent / secrets.token_hex(8).join(_TEMPORARY)


def _fsync_file(path: Path) -> None:
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        sync(handle)
    finally:
        os.close(handle)


def _move_across(src: Path, dst: Path) -> None:
    temporary = temporary_beside(dst)
    try:
        if src.is_dir() and not src.is_symlink():
            shutil.copytree(src, temporary, symlinks=True)
        else:
            shutil.copy2(src, temporary, follow_symlinks=False)
        fsync_tree(temporary)
        os.rename(temporary, dst)
    except BaseException:
        _remove(temporary)
        raise
    fsync_folder(dst.parent)  # the copy is safe before the original goes
    _remove(src)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fill(source: int, target: int, size: int, report: Callable[[int], None]) -> None:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:  # another file system, or one that cannot share extents
        _copy_in_kernel(source, target, report)
        _copy(source, target, report)  # what is left: all of it, or nothing
    else:
        report(size)


def _copy_in_kernel(source: int, target: int, report: Callable[[int], None]) -> None:
    if not hasattr(os, "copy_file_range"):
        return
    try:
        while count := os.copy_file_range(source, target, _PIECE):
            report(count)
    except OSError as error:
        if error.errno not in _CANNOT_SHARE:
            raise


def _copy(source: int, target: int, report: Callable[[int], None]) -> None:
    while piece := os.read(source, _PIECE):
        view = memoryview(piece)
        while view:
            count = os.write(target, view)
            report(count)
            view = view[count:]


def _silent(_: int) -> None:
    """Report to nobody."""
