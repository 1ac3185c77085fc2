"""Teacher-forced likelihoods: how probable a model holds an object after a prompt.

Batched over prompts of like length; the head runs only at the positions that are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patchkit.evaluation.room import check_room
from patchkit.models.tokens import split_target

__all__ = ["Score", "score_targets"]

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Score:
    """One object after one prompt."""

    log_probability: float
    """Sum over the object's tokens, in nats."""
    tokens: int
    hits: int
    """Tokens of the object that are the most probable ones given those before them."""
    next_token: int
    """The most probable token after the prompt, whatever the object."""

    @property
    def argmax(self) -> bool:
        """Every token of the object is the most probable one given those before it."""
        return self.hits == self.tokens

    @property
    def probability(self) -> float:
        return math.exp(self.log_probability)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood a token, in nats: what CounterFact compares."""
        return -self.log_probability / self.tokens


def score_targets(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Score]:
    """Score each (prompt, object); the object follows the prompt after a space.

    Objects of one prompt share its forward pass wherever one row of tokens holds the other. BadInput names a
    prompt that is longer than the model reads, or an object without tokens.
    """
    split = [split_target(tokenizer, prompt, target) for prompt, target in pairs]
    lengths = (len(prompt) + len(target) - 1 for prompt, target in split)
    check_room(model, zip((prompt for prompt, _ in pairs), lengths, strict=True))
    # Each row predicts its object: all tokens of prompt and object but the last.
    rows, place = _without_prefixes([(*prompt, *target)[:-1] for prompt, target in split])
    readers: list[list[int]] = [[] for _ in rows]
    for pair, row in enumerate(place):
        readers[row].append(pair)
    scores: list[Score | None] = [None] * len(split)
    for batch in _batches([len(row) for row in rows]):
        read = [pair for row in batch for pair in readers[row]]
        logits, first = _logits(
            model, [rows[row] for row in batch], first=min(len(split[pair][0]) - 1 for pair in read)
        )
        for at, row in enumerate(batch):
            for pair in readers[row]:
                prompt, target = split[pair]
                start = len(prompt) - 1 - first
                scores[pair] = _score(logits[at, start : start + len(target)], target)
    return [score for score in scores if score is not None]


def _score(logits: torch.Tensor, target: Sequence[int]) -> Score:
    """``logits`` [target tokens, vocabulary] are those that predict ``target``."""
    logits, ids = logits.float(), torch.tensor(target, device=logits.device)
    log_p = logits.log_softmax(-1).gather(-1, ids[:, None]).sum()
    best = logits.argmax(-1)
    return Score(float(log_p), len(target), int((best == ids).sum()), int(best[0]))


def _without_prefixes(rows: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The rows that are no prefix of another, each once, and for every row the place of one that holds it.

    No token looks ahead, so a row's logits are those of any row that begins with it.
    """
    kept: list[tuple[int, ...]] = []
    place = [0] * len(rows)
    # From the last in dictionary order, so that a row comes right after those that begin with it.
    for i in sorted(range(len(rows)), key=rows.__getitem__, reverse=True):
        if not kept or kept[-1][: len(rows[i])] != rows[i]:
            kept.append(rows[i])
        place[i] = len(kept) - 1
    return kept, place


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


def _logits(model: Any, rows: Sequence[Sequence[int]], first: int) -> tuple[torch.Tensor, int]:
    """Logits from position ``first`` on, [rows, width - first, vocabulary], and ``first``.

    Padded on the right: a causal model's logits at real positions do not see it.
    """
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    with torch.no_grad():
        out = model(input_ids=tokens, attention_mask=mask, use_cache=False, logits_to_keep=width - first)
    return out.logits, first
