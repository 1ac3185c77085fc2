"""The trials of `tune`: each recipe edits the base in memory, is scored, and is taken off; and the climb.

What is measured is what `evaluate` measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from patchkit.actions.commit import text_and_statistics
from patchkit.actions.edit import as_patch
from patchkit.actions.workbench import Workbench, stacked_weights
from patchkit.editing.editor import Edited
from patchkit.editing.mass import MassEditor
from patchkit.editing.recipe import Recipe
from patchkit.evaluation.cases import Case
from patchkit.evaluation.intervals import Interval, Tally, differences
from patchkit.evaluation.metrics import METRICS, Seen, look, tally
from patchkit.evaluation.tuning import SHOWN, Knob, better, merit, scores_of, shown
from patchkit.evaluation.voice import Loaded

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["Climb", "Held", "Trial", "Trials", "plain"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Trial:
    """One recipe on the facts that choose; ``changes``: what it has other than the best until then."""

    name: str
    changes: Mapping[str, Any]
    scores: Mapping[str, Interval]
    seconds: float
    taken: bool
    """It took over."""

    def to_dict(self) -> dict[str, Any]:
        scores = {name: _three(found) for name, found in self.scores.items()}
        return {
            "name": self.name,
            "changes": {name: plain(value) for name, value in self.changes.items()},
            "scores": scores,
            "merit": merit(self.scores),
            "seconds": self.seconds,
            "taken": self.taken,
        }


@dataclass(frozen=True)
class Held:
    """On the facts that chose nothing: the recipe as it was, as tuned, and tuned less was."""

    was: Mapping[str, Interval]
    tuned: Mapping[str, Interval]
    gained: Mapping[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        return {
            name: {score: _three(found) for score, found in scores.items()}
            for name, scores in (("was", self.was), ("tuned", self.tuned), ("gained", self.gained))
        }


def _three(found: Interval) -> list[float | None]:
    """[value, low, high]; JSON knows no NaN: null."""
    return [None if np.isnan(value) else value for value in (found.value, found.low, found.high)]


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class Trials:
    """Edits of the base in memory, each taken off before the next; targets that serve again are kept."""

    def __init__(
        self,
        repository: Repository,
        bench: Workbench,
        editor: MassEditor,
        batch_size: int | str,
        seed: int,
        told: Progress,
    ) -> None:
        self.repository, self.bench, self.editor = repository, bench, editor
        self.batch_size, self.seed, self.told = batch_size, seed, told
        self.depth = bench.model.config.get_text_config(decoder=True).num_hidden_layers
        self._found: tuple[Any, Edited] | None = None

    def look(self, cases: Sequence[Case]) -> list[Seen]:
        """What the model says as it stands."""
        return look(Loaded(self.bench.model, self.bench.tokenizer), cases)

    def run(self, recipe: Recipe, cases: Sequence[Case], reference: Sequence[Seen]) -> Tally:
        """The scores' counts of one edit of all the cases' facts."""
        bench = self.bench
        facts = [case.fact for case in cases]
        edited = self._edit(recipe, tuple(facts))
        patch = as_patch(edited, facts, bench.model, bench.checkpoint, ())
        bench.use(stacked_weights(bench.checkpoint, [patch]))
        try:
            return tally(self.look(cases), reference)
        finally:
            bench.use({})

    def _edit(self, recipe: Recipe, facts: tuple[Any, ...]) -> Edited:
        """From the facts; where only what no target depends on has changed, from the targets found last."""
        bench = self.bench
        recipe, statistics = text_and_statistics(self.repository, bench, recipe, self.told)
        assert statistics is not None
        of = (_search_of(recipe), facts)
        if self._found is not None and self._found[0] == of:
            solution = self._found[1].solution
            assert solution is not None
            return self.editor.refit(
                bench.model, bench.tokenizer, facts, solution.targets, recipe, statistics
            )
        edited = self.editor.edit(
            bench.model, bench.tokenizer, facts, recipe, statistics, batch_size=self.batch_size
        )
        self._found = of, edited
        return edited

    def confirm(self, cases: Sequence[Case], was: Recipe, tuned: Recipe) -> Held:
        """Both recipes on cases that chose neither."""
        self.told("confirming", 0, 3)
        reference = self.look(cases)
        self.told("confirming", 1, 3)
        old = self.run(was, cases, reference)
        self.told("confirming", 2, 3)
        new = self.run(tuned, cases, reference)
        self.told("confirming", 3, 3)
        gained = differences(new, old, list(METRICS), self.seed)
        shown = {name: gained[name] for name in SHOWN}
        return Held(scores_of(old, self.seed), scores_of(new, self.seed), shown)


def _search_of(recipe: Recipe) -> Recipe:
    """The recipe without what targets do not depend on: λ, and the layers below the last."""
    unread = {"layers": recipe.layers[-1:], "statistics_digest": "", "guess": False}
    return recipe.override(**unread, **({"lambda": 1.0} if recipe.reads("lambda") else {}))


@dataclass
class Climb:
    """The climb: the best recipe so far, and what was tried on the way."""

    lab: Trials
    cases: Sequence[Case]
    recipe: Recipe
    knobs_left: list[Knob]
    trials: list[Trial] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)
    best: Trial | None = None

    def climb(self, end: float) -> None:
        """Try setting after setting until ``end``, a time of `perf_counter`."""
        told, reference = self.lab.told, self.lab.look(self.cases)
        count = 1 + sum(len(knob.values) for knob in self.knobs_left)
        told("trials", 0, count)
        self.best = self._try("as it begins", {}, reference)
        for knob in self.knobs_left:
            for value in knob.values:
                told("trials", len(self.trials), count)
                if time.perf_counter() + self._needed() > end:
                    self.untried.append(f"{knob.name} {shown(knob.name, value)}")
                elif value != getattr(self.recipe, "lambda_" if knob.name == "lambda" else knob.name):
                    self._weigh(knob, value, reference)
        told("trials", count, count)

    def _needed(self) -> float:
        """Seconds of another trial and of the confirmation, each as long as the longest trial so far."""
        return 4 * max(trial.seconds for trial in self.trials)

    def _weigh(self, knob: Knob, value: Any, reference: Sequence[Seen]) -> None:
        assert self.best is not None
        trial = self._try(f"{knob.name} {shown(knob.name, value)}", {knob.name: value}, reference)
        if better(trial.scores, self.best.scores):
            self.best = self.trials[-1] = replace(trial, taken=True)
            self.recipe = self.recipe.override(**trial.changes)

    def _try(self, name: str, changes: Mapping[str, Any], reference: Sequence[Seen]) -> Trial:
        begun = time.perf_counter()
        counts = self.lab.run(self.recipe.override(**changes), self.cases, reference)
        scores = scores_of(counts, self.lab.seed)
        self.trials.append(Trial(name, changes, scores, time.perf_counter() - begun, not self.trials))
        return self.trials[-1]

    def tried(self, name: str) -> Iterator[str]:
        """Of one setting: each value that was tried, and the first recipe, with S and paraphrases."""
        for trial in self.trials:
            if trial.name == "as it begins" or name in trial.changes:
                value = shown(name, trial.changes[name]) if name in trial.changes else "before"
                s, said = (100 * trial.scores[score].value for score in ("S", "paraphrase argmax"))
                yield f"{value}: {s:.1f}, {said:.1f}"
