"""The smallest update of each layer: MEMIT's algorithm with the identity where it has C.

What the weight serves is not looked at, only how much it changes. It takes, and moves more of what it should
leave alone than MEMIT does, which is what C is for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchkit.editing.mass import MassEditor, Place

__all__ = ["Plain"]


class Plain(MassEditor):
    """Mass-editing with the smallest update: the identity stands where MEMIT has C."""

    name = "plain"
    facts_leave = "ridge"  # the form of MEMIT: A holds (M + K Kᵀ)⁻¹ K for an M that no fact is part of

    def terms(self, keys: Tensor, residuals: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """ΔW = R Kᵀ (λI + K Kᵀ)⁻¹ = R (λI + Kᵀ K)⁻¹ Kᵀ, in float64; keys [N, d_in], residuals [N, d_out]."""
        K = keys.double()
        system = place.recipe.lambda_ * torch.eye(len(K), dtype=K.dtype, device=K.device) + K @ K.T
        return residuals.T, torch.linalg.solve(system, K)
