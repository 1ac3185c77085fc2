"""How many layers take an edit, and how much λ, shrinkage and `context_weight` keep of what the model knew.

So `[recipe.many]` of SmolLM2 was chosen, and the size from which on a batch has it. ``--full`` has the large
batches, which get in one another's way as a hundred facts do not.
"""

from __future__ import annotations

from benchmarks.laboratory import Laboratory, laboratory
from benchmarks.methods import Shape, contest, notes
from benchmarks.report import Effort, Measured
from patchkit.editing.recipe import Recipe, format_layers

__all__ = ["measure"]

_SHAPES = {
    Effort.QUICK: (Shape(4),),
    Effort.USUAL: (Shape(100),),
    Effort.FULL: (Shape(100), Shape(500), Shape(1000)),
}
_LARGER, _SHRUNK = 1700.0, 0.15
_MANY = 1000  # facts, of which every recipe of many is one


def measure(effort: Effort) -> Measured:
    """Scores in percent. All share one search: targets depend on the last layer alone."""
    lab = laboratory(effort)
    shapes, contestants = _SHAPES[effort], _contestants(lab)
    rows = [row for shape in shapes for row in contest(lab, shape, contestants)[0]]
    return Measured(rows, (), notes(next(iter(contestants)), shapes))


def _contestants(lab: Laboratory) -> dict[str, Recipe]:
    few = lab.default
    deeper = few.override(layers=tuple(range(max(0, few.layers[0] - 3), few.layers[-1] + 1)), lambda_=_LARGER)
    shrunk = deeper.override(shrinkage=_SHRUNK)
    return {_named(recipe): recipe for recipe in (few, deeper, shrunk, lab.default_of(_MANY))}


def _named(recipe: Recipe) -> str:
    fields = {"shrinkage": recipe.shrinkage, "context_weight": recipe.context_weight}
    rest = "".join(f", {name} {value:g}" for name, value in fields.items() if value)
    return f"layers {format_layers(recipe.layers)}, λ {recipe.lambda_:g}{rest}"
