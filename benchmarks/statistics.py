"""Statistics C: all layers in one pass against one layer at a time, and how much text they need."""

from __future__ import annotations

import time
from collections.abc import Iterable

from benchmarks.laboratory import Laboratory, laboratory
from benchmarks.quality import interval, tally
from benchmarks.report import Bar, Effort, Measured
from patchkit.editing.recipe import Recipe
from patchkit.editing.statistics import collect, text_for

__all__ = ["measure"]


def measure(effort: Effort) -> Measured:
    """Tokens a second on 2 x d_ff tokens of the base's own text; with --full, what more tokens win."""
    lab = laboratory(effort)
    recipe = lab.default.override(statistics_tokens=2 * lab.anatomy.d_ff)
    begun = time.perf_counter()
    text = text_for(lab.model, lab.tokenizer, recipe, folder=None, base="", progress=None)
    written = time.perf_counter() - begun
    together = _rate(lab, recipe.layers, text, recipe)
    apart = 1 / sum(1 / _rate(lab, (layer,), text, recipe) for layer in recipe.layers)
    name = f"layers {recipe.layers[0]}-{recipe.layers[-1]}"
    rows = [
        {"what": f"{name} in one pass, tokens/s", "measured": together},
        {"what": f"{name} one at a time, tokens/s", "measured": apart},
        {"what": "times faster", "measured": together / apart},
        {"what": "writing the text, tokens/s", "measured": recipe.statistics_tokens / written},
    ]
    if effort is Effort.FULL:
        rows += [
            {"what": f"S of 100 facts at {times} x d_ff tokens", "measured": _score(lab, times)}
            for times in (2, 10, 50)
        ]
    return Measured(rows, [Bar("times faster than one layer at a time", together / apart, 1.0)])


def _rate(lab: Laboratory, layers: tuple[int, ...], text: Iterable[str], recipe: Recipe) -> float:
    begun = time.perf_counter()
    collect(
        lab.model,
        lab.tokenizer,
        layers,
        text,
        tokens=recipe.statistics_tokens,
        length=recipe.statistics_length,
        folder=None,
        base="",
    )
    return recipe.statistics_tokens / (time.perf_counter() - begun)


def _score(lab: Laboratory, times: int) -> float:
    recipe = lab.resolve(lab.default.override(statistics_tokens=times * lab.anatomy.d_ff))
    facts = lab.facts("even", 100)
    found = lab.targets(facts, recipe)
    changes, _ = lab.edits(facts, lab.observe(facts), found.z, recipe, lab.statistics(recipe), 100)
    return interval(tally(changes))["S"].value
