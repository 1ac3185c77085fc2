"""All updates of a weight as one pair of factors: exact where that is possible, else of least error.

Σ ΔW = B A. Patches that hold factors are put side by side, which is exact. Where the terms are more than
a rank allows, or an update is stored multiplied out, the singular value decomposition gives the best pair
of that rank (Eckart & Young 1936), from QR of the factors and never from a matrix of the weight's size
unless a patch holds one. Everything is computed in float64 and rounded once to float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchkit.algebra.factors import Delta
from patchkit.algebra.spectrum import Sum, sum_of
from patchkit.errors import BadInput

__all__ = ["Factors", "factorise", "one_rank"]


@dataclass(frozen=True, eq=False)
class Factors:
    """Σ ΔW of one weight, up to ``error``: B [d_out, r] and A [r, d_in], float32 on the CPU.

    ``rank``: terms before padding. ``norm``: ‖Σ ΔW‖ (Frobenius). ``error``: ‖Σ ΔW − B A‖ / ‖Σ ΔW‖ of what
    was left out, 0.0 where nothing was. ``transposed``: the checkpoint stores the weight as [d_in, d_out].
    """

    B: Tensor
    A: Tensor
    rank: int
    norm: float
    error: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.B.shape[0], self.A.shape[1]

    def padded(self, rank: int) -> Factors:
        """The same product with columns of B and rows of A that are zero, up to ``rank`` terms."""
        more = rank - self.B.shape[1]
        B = torch.nn.functional.pad(self.B, (0, more))
        A = torch.nn.functional.pad(self.A, (0, 0, 0, more))
        return Factors(B, A, self.rank, self.norm, self.error, self.transposed)


def factorise(deltas: Mapping[str, Sequence[Delta]], max_rank: int | None = None) -> dict[str, Factors]:
    """The factors of each weight's Σ ΔW, of rank ``max_rank`` at the most.

    `BadInput` where two updates of a weight do not agree on its shape or way of storing.
    """
    return {name: _factors(name, updates, max_rank) for name, updates in deltas.items()}


def one_rank(factors: Mapping[str, Factors], rank: int) -> dict[str, Factors]:
    """All of them with ``rank`` terms: what every runtime scales alike."""
    return {name: pair.padded(rank) for name, pair in factors.items()}


def _factors(name: str, deltas: Sequence[Delta], max_rank: int | None) -> Factors:
    if len({(delta.shape, delta.transposed) for delta in deltas}) > 1:
        raise BadInput(f"{name}: the patches do not agree on its shape; they cannot be shipped together")
    shape, transposed = deltas[0].shape, deltas[0].transposed
    most = min(*shape, max_rank if max_rank is not None else math.inf)
    total = sum_of([(1, delta) for delta in deltas], shape)
    factored = [(d.B, d.A) for d in deltas if d.B is not None and d.A is not None]
    if len(factored) == len(deltas) and sum(B.shape[1] for B, _ in factored) <= most:
        B = torch.cat([B for B, _ in factored], 1)
        A = torch.cat([A for _, A in factored])
        return Factors(B, A, B.shape[1], total.norm, 0.0, transposed)
    B, A, error = best_of_rank(total, int(most))
    return Factors(B, A, B.shape[1], total.norm, error, transposed)


def best_of_rank(total: Sum, rank: int) -> tuple[Tensor, Tensor, float]:
    """U √σ and √σ Vᵀ of the ``rank`` largest singular values, and √(Σ left-out σ²) / ‖·‖.

    Both factors carry √σ, so that neither is much smaller than the other in a half-precision runtime.
    """
    values = total.singular_values
    kept = max(1, min(rank, len(values)))
    if not len(values):  # a sum of zero still needs a term to be shipped
        U, V = total.output_space, total.input_space
        return U.new_zeros(U.shape[0], 1).float(), V.new_zeros(1, V.shape[0]).float(), 0.0
    root = values[:kept].sqrt()
    B = (total.output_space[:, :kept] * root).float().contiguous()
    A = (root[:, None] * total.input_space[:, :kept].T).float().contiguous()
    left_out = float(values[kept:].norm())
    return B, A, left_out / total.norm
