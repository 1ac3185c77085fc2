"""The default recipe against MEMIT as published, on facts that did not choose it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.laboratory import Found, Laboratory, laboratory
from benchmarks.quality import SCORES, Interval, Tally, difference, interval, tally
from benchmarks.report import Bar, Cell, Effort, Measured
from patchkit.editing.published import recipe_for
from patchkit.editing.recipe import Recipe
from patchkit.evaluation.measure import FactState, compare
from patchkit.fact import Fact

__all__ = ["Outcome", "compare_recipes", "measure", "published"]

SIZES = {1: 100, 10: 100, 100: 300}
"""How many facts are edited at a time, and how many in all."""
TIMED = 32
"""Facts whose targets are timed."""


@dataclass(frozen=True)
class Outcome:
    """What one recipe did: seconds and loss evaluations a fact, and by edit size the counts of its scores."""

    recipe: Recipe
    seconds: float
    solve: float
    """The seconds of them that are not the search's."""
    steps: float
    tallies: Mapping[int, Tally]

    def scores(self, size: int) -> dict[str, Interval]:
        return interval(self.tallies[size])

    def less(self, other: Outcome, size: int) -> dict[str, Interval]:
        """Its scores less the other's on the same facts, in percentage points."""
        return difference(self.tallies[size], other.tallies[size])


def measure(effort: Effort) -> Measured:
    """Odd cases only: the even ones chose the default.

    Times are of one batch's targets, which are sought anew; all others are kept, so that a section that was
    stopped goes on where it was.
    """
    from benchmarks.targets import reference_seconds  # it measures `published`, which is ours

    lab = laboratory(effort)
    sizes = {1: 2, 3: 6} if effort is Effort.QUICK else SIZES
    facts = lab.facts("odd", max(sizes.values()))
    recipes = {
        "published": published(lab),
        "default": lab.default,
    }
    before = lab.observe(facts)
    outcomes = dict(
        zip(recipes, compare_recipes(lab, list(recipes.values()), facts, before, sizes), strict=True)
    )
    plain, ours = outcomes["published"], outcomes["default"]
    rows: list[dict[str, Cell]] = []
    for size, count in sizes.items():
        asked = before[:count]
        rows += _rows(size, interval(tally(compare(facts[:count], asked, asked))), outcomes)
    seconds = {name: outcome.seconds for name, outcome in outcomes.items()}
    steps = {name: outcome.steps for name, outcome in outcomes.items()}
    empty = {"less published": None, "95 % interval": None}
    rows.append({"score": "seconds a fact", "unedited": None, **seconds, **empty})
    rows.append({"score": "loss evaluations a fact", "unedited": None, **steps, **empty})
    gained = ours.less(plain, max(sizes))
    turns = []  # both in each, so that a machine that slows down slows both
    for turn in range(1 if effort is Effort.QUICK else 3):
        one, _ = reference_seconds(lab, facts[2 * turn : 2 * turn + 2], plain.recipe)
        turns.append((one, lab.targets(facts[:TIMED], ours.recipe).seconds + ours.solve))
    sequential = statistics.median(one for one, _ in turns)
    times = statistics.median(one / other for one, other in turns)
    bars = [
        Bar("times faster than the sequential reference", times, 30.0),
        Bar("S less the published recipe's, points", gained["S"].value, -0.5),
        Bar("paraphrase argmax less the published recipe's, points", gained["paraphrase argmax"].value, 0.0),
    ]
    note = f"Sequential reference: {sequential:.1f} s a fact (two in each turn). Intervals: facts resampled."
    return Measured(rows, bars, [note])


def _rows(
    size: int, unedited: Mapping[str, Interval], outcomes: Mapping[str, Outcome]
) -> Iterator[dict[str, Cell]]:
    """The scores of edits of ``size`` facts, in percent; the last columns are default less published."""
    scores = {name: outcome.scores(size) for name, outcome in outcomes.items()}
    gained = outcomes["default"].less(outcomes["published"], size)
    for score in SCORES:
        yield {
            "score": f"{size}: {score}",
            "unedited": round(unedited[score].value, 1),
            **{name: round(of[score].value, 1) for name, of in scores.items()},
            "less published": round(gained[score].value, 1),
            "95 % interval": f"{gained[score].low:+.1f} to {gained[score].high:+.1f}",
        }


def published(lab: Laboratory) -> Recipe:
    """MEMIT's own search for z (its public hyperparameters), at the default's layers and λ."""
    return lab.small(recipe_for(lab.model.config, published=True))


def compare_recipes(
    laboratory: Laboratory,
    recipes: Sequence[Recipe],
    facts: Sequence[Fact],
    before: Sequence[FactState],
    sizes: Mapping[int, int],
) -> list[Outcome]:
    """Each recipe on the same facts, in edits of each size; steps are of the largest."""
    outcomes = []
    for plain in recipes:
        recipe = laboratory.resolve(plain)
        collected = laboratory.statistics(recipe)
        found: dict[int, Found] = {}
        tallies = {}
        for size, count in sorted(sizes.items(), reverse=True):
            among = size if recipe.wordings else max(sizes)  # which are lent within an edit alone
            if among not in found:
                found[among] = laboratory.targets(facts[: sizes[among]], recipe, size=among, again=False)
            chosen = slice(count)
            changes, spent = laboratory.edits(
                facts[chosen], before[chosen], found[among].z[chosen], recipe, collected, size
            )
            tallies[size] = tally(changes)
            if size == max(sizes):
                solve = spent
                seconds = spent + laboratory.targets(facts[:TIMED], recipe).seconds
        outcomes.append(Outcome(recipe, seconds, solve, found[max(sizes)].steps, tallies))
    return outcomes
