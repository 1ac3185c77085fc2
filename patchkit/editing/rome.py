"""ROME: rank-one model editing (Meng et al. 2022, arXiv 2202.05262), one fact after another into one layer.

Fact i is written exactly: its key k gives its value v afterwards, and what the weight serves changes as
little as that allows, ΔW = r (C⁻¹k̄)ᵀ / (kᵀ C⁻¹k̄) with r = v - W k (eq. 2). The published code takes the mean
key over the contexts for k̄ and the bare prompt's for k, which makes single edits that disable a model
(Gupta, Baskaran and Anumanchipalli 2024, "Rebuilding ROME", arXiv 2403.07175). By default the mean key
stands in both places, as there (R-ROME); with ``mean_key = false`` it is ROME as published.

Truly sequential: v of a fact is sought on the model with the facts before it. Only what does not depend
on them, the keys and C⁻¹k̄, is computed for all facts at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.algebra.factors import Delta, Solution
from patchkit.editing.batching import BatchSize
from patchkit.editing.curvature import Walk
from patchkit.editing.editor import Edited
from patchkit.editing.kept import computed_on, key_of, read_kept, write_kept
from patchkit.editing.keys import collect_inputs, collect_states
from patchkit.editing.mass import add, resolve, restored, rewriting_of
from patchkit.editing.recipe import Recipe, positions
from patchkit.editing.solve import exact_device, scaled_inverse_keys
from patchkit.editing.statistics import Statistics
from patchkit.editing.targets import find_targets
from patchkit.editing.task import RefitterBase, Task, tell
from patchkit.editing.templates import Passage, drift_passages, plain
from patchkit.models.anatomy import Anatomy
from patchkit.models.outlet import Outlet
from patchkit.models.trial import try_out

__all__ = ["Rome"]

_AT_ONCE = 256  # facts whose keys are read together
_KEEP_EVERY = 20.0  # seconds between two writings of the values

Found = tuple[Tensor, int, float]
"""A fact's value [d_out], the steps that it took, and its last loss."""


class Rome(RefitterBase):
    """Rank-one editing: one fact after another, exactly, in one layer (Meng et al., NeurIPS 2022)."""

    name = "rome"

    def update(self, task: Task) -> Edited:
        """Write the facts in their order, with the values that are known; the others' are sought on the way.

        The contexts of one fact are optimised together, the facts one after another. Kept in ``unfinished``
        are the values of the first facts, so that a run that was killed goes on behind them to the same bits.
        """
        model, anatomy, layer = task.model, task.anatomy, task.recipe.layers[0]
        count, sought = len(task.facts), set(task.sought)
        with task.timer("text"):
            recipe = resolve(model, task.tokenizer, task.recipe, task.moments)
            rewriting = rewriting_of(model, task.tokenizer, task.facts, recipe)
            drift = drift_passages(task.tokenizer, task.facts, recipe.kl_prompt, positions(model.config))
            outlet = try_out(model, anatomy, recipe.layers, rewriting[0][0].tokens)[layer]
        with task.timer("keys"):
            writer = _Writer.of(model, anatomy, rewriting, drift, recipe, task.moments, outlet)
        kept = _Kept.of(task, rewriting, drift, recipe, writer)
        with restored([anatomy.weight(layer)]):
            with task.timer("solve"):
                for found in kept.read(len(writer.W)):
                    writer.write(*found)
            for fact in range(len(writer.values), count):
                tell(task.progress, "targets", fact, count)
                with task.timer("targets"):
                    known = None if task.known is None or fact in sought else (task.known[fact], 0, 0.0)
                    found = writer.seek(fact, task.batch_size) if known is None else known
                with task.timer("solve"):
                    writer.write(*found)
                kept.write(writer, last=fact + 1 == count)
            tell(task.progress, "targets", count, count)
        name = anatomy.weights[layer]
        solution = Solution(torch.stack(writer.values), {name: writer.keys})
        delta = Delta(torch.stack(writer.B, 1), writer.A, transposed=anatomy.transposed)
        return Edited({name: delta}, solution, recipe, task.timer.seconds, writer.steps, writer.losses)


def _means(
    model: PreTrainedModel, anatomy: Anatomy, rewriting: Sequence[Sequence[Passage]], layer: int
) -> tuple[Tensor, Tensor]:
    """The mean key over the contexts and the bare prompt's, [N, d_in] each in float64.

    Some facts at a time: those of all contexts at once would be T times as much.
    """
    parts = []
    for first in range(0, len(rewriting), _AT_ONCE):
        some = collect_inputs(model, anatomy, rewriting[first : first + _AT_ONCE], layer)
        inputs = some.to(exact_device(model.device)).double()
        parts.append((inputs.mean(1), inputs[:, 0].clone()))
    mean, bare = (torch.cat(rows) for rows in zip(*parts, strict=True))
    return mean, bare


@dataclass
class _Writer:
    """Facts on their way into one weight W, whose bits change meanwhile.

    ``keys`` k [N, d_in] at which each fact is to hold, ``bare`` those of the bare prompts, ``A`` rows
    C⁻¹k̄ / (kᵀ C⁻¹k̄); float64, but for the keys as the patch will hold them. ``W`` [d_out, d_in] and
    ``bias`` are as they were at first.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    rewriting: Sequence[Sequence[Passage]]
    drift: Sequence[Passage]
    recipe: Recipe
    outlet: Outlet
    keys: Tensor
    bare: Tensor
    A: Tensor
    W: Tensor
    bias: Tensor
    walk: Walk | None = None
    B: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        anatomy: Anatomy,
        rewriting: Sequence[Sequence[Passage]],
        drift: Sequence[Passage],
        recipe: Recipe,
        statistics: Statistics,
        outlet: Outlet,
    ) -> _Writer:
        """Keys of all facts: they are inputs of the weight that changes, so no fact moves another's."""
        layer = recipe.layers[0]
        mean, bare = _means(model, anatomy, rewriting, layer)
        keys = (mean if recipe.mean_key else bare).float()
        A = scaled_inverse_keys(mean, statistics.cholesky(layer, 1.0), at=keys)
        A = A.float().double()  # as the patch will hold it
        stored = anatomy.weight(layer).detach().to(A)
        W = (stored.T if anatomy.transposed else stored).clone()
        bias = getattr(anatomy.downs[layer], "bias", None)
        zero = W.new_zeros(len(W))
        b = zero if bias is None else bias.detach().to(W)
        walk = statistics.walk(layer, recipe.curvature)
        return cls(model, anatomy, rewriting, drift, recipe, outlet, keys, bare.to(A), A, W, b, walk)

    def written(self, key: Tensor) -> Tensor:
        """W k + b with the facts so far, [d_out] float64."""
        k = key.to(self.A)
        so_far = (b * (a @ k) for b, a in zip(self.B, self.A, strict=False))
        return self.W @ k + self.bias + sum(so_far)

    def seek(self, fact: int, batch_size: BatchSize) -> Found:
        """v of a fact (ROME eq. 4): what the weight writes for the bare prompt, moved by the δ that makes the
        model say the target, on the model with the facts before it."""
        layer, texts = self.recipe.layers[0], [self.rewriting[fact]]
        now = self.written(self.bare[fact])
        size = self.outlet.passed(now.to(self.model.device, self.model.dtype)).norm()[None]
        before = collect_states(self.model, self.anatomy, texts, layer)
        drift = [self.drift[fact]]
        found = find_targets(
            self.model,
            self.anatomy,
            texts,
            drift,
            self.recipe,
            sizes=size,
            walk=self.walk,
            batch_size=batch_size,
            places=[fact],
        )
        change = (found.z.to(before) - before).to(now)
        value = now + (change[0] if self.outlet.plain else self._aimed(now, change[0]))
        return value, found.steps[0], found.losses[0]

    def _aimed(self, now: Tensor, change: Tensor) -> Tensor:
        here, dtype = self.model.device, self.model.dtype
        return self.outlet.pull_back(now[None].to(here, dtype), change[None].to(here, dtype))[0].to(now)

    def write(self, value: Tensor, steps: int, loss: float) -> None:
        """Λ of the next fact: what its key still misses (ROME eq. 2), put on the weight."""
        fact = len(self.values)
        self.values.append(value.float().cpu())
        self.steps.append(steps)
        self.losses.append(loss)
        b = (self.values[-1].to(self.A) - self.written(self.keys[fact])).float().to(self.A)
        self.B.append(b)
        term = Delta(b[:, None], self.A[fact : fact + 1], transposed=self.anatomy.transposed)
        add(self.anatomy.weight(self.recipe.layers[0]), term)


@dataclass
class _Kept:
    """The values of the first facts, kept every ``_KEEP_EVERY`` seconds; nowhere where ``path`` is None."""

    path: Path | None
    at: float = field(default_factory=time.monotonic)

    @classmethod
    def of(
        cls,
        task: Task,
        rewriting: Sequence[Sequence[Passage]],
        drift: Sequence[Passage],
        recipe: Recipe,
        writer: _Writer,
    ) -> _Kept:
        """Named by all that values depend on beside the weights: the facts in their order, recipe and C."""
        if task.unfinished is None or task.known is not None:
            return cls(None)
        walked = None if writer.walk is None else writer.walk.origin
        of = {"recipe": recipe.to_dict(), "texts": plain(rewriting, drift), "walk": walked}
        key = key_of({**of, **computed_on(task.model.device)})
        return cls(task.unfinished / f"{recipe.method}-{key}.safetensors")

    def read(self, width: int) -> list[Found]:
        """The values [d_out = ``width``] that are there, with the steps and the loss of each."""
        kept = read_kept(self.path, {"values": [None, width], "steps": [None], "losses": [None]})
        if kept is None:
            return []
        return list(zip(kept["values"], kept["steps"].tolist(), kept["losses"].tolist(), strict=True))

    def write(self, writer: _Writer, *, last: bool) -> None:
        """Those found so far, if it is time to."""
        if self.path is None or not (last or time.monotonic() - self.at >= _KEEP_EVERY):
            return
        steps = torch.tensor(writer.steps)
        losses = torch.tensor(writer.losses, dtype=torch.float64)
        write_kept(self.path, {"values": torch.stack(writer.values), "steps": steps, "losses": losses})
        self.at = time.monotonic()
