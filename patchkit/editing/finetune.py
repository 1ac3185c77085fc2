"""FT: constrained fine-tuning of one layer's down-projection, the baseline of ROME and MEMIT.

The weight W itself goes down the mean over facts of -log p(target), by Adam, with weight decay (MEMIT's
FT-W, arXiv 2210.07229) and within ``norm_bound`` of where it was in every entry (ROME's FT+L, arXiv
2202.05262; Zhu et al. 2020, arXiv 2012.00363). Differences from the published code: a target of
several tokens is read teacher forced, not all of it at the prompt's last token; one layer's down-projection
is trained, where MEMIT's FT-W trained the whole block; every step reads all facts, so facts are batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.editing.batching import Budget
from patchkit.editing.descent import Adam
from patchkit.editing.editor import Edited
from patchkit.editing.losses import Rewriting
from patchkit.editing.recipe import Recipe, positions
from patchkit.editing.task import EditorBase, Progress, Task, tell
from patchkit.editing.templates import Passage, rewriting_passages
from patchkit.errors import BadInput
from patchkit.factors import Delta
from patchkit.models.anatomy import Anatomy
from patchkit.models.hooks import reading_inputs
from patchkit.models.outlet import Outlet
from patchkit.models.packing import pack
from patchkit.models.replay import capture
from patchkit.models.trial import try_out

__all__ = ["FineTune"]


class FineTune(EditorBase):
    """Fine-tuning of one layer, the papers' baseline, within weight_decay or norm_bound; keeps no keys."""

    name = "ft"

    def update(self, task: Task) -> Edited:
        """Train the weight on all facts as one batch.

        The update is dense: Adam divides entry by entry, so no factors give it exactly. Statistics are not
        read, and nothing is kept in ``unfinished``.
        """
        model, anatomy, recipe, count = task.model, task.anatomy, task.recipe, len(task.facts)
        (layer,) = recipe.layers
        with task.timer("text"):
            texts = rewriting_passages(task.tokenizer, task.facts, ("{}",), positions(model.config))
            outlet = try_out(model, anatomy, recipe.layers, texts[0][0].tokens)[layer]
            budget = Budget.of(task.batch_size, model.device)
            parts = _parts(model, anatomy, layer, [_whole(passage) for (passage,) in texts], budget)
        with task.timer("training"):
            before = _linear(anatomy, layer)
            change, steps, losses = _train(parts, outlet, before, recipe, count, task.progress)
        deltas = {anatomy.weights[layer]: Delta(dense=change, transposed=anatomy.transposed)}
        return Edited(deltas, None, recipe, task.timer.seconds, [steps] * count, losses)


@dataclass(frozen=True)
class _Part:
    """Some facts' texts from the first token on: the loss above the layer, and what reaches the weight.

    ``inputs`` [R, S, d_in] of the weight and ``written`` [R, S, d_out] by it, before anything is trained.
    """

    loss: Rewriting
    inputs: Tensor
    written: Tensor

    def losses(self, change: Tensor, outlet: Outlet) -> Tensor:
        """[R] mean over target tokens of -log p for W + ``change`` [d_out, d_in]."""
        moved = outlet.passed(self.written + self.inputs @ change.T) - outlet.passed(self.written)
        return self.loss.given(self.loss.tail.hidden + moved)


def _parts(
    model: PreTrainedModel, anatomy: Anatomy, layer: int, passages: Sequence[Passage], budget: Budget
) -> list[_Part]:
    """Everything below and in the layer, run once: neither depends on the weight's update."""
    parts = []
    down = anatomy.downs[layer]
    for facts in pack([len(p.row(0).suffix) for p in passages], budget.tokens):
        with reading_inputs(down) as seen:
            tail = capture(model, anatomy, [passages[fact].row(0) for fact in facts], layer=layer)
        inputs = seen[-1].view(*tail.mask.shape, -1)  # some blocks flatten
        with torch.no_grad():
            written = down(seen[-1]).view(*tail.mask.shape, -1)
        parts.append(_Part(Rewriting.of_rows(facts, [[passages[f]] for f in facts], tail), inputs, written))
    return parts


def _train(
    parts: Sequence[_Part],
    outlet: Outlet,
    before: Tensor,
    recipe: Recipe,
    count: int,
    progress: Progress | None,
) -> tuple[Tensor, int, list[float]]:
    """The change of the weight, the steps taken, and each fact's last loss.

    A step: g = ∇ mean loss + weight_decay W; Adam; each entry back to within ``norm_bound`` of its start.
    """
    change = torch.zeros_like(before)
    descent, bound = Adam(change, recipe), recipe.norm_bound or float("inf")
    losses = before.new_zeros(count)
    for step in range(1, recipe.steps + 1):
        tell(progress, "training", step - 1, recipe.steps)
        gradient = recipe.weight_decay * (before + change)
        for part in parts:
            leaf = change.detach().requires_grad_()
            value = part.losses(leaf, outlet)
            gradient += torch.autograd.grad(value.sum() / count, leaf)[0]
            losses[part.loss.where] = value.detach()
        if not bool(losses.isfinite().all()):
            raise BadInput(f"step {step}: the loss is not a number; lower learning_rate")
        if float(losses.mean()) < recipe.stop_loss:
            break
        change = (change + descent.move(gradient, step)).clamp(-bound, bound)
    tell(progress, "training", recipe.steps, recipe.steps)
    return change, step, losses.tolist()


def _whole(passage: Passage) -> Passage:
    """The same text, replayed from its first token: the weight acts on all of them."""
    return replace(passage, subject=0)


def _linear(anatomy: Anatomy, layer: int) -> Tensor:
    """The weight as `nn.Linear` has it, [d_out, d_in]."""
    stored = anatomy.weight(layer).detach()
    return (stored.T if anatomy.transposed else stored).clone()
