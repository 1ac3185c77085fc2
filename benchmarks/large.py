"""Many facts in one batch: what `curvature` and λ do there, against published MEMIT with the same layers.

``--full`` has the thousand facts of MEMIT's own question; the usual run 300 of them, from odd cases alone.
"""

from __future__ import annotations

from benchmarks.laboratory import Laboratory, laboratory
from benchmarks.methods import DEFAULT, PLAIN, Shape, contest, notes
from benchmarks.quality import difference
from benchmarks.recipe import published
from benchmarks.report import Bar, Effort, Measured
from patchkit.editing.recipe import Recipe

__all__ = ["measure"]

_SHAPES = {Effort.QUICK: Shape(4), Effort.USUAL: Shape(300), Effort.FULL: Shape(1000)}
_LIGHT = 300.0
"""The λ that batches of a hundred facts chose."""


def measure(effort: Effort) -> Measured:
    """Scores in percent; one search of targets serves every λ."""
    lab = laboratory(effort)
    shape = _SHAPES[effort]
    rows, found, before = contest(lab, shape, _contestants(lab))
    ours, plain = found[DEFAULT], found[PLAIN]
    bars = []
    if shape == _SHAPES[Effort.FULL]:
        rise = (ours.perplexity - before) / (plain.perplexity - before)
        bars = [
            Bar("1000 facts: S gained, points", difference(ours.counts, plain.counts)["S"].value, 3.0),
            Bar("1000 facts: rise of perplexity, of published MEMIT's", rise, 0.5, most=True),
        ]
    return Measured(rows, bars, notes(PLAIN, [shape]))


def _contestants(lab: Laboratory) -> dict[str, Recipe]:
    plain, ours = published(lab), lab.default
    return {
        PLAIN: plain,
        f"the same, λ {_LIGHT:g}": plain.override(lambda_=_LIGHT),
        DEFAULT: ours,
        "the default without curvature": ours.override(curvature=0.0),
    }
