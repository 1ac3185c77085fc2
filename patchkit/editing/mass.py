"""What mass editors share: algorithm 1 of MEMIT (Meng et al. 2022, arXiv 2210.07229), but for the solve.

Targets z at the last edited layer; then, layer by layer upward, keys and current states with the
layers below already updated, residuals shared out over the layers still to do, and the editor's own
solve. The update of a layer is Σ over facts of b ⊗ a: term i is fact i.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.algebra.factors import Delta, Solution
from patchkit.editing.anchor import anchored
from patchkit.editing.corpus import corpus_name
from patchkit.editing.editor import Below, Edited
from patchkit.editing.keys import Reader, collect_outputs
from patchkit.editing.recipe import Recipe, positions
from patchkit.editing.sinks import out_of_sinks
from patchkit.editing.solve import exact_device
from patchkit.editing.statistics import Statistics
from patchkit.editing.targets import Targets, find_targets
from patchkit.editing.task import Progress, RefitterBase, Task, Timer, tell
from patchkit.editing.templates import Passage, drift_passages, rewriting_passages, write_templates
from patchkit.errors import BadInput
from patchkit.facts import Fact
from patchkit.models.anatomy import Anatomy
from patchkit.models.outlet import Outlet
from patchkit.models.trial import outlets_of, try_out

__all__ = [
    "MassEditor",
    "Place",
    "add",
    "resolve",
    "restored",
    "rewriting_of",
    "spread",
]

Solve = Callable[[Tensor, Tensor, int, str, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Place:
    """Where an editor solves: a layer, its weight's name, and what the solve may read beside keys.

    ``variation`` [d_in, d_in]: how the facts' keys vary with the context, where the recipe weighs it.
    """

    layer: int
    weight: str
    recipe: Recipe
    statistics: Statistics
    below: Sequence[Below]
    variation: Tensor | None = None


class MassEditor(RefitterBase):
    """Many facts at once, spread over several layers. What is an editor's own is its name and `terms`."""

    @abstractmethod
    def terms(self, keys: Tensor, residuals: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """B [d_out, N] and A [N, d_in] of ΔW = B A, column and row i for fact i.

        ``keys`` [N, d_in], ``residuals`` [N, d_out]: what the weight is to give more for each key.
        """

    def update(self, task: Task) -> Edited:
        """Targets, if they are not known; then the spread over the layers, with forward passes only."""
        with task.timer("text"):
            recipe = resolve(task.model, task.tokenizer, task.recipe, task.moments)
            rewriting = rewriting_of(task.model, task.tokenizer, task.facts, recipe)
            look = try_out if task.known is None else outlets_of
            outlets = look(task.model, task.anatomy, recipe.layers, rewriting[0][0].tokens)
        targets = _targets(task, recipe, rewriting, outlets[recipe.layers[-1]])
        deltas, keys = spread(
            task.model,
            task.anatomy,
            rewriting,
            targets.z,
            recipe,
            self.solver(recipe, task.moments, task.below),
            outlets=outlets,
            timer=task.timer,
            progress=task.progress,
        )
        solution = Solution(targets.z, keys)
        return Edited(deltas, solution, recipe, task.timer.seconds, targets.steps, targets.losses)

    def solver(self, recipe: Recipe, statistics: Statistics, below: Sequence[Below] = ()) -> Solve:
        """What `spread` calls at each layer."""

        def solve(
            keys: Tensor, residuals: Tensor, layer: int, weight: str, variation: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            return self.terms(keys, residuals, Place(layer, weight, recipe, statistics, below, variation))

        return solve


def _targets(task: Task, recipe: Recipe, rewriting: Sequence[Sequence[Passage]], outlet: Outlet) -> Targets:
    """Those that are known, and those that are sought on this model."""
    count, sought = len(task.facts), task.sought
    found = Targets(torch.empty(0), [], [])
    if sought:
        with task.timer("targets"):
            chosen = [rewriting[i] for i in sought]
            longest = positions(task.model.config)
            drift = drift_passages(task.tokenizer, [task.facts[i] for i in sought], recipe.kl_prompt, longest)
            found = find_targets(
                task.model,
                task.anatomy,
                chosen,
                drift,
                recipe,
                walk=task.moments.walk(recipe.layers[-1], recipe.curvature),
                batch_size=task.batch_size,
                unfinished=task.unfinished,
                progress=task.progress,
                places=sought,
            )
            if recipe.norm_anchor:
                z = anchored(task.model, task.anatomy, chosen, found.z, recipe, outlet)
                found = replace(found, z=z)
    if task.known is None:
        return found
    both = Targets(task.known.clone(), [0] * count, [0.0] * count)
    for place, fact in enumerate(sought):
        both.z[fact] = found.z[place].to(both.z)
        both.steps[fact], both.losses[fact] = found.steps[place], found.losses[place]
    return both


def rewriting_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], recipe: Recipe
) -> list[list[Passage]]:
    """For each fact its passages [fact][template], the bare prompt first, or what stands for it."""
    longest = positions(model.config)
    passages = rewriting_passages(tokenizer, facts, recipe.templates, longest, recipe.wordings)
    instead = out_of_sinks(model, tokenizer, facts, recipe)
    return [own if text is None else [text, *own[1:]] for own, text in zip(passages, instead, strict=True)]


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

    MEMIT's algorithm 1, lines 7-16, with ``solve(keys, residuals, layer, weight, variation)`` for its line
    14: each layer takes its share of what is still missing, from low to high; where
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
                keys[name], variation = _keys(reader, layer, recipe)
                residuals = (z - reader.states(layer, last)) / (len(recipe.layers) - done)
                if not outlets[layer].plain:
                    written = collect_outputs(model, anatomy, passages, layer)
                    residuals = outlets[layer].pull_back(written, residuals)
            tell(progress, "solve", done, len(recipe.layers))
            with timer("solve"):
                B, A = solve(keys[name], residuals, layer, name, variation)
                deltas[name] = Delta(B, A, transposed=anatomy.transposed)
                add(anatomy.weight(layer), deltas[name])
        for phase in ("keys", "solve"):
            tell(progress, phase, len(recipe.layers), len(recipe.layers))
    return deltas, keys


def _keys(reader: Reader, layer: int, recipe: Recipe) -> tuple[Tensor, Tensor | None]:
    """Keys [N, d_ff] as the patch will hold them, and how they vary where the recipe weighs it."""
    if not recipe.context_weight:
        return reader.keys(layer).float(), None
    keys, variation = reader.keys_and_variation(layer)
    return keys.float(), variation


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
