"""How many layers take an edit, and how much λ keeps of what the model knew: few facts and many, against the
default's layers and λ.

``--full`` has a thousand facts as well, which get in one another's way as a hundred do not.
"""

from __future__ import annotations

from benchmarks.laboratory import Laboratory, laboratory
from benchmarks.methods import DEFAULT, Shape, contest, notes
from benchmarks.report import Effort, Measured
from patchkit.editing.recipe import Recipe

__all__ = ["measure"]

_SHAPES = {
    Effort.QUICK: (Shape(4),),
    Effort.USUAL: (Shape(100),),
    Effort.FULL: (Shape(100), Shape(1000)),
}
_LARGER = 1500.0


def measure(effort: Effort) -> Measured:
    """Scores in percent. All share one search: targets depend on the last layer alone."""
    lab = laboratory(effort)
    shapes = _SHAPES[effort]
    rows = [row for shape in shapes for row in contest(lab, shape, _contestants(lab))[0]]
    return Measured(rows, (), notes(DEFAULT, shapes))


def _contestants(lab: Laboratory) -> dict[str, Recipe]:
    ours = lab.default
    first, last = max(0, ours.layers[0] - 2), ours.layers[-1]
    deeper = ours.override(layers=tuple(range(first, last + 1)))
    named = f"layers {first}-{last}"
    return {
        DEFAULT: ours,
        named: deeper,
        f"{named}, λ {_LARGER:g}": deeper.override(lambda_=_LARGER),
    }
