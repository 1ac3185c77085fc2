"""Two stacks compared: their facts by key, and the difference of their weights by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchkit.errors import NotFound
from patchkit.factors import Delta, Patch
from patchkit.facts import Fact

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["Difference", "WeightDifference", "diff", "difference_of"]

BASE = "base"
"""The name of the stack that holds nothing."""


@dataclass(frozen=True)
class WeightDifference:
    """ΔW_B − ΔW_A of one weight: its Frobenius norm, and the number of terms that make it up."""

    name: str
    rank: int
    norm: float


@dataclass(frozen=True)
class Difference:
    """What changes from stack ``old`` to stack ``new``; facts with the patch they belong to."""

    old: str
    new: str
    added: list[tuple[Fact, str]]
    removed: list[tuple[Fact, str]]
    changed: list[tuple[Fact, Fact, str]]
    weights: list[WeightDifference]

    def to_dict(self) -> dict[str, Any]:
        def plain(fact: Fact, patch: str) -> dict[str, str]:
            return {"patch": patch, "subject": fact.subject, "prompt": fact.prompt, "target": fact.target}

        return {
            "old": self.old,
            "new": self.new,
            "added": [plain(*pair) for pair in self.added],
            "removed": [plain(*pair) for pair in self.removed],
            "changed": [
                {**plain(new, patch), "target_before": old.target} for old, new, patch in self.changed
            ],
            "weights": [vars(weight) for weight in self.weights],
        }


def diff(repository: Repository, old: str | None = None, new: str | None = None) -> Difference:
    """Compare the stacks at two commits; "base" is the empty stack, ``old`` defaults to HEAD's parent."""
    new = new or "HEAD"
    old = old or _parent(repository, "HEAD")
    before, before_facts = _read(repository, old)
    after, after_facts = _read(repository, new)
    both = before_facts.keys() & after_facts.keys()
    return Difference(
        old=old,
        new=new,
        added=[(fact, patch) for key, (patch, fact) in after_facts.items() if key not in both],
        removed=[(fact, patch) for key, (patch, fact) in before_facts.items() if key not in both],
        changed=[
            (before_facts[key][1], fact, patch)
            for key, (patch, fact) in after_facts.items()
            if key in both and before_facts[key][1].target != fact.target
        ],
        weights=difference_of(before, after),
    )


def difference_of(old: Mapping[str, Patch], new: Mapping[str, Patch]) -> list[WeightDifference]:
    """By weight, from the factors: a patch in both stacks cancels, one that left counts negatively."""
    left = [patch for patch_id, patch in old.items() if patch_id not in new]
    came = [patch for patch_id, patch in new.items() if patch_id not in old]
    names = sorted({name for patch in [*left, *came] for name in patch.deltas})
    return [_weight(name, _deltas(left, name), _deltas(came, name)) for name in names]


def _deltas(patches: Iterable[Patch], name: str) -> list[Delta]:
    return [patch.deltas[name] for patch in patches if name in patch.deltas]


def _weight(name: str, left: list[Delta], came: list[Delta]) -> WeightDifference:
    """Factors are joined, B = [B_new, −B_old] and A stacked; a dense update joins as itself times 1."""
    B = torch.cat([*(_left(d) for d in came), *(-_left(d) for d in left)], dim=1)
    A = torch.cat([_right(d) for d in [*came, *left]])
    joined = Delta(B=B, A=A)
    return WeightDifference(name, min(joined.rank, *joined.shape), joined.norm())


def _left(delta: Delta) -> Tensor:
    if delta.B is not None:
        return delta.B
    assert delta.dense is not None
    return delta.dense


def _right(delta: Delta) -> Tensor:
    if delta.A is not None:
        return delta.A
    assert delta.dense is not None
    return torch.eye(delta.dense.shape[1])


def _read(repository: Repository, revision: str) -> tuple[dict[str, Patch], dict[Any, tuple[str, Fact]]]:
    if revision == BASE:
        return {}, {}
    stack = repository.stack(revision)
    return repository.patches(stack), dict(stack.facts_in_force())


def _parent(repository: Repository, revision: str) -> str:
    try:
        return repository.store.resolve(f"{revision}~1")[:10]
    except NotFound:
        return BASE
