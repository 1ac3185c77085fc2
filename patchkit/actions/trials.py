"""The trials of `tune`: each recipe edits the base in memory, is scored, and is taken off; and the climb.

What is measured is what `evaluate` measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from patchkit.actions.commit import text_and_statistics
from patchkit.actions.edit import as_patch
from patchkit.actions.workbench import Workbench, stacked_weights
from patchkit.editing.batching import FAILURES, reason_of
from patchkit.editing.editor import Edited
from patchkit.editing.mass import MassEditor, rewriting_of
from patchkit.editing.recipe import Recipe
from patchkit.errors import BadInput
from patchkit.evaluation.cases import Case
from patchkit.evaluation.intervals import WHOLE, Interval, Tally, differences
from patchkit.evaluation.metrics import METRICS, Seen, look, tally
from patchkit.evaluation.tuning import OF_THE_SOLVE, SHOWN, Knob, better, knobs, merit, scores_of, shown
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
    """Empty where the edit failed."""
    seconds: float
    taken: bool
    """It took over."""
    before: Mapping[str, Interval]
    """Those of the best until then; of the first trial its own."""
    searched: bool
    """Targets were sought for it."""
    failed: str | None = None
    """Why there was no edit."""

    def to_dict(self) -> dict[str, Any]:
        scores = {name: found.to_list() for name, found in self.scores.items()}
        return {
            "name": self.name,
            "changes": {name: plain(value) for name, value in self.changes.items()},
            "scores": scores,
            "merit": merit(self.scores) if self.scores else None,
            "seconds": self.seconds,
            "taken": self.taken,
            "failed": self.failed,
        }


@dataclass(frozen=True)
class Held:
    """On the facts that chose nothing: the recipe as it was, as tuned, and tuned less was."""

    was: Mapping[str, Interval]
    tuned: Mapping[str, Interval]
    gained: Mapping[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        return {
            name: {score: found.to_list() for score, found in scores.items()}
            for name, scores in (("was", self.was), ("tuned", self.tuned), ("gained", self.gained))
        }


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

    def prepare(self, recipe: Recipe, *halves: Sequence[Case]) -> Recipe:
        """The recipe with its texts written, and statistics of its layers collected, so that neither is in a
        trial's time. BadInput for a fact of ``halves`` that cannot be edited."""
        found, _ = text_and_statistics(self.repository, self.bench, recipe, self.told)
        for cases in halves:
            rewriting_of(self.bench.model, self.bench.tokenizer, [case.fact for case in cases], found)
        return found

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
    """The recipe without what no target depends on: the solve's settings, and the layers below the last."""
    unread = {"layers": recipe.layers[-1:], "statistics_digest": "", "guess": False}
    return recipe.override(**unread, **{name: 1.0 for name in OF_THE_SOLVE if recipe.reads(name)})


@dataclass
class Climb:
    """The climb: the best recipe so far, and what was tried on the way.

    ``middle`` is asked for the traced layer when the layers' turn has come; ``end`` is a `perf_counter` time.
    """

    lab: Trials
    cases: Sequence[Case]
    recipe: Recipe
    middle: Callable[[], int | None]
    end: float
    trials: list[Trial] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)
    best: Trial | None = None

    def climb(self) -> None:
        """Try setting after setting."""
        told, reference = self.lab.told, self.lab.look(self.cases)
        count = 1 + sum(len(knob.values) for knob in knobs(self.recipe, self.lab.depth, lambda: None))
        told("trials", 0, count)
        self.best = self._try("as it begins", {}, reference, searched=True)
        if self.best.failed is not None:
            raise BadInput(f"the recipe that it begins with: {self.best.failed}")
        for knob in knobs(self.recipe, self.lab.depth, self._traced):
            if knob.name == "layers":
                self._collect(knob.values)
            for value in knob.values:
                told("trials", min(len(self.trials), count), count)
                searched = knob.name not in OF_THE_SOLVE
                if not self._is_ready(knob.name, value, searched):
                    self.untried.append(f"{knob.name} {shown(knob.name, value)}")
                elif value != getattr(self.recipe, "lambda_" if knob.name == "lambda" else knob.name):
                    self._weigh(knob, value, reference, searched)
        told("trials", count, count)

    def has_time(self, seconds: float) -> bool:
        """Whether so much work and the confirmation end in time, which is two edits and three questions."""
        return time.perf_counter() + seconds + 3 * self._likely(searched=True) <= self.end

    def _is_ready(self, name: str, value: Any, searched: bool) -> bool:
        """Whether there is time for a trial, and still is when what it reads of the text is collected."""
        if not self.has_time(self._likely(searched)):
            return False
        with suppress(*FAILURES):  # the trial says why
            self.lab.prepare(self.recipe.override(**{name: value}))
        return self.has_time(self._likely(searched))

    def _likely(self, searched: bool) -> float:
        """Seconds of another trial: of the longest one that searched for targets, or that did not."""
        alike = [trial.seconds for trial in self.trials if trial.searched == searched]
        return max(alike or [trial.seconds for trial in self.trials])

    def _traced(self) -> int | None:
        if not self.has_time(self._likely(searched=True)):
            return None
        with suppress(*FAILURES):  # a fact, or a model, that cannot be traced
            return self.middle()
        return None

    def _collect(self, windows: Sequence[Sequence[int]]) -> None:
        """Statistics of all layers that are to be tried, in one pass."""
        layers = tuple(sorted({layer for window in windows for layer in window}))
        if layers and self.has_time(self._likely(searched=True)):
            with suppress(*FAILURES):  # the trial says which layer cannot be used
                self.lab.prepare(self.recipe.override(layers=layers))

    def _weigh(self, knob: Knob, value: Any, reference: Sequence[Seen], searched: bool) -> None:
        assert self.best is not None
        name = f"{knob.name} {shown(knob.name, value)}"
        trial = self._try(name, {knob.name: value}, reference, searched)
        if trial.scores and better(trial.scores, self.best.scores):
            self.best = self.trials[-1] = replace(trial, taken=True)
            self.recipe = self.recipe.override(**trial.changes)

    def _try(self, name: str, changes: Mapping[str, Any], reference: Sequence[Seen], searched: bool) -> Trial:
        begun, failed, scores = time.perf_counter(), None, {}
        try:
            counts = self.lab.run(self.recipe.override(**changes), self.cases, reference)
            scores = scores_of(counts, self.lab.seed)
        except FAILURES as error:  # of this edit; the others are made all the same
            failed = reason_of(error)
        seconds = time.perf_counter() - begun
        before = scores if self.best is None else self.best.scores
        self.trials.append(Trial(name, changes, scores, seconds, not self.trials, before, searched, failed))
        return self.trials[-1]

    def tried(self, name: str) -> Iterator[str]:
        """Of one setting: the best before it, and each value that was tried, with S and paraphrases."""
        own = [trial for trial in self.trials if name in trial.changes and trial.scores]
        for place, trial in enumerate(own):
            if not place:
                yield f"before {_two(trial.before)}"
            yield f"{shown(name, trial.changes[name])} {_two(trial.scores)}"


def _two(scores: Mapping[str, Interval]) -> str:
    """S and the paraphrases that are answered, in percent."""
    return "/".join(f"{100 * scores[name].value:.1f}" for name in (WHOLE, "paraphrase argmax"))
