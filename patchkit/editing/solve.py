"""Keys and residuals to factors: Δ = R Kᵀ (λC + K Kᵀ)⁻¹ (MEMIT eq. 14), in float64, never dense.

With P = (λC)⁻¹ the Woodbury identity leaves N x N systems for N facts:
(λC + K Kᵀ)⁻¹ K = P K (I + Kᵀ P K)⁻¹. λC is factored once for a model and layer. Of more keys than d_in the
system is the d_in x d_in one itself, so memory is bounded whatever their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchkit.errors import BadInput

__all__ = ["enlarged", "exact_device", "scaled_inverse_keys", "solve_keys"]


def exact_device(device: torch.device) -> torch.device:
    """Where float64 runs: ``device`` itself, or the CPU where the device has none."""
    return torch.device("cpu") if device.type == "mps" else device


def solve_keys(keys: Tensor, factor: Tensor, beside: Tensor | None = None) -> Tensor:
    """The solved keys A [N, d_in] float64, one row a fact: ΔW = Rᵀ A for residuals R [N, d_out].

    ``keys`` [N, d_in]; ``factor`` [d_in, d_in] is the lower Cholesky factor of λC, float64. Rows of
    ``beside`` [N_p, d_in] are keys K_p for which ΔW should give nothing: (λC + K_p K_pᵀ + K Kᵀ)⁻¹ K. BadInput
    where the system cannot be solved.
    """
    own = keys.to(factor.device, torch.float64)
    spared = own.new_zeros(0, len(factor)) if beside is None else beside.to(own)
    K = torch.cat([spared, own]).T
    if K.shape[1] > len(factor):  # the larger of the two systems is not made
        return torch.cholesky_solve(own.T, _lower(factor @ factor.T + K @ K.T)).T
    PK = torch.cholesky_solve(K, factor)
    identity = torch.eye(K.shape[1], dtype=K.dtype, device=K.device)
    return torch.cholesky_solve(PK.T, _lower(identity + K.T @ PK))[len(spared) :]


def enlarged(factor: Tensor, more: Tensor) -> Tensor:
    """The lower factor of L Lᵀ + ``more`` [d_in, d_in], float64, L being ``factor``."""
    return _lower(factor @ factor.T + more.to(factor))


def _lower(system: Tensor) -> Tensor:
    """The Cholesky factor of a symmetric system; BadInput where it is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex((system + system.T) / 2)
    if failed.item() or not factor.isfinite().all():
        raise BadInput(
            "the keys of these facts cannot be solved for; raise lambda, or leave out facts on one subject"
        )
    return factor


def scaled_inverse_keys(keys: Tensor, factor: Tensor, at: Tensor | None = None) -> Tensor:
    """Rows C⁻¹k / (k'ᵀ C⁻¹ k) [N, d_in] float64, for rows k of ``keys`` and k' of ``at`` (k' = k by default).

    So the row of a fact gives 1 for its own k' (ROME eq. 2). ``factor`` [d_in, d_in] is the lower Cholesky
    factor of C, or of a multiple of it, which cancels. BadInput where a key is zero.
    """
    K = keys.to(factor.device, torch.float64)
    inverse = torch.cholesky_solve(K.T, factor).T
    length = ((K if at is None else at.to(K)) * inverse).sum(1, keepdim=True)
    if not bool((length.abs() > 0).all()):
        raise BadInput(
            "the key of a fact is zero: its subject reaches this layer as nothing; edit another layer"
        )
    return inverse / length
