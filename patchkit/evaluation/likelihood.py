"""Teacher-forced likelihoods: how probable a model holds an object after a prompt.

Batched over prompts of like length; the head runs only at the positions that are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patchkit.models.tokens import split_target

__all__ = ["Score", "score_targets"]

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Score:
    """One object after one prompt."""

    log_probability: float
    """Sum over the object's tokens, in nats."""
    tokens: int
    argmax: bool
    """Every token of the object is the most probable one given those before it."""
    next_token: int
    """The most probable token after the prompt, whatever the object."""

    @property
    def probability(self) -> float:
        return math.exp(self.log_probability)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood a token, in nats: what CounterFact compares."""
        return -self.log_probability / self.tokens


def score_targets(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Score]:
    """Score each (prompt, object); the object follows the prompt after a space."""
    split = [split_target(tokenizer, prompt, target) for prompt, target in pairs]
    scores: list[Score | None] = [None] * len(split)
    for rows in _batches([len(prompt) + len(target) for prompt, target in split]):
        logits, first = _logits(
            model,
            [(split[i][0] + split[i][1])[:-1] for i in rows],
            first=min(len(split[i][0]) - 1 for i in rows),
        )
        for row, i in enumerate(rows):
            prompt, target = split[i]
            start = len(prompt) - 1 - first
            here = logits[row, start : start + len(target)].float()  # [target tokens, vocabulary]
            ids = torch.tensor(target, device=here.device)
            log_p = here.log_softmax(-1).gather(-1, ids[:, None]).sum()
            best = here.argmax(-1)
            scores[i] = Score(float(log_p), len(target), bool((best == ids).all()), int(best[0]))
    return [score for score in scores if score is not None]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of rows of like length, about BATCH_TOKENS padded tokens a batch."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _logits(model: Any, rows: list[list[int]], first: int) -> tuple[torch.Tensor, int]:
    """Logits from position ``first`` on, [rows, width - first, vocabulary], and ``first``.

    Padded on the right: a causal model's logits at real positions do not see it.
    """
    width = max(len(row) for row in rows)
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    with torch.no_grad():
        out = model(input_ids=tokens, attention_mask=mask, use_cache=False, logits_to_keep=width - first)
    return out.logits, first
