"""UltraEdit: one forward and one backward a fact, and a ridge solve (Gu et al. 2025, arXiv 2505.14679).

No target is sought. Fact i gives each edited weight a key h_i, the weight's input at the token whose next is
the first of the target, and ∇_i, the gradient of -log p(target) by the weight's output there. With both
divided, number by number, by what they usually are (ĥ, ∇̂), all weights are updated at once:

    v_i = -η ‖ĥ_i‖² ∇̂_i,    min ‖Δ H - V‖² + λ ‖Δ‖²,    Δ = V Hᵀ (H Hᵀ + λI)⁻¹

η is the recipe's ``learning_rate``, and λ is 1 in the public code (XiaojieGu/UltraEdit).

**Normalisation.** The paper normalises with mean and deviation over all facts so far, a state of the process
that only grows: what was reverted would go on shaping later edits, and the first fact alone has no deviation.
Gradients of earlier facts are in no patch, and on the model with their patches they are nearly zero. So here
the usual size is the root mean square over the batch and all edited weights, and nothing is carried over: an
edit depends on its own facts and the model alone, whatever was edited or reverted before. The mean is not
taken off, so that a batch may be of one fact, whose ∇̂ is the gradient's sign.

Other differences from the public code: it has a key for each token of the target, here a fact has one, as a
term of a patch is one fact; it averages the loss over the tokens of ten facts at a time, here each fact's is
the mean over its own; for some models it edits gate and up projections, here the down-projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchkit.algebra.factors import Delta, Solution
from patchkit.editing.batching import Budget, in_batches
from patchkit.editing.editor import Edited
from patchkit.editing.losses import Rewriting
from patchkit.editing.recipe import positions
from patchkit.editing.solve import exact_device
from patchkit.editing.task import RefitterBase, Task, tell
from patchkit.editing.templates import Passage, rewriting_passages
from patchkit.errors import BadInput
from patchkit.models.anatomy import Anatomy
from patchkit.models.packing import pack
from patchkit.models.replay import run_blocks
from patchkit.models.trial import try_out

__all__ = ["UltraEdit"]


class UltraEdit(RefitterBase):
    """One forward and one backward a fact, and a ridge solve: no search, no statistics (Gu et al. 2025)."""

    name = "ultraedit"
    searches = False

    def update(self, task: Task) -> Edited:
        """All weights from one pass on the model as it stands. A refit is the same again: nothing was sought.

        The targets of the patch are what the last edited weight is to write for each key.
        """
        model, anatomy, recipe = task.model, task.anatomy, task.recipe
        with task.timer("text"):
            texts = rewriting_passages(task.tokenizer, task.facts, ("{}",), positions(model.config))
            passages = [passage.whole for (passage,) in texts]
            try_out(model, anatomy, recipe.layers[-1:], passages[0].tokens)
        with task.timer("gradients"):
            seen = _look(task, passages)
        with task.timer("solve"):
            steps = _steps(seen, recipe.learning_rate)
            deltas, keys = {}, {}
            for place, layer in enumerate(recipe.layers):
                name = anatomy.weights[layer]
                keys[name] = seen.keys[place].float()
                deltas[name] = Delta(
                    steps[place].T, _ridge(keys[name], recipe.lambda_), transposed=anatomy.transposed
                )
        solution = Solution(seen.written + steps[-1].to(seen.written), keys)
        once = [1] * len(task.facts)
        return Edited(deltas, solution, recipe, task.timer.seconds, once, seen.losses.tolist())


@dataclass(frozen=True)
class _Seen:
    """Of N facts at L weights: inputs [L, N, d_in], gradients by outputs [L, N, d_out], what the last weight
    ``written`` [N, d_out], and the loss [N]."""

    keys: Tensor
    gradients: Tensor
    written: Tensor
    losses: Tensor


def _steps(seen: _Seen, rate: float) -> Tensor:
    """v = -η ‖ĥ‖² ∇̂ [L, N, d_out], float64."""
    place = exact_device(seen.keys.device)
    h, gradient = (_scaled(part.to(place, torch.float64)) for part in (seen.keys, seen.gradients))
    return -rate * h.square().sum(-1, keepdim=True) * gradient


def _scaled(rows: Tensor) -> Tensor:
    """[L, N, d] by the root mean square of each of the d numbers over the others."""
    usual = rows.square().mean((0, 1)).sqrt()
    return rows / usual.clamp(min=torch.finfo(rows.dtype).tiny)


def _ridge(keys: Tensor, weight: float) -> Tensor:
    """(H Hᵀ + λI)⁻¹ H = H (Hᵀ H + λI)⁻¹ for keys as rows [N, d_in]; rows, from the smaller of the systems."""
    K = keys.to(exact_device(keys.device), torch.float64)
    many = len(K) > K.shape[1]
    system = K.T @ K if many else K @ K.T
    system.diagonal().add_(weight)
    return torch.linalg.solve(system, K.T).T if many else torch.linalg.solve(system, K)


def _look(task: Task, passages: Sequence[Passage]) -> _Seen:
    """One forward and one backward of every fact, in batches of like length."""
    model, anatomy, layers = task.model, task.anatomy, task.recipe.layers
    count = len(passages)
    here = torch.empty(0, dtype=model.dtype, device=model.device)
    seen = _Seen(
        here.new_empty(len(layers), count, anatomy.d_ff),
        here.new_empty(len(layers), count, anatomy.d_model),
        here.new_empty(count, anatomy.d_model),
        here.new_empty(count),
    )
    done = 0

    def work(batch: list[int], budget: Budget) -> None:
        nonlocal done
        tell(task.progress, "gradients", done, count)
        for part in pack([len(passages[fact].tokens) - 1 for fact in batch], budget.tokens):
            chosen = [batch[place] for place in part]
            _look_at(model, anatomy, layers, [passages[fact] for fact in chosen], chosen, seen)
        done += len(batch)

    order = sorted(range(count), key=lambda fact: len(passages[fact].tokens))
    in_batches(order, Budget.of(task.batch_size, model.device), work)
    tell(task.progress, "gradients", count, count)
    for fact in range(count):
        if not bool(seen.losses[fact].isfinite()):
            raise BadInput(f"fact {fact + 1}: the loss is not a number on this model")
    return seen


def _look_at(
    model: PreTrainedModel,
    anatomy: Anatomy,
    layers: Sequence[int],
    passages: Sequence[Passage],
    facts: Sequence[int],
    seen: _Seen,
) -> None:
    """Fill in what some facts give."""
    rows = [passage.row(0).suffix for passage in passages]
    width = max(map(len, rows))
    ends = [row * width + passage.read.start for row, passage in enumerate(passages)]
    at = torch.tensor(ends, device=model.device)
    with ExitStack() as stack:
        probes = [stack.enter_context(_probing(anatomy.downs[layer], at)) for layer in layers]
        tail = run_blocks(model, anatomy, rows)
        losses = Rewriting.of_rows(facts, [[passage] for passage in passages], tail).given(tail.hidden)
        gradients = torch.autograd.grad(losses.sum(), [probe.push for probe in probes])
    for place, (probe, gradient) in enumerate(zip(probes, gradients, strict=True)):
        seen.keys[place, facts], seen.gradients[place, facts] = probe.key, gradient
    seen.written[facts], seen.losses[facts] = probes[-1].written, losses.detach()


class _Probe:
    """At some tokens: a weight's inputs ``key``, outputs ``written``, and a zero added to them, ``push``."""

    key: Tensor
    written: Tensor
    push: Tensor


@contextmanager
def _probing(down: nn.Module, at: Tensor) -> Iterator[_Probe]:
    """A probe of the next run at the places ``at`` among all tokens of all rows."""
    probe = _Probe()

    def look(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        flat = output.reshape(-1, output.shape[-1])  # some blocks flatten
        probe.key = inputs[0].reshape(-1, inputs[0].shape[-1])[at].detach()
        probe.written = flat[at].detach()
        probe.push = torch.zeros_like(probe.written, requires_grad=True)
        return flat.index_add(0, at, probe.push).view_as(output)

    handle = down.register_forward_hook(look)
    try:
        yield probe
    finally:
        handle.remove()
