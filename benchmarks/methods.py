"""Which editor is best: batches of one to a hundred facts, against published MEMIT.

Odd cases, which chose no recipe; where those do not suffice, all cases, and the notes say so. What was
measured is kept (`Laboratory.kept`): a section that was stopped goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.laboratory import Laboratory, laboratory
from benchmarks.quality import Tally, ceiling_share, difference, interval, tally
from benchmarks.recipe import published
from benchmarks.report import Bar, Cell, Effort, Measured
from patchkit.actions.edit import as_patch, below
from patchkit.actions.harm import TEXT
from patchkit.actions.workbench import Workbench, stacked_weights
from patchkit.algebra.factors import Patch
from patchkit.editing.anchor import reference_norm
from patchkit.editing.editor import Editor, find_editor
from patchkit.editing.recipe import Recipe
from patchkit.editing.statistics import text_for
from patchkit.evaluation.harm import growths, read
from patchkit.evaluation.measure import compare, observe
from patchkit.evaluation.voice import Loaded
from patchkit.fact import Fact

__all__ = ["DEFAULT", "PLAIN", "Outcome", "Shape", "contest", "contestants", "measure", "notes"]

PLAIN, DEFAULT = "MEMIT as published", "the default"
_SHOWN = ("ES", "PS", "NS", "S", "argmax", "paraphrase argmax", "generation")
_ODD = 500
"""At least so many facts are there whose case is odd."""
_ANCHORED = 32
"""Facts that the norm anchor's length is measured on: even cases."""
_MEASURED = 200
"""Facts that are asked afterwards, at most, spread evenly."""


@dataclass(frozen=True)
class Shape:
    """``batches`` patches of ``size`` facts on one another; ``apart`` times, of other facts each."""

    size: int
    batches: int = 1
    apart: int = 1

    def __str__(self) -> str:
        return f"{self.batches} batches of {self.size}" if self.batches > 1 else f"{self.size}"

    @property
    def facts(self) -> int:
        return self.size * self.batches * self.apart


_QUICK, _USUAL = (Shape(2, apart=2),), (Shape(1, apart=30), Shape(10, apart=10), Shape(100))
_SHAPES = {Effort.QUICK: _QUICK, Effort.USUAL: _USUAL, Effort.FULL: _USUAL}


def contestants(lab: Laboratory) -> dict[str, Recipe]:
    """The recipes by name: published MEMIT, the default, parts of it, its search with other solves."""
    norm = reference_norm(lab.model, lab.tokenizer, lab.facts("even", _ANCHORED), lab.default)
    return {
        PLAIN: published(lab),
        DEFAULT: lab.default,
        "no wordings of others": lab.default.override(wordings=0),
        "norm anchor": lab.default.override(norm_anchor=float(f"{norm:.3g}")),
        "emmet": lab.recipe("emmet"),
        "alphaedit": lab.recipe("alphaedit"),
        "encore": lab.recipe("encore"),
        "ultraedit": lab.recipe("ultraedit"),
    }


def measure(effort: Effort) -> Measured:
    """Scores in percent, each less published MEMIT's on the same facts."""
    lab = laboratory(effort)
    every = contestants(lab)
    rows, bars = [], []
    for shape in _SHAPES[effort]:
        more, found, _ = contest(lab, shape, every)
        rows += more
        if shape == Shape(100):
            gained = difference(found[DEFAULT].counts, found[PLAIN].counts)
            bars += [
                Bar("100 facts: paraphrase argmax gained, points", gained["paraphrase argmax"].value, 15.0),
                Bar("100 facts: NS gained, points", gained["NS"].value, 0.0),
            ]
    return Measured(rows, bars, notes(PLAIN, _SHAPES[effort]))


def contest(
    lab: Laboratory,
    shape: Shape,
    recipes: Mapping[str, Recipe],
    trained: Mapping[str, Editor] | None = None,
) -> tuple[list[dict[str, Cell]], dict[str, Outcome], float]:
    """Each recipe on the facts of one shape: rows, whose differences are from the first recipe; what was
    found; and the base's perplexity. ``trained``: the editors by name of those that need training first."""
    text = list(text_for(lab.model, lab.tokenizer, TEXT, folder=lab.cache, base=lab.checkpoint.fingerprint()))
    before = read(Loaded(lab.model, lab.tokenizer), text).perplexity
    found: dict[str, Outcome] = {}
    rows = []
    for name, recipe in recipes.items():
        editor = (trained or {}).get(name) or find_editor(recipe.method)
        found[name] = _Contest(lab, editor, recipe, shape, text).run()
        rows.append(_row(shape, name, found[name], next(iter(found.values())), before))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows, found, before


def notes(first: str, shapes: Iterable[Shape]) -> list[str]:
    """What differences are from, and which shapes need more facts than those that chose nothing."""
    differences = f"Differences are from {first}, on the same facts, with 95 % intervals."
    both = [str(shape) for shape in shapes if shape.facts > _ODD]
    said = f"{', '.join(both)}: half of the facts have an even case, which the recipe of few facts was "
    said += "chosen on; that of many was chosen on these."
    return [differences, said] if both else [differences]


@dataclass(frozen=True)
class Outcome:
    """What a recipe did: the counts of its scores and of the base's, perplexity, ‖W + ΔW‖ / ‖W‖."""

    counts: Tally
    unedited: Tally
    perplexity: float
    growth: float


def _row(shape: Shape, name: str, one: Outcome, first: Outcome, before: float) -> dict[str, Cell]:
    gained = difference(one.counts, first.counts)
    apart = {
        f"{score}, less": f"{of.value:+.1f} ({of.low:+.1f} to {of.high:+.1f})"
        for score, of in gained.items()
        if score in ("NS", "S", "paraphrase argmax")
    }
    scores = {score: round(of.value, 1) for score, of in interval(one.counts).items() if score in _SHOWN}
    share = ceiling_share(one.counts, one.unedited)
    harm: dict[str, Cell] = {
        "S of its ceiling": None if share is None else round(share, 1),
        "perplexity, times": round(one.perplexity / before, 3),
        "‖W + ΔW‖ / ‖W‖": round(one.growth, 4),
    }
    return {"facts": str(shape), "recipe": name, **scores, **harm, **apart}


class _Contest:
    """One recipe on the facts of one shape."""

    def __init__(
        self, lab: Laboratory, editor: Editor, plain: Recipe, shape: Shape, text: Sequence[str]
    ) -> None:
        self.lab, self.editor, self.shape, self.text = lab, editor, shape, text
        self.recipe = lab.resolve(plain) if plain.reads("templates") else plain
        self.bench = Workbench(lab.checkpoint, lab.model, lab.tokenizer)

    def run(self) -> Outcome:
        facts = self.lab.facts("odd" if self.shape.facts <= _ODD else "both", self.shape.facts)
        each = self.shape.size * self.shape.batches
        parts = [self._kept(facts[first : first + each]) for first in range(0, len(facts), each)]
        counts, unedited = (
            np.concatenate([np.array(part[name], dtype=float) for part in parts])
            for name in ("counts", "unedited")
        )
        means = (float(np.mean([part[name] for part in parts])) for name in ("perplexity", "growth"))
        return Outcome(counts, unedited, *means)

    def _kept(self, facts: Sequence[Fact]) -> Mapping[str, Any]:
        of = {
            "section": "methods",
            "recipe": self.recipe.to_dict(),
            "facts": [fact.to_line() for fact in facts],
            "text": list(self.text),
            "size": self.shape.size,
            "measured": _MEASURED,
        }
        compute: Callable[[], Any] = partial(self._edited, facts)
        return self.lab.kept(of, compute)

    def _edited(self, facts: Sequence[Fact]) -> dict[str, Any]:
        asked = facts[:: max(1, len(facts) // _MEASURED)][:_MEASURED]
        before = self.lab.observe(asked)
        weights = stacked_weights(self.lab.checkpoint, self._patches(facts))
        self.bench.use(weights)
        try:
            after = observe(self.lab.model, self.lab.tokenizer, asked, batch_size=64)
            return {
                "counts": tally(compare(asked, before, after)).tolist(),
                "unedited": tally(compare(asked, before, before)).tolist(),
                "perplexity": read(Loaded(self.lab.model, self.lab.tokenizer), self.text).perplexity,
                "growth": growths(self.lab.checkpoint.read, [weights])[0],
            }
        finally:
            self.bench.use({})

    def _patches(self, facts: Sequence[Fact]) -> list[Patch]:
        """Each batch edited on those before it, as commits one after another are."""
        lab = self.lab
        statistics = lab.statistics(self.recipe) if self.recipe.reads("statistics_text") else None
        patches: list[Patch] = []
        for first in range(0, len(facts), self.shape.size):
            part = facts[first : first + self.shape.size]
            self.bench.put(patches)
            edited = self.editor.edit(
                lab.model,
                lab.tokenizer,
                part,
                self.recipe,
                statistics,
                below=below(patches, lab.model, lab.checkpoint),
                unfinished=None if patches else lab.unfinished,
            )
            self.bench.use({})
            patches.append(as_patch(edited, part, lab.model, lab.checkpoint, patches))
        return patches
