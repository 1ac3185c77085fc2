"""Merging another branch's facts into this one: Git's merge, checked and put right by fact.

What is to be in force is decided before anything is touched (`merging.plan`, `mergesolve`); Git then
merges (`merging.recording`), the patches are put as decided, the tree is believed or refused, and Git
commits. Where a person has to choose, the merge stops there, with a file to choose in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from patchkit.actions.changes import broken_elsewhere
from patchkit.actions.mergereport import (
    FORWARD,
    STOPPED,
    UP_TO_DATE,
    Merged,
    MergeStopped,
    changes,
    summary,
)
from patchkit.actions.mergesolve import Solved, solve_merge
from patchkit.errors import BadInput, Busy, NotFound
from patchkit.git.locks import merge_head, operation_in_progress
from patchkit.git.messages import compose_message
from patchkit.git.store import GitStore
from patchkit.git.writers import writers_lock
from patchkit.merging.choices import choice_trailer, stack_folder
from patchkit.merging.elsewhere import beside_patches, elsewhere, foreseen
from patchkit.merging.file import Stopped, merge_file, read_merge_file, write_merge_file
from patchkit.merging.merges import is_shallow, merge_bases
from patchkit.merging.plan import Answers, read_sides
from patchkit.merging.recording import (
    abort_merge,
    commit_merge,
    default_message,
    fast_forward,
    lay_out,
    left_state,
    mark,
    merging,
    refuse_dirty,
)
from patchkit.problem import Problem, one_line
from patchkit.stack import TreeProblems, problems, read_stack

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["MergeStopped", "Merged", "abort", "go_on", "merge"]


def merge(
    repository: Repository,
    branch: str,
    *,
    side: str | None = None,
    facts: Mapping[str, str] | None = None,
    joint: bool = False,
    forward: bool = True,
    message: str | None = None,
    dry_run: bool = False,
) -> Merged:
    """Merge ``branch`` (any name of a commit) into the branch that is checked out.

    ``facts``: what is in conflict (a fact's id, text or subject; a patch's name) -> "ours" or "theirs";
    ``side`` is for all others, but for what a removal would be undone by. ``joint``: the new patches of
    both sides are solved together. ``forward`` False: a merge commit also where Git would move forward.
    `MergeStopped` where something is left to choose, or a file that is no patch is in conflict.
    """
    store = repository.store
    head, target = _checked(store, branch, dry_run)
    bases = merge_bases(store, [head, target])
    answers = Answers(words=dict(facts or {}), rest=side)
    if target in bases or (head in bases and forward):
        answers.refuse_unused([])
    if target in bases:
        return Merged(UP_TO_DATE, branch)
    if not bases:
        raise _unrelated(store, branch)
    read_stack(store, head, repository.catalogue)
    _believed(repository, branch, target)
    sides = read_sides(store, head, target)
    if head in bases and forward:
        _refuse_broken_elsewhere(repository, target, [head])
        if not dry_run:
            fast_forward(store, head, target)
        idle = {
            "nothing to solve together: this branch has no commit of its own": joint,
            "the message is not used: the branch moves forward, without a commit; --no-ff makes one": message,
        }
        notes = tuple(note for note, asked in idle.items() if asked)
        moved = {name: sides.theirs.folders.get(name, {}) for name in sides.differing}
        done = changes(FORWARD, branch, sides, moved)
        return replace(done, notes=notes, commit=None if dry_run else target)
    _same_place(store, branch, head, [target, *bases])
    if store.tree(head).lfs != store.tree(target).lfs:
        raise BadInput(
            f"{one_line(branch)}: one of the two branches is kept in Git LFS and the other is not; bring the "
            "other over, on its own branch: patchkit init BASE --lfs; then merge"
        )
    solved = solve_merge(store, sides, answers, joint)
    done = summary(store, branch, solved)
    if dry_run:
        return _told(store, solved, done, foreseen(store, head, target))
    with merging(store, branch, head, target) as staging:
        text = message or default_message(store, branch)
        return _carried_out(repository, staging, solved, replace(done, message=text), joint)


def go_on(
    repository: Repository,
    *,
    side: str | None = None,
    facts: Mapping[str, str] | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> Merged:
    """Finish a merge that stopped, with its file's choices and these; `MergeStopped` if some are missing."""
    store = repository.store
    store.git.check_version()
    if (target := merge_head(store)) is None:
        raise NotFound(f"{store.root}: no merge is under way; start one: patchkit merge BRANCH")
    stopped, head = read_merge_file(store), store.head()
    if (stopped.into, stopped.merge) != (head, target):
        raise BadInput(
            f"{merge_file(store)}: is of another merge; finish the one under way with git commit, or end it: "
            "patchkit merge --abort"
        )
    if not dry_run:
        store.git.ensure_identity()
    if left_state(store) != stopped.left:
        raise BadInput(
            "patches were changed by hand since the merge stopped; commit them with git commit, after which "
            "patchkit status checks them, or start again: patchkit merge --abort"
        )
    sides = read_sides(store, stopped.into, target)
    answers = Answers(dict(stopped.chosen), dict(facts or {}), side)
    solved = solve_merge(store, sides, answers, stopped.joint)
    text = message or stopped.message
    done = replace(summary(store, target[:10], solved), message=text)
    if dry_run:
        return _told(store, solved, done, elsewhere(store))
    with writers_lock(store) as staging:
        if (store.head(), merge_head(store), left_state(store)) != (head, target, stopped.left):
            raise Busy("the merge was changed by another command meanwhile; look at it: patchkit status")
        try:
            return _carried_out(repository, staging, solved, done, stopped.joint)
        except MergeStopped:
            raise
        except BaseException:  # also where a person stops it
            if merge_head(store) == target:  # still under way: what was laid out is not a person's doing
                _keep(store, solved, done, stopped.joint)
            raise


def abort(repository: Repository, *, dry_run: bool = False) -> None:
    """End a merge under way without effect, as `git merge --abort` does; NotFound where there is none."""
    abort_merge(repository.store, dry_run=dry_run)
    if not dry_run:
        merge_file(repository.store).unlink(missing_ok=True)


def _carried_out(repository: Repository, staging: Path, solved: Solved, done: Merged, joint: bool) -> Merged:
    """Put the patches as decided and commit; or stop, with everything marked that is not decided."""
    store, sides = repository.store, solved.plan.sides
    trees = [sides.bases[0].folders if sides.bases else {}, sides.ours.folders, sides.theirs.folders]
    if solved.plan.undecided:
        waiting = dict.fromkeys((name for name in sides.differing if name not in solved.folders), _NEVER)
        mark(store, {**waiting, **solved.folders}, trees)
        raise _stopped(store, solved, done, joint)
    names = mark(store, solved.folders, trees)

    def read(oid: str) -> bytes:
        return solved.made[oid] if oid in solved.made else store.read(oid)

    lay_out(store, staging, solved.folders, names, read)
    if elsewhere(store):
        raise _stopped(store, solved, done, joint)
    folder = stack_folder(store.prefix)
    chosen = sorted(solved.plan.chosen.items(), key=str)
    trailers = [choice_trailer(side, what, folder) for what, side in chosen]
    trailers += [("Patchkit-Joint", name) for name in solved.joint]
    text = compose_message(done.message, trailers)

    def believe(commit: str) -> None:
        if found := problems(store, commit, memory=repository.catalogue):
            raise TreeProblems(found)
        _refuse_broken_elsewhere(repository, commit, [sides.ours.commit, sides.theirs.commit])

    commit = commit_merge(store, staging, sides.ours.commit, sides.theirs.commit, text, believe)
    merge_file(store).unlink(missing_ok=True)
    return replace(done, commit=commit)


def _refuse_broken_elsewhere(repository: Repository, commit: str, before: Sequence[str]) -> None:
    if found := broken_elsewhere(repository, commit, before):
        raise TreeProblems([Problem(p.path, p.message, _ELSEWHERE) for p in found])


_ELSEWHERE = (
    "that is another stack of this repository, which this merge does not decide: settle it on one of the two "
    "branches first, then merge"
)
_NEVER = {"": ""}  # the files of no patch: it is marked as in conflict whatever Git made of it


def _told(store: GitStore, solved: Solved, done: Merged, conflicts: list[str] | None) -> Merged:
    """What a dry run says: as the merge would, it stops where a person has to choose."""
    files = tuple(map(one_line, beside_patches(store, conflicts or [])))
    if conflicts is None:
        done = replace(done, notes=(*done.notes, _NOT_FORESEEN))
    if not files and not solved.plan.undecided:
        return done
    where = f"{', '.join(files[:5])}: in conflict; " if files else ""
    rest = f"{where}dry run: nothing was written"
    text = _open(solved, rest) if solved.plan.undecided else f"the merge would stop: {rest}"
    raise MergeStopped(text, replace(done, how=STOPPED, files=files))


_NOT_FORESEEN = "files that are no patches were not looked at: only Git 2.38 and later can say how they merge"


def _stopped(store: GitStore, solved: Solved, done: Merged, joint: bool) -> MergeStopped:
    path = _keep(store, solved, done, joint)
    files = tuple(map(one_line, beside_patches(store, elsewhere(store))))
    parts = []
    if files:
        parts.append(f"{', '.join(files[:5])}: in conflict, resolve it and git add it")
    where = f"choose in {path}" if solved.plan.undecided else ""
    ways = "--fact, --ours or --theirs" if solved.plan.undecided else ""
    then = "then" if files and not where else f"{where}, or with {ways}, then"
    parts.append(f"{then}: patchkit merge --continue (or give it up: patchkit merge --abort)")
    text = (
        _open(solved, "; ".join(parts)) if solved.plan.undecided else f"the merge stopped: {'; '.join(parts)}"
    )
    return MergeStopped(text, replace(done, how=STOPPED, files=files))


def _keep(store: GitStore, solved: Solved, done: Merged, joint: bool) -> Path:
    sides = solved.plan.sides
    stopped = Stopped(
        sides.ours.commit, sides.theirs.commit, left_state(store), joint, done.message, solved.plan.chosen
    )
    return write_merge_file(store, stopped, solved.plan.conflicts)


def _open(solved: Solved, rest: str) -> str:
    count = len(solved.plan.undecided)
    return f"the merge needs {count} choice{'s' if count > 1 else ''}; {rest}"


def _checked(store: GitStore, branch: str, dry_run: bool) -> tuple[str, str]:
    """The commits of both sides, if a merge can begin here at all."""
    if not dry_run:
        store.ensure_ready()
    elif busy := operation_in_progress(store):
        raise busy
    if (head := store.head()) is None:
        raise BadInput("this branch has no commit yet; switch to one that has: git switch BRANCH")
    if store.git.ask("symbolic_ref", "--quiet", "HEAD") is None:
        raise BadInput(
            "HEAD is on no branch, so no branch would hold the merge; switch to one, git switch BRANCH, or "
            "make one here, git switch -c NAME"
        )
    target = store.resolve(branch)
    # Under the lock: what another command is about to commit is nothing that a person may throw away.
    with contextlib.nullcontext() if dry_run else writers_lock(store):
        refuse_dirty(store)
    return head, target


def _same_place(store: GitStore, branch: str, head: str, others: Sequence[str]) -> None:
    """BadInput where the other branch, or the common ancestor, has this stack in another folder."""
    here = {each.prefix for each in store.stacks(head)}
    for commit in others:
        gone = {each.prefix for each in store.stacks(commit)} - here
        if gone and store.tree(commit).settings is None:
            was = one_line(min(gone).removesuffix("/") or "the repository's own folder")
            raise BadInput(
                f"{one_line(branch)}: the stack was moved since the branches parted ({was} at {commit[:8]}); "
                "facts are not looked for in two places; move it on that branch in the same way, or back on "
                "this one, then merge"
            )


def _unrelated(store: GitStore, branch: str) -> BadInput:
    if is_shallow(store):
        return BadInput(
            f"{one_line(branch)}: the history is cut off (a shallow clone) before the commit that both sides "
            "come from; get all of it: git fetch --unshallow"
        )
    return BadInput(
        f"{one_line(branch)}: shares no commit with this branch, so there is nothing to compare both with; "
        "take single patches of it in: patchkit apply FOLDER"
    )


def _believed(repository: Repository, branch: str, target: str) -> None:
    try:
        read_stack(repository.store, target, repository.catalogue)
    except TreeProblems as error:
        first, *more = error.problems
        rest = f" (and {len(more)} more)" if more else ""
        raise BadInput(
            f"{one_line(branch)}: cannot be believed as it stands{rest}; {first}; then merge it"
        ) from None
