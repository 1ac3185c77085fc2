"""History as facts: what each commit added, removed or changed; searched by subject or text; as a graph.

Everything comes from two Git commands (the history, and the graph that Git itself draws) and from the facts
files of the commits that are looked at; nothing here needs a catalogue or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from patchkit.errors import BadInput, PatchkitError
from patchkit.facts import Fact, Key, load_canonical, normal
from patchkit.git.history import Commit, FileChange, GraphRow, read_graph, read_history
from patchkit.patch import FACTS
from patchkit.problem import one_line

if TYPE_CHECKING:
    from patchkit.git.store import GitStore
    from patchkit.repository import Repository

__all__ = ["Entry", "FactMove", "History", "drawn", "history_of", "log"]

Line = TypeVar("Line")

_CHUNK = 200  # commits whose facts files are read at once


@dataclass(frozen=True)
class FactMove:
    """What a commit did to one fact. ``kind``: "added", "removed" or "changed" (said otherwise, or by another
    patch); ``before`` and ``patch_before`` are of what a changed fact was."""

    kind: str
    fact: Fact
    patch: str
    before: Fact | None = None
    patch_before: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "patch": self.patch,
            "subject": self.fact.subject,
            "prompt": self.fact.prompt,
            "target": self.fact.target,
            "target_before": None if self.before is None else self.before.target,
            "patch_before": self.patch_before,
        }


@dataclass(frozen=True)
class Entry:
    """A commit, and what it did to facts (None where that was not asked for)."""

    commit: Commit
    facts: tuple[FactMove, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        plain = self.commit.to_dict()
        return plain if self.facts is None else {**plain, "facts": [move.to_dict() for move in self.facts]}


@dataclass(frozen=True)
class History:
    """The commits that were asked for; ``graph`` has a row for each, and for those left out between.

    ``cut``: the search came to the end of a shallow clone, and what it found may not be all.
    """

    entries: tuple[Entry, ...]
    graph: tuple[GraphRow, ...] = ()
    cut: bool = False


def log(
    repository: Repository,
    revision: str = "HEAD",
    limit: int | None = None,
    *,
    facts: bool = False,
    subject: str | None = None,
    text: str | None = None,
    graph: int = 0,
) -> History:
    """The commits that changed patches, newest first, at most ``limit`` of those that are asked for.

    ``revision``: those up to this commit; of a range ``A..B`` those of B that A has not, as `git log` has it.
    ``facts``: with what each did to facts. ``subject``: only those that touched a fact of that subject (as
    keys compare it). ``text``: only those by which a fact that holds it (exactly) came, went or changed.
    ``graph``: with the graph's lines, for entries of up to that many lines each.
    """
    store = repository.store
    if revision == "HEAD" and store.head() is None:
        return History(())
    since, commit = _ends(store, revision)
    searched = subject is not None or text is not None
    commits = read_history(store, commit, since=since, connected=bool(graph))
    told: Iterable[Entry] = map(Entry, commits)
    if facts or searched:
        told = history_of(store, commits)
    chosen: list[Entry] = []
    cut = False
    for entry in told:
        cut |= entry.commit.cut
        moves = [move for move in entry.facts or () if _asked_for(move, subject, text)]
        if (searched and not moves) or not _listed(entry.commit, bool(graph)):
            continue
        chosen.append(replace(entry, facts=tuple(moves) if facts else None))
        if limit is not None and len(chosen) == limit:
            break
    drawing = tuple(read_graph(store, commit, graph, since)) if graph else ()
    return History(tuple(chosen), drawing, cut)


def _ends(store: GitStore, revision: str) -> tuple[str | None, str]:
    """The commits that a revision or a range ``A..B`` names: A, None without one, and B. An end left out
    is HEAD."""
    if "..." in revision:
        raise BadInput(f"{one_line(revision)!r}: a range is A..B; for what is on one side alone, see diff")
    older, dots, newer = revision.partition("..")
    if not dots:
        return None, store.resolve(revision)
    return store.resolve(older or "HEAD"), store.resolve(newer or "HEAD")


def drawn(
    found: History, lines: Callable[[Entry, GraphRow], Sequence[Line]]
) -> Iterator[tuple[str, Line | None]]:
    """The graph down to the last commit that is shown; of those left out only what they connect.

    Edges, each with the line of its commit that stands right of it; ``lines`` gives a commit's.
    """
    entries = {entry.commit.id: entry for entry in found.entries}
    waiting = len(entries)
    for row in found.graph:
        if not waiting:
            return
        told: Sequence[Line] = ()
        if entry := entries.get(row.id):
            waiting -= 1
            told = lines(entry, row)
        for place, edge in enumerate(row.drawn(len(told))):
            yield edge, told[place] if place < len(told) else None


def history_of(store: GitStore, commits: Sequence[Commit]) -> Iterator[Entry]:
    """Each commit with what it did to facts; files are read as far as entries are taken."""
    known: dict[str, tuple[Fact, ...]] = {}
    for start in range(0, len(commits), _CHUNK):
        chunk = commits[start : start + _CHUNK]
        wanted = {
            oid for commit in chunk for change in _facts_files(commit) for oid in (change.old, change.oid)
        }
        known = {oid: known[oid] for oid in wanted & known.keys()}
        known |= _read(store, sorted(oid for oid in wanted - known.keys() if oid.strip("0")))
        for commit in chunk:
            yield Entry(commit, tuple(_moves(commit, known)))


def _listed(commit: Commit, graph: bool) -> bool:
    """Whether it changed patches, or may have; in a graph, a merge of two sides that did is listed too."""
    merges = graph and len(commit.parents) > 1
    return bool(commit.added or commit.changed or commit.removed or merges or commit.cut)


def _facts_files(commit: Commit) -> list[FileChange]:
    return [
        change for change in commit.files if change.path.endswith(f"/{FACTS}") and change.path.count("/") == 2
    ]


def _read(store: GitStore, oids: Sequence[str]) -> dict[str, tuple[Fact, ...]]:
    """The facts of files, by object id; one that cannot be believed holds none."""
    found: dict[str, tuple[Fact, ...]] = {}
    try:
        texts = dict(zip(oids, store.read_all(oids), strict=True))
    except PatchkitError:  # one is damaged: the others are read all the same
        texts = {}
        for oid in oids:
            with suppress(PatchkitError):
                texts[oid] = store.read(oid)
    for oid, text in texts.items():
        with suppress(PatchkitError):
            found[oid] = load_canonical(text, oid)
    return found


def _moves(commit: Commit, known: dict[str, tuple[Fact, ...]]) -> Iterator[FactMove]:
    """By key over the whole commit: a fact that one patch lost and another got has changed its patch."""
    if commit.cut:
        return
    before: dict[Key, tuple[str, Fact]] = {}
    after: dict[Key, tuple[str, Fact]] = {}
    for change in _facts_files(commit):
        name = change.path.split("/")[1]
        before.update((fact.key, (name, fact)) for fact in known.get(change.old, ()))
        if change.status != "D":
            after.update((fact.key, (name, fact)) for fact in known.get(change.oid, ()))
    for key, (patch, fact) in before.items():
        if key not in after:
            yield FactMove("removed", fact, patch)
    for key, (patch, fact) in after.items():
        if key not in before:
            yield FactMove("added", fact, patch)
        elif before[key] != (patch, fact):
            yield FactMove("changed", fact, patch, before[key][1], before[key][0])


def _asked_for(move: FactMove, subject: str | None, text: str | None) -> bool:
    sides = [fact for fact in (move.fact, move.before) if fact is not None]
    if subject is not None and not any(normal(fact.subject) == normal(subject) for fact in sides):
        return False
    if text is None:
        return True
    return any(_holds(fact, text) for fact in sides)


def _holds(fact: Fact, text: str) -> bool:
    """Whether any text of the fact holds it, the prompt with the subject in its place among them."""
    texts = [fact.text, fact.prompt, fact.target, fact.id, fact.was, fact.relation, fact.source, fact.note]
    texts += [*fact.paraphrases, *fact.neighbors]
    if fact.reverse is not None:
        texts += [fact.reverse.text, fact.reverse.target]
    return any(text in part for part in texts if part is not None)
