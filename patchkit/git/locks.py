"""What lies half done: locks that a killed Git left, merges under way, files placed but not committed.

Reads only. Each finding carries the shell command that clears it; the commands, run in their
order, bring work tree and index back to HEAD.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from patchkit.errors import Busy
from patchkit.files import is_held, is_temporary
from patchkit.git.command import age_of
from patchkit.git.writers import INCOMING, LOCK
from patchkit.patch import DELTA, FACTS, KEYS
from patchkit.problem import Problem
from patchkit.settings import FILE as SETTINGS

if TYPE_CHECKING:
    from patchkit.git.store import GitStore

__all__ = [
    "MERGE_FILE",
    "at_root",
    "being_written",
    "git_at_root",
    "leftovers",
    "merge_head",
    "operation_in_progress",
    "uncommitted",
    "waiting_merge",
]

MERGE_FILE = "patchkit-merge.toml"  # in Git's own folder: the choices that a stopped merge waits for

# In Git's folder -> what is under way, and the command that ends it without effect.
_OPERATIONS = (
    ("rebase-merge", "a rebase", "rebase --abort"),
    ("rebase-apply/applying", "git am", "am --abort"),
    ("rebase-apply", "a rebase", "rebase --abort"),
    ("MERGE_HEAD", "a merge", "merge --abort"),
    ("CHERRY_PICK_HEAD", "a cherry-pick", "cherry-pick --abort"),
    ("REVERT_HEAD", "a git revert", "revert --abort"),
)


def leftovers(store: GitStore) -> list[Problem]:
    """Everything half done, locks first; `remedy` is a shell command."""
    if being_written(store):
        lock = store.private / LOCK
        return [Problem(str(lock), "another patchkit command is writing here", "wait for it to end")]
    found = [*_git_locks(store), *_incoming(store)]
    operation = _operation(store)
    if operation is not None:
        return [*found, operation]
    return [*found, *uncommitted(store)]


def being_written(store: GitStore) -> bool:
    """Whether a patchkit command holds the writers' lock: what lies half done may be its own."""
    return is_held(store.private / LOCK)


def operation_in_progress(store: GitStore) -> Busy | None:
    """Why nothing can be committed now: a merge, rebase, cherry-pick or revert is under way."""
    operation = _operation(store)
    return (
        None
        if operation is None
        else Busy(f"{operation.message}; finish it, or end it with: {operation.remedy}")
    )


def _operation(store: GitStore) -> Problem | None:
    for name, what, command in _OPERATIONS:
        if (store.git_dir / name).exists():
            waits = _waits(store) if name == "MERGE_HEAD" else ""
            return Problem(
                str(store.root), f"{what} is in progress{waits}", f"{git_at_root(store)} {command}"
            )
    return None


def _waits(store: GitStore) -> str:
    path = waiting_merge(store)
    return f"; choose in {path}, then patchkit merge --continue, or end it" if path else ""


def merge_head(store: GitStore) -> str | None:
    """The commit that a merge under way brings in, also where its name is a tag's."""
    found = store.git.ask("rev_parse", "--verify", "--quiet", "MERGE_HEAD^{commit}")
    return None if found is None else found.decode("ascii").strip()


def waiting_merge(store: GitStore) -> Path | None:
    """The file where the merge that is under way waits for choices; one of an earlier merge is none."""
    path = store.git_dir / MERGE_FILE
    brought = merge_head(store)
    try:
        said = path.read_text("utf-8", "replace")
    except OSError:
        return None
    return path if brought is not None and f'merge = "{brought}"' in said else None


def _git_locks(store: GitStore) -> Iterator[Problem]:
    places = dict.fromkeys((store.git_dir, store.common_dir))
    locks = [lock for place in places for lock in (*sorted(place.glob("*.lock")), place / "packed-refs.new")]
    for folder in ("refs", "objects/info", "objects/pack"):
        locks += sorted((store.common_dir / folder).rglob("*.lock"))
    locks.append(store.common_dir / "objects" / "maintenance.lock")  # it would keep Git from ever tidying up
    if store.git_dir != store.common_dir:
        locks += sorted((store.git_dir / "refs").rglob("*.lock"))
    for lock in locks:
        if age := age_of(lock):
            yield Problem(
                str(lock),
                f"a Git command is running, or was killed and left this lock ({age})",
                f"rm -f -- {_quoted(lock)}",
            )


def _incoming(store: GitStore) -> Iterator[Problem]:
    incoming = store.private / INCOMING
    if incoming.exists():
        yield Problem(str(incoming), "a killed patchkit command left this", f"rm -rf -- {_quoted(incoming)}")
    for path in sorted(store.folder.iterdir()):
        if is_temporary(path.name) and not is_held(path):
            yield Problem(str(path), "a killed patchkit command left this", f"rm -rf -- {_quoted(path)}")


def uncommitted(store: GitStore) -> Iterator[Problem]:
    """Patch folders and settings that differ from HEAD, one finding for each."""
    states: dict[str, set[str]] = {}
    for state, path in store.status(ignored=True):
        if state != "!!" or path.rpartition("/")[2] in (FACTS, DELTA, KEYS) or is_temporary(Path(path).name):
            states.setdefault("/".join(path.split("/")[:2]), set()).add(state)
    if not states:
        return
    tree = store.tree()
    known = {"/".join(entry.path.split("/")[:2]) for entry in tree.entries}
    known |= {SETTINGS} if tree.settings is not None else set()
    for unit, found in sorted(states.items()):
        place = at_root(store, unit)
        staged = any(state[0] not in " ?!" for state in found)
        commands = []
        if unit in known:
            commands.append(f"{git_at_root(store)} restore --source=HEAD --staged --worktree -- {place}")
        elif staged:
            commands.append(f"{git_at_root(store)} rm -r -f -q --ignore-unmatch -- {place}")
        if found & {"??", "!!"}:
            commands.append(f"{git_at_root(store)} clean -f -d -x -q -- {place}")
        message = "not committed" if unit in known else "not committed, so not in force"
        if staged:
            message += "; it is staged, and would go into your next commit"
        yield Problem(unit, message, " && ".join(commands))


def at_root(store: GitStore, path: str) -> str:
    """A path of the stack for a command that is run anywhere in the work tree."""
    return shlex.quote(f":(top,literal){store.prefix}{path}")


def git_at_root(store: GitStore) -> str:
    """Git for a command that is run anywhere."""
    return f"git -C {_quoted(store.root)}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
