"""EMMET: equality-constrained mass-editing (Gupta, Sajnani and Anumanchipalli 2024, arXiv 2403.14236).

MEMIT weighs new facts against what a weight serves; here the new facts are constraints, met exactly
by each layer for its share of the residual, and what the weight serves is changed as little as that
allows. The published code adds a ridge α to KᵀC⁻¹K, which makes it MEMIT with λ = α times the weight of C
there; patchkit solves the paper's equation, and says so where facts are too alike for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchkit.editing.mass import MassEditor, Place
from patchkit.editing.solve import scaled_inverse_keys
from patchkit.errors import BadInput

__all__ = ["Emmet"]

_LEAST_SINGULAR_VALUE = 1e-5  # of Γ, whose diagonal is 1: below it float32 factors do not hold the solution


class Emmet(MassEditor):
    """Mass-editing with the new facts as equalities, not weights (Gupta et al., EMNLP Findings 2024)."""

    name = "emmet"

    def terms(self, keys: Tensor, residuals: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """ΔW = R (Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹ (the paper's closed form for equality constraints).

        Written as B A with rows a_i = C⁻¹k_i / (k_iᵀ C⁻¹ k_i) of A, and B = R Γ⁻¹, Γ = Aᵀ K (columns here):
        the same product, from which facts can be taken out again (`closed_forms`).
        """
        A = scaled_inverse_keys(keys, place.statistics.cholesky(place.layer, 1.0))
        G = keys.to(A) @ A.T
        if not float(torch.linalg.svdvals(G).min()) > _LEAST_SINGULAR_VALUE:
            raise BadInput(
                f"layer {place.layer}: the keys of these facts are too alike to meet all of them exactly; "
                "leave out facts on one subject, or use --method memit"
            )
        return torch.linalg.solve(G, residuals.to(A)).T, A
