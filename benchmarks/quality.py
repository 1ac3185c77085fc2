"""Scores of edits with intervals, in percent: what a recipe does to facts that are edited N at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from patchkit.evaluation import intervals
from patchkit.evaluation.intervals import Interval, Tally, fact_by_fact, names_with_whole
from patchkit.evaluation.measure import FactChange

__all__ = ["SCORES", "Interval", "Tally", "ceiling_share", "difference", "interval", "tally"]

COUNTED = ("ES", "PS", "NS", "argmax", "paraphrase argmax", "generation", "neighbours kept")
SCORES = tuple(names_with_whole(COUNTED))


def tally(changes: Sequence[FactChange]) -> Tally:
    """Each score's share of a fact's prompts, fact by fact: facts weigh the same, whatever they have."""
    return fact_by_fact(np.array([_counts(change) for change in changes], dtype=float))


def _counts(change: FactChange) -> list[tuple[int, int]]:
    after, number = change.after, len(change.after.neighbors)
    probes = len(after.paraphrases)
    return [
        (after.rewrite.prefers, 1),
        (sum(state.prefers for state in after.paraphrases), probes),
        (sum(bool(state.spares) for state in after.neighbors), number),
        (after.rewrite.argmax, 1),
        (sum(state.argmax for state in after.paraphrases), probes),
        (bool(after.rewrite.says), 1),
        (change.kept_neighbors, number),
    ]


def interval(counts: Tally, seed: int = 0) -> dict[str, Interval]:
    """Each score of one recipe, in percent."""
    return _percent(intervals.intervals(counts, COUNTED, seed))


def difference(one: Tally, other: Tally, seed: int = 0) -> dict[str, Interval]:
    """Each score of ``one`` less that of ``other`` on the same facts, in percentage points."""
    return _percent(intervals.differences(one, other, COUNTED, seed))


def ceiling_share(counts: Tally, unedited: Tally) -> float | None:
    """S in percent of the S of an edit that wins all and moves no neighbour; None where NS was 0."""
    share = intervals.share_of_ceiling(counts, unedited, COUNTED, 0).value
    return None if math.isnan(share) else 100 * share


def _percent(found: dict[str, Interval]) -> dict[str, Interval]:
    return {name: Interval(100 * each.value, 100 * each.low, 100 * each.high) for name, each in found.items()}
