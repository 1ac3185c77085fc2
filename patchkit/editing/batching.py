"""How many facts at once, and which sequences side by side.

Sequences of like length stand together, so that little of what is computed is padding; batches
grow while memory allows and back off when it does not.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from patchkit.errors import BadInput, Unavailable

__all__ = ["BatchSize", "Budget", "in_batches", "pack"]

BatchSize = int | str

PADDING = 0.13  # of the real tokens, at most
GROUP_COST = 32  # tokens
_CPU_TOKENS, _CUDA_TOKENS = 256, 8192  # one core's matrix rate is at its best from 128 rows up
_CPU_FACTS, _CUDA_FACTS, _MOST_FACTS = 32, 64, 1024


@dataclass(frozen=True)
class Budget:
    """``facts`` optimised at once, in chunks of about ``tokens`` tokens; ``grows`` after each success."""

    facts: int
    tokens: int
    grows: bool

    @classmethod
    def of(cls, batch_size: BatchSize, device: torch.device) -> Budget:
        """The budget that ``batch_size`` ("auto" or a number of facts) means on ``device``."""
        cuda = device.type == "cuda"
        tokens = _CUDA_TOKENS if cuda else _CPU_TOKENS
        if batch_size == "auto":
            return cls(_CUDA_FACTS if cuda else _CPU_FACTS, tokens, grows=cuda)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise BadInput(f"batch size {batch_size!r}: expected auto or a number of facts from 1 up")
        return cls(batch_size, tokens, grows=False)

    def larger(self) -> Budget:
        return replace(self, facts=min(2 * self.facts, _MOST_FACTS)) if self.grows else self

    def smaller(self) -> Budget:
        """Half of it, and no growing again. Unavailable where one fact at a time is too much already."""
        if self.facts == 1 and self.tokens == 1:
            raise Unavailable("out of memory with one fact at a time; use a larger device, or --device cpu")
        return Budget(max(1, self.facts // 2), max(1, self.tokens // 2), grows=False)


def in_batches(order: Sequence[int], budget: Budget, work: Callable[[list[int], Budget], None]) -> None:
    """Do ``work`` for all of ``order``, batch by batch; a batch that runs out of memory is cut in two."""
    start = 0
    while start < len(order):
        batch = list(order[start : start + budget.facts])
        if _fits(work, batch, budget):
            start += len(batch)
            budget = budget.larger()
        else:
            budget = budget.smaller()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def pack(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Group items so that each group, padded to its longest, has at most ``tokens`` tokens, few of them pads.

    A group costs about as much again as `GROUP_COST` tokens (every weight is read once for it), so
    groups of neighbouring lengths are merged where that pads less, cheapest first, while padding stays
    under `PADDING` of everything. Groups hold places in ``lengths``, shortest first.
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        width = lengths[place]
        fresh = not groups or lengths[groups[-1][-1]] != width or width * (len(groups[-1]) + 1) > tokens
        groups.extend([[]] if fresh else [])
        groups[-1].append(place)
    allowed = PADDING * sum(lengths)
    while len(groups) > 1:
        added, at = min(
            (_added(groups[i], groups[i + 1], lengths, tokens), i) for i in range(len(groups) - 1)
        )
        if added >= min(GROUP_COST, allowed):
            break
        allowed -= added
        groups[at : at + 2] = [groups[at] + groups[at + 1]]
    return groups


def _added(short: list[int], long: list[int], lengths: Sequence[int], tokens: int) -> float:
    """The padding that merging two groups adds; infinite where the result is too large."""
    width = lengths[long[-1]]
    if width * (len(short) + len(long)) > tokens:
        return float("inf")
    return (width - lengths[short[-1]]) * len(short)


def _fits(work: Callable[[list[int], Budget], None], batch: list[int], budget: Budget) -> bool:
    try:
        work(batch, budget)
    except torch.OutOfMemoryError:
        return False
    except RuntimeError as error:
        if "out of memory" not in str(error):  # what MPS raises
            raise
        return False
    return True
