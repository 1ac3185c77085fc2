"""Scores with intervals: ratios of sums over facts, resampled by fact.

The prompts of one fact rise and fall together, so facts are what is drawn again (the bootstrap). Two
models on the same facts are compared in the same resamples: what is hard about a fact is hard for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "COMPARED",
    "WHOLE",
    "Interval",
    "Tally",
    "differences",
    "fact_by_fact",
    "intervals",
    "names_with_whole",
    "share_of_ceiling",
]

Tally = NDArray[np.floating]
"""[N, K, 2] for N facts and K scores: what each fact adds to a score's numerator and denominator."""

COMPARED = ("ES", "PS", "NS")
WHOLE = "S"
"""The harmonic mean of the three (ROME, arXiv 2202.05262, section 3.4); it stands behind them."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value, and the bounds between which it lies in 95 of 100 resamples. NaN where nothing was asked; one
    fact alone has a value and no bounds."""

    value: float
    low: float
    high: float

    def to_list(self) -> list[float | None]:
        """[value, low, high] for JSON, which knows no NaN: null."""
        return [None if np.isnan(number) else number for number in (self.value, self.low, self.high)]


def fact_by_fact(tally: Tally) -> Tally:
    """The same with each fact's own mean in the numerator, and 1 below it, or 0 where it was not asked."""
    asked = tally[..., 1] > 0
    means = np.divide(tally[..., 0], tally[..., 1], out=np.zeros(asked.shape), where=asked)
    return np.stack([means, asked.astype(float)], axis=-1)


def names_with_whole(names: Sequence[str]) -> list[str]:
    """The names of what `intervals` gives for scores of these names."""
    if not set(COMPARED) <= set(names):
        return list(names)
    behind = max(names.index(name) for name in COMPARED) + 1
    return [*names[:behind], WHOLE, *names[behind:]]


def intervals(tally: Tally, names: Sequence[str], seed: int = 0) -> dict[str, Interval]:
    """Each score of one model."""
    (resampled,) = _resampled([tally], names, seed)
    return _bounded(_ratios(tally.sum(0), names), resampled, names, _few(tally, names))


def differences(one: Tally, other: Tally, names: Sequence[str], seed: int = 0) -> dict[str, Interval]:
    """Each score of ``one`` less that of ``other``, on the same facts in the same resamples."""
    first, second = _resampled([one, other], names, seed)
    values = _ratios(one.sum(0), names) - _ratios(other.sum(0), names)
    return _bounded(values, first - second, names, _few(one, names) | _few(other, names))


def share_of_ceiling(tally: Tally, unedited: Tally, names: Sequence[str], seed: int = 0) -> Interval:
    """S as a share of 3 / (2 + 1/NS) with the unedited model's NS, on the same facts in the same resamples.

    That is S with every rewrite and every paraphrase won, and as many neighbours as there. NaN where NS is 0.
    """
    whole, spared = (names_with_whole(names).index(name) for name in (WHOLE, COMPARED[-1]))

    def share(scores: Tally, before: Tally) -> Tally:
        specificity = before[..., spared]
        with np.errstate(divide="ignore", invalid="ignore"):
            found = scores[..., whole] * (2 * specificity + 1) / (3 * specificity)
        return np.where(specificity > 0, found, np.nan)[..., None]

    value = share(_ratios(tally.sum(0), names), _ratios(unedited.sum(0), names))
    resampled = share(*_resampled([tally, unedited], names, seed))
    few = {WHOLE} & (_few(tally, names) | _few(unedited, names))
    return _bounded(value, resampled, [WHOLE], few)[WHOLE]


def _ratios(sums: Tally, names: Sequence[str]) -> Tally:
    """Scores [..., K], or [..., K + 1] with S, from sums [..., K, 2]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = sums[..., 0] / sums[..., 1]
        if not set(COMPARED) <= set(names):
            return ratios
        three = ratios[..., [names.index(name) for name in COMPARED]]
        whole = 3 / (1 / three).sum(-1)
    return np.insert(ratios, names_with_whole(names).index(WHOLE), whole, axis=-1)


def _resampled(tallies: Sequence[Tally], names: Sequence[str], seed: int) -> list[Tally]:
    """The scores [R, K'] of each tally in the same resamples of the facts."""
    count = len(tallies[0])
    drawn = np.random.default_rng(seed).integers(count, size=(_RESAMPLES, count))
    weights = np.stack([np.bincount(row, minlength=count) for row in drawn]).astype(float)
    return [_ratios(np.einsum("rn,nks->rks", weights, one), names) for one in tallies]


def _few(tally: Tally, names: Sequence[str]) -> set[str]:
    """The scores that fewer than two facts have: all resamples of these are alike."""
    few = {name for name, count in zip(names, (tally[..., 1] > 0).sum(0), strict=True) if count < 2}
    return few | ({WHOLE} if few & set(COMPARED) else set())


def _bounded(values: Tally, resampled: Tally, names: Sequence[str], few: set[str]) -> dict[str, Interval]:
    found = {}
    for place, name in enumerate(names_with_whole(names)):
        drawn = resampled[:, place]
        drawn = drawn[~np.isnan(drawn)]  # a resample may hold no fact with such prompts
        known = drawn.size and name not in few and not np.isnan(values[place])
        low, high = np.percentile(drawn, [2.5, 97.5]) if known else (np.nan, np.nan)
        found[name] = Interval(float(values[place]), float(low), float(high))
    return found
