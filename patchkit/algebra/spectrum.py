"""Singular values and spaces of a sum of updates, from the factors: how large it is, how alike two are.

With Σ ± B A = L R for the joined factors L [d_out, k] and R [k, d_in], L = P S and Rᵀ = Q T (reduced QR), so
Σ ± B A = P (S Tᵀ) Qᵀ, and the small core S Tᵀ has its singular values. Nothing of the size d_out x d_in is
made unless a patch holds its update in that form. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patchkit.algebra.factors import Delta

__all__ = ["Sum", "cosine", "principal_angles", "sum_of"]


@dataclass(frozen=True, eq=False)
class Sum:
    """Σ ± ΔW of one weight as left · core · rightᵀ.

    ``left`` [d_out, m] and ``right`` [d_in, n] have orthonormal columns (None: the identity), ``core`` is
    [m, n]. Singular values under ``floor`` are those of rounding, not of the sum.
    """

    left: Tensor | None
    core: Tensor
    right: Tensor | None
    floor: float

    @property
    def norm(self) -> float:
        """Frobenius; without singular values."""
        return float(torch.linalg.matrix_norm(self.core)) if self.core.numel() else 0.0

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        U, values, Vh = torch.linalg.svd(self.core, full_matrices=False)
        kept = int((values > self.floor).sum())
        return U[:, :kept], values[:kept], Vh[:kept].T

    @property
    def singular_values(self) -> Tensor:
        """[rank], largest first; none of a zero sum."""
        return self._svd[1]

    @property
    def output_space(self) -> Tensor:
        """Left singular vectors [d_out, rank]: the directions that the weight writes."""
        U = self._svd[0]
        return U if self.left is None else self.left @ U

    @property
    def input_space(self) -> Tensor:
        """Right singular vectors [d_in, rank]: the keys that it answers to."""
        V = self._svd[2]
        return V if self.right is None else self.right @ V

    @property
    def spectral_norm(self) -> float:
        """The largest singular value σ₁."""
        values = self.singular_values
        return float(values[0]) if len(values) else 0.0

    @property
    def effective_rank(self) -> float:
        """exp(−Σ p log p) with p = σ / Σ σ (Roy & Vetterli 2007, The effective rank); 0 of a zero sum."""
        values = self.singular_values
        if not len(values):
            return 0.0
        p = values / values.sum()
        return math.exp(-float((p * p.log()).sum()))

    @property
    def stable_rank(self) -> float:
        """Σ σ² / σ₁² (Rudelson & Vershynin 2007); 0 of a zero sum."""
        return (self.norm / self.spectral_norm) ** 2 if self.spectral_norm else 0.0


def sum_of(terms: Sequence[tuple[int, Delta]], shape: tuple[int, int]) -> Sum:
    """Σ sign · ΔW over (sign, ΔW) of one weight of ``shape`` (d_out, d_in)."""
    if any(delta.dense is not None for _, delta in terms):
        return _dense_sum(terms, shape)
    d_out, d_in = shape
    empty = torch.zeros(0, dtype=torch.float64)
    B = torch.cat(
        [empty.reshape(d_out, 0), *(sign * d.B.double() for sign, d in terms if d.B is not None)], 1
    )
    A = torch.cat([empty.reshape(0, d_in), *(d.A.double() for _, d in terms if d.A is not None)])
    left, S = torch.linalg.qr(B)
    right, T = torch.linalg.qr(A.T)
    largest = float(torch.linalg.matrix_norm(S) * torch.linalg.matrix_norm(T)) if S.numel() else 0.0
    return Sum(left, S @ T.T, right, _floor(shape, largest))


def _dense_sum(terms: Sequence[tuple[int, Delta]], shape: tuple[int, int]) -> Sum:
    """Where one update is stored multiplied out, the sum is of that size anyway."""
    total, largest = torch.zeros(shape, dtype=torch.float64), 0.0
    for sign, delta in terms:
        if delta.B is not None and delta.A is not None:
            total.addmm_(delta.B.double(), delta.A.double(), alpha=sign)
        elif delta.dense is not None:
            total.add_(delta.dense.double(), alpha=sign)
        largest += delta.norm()
    return Sum(None, total, None, _floor(shape, largest))


def _floor(shape: tuple[int, int], largest: float) -> float:
    return max(shape) * torch.finfo(torch.float64).eps * largest


def cosine(one: Sum, other: Sum) -> float | None:
    """⟨X, Y⟩ / (‖X‖ ‖Y‖) of two sums as long vectors, from their singular triples; None where one is zero."""
    if not len(one.singular_values) or not len(other.singular_values):
        return None
    outer = one.output_space.T @ other.output_space
    inner = one.input_space.T @ other.input_space
    product = one.singular_values @ (outer * inner) @ other.singular_values
    return max(-1.0, min(1.0, float(product) / (one.norm * other.norm)))


def principal_angles(X: Tensor, Y: Tensor) -> list[float]:
    """The angles between two spaces in degrees, smallest first, one for each dimension of the smaller.

    X [n, p] and Y [n, q] have orthonormal columns. Cosines are the singular values of XᵀY; below 45 degrees,
    where a cosine tells little, sines are taken: those of Y − X XᵀY (Björck & Golub 1973).
    """
    if X.shape[1] < Y.shape[1]:
        X, Y = Y, X
    if not Y.shape[1]:
        return []
    product = X.T @ Y
    cosines = torch.linalg.svdvals(product).clamp(0, 1)
    sines = torch.linalg.svdvals(Y - X @ product).flip(0).clamp(0, 1)
    angles = torch.where(cosines > math.sqrt(0.5), sines.asin(), cosines.acos())
    return sorted(torch.rad2deg(angles).tolist())
