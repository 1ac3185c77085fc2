"""Statistics C: all layers in one pass against one at a time, how much text they need, and which."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.laboratory import Laboratory, laboratory
from benchmarks.quality import difference, interval, tally
from benchmarks.report import Bar, Effort, Measured
from benchmarks.wikipedia import wikipedia
from patchkit.editing.recipe import Recipe
from patchkit.editing.statistics import collect, text_for

__all__ = ["measure"]

TIMES = (10, 2, 50)
"""Tokens of C as multiples of d_ff; the default first."""


def measure(effort: Effort) -> Measured:
    """Rates on 2 x d_ff tokens of the base's own text; with --full, what more or other text wins."""
    lab = laboratory(effort)
    recipe = lab.default.override(statistics_tokens=2 * lab.anatomy.d_ff)
    begun = time.perf_counter()
    text = text_for(lab.model, lab.tokenizer, recipe, folder=None, base="", progress=None)
    written = time.perf_counter() - begun
    together = _rate(lab, recipe.layers, text, recipe)
    apart = 1 / sum(1 / _rate(lab, (layer,), text, recipe) for layer in recipe.layers)
    name = f"layers {recipe.layers[0]}-{recipe.layers[-1]}"
    rows: list[dict[str, Any]] = [
        {"what": f"{name} in one pass, tokens/s", "measured": together},
        {"what": f"{name} one at a time, tokens/s", "measured": apart},
        {"what": "times faster", "measured": together / apart},
        {"what": "writing the text, tokens/s", "measured": recipe.statistics_tokens / written},
        *({"what": what, "measured": seconds} for what, seconds in _first_commit(lab.checkpoint.folder)),
    ]
    if effort is Effort.FULL:
        rows = [{**row, "S less the default's": None} for row in rows] + list(_scores(lab))
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


def _first_commit(base: Path) -> Iterator[tuple[str, float]]:
    """Seconds of the commands with which a new repository begins."""
    # Steps so short that one fact is next to nothing: what is left is loading, text and statistics.
    commit = ["commit", "--quiet", "--set", "steps=2", "--fact"]
    commands = {
        "init, s": ["init", str(base), "."],
        "first commit, one fact, s": [*commit, "Mount Kilimanjaro | {} is in the country of | Tanzania"],
        "second commit, one fact, s": [*commit, "LeBron James | {} plays the sport of | basketball"],
    }
    identity = {"GIT_CONFIG_COUNT": "2"} | {
        f"GIT_CONFIG_{part}_{place}": value
        for place, (key, value) in enumerate({"user.name": "Ada", "user.email": "ada@example.org"}.items())
        for part, value in (("KEY", key), ("VALUE", value))
    }
    with tempfile.TemporaryDirectory() as folder:
        for what, command in commands.items():
            begun = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "patchkit", *command],
                cwd=folder,
                env={**os.environ, **identity},
                check=True,
                stdout=subprocess.DEVNULL,
            )
            yield what, time.perf_counter() - begun


def _scores(lab: Laboratory) -> Iterator[dict[str, Any]]:
    """S of 100 facts with C of more, less and other text. Targets are found once, on the
    default's text: they do not depend on C, but a commit with another text would search with its own G."""
    facts = lab.facts("even", 100)
    before = lab.observe(facts)
    z = lab.targets(facts, lab.resolve(lab.default)).z
    default = None
    for name, source in (("own", "self"), ("Wikipedia", str(wikipedia()))):
        for times in TIMES:
            changed = {"statistics_text": source, "statistics_tokens": times * lab.anatomy.d_ff}
            recipe = lab.resolve(lab.default.override(**changed))
            changes, _ = lab.edits(facts, before, z, recipe, lab.statistics(recipe), len(facts))
            counts = tally(changes)
            default = counts if default is None else default
            gained = difference(counts, default)["S"]
            yield {
                "what": f"S of 100 facts, {times} x d_ff tokens, {name} text",
                "measured": interval(counts)["S"].value,
                "S less the default's": f"{gained.value:+.1f} ({gained.low:+.1f} to {gained.high:+.1f})",
            }
