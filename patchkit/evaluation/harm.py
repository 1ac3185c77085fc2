"""What a stack does to all that it was not asked to change: text of the base's own, and the weights' norm.

A model that is edited on and on collapses: first other facts go, then all language (Gupta et al. 2024,
arXiv 2401.07453; Yang et al. 2024, arXiv 2402.09656, where perplexity shows it first). On text that the base
sampled itself, at temperature 1, the quotient of the edited model's perplexity and the base's is exp of
KL(base ‖ edited) a token, as estimated from that text. So no corpus is needed, and 1 is the best there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchkit.evaluation.voice import Voice

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GROWTH", "PERPLEXITY", "Harm", "growths", "perplexity"]

PERPLEXITY = 1.05
GROWTH = 1.1
"""From here on SmolLM2 had lost a quarter of the facts that nobody edited, or more: docs/evaluation.md."""

_AT_ONCE = 8  # documents whose logits are held together


@dataclass(frozen=True)
class Harm:
    """One stack on one base. ``perplexity`` of the base's own text, ``base`` the base's there; ``growth``:
    ‖W + ΔW‖ / ‖W‖ over the weights that the stack edits."""

    perplexity: float
    base: float
    growth: float

    @property
    def rise(self) -> float:
        """The perplexity, as a multiple of the base's."""
        return self.perplexity / self.base

    def warnings(self) -> tuple[str, ...]:
        """A line for each threshold that is passed."""
        found = []
        if self.rise >= PERPLEXITY:
            found.append(f"the perplexity of the base's own text is {self.rise:.3g} times the base's")
        if not self.growth < GROWTH:
            found.append(f"the edited weights are {self.growth:.3g} times as large as the base's")
        if not found:
            return ()
        return (
            f"{' and '.join(found)}: such a model forgets more than it was told to (look with patchkit eval, "
            "take patches back with patchkit revert)",
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no infinity: null."""
        values = {"perplexity": self.perplexity, "base_perplexity": self.base, "rise": self.rise}
        told = {**values, "growth": self.growth}
        return {name: value if math.isfinite(value) else None for name, value in told.items()}


def perplexity(voice: Voice, documents: Sequence[str]) -> float:
    """exp of the mean negative log-likelihood of the documents' tokens, each given those before it.

    A document's first word is given. Infinite for a model that gives no numbers any more, NaN without a text.
    """
    pairs = [pair for pair in map(_parted, documents) if all(map(str.strip, pair))]
    scores = [
        score
        for start in range(0, len(pairs), _AT_ONCE)
        for score in voice.score(pairs[start : start + _AT_ONCE])
    ]
    if not scores:
        return math.nan
    mean = -sum(score.log_probability for score in scores) / sum(score.tokens for score in scores)
    return math.exp(mean) if mean < 700 else math.inf


def _parted(document: str) -> tuple[str, str]:
    """The first word and the rest; in a script without spaces, two halves."""
    text = document.strip()
    head, _, tail = text.partition(" ")
    return (head, tail) if tail else (text[: len(text) // 2], text[len(text) // 2 :])


def growths(base: Callable[[str], Tensor], weights: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """‖W + ΔW‖ / ‖W‖ of each set of weights, over all that any of them changes; 1 where none changes any.

    ``base`` reads a weight of the base by its stored name.
    """
    names = sorted({name for side in weights for name in side})
    squares = [0.0] * (1 + len(weights))
    for name in names:
        plain = base(name)
        for place, weight in enumerate((plain, *(side.get(name, plain) for side in weights))):
            squares[place] += float(weight.double().square().sum())
    return [math.sqrt(each / squares[0]) if squares[0] else 1.0 for each in squares[1:]]
