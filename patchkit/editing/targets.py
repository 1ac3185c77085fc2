"""Targets z: the hidden state that makes the model say the new fact (MEMIT eq. 16-17).

z = init + δ at the output of the last edited block, at the subject's last token. δ minimises, in
every template, -log p(target), plus the drift of "{subject} is a", plus weight decay. Facts are
independent: each has its own state of descent and stop test, so a batch of N gives what N batches of one
give. A step replays only what depends on δ, for all facts at once, and tells the host once which
facts have stopped; those leave the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.algebra.threads import Each, side_by_side
from patchkit.editing.batching import BatchSize, Budget, in_batches
from patchkit.editing.curvature import Walk
from patchkit.editing.descent import descent_of
from patchkit.editing.kept import computed_on, key_of, read_kept, write_kept
from patchkit.editing.losses import Drift, Rewriting, log_probabilities
from patchkit.editing.recipe import Recipe
from patchkit.editing.templates import Passage, plain
from patchkit.errors import BadInput
from patchkit.models.anatomy import Anatomy
from patchkit.models.packing import pack
from patchkit.models.past import Openings, Row, openings_of
from patchkit.models.replay import capture

__all__ = ["Targets", "find_targets"]

_OF_THE_SOLVE = (
    "lambda",
    "lambda_norm",
    "guess",
    "method",
    "nullspace_threshold",
    "norm_anchor",
    "shrinkage",
    "context_weight",
)
_AT_ONCE = 4  # chunks: each holds the states that its gradient needs
_DRIFT = 8  # tokens that a fact's drift counts as: one is replayed, and the whole vocabulary is held
_Part = TypeVar("_Part", Rewriting, Drift)


@dataclass(frozen=True)
class Targets:
    """z [N, d_model] on the CPU, and for each fact the forward passes it took and its last loss."""

    z: Tensor
    steps: list[int]
    losses: list[float]


def find_targets(
    model: PreTrainedModel,
    anatomy: Anatomy,
    rewriting: Sequence[Sequence[Passage]],
    drift: Sequence[Passage],
    recipe: Recipe,
    *,
    sizes: Tensor | None = None,
    walk: Walk | None = None,
    batch_size: BatchSize = "auto",
    unfinished: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    places: Sequence[int] | None = None,
) -> Targets:
    """Optimise every fact's z at the recipe's last layer.

    ``rewriting`` is [fact][template], the bare prompt first; ``drift`` is [fact]. Facts of like length
    are batched; neither their order nor their number changes a fact's z. ``sizes`` [N] are the norms that
    clamp, decay and steps are shares of: by default those of the states. With a ``walk`` it
    is θ that is sought and clamped, δ = T θ (`curvature.Walk`). In ``unfinished``, a
    folder that belongs to these weights, each batch's targets are kept, and a run that was killed goes on
    behind them to the same bits, unless memory ran out on the way and batches became smaller. BadInput names
    the place of a fact whose loss is not finite: in ``places`` [N], counted from 0, where the facts are some
    of others.
    """
    count = len(rewriting)
    order = sorted(range(count), key=lambda i: (_width(rewriting[i]), rewriting[i][0].subject))
    found = _Found.resume(
        unfinished, _key(rewriting, drift, recipe, walk, model.device), count, anatomy.d_model, model.dtype
    )
    openings = _openings(model, anatomy, rewriting) if found.count < count else None
    T = None if walk is None else walk.T.to(model.device, model.dtype)

    def work(batch: list[int], budget: Budget) -> None:
        batch = [fact for fact in batch if not found.steps[fact]]
        if batch:
            texts = [rewriting[i] for i in batch], [drift[i] for i in batch]
            tell = _Estimate(found, len(batch), recipe.steps, progress)
            own = None if sizes is None else sizes[batch].to(model.device, model.dtype)
            found.add(batch, _optimise(model, anatomy, *texts, recipe, openings, budget, tell, own, T))
        if progress is not None:
            progress("targets", found.count, count)

    in_batches(order, Budget.of(batch_size, model.device), work)
    for fact in range(count):
        if not math.isfinite(found.losses[fact]):
            place = fact if places is None else places[fact]
            raise BadInput(f"fact {place + 1}: the loss is not a number; lower learning_rate or clamp")
    return Targets(found.z, found.steps, found.losses)


@dataclass(frozen=True)
class _Found:
    """z [N, d_model], steps and losses of each fact so far; one that took no step is still to do.

    Each batch has a file of its own in ``folder``, so that what is written grows with the facts alone.
    """

    z: Tensor
    steps: list[int]
    losses: list[float]
    folder: Path | None
    key: str

    @classmethod
    def resume(cls, folder: Path | None, key: str, count: int, width: int, dtype: torch.dtype) -> _Found:
        found = cls(torch.zeros(count, width, dtype=dtype), [0] * count, [0.0] * count, folder, key)
        for path in sorted(folder.glob(f"targets-{key}-*.safetensors")) if folder else ():
            kept = read_kept(path, {"facts": [None], "z": [None, width], "steps": [None], "losses": [None]})
            if kept is not None and kept["z"].dtype == dtype:
                found._take(kept)
        return found

    def _take(self, kept: Mapping[str, Tensor]) -> None:
        """What one file holds, unless it cannot be of these facts."""
        batch, steps, losses = (kept[name].tolist() for name in ("facts", "steps", "losses"))
        missing = all(fact in range(len(self.steps)) and not self.steps[fact] for fact in batch)
        if missing and len(set(batch)) == len(kept["z"]) == len(steps) == len(losses):
            self._put(batch, Targets(kept["z"], steps, losses))

    def _put(self, batch: Sequence[int], found: Targets) -> None:
        self.z[list(batch)] = found.z
        for place, fact in enumerate(batch):
            self.steps[fact], self.losses[fact] = found.steps[place], found.losses[place]

    def add(self, batch: Sequence[int], found: Targets) -> None:
        self._put(batch, found)
        if self.folder is not None:
            facts, steps = torch.tensor(batch), torch.tensor(found.steps)
            losses = torch.tensor(found.losses, dtype=torch.float64)
            path = self.folder / f"targets-{self.key}-{batch[0]}.safetensors"
            write_kept(path, {"facts": facts, "z": found.z, "steps": steps, "losses": losses})

    @property
    def count(self) -> int:
        return sum(steps > 0 for steps in self.steps)


class _Estimate:
    """Progress inside a batch. Its facts stop within few steps of one another, so those that go on count
    by the share of their way: the steps that facts took so far, on average, or all that are allowed."""

    def __init__(
        self, found: _Found, size: int, steps: int, progress: Callable[[str, int, int], None] | None
    ) -> None:
        self.before, self.total, self.size, self.progress = found.count, len(found.steps), size, progress
        self.likely = sum(found.steps) / found.count if found.count else steps

    def __call__(self, step: int, living: int) -> None:
        if self.progress is not None:
            done = self.size - living + int(living * min(step / self.likely, 0.9))
            self.progress("targets", self.before + done, self.total)


def _key(
    rewriting: Sequence[Sequence[Passage]],
    drift: Sequence[Passage],
    recipe: Recipe,
    walk: Walk | None,
    device: torch.device,
) -> str:
    """What targets depend on beside the weights."""
    settings = {
        name: value
        for name, value in recipe.to_dict().items()
        if name not in _OF_THE_SOLVE and not name.startswith("statistics")
    }
    settings["layers"] = recipe.layers[-1]  # those below take their share of what is found here
    walked = {} if walk is None else {"walk": walk.origin}
    texts = plain(rewriting, drift)
    return key_of({"recipe": settings, "texts": texts, **walked, **computed_on(device)})


@dataclass(frozen=True)
class _Loss:
    """A batch's loss, in turns: each step reads the templates of one turn, and all of the rest.

    Where a step reads every template there is one turn, and the loss is MEMIT's.
    """

    rewriting: tuple[Rewriting, ...]
    drift: tuple[Drift, ...]
    turns: Sequence[Sequence[int]]

    @property
    def facts(self) -> set[int]:
        return {fact for part in self.rewriting for fact in part.facts}

    @property
    def parts(self) -> list[Rewriting | Drift]:
        """The largest first, so that side by side they end together."""
        return sorted((*self.rewriting, *self.drift), key=lambda part: -part.tail.mask.numel())

    def turn(self, step: int) -> Sequence[int]:
        """The templates that ``step``, from 1 up, reads."""
        return self.turns[(step - 1) % len(self.turns)]

    def keep(self, living: Sequence[bool]) -> _Loss:
        """The same for the facts of the batch that are marked."""
        return replace(self, rewriting=_still(self.rewriting, living), drift=_still(self.drift, living))


def _optimise(
    model: PreTrainedModel,
    anatomy: Anatomy,
    rewriting: Sequence[Sequence[Passage]],
    drift: Sequence[Passage],
    recipe: Recipe,
    openings: Openings | None,
    budget: Budget,
    tell: Callable[[int, int], None],
    size: Tensor | None = None,
    T: Tensor | None = None,
) -> Targets:
    """One batch in the published order: loss, stop tests, a step down, clamp; ``steps`` - 1 moves at most.

    With ``T`` the steps are those of θ, δ = T θ: down T ∂loss/∂δ, and clamped there.

    ENCORE's test (arXiv 2502.01636) stands beside MEMIT's: the ``stop_argmax``-th time that a fact is said.
    """
    turns = _turns(len(rewriting[0]), recipe.templates_per_step)
    lengths = [len(turns[0]) * _width(texts) for texts in rewriting]
    chunks = pack(lengths, budget.tokens), pack([_DRIFT] * len(drift), budget.tokens)
    with side_by_side(min(_AT_ONCE, len(chunks[0])), model.device) as each:
        parts, init = _prepare(model, anatomy, rewriting, drift, recipe, openings, turns, chunks, each)
        size = init.norm(dim=1) if size is None else size
        theta, delta, descent = torch.zeros_like(init), torch.zeros_like(init), descent_of(init, size, recipe)
        alive = torch.ones(len(init), dtype=torch.bool, device=init.device)
        last, said = init.new_zeros(len(init)), torch.zeros_like(alive, dtype=torch.long)
        steps = [0] * len(init)
        for step in range(1, recipe.steps + 1):
            for fact in parts.facts:
                steps[fact] = step
            loss, gradient = _evaluate(parts, step, delta, size, recipe, said, each)
            last = torch.where(alive, loss, last)
            if step == recipe.steps:
                break
            alive &= ~(loss < recipe.stop_loss)
            if recipe.stop_argmax:
                alive &= said < recipe.stop_argmax
            moved = theta + descent.move(_walked(gradient, T), step)
            theta = torch.where(alive[:, None], _clamped(moved, recipe.clamp * size), theta)
            delta = _walked(theta, T)
            living = alive.tolist()  # the step's one synchronisation
            parts = parts.keep(living)
            tell(step, sum(living))
            if not parts.facts:
                break
    return Targets((init + delta).cpu(), steps, last.tolist())


def _evaluate(
    whole: _Loss, step: int, delta: Tensor, size: Tensor, recipe: Recipe, said: Tensor, each: Each
) -> tuple[Tensor, Tensor]:
    """The total loss [N] of each fact and its gradient [N, d_model]; part by part, which bounds memory.

    No move follows the last step, so its gradient is left at 0.

    Where ``stop_argmax`` is set, ``said`` [N] is one more for each fact whose target is the most probable.
    """
    differentiate, turn, parts = step < recipe.steps, whole.turn(step), whole.parts

    def of(part: Rewriting | Drift) -> tuple[Tensor, Tensor, Tensor | None]:
        part = part.reading(turn) if isinstance(part, Rewriting) else part
        with torch.set_grad_enabled(differentiate):
            own = delta.index_select(0, part.where).requires_grad_(differentiate)
            if recipe.stop_argmax and isinstance(part, Rewriting):
                value, right = part.of_and_said(own)
            else:
                value, right = part.of(own), None
            slope = torch.autograd.grad(value.sum(), own)[0] if differentiate else torch.zeros_like(own)
        return value.detach(), slope, right

    with torch.set_grad_enabled(differentiate):
        leaf = delta.detach().requires_grad_(differentiate)
        decay = recipe.weight_decay * leaf.norm(dim=1) / size.square()
        gradient = torch.autograd.grad(decay.sum(), leaf)[0] if differentiate else torch.zeros_like(delta)
    loss = decay.detach()
    for part, (value, slope, right) in zip(parts, each(of, parts), strict=True):
        loss = loss.index_add(0, part.where, value)
        gradient.index_add_(0, part.where, slope)
        if right is not None:
            said.index_add_(0, part.where, right.long())
    return loss, gradient


def _walked(rows: Tensor, T: Tensor | None) -> Tensor:
    """Rows [N, d_model] through the symmetric T; as they are where there is none."""
    return rows if T is None else rows @ T


def _clamped(delta: Tensor, longest: Tensor) -> Tensor:
    """δ, or θ, scaled back to at most ``longest`` [N]."""
    norm = delta.norm(dim=1)
    return delta * torch.where(norm > longest, longest / norm, 1)[:, None]


def _still(parts: Sequence[_Part], living: Sequence[bool]) -> tuple[_Part, ...]:
    kept = []
    for part in parts:
        stay = [place for place, fact in enumerate(part.facts) if living[fact]]
        if stay:
            kept.append(part if len(stay) == len(part.facts) else part.keep(stay))
    return tuple(kept)


def _prepare(
    model: PreTrainedModel,
    anatomy: Anatomy,
    rewriting: Sequence[Sequence[Passage]],
    drift: Sequence[Passage],
    recipe: Recipe,
    openings: Openings | None,
    turns: Sequence[Sequence[int]],
    chunks: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
    each: Each,
) -> tuple[_Loss, Tensor]:
    """Run everything once: the parts of the loss, and init [N, d_model].

    ``chunks``: the facts that are read side by side, and those whose drift is.
    """
    layer, templates = recipe.layers[-1], len(rewriting[0])

    def reading(facts: Sequence[int]) -> Rewriting:
        tail = capture(model, anatomy, _rows([rewriting[i] for i in facts]), layer=layer, openings=openings)
        return Rewriting.of_rows(facts, [rewriting[fact] for fact in facts], tail)

    def drifting(facts: Sequence[int]) -> Drift:
        tail = capture(model, anatomy, [drift[fact].to_subject(0) for fact in facts], layer=layer)
        with torch.no_grad():
            initial = log_probabilities(tail, tail.hidden)
        where = torch.tensor(facts, device=model.device)
        return Drift(tuple(facts), where, tail, initial, recipe.kl_factor)

    loss = _Loss(tuple(each(reading, chunks[0])), tuple(each(drifting, chunks[1])), turns)
    init = torch.empty(len(rewriting), anatomy.d_model, dtype=model.dtype, device=model.device)
    for part in loss.rewriting:
        init[part.where] = part.tail.hidden[::templates, 0]
    return loss, init


def _openings(model: PreTrainedModel, anatomy: Anatomy, rewriting: Sequence[Sequence[Passage]]) -> Openings:
    """The contexts, run once for the facts of all batches."""
    return Openings.run(model, anatomy, openings_of(model, _rows(rewriting)), until=anatomy.depth - 1)


def _rows(rewriting: Sequence[Sequence[Passage]]) -> list[Row]:
    return [p.row(template) for texts in rewriting for template, p in enumerate(texts)]


def _turns(templates: int, per_step: int) -> list[list[int]]:
    """The templates that a step reads, step by step; all of them where ``per_step`` is 0.

    The bare prompt in each step, so that no fact is done before its own prompt is; the contexts take turns,
    strided, so that turns are of like size. Where one is read at a time, the bare prompt takes its turn too.
    """
    if not 0 < per_step < templates:
        return [list(range(templates))]
    if per_step == 1:
        return [[template] for template in range(templates)]
    count = -(-(templates - 1) // (per_step - 1))
    return [[0, *range(first, templates, count)] for first in range(1, count + 1)]


def _width(passages: Sequence[Passage]) -> int:
    return max(len(passage.row(0).suffix) for passage in passages)
