"""Refitting against committing anew: seconds and scores, from the same facts on the same stack.

Half of the facts stand below as a patch; the other half is edited on top of it, the patch below is taken
back, and the upper half is refitted, and edited anew, on what is left.
"""

from __future__ import annotations

import statistics
import time

from benchmarks.laboratory import laboratory
from benchmarks.quality import Tally, interval, tally
from benchmarks.report import Bar, Effort, Measured
from patchkit.algebra.factors import Delta
from patchkit.algebra.rounding import materialise
from patchkit.editing.editor import Edited
from patchkit.editing.memit import Memit
from patchkit.editing.statistics import Statistics
from patchkit.evaluation.measure import compare, observe
from patchkit.models.loading import put_weights

__all__ = ["measure"]

FACTS = {Effort.QUICK: 4, Effort.USUAL: 32, Effort.FULL: 100}
TURNS = 3


def measure(effort: Effort) -> Measured:
    """Both edits in turn, so that a machine that slows down slows both; each factors λC itself.

    Counted is what differs: from the facts' text to the factors. Loading and measuring cost both the same.
    """
    lab, count = laboratory(effort), FACTS[effort]
    recipe = lab.resolve(lab.default)
    collected = lab.statistics(recipe)
    facts = lab.facts("odd", 2 * count)
    below, upper = facts[:count], facts[count:]
    editor = Memit()

    def put(*edits: Edited) -> None:
        deltas: dict[str, list[Delta]] = {name: [] for name in lab_weights}
        for edited in edits:
            for name, delta in edited.deltas.items():
                deltas[name].append(delta)
        stored = {name: lab.checkpoint.read(name) for name in deltas}
        weights = {name: materialise(stored[name], deltas[name], name) for name in deltas}
        put_weights(lab.model, weights, lab.checkpoint)

    def fresh() -> Statistics:
        return Statistics(collected.layers, collected.tokens, collected.curvature)

    def asked() -> Tally:
        return tally(compare(upper, before, observe(lab.model, lab.tokenizer, upper, batch_size=64)))

    lab_weights = [lab.anatomy.weights[layer] for layer in recipe.layers]
    before = lab.observe(upper)
    under = editor.edit(lab.model, lab.tokenizer, below, recipe, fresh())
    put(under)
    stacked = editor.edit(lab.model, lab.tokenizer, upper, recipe, fresh())
    put(stacked)
    alone = asked()
    put()
    assert stacked.solution is not None
    targets = stacked.solution.targets
    anew_seconds, again_seconds = [], []
    for _ in range(TURNS):
        begun = time.perf_counter()
        anew = editor.edit(lab.model, lab.tokenizer, upper, recipe, fresh())
        anew_seconds.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        again = editor.refit(lab.model, lab.tokenizer, upper, targets, stacked.recipe, fresh())
        again_seconds.append(time.perf_counter() - begun)
    rows = []
    scores = {}
    timed = {"committed anew": statistics.median(anew_seconds), "refitted": statistics.median(again_seconds)}
    for what, edit in {"left as it was": stacked, "committed anew": anew, "refitted": again}.items():
        put(edit)
        counts = asked()
        scores[what] = interval(counts)["ES"].value
        shown = {name: interval(counts)[name].value for name in ("ES", "PS", "NS", "S", "argmax")}
        rows.append({"edit": what, "s": timed.get(what), **shown})
    put()
    first = {name: interval(alone)[name].value for name in ("ES", "PS", "NS", "S", "argmax")}
    rows.insert(0, {"edit": "before the patch below was taken back", "s": None, **first})
    ratio = statistics.median(a / b for a, b in zip(anew_seconds, again_seconds, strict=True))
    bars = [
        Bar("times cheaper than committing anew, median of three", ratio, 10.0),
        Bar("ES lost, points", scores["committed anew"] - scores["refitted"], 1.0, most=True),
    ]
    return Measured(rows, bars, [f"{count} facts on a patch of {count} others, which is then taken back."])
