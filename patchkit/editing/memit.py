"""MEMIT: mass-editing memory in a transformer (Meng et al. 2022, arXiv 2210.07229), algorithm 1.

Targets z at the last edited layer; then, layer by layer upward, keys and current states with the
layers below already updated, residuals shared out over the layers still to do, and the solve. The
update of a layer is Σ over facts of residual ⊗ solved key: term i is fact i.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.editing.batching import BatchSize
from patchkit.editing.corpus import corpus_name
from patchkit.editing.editor import Edited
from patchkit.editing.keys import collect_keys, collect_outputs, collect_states
from patchkit.editing.recipe import Recipe
from patchkit.editing.solve import exact_device, solve_keys
from patchkit.editing.statistics import Statistics, statistics_for
from patchkit.editing.targets import find_targets
from patchkit.editing.templates import Passage, drift_passages, rewriting_passages, write_templates
from patchkit.errors import BadInput
from patchkit.factors import Delta, Solution
from patchkit.facts import Fact
from patchkit.models.anatomy import Anatomy, anatomy_of
from patchkit.models.loading import float32_compute, frozen
from patchkit.models.outlet import Outlet
from patchkit.models.trial import try_out

__all__ = ["Memit", "Timer", "spread"]

Progress = Callable[[str, int, int], None]


class Memit:
    """Mass-editing: many facts at once, spread over several layers (Meng et al., ICLR 2023)."""

    name = "memit"

    def edit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        recipe: Recipe,
        statistics: Statistics | None = None,
        *,
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
        timer = Timer()
        with float32_compute(model), frozen(model):
            with timer("statistics"):
                if statistics is None:
                    statistics = statistics_for(model, tokenizer, recipe, progress=progress)
            with timer("text"):
                recipe = _resolve(model, tokenizer, recipe, statistics)
                longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
                rewriting = rewriting_passages(tokenizer, facts, recipe.templates, longest)
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
            deltas, keys = spread(
                model,
                anatomy,
                rewriting,
                targets.z,
                recipe,
                statistics,
                outlets=outlets,
                timer=timer,
                progress=progress,
            )
        return Edited(deltas, Solution(targets.z, keys), recipe, timer.seconds, targets.steps, targets.losses)


def _resolve(
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
    statistics: Statistics,
    *,
    outlets: Mapping[int, Outlet] | None = None,
    timer: Timer | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Delta], dict[str, Tensor]]:
    """ΔW and keys [N, d_ff] by weight name that bring the facts' states to z [N, d_model].

    Algorithm 1, lines 7-16: each layer takes its share of what is still missing, from low to high; where
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
    with _restored([anatomy.weight(layer) for layer in recipe.layers]):
        for done, layer in enumerate(recipe.layers):
            name = anatomy.weights[layer]
            _tell(progress, "keys", done, len(recipe.layers))
            with timer("keys"):
                keys[name] = collect_keys(model, anatomy, passages, layer).float()
                residuals = (z - collect_states(model, anatomy, passages, last)) / (len(recipe.layers) - done)
                if not outlets[layer].plain:
                    written = collect_outputs(model, anatomy, passages, layer)
                    residuals = outlets[layer].pull_back(written, residuals)
            _tell(progress, "solve", done, len(recipe.layers))
            with timer("solve"):
                solved = solve_keys(keys[name], statistics.cholesky(layer, recipe.lambda_))
                deltas[name] = Delta(B=residuals.T, A=solved, transposed=anatomy.transposed)
                _add(anatomy.weight(layer), deltas[name])
        for phase in ("keys", "solve"):
            _tell(progress, phase, len(recipe.layers), len(recipe.layers))
    return deltas, keys


def _add(weight: Tensor, delta: Delta) -> None:
    """weight += ΔW, in float64 and rounded once; the factors are those that the patch will hold."""
    assert delta.B is not None
    assert delta.A is not None
    place = exact_device(weight.device)
    dense = delta.B.to(place, torch.float64) @ delta.A.to(place, torch.float64)
    stored = dense.T if delta.transposed else dense
    with torch.no_grad():
        weight.copy_(weight.to(place, torch.float64) + stored)


@contextmanager
def _restored(weights: Sequence[Tensor]) -> Iterator[None]:
    """Give the weights back their bits, also where something fails."""
    before = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, kept in zip(weights, before, strict=True):
                weight.copy_(kept)


def _tell(progress: Progress | None, phase: str, done: int, total: int) -> None:
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
