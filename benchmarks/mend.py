"""What MEND does once its network is trained: facts one at a time, and ten together, beside published MEMIT.

A network is trained on even cases, for as many facts together as it then edits; odd ones are asked.
"""

from __future__ import annotations

from benchmarks.laboratory import Laboratory, laboratory
from benchmarks.methods import PLAIN, Shape, contest, notes
from benchmarks.recipe import published
from benchmarks.report import Effort, Measured
from patchkit.canonical import hash_bytes
from patchkit.editing.course import Course, Settings
from patchkit.editing.lessons import lessons_of
from patchkit.editing.mend import Mend
from patchkit.editing.recipe import Recipe
from patchkit.editing.training import Report, train

__all__ = ["measure"]

_SHAPES = {Effort.QUICK: (Shape(2, apart=2),), Effort.USUAL: (Shape(1, apart=30), Shape(10, apart=10))}
_EVEN, _STEPS = 490, 1000
"""As many even cases as there are; the steps of `patchkit mend train`."""


def measure(effort: Effort) -> Measured:
    """Scores in percent, each less published MEMIT's on the same facts."""
    lab = laboratory(effort)
    quick = effort is Effort.QUICK
    shapes = _SHAPES[Effort.QUICK if quick else Effort.USUAL]
    rows, said = [], []
    for shape in shapes:
        mend, recipe, report = _trained(lab, shape.size, 12 if quick else _EVEN, 2 if quick else _STEPS)
        rows += contest(lab, shape, {PLAIN: published(lab), "mend": recipe}, {"mend": mend})[0]
        said.append(
            f"Trained with {shape.size} at a time: loss held out {report.before.loss:.3f} before, "
            f"{report.after.loss:.3f} at step {report.best}, which is kept; ended after {report.why}, "
            f"{report.seconds / 60:.1f} minutes."
        )
    return Measured(rows, (), [*notes(PLAIN, shapes), *said])


def _trained(lab: Laboratory, together: int, count: int, steps: int) -> tuple[Mend, Recipe, Report]:
    """As the command trains it on those records, with ``together`` facts in a step."""
    recipe = lab.recipe("mend")
    facts = lab.facts("even", count)
    answers = [[fact.was or ""] * len(fact.neighbors) for fact in facts]
    lessons = lessons_of(lab.tokenizer, facts, answers)
    course = Course.of(lab.model, lessons, [], recipe.layers, Settings(edits=together))
    network, report = train(lab.model, course, steps=steps, unfinished=lab.unfinished)
    digest = hash_bytes(network.to_bytes())
    return Mend(network, digest), recipe.override(network_digest=digest), report
