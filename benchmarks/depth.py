"""How many layers take an edit, and how much λ and shrinkage keep of what the model knew: few facts and many,
against the default's.

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
_LARGER, _SHRUNK = 1700.0, 0.15


def measure(effort: Effort) -> Measured:
    """Scores in percent. All share one search: targets depend on the last layer alone."""
    lab = laboratory(effort)
    shapes = _SHAPES[effort]
    rows = [row for shape in shapes for row in contest(lab, shape, _contestants(lab))[0]]
    return Measured(rows, (), notes(DEFAULT, shapes))


def _contestants(lab: Laboratory) -> dict[str, Recipe]:
    ours = lab.default
    first, last = max(0, ours.layers[0] - 3), ours.layers[-1]
    many = ours.override(layers=tuple(range(first, last + 1)), lambda_=_LARGER)
    named = f"layers {first}-{last}, λ {_LARGER:g}"
    return {
        DEFAULT: ours,
        named: many,
        f"{named}, shrinkage {_SHRUNK:g}": many.override(shrinkage=_SHRUNK),
    }
