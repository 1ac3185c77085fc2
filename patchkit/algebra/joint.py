"""Patches that were solved apart, solved together: as one batch would have solved them, without C or a model.

A patch holds its keys K, residuals R and solved keys X = (λC + K Kᵀ)⁻¹ K (facts are columns here, and rows
in the code). With G = Kᵀ X, the Woodbury identity gives (λC)⁻¹ K = X (I - G)⁻¹. So each patch gives its
part of P K, P = (λC)⁻¹ and K now all keys, and the batch is X' = P K (I + Kᵀ P K)⁻¹. Each patch keeps its
facts, and its own columns of X'; their sum is what is joint. All in float64.

For emmet, whose A holds scaled C⁻¹k and ΔW k_i = r_i for all facts, the batch is B' = R Γ⁻¹, Γ = Aᵀ K.
For alphaedit, (λI + Σ P k kᵀ P)⁻¹ over the keys of the patches below stands for (λC)⁻¹; for encore
(λ_p C + λ_n I + Σ k kᵀ)⁻¹ over them; for ultraedit (λI)⁻¹.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchkit.algebra.closed_forms import residuals
from patchkit.algebra.factors import Delta, Patch, Solution
from patchkit.algebra.interference import exact_terms_of
from patchkit.canonical import hash_bytes
from patchkit.errors import BadInput
from patchkit.patch import JOINT, KEYS, SQUASH

__all__ = ["solve_jointly"]

_LEAST_SINGULAR_VALUE = 1e-5  # of I - G: below this float32 no longer tells (λC)⁻¹ K
_MOST_ASYMMETRY = 1e-2  # of Kᵀ P K, which is symmetric where all come from one λC

_AS_A_BATCH = ("memit", "emmet", "alphaedit", "encore", "ultraedit")
_SPARING = ("alphaedit", "encore")  # the keys of the patches below are part of what λC is elsewhere
_PLURAL = ("statistics C", "layers")
_SAME = {
    "lambda": "λ",
    "lambda_norm": "lambda_norm",
    "statistics_digest": "statistics C",
    "layers": "layers",
    "nullspace_threshold": "nullspace_threshold",
    "shrinkage": "shrinkage",
}


def solve_jointly(patches: Mapping[str, Patch]) -> dict[str, Patch]:
    """Name -> patch, each solved again as its part of one batch of all facts.

    A patch that was solved on top of another of them wanted its residual beside that one's effect on its
    keys; in a batch it wants both, so the effect is added to its residual. `BadInput` names the first patch
    that cannot take part: without keys, with another λ, C, layers, weights or base than the first, or
    solved together with patches that are not among these any more.
    """
    _refuse_strangers(patches)
    groups = list(_groups(patches))
    order = [name for group in groups for name in group]
    deltas: dict[str, dict[str, Delta]] = {name: {} for name in order}
    for weight in next(iter(patches.values())).deltas:
        R = torch.cat([_wanted(weight, [patches[n] for n in group], patches.values()) for group in groups])
        K = torch.cat([_keys(patches[name], weight) for name in order])
        if patches[order[0]].method == "emmet":
            A = torch.cat([exact_terms_of(patches[name], weight)[0] for name in order])
            B = _equality_batch(K, A, R, order)
        else:
            PK = torch.cat([_before_the_facts(weight, [patches[n] for n in g], g[0]) for g in groups])
            A, B = _batch(K, PK, order), R
        at = 0
        for name in order:
            patch = patches[name]
            end = at + len(patch.facts)
            deltas[name][weight] = Delta(B[at:end].T, A[at:end], transposed=patch.deltas[weight].transposed)
            at = end
    return _marked({name: _again(patches, name, deltas[name]) for name in patches})


def _before_the_facts(weight: str, group: Sequence[Patch], name: str) -> Tensor:
    """Rows of (λC)⁻¹ K = X (I - G)⁻¹ for patches that were solved as one batch, [N, d_in]."""
    K = torch.cat([_keys(patch, weight) for patch in group])
    X = torch.cat([exact_terms_of(patch, weight)[0] for patch in group])
    rest = torch.eye(len(K), dtype=torch.float64) - K @ X.T
    if torch.linalg.svdvals(rest).min() < _LEAST_SINGULAR_VALUE:
        raise BadInput(f"{name}: its facts cannot be told apart by their keys; merge without --joint")
    return torch.linalg.solve(rest.T, X)


def _batch(K: Tensor, PK: Tensor, names: Sequence[str]) -> Tensor:
    """Rows of X' = P K (I + Kᵀ P K)⁻¹ from rows K and P K, both [N, d_in]."""
    inner = K @ PK.T
    asymmetry = torch.linalg.matrix_norm(inner - inner.T) / torch.linalg.matrix_norm(inner).clamp(min=1e-300)
    if asymmetry > _MOST_ASYMMETRY:
        raise BadInput(f"{', '.join(names)}: their factors do not come from one λC; merge without --joint")
    system = torch.eye(len(K), dtype=torch.float64) + (inner + inner.T) / 2
    return torch.linalg.solve(system, PK)


def _keys(patch: Patch, weight: str) -> Tensor:
    assert patch.solution is not None
    return patch.solution.keys[weight].double()


def _wanted(weight: str, group: Sequence[Patch], all_patches: Collection[Patch]) -> Tensor:
    """Residuals [N, d_out] of patches that were solved as one batch, against the weights without any of all
    these patches: what the batch was solved for + Σ ΔW' k over those below."""
    K = torch.cat([_keys(patch, weight) for patch in group])
    terms = [exact_terms_of(patch, weight) for patch in group]
    total = residuals(group[0].method, K, *(torch.cat(rows) for rows in zip(*terms, strict=True)))
    at = 0
    for patch in group:
        rows = slice(at, at := at + len(patch.facts))
        for other in all_patches:
            if other.id in patch.solved_on:
                A, B = exact_terms_of(other, weight)
                total[rows] += K[rows] @ A.T @ B
    return total


def _equality_batch(K: Tensor, A: Tensor, R: Tensor, names: Sequence[str]) -> Tensor:
    """Rows of B' = R Γ⁻¹, Γ = Aᵀ K, so that ΔW k_i = r_i for the facts of all patches."""
    G = K @ A.T
    if torch.linalg.svdvals(G).min() < _LEAST_SINGULAR_VALUE:
        raise BadInput(
            f"{', '.join(names)}: their facts cannot be told apart by their keys; merge without --joint"
        )
    return torch.linalg.solve(G, R)


def _again(patches: Mapping[str, Patch], name: str, deltas: dict[str, Delta]) -> Patch:
    patch = patches[name]
    assert patch.solution is not None
    together = {other.id for other in patches.values()}
    return replace(
        patch,
        deltas=deltas,
        solution=Solution(patch.solution.targets, patch.solution.keys),
        solved_on=tuple(identity for identity in patch.solved_on if identity not in together),
    )


def _marked(patches: Mapping[str, Patch]) -> dict[str, Patch]:
    """The patches, each knowing which were solved with it."""
    hashes = sorted(_keys_hash(patch) for patch in patches.values())
    return {name: replace(patch, recipe={**patch.recipe, JOINT: hashes}) for name, patch in patches.items()}


def _keys_hash(patch: Patch) -> str:
    return hash_bytes(patch.files()[KEYS])


def _groups(patches: Mapping[str, Patch]) -> Iterator[list[str]]:
    """The names, those that were solved together already in one list."""
    together: dict[tuple[str, ...], list[str]] = {}
    for name, patch in patches.items():
        marks = patch.recipe.get(JOINT)
        if not marks:
            yield [name]
        else:
            together.setdefault(tuple(map(str, marks)) if isinstance(marks, list) else (), []).append(name)
    for marks, names in together.items():
        if sorted(_keys_hash(patches[name]) for name in names) != list(marks):
            raise BadInput(
                f"{names[0]}: was solved together with patches that are not as they were then; "
                "merge without --joint"
            )
        yield names


def _refuse_strangers(patches: Mapping[str, Patch]) -> None:
    first_name, first = next(iter(patches.items()))
    for name, patch in patches.items():
        if patch.method not in _AS_A_BATCH and patch.method != SQUASH and patch.solution is not None:
            raise BadInput(
                f"{name}: {patch.method} does not solve facts as a batch, so none is solved together; "
                "merge without --joint"
            )
        if patch.method == SQUASH:
            raise BadInput(f"{name}: is a squash, whose parts were solved apart; merge without --joint")
        if patch.solution is None:
            why = "its keys were not shipped" if patch.left_out else f"{patch.method} keeps no keys"
            raise BadInput(f"{name}: {why}, so it cannot be solved together; merge without --joint")
        if patch.recipe.get("context_weight"):
            raise BadInput(
                f"{name}: its solve weighed how its own facts' keys vary (context_weight), which no patch "
                "holds, so it cannot be solved together; merge without --joint"
            )
        if (other := _difference(first, patch)) is not None:
            raise BadInput(
                f"{name}: was solved with {other} than {first_name}, so the two cannot be solved together; "
                "merge without --joint"
            )


def _difference(one: Patch, other: Patch) -> str | None:
    """What keeps two patches from being of one λC."""
    if one.base != other.base:
        return "another base"
    if one.method != other.method:
        return "another method"
    if one.method in _SPARING and one.solved_on != other.solved_on:
        return "another stack below"
    for field, called in _SAME.items():
        if _plain(one.recipe.get(field)) != _plain(other.recipe.get(field)):
            return f"other {called}" if called in _PLURAL else f"another {called}"
    if {n: d.shape for n, d in one.deltas.items()} != {n: d.shape for n, d in other.deltas.items()}:
        return "other weights"
    return None


def _plain(value: Any) -> Any:
    # A header from before a field was there says nothing of it, and means 0.
    return list(value) if isinstance(value, tuple) else value or None
