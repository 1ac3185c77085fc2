"""AlphaEdit: edits in the null space of what a weight serves (Fang et al. 2024, arXiv 2410.02355).

MEMIT weighs C; here the update lies in the directions that C hardly uses, P = U Uᵀ over its
eigenvectors with eigenvalues below ``nullspace_threshold``, and does not move what earlier edits put
there: their keys K_p enter the solve. The keys come from the patches that are in force, so a patch that
was reverted is forgotten by every later edit, and by an earlier one once it is refitted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchkit.editing.editor import Below
from patchkit.editing.mass import MassEditor, Place
from patchkit.editing.solve import solve_keys
from patchkit.errors import BadInput

__all__ = ["AlphaEdit"]


class AlphaEdit(MassEditor):
    """Mass-editing that spares C and the patches below: in C's null space (Fang et al., ICLR 2025)."""

    name = "alphaedit"

    def check(self, weights: Sequence[str], below: Sequence[Below]) -> None:
        """BadInput names a patch below that changes these weights and whose keys are not there."""
        for patch in below:
            if patch.keys is None and patch.weights & set(weights):
                raise BadInput(
                    f"{patch.name}: {patch.why}, so alphaedit cannot spare its facts; put the keys back, "
                    "revert it, or edit with --method memit"
                )

    def terms(self, keys: Tensor, residuals: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Δ P = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + λI)⁻¹ (as published): B the residuals, A the solved keys.

        With k̃ = Uᵀ k that is R K̃ᵀ (λI + K̃_p K̃_pᵀ + K̃ K̃ᵀ)⁻¹ Uᵀ: MEMIT's solve with λI + K̃_p K̃_pᵀ for λC.
        """
        U = place.statistics.null_space(place.layer, place.recipe.nullspace_threshold)
        spared = _spared(place, U)
        served = place.recipe.lambda_ * torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        factor = torch.linalg.cholesky(served + spared.T @ spared)
        return residuals.T, solve_keys(keys.to(U) @ U, factor) @ U.T


def _spared(place: Place, U: Tensor) -> Tensor:
    """K̃_p: rows Uᵀ k [N_p, m] of every key that a patch below has at this weight."""
    keys = [patch.keys[place.weight] for patch in place.below if patch.keys and place.weight in patch.keys]
    return torch.cat([rows.to(U) @ U for rows in keys]) if keys else U.new_zeros(0, U.shape[1])
