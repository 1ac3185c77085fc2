"""Seconds a fact of each editor: a batch together, beside its facts one at a time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.laboratory import Laboratory, laboratory
from benchmarks.report import Effort, Measured
from patchkit.editing.course import Course, Settings
from patchkit.editing.editor import Editor, Trained, find_editor
from patchkit.editing.hypernetwork import network_name
from patchkit.editing.lessons import lessons_of
from patchkit.editing.recipe import Recipe
from patchkit.editing.training import train
from patchkit.fact import Fact

__all__ = ["METHODS", "measure"]

METHODS = ("memit", "emmet", "alphaedit", "encore", "rome", "ft", "ultraedit", "mend")
FACTS, ALONE = 32, 4


def measure(effort: Effort) -> Measured:
    """With statistics and context templates there; mend with a network of one step, as any costs the same.

    Edits of one fact alone are of the first facts of the batch, after the batch.
    """
    lab = laboratory(effort)
    count, alone = (4, 1) if effort is Effort.QUICK else (FACTS, ALONE)
    facts = lab.facts("odd", count)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            editor = find_editor(method)
            recipe = _recipe(lab, editor, method, facts, Path(folder))
            together = _seconds(lab, editor, recipe, facts) / count
            single = sum(_seconds(lab, editor, recipe, [fact]) for fact in facts[:alone]) / alone
            rows.append(
                {
                    "editor": method,
                    f"{count} together, s a fact": together,
                    "one at a time, s a fact": single,
                    "times faster": single / together,
                }
            )
    return Measured(rows, (), ["Statistics are there; measuring the edit is not part of it."])


def _recipe(lab: Laboratory, editor: Editor, method: str, facts: Sequence[Fact], folder: Path) -> Recipe:
    recipe = lab.recipe(method)
    if isinstance(editor, Trained):
        base = lab.checkpoint.fingerprint()
        lessons = lessons_of(lab.tokenizer, facts, [[] for _ in facts])
        course = Course.of(lab.model, lessons, [], recipe.layers, Settings(edits=2, rank=8))
        network, _ = train(lab.model, course, steps=1)
        (folder / network_name(base, recipe.layers)).write_bytes(network.to_bytes())
        return editor.load(folder, base, recipe)
    return lab.resolve(recipe) if recipe.reads("templates") else recipe


def _seconds(lab: Laboratory, editor: Editor, recipe: Recipe, facts: Sequence[Fact]) -> float:
    statistics = lab.statistics(recipe) if recipe.reads("statistics_text") else None
    begun = time.perf_counter()
    editor.edit(lab.model, lab.tokenizer, facts, recipe, statistics)
    return time.perf_counter() - begun
