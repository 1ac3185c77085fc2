"""What a tree holds: the patches in force, and everything that keeps it from being believed.

The stack at a commit is the folders under `patches/` in its tree. `problems` stands before
everything that believes one: known names, regular files, hashes that agree, one base, each fact once,
and merges whose facts are the three-way merge of their parents' (see `merges`). What was believed
once is kept in the catalogue by the tree's object id, so that a thousand patches cost milliseconds.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from patchkit.errors import BadInput, NotFound, PatchkitError
from patchkit.facts import Fact, Key
from patchkit.git.history import Commit, added_in
from patchkit.git.locks import waiting_merge
from patchkit.git.store import PATCHES, Entry, GitStore, Tree
from patchkit.inspection import inspect_folders, inspect_layout
from patchkit.merging.merges import MergeMemory, merge_problems, taking_out
from patchkit.patch import KEYS, Header
from patchkit.problem import Problem, one_line
from patchkit.settings import FILE as SETTINGS
from patchkit.settings import Settings, parse_settings

if TYPE_CHECKING:
    from patchkit.algebra.factors import Patch

__all__ = [
    "Ambiguous",
    "Memory",
    "Problem",
    "Stack",
    "StoredPatch",
    "TreeProblems",
    "Updates",
    "conflicts",
    "find_patch",
    "problems",
    "read_patch",
    "read_stack",
]

_HEX = re.compile(r"[0-9a-fA-F]{4,64}")
_SHOWN = 20  # problems in one message


@dataclass(frozen=True)
class StoredPatch:
    """One patch in force; `id` is this version's.

    Its files, header and facts are parsed when they are first asked for, where they were believed before.
    """

    name: str
    id: str
    count: int
    """Facts in it."""
    rank: int
    """The largest of its weights' ranks."""
    size: int
    """Bytes of its files."""
    _parse_files: Callable[[], Mapping[str, Entry]] = field(compare=False, repr=False)
    _parse_header: Callable[[], Header] = field(compare=False, repr=False)
    _parse_facts: Callable[[], tuple[Fact, ...]] = field(compare=False, repr=False)

    @classmethod
    def read(
        cls, name: str, header: Header, facts: tuple[Fact, ...], id: str, files: Mapping[str, Entry]
    ) -> StoredPatch:
        """One whose header and facts have just been read."""
        rank = max(entry.rank for entry in header.weights.values())
        size = sum(entry.size for entry in files.values())
        return cls(name, id, len(facts), rank, size, lambda: files, lambda: header, lambda: facts)

    @cached_property
    def files(self) -> Mapping[str, Entry]:
        """Where Git keeps its bytes, by file name."""
        return self._parse_files()

    @cached_property
    def header(self) -> Header:
        return self._parse_header()

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        return self._parse_facts()

    @property
    def slug(self) -> str:
        """The readable part of the folder's name."""
        return self.name.rpartition("-")[0]


@dataclass(frozen=True, slots=True)
class Stack:
    """The patches in force at a commit, by name; `tree` is the object id of patches/ ("" for none)."""

    patches: tuple[StoredPatch, ...]
    tree: str
    commit: str | None

    def get(self, name: str) -> StoredPatch | None:
        """The patch in the folder of this name, if it is in force."""
        return next((patch for patch in self.patches if patch.name == name), None)

    def named(self, name: str) -> StoredPatch:
        """The patch in the folder of this name; `NotFound` if it is not in force."""
        if (patch := self.get(name)) is None:
            raise NotFound(f"{one_line(name)}: is not in force; patchkit stack lists the patches")
        return patch

    def facts_in_force(self) -> dict[Key, tuple[str, Fact]]:
        """Key -> (name of the patch, the fact)."""
        return {fact.key: (patch.name, fact) for patch in self.patches for fact in patch.facts}

    def by_date(self, history: Sequence[Commit]) -> list[tuple[StoredPatch, Commit | None]]:
        """The patches, oldest first, each with the commit that added it (`GitStore.history`).

        Of those that came in one commit (a squashed merge), the one that was solved on fewer comes first.
        """
        added = added_in(history)
        place = {commit.id: -number for number, commit in enumerate(history)}

        def age(pair: tuple[StoredPatch, Commit | None]) -> tuple[int, int, str]:
            patch, commit = pair
            return place[commit.id] if commit else -len(place), len(patch.header.solved_on), patch.name

        return sorted(((patch, added.get(patch.name)) for patch in self.patches), key=age)


class TreeProblems(BadInput):
    """A tree that cannot be believed; the message is one line for each of its `problems`."""

    def __init__(self, found: Sequence[Problem]) -> None:
        self.problems = tuple(found)
        more = [f"... and {len(found) - _SHOWN} more problems"] if len(found) > _SHOWN else []
        super().__init__("\n".join([*map(str, found[:_SHOWN]), *more]))


class Memory(MergeMemory, Protocol):
    """What was believed before; the catalogue is one."""

    def recall(self, tree: str, base: str) -> list[StoredPatch] | None:
        """The patches of a tree that was believed on this base."""
        ...

    def believe(self, tree: str, base: str, patches: Sequence[StoredPatch]) -> None:
        """Keep them for `recall`."""
        ...


def read_stack(store: GitStore, rev: str = "HEAD", memory: Memory | None = None) -> Stack:
    """The patches in force at `rev`; `TreeProblems` if the tree cannot be believed.

    With `memory` (the catalogue) a tree that was believed before is not read again.
    """
    tree, patches, found = _examine(store, rev, None, memory)
    if found:
        raise TreeProblems(found)
    return Stack(tuple(patches), tree.id, tree.commit)


def problems(
    store: GitStore, rev: str = "HEAD", settings: Settings | None = None, memory: Memory | None = None
) -> list[Problem]:
    """Everything that keeps the tree at `rev` from being believed; for HEAD, conflicts in the index too.

    `settings` stands in for the patchkit.toml of that commit.
    """
    found = _examine(store, rev, settings, memory)[2]
    return [*found, *conflicts(store)] if rev == "HEAD" else found


class Ambiguous(NotFound):
    """A word that names several patches."""


def find_patch(stack: Stack, word: str) -> StoredPatch:
    """The patch that a person means by `word`: its folder's name or slug. `NotFound` says what there is,
    `Ambiguous` which of several there are."""
    name = word.strip("/").removeprefix(f"{PATCHES}/")
    found = [patch for patch in stack.patches if name in (patch.name, patch.slug)]
    if len(found) == 1:
        return found[0]
    shown = one_line(word)[:80]
    if found:
        raise Ambiguous(f"{shown}: names {len(found)} patches; say which: {_listed(p.name for p in found)}")
    if _HEX.fullmatch(name):
        raise NotFound(f"{shown}: is not a patch (patches go by name, that is a commit); see patchkit stack")
    names = [patch.name for patch in stack.patches]
    slugs = {patch.slug: patch.name for patch in stack.patches}
    near = [slugs.get(match, match) for match in difflib.get_close_matches(name, [*slugs, *names], 5, 0.5)]
    near = near or [candidate for candidate in names if name and candidate.startswith(name)]
    hint = f"did you mean {_listed(dict.fromkeys(near))}?" if near else "patchkit stack lists them"
    raise NotFound(f"{shown}: no such patch is in force; {hint}")


class Updates(Mapping[str, "Patch"]):
    """The patches of a stack by id, each read and checked when it is asked for, without its keys."""

    def __init__(self, store: GitStore, stack: Stack) -> None:
        self._store = store
        self._stored = {patch.id: patch for patch in stack.patches}

    def __getitem__(self, id: str) -> Patch:
        return read_patch(self._store, self._stored[id], without=(KEYS,))

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def read_patch(store: GitStore, stored: StoredPatch, *, without: Sequence[str] = ()) -> Patch:
    """The whole patch with its numbers, every check made (imports torch), but for files left out."""
    from patchkit.algebra.factors import Patch

    files = {name: store.read(entry.oid) for name, entry in stored.files.items() if name not in without}
    return Patch.from_files(files, stored.name)


def _examine(
    store: GitStore, rev: str, settings: Settings | None, memory: Memory | None
) -> tuple[Tree, list[StoredPatch], list[Problem]]:
    tree = store.tree(rev)
    settings, found = _settings(store, tree) if settings is None else (settings, [])
    base = settings.base_fingerprint if settings else ""
    recalled = memory.recall(tree.id, base) if memory and not found and tree.id else None
    if recalled is None:
        patches, bad = _read_tree(store, tree)
        found += bad
        if settings is not None:
            found += _wrong_bases(patches, settings)
        found += _doubled(patches)
        if memory and not found and tree.id:
            memory.believe(tree.id, base, patches)
    else:
        patches = recalled
    if tree.commit is not None:
        held = {patch.name: patch for patch in patches}
        found += merge_problems(store, tree.commit, held, memory)
    return tree, patches, found


def _read_tree(store: GitStore, tree: Tree) -> tuple[list[StoredPatch], list[Problem]]:
    folders, found = inspect_layout(store, tree)
    patches = []
    for name, result in inspect_folders(store, folders):
        if isinstance(result, Problem):
            found.append(result)
        else:
            patches.append(StoredPatch.read(name, *result, folders[name]))
    return patches, found


def _settings(store: GitStore, tree: Tree) -> tuple[Settings | None, list[Problem]]:
    if tree.settings is None:
        if tree.patches is None:
            return None, []
        return None, [
            Problem(SETTINGS, "is not in the tree", "git restore it, or make one: patchkit init BASE")
        ]
    if tree.settings.mode not in ("100644", "100755"):
        return None, [
            Problem(SETTINGS, "is not a regular file", "put a real file in its place and commit it")
        ]
    try:
        return parse_settings(store.read(tree.settings.oid)), []
    except PatchkitError as error:
        place, _, said = str(error).partition(": ")
        place, said = (place, said) if place.startswith(f"{SETTINGS}:") else (SETTINGS, str(error))
        message, _, remedy = said.removeprefix(f"{SETTINGS}: ").rpartition("; ")
        return None, [Problem(place, message or remedy, remedy if message else "mend it and commit it")]


def _wrong_bases(patches: Sequence[StoredPatch], settings: Settings) -> Iterator[Problem]:
    for patch in patches:
        if patch.header.base != settings.base_fingerprint:
            yield Problem(
                f"{PATCHES}/{patch.name}",
                f"was made for another base ({patch.header.base[:19]}…; {SETTINGS} says "
                f"{settings.base_fingerprint[:19]}…)",
                f"take it out ({taking_out(patch.name)}) and commit its facts again on this base",
            )


def _doubled(patches: Sequence[StoredPatch]) -> Iterator[Problem]:
    """Each fact key at most once: twice is the edit at double strength, or two answers."""
    first: dict[Key, tuple[str, Fact]] = {}
    for patch in patches:
        for number, fact in enumerate(patch.facts, 1):
            if fact.key not in first:
                first[fact.key] = (patch.name, fact)
                continue
            other, held = first[fact.key]
            again = "too" if held.target == fact.target else f"otherwise (“{one_line(held.target)}”)"
            yield Problem(
                f"{PATCHES}/{patch.name}/facts.jsonl:{number}",
                f"“{one_line(fact.text)}” → “{one_line(fact.target)}” is said by {other} {again}",
                f"take one of the two out ({taking_out(patch.name)}) and commit its other facts again",
            )


def conflicts(store: GitStore) -> list[Problem]:
    """What stands in the index in more than one version, each with what can be chosen.

    Of a merge that waits for choices one problem is told: how Git left the patches is not what is asked.
    """
    out = store.git.read("ls_files", "--unmerged", "-z", "--", *store.pathspecs())
    stages: dict[str, dict[str, set[str]]] = {}
    for token in out.decode("utf-8", "surrogateescape").split("\0")[:-1]:
        about, _, path = token.partition("\t")
        path = path.removeprefix(store.prefix)
        unit = "/".join(path.split("/")[:2])
        stages.setdefault(unit, {}).setdefault(path, set()).add(about.split(" ")[2])
    waiting = waiting_merge(store)
    patches = [unit for unit in stages if unit.startswith(f"{PATCHES}/")] if waiting else []
    found = [
        _conflict(store, unit, list(files.values())) for unit, files in stages.items() if unit not in patches
    ]
    if patches:
        remedy = f"choose in {waiting}, then patchkit merge --continue; or give it up, patchkit merge --abort"
        found.append(Problem(PATCHES, "a merge waits for choices", remedy))
    return found


def _conflict(store: GitStore, unit: str, files: Sequence[set[str]]) -> Problem:
    """`files`: the stages of each file (1 the merge base's, 2 HEAD's, 3 the other side's)."""
    place = shlex.quote(f":(top,literal){store.prefix}{unit}")
    sides = [name for name, stage in (("ours", "2"), ("theirs", "3")) if all(stage in f for f in files)]
    gone = [
        name for name, stage in (("HEAD", "2"), ("the other side", "3")) if not any(stage in f for f in files)
    ]
    keep = (
        " or ".join(f"git checkout --{side} -- {place}" for side in sides)
        or f"git checkout COMMIT -- {place}"
    )
    if not gone:
        return Problem(
            unit,
            "is in conflict: a merge left more than one version of it",
            f"choose one whole side, {keep}, and git add -- {place}; or undo it",
        )
    return Problem(
        unit,
        f"is in conflict: {' and '.join(gone)} took it back, and another version came",
        f"leave it out, git rm -r -q -- {place}, or keep it, {keep} and git add -- {place}; or undo it",
    )


def _listed(names: Iterator[str] | Mapping[str, None]) -> str:
    return ", ".join(names)
