"""AlphaEdit: edits in the null space of what a weight serves (Fang et al. 2024, arXiv 2410.02355).

MEMIT weighs C; here the update lies in the directions that C hardly uses, P = U Uᵀ over its
eigenvectors with eigenvalues below ``nullspace_threshold``, and does not move what earlier edits put
there: their keys K_p enter the solve (`sparing`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchkit.editing.mass import Place
from patchkit.editing.solve import solve_keys
from patchkit.editing.sparing import SparingEditor, keys_below

__all__ = ["AlphaEdit"]


class AlphaEdit(SparingEditor):
    """Mass-editing that spares C and the patches below: in C's null space (Fang et al., ICLR 2025)."""

    name = "alphaedit"

    def terms(self, keys: Tensor, residuals: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Δ P = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + λI)⁻¹ (as published): B the residuals, A the solved keys.

        With k̃ = Uᵀ k that is R K̃ᵀ (λI + K̃_p K̃_pᵀ + K̃ K̃ᵀ)⁻¹ Uᵀ: MEMIT's solve with λI + K̃_p K̃_pᵀ for λC.
        """
        U = place.statistics.null_space(place.layer, place.recipe.nullspace_threshold)
        spared = keys_below(place, U.T) @ U
        served = place.recipe.lambda_ * torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        factor = torch.linalg.cholesky(served + spared.T @ spared)
        return residuals.T, solve_keys(keys.to(U) @ U, factor) @ U.T
