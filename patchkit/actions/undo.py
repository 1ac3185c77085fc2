"""Take back the last patchkit commands on the current branch, as its own reflog tells them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from patchkit.errors import BadInput, NotFound, Refused
from patchkit.git.locks import operation_in_progress
from patchkit.git.moving import Step, current_branch, move_branch, pushed, reflog
from patchkit.git.store import GitStore
from patchkit.stack import conflicts

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["Undone", "patch_changes", "undo", "undoable"]


@dataclass(frozen=True)
class Undone:
    """What was taken back (or would be): the branch went from ``old`` to ``new``."""

    branch: str
    old: str
    new: str
    steps: tuple[Step, ...]
    """What was taken back, newest first."""
    added: tuple[str, ...]
    """Patches that are in force again."""
    removed: tuple[str, ...]
    changed: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "branch": self.branch,
            "old": self.old,
            "new": self.new,
            "undone": [step.did for step in self.steps],
            "added": list(self.added),
            "removed": list(self.removed),
            "changed": list(self.changed),
        }


def undoable(repository: Repository) -> list[Step]:
    """What can be undone on the current branch, newest first: patchkit's own, up to anything else."""
    steps = reflog(repository.store, current_branch(repository.store))
    return list(takewhile(lambda step: step.own and step.before is not None, steps))


def undo(repository: Repository, steps: int = 1, *, force: bool = False, dry_run: bool = False) -> Undone:
    """Put the current branch where it was before the last ``steps`` commands of patchkit on it.

    To undo an undo is to do again what it took back. NotFound where there is not so much; Refused
    where a remote-tracking branch has a commit that would go (unless ``force``); WouldOverwrite where
    something uncommitted is in the way; Busy where the branch moves meanwhile.
    """
    if steps < 1:
        raise BadInput(f"{steps} steps to undo: name one or more")
    store = repository.store
    branch = current_branch(store)
    name = branch.removeprefix("refs/heads/")
    found = undoable(repository)
    if len(found) < steps:
        raise NotFound(_too_few(reflog(store, branch), found, name))
    if busy := operation_in_progress(store):
        raise busy
    if conflicts(store):
        raise Refused("files are in conflict; finish that first, patchkit status says how")
    old, new = found[0].to, found[steps - 1].before
    assert new is not None
    if not force and (remote := pushed(store, old, new)):
        raise Refused(
            f"{remote} has what would be undone, so others may have it too; take it back in a new commit "
            "(patchkit revert), or undo it here all the same with --force"
        )
    what = ", ".join(dict.fromkeys(step.did.partition(": ")[2] or step.did for step in found[:steps]))
    move_branch(store, branch, old, new, f"undo: {what[:200]}", dry_run=dry_run)
    return Undone(name, old, new, tuple(found[:steps]), *patch_changes(store, old, new))


def patch_changes(
    store: GitStore, old: str, new: str
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Folders under patches/ that come, go and change from one commit to another, by Git's ids alone."""
    before, after = (_folders(store, commit) for commit in (old, new))
    both = before.keys() & after.keys()
    return (
        tuple(sorted(after.keys() - both)),
        tuple(sorted(before.keys() - both)),
        tuple(sorted(name for name in both if before[name] != after[name])),
    )


def _folders(store: GitStore, commit: str) -> dict[str, str]:
    patches = store.tree(commit).patches
    if patches is None or patches.mode != "40000":
        return {}
    return {item.name: item.oid for item in store.objects.tree(patches.oid) if item.mode == "40000"}


def _too_few(steps: Sequence[Step], found: Sequence[Step], branch: str) -> str:
    if found:
        return f"only {len(found)} can be undone on {branch}; patchkit undo --list shows them"
    if not steps:
        return f"{branch} has no reflog that tells where it was; take patches back with patchkit revert"
    last = steps[0]
    if last.before is None:
        return f"{branch} begins with “{last.did}”; there is nothing before it to go back to"
    return (
        f"the last thing on {branch} was not patchkit's (“{last.did}”); take it back with Git "
        f"(git reset --keep {last.before[:10]}), or patches with patchkit revert"
    )
