"""What a method's stored terms say: what each fact asked for, and how facts leave, without C or a model.

ΔW = Σ over facts of b_i a_iᵀ, with the keys k_i stored beside. Facts are rows here: K, A [N, d_in] and
B [N, d_out], float64. Which closed form holds depends on how the method solved:

- ridge (memit, alphaedit, encore, ultraedit): B holds the residuals, A the solved keys (M₀ + K Kᵀ)⁻¹ K;
- equality (emmet): A holds C⁻¹k, scaled so that a_i·k_i = 1, and B is such that ΔW k_i = r_i for all i;
- sequence (rome): the same A, and b_i is what fact i still missed when its turn came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch
from torch import Tensor

from patchkit.errors import BadInput, Unavailable

__all__ = ["form_of", "residuals", "without"]

Terms = tuple[Tensor, Tensor]  # A and B

_EDITORS = "patchkit.editors"  # the entry point group of editors

_LEAST_SINGULAR_VALUE = 1e-5  # float32 keeps 6e-8: below this, less than two digits of the answer are left


def form_of(method: str) -> str | None:
    """The closed form by which facts leave what this method solved; None where none is known.

    An editor of another package names its own in ``facts_leave``.
    """
    if method in _OF:
        return _OF[method]
    named = next((_named(point) for point in entry_points(group=_EDITORS, name=method)), None)
    if named is not None and named not in _WITHOUT:
        raise BadInput(f"editor {method!r}: facts_leave is {named!r}; there are {', '.join(_WITHOUT)}")
    return named


def residuals(method: str, K: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """What the weight was to give each fact's key more than before, [N, d_out].

    Where that is an equality ΔW k_i, which the solution gives exactly; else the columns of B themselves.
    """
    return K @ A.T @ B if form_of(method) == "equality" else B


def without(
    form: str, K: Tensor, A: Tensor, B: Tensor, kept: Sequence[int], dropped: Sequence[int]
) -> Terms | None:
    """A and B of the facts ``kept``, as if those ``dropped`` had never been solved for.

    What the facts that stay were to reach is held. None where that is a system so close to singular
    that terms stored in float32 no longer determine the answer.
    """
    return _WITHOUT[form](K, A, B, list(kept), list(dropped))


def _named(point: EntryPoint) -> Any:
    try:
        return getattr(point.load(), "facts_leave", None)
    except (ImportError, AttributeError) as error:
        raise Unavailable(
            f"editor {point.name!r} cannot be loaded ({error}); install its package again"
        ) from error


def _ridge(K: Tensor, A: Tensor, B: Tensor, kept: list[int], dropped: list[int]) -> Terms | None:
    """X' = X_S + X_J (I - G_JJ)⁻¹ G_JS with G = Kᵀ X (Sherman-Morrison-Woodbury for the columns taken
    from K); residuals stay."""
    G_JJ, G_JS = K[dropped] @ A[dropped].T, K[dropped] @ A[kept].T
    solved = _solve(torch.eye(len(dropped), dtype=K.dtype) - G_JJ, G_JS)
    return None if solved is None else (A[kept] + solved.T @ A[dropped], B[kept])


def _equality(K: Tensor, A: Tensor, B: Tensor, kept: list[int], dropped: list[int]) -> Terms | None:
    """B' = R_S Γ_SS⁻¹ with Γ = Aᵀ K, R = B Γ; a fact's own row of A knows nothing of the others."""
    G = K @ A.T
    wanted = (G @ B)[kept]
    solved = _solve(G[kept][:, kept], wanted)
    return None if solved is None else (A[kept], solved)


def _sequence(K: Tensor, A: Tensor, B: Tensor, kept: list[int], dropped: list[int]) -> Terms | None:
    """B' = V_S T_SS⁻¹ with T the upper triangle of Γ = Aᵀ K and V = B T: what each fact missed before any
    of them was there, less what those before it that stay give its key."""
    G = K @ A.T  # row i: what each a_j gives the key of fact i, which met those before it; a_i·k_i = 1
    T = G.tril(-1) + torch.eye(len(G), dtype=G.dtype)
    missed = (T @ B)[kept]
    rows = torch.linalg.solve_triangular(T[kept][:, kept], missed, upper=False, unitriangular=True)
    return A[kept], rows


def _solve(system: Tensor, right: Tensor) -> Tensor | None:
    if torch.linalg.svdvals(system).min() < _LEAST_SINGULAR_VALUE:
        return None
    return torch.linalg.solve(system, right)


_WITHOUT: dict[str, Callable[[Tensor, Tensor, Tensor, list[int], list[int]], Terms | None]] = {
    "ridge": _ridge,
    "equality": _equality,
    "sequence": _sequence,
}
_OF = {
    **dict.fromkeys(("memit", "alphaedit", "encore", "ultraedit"), "ridge"),
    "emmet": "equality",
    "rome": "sequence",
}
