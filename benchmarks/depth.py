"""How many layers take an edit, and how far the solve keeps what the model knew and shrinks C: few facts and
many, against the default.

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
_FEWER, _LIGHTER = 5, 1000.0


def measure(effort: Effort) -> Measured:
    """Scores in percent. All share one search: targets depend on the last layer alone."""
    lab = laboratory(effort)
    shapes = _SHAPES[effort]
    rows = [row for shape in shapes for row in contest(lab, shape, _contestants(lab))[0]]
    return Measured(rows, (), notes(DEFAULT, shapes))


def _contestants(lab: Laboratory) -> dict[str, Recipe]:
    ours = lab.default
    fewer = ours.override(layers=ours.layers[-_FEWER:])
    named = f"layers {fewer.layers[0]}-{fewer.layers[-1]}"
    return {
        DEFAULT: ours,
        "shrinkage 0": ours.override(shrinkage=0.0),
        named: fewer,
        f"{named}, λ {_LIGHTER:g}, shrinkage 0": fewer.override(lambda_=_LIGHTER, shrinkage=0.0),
    }
