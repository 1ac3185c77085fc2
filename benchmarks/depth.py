"""How many layers take an edit, and how well C and λ keep what the model knew: few facts and many, from the
default's layers, λ and tokens of C.

``--full`` has a thousand facts as well, which get in one another's way as a hundred do not.
"""

from __future__ import annotations

from benchmarks.laboratory import Laboratory, laboratory
from benchmarks.methods import DEFAULT, Shape, contest, facts_note
from benchmarks.report import Effort, Measured
from patchkit.editing.recipe import Recipe

__all__ = ["measure"]

_SHAPES = {
    Effort.QUICK: (Shape(4),),
    Effort.USUAL: (Shape(100),),
    Effort.FULL: (Shape(100), Shape(1000)),
}
_LARGER = 1500.0
_TIMES = 5
"""As many tokens of C as the default has, for which its text has to be written."""


def measure(effort: Effort) -> Measured:
    """Scores in percent. Targets depend on the last layer alone, so that layers and λ share their search."""
    lab = laboratory(effort)
    shapes = _SHAPES[effort]
    rows = [row for shape in shapes for row in contest(lab, shape, _contestants(lab))[0]]
    said = f"Differences are from {DEFAULT}, on the same facts, with 95 % intervals."
    return Measured(rows, (), [said, *facts_note(shapes)])


def _contestants(lab: Laboratory) -> dict[str, Recipe]:
    ours = lab.default
    first, last = max(0, ours.layers[0] - 2), ours.layers[-1]
    deeper = ours.override(layers=tuple(range(first, last + 1)))
    named = f"layers {first}-{last}"
    larger = deeper.override(lambda_=_LARGER)
    return {
        DEFAULT: ours,
        named: deeper,
        f"{named}, λ {_LARGER:g}": larger,
        f"{named}, λ {_LARGER:g}, {_TIMES} times the tokens of C": larger.override(
            statistics_tokens=_TIMES * ours.statistics_tokens
        ),
    }
