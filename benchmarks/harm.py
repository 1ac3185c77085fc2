"""What collapses a model, and which number shows it first: stacks that grow until the model forgets.

Facts that nobody edited are the measure: prompts of ROME's known facts to which the base gives the right
answer, every token the most probable. Beside it stand the two numbers that `commit` prints.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.counterfact import data_folder
from benchmarks.laboratory import Laboratory, laboratory
from benchmarks.report import Bar, Cell, Effort, Measured
from patchkit.actions.edit import as_patch
from patchkit.actions.harm import TEXT
from patchkit.actions.workbench import stacked_weights
from patchkit.algebra.factors import Patch
from patchkit.editing.editor import find_editor
from patchkit.editing.statistics import text_for
from patchkit.errors import NotFound
from patchkit.evaluation.harm import GROWTH, PERPLEXITY, Harm, growths, read
from patchkit.evaluation.likelihood import score_targets
from patchkit.evaluation.voice import Loaded
from patchkit.models.loading import put_weights

__all__ = ["measure"]

_SERIES = {
    "memit": ("memit", {}, 100, 3),
    "memit, λ 3": ("memit", {"lambda": 3.0}, 50, 3),
    "rome": ("rome", {}, 10, 3),
    "ft": ("ft", {}, 10, 3),
}
"""A method, its settings, the facts of a patch, and how many patches are put on one another."""

KEPT = 0.75
"""The share of other facts below which a stack is called harmful."""


def measure(effort: Effort) -> Measured:
    """Each patch is edited on those before it, as commits one after another are."""
    lab = laboratory(effort)
    known = _known(lab, 6 if effort is Effort.QUICK else 600)
    base = lab.checkpoint.fingerprint()
    text = list(text_for(lab.model, lab.tokenizer, TEXT, folder=lab.cache, base=base))
    before = read(Loaded(lab.model, lab.tokenizer), text)
    rows: list[dict[str, Cell]] = []
    for name, (method, settings, size, count) in _SERIES.items():
        if effort is Effort.QUICK:
            size, count = 2, 1
        for patches in _stacks(lab, method, settings, size, count):
            weights = stacked_weights(lab.checkpoint, patches)
            put_weights(lab.model, weights, lab.checkpoint)
            kept = sum(s.argmax for s in score_targets(lab.model, lab.tokenizer, known)) / len(known)
            harm = Harm(
                read(Loaded(lab.model, lab.tokenizer), text),
                before,
                growths(lab.checkpoint.read, [weights])[0],
            )
            put_weights(lab.model, {n: lab.checkpoint.read(n) for n in weights}, lab.checkpoint)
            rows.append(
                {
                    "method": name,
                    "facts": sum(len(patch.facts) for patch in patches),
                    "other facts kept, %": round(100 * kept, 1),
                    "perplexity, times": round(harm.rise, 3),
                    "‖W + ΔW‖ / ‖W‖": round(harm.growth, 4),
                    "warned": "yes" if harm.warnings() else "no",
                }
            )
    harmful = [row for row in rows if float(str(row["other facts kept, %"])) < 100 * KEPT]
    harmless = [row for row in rows if row not in harmful]
    bars = [
        Bar(f"{what} stacks warned of, share", _warned(some), bound, most=most)
        for what, some, bound, most in (("harmful", harmful, 1.0, False), ("other", harmless, 0.0, True))
        if some
    ]
    note = (
        f"{len(known)} facts that the base knows. Warned from a perplexity of {PERPLEXITY:g} or a norm of "
        f"{GROWTH:g} times the base's; harmful: fewer than {100 * KEPT:g} % kept."
    )
    return Measured(rows, bars, [note])


def _warned(rows: Sequence[Mapping[str, Cell]]) -> float:
    return sum(row["warned"] == "yes" for row in rows) / len(rows)


def _stacks(
    lab: Laboratory, method: str, settings: dict[str, float], size: int, count: int
) -> Iterator[list[Patch]]:
    """Stacks of 1 to ``count`` patches; even cases, no fact twice."""
    recipe = lab.recipe(method)
    recipe = recipe.override(**settings)
    facts = lab.facts("even", size * count)
    statistics = lab.statistics(recipe) if recipe.reads("statistics_text") else None
    if statistics is not None:
        recipe = lab.resolve(recipe)
    patches: list[Patch] = []
    for start in range(0, len(facts), size):
        part = facts[start : start + size]
        weights = stacked_weights(lab.checkpoint, patches)
        put_weights(lab.model, weights, lab.checkpoint)
        edited = find_editor(method).edit(lab.model, lab.tokenizer, part, recipe, statistics)
        put_weights(lab.model, {name: lab.checkpoint.read(name) for name in weights}, lab.checkpoint)
        patches.append(as_patch(edited, part, lab.model, lab.checkpoint, patches))
        yield patches


def _known(lab: Laboratory, count: int) -> Sequence[tuple[str, str]]:
    """(prompt, answer) of facts that the base says by itself."""
    path = data_folder() / "known.jsonl"
    if lab.cache is None:
        return [(fact.text, fact.target) for fact in lab.facts("odd", count)]
    if not path.is_file():
        raise NotFound(f"{path} is not there; name the folder of known.jsonl in PATCHKIT_DATA")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:count]
    pairs = [(record["prompt"], record["attribute"]) for record in records]
    scores = score_targets(lab.model, lab.tokenizer, pairs)
    return [pair for pair, score in zip(pairs, scores, strict=True) if score.argmax]
