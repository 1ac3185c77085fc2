"""A stack told to people who do not have it: history, patches, facts, weights, interference, problems.

What is read grows with the stack, what is told does not: of a large stack the newest patches and facts are
listed, and the report says how many there are. A tree that cannot be believed is told, not raised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from patchkit.actions.diff import WeightDifference, difference_of
from patchkit.actions.log import History, log
from patchkit.actions.show import latest_results
from patchkit.actions.status import Row, listing
from patchkit.algebra.overlap import incomparable, pairwise
from patchkit.errors import PatchkitError
from patchkit.facts import Fact
from patchkit.problem import Problem
from patchkit.settings import Settings
from patchkit.stack import Stack, TreeProblems

if TYPE_CHECKING:
    from patchkit.algebra.factors import Patch
    from patchkit.repository import Repository

__all__ = ["DRAWN", "Measured", "Overlap", "Report", "WeightNorm", "most_interfering", "report"]

DRAWN = 12  # lines of a commit in the graph
COMMITS = 200  # the newest that are drawn
ROWS = 500  # patches that are listed
FACTS = 1000  # facts that are listed
LOADED = 100  # patches whose numbers are read
CELLS = 20  # patches on a side of the heat map


@dataclass(frozen=True)
class Measured:
    """A fact in force with what was measured of it on this machine: {"before": …, "after": …}, as stored."""

    patch: str
    line: int
    fact: Fact
    result: Mapping[str, Any] | None


@dataclass(frozen=True)
class WeightNorm:
    """‖Σ ΔW‖ (Frobenius) of the patches together in one weight, over ‖W‖ where that is known here."""

    weight: WeightDifference
    share: float | None


@dataclass(frozen=True)
class Overlap:
    """`values[i][j]`: what patch j does to the fact of patch i that it disturbs most (`overlap.pairwise`).

    None on the diagonal and in the row of a patch without keys; `measured` patches were compared, and
    those that are disturbed or disturb most are told."""

    patches: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    measured: int


@dataclass(frozen=True)
class Report:
    """What the page shows. Rows and facts are newest first; `patches` and `facts_in_force` count all of them.

    `patches` is None where the tree cannot be believed; `left_out` says why weights and overlap are empty.
    """

    name: str
    revision: str
    commit: str | None
    settings: Settings | None
    problems: tuple[Problem, ...]
    history: History
    commits: int
    patches: int | None
    rows: tuple[Row, ...]
    facts_in_force: int
    facts: tuple[Measured, ...]
    weights: tuple[WeightNorm, ...]
    overlap: Overlap | None
    left_out: str | None


def report(repository: Repository, revision: str = "HEAD") -> Report:
    """Collect everything about the stack at ``revision``; reads the newest patches' numbers, no base."""
    store = repository.store
    commit = store.head() if revision == "HEAD" else store.resolve(revision)
    problems = tuple(repository.problems(revision))
    settings = None
    with suppress(PatchkitError):  # told as a problem
        settings = store.settings(revision)
    stack = _believed(repository, revision)
    rows = _listed(repository, stack, revision) if stack else []
    facts = _facts(repository, stack, rows) if stack else []
    loaded = _loaded(repository, stack, rows) if stack else {}
    left_out = incomparable(loaded.values()) if loaded else None
    history = log(repository, revision, graph=DRAWN)
    return Report(
        name=store.folder.name,
        revision=revision,
        commit=commit,
        settings=settings,
        problems=problems,
        history=replace(history, entries=history.entries[:COMMITS]),
        commits=len(history.entries),
        patches=len(rows) if stack else None,
        rows=tuple(rows[:ROWS]),
        facts_in_force=sum(row.facts for row in rows),
        facts=tuple(facts),
        weights=() if left_out or len(rows) > LOADED else tuple(_weights(repository, loaded, settings)),
        overlap=None if left_out or len(loaded) < 2 else _overlap(loaded),
        left_out=left_out,
    )


def _believed(repository: Repository, revision: str) -> Stack | None:
    try:
        return repository.stack(revision)
    except TreeProblems:
        return None


def _listed(repository: Repository, stack: Stack, revision: str) -> list[Row]:
    """Newest first; norms that the catalogue lacks are computed where it can be written."""
    norms = repository.catalogue.patch_norms()
    if any(norms.get(patch.id, (None, None))[0] is None for patch in stack.patches):
        with suppress(PatchkitError):
            repository.reindex()
    return listing(repository, revision)[::-1]


def _facts(repository: Repository, stack: Stack, rows: Sequence[Row]) -> list[Measured]:
    found: list[Measured] = []
    for row in rows:
        if len(found) >= FACTS:
            break
        stored = stack.named(row.name)
        results = latest_results(repository, stored)
        found += [Measured(row.name, n, fact, results.get(n)) for n, fact in enumerate(stored.facts, 1)]
    return found[:FACTS]


def _loaded(repository: Repository, stack: Stack, rows: Sequence[Row]) -> dict[str, Patch]:
    return {row.name: repository.patch(stack.named(row.name)) for row in rows[:LOADED]}


def _weights(
    repository: Repository, patches: Mapping[str, Patch], settings: Settings | None
) -> list[WeightNorm]:
    base = repository.catalogue.base_norms(settings.base_fingerprint) if settings else {}
    return [
        WeightNorm(weight, weight.norm / base[weight.name] if base.get(weight.name) else None)
        for weight in difference_of({}, {patch.id: patch for patch in patches.values()})
    ]


def _overlap(patches: Mapping[str, Patch]) -> Overlap:
    found = pairwise(patches)
    names = most_interfering(found, CELLS)
    return Overlap(
        patches=tuple(names),
        values=tuple(tuple((found[name] or {}).get(other) for other in names) for name in names),
        measured=len(found),
    )


def most_interfering(found: Mapping[str, Mapping[str, float] | None], limit: int) -> list[str]:
    """The ``limit`` patches that are disturbed or disturb most, in the order of ``found``."""
    worst = dict.fromkeys(found, 0.0)
    for name, row in found.items():
        for other, value in (row or {}).items():
            worst[name] = max(worst[name], value)
            worst[other] = max(worst[other], value)
    chosen = set(sorted(found, key=lambda name: -worst[name])[:limit])
    return [name for name in found if name in chosen]
