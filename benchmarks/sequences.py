"""Which editor lasts: batches of fifty facts, each edited on those before it, against published MEMIT.

What is asked afterwards are facts of all batches, so that what a later one undid counts.
"""

from __future__ import annotations

from benchmarks.laboratory import laboratory
from benchmarks.methods import PLAIN, Shape, contest, contestants, notes
from benchmarks.report import Effort, Measured

__all__ = ["measure"]

_SHAPES = {
    Effort.QUICK: (Shape(2, 2),),
    Effort.USUAL: (Shape(50, 4),),
    Effort.FULL: (Shape(50, 4), Shape(50, 20)),
}


def measure(effort: Effort) -> Measured:
    """Scores in percent after the last batch, each less published MEMIT's on the same facts."""
    lab = laboratory(effort)
    every = contestants(lab)
    rows = [row for shape in _SHAPES[effort] for row in contest(lab, shape, every)[0]]
    return Measured(rows, (), notes(PLAIN, _SHAPES[effort]))
