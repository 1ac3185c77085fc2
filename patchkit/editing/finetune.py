"""FT: constrained fine-tuning of one layer's down-projection, the baseline of ROME and MEMIT.

The weight W itself goes down the mean over facts of -log p(target), by Adam, with weight decay (MEMIT's
FT-W, arXiv 2210.07229) and within ``norm_bound`` of where it was in every entry (ROME's FT+L, arXiv
2202.05262; Zhu et al. 2020, arXiv 2012.00363). Differences from the published code: a target of
several tokens is read teacher forced, not all of it at the prompt's last token; one layer's down-projection
is trained, where MEMIT's FT-W trained the whole block; every step reads all facts, so facts are batched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.algebra.factors import Delta
from patchkit.editing.batching import Budget
from patchkit.editing.descent import Adam
from patchkit.editing.editor import Edited
from patchkit.editing.losses import Rewriting
from patchkit.editing.recipe import Recipe, positions
from patchkit.editing.task import EditorBase, Progress, Task, tell
from patchkit.editing.templates import Passage, rewriting_passages
from patchkit.errors import BadInput
from patchkit.models.anatomy import Anatomy
from patchkit.models.hooks import reading_inputs
from patchkit.models.outlet import Outlet
from patchkit.models.packing import pack
from patchkit.models.replay import capture
from patchkit.models.trial import try_out

__all__ = ["FineTune"]

_HELD = 1 << 30  # bytes of states


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
            parts = _Parts(model, anatomy, layer, [passage.whole for (passage,) in texts], budget)
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

    @property
    def size(self) -> int:
        """Bytes of states, the block's own among them."""
        states = (self.inputs, self.written, self.loss.tail.hidden)
        return sum(each.numel() * each.element_size() for each in states)

    def losses(self, change: Tensor, outlet: Outlet) -> Tensor:
        """[R] mean over target tokens of -log p for W + ``change`` [d_out, d_in]."""
        moved = outlet.passed(self.written + self.inputs @ change.T) - outlet.passed(self.written)
        return self.loss.given(self.loss.tail.hidden + moved)


class _Parts:
    """Everything below and in the layer, for all facts: neither depends on the weight's update.

    What there is room for runs once and is held; the rest runs again in every step, to the same numbers, so
    that memory is bounded whatever the number of facts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        layer: int,
        passages: Sequence[Passage],
        budget: Budget,
    ) -> None:
        self._model, self._anatomy, self._layer, self._passages = model, anatomy, layer, passages
        self._groups = pack([len(passage.row(0).suffix) for passage in passages], budget.tokens)
        self._held: dict[int, _Part] = {}
        self._room = _HELD

    def __iter__(self) -> Iterator[_Part]:
        for place, facts in enumerate(self._groups):
            part = self._held.get(place) or self._run(facts)
            if place not in self._held and part.size <= self._room:
                self._room -= part.size
                self._held[place] = part
            yield part

    def _run(self, facts: list[int]) -> _Part:
        down, passages = self._anatomy.downs[self._layer], [self._passages[fact] for fact in facts]
        with reading_inputs(down) as seen:
            tail = capture(self._model, self._anatomy, [p.row(0) for p in passages], layer=self._layer)
        inputs = seen[-1].view(*tail.mask.shape, -1)  # some blocks flatten
        with torch.no_grad():
            written = down(seen[-1]).view(*tail.mask.shape, -1)
        return _Part(Rewriting.of_rows(facts, [[passage] for passage in passages], tail), inputs, written)


def _train(
    parts: _Parts,
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


def _linear(anatomy: Anatomy, layer: int) -> Tensor:
    """The weight as `nn.Linear` has it, [d_out, d_in]."""
    stored = anatomy.weight(layer).detach()
    return (stored.T if anatomy.transposed else stored).clone()
