"""Moves the branch that is checked out to another commit, and the work tree with it.

The order is that of a commit: work tree and index first, the reference last, by Git's own
compare-and-swap. A kill before the reference leaves files that `locks.leftovers` names; after it
all is done. What is not committed stays, or the move is refused before anything is written.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from patchkit.errors import Busy, NotFound, PatchkitError, WouldOverwrite
from patchkit.git.command import ACTION
from patchkit.git.writers import writers_lock
from patchkit.problem import one_line

if TYPE_CHECKING:
    from patchkit.git.store import GitStore

__all__ = ["Step", "check_there", "current_branch", "move_branch", "pushed", "reflog"]

_IN_THE_WAY = re.compile(
    r"Entry '(.+)' not uptodate|Entry '(.+)' would be overwritten|"
    r"Untracked working tree file '(.+)' would be|Updating '(.+)' would lose untracked"
)
_OWN_TRAILER = re.compile(r"^patchkit-(?!accept:)[a-z-]+:", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a branch's reflog: where it went, from where (None: it began there), and who moved it.

    ``date``: when it was moved, which may be long after the commit. ``own``: a command of patchkit's did;
    ``did`` is what the reflog says of it.
    """

    to: str
    before: str | None
    did: str
    date: datetime
    own: bool

    def to_dict(self) -> dict[str, str | None]:
        return {"to": self.to, "before": self.before, "did": self.did, "date": self.date.isoformat()}


def current_branch(store: GitStore) -> str:
    """The full name of the branch that is checked out; `NotFound` on none."""
    found = store.git.ask("symbolic_ref", "--quiet", "HEAD")
    if found is None:
        raise NotFound("no branch is checked out (a detached HEAD); go to one first: git switch BRANCH")
    return os.fsdecode(found).strip()


def reflog(store: GitStore, branch: str) -> list[Step]:
    """The branch's own reflog, newest first. Empty where it has none, or it does not lead to its tip."""
    fields = "%H%x00%gd%x00%gs%x00%(trailers:only,unfold)%x00"
    try:
        out = store.git.read(
            "log",
            "-g",
            "-z",
            "--date=unix",
            "--no-color",
            "--no-show-signature",
            f"--format={fields}",
            branch,
        )
    except PatchkitError:  # no such branch yet
        return []
    tokens = out.decode("utf-8", "replace").split("\0")
    lines = [tokens[at : at + 4] for at in range(0, len(tokens) - 4, 5)]
    if not lines or lines[0][0] != store.head():
        return []
    befores = [*(line[0] for line in lines[1:]), None]
    return [_step(line, before) for line, before in zip(lines, befores, strict=True)]


def _step(line: Sequence[str], before: str | None) -> Step:
    to, selector, did, trailers = line
    seconds = selector.rpartition("{")[2].removesuffix("}")  # branch@{seconds}: when the branch moved
    committed = did.startswith(("commit: ", "commit (merge): ")) and _OWN_TRAILER.search(trailers)
    own = did.split(":")[0].split(" ")[0] == ACTION or bool(committed)
    return Step(to, before, one_line(did), _date(seconds), own)


def _date(seconds: str) -> datetime:
    try:
        return datetime.fromtimestamp(int(seconds), UTC)
    except (ValueError, OverflowError, OSError):  # as `history` reads a date that no calendar has
        return datetime.fromtimestamp(0, UTC)


def pushed(store: GitStore, tip: str, target: str) -> str | None:
    """A remote-tracking branch that holds a commit which going back from ``tip`` to ``target`` undoes; None
    where none does. What a merge brought in stays where it came from."""
    how = ("--topo-order", "--reverse", "--first-parent")
    leaving = store.git.read("rev_list", *how, tip, f"^{target}").decode().split()
    if not leaving:
        return None
    kept = store.git.read("rev_list", tip, f"^{target}", "--not", "--remotes").decode().split()
    known = next((commit for commit in leaving if commit not in set(kept)), None)
    if known is None:
        return None
    out = store.git.read("for_each_ref", f"--contains={known}", "--format=%(refname:short)", "refs/remotes")
    names = out.decode("utf-8", "replace").splitlines()
    return one_line(min(names, key=lambda name: name.endswith("/HEAD") or "/" not in name))


def move_branch(store: GitStore, branch: str, old: str, new: str, why: str, *, dry_run: bool = False) -> None:
    """Bring ``branch``, which is checked out at ``old``, to ``new``; ``why`` stands in its reflog.

    `WouldOverwrite` names what is not committed and in the way; `Busy` says that another writer moved
    the branch meanwhile. After an error branch, index and work tree are as they were.
    """
    if dry_run:
        _try_to_read_tree(store, old, new)
        return
    with writers_lock(store):
        check_there(store, branch, old)
        store.git.write("update_index", "-q", "--refresh")  # else a new time stamp counts as a change
        _read_tree(store, old, new, "--dry-run")
        try:
            _read_tree(store, old, new)
            store.git.write("update_ref", "-m", f"{ACTION} {why}", branch, new, old)
        except BaseException as error:
            _go_back(store, new, old)
            if isinstance(error, PatchkitError):
                check_there(store, branch, old)
            raise


def check_there(store: GitStore, branch: str, old: str) -> None:
    """`Busy` where the branch is not checked out, or not at ``old``, any more."""
    if current_branch(store) != branch or store.head() != old:
        raise Busy(
            f"{branch.removeprefix('refs/heads/')}: was moved by another command meanwhile; nothing was "
            "changed, look at it (git log) and try again"
        )


def _go_back(store: GitStore, new: str, old: str) -> None:
    """Index and work tree to where the branch is now, where they were brought to ``new`` already."""
    now = store.head() or old
    if now != new:
        try:
            _read_tree(store, new, now)
        except PatchkitError:  # they were not yet, or not all of them: `leftovers` names what lies there
            return


def _try_to_read_tree(store: GitStore, old: str, new: str) -> None:
    """`_read_tree` on a copy of the index, which is refreshed first: a new time stamp is no change."""
    with TemporaryDirectory() as folder:
        copy = Path(folder, "index")
        with suppress(FileNotFoundError):
            shutil.copyfile(store.git_dir / "index", copy)
        env = {"GIT_INDEX_FILE": str(copy)}
        store.git.write("update_index", "-q", "--refresh", env=env)
        _read_tree(store, old, new, "--dry-run", env=env)


def _read_tree(
    store: GitStore, old: str, new: str, *options: str, env: Mapping[str, str] | None = None
) -> None:
    """Git's two-way merge: what differs between the commits changes, all else is left as it is."""
    how: Sequence[str] = ("-m", "-u", *options)
    try:
        store.git.write("read_tree", *how, old, new, env=env)
    except PatchkitError as error:
        found = _IN_THE_WAY.search(str(error))
        if found is None:
            raise
        path = one_line(next(group for group in found.groups() if group))
        raise WouldOverwrite(
            f"{path}: has changes that are not committed and would be overwritten; commit them, or put them "
            "aside with: git stash -u"
        ) from error
