"""Many facts in one batch, with the recipe that such a batch has by default, against published MEMIT.

Beside them it without `context_weight`, and the recipe of few facts. ``--full`` has the thousand facts of
MEMIT's own question; the usual run 300 of them, from odd cases alone.
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
_FEW = "the default of few facts"


def measure(effort: Effort) -> Measured:
    """Scores in percent."""
    lab = laboratory(effort)
    shape = _SHAPES[effort]
    rows, found, before = contest(lab, shape, _contestants(lab, shape.facts))
    ours, plain = found[DEFAULT], found[PLAIN]
    bars = []
    if shape == _SHAPES[Effort.FULL]:
        rise = (ours.perplexity - before) / (plain.perplexity - before)
        bars = [
            Bar("1000 facts: S gained, points", difference(ours.counts, plain.counts)["S"].value, 3.0),
            Bar("1000 facts: rise of perplexity, of published MEMIT's", rise, 0.5, most=True),
        ]
    return Measured(rows, bars, notes(PLAIN, [shape]))


def _contestants(lab: Laboratory, facts: int) -> dict[str, Recipe]:
    few, ours = lab.default, lab.default_of(facts)
    of_means = ours.override(context_weight=0.0)
    rest = {f"{DEFAULT}, context_weight 0": of_means, _FEW: few} if ours != few else {}
    return {
        PLAIN: published(lab),
        DEFAULT: ours,
        **rest,
    }
