"""Scores of edits with intervals: what a recipe does to facts that are edited N at a time.

Shares are over all prompts, as CounterFact reports them; intervals are from resampling facts, since
the prompts of a fact rise and fall together. Two recipes on the same facts are compared by the same
resamples, so what is hard about a fact is hard for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from patchkit.evaluation.measure import FactChange

__all__ = ["SCORES", "Interval", "Tally", "difference", "interval", "tally"]

Tally = np.ndarray
"""[N, 7, 2] for N facts: hits and prompts of each counted score."""

COUNTED = ("ES", "PS", "NS", "argmax", "paraphrase argmax", "generation", "neighbours kept")
SCORES = (*COUNTED[:3], "S", *COUNTED[3:])
_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value, and where it lies in 95 of 100 resamples."""

    value: float
    low: float
    high: float


def tally(changes: Sequence[FactChange]) -> Tally:
    """Count each score's hits and prompts, fact by fact."""
    return np.array([_counts(change) for change in changes], dtype=float)


def _counts(change: FactChange) -> list[tuple[int, int]]:
    after, number = change.after, len(change.after.neighbors)
    probes = len(after.paraphrases)
    return [
        (after.rewrite.prefers, 1),
        (sum(state.prefers for state in after.paraphrases), probes),
        (sum(not state.prefers for state in after.neighbors), number),
        (after.rewrite.argmax, 1),
        (sum(state.argmax for state in after.paraphrases), probes),
        (bool(after.rewrite.says), 1),
        (change.kept_neighbors, number),
    ]


def _scores(counts: Tally) -> np.ndarray:
    """Shares in percent in the order of ``SCORES`` from summed counts [..., 7, 2]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = 100 * counts[..., 0] / counts[..., 1]
        whole = 3 / (1 / shares[..., :3]).sum(-1, keepdims=True)
    return np.concatenate([shares[..., :3], whole, shares[..., 3:]], axis=-1)


def _resampled(tallies: Sequence[Tally], seed: int) -> list[np.ndarray]:
    """The scores [R, 8] of each tally in the same resamples of the facts."""
    count = len(tallies[0])
    drawn = np.random.default_rng(seed).integers(count, size=(_RESAMPLES, count))
    weights = np.stack([np.bincount(row, minlength=count) for row in drawn]).astype(float)
    return [_scores(np.einsum("rn,nsk->rsk", weights, one)) for one in tallies]


def _intervals(values: np.ndarray, resampled: np.ndarray) -> dict[str, Interval]:
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    return {
        name: Interval(float(v), float(a), float(b))
        for name, v, a, b in zip(SCORES, values, low, high, strict=True)
    }


def interval(counts: Tally, seed: int = 0) -> dict[str, Interval]:
    """Each score of one recipe, in percent."""
    return _intervals(_scores(counts.sum(0)), _resampled([counts], seed)[0])


def difference(one: Tally, other: Tally, seed: int = 0) -> dict[str, Interval]:
    """Each score of ``one`` less that of ``other`` on the same facts, in percentage points."""
    first, second = _resampled([one, other], seed)
    return _intervals(_scores(one.sum(0)) - _scores(other.sum(0)), first - second)
