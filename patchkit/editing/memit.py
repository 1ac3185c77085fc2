"""MEMIT: mass-editing memory in a transformer (Meng et al. 2022, arXiv 2210.07229)."""

from __future__ import annotations

from torch import Tensor

from patchkit.editing.mass import MassEditor, Place
from patchkit.editing.solve import solve_keys

__all__ = ["Memit"]


class Memit(MassEditor):
    """Mass-editing: many facts at once, spread over several layers (Meng et al., ICLR 2023)."""

    name = "memit"

    def terms(self, keys: Tensor, residuals: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """ΔW = R Kᵀ (λC + K Kᵀ)⁻¹ (eq. 14), C shrunk: B the residuals, A the solved keys."""
        recipe = place.recipe
        factor = place.statistics.cholesky(place.layer, recipe.lambda_, shrinkage=recipe.shrinkage)
        return residuals.T, solve_keys(keys, factor)
