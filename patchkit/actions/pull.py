"""Git's fetch, a look at what came, and only then a fast-forward to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchkit.actions.changes import broken_elsewhere
from patchkit.actions.switch import bring_in_line, stored_before
from patchkit.actions.undo import patch_changes
from patchkit.errors import NotFound, PatchkitError, Refused
from patchkit.git.command import ACTION
from patchkit.git.locks import operation_in_progress
from patchkit.git.moving import check_there, current_branch, move_branch
from patchkit.git.remotes import bring_large, over_network
from patchkit.git.store import GitStore
from patchkit.git.writers import writers_lock
from patchkit.inspection import inspect_layout
from patchkit.problem import Problem, one_line
from patchkit.stack import TreeProblems

if TYPE_CHECKING:
    from patchkit.actions.build import Built
    from patchkit.repository import Repository

__all__ = ["Pulled", "pull"]


@dataclass(frozen=True)
class Pulled:
    """What came from ``upstream`` and is in force now (or would be); ``old`` == ``new``: nothing did."""

    branch: str
    upstream: str
    old: str
    new: str
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    build: Built | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("branch", "upstream", "old", "new")},
            **{name: list(getattr(self, name)) for name in ("added", "removed", "changed")},
            "build": None if self.build is None else self.build.to_dict(),
        }


def pull(
    repository: Repository,
    *,
    dry_run: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Pulled:
    """Fetch the branch that this one follows, check it, and go forward to it; then the default build.

    TreeProblems where what came cannot be believed (nothing of it is taken in), Refused where both
    sides have commits, Unavailable where the remote is out of reach.
    """
    store = repository.store
    branch = current_branch(store)
    name = branch.removeprefix("refs/heads/")
    if busy := operation_in_progress(store):
        raise busy
    upstream, remote, reference = _followed(store, name)
    old = store.resolve("HEAD")
    new = _fetch(store, remote, reference, dry_run)
    if store.is_ancestor(new, old):
        return Pulled(name, upstream, old, old)
    if not inspect_layout(store, store.tree(new))[1]:  # what is not sound may ask for any number of bytes
        bring_large(store, remote, new)
    if found := [*repository.problems(new), *broken_elsewhere(repository, new, [old])]:
        raise TreeProblems([Problem(f"{upstream}:{p.path}", p.message, p.remedy) for p in found])
    if not store.is_ancestor(old, new):
        raise Refused(
            f"{name} and {upstream} both have commits that the other has not; join them: "
            "patchkit merge @{upstream}"
        )
    changes = patch_changes(store, old, new)
    if dry_run:
        move_branch(store, branch, old, new, "", dry_run=True)
        return Pulled(name, upstream, old, new, *changes)
    earlier = stored_before(repository)
    env = {"GIT_REFLOG_ACTION": f"{ACTION} pull"}
    with writers_lock(store):  # HEAD is not to move under a commit that another command is making
        check_there(store, branch, old)
        store.git.write("merge", "--ff-only", "--no-squash", "--quiet", "--no-autostash", new, env=env)
    built = bring_in_line(repository, earlier, f"{name} is at {new[:10]}", progress)
    return Pulled(name, upstream, old, new, *changes, built)


def _followed(store: GitStore, branch: str) -> tuple[str, str, str]:
    """The remote-tracking branch's short name, the remote, and the branch's full name there."""
    remote, reference = (store.config_get(f"branch.{branch}.{key}") for key in ("remote", "merge"))
    if remote is None or reference is None or remote.startswith("-"):
        raise NotFound(
            f"{one_line(branch)}: follows no branch of a remote; say which: "
            "git branch --set-upstream-to=REMOTE/BRANCH"
        )
    try:
        found = store.git.read("rev_parse", "--abbrev-ref", f"{branch}@{{upstream}}")
        upstream = one_line(os.fsdecode(found))
    except PatchkitError:  # not fetched yet
        upstream = f"{remote}/{reference.removeprefix('refs/heads/')}"
    return upstream, remote, reference


def _fetch(store: GitStore, remote: str, reference: str, dry_run: bool) -> str:
    """The commit that the branch of the remote is at, once its objects are here."""
    if not dry_run:
        over_network(
            store.git, "fetch", "--quiet", "--no-recurse-submodules", "--end-of-options", remote, place=remote
        )
        with suppress(NotFound):  # a remote that is named by its address alone has no branch of it here
            return store.resolve("@{upstream}")
    quietly = ("--quiet", "--no-recurse-submodules", "--no-tags", "--no-write-fetch-head", "--refmap=")
    over_network(store.git, "fetch", *quietly, "--end-of-options", remote, reference, place=remote)
    out = over_network(store.git, "ls_remote", "--end-of-options", remote, reference, place=remote)
    # Git matches the ends of names too: a backup of this branch may stand above it.
    found = [line.split("\t", 1) for line in os.fsdecode(out).splitlines()]
    return next((commit for commit, name in found if name == reference), found[0][0])
