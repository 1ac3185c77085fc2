"""The grid that the default recipe was chosen from: one setting at a time, on even cases alone.

What is chosen here is reported by ``benchmarks.recipe`` on the odd cases, which choose nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.laboratory import Laboratory, laboratory
from benchmarks.quality import SCORES, Tally, difference, interval, tally
from benchmarks.report import Cell, Effort, Measured
from patchkit.editing.recipe import Recipe
from patchkit.evaluation.measure import FactState, compare
from patchkit.fact import Fact

__all__ = ["GRID", "measure"]

FACTS, SIZE = 100, 100

GRID: Mapping[str, Mapping[str, Any]] = {
    "Adam, rate 0.5, 6 templates a step, stop 0.05": {"optimiser": "adam", "learning_rate": 0.5},
    "Adam, rate 2, 6 templates a step, stop 0.05": {"optimiser": "adam", "learning_rate": 2.0},
    "rate 0.15": {"learning_rate": 0.15},
    "rate 0.5": {"learning_rate": 0.5},
    "1 template a step": {"templates_per_step": 1},
    "3 templates a step": {"templates_per_step": 3},
    "all templates a step": {"templates_per_step": 0},
    "no wordings of others": {"wordings": 0},
    "stop 0.05": {"stop_loss": 0.05},
    "stop 0.2": {"stop_loss": 0.2},
    "6 steps at most": {"steps": 6},
    "clamp 0.5": {"clamp": 0.5},
    "clamp 1": {"clamp": 1.0},
    "weight decay 0": {"weight_decay": 0.0},
    "no contexts": {"contexts": 0},
    "5 contexts": {"contexts": 5},
    "contexts of 10 tokens": {"context_tokens": 10},
    "curvature 0": {"curvature": 0.0},
    "curvature 1": {"curvature": 1.0},
    "λ 300": {"lambda_": 300.0},
    "λ 3000": {"lambda_": 3000.0},
    "shrinkage 0.1": {"shrinkage": 0.1},
    "layers 3-7": {"layers": "3-7"},
    "layers 5-9": {"layers": "5-9"},
    "layers 2-8": {"layers": "2-8"},
}
"""Settings that differ from the default, by the name of the row; for C see ``benchmarks.statistics``."""

_SHOWN = ("ES", "PS", "NS", "S", "argmax", "paraphrase argmax", "generation")
_PLAIN = {
    "rate_decay": 1.0,
    "templates_per_step": 0,
    "stop_loss": 0.05,
    "contexts": 5,
    "context_tokens": 10,
    "wordings": 0,
    "avoid_sinks": False,
    "curvature": 0.0,
}


def measure(effort: Effort) -> Measured:
    """Scores in percent at 100 facts a batch, and S and paraphrase argmax less the default's."""
    lab = laboratory(effort)
    count, size = (4, 2) if effort is Effort.QUICK else (FACTS, SIZE)
    facts = lab.facts("even", count)
    before = lab.observe(facts)
    bench = _Bench(lab, facts, before, size)
    grid = dict(list(GRID.items())[:3]) if effort is Effort.QUICK else GRID
    steps, own = bench.run(lab.default)
    rows = [_row("the default", steps, own, own)]
    print(rows[-1], file=sys.stderr, flush=True)
    for name, changes in grid.items():
        recipe = lab.default.override(**{**(_PLAIN if name.startswith("Adam") else {}), **changes})
        rows.append(_row(name, *bench.run(recipe), own))
        print(f"{len(rows)} of {len(grid) + 1}: {rows[-1]}", file=sys.stderr, flush=True)
    unedited = interval(tally(compare(facts, before, before)))
    rows.insert(0, {**dict.fromkeys(rows[0]), "recipe": "unedited", **_shares(unedited)})
    note = f"{count} facts, {size} at a time; differences are from the default, with 95 % intervals."
    return Measured(rows, (), [note])


class _Bench:
    """Edits of the same facts with one recipe after another; one search for all λ."""

    def __init__(
        self, lab: Laboratory, facts: Sequence[Fact], before: Sequence[FactState], size: int
    ) -> None:
        self.lab, self.facts, self.before, self.size = lab, facts, before, size

    def run(self, plain: Recipe) -> tuple[float, Tally]:
        """Loss evaluations a fact, and the counts of the scores."""
        recipe = self.lab.resolve(plain)
        facts = [fact.to_line() for fact in self.facts]
        of = {"section": "choose", "recipe": recipe.to_dict(), "facts": facts, "size": self.size}
        steps, counts = self.lab.kept(of, lambda: self._edited(recipe))
        return steps, np.array(counts, dtype=float)

    def _edited(self, recipe: Recipe) -> tuple[float, list[Any]]:
        found = self.lab.targets(self.facts, recipe, again=False)
        statistics = self.lab.statistics(recipe)
        changes, _ = self.lab.edits(self.facts, self.before, found.z, recipe, statistics, self.size)
        return found.steps, tally(changes).tolist()


def _row(name: str, steps: float, counts: Tally, default: Tally) -> dict[str, Cell]:
    gained = difference(counts, default)
    apart = {
        f"{score}, less": f"{of.value:+.1f} ({of.low:+.1f} to {of.high:+.1f})"
        for score, of in gained.items()
        if score in ("S", "paraphrase argmax")
    }
    return {"recipe": name, "steps": round(steps, 1), **_shares(interval(counts)), **apart}


def _shares(scores: Mapping[str, Any]) -> dict[str, Cell]:
    return {score: round(scores[score].value, 1) for score in SCORES if score in _SHOWN}
