"""Go to a branch: checked first, then Git's own switch, then the build is brought in line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchkit.actions.undo import patch_changes
from patchkit.builds.record import BuildRecord
from patchkit.errors import BadInput, Busy, NotFound, PatchkitError
from patchkit.git.locks import operation_in_progress
from patchkit.git.moving import move_branch
from patchkit.git.store import GitStore
from patchkit.git.writers import writers_lock
from patchkit.problem import one_line
from patchkit.stack import StoredPatch, TreeProblems

if TYPE_CHECKING:
    from patchkit.actions.build import Built
    from patchkit.repository import Repository

__all__ = ["Switched", "bring_in_line", "left_line", "stored_before", "switch"]

PREVIOUS = "-"  # for Git, the branch before


@dataclass(frozen=True)
class Switched:
    """Where HEAD is now (or would be), what that changes, and the build, if there is one."""

    branch: str
    commit: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    build: Built | None = None
    left: str | None = None
    """A commit that no branch, tag or remote holds, where HEAD was detached."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "branch": self.branch,
            "commit": self.commit,
            "added": list(self.added),
            "removed": list(self.removed),
            "changed": list(self.changed),
            "build": None if self.build is None else self.build.to_dict(),
            "left": self.left,
        }


def switch(
    repository: Repository,
    branch: str,
    *,
    create: bool = False,
    start: str | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Switched:
    """`git switch`, once the tree there is believed; then the default build, if there is one.

    ``create`` makes the branch first, at ``start`` (HEAD). TreeProblems, and Git's own refusals, come
    before anything changes. Where the build fails, the line says that the branch is the new one.
    """
    store = repository.store
    if branch.startswith("-") and branch != PREVIOUS:
        raise BadInput(f"{one_line(branch)}: is no name for a branch; see git branch")
    target = _target(store, branch, create, start)
    if found := repository.problems(target):
        raise TreeProblems(found)
    old = store.head()
    changes = patch_changes(store, old, target) if old else ((), (), ())
    left = _left_behind(store, old, target)
    if dry_run:
        if busy := operation_in_progress(store):
            raise busy
        _refuse_elsewhere(store, branch)
        if old is not None and old != target:
            move_branch(store, "", old, target, "", dry_run=True)
        return Switched(branch, target, *changes, left=left)
    earlier = stored_before(repository)
    name = ("--create", branch, _start(store, start, target)) if create else (branch,)
    with writers_lock(store):  # else a commit that another command is making would go to this branch
        _switch(store, *name)
    reached = os.fsdecode(store.git.read("symbolic_ref", "--short", "HEAD")).strip()
    done = f"{one_line(reached)} is checked out"
    if left is not None:
        done = f"{done} ({left_line(left)})"
    built = bring_in_line(repository, earlier, done, progress)
    return Switched(reached, target, *changes, built, left)


def _start(store: GitStore, start: str | None, target: str) -> str:
    """What Git is told to begin at: by its own name, so that a branch follows the remote's that it is of."""
    if start is None or start.startswith("-"):
        return target
    found = store.git.ask("rev_parse", "--verify", "--quiet", f"{start}^{{commit}}")
    return start if found is not None and found.decode("ascii").strip() == target else target


def _refuse_elsewhere(store: GitStore, branch: str) -> None:
    """What Git itself would refuse: a branch that another work tree has checked out."""
    name = f"refs/heads/{branch}"
    place = os.fsdecode(store.git.read("for_each_ref", "--format=%(worktreepath)", name)).strip()
    here = store.git.ask("symbolic_ref", "--quiet", "HEAD")
    if place and (here is None or os.fsdecode(here).strip() != name):
        raise Busy(
            f"{one_line(branch)}: is checked out in the worktree {one_line(place)}; work there, "
            "or on another branch"
        )


def _switch(store: GitStore, *name: str) -> None:
    """`git switch`; where a hook fails behind it, the line says where HEAD is by then."""
    before = store.git.ask("symbolic_ref", "--quiet", "HEAD")
    try:
        store.git.write("switch", "--quiet", "--no-recurse-submodules", *name)
    except PatchkitError as error:
        now = store.git.ask("symbolic_ref", "--quiet", "HEAD")
        if now is None or now == before:
            raise
        reached = one_line(os.fsdecode(now).strip().removeprefix("refs/heads/"))
        raise error.retold(
            f"{reached} is checked out, but a hook failed behind it ({error}); the build is as it was: "
            "patchkit build"
        ) from error


def left_line(commit: str) -> str:
    """How to keep a commit that only the reflog knows."""
    return f"no branch holds {commit[:10]} that HEAD was on: keep it, git branch NAME {commit[:10]}"


def _left_behind(store: GitStore, old: str | None, target: str) -> str | None:
    """HEAD's commit, where it is detached and only the reflog will know it."""
    detached = store.git.ask("symbolic_ref", "--quiet", "HEAD") is None
    if old is None or not detached or store.is_ancestor(old, target):
        return None
    return None if store.git.read("for_each_ref", "--count=1", f"--contains={old}") else old


def stored_before(repository: Repository) -> Sequence[StoredPatch]:
    """The patches in force now, which a build may hold; none where the tree cannot be believed."""
    try:
        return repository.stack().patches
    except PatchkitError:
        return ()


def bring_in_line(
    repository: Repository,
    earlier: Sequence[StoredPatch],
    done: str,
    progress: Callable[[int, int, str], None] | None,
) -> Built | None:
    """The default build again, if there is one; ``done`` is told where that fails."""
    folder = repository.build_folder
    try:
        if not folder.is_dir() or BuildRecord.read(folder) is None:
            return None
        return repository.build(earlier=earlier, progress=progress)
    except PatchkitError as error:
        raise error.retold(f"{done}, but the build is not in line with it: {error}") from error


def _target(store: GitStore, branch: str, create: bool, start: str | None) -> str:
    """The commit that Git will go to."""
    if create:
        if store.git.ask("check_ref_format", f"refs/heads/{branch}") is None:
            raise BadInput(f"{one_line(branch)!r}: is no name for a branch; see git help check-ref-format")
        if store.git.ask("show_ref", "--verify", "--quiet", "--", f"refs/heads/{branch}") is not None:
            raise BadInput(f"{one_line(branch)}: is a branch already; go to it without -c")
        return store.resolve(start or "HEAD")
    if branch == PREVIOUS:
        return store.resolve("@{-1}")
    names = store.git.read("for_each_ref", "--format=%(refname)", "refs/heads", "refs/remotes").decode(
        "utf-8", "surrogateescape"
    )
    known = names.splitlines()
    if f"refs/heads/{branch}" in known:
        return store.resolve(f"refs/heads/{branch}")
    remote = [name for name in known if name.startswith("refs/remotes/") and name.split("/", 3)[-1] == branch]
    if len(remote) == 1:  # Git makes a branch that follows it
        return store.resolve(remote[0])
    local = [name.removeprefix("refs/heads/") for name in known if name.startswith("refs/heads/")]
    near = difflib.get_close_matches(branch, local, 3, 0.5)
    hint = f"did you mean {', '.join(map(one_line, near))}?" if near else "make it: patchkit switch -c BRANCH"
    many = f"is a branch of {len(remote)} remotes" if remote else "is no branch"
    raise NotFound(f"{one_line(branch)[:80]}: {many}; {hint} (git switch --detach goes to a commit)")
