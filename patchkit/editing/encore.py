"""ENCORE: MEMIT made for many edits in a row (Gupta et al. 2025, arXiv 2502.01636; EMNLP Findings 2025).

Two things wear a model out: targets that are sought long after the fact is said, and updates that grow. So
the search of z stops once the new object is the most probable answer in every context (most-probable early
stopping, the recipe's ``stop_argmax``), and the update's own norm is weighed beside what the weight serves:

    min  λ_p E‖Δ k‖² + λ_n ‖Δ‖² + ‖Δ K_p‖² + ‖Δ K - R‖²,    Δ = R Kᵀ (λ_p C + λ_n I + K_p K_pᵀ + K Kᵀ)⁻¹

with the keys K_p of earlier edits, as in the public code (scalable-model-editing/encore); the patches below
hold them (`sparing`). λ_p is the recipe's ``lambda``, λ_n its ``lambda_norm``.

Differences from the public code: it counts a fact as said by five right tokens, the bare prompt left out,
whatever the target's length; here every token in every context that a step reads has to be the most probable.
There K_p comes from a cache of the process; and it solves a d_in x d_in system for each batch, where here the
factor of λ_p C + λ_n I is kept and systems are of the number of keys.
"""

from __future__ import annotations

from torch import Tensor

from patchkit.editing.mass import Place
from patchkit.editing.solve import solve_keys
from patchkit.editing.sparing import SparingEditor, keys_below

__all__ = ["Encore"]


class Encore(SparingEditor):
    """Mass-editing in long sequences: stops early, weighs its norm (Gupta et al., EMNLP Findings 2025)."""

    name = "encore"

    def terms(self, keys: Tensor, residuals: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Δ = R Kᵀ (λ_p C + λ_n I + K_p K_pᵀ + K Kᵀ)⁻¹: B the residuals, A the solved keys."""
        recipe = place.recipe
        factor = place.statistics.cholesky(place.layer, recipe.lambda_, recipe.lambda_norm)
        return residuals.T, solve_keys(keys, factor, beside=keys_below(place, factor))
