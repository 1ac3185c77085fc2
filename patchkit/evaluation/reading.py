"""How a model reads text: its perplexity there, and another's as a multiple of it, with bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from patchkit.evaluation.intervals import Interval, intervals

__all__ = ["Reading", "mean_of_all"]


@dataclass(frozen=True)
class Reading:
    """One model on N texts: ``losses`` [N], the negative log-likelihood in nats of what was read of each, and
    how many ``tokens`` [N] that was."""

    losses: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token. Infinite for a model that gives no numbers any more, NaN where no
        token was read."""
        if not sum(self.tokens):
            return math.nan
        mean = sum(self.losses) / sum(self.tokens)
        return math.exp(mean) if mean < 700 else math.inf

    def times(self, base: Reading) -> Interval:
        """Its perplexity as a multiple of ``base``'s, which read the same texts: they are drawn again
        together, as what is hard to read is so for both."""
        more = np.subtract(self.losses, base.losses)
        if not np.isfinite(more).all():
            return Interval(self.perplexity / base.perplexity, math.nan, math.nan)
        a_token = mean_of_all(more, self.tokens)
        with np.errstate(over="ignore"):
            return Interval(*np.exp([a_token.value, a_token.low, a_token.high]).tolist())


def mean_of_all(sums: np.typing.ArrayLike, counts: np.typing.ArrayLike) -> Interval:
    """The mean over all tokens, from the sums over those of each text; the texts are drawn again."""
    return intervals(np.stack([sums, counts], -1)[:, None].astype(float), ["mean"])["mean"]
