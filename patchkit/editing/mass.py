"""What mass editors share: algorithm 1 of MEMIT (Meng et al. 2022, arXiv 2210.07229), but for the solve.

Targets z at the last edited layer; then, layer by layer upward, keys and current states with the
layers below already updated, residuals shared out over the layers still to do, and the editor's own
solve. The update of a layer is Σ over facts of b ⊗ a: term i is fact i.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.editing.batching import BatchSize
from patchkit.editing.corpus import corpus_name
from patchkit.editing.editor import Below, Edited
from patchkit.editing.keys import Reader, collect_outputs
from patchkit.editing.recipe import Recipe, positions
from patchkit.editing.solve import exact_device
from patchkit.editing.statistics import Statistics, statistics_for
from patchkit.editing.targets import find_targets
from patchkit.editing.templates import Passage, drift_passages, rewriting_passages, write_templates
from patchkit.errors import BadInput
from patchkit.factors import Delta, Solution
from patchkit.facts import Fact
from patchkit.models.anatomy import Anatomy, anatomy_of
from patchkit.models.loading import float32_compute, frozen
from patchkit.models.outlet import Outlet
from patchkit.models.trial import outlets_of, try_out

__all__ = [
    "MassEditor",
    "Place",
    "Timer",
    "add",
    "check_targets",
    "resolve",
    "restored",
    "rewriting_of",
    "spread",
    "tell",
]

Progress = Callable[[str, int, int], None]
Solve = Callable[[Tensor, Tensor, int, str], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Place:
    """Where an editor solves: a layer, its weight's name, and what the solve may read beside keys."""

    layer: int
    weight: str
    recipe: Recipe
    statistics: Statistics
    below: Sequence[Below]


class MassEditor(ABC):
    """Many facts at once, spread over several layers. What is an editor's own is its name and `terms`."""

    name: str

    @abstractmethod
    def terms(self, keys: Tensor, residuals: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """B [d_out, N] and A [N, d_in] of ΔW = B A, column and row i for fact i.

        ``keys`` [N, d_in], ``residuals`` [N, d_out]: what the weight is to give more for each key.
        """

    def check(self, weights: Sequence[str], below: Sequence[Below]) -> None:
        """BadInput where these weights cannot be edited on the patches below; before targets are sought."""
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

        Without ``statistics`` the recipe's are collected first and kept nowhere. Finished targets are
        kept in ``unfinished``, if it is given. BadInput says which fact, layer or setting cannot be used.
        """
        if not facts:
            raise BadInput("there are no facts to edit")
        anatomy = anatomy_of(model)
        anatomy.check_layers(recipe.layers)
        self.check([anatomy.weights[layer] for layer in recipe.layers], below)
        timer = Timer()
        with float32_compute(model), frozen(model):
            with timer("statistics"):
                if statistics is None:
                    statistics = statistics_for(model, tokenizer, recipe, progress=progress)
            with timer("text"):
                recipe = resolve(model, tokenizer, recipe, statistics)
                rewriting = rewriting_of(model, tokenizer, facts, recipe)
                drift = drift_passages(tokenizer, facts, recipe.kl_prompt)
                outlets = try_out(model, anatomy, recipe.layers, rewriting[0][0].tokens)
            with timer("targets"):
                targets = find_targets(
                    model,
                    anatomy,
                    rewriting,
                    drift,
                    recipe,
                    batch_size=batch_size,
                    unfinished=unfinished,
                    progress=progress,
                )
            solve = self.solver(recipe, statistics, below)
            deltas, keys = spread(
                model,
                anatomy,
                rewriting,
                targets.z,
                recipe,
                solve,
                outlets=outlets,
                timer=timer,
                progress=progress,
            )
        return Edited(deltas, Solution(targets.z, keys), recipe, timer.seconds, targets.steps, targets.losses)

    def refit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        targets: Tensor,
        recipe: Recipe,
        statistics: Statistics,
        *,
        below: Sequence[Below] = (),
        anew: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> Edited:
        """Solve ``facts`` on the model as it stands for ``targets`` z [N, d_model] found on another one.

        Forward passes only, but for the facts in ``anew`` (places from 0), whose z is sought on this model.
        Templates are the recipe's. BadInput says which fact, layer or setting cannot be used.
        """
        anatomy = anatomy_of(model)
        anatomy.check_layers(recipe.layers)
        check_targets(targets, len(facts), anatomy.d_model)
        self.check([anatomy.weights[layer] for layer in recipe.layers], below)
        timer = Timer()
        steps, losses, z = [0] * len(facts), [0.0] * len(facts), targets.clone()
        with float32_compute(model), frozen(model):
            with timer("text"):
                recipe = resolve(model, tokenizer, recipe, statistics)
                rewriting = rewriting_of(model, tokenizer, facts, recipe)
                outlets = outlets_of(model, anatomy, recipe.layers, rewriting[0][0].tokens)
            if anew:
                with timer("targets"):
                    drift = drift_passages(tokenizer, [facts[i] for i in anew], recipe.kl_prompt)
                    chosen = [rewriting[i] for i in anew]
                    found = find_targets(model, anatomy, chosen, drift, recipe, progress=progress)
                    z[list(anew)] = found.z.to(z.dtype)
                for place, fact in enumerate(anew):
                    steps[fact], losses[fact] = found.steps[place], found.losses[place]
            solve = self.solver(recipe, statistics, below)
            deltas, keys = spread(
                model,
                anatomy,
                rewriting,
                z,
                recipe,
                solve,
                outlets=outlets,
                timer=timer,
                progress=progress,
            )
        return Edited(deltas, Solution(z, keys), recipe, timer.seconds, steps, losses)

    def solver(self, recipe: Recipe, statistics: Statistics, below: Sequence[Below] = ()) -> Solve:
        """What `spread` calls at each layer."""

        def solve(keys: Tensor, residuals: Tensor, layer: int, weight: str) -> tuple[Tensor, Tensor]:
            return self.terms(keys, residuals, Place(layer, weight, recipe, statistics, below))

        return solve


def rewriting_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], recipe: Recipe
) -> list[list[Passage]]:
    """For each fact its passages [fact][template], the bare prompt first."""
    return rewriting_passages(tokenizer, facts, recipe.templates, positions(model.config))


def check_targets(targets: Tensor, count: int, width: int) -> None:
    """BadInput where stored targets are not one of this width for each fact."""
    if targets.shape != (count, width):
        raise BadInput(f"the targets are {list(targets.shape)}; {count} facts need {width} numbers each")


def resolve(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, statistics: Statistics
) -> Recipe:
    """The recipe with templates written and the digest of the statistics in use."""
    missing = [layer for layer in recipe.layers if layer not in statistics.layers]
    if missing:
        raise BadInput(
            f"layer {missing[0]}: no statistics were collected for it; collect them for {recipe.layers}"
        )
    templates = recipe.templates or write_templates(model, tokenizer, recipe)
    return recipe.override(
        templates=templates,
        statistics_text=corpus_name(recipe.statistics_text),
        statistics_digest=statistics.digest(recipe.layers),
    )


def spread(
    model: PreTrainedModel,
    anatomy: Anatomy,
    passages: Sequence[Sequence[Passage]],
    z: Tensor,
    recipe: Recipe,
    solve: Solve,
    *,
    outlets: Mapping[int, Outlet] | None = None,
    timer: Timer | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Delta], dict[str, Tensor]]:
    """ΔW and keys [N, d_ff] by weight name that bring the facts' states to z [N, d_model].

    MEMIT's algorithm 1, lines 7-16, with ``solve(keys, residuals, layer, weight)`` for its line 14: each
    layer takes its share of what is still missing, from low to high; where
    the model norms or scales what a layer writes, the share is pulled back through that (``outlets``, by
    default found here). The model computes in float32 or wider, and has its bits back afterwards.
    """
    timer = timer or Timer()
    outlets = outlets or try_out(model, anatomy, recipe.layers, passages[0][0].tokens)
    deltas: dict[str, Delta] = {}
    keys: dict[str, Tensor] = {}
    last = recipe.layers[-1]
    # In float32 as the patch will hold it, so that whoever starts from the patch's z starts from the same.
    z = z.float().to(model.device, model.dtype)
    reader = Reader(model, anatomy, passages)
    with restored([anatomy.weight(layer) for layer in recipe.layers]):
        for done, layer in enumerate(recipe.layers):
            name = anatomy.weights[layer]
            tell(progress, "keys", done, len(recipe.layers))
            with timer("keys"):
                keys[name] = reader.keys(layer).float()
                residuals = (z - reader.states(layer, last)) / (len(recipe.layers) - done)
                if not outlets[layer].plain:
                    written = collect_outputs(model, anatomy, passages, layer)
                    residuals = outlets[layer].pull_back(written, residuals)
            tell(progress, "solve", done, len(recipe.layers))
            with timer("solve"):
                B, A = solve(keys[name], residuals, layer, name)
                deltas[name] = Delta(B, A, transposed=anatomy.transposed)
                add(anatomy.weight(layer), deltas[name])
        for phase in ("keys", "solve"):
            tell(progress, phase, len(recipe.layers), len(recipe.layers))
    return deltas, keys


def add(weight: Tensor, delta: Delta) -> None:
    """weight += ΔW, in float64 and rounded once; the factors are those that the patch will hold."""
    assert delta.B is not None
    assert delta.A is not None
    place = exact_device(weight.device)
    dense = delta.B.to(place, torch.float64) @ delta.A.to(place, torch.float64)
    stored = dense.T if delta.transposed else dense
    with torch.no_grad():
        weight.copy_(weight.to(place, torch.float64) + stored)


@contextmanager
def restored(weights: Sequence[Tensor]) -> Iterator[None]:
    """Give the weights back their bits, also where something fails."""
    before = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, kept in zip(weights, before, strict=True):
                weight.copy_(kept)


def tell(progress: Progress | None, phase: str, done: int, total: int) -> None:
    """Progress, where somebody wants to see it."""
    if progress is not None:
        progress(phase, done, total)


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
