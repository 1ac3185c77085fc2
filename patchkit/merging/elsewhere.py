"""The files that Git itself cannot merge: in the merge under way, and in one only looked at."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from patchkit.git.history import PATCHES

if TYPE_CHECKING:
    from patchkit.git.store import GitStore

__all__ = ["beside_patches", "elsewhere", "foreseen"]


def elsewhere(store: GitStore) -> list[str]:
    """Files that are still in conflict; once the patches are laid out these are not of patches."""
    out = store.git.read("diff", "--name-only", "--diff-filter=U", "--no-ext-diff", "-z")
    return [path for path in out.decode("utf-8", "surrogateescape").split("\0") if path]


def foreseen(store: GitStore, ours: str, theirs: str) -> list[str] | None:
    """Files that merging these commits would leave in conflict; None where Git cannot tell (before 2.38).

    The objects that Git makes on the way go to a folder that is thrown away.
    """
    args = ("--write-tree", "--name-only", "--no-messages", "-z", ours, theirs)
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "info").mkdir()
        (Path(place) / "info" / "alternates").write_bytes(os.fsencode(store.common_dir / "objects") + b"\n")
        status, out = store.git.check("merge_tree", *args, env={"GIT_OBJECT_DIRECTORY": place})
    if status not in (0, 1):
        return None
    _, *files = out.split("\0")
    return [file for file in files if file]


def beside_patches(store: GitStore, files: list[str]) -> list[str]:
    """Those that are no file of a patch of this stack."""
    return [file for file in files if not _of_patches(store, file)]


def _of_patches(store: GitStore, path: str) -> bool:
    parts = path.removeprefix(store.prefix).split("/")
    return path.startswith(store.prefix) and len(parts) == 3 and parts[0] == PATCHES
