"""MEMIT: mass-editing memory in a transformer (Meng et al. 2022, arXiv 2210.07229)."""

from __future__ import annotations

from torch import Tensor

from patchkit.editing.mass import MassEditor, Place
from patchkit.editing.solve import enlarged, solve_keys

__all__ = ["Memit"]


class Memit(MassEditor):
    """Mass-editing: many facts at once, spread over several layers (Meng et al., ICLR 2023)."""

    name = "memit"

    def terms(self, keys: Tensor, residuals: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """ΔW = R Kᵀ (λC + ωV + K Kᵀ)⁻¹ (eq. 14), C shrunk: B the residuals, A the solved keys.

        With ω = ``context_weight`` and V how keys vary (`Reader.keys_and_variation`): at ω = 1 it is eq. 14
        with a column √w_t k_t, and the fact's residual times √w_t, for each context, not one for their mean.
        """
        recipe = place.recipe
        factor = place.statistics.cholesky(place.layer, recipe.lambda_, shrinkage=recipe.shrinkage)
        if place.variation is not None:
            factor = enlarged(factor, recipe.context_weight * place.variation)
        return residuals.T, solve_keys(keys, factor)
