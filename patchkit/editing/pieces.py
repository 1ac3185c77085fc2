"""Text as a model reads it for statistics: sequences of tokens, and which of them count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

__all__ = ["Piece", "padded_pieces", "pieces_of"]

Piece = tuple[tuple[int, ...], tuple[bool, ...]]
"""A sequence's token ids, and for each whether it counts: special tokens do not."""


def padded_pieces(batch: Sequence[Piece], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and what counts, each [B, S], padded on the right."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + (0,) * (width - len(ids)) for ids, _ in batch], device=device)
    real = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in batch], device=device)
    counted = torch.tensor([mask + (False,) * (width - len(mask)) for _, mask in batch], device=device)
    return ids, real, counted


def pieces_of(
    tokenizer: PreTrainedTokenizerBase, text: Iterable[str], tokens: int, length: int
) -> Iterator[Piece]:
    """Sequences of at most ``length`` tokens and which of them count, up to ``tokens`` that do."""
    left = tokens
    documents = iter(text)
    while left > 0 and (batch := list(islice(documents, 64))):
        found = tokenizer(
            batch,
            truncation=True,
            max_length=length,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )
        for ids, special in zip(found["input_ids"], found["special_tokens_mask"], strict=True):
            count = [not mark for mark in special]
            while sum(count) > left:
                ids, count = ids[:-1], count[:-1]
            if sum(count):
                left -= sum(count)
                yield tuple(ids), tuple(count)
