"""Facts that were taken out and came back by no merge and on no purpose.

A rebase, a squash or a cherry-pick can carry a fact past the commit that took it out: Git finds that
clean where the fact comes in another folder. Commits of patchkit (their trailers say so) and of
`git revert` bring facts back on purpose, and so does whoever puts a folder back by its own name. A squash of
patchkit's brings back none where it was made, only where it was carried to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from patchkit.errors import PatchkitError
from patchkit.facts import Fact, Key, load_canonical
from patchkit.git.history import PATCHES, Commit, FileChange
from patchkit.patch import FACTS

if TYPE_CHECKING:
    from patchkit.git.store import GitStore

__all__ = ["Return", "returned_facts"]

_REVERTED = "This reverts commit "
_OWN = "patchkit-"
_ACCEPTS = "patchkit-accept"  # in a commit that a person makes
_SQUASHES = "patchkit-squashes"


@dataclass(frozen=True, slots=True)
class Return:
    """`fact` is in force again since `commit`; `removal` is the commit that had taken it out."""

    commit: str
    removal: str
    fact: Fact


def returned_facts(
    store: GitStore,
    history: Sequence[Commit],
    holds: Callable[[str, Key], bool],
    is_ancestor: Callable[[str, str], bool],
) -> Iterator[Return]:
    """The returns in a `history` (`read_history`); `holds` tells whether a key is in force at a commit.

    Only the facts of commits that took facts out, and of those that are nobody's purpose, are read.
    """
    plain = [entry for entry in history if len(entry.parents) == 1]
    removing = [entry for entry in plain if any(change.status != "A" for change in _changes(entry))]
    if not removing:
        return
    read = _Reader(store)
    gone: dict[Key, list[tuple[str, str]]] = {}
    for entry in removing:
        after = {fact.key for change in _changes(entry) for fact in read(change.oid)}
        for change in _changes(entry):
            for key in {fact.key for fact in read(change.old)} - after:
                gone.setdefault(key, []).append((entry.id, _folder(change)))
    for entry in plain if gone else ():
        if _on_purpose(entry) or not any(change.status != "D" for change in _changes(entry)):
            continue
        before = {fact.key for change in _changes(entry) for fact in read(change.old)}
        for change in _changes(entry):
            for fact in read(change.oid):
                if fact.key in before or fact.key not in gone:
                    continue
                removals = [
                    removal
                    for removal, folder in gone[fact.key]
                    if folder != _folder(change)
                    and is_ancestor(removal, entry.id)
                    and not holds(removal, fact.key)  # it was said twice, and once after it
                ]
                if removals and not holds(entry.parents[0], fact.key):
                    yield Return(entry.id, removals[0], fact)


class _Reader:
    """The facts in a blob, read once; none where there is none or it cannot be read."""

    def __init__(self, store: GitStore) -> None:
        self._store = store
        self._facts: dict[str, tuple[Fact, ...]] = {}

    def __call__(self, oid: str) -> tuple[Fact, ...]:
        if not oid.strip("0"):
            return ()
        if oid not in self._facts:
            try:
                self._facts[oid] = load_canonical(self._store.read(oid), FACTS)
            except PatchkitError:
                self._facts[oid] = ()
        return self._facts[oid]


def _changes(entry: Commit) -> Sequence[FileChange]:
    return [change for change in entry.files if _is_facts(change.path.split("/"))]


def _is_facts(parts: Sequence[str]) -> bool:
    return len(parts) == 3 and parts[0] == PATCHES and parts[2] == FACTS


def _folder(change: FileChange) -> str:
    return change.path.split("/")[1]


def _on_purpose(entry: Commit) -> bool:
    """patchkit's own commit that says facts, or a `git revert`."""
    names = [name.lower() for name, _ in entry.trailers]
    own = any(name.startswith(_OWN) and name != _ACCEPTS for name in names) and _SQUASHES not in names
    return own or _REVERTED in entry.message
