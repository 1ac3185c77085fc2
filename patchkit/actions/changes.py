"""What the changing actions share: facts taken out of a patch, recording, keeping work aside."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patchkit.canonical import hash_bytes
from patchkit.errors import Busy, PatchkitError, Refused
from patchkit.facts import Batch, Fact, FactsError, Key, clashes
from patchkit.git.recording import refuse_elsewhere
from patchkit.git.store import Changes
from patchkit.patch import DELTA, JOINT, KEYS, Header, read_patch_header
from patchkit.problem import Problem
from patchkit.stack import Stack, StoredPatch, problems

if TYPE_CHECKING:
    from patchkit.actions.commit import Committed
    from patchkit.algebra.factors import Patch
    from patchkit.repository import Repository

__all__ = [
    "MOVED_ON",
    "GateRefused",
    "OtherBase",
    "Taken",
    "apply_command",
    "keep_aside",
    "kept_line",
    "large_files",
    "record",
    "refittable",
    "refuse_clashes",
    "remembered",
    "solved_on_top",
    "staying",
    "superseded",
    "take_out",
]

ATTEMPTS = 5  # another writer may move HEAD between our look and our commit

MOVED_ON = (
    "another commit changed the stack meanwhile: these numbers are of the stack as it was; look at both "
    "together: patchkit eval"
)

PLAIN = 10 << 20  # bytes that a hub takes in one file outside Git LFS

Trailers = Sequence[tuple[str, str]]


class GateRefused(Refused):
    """An edit below its gate; ``done`` is what was measured (a `commit.Committed` without a commit)."""

    def __init__(self, message: str, done: Committed) -> None:
        super().__init__(message)
        self.done = done


class OtherBase(Busy):
    """The stack was moved to another base while a patch for the old one was being made."""


@dataclass(frozen=True)
class Taken:
    """Facts that leave a patch; ``remaining`` is None when none are left in it."""

    patch: str
    facts: tuple[Fact, ...]
    remaining: Patch | None


def take_out(patch: Patch, indices: Collection[int], name: str) -> Taken:
    """Take facts out by their place in the patch, solved again in closed form (`Patch.without`)."""
    leaving = tuple(patch.facts[i] for i in sorted(set(indices)))
    remaining = None if len(leaving) == len(patch.facts) else patch.without(indices)
    return Taken(name, leaving, remaining)


def superseded(stack: Stack, facts: Sequence[Fact], patch_of: Callable[[StoredPatch], Patch]) -> list[Taken]:
    """The facts in force that say otherwise what ``facts`` say, taken out of their patches."""
    in_force = stack.facts_in_force()
    leaving: dict[str, set[Key]] = {}
    for fact in facts:
        if fact.key in in_force:
            leaving.setdefault(in_force[fact.key][0], set()).add(fact.key)
    taken = []
    for name, keys in sorted(leaving.items()):
        stored = stack.named(name)
        places = [i for i, fact in enumerate(stored.facts) if fact.key in keys]
        taken.append(take_out(patch_of(stored), places, name))
    return taken


def staying(stack: Stack, patches: Mapping[str, Patch], replaced: Sequence[Taken]) -> list[Patch]:
    """The patches below an edit that replaces facts: those that lose none, and what is left of the others.

    ``patches`` by their ids.
    """
    touched = {taken.patch for taken in replaced}
    whole = [patches[stored.id] for stored in stack.patches if stored.name not in touched]
    return whole + [taken.remaining for taken in replaced if taken.remaining is not None]


def record(
    repository: Repository,
    stack: Stack,
    changes: Changes,
    message: str,
    trailers: Trailers,
    still_right: Callable[[Stack], None],
    *,
    began_on: str | None = None,
) -> str:
    """Commit ``changes`` that were made on ``stack``; the commit's id.

    Where HEAD's stack moved meanwhile, ``still_right`` is asked of the new one first and raises
    what speaks against it; OtherBase where it stands on another base by then. ``began_on``: what was checked
    out (`GitStore.standing`) when long work began.
    """
    store = repository.store
    for attempt in range(ATTEMPTS):
        head = store.head()
        refuse_elsewhere(store, began_on)
        _refuse_other_base(repository, changes)
        if store.tree("HEAD").id != stack.tree:
            still_right(repository.stack())
        try:
            return store.record(changes, message, trailers, expected_head=head, began_on=began_on)
        except Busy:
            if attempt == ATTEMPTS - 1 or store.head() == head:
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


def _refuse_other_base(repository: Repository, changes: Changes) -> None:
    base = repository.settings.base_fingerprint
    for name, files in changes.patches.items():
        if (made_on := read_patch_header(files[DELTA], name).base) != base:
            raise OtherBase(
                f"{name}: was made on the base {made_on[:19]}…, and this branch was moved to {base[:19]}… "
                "meanwhile; nothing was committed, edit its facts again on that"
            )


def solved_on_top(stack: Stack, leaving: Collection[StoredPatch]) -> tuple[str, ...]:
    """The names of the other patches in force that were solved on top of what leaves, or together with it."""
    gone = {id_ for stored in leaving for id_ in stored.header.versions(stored.id)}
    staying = [stored for stored in stack.patches if stored not in leaving]
    return tuple(
        stored.name
        for stored in staying
        if gone & set(stored.header.solved_on) or any(_together(stored.header, one.header) for one in leaving)
    )


def refittable(stack: Stack, names: Collection[str]) -> tuple[str, ...]:
    """Those of these patches in force whose keys and targets are there to solve again from."""
    return tuple(name for name in names if KEYS in stack.named(name).files)


def _together(one: Header, other: Header) -> bool:
    """Whether a `merge --joint` solved the two as one batch: it marked each with the keys of all."""
    marks = one.recipe.get(JOINT), other.recipe.get(JOINT)
    return any(
        isinstance(keys, list) and header.keys in keys
        for keys, header in zip(marks, (other, one), strict=True)
    )


def refuse_clashes(batch: Batch, stack: Stack, leaving: Collection[str] = ()) -> None:
    """FactsError where a fact's key is in force already, but for keys in patches that leave."""
    in_force = {key: pair for key, pair in stack.facts_in_force().items() if pair[0] not in leaving}
    if faults := clashes(batch, in_force):
        raise FactsError(faults)


def large_files(repository: Repository, patch: Patch) -> tuple[str, ...]:
    """A note where a file of the patch is larger than hubs take outside Git LFS."""
    if repository.store.tree().lfs:
        return ()
    size = max(len(data) for data in patch.files().values())
    if size <= PLAIN:
        return ()
    return (
        f"a file of this patch has {size / (1 << 20):.3g} MiB: the Hugging Face hub refuses plain files over "
        "10 MiB, GitHub over 100 MB; split the facts over several commits, or keep patches in Git LFS: "
        "patchkit init BASE --lfs",
    )


def keep_aside(repository: Repository, patch: Patch) -> Path:
    """Save a patch that was not committed where ``patchkit apply`` finds it; the folder."""
    content = hash_bytes("".join(sorted(map(hash_bytes, patch.files().values()))).encode())
    folder = repository.store.own / "kept" / content[:12] / patch.name
    if not (folder / DELTA).exists():  # it is saved last: a folder without it was cut short
        shutil.rmtree(folder, ignore_errors=True)
        patch.save(folder)
    return folder


@contextmanager
def remembered(what: str) -> Iterator[None]:
    """Write to the catalogue after the work is done: where that fails, ``what`` stands all the same."""
    try:
        yield
    except PatchkitError as error:
        logging.getLogger("patchkit").warning("patchkit: %s, but not in the catalogue: %s", what, error)


def apply_command(folder: Path, replaces: bool) -> str:
    """What commits a patch that was kept aside; ``replaces``: older facts have to leave for it."""
    return f"patchkit apply {'--replace ' if replaces else ''}{shlex.quote(str(folder))}"


def broken_elsewhere(repository: Repository, commit: str, before: Sequence[str]) -> list[Problem]:
    """What keeps the other stacks of a Git repository from being believed at ``commit``, of those that could
    be at every commit of ``before``."""
    found = []
    for store in repository.store.stacks(commit):
        trees = [store.tree(each) for each in (commit, *before)]
        now, *then = [(tree.id, tree.settings) for tree in trees]
        if store.folder == repository.store.folder or all(now == each for each in then):
            continue
        wrong = problems(store, commit)
        if wrong and not any(problems(store, each) for each in before):
            found += [Problem(f"{store.prefix}{p.path}", p.message, p.remedy) for p in wrong]
    return found


def kept_line(error: PatchkitError, folder: Path, replaces: bool) -> PatchkitError:
    """The same error, telling where the finished work lies."""
    command = apply_command(folder, replaces or isinstance(error, FactsError))  # those clash with the stack
    return error.retold(f"{error}; the finished patch is kept, commit it with: {command}")
