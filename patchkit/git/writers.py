"""One writer at a time: the lock that every patchkit command holds while it writes to a repository.

The system frees it when its holder is killed. It comes with an empty folder for files on their way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from patchkit.errors import Busy
from patchkit.files import writing

if TYPE_CHECKING:
    from patchkit.git.store import GitStore

__all__ = ["INCOMING", "LOCK", "PATIENCE", "writers_lock"]

LOCK = "lock"
INCOMING = "incoming"

PATIENCE = 10.0  # seconds to wait for another writer


@contextlib.contextmanager
def writers_lock(store: GitStore) -> Iterator[Path]:
    """Hold the writers' lock (freed by the system when we are killed); yields an empty folder."""
    private = store.private
    with writing(private):
        private.mkdir(parents=True, exist_ok=True)
        handle = os.open(private / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _wait_for(handle, private / LOCK)
        incoming = private / INCOMING
        with writing(incoming):
            shutil.rmtree(incoming, ignore_errors=True)  # whoever made it was killed: the lock is ours
            staging = incoming / secrets.token_hex(8)
            staging.mkdir(parents=True)
        try:
            yield staging
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
    finally:
        os.close(handle)


def _wait_for(handle: int, path: Path) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise Busy(
                    f"{path}: cannot be locked ({error.strerror}); keep .git on a local disk"
                ) from error
        if time.monotonic() > until:
            raise Busy(f"{path}: another patchkit command is writing here; wait for it, then try again")
        time.sleep(0.02)
