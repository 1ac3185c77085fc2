"""Git over a network or from another folder: what a place may be, and what its failures mean.

A place is a person's string. What Git would take as an option, or as a program to start
(`ext::sh -c …`), is refused before Git sees it, and forbidden to Git as well. No questions are
asked where nobody sits at the terminal.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from patchkit.errors import BadInput, NotFound, PatchkitError, Unavailable
from patchkit.git.command import Git
from patchkit.git.history import PATCHES
from patchkit.problem import one_line

if TYPE_CHECKING:
    from patchkit.git.store import GitStore

__all__ = ["bring_large", "checked_place", "name_for", "over_network", "shown_place"]

_NEVER = ("protocol.ext.allow=never", "protocol.fd.allow=never")
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.-]*::")
_SECRET = re.compile(r"(?<=://)[^/@\s]*@")


def checked_place(place: str, directory: Path) -> str:
    """``place`` as Git takes it: a folder by its whole path, else the address as it is; or `BadInput`."""
    shown = shown_place(place)
    if not place.strip() or place.startswith("-"):
        raise BadInput(f"{shown!r}: is no address of a repository; name a folder or a URL")
    if _HELPER.match(place):
        raise BadInput(f"{shown}: starts a program of this machine; name a folder, or an https or ssh URL")
    if any(not character.isprintable() for character in place):
        raise BadInput(f"{shown}: holds characters that no address has; name a folder or a URL")
    here = Path(directory, place).expanduser()
    return str(here.resolve()) if here.exists() else place


def shown_place(place: str) -> str:
    """An address for a message, without a user's name and password."""
    return one_line(_SECRET.sub("", place))[:200]


def name_for(place: str) -> str:
    """The folder that a clone of ``place`` gets, as Git names it."""
    path = re.sub(r"/+\.git$|\.git$|\.bundle$", "", place.rstrip("/"))
    name = re.split(r"[/:]", path.rstrip("/"))[-1]
    if not name or name.startswith((".", "-")):
        raise BadInput(f"{shown_place(place)}: gives no name for a folder; name one: patchkit clone URL DIR")
    return name


def bring_large(store: GitStore, remote: str, commit: str) -> None:
    """Get what the patches at ``commit`` keep in Git LFS and is not here; `Unavailable` where that fails."""
    wanted = [entry for entry in store.tree(commit).entries if entry.pointer]
    if all(store.media.has(entry.pointer) for entry in wanted if entry.pointer):
        return
    # What else the repository keeps there stays away; an odd folder's name would mean something in a pattern.
    plain = re.fullmatch(r"[\w./-]*", store.prefix)
    only = [f"--include={store.prefix}{PATCHES}/**"] if plain else []
    try:
        over_network(store.git, "lfs", "fetch", *only, remote, commit, place=remote)
    except PatchkitError as error:
        raise Unavailable(
            f"{shown_place(remote)}: what its patches keep in Git LFS could not be got ({error}); git lfs "
            "version says whether it is installed, see https://git-lfs.com"
        ) from error


def over_network(
    git: Git, command: str, *args: str, place: str = "", env: Mapping[str, str] | None = None
) -> bytes:
    """Run `clone`, `fetch` or `ls-remote`; `NotFound` or `Unavailable` in one line where it fails."""
    silent = {} if sys.stdin is not None and sys.stdin.isatty() else {"GIT_TERMINAL_PROMPT": "0"}
    try:
        return git.write(command, *args, config=_NEVER, env={**silent, **(env or {})})
    except PatchkitError as error:
        where = f"{shown_place(place)}: " if isinstance(error, NotFound | Unavailable) else ""
        raise error.retold(f"{where}{_SECRET.sub('', str(error))}") from error
