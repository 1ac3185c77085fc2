"""What a stack does to all that it was not asked to change: text of the base's own, and the weights' norm.

A model that is edited on and on collapses: first other facts go, then all language (Gupta et al. 2024,
arXiv 2401.07453; Yang et al. 2024, arXiv 2402.09656, where perplexity shows it first). On text that the base
sampled itself, at temperature 1, the quotient of the edited model's perplexity and the base's is exp of
KL(base ‖ edited) a token, as estimated from that text. So no corpus is needed, and 1 is about the best there
is: nearly, since the text was written behind a token that opens it, and is read without, where the tokenizer
adds none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchkit.evaluation.reading import Reading
from patchkit.evaluation.voice import Voice

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GROWTH", "PERPLEXITY", "Harm", "growths", "read"]

PERPLEXITY = 1.05
GROWTH = 1.1
"""From here on SmolLM2 had lost a quarter of the facts that nobody edited, or more: docs/evaluation.md."""

_AT_ONCE = 8  # documents whose logits are held together


@dataclass(frozen=True)
class Harm:
    """One stack on one base: how it and the base read the base's own text; ``growth``: ‖W + ΔW‖ / ‖W‖ over
    the weights that the stack edits."""

    reading: Reading
    of_base: Reading
    growth: float

    @property
    def perplexity(self) -> float:
        """Of the base's own text."""
        return self.reading.perplexity

    @property
    def base(self) -> float:
        """The base's perplexity there."""
        return self.of_base.perplexity

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
        """For JSON, which knows no infinity: null. The rise has its 95 % bounds."""
        values = {"perplexity": self.perplexity, "base_perplexity": self.base, "rise": self.rise}
        bounds = self.reading.times(self.of_base)
        told = {**values, "rise_low": bounds.low, "rise_high": bounds.high, "growth": self.growth}
        return {name: value if math.isfinite(value) else None for name, value in told.items()}


def read(voice: Voice, documents: Sequence[str]) -> Reading:
    """The documents' tokens, each given those before it; a document's first word is given."""
    pairs = [pair for pair in map(_parted, documents) if all(map(str.strip, pair))]
    scores = [
        score
        for start in range(0, len(pairs), _AT_ONCE)
        for score in voice.score(pairs[start : start + _AT_ONCE])
    ]
    losses = tuple(-score.log_probability for score in scores)
    return Reading(losses, tuple(score.tokens for score in scores))


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
