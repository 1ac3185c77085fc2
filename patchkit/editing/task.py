"""What an editor is asked, and what all do before their own work: `edit` and `refit` of the protocols.

A subclass gives `update`: from a `Task` to factors. It runs with the model's weights frozen and computing in
float32 or wider, with the statistics there if the recipe reads them, and must leave the weights as they are.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.editing.batching import BatchSize
from patchkit.editing.editor import Below, Edited
from patchkit.editing.recipe import Recipe
from patchkit.editing.statistics import Statistics, statistics_for
from patchkit.errors import BadInput
from patchkit.facts import Fact
from patchkit.models.anatomy import Anatomy, anatomy_of
from patchkit.models.loading import float32_compute, frozen

__all__ = ["EditorBase", "RefitterBase", "Task", "Timer", "tell"]

Progress = Callable[[str, int, int], None]


class Timer:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begun


@dataclass
class Task:
    """Facts to be solved on a model as it stands, and what may be read beside them.

    ``known`` are targets [N, d_model] that were found on another model, None where all are to be sought;
    those of the facts in ``anew`` (places from 0) are sought all the same. ``statistics`` is None where the
    recipe reads none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    facts: Sequence[Fact]
    recipe: Recipe
    statistics: Statistics | None
    below: Sequence[Below]
    batch_size: BatchSize = "auto"
    unfinished: Path | None = None
    progress: Progress | None = None
    known: Tensor | None = None
    anew: Sequence[int] = ()
    timer: Timer = field(default_factory=Timer)

    @property
    def sought(self) -> list[int]:
        """Places of the facts whose targets are to be sought."""
        return list(range(len(self.facts))) if self.known is None else list(self.anew)

    @property
    def moments(self) -> Statistics:
        """The statistics, for an editor whose recipe reads them."""
        assert self.statistics is not None
        return self.statistics


class EditorBase(ABC):
    """An `Editor`. What is an editor's own is its name and `update`."""

    name: str

    @abstractmethod
    def update(self, task: Task) -> Edited:
        """The factors, and how it went. BadInput says which fact, layer or setting cannot be used."""

    def check(self, weights: Sequence[str], below: Sequence[Below]) -> None:
        """BadInput where these weights cannot be edited on the patches below; before anything is computed."""
        return

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        recipe: Recipe,
        statistics: Statistics | None = None,
        *,
        below: Sequence[Below] = (),
        batch_size: BatchSize = "auto",
        unfinished: Path | None = None,
        progress: Progress | None = None,
    ) -> Edited:
        """Solve ``facts`` on the model as it stands; its weights are untouched afterwards.

        Without ``statistics`` those that the recipe reads are collected first and kept nowhere. An editor may
        keep in ``unfinished`` what it need not do again after it was killed. BadInput says which fact, layer
        or setting cannot be used.
        """
        anatomy = anatomy_of(model)
        task = Task(model, tokenizer, anatomy, facts, recipe, statistics, below)
        task.batch_size, task.unfinished, task.progress = batch_size, unfinished, progress
        return self._run(task)

    def _run(self, task: Task) -> Edited:
        if not task.facts:
            raise BadInput("there are no facts to edit")
        task.anatomy.check_layers(task.recipe.layers)
        self.check([task.anatomy.weights[layer] for layer in task.recipe.layers], task.below)
        with float32_compute(task.model), frozen(task.model):
            if task.recipe.reads("statistics_text"):
                with task.timer("statistics"):
                    task.statistics = task.statistics or statistics_for(
                        task.model, task.tokenizer, task.recipe, progress=task.progress
                    )
            return self.update(task)


class RefitterBase(EditorBase):
    """An `Editor` that is a `Refitter` too: its `update` begins from the targets that a task knows.

    ``searches``: whether it looks for targets, so that a fact can be optimised again.
    """

    searches = True

    def refit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        targets: Tensor,
        recipe: Recipe,
        statistics: Statistics | None = None,
        *,
        below: Sequence[Below] = (),
        anew: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> Edited:
        """Solve ``facts`` on the model as it stands for ``targets`` [N, d_model] found on another one.

        Nothing is optimised, but for the facts in ``anew`` (places from 0). Templates are the recipe's.
        BadInput says which fact, layer or setting cannot be used.
        """
        task = Task(model, tokenizer, anatomy_of(model), facts, recipe, statistics, below)
        task.known, task.anew, task.progress = targets, anew, progress
        if targets.shape != (len(facts), task.anatomy.d_model):
            raise BadInput(
                f"the targets are {list(targets.shape)}; {len(facts)} facts need {task.anatomy.d_model} "
                "numbers each"
            )
        return self._run(task)


def tell(progress: Progress | None, phase: str, done: int, total: int) -> None:
    """Progress, where somebody wants to see it."""
    if progress is not None:
        progress(phase, done, total)
