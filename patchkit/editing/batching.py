"""How many facts at once, and which sequences side by side.

Sequences of like length stand together, so that little of what is computed is padding; batches
grow while memory allows and back off when it does not.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from patchkit.errors import BadInput, Unavailable

__all__ = ["FAILURES", "BatchSize", "Budget", "in_batches", "reason_of"]

BatchSize = int | str

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


FAILURES = (BadInput, Unavailable, torch.OutOfMemoryError)
"""What ends one edit, and none of those that are made after it."""


def reason_of(error: Exception) -> str:
    """One of `FAILURES` in words."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the device has too little memory for it"
    return str(error)


def in_batches(order: Sequence[int], budget: Budget, work: Callable[[list[int], Budget], None]) -> None:
    """Do ``work`` for all of ``order``, batch by batch; a batch that runs out of memory is cut in two."""
    start = 0
    while start < len(order):
        batch = list(order[start : start + budget.facts])
        if _fits(work, batch, budget):
            start += len(batch)
            budget = budget.larger()
            _trim()
        else:
            budget = budget.smaller()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _trim() -> None:
    """Hand the heap's free pages back to the system, where glibc is the allocator.

    It keeps what a batch freed, in pieces that the next batch, of other lengths, does not fit into.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


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
