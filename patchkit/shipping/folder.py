"""A folder that is there whole or not at all: written beside its place, made durable, then renamed.

Promises: nothing that lies at the place is ever touched; a failure or a kill leaves nothing there. What a
kill leaves beside it has a name that `files.is_temporary` knows; it is locked as long as somebody writes into
it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from patchkit.errors import WouldOverwrite
from patchkit.files import fsync_tree, move_durably, temporary_beside, writing

__all__ = ["new_folder", "refuse_existing"]


def refuse_existing(out: Path) -> None:
    """`WouldOverwrite` where anything lies at ``out``, a dangling link too."""
    if out.is_symlink() or out.exists():
        raise WouldOverwrite(f"{out}: is there already; name a new place")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder to write into, which is at ``out`` when the block has ended well.

    `WouldOverwrite` where something is there already, `NotWritten` where it cannot be written.
    """
    refuse_existing(out)
    missing = [parent for parent in out.parents if not parent.exists()]
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        place = temporary_beside(out)
        place.mkdir()  # as the umask has it, which mkdtemp does not ask
        handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield place
        fsync_tree(place)
        move_durably(place, out)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        with suppress(OSError):  # another may have put something there meanwhile
            for parent in missing:
                parent.rmdir()
        raise
    finally:
        os.close(handle)
