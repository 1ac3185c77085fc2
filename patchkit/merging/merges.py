"""Merges, and what does a merge's work, that Git made without a conflict and that are wrong all the same.

Git merges files; what has to be merged is facts. A merge is believed if, for each fact key, what is
in force after it is the three-way merge of what was in force in its parents and their merge base,
and if it brings back no patch that its first parent had taken back since. A rebase, a squash or a
cherry-pick has one parent: it is believed if it brings back no fact that was taken out (see `returns`).
Wrong ones are named while the wrong state lasts, or until a later commit accepts it with the trailer
`Patchkit-Accept: COMMIT` (and the stack's folder behind it, where a repository holds several). Where a
merge's own trailers say what was chosen (see `choices`), exactly that has to be so.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Protocol

from patchkit.errors import PatchkitError
from patchkit.facts import Fact, Key, load_canonical
from patchkit.git.history import LONG, PATCHES, read_history
from patchkit.merging.choices import CHOICE, Choices, read_choices, stack_folder
from patchkit.merging.returns import returned_facts
from patchkit.patch import FACTS
from patchkit.problem import Problem, one_line

if TYPE_CHECKING:
    from patchkit.git.store import GitStore

__all__ = [
    "ACCEPT",
    "MergeMemory",
    "Violation",
    "is_shallow",
    "merge_bases",
    "merge_problems",
    "removals",
    "taking_out",
    "three_way",
]

ACCEPT = "Patchkit-Accept"

_FULL_OR_SHORT = re.compile(r"[0-9a-f]{7,64}")
Said = frozenset[str]  # what is in force for one key: the facts' lines (none, one, or a clash)
Holdings = dict[Key, Said]


@dataclass(frozen=True, slots=True)
class Violation:
    """One way in which a merge is wrong: a key's lines that are not the three-way merge, or a patch
    (`patch` set, `key` None) that came back; `removal` is the commit that had taken it back. With
    `key` and `removal`, `merge` is a commit with one parent that brought back a fact."""

    merge: str
    key: Key | None
    got: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()
    patch: str | None = None
    removal: str | None = None


class Holder(Protocol):
    """A patch in force, as far as merges are concerned."""

    @property
    def facts(self) -> tuple[Fact, ...]: ...


class MergeMemory(Protocol):
    """Which histories were looked through, and what was found in them."""

    def checked_merges(self) -> tuple[list[str], list[Violation]]:
        """Commits whose whole history was looked through, and every violation found in any."""
        ...

    def remember_merges(self, tip: str, violations: Sequence[Violation]) -> None:
        """`tip`'s whole history is looked through; keep what was found."""
        ...


def merge_problems(
    store: GitStore, commit: str, held: Mapping[str, Holder], memory: MergeMemory | None = None
) -> list[Problem]:
    """The merges up to `commit` whose wrong outcome is still so; `held`: the patches at `commit` by name."""
    tips, known = memory.checked_merges() if memory else ([], [])
    found: list[Violation] = []
    if commit not in tips:
        judge = _Judge(store)
        merges = _merges(store, commit, tips)
        for merge in merges:
            found += judge.violations(merge)
        if judge.unknown:
            return [_shallow(judge.unknown[0])]
        history = read_history(store, commit)
        found += [
            Violation(back.commit, back.fact.key, (back.fact.to_line(),), removal=back.removal)
            for back in returned_facts(store, history, judge.holds, store.is_ancestor)
        ]
        worth = found or merges or not tips or len(history) >= LONG
        if memory and worth and not is_shallow(store):  # else its other end was never looked through
            memory.remember_merges(commit, found)
    earlier = [violation for violation in known if store.is_ancestor(violation.merge, commit)]
    lasting = [violation for violation in dict.fromkeys((*earlier, *found)) if _lasts(violation, held)]
    accepted = _accepted(store, commit, {violation.merge for violation in lasting})
    folder = stack_folder(store.prefix)
    return [_problem(violation, held, folder) for violation in lasting if violation.merge not in accepted]


def three_way(bases: Sequence[Holdings], parents: Sequence[Holdings], key: Key) -> set[Said]:
    """What may be in force for `key` after a merge: the one side's change, or any side's of several.

    Several merge bases (criss-cross) allow what any of them explains.
    """
    nothing: Said = frozenset()
    allowed = set()
    for base in bases:
        before = base.get(key, nothing)
        changed = {after for parent in parents if (after := parent.get(key, nothing)) != before}
        allowed |= changed or {before}
    return allowed


class _Judge:
    """Judges merges; facts files are read once."""

    def __init__(self, store: GitStore) -> None:
        self._store = store
        self._facts: dict[str, tuple[Fact, ...]] = {}
        self.unknown: list[str] = []
        """Merges whose base is beyond the edge of a shallow clone."""

    def violations(self, merge: str) -> Iterator[Violation]:
        parents = _parents(self._store.objects.read(merge, "commit"))
        after = self._folders(merge)
        before = [self._folders(parent) for parent in parents]
        if all(folders == after for folders in before):
            return
        bases = merge_bases(self._store, parents)
        if not bases and is_shallow(self._store):
            self.unknown.append(merge)
            return
        based = [self._folders(base) for base in self._pairwise(parents, bases)] or [{}]
        names = _differing([after, *before, *based])
        held = self._held(after, names)
        sides = [self._held(folders, names) for folders in before]
        roots = [self._held(folders, names) for folders in based]
        choices = self._choices(merge, parents)
        for key in sorted(set().union(held, *sides, *roots)):
            side = choices.keys.get(key)
            allowed = three_way(roots, sides, key) if side is None else {sides[side].get(key, frozenset())}
            got: Said = held.get(key, frozenset())
            if got not in allowed and len(got) < 2:  # two at once are the tree's own problem
                wanted = min(allowed, key=sorted)
                yield Violation(merge, key, tuple(sorted(got)), tuple(sorted(wanted)))
        brought = set(after) - set(before[0]) - choices.brought_back
        yield from self._returned(merge, parents[0], bases, brought)

    def _pairwise(self, parents: Sequence[str], bases: Sequence[str]) -> list[str]:
        """The merge bases, and of an octopus those of each two parents too, whatever they alone share."""
        pairs = combinations(parents, 2) if len(parents) > 2 else ()
        shared = (base for pair in pairs for base in merge_bases(self._store, pair))
        return list(dict.fromkeys([*bases, *shared]))

    def _choices(self, merge: str, parents: Sequence[str]) -> Choices:
        """What the merge's own trailers say was chosen: exactly that is believed, and no more."""
        if (
            len(parents) != 2
            or CHOICE.encode().lower() not in self._store.objects.read(merge, "commit").lower()
        ):
            return Choices()
        how = f"--format=%(trailers:key={CHOICE},valueonly,unfold)"
        out = self._store.git.read("log", "--max-count=1", "--no-color", "--no-show-signature", how, merge)
        return read_choices(out.decode("utf-8", "replace").splitlines(), stack_folder(self._store.prefix))

    def holds(self, commit: str, key: Key) -> bool:
        """Whether a fact of this key is in force at a commit."""
        folders = self._folders(commit)
        return any(fact.key == key for oid in folders.values() for fact in self._read(oid))

    def _returned(
        self, merge: str, first: str, bases: Sequence[str], brought: set[str]
    ) -> Iterator[Violation]:
        """Patches that the merge brought and that the first parent's own line had taken back."""
        if not brought:
            return
        removed = removals(self._store, first, bases)
        for name in sorted(brought & set(removed)):
            yield Violation(merge, None, patch=name, removal=removed[name])

    def _folders(self, commit: str) -> dict[str, str]:
        """Patch folder -> object id of its tree, at a commit."""
        patches = self._store.tree(commit).patches
        if patches is None or patches.mode != "40000":
            return {}
        return {item.name: item.oid for item in self._store.objects.tree(patches.oid) if item.mode == "40000"}

    def _held(self, folders: Mapping[str, str], names: Iterable[str]) -> Holdings:
        held: dict[Key, set[str]] = {}
        for name in names:
            for fact in self._read(folders[name]) if name in folders else ():
                held.setdefault(fact.key, set()).add(fact.to_line())
        return {key: frozenset(lines) for key, lines in held.items()}

    def _read(self, folder: str) -> tuple[Fact, ...]:
        """A folder's facts; none where they cannot be read (that commit's own problem, not the merge's)."""
        if folder not in self._facts:
            try:
                blobs = [item.oid for item in self._store.objects.tree(folder) if item.name == FACTS]
                facts = load_canonical(self._store.read(blobs[0]), FACTS) if blobs else ()
            except PatchkitError:
                facts = ()
            self._facts[folder] = facts
        return self._facts[folder]


def _differing(trees: Sequence[Mapping[str, str]]) -> list[str]:
    """Folders that are not the same everywhere; the facts of all others cannot have been merged wrongly."""
    names = set().union(*trees)
    return sorted(name for name in names if len({tree.get(name) for tree in trees}) > 1)


def _merges(store: GitStore, commit: str, tips: Sequence[str]) -> list[str]:
    """Merges up to `commit` (beyond `tips`) after which patches/ differs from a parent's."""
    beyond = ("--merges", "--ignore-missing", commit, *(f"^{tip}" for tip in tips), "--")
    if not store.git.read("rev_list", "--max-count=1", *beyond):
        return []  # no trees compared: most histories have no merge
    return store.git.read("rev_list", "--full-history", *beyond, store.pathspecs()[0]).decode("ascii").split()


def _parents(commit: bytes) -> list[str]:
    lines = commit.partition(b"\n\n")[0].split(b"\n")
    return [line[len(b"parent ") :].decode("ascii") for line in lines if line.startswith(b"parent ")]


def merge_bases(store: GitStore, parents: Sequence[str]) -> list[str]:
    """The best common ancestors; none where the histories share nothing (or a shallow clone hides it)."""
    octopus = ("--octopus",) if len(parents) > 2 else ()
    found = store.git.ask("merge_base", "--all", *octopus, *parents)
    return [] if found is None else found.decode("ascii").split()


def removals(store: GitStore, first: str, bases: Sequence[str]) -> dict[str, str]:
    """Patch folder -> the newest commit on the first parent's line since the merge base that removed it."""
    out = store.git.read(
        "log",
        "-z",
        "--first-parent",
        "--diff-merges=first-parent",
        "--diff-filter=D",
        "--no-renames",
        "--name-only",
        "--no-color",
        "--no-show-signature",
        "--format=%H",
        first,
        *(f"^{base}" for base in bases),
        "--",
        store.pathspecs()[0],
    )
    found: dict[str, str] = {}
    commit = ""
    for token in out.decode("utf-8", "surrogateescape").split("\0"):
        path = token.strip("\n").removeprefix(store.prefix)
        if path.startswith(f"{PATCHES}/"):
            if path.endswith(f"/{FACTS}"):
                found.setdefault(path.split("/")[1], commit)
        elif path:
            commit = path
    return found


def is_shallow(store: GitStore) -> bool:
    return store.git.read("rev_parse", "--is-shallow-repository").strip() == b"true"


def _lasts(violation: Violation, held: Mapping[str, Holder]) -> bool:
    if violation.patch is not None:
        return violation.patch in held
    return violation.got == tuple(sorted(_saying(violation, held)))


def _saying(violation: Violation, held: Mapping[str, Holder]) -> set[str]:
    return {fact.to_line() for patch in held.values() for fact in patch.facts if fact.key == violation.key}


def _accepted(store: GitStore, commit: str, merges: set[str]) -> set[str]:
    """The merges that a commit after them accepts by its trailer."""
    accepted = set()
    for merge in merges:
        out = store.git.read(
            "log",
            "--fixed-strings",
            f"--grep={ACCEPT}:",
            "--regexp-ignore-case",
            "--no-color",
            "--no-show-signature",
            f"--format=%(trailers:key={ACCEPT},valueonly,unfold)",
            f"{merge}..{commit}",
        )
        said = out.decode("utf-8", "replace").splitlines()
        if any(_accepts(value.strip(), merge, stack_folder(store.prefix)) for value in said):
            accepted.add(merge)
    return accepted


def _accepts(value: str, merge: str, folder: str) -> bool:
    """Whether a trailer's value names this merge, and not another stack's folder."""
    commit = value.removesuffix(folder)
    words = commit.lower().split()
    return not commit.endswith("/") and any(
        _FULL_OR_SHORT.fullmatch(w) and merge.startswith(w) for w in words
    )


def taking_out(name: str) -> str:
    """Git's commands for it: patchkit's own believe no stack that has a problem, and change none."""
    return f"git rm -r -q -- {PATCHES}/{name} && git commit -m 'Take {name} out'"


def _problem(violation: Violation, held: Mapping[str, Holder], folder: str) -> Problem:
    short = violation.merge[:10]
    what = "commit" if violation.removal is not None and violation.patch is None else "merge"
    trailer = shlex.quote(f"{ACCEPT}: {short} {folder}".rstrip())
    keep = f"keep it so with: git commit --allow-empty -m 'Accept the {what}' --trailer {trailer}"
    if violation.patch is not None:
        return Problem(
            f"{PATCHES}/{violation.patch}",
            f"was taken back by commit {(violation.removal or '')[:10]}, and merge {short} brought it back",
            f"take it out again ({taking_out(violation.patch)}), or {keep}",
        )
    text = _fact_text([*violation.got, *violation.wanted])
    place = _place(violation, held)
    name, _, line = place.partition(":")
    if violation.removal is not None:
        return Problem(
            f"{PATCHES}/{name}/{FACTS}:{line}",
            f"{text} was taken out by commit {violation.removal[:10]}, and commit {short} (a rebase, a "
            "squash, a cherry-pick, or made by hand) brought it back",
            f"take it out ({taking_out(name)}), or {keep}",
        )
    if not violation.got:
        message = f"{text} is not in force after merge {short}, though no side of it took it out"
        return Problem(
            PATCHES, message, f"bring it back (git checkout {short}^1 or {short}^2 -- PATCH), or {keep}"
        )
    if not violation.wanted:
        message = f"{text} is in force after merge {short}, though one side of it took it out"
    else:
        message = f"{text} is not what the sides of merge {short} make together"
    return Problem(
        f"{PATCHES}/{name}/{FACTS}:{line}",
        message,
        f"take it out ({taking_out(name)}), or {keep}",
    )


def _place(violation: Violation, held: Mapping[str, Holder]) -> str:
    places = (
        f"{name}:{number}"
        for name, patch in held.items()
        for number, fact in enumerate(patch.facts, 1)
        if fact.key == violation.key
    )
    return next(places, "")


def _fact_text(lines: Sequence[str]) -> str:
    fact = load_canonical(f"{lines[0]}\n".encode(), FACTS)[0]
    return one_line(f"“{fact.text}” → “{fact.target}”")


def _shallow(merge: str) -> Problem:
    return Problem(
        PATCHES,
        f"the history is cut off (a shallow clone), so merge {merge[:10]} cannot be checked",
        "get the whole history: git fetch --unshallow",
    )
