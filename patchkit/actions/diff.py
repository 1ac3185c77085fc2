"""Two stacks compared: their facts by key, and the difference of their weights by layer.

What the two models say is compared in `actions.behaviour`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from patchkit.algebra.factors import Delta, Patch
from patchkit.algebra.spectrum import Sum, cosine, principal_angles, sum_of
from patchkit.errors import BadInput, NotFound, PatchkitError
from patchkit.facts import Fact, Key, altered

if TYPE_CHECKING:
    from patchkit.actions.behaviour import Behaviour
    from patchkit.repository import Repository

__all__ = ["BASE", "Difference", "Measures", "Superseded", "WeightDifference", "diff", "difference_of"]

BASE = "base"
"""The name of the stack that holds nothing."""


@dataclass(frozen=True)
class Measures:
    """The difference ΔW_B − ΔW_A of one weight, and how alike ΔW_A and ΔW_B are; all from the factors.

    ``relative``: the norm over that of the base's weight, None where that is not known on this machine.
    ``effective_rank`` and ``stable_rank``: see `spectrum.Sum`. ``cosine`` and the principal angles in degrees
    (of the spaces that ΔW_A and ΔW_B write to and read from): None and empty where one of the two is zero.
    """

    relative: float | None
    spectral_norm: float
    effective_rank: float
    stable_rank: float
    singular_values: tuple[float, ...]
    cosine: float | None
    output_angles: tuple[float, ...]
    input_angles: tuple[float, ...]


@dataclass(frozen=True)
class WeightDifference:
    """ΔW_B − ΔW_A of one weight: its Frobenius norm, and the number of terms that make it up."""

    name: str
    rank: int
    norm: float
    measures: Measures | None = None

    def to_dict(self) -> dict[str, Any]:
        plain = {"name": self.name, "rank": self.rank, "norm": self.norm}
        return plain if self.measures is None else {**plain, **asdict(self.measures)}


@dataclass(frozen=True)
class Superseded:
    """A key that one patch held before and another patch holds now."""

    before: Fact
    after: Fact
    old_patch: str
    new_patch: str


@dataclass(frozen=True)
class Difference:
    """What changes from stack ``old`` to stack ``new``; facts with the patch they belong to.

    ``changed``: the same patch says otherwise of the key; ``superseded``: another patch holds it.
    """

    old: str
    new: str
    added: list[tuple[Fact, str]]
    removed: list[tuple[Fact, str]]
    changed: list[tuple[Fact, Fact, str]]
    superseded: list[Superseded]
    weights: list[WeightDifference]
    behaviour: Behaviour | None = None
    commits: tuple[str | None, str | None] = (None, None)
    """What ``old`` and ``new`` name; None of the base."""

    def to_dict(self) -> dict[str, Any]:
        found = {
            "old": self.old,
            "new": self.new,
            "old_commit": self.commits[0],
            "new_commit": self.commits[1],
            "added": [_plain(*pair) for pair in self.added],
            "removed": [_plain(*pair) for pair in self.removed],
            "changed": [{**_plain(new, patch), **_before(old, new)} for old, new, patch in self.changed],
            "superseded": [
                {
                    **_plain(item.after, item.new_patch),
                    **_before(item.before, item.after),
                    "patch_before": item.old_patch,
                }
                for item in self.superseded
            ],
            "weights": [weight.to_dict() for weight in self.weights],
        }
        return found if self.behaviour is None else {**found, "behaviour": self.behaviour.to_dict()}


def _plain(fact: Fact, patch: str) -> dict[str, str]:
    return {"patch": patch, "subject": fact.subject, "prompt": fact.prompt, "target": fact.target}


def _before(old: Fact, new: Fact) -> dict[str, Any]:
    return {"prompt_before": old.prompt, "target_before": old.target, "altered": altered(old, new)}


def diff(
    repository: Repository,
    old: str | None = None,
    new: str | None = None,
    *,
    measure: bool = False,
    behaviour: Mapping[str, Any] | None = None,
) -> Difference:
    """Compare the stacks at two commits; "base" is the empty stack, ``old`` defaults to HEAD's parent.

    ``measure``: also `Measures` of each weight. ``behaviour``: options of `behaviour.compare_models`, where
    the two models are to be asked too.
    """
    new = new or "HEAD"
    old = old or _parent(repository, "HEAD")
    before, before_facts = _read(repository, old)
    after, after_facts = _read(repository, new)
    found = replace(
        _facts(before_facts, after_facts, old, new),
        weights=difference_of(before, after, measure=measure),
        commits=(_commit(repository, old), _commit(repository, new)),
    )
    bases = {patch.base for patch in (*before.values(), *after.values())}
    if measure and bases <= {repository.settings.base_fingerprint}:
        found = replace(found, weights=_related(repository, found.weights))
    if behaviour is not None:
        from patchkit.actions.behaviour import compare_models

        found = replace(found, behaviour=compare_models(repository, before, after, found, **behaviour))
    return found


def _facts(
    before: Mapping[Key, tuple[str, Fact]], after: Mapping[Key, tuple[str, Fact]], old: str, new: str
) -> Difference:
    changed: list[tuple[Fact, Fact, str]] = []
    superseded: list[Superseded] = []
    for key in after.keys() & before.keys():
        (old_patch, was), (new_patch, now) = before[key], after[key]
        if old_patch != new_patch:
            superseded.append(Superseded(was, now, old_patch, new_patch))
        elif was != now:
            changed.append((was, now, new_patch))
    return Difference(
        old=old,
        new=new,
        added=[(fact, patch) for key, (patch, fact) in after.items() if key not in before],
        removed=[(fact, patch) for key, (patch, fact) in before.items() if key not in after],
        changed=sorted(changed, key=lambda item: item[1].key),
        superseded=sorted(superseded, key=lambda item: item.after.key),
        weights=[],
    )


def difference_of(
    old: Mapping[str, Patch], new: Mapping[str, Patch], *, measure: bool = False
) -> list[WeightDifference]:
    """By weight, from the factors: a patch in both stacks cancels, one that left counts negatively."""
    left = [patch for patch_id, patch in old.items() if patch_id not in new]
    came = [patch for patch_id, patch in new.items() if patch_id not in old]
    names = sorted({name for patch in [*left, *came] for name in patch.deltas})
    found = []
    for name in names:
        weight, difference = _weight(_deltas(left, name), _deltas(came, name), name)
        if measure:
            stacks = (_total(_deltas(side.values(), name), difference) for side in (old, new))
            weight = replace(weight, measures=_measures(difference, *stacks))
        found.append(weight)
    return found


def _deltas(patches: Iterable[Patch], name: str) -> list[Delta]:
    return [patch.deltas[name] for patch in patches if name in patch.deltas]


def _weight(left: list[Delta], came: list[Delta], name: str) -> tuple[WeightDifference, Sum]:
    shape = (left or came)[0].shape
    if any(delta.shape != shape for delta in [*left, *came]):
        raise BadInput(
            f"{name}: has one shape on one side and another on the other, so their bases are of different "
            "size, and their numbers cannot be compared; compare what they say: patchkit log --facts"
        )
    difference = sum_of([*((1, delta) for delta in came), *((-1, delta) for delta in left)], shape)
    rank = min(sum(delta.rank for delta in [*left, *came]), *shape)
    return WeightDifference(name, rank, difference.norm), difference


def _total(deltas: list[Delta], like: Sum) -> Sum:
    """ΔW of a whole stack in one weight."""
    d_out = like.core.shape[0] if like.left is None else like.left.shape[0]
    d_in = like.core.shape[1] if like.right is None else like.right.shape[0]
    return sum_of([(1, delta) for delta in deltas], (d_out, d_in))


def _measures(difference: Sum, old: Sum, new: Sum) -> Measures:
    return Measures(
        relative=None,
        spectral_norm=difference.spectral_norm,
        effective_rank=difference.effective_rank,
        stable_rank=difference.stable_rank,
        singular_values=tuple(difference.singular_values.tolist()),
        cosine=cosine(old, new),
        output_angles=tuple(principal_angles(old.output_space, new.output_space)),
        input_angles=tuple(principal_angles(old.input_space, new.input_space)),
    )


def _related(repository: Repository, weights: list[WeightDifference]) -> list[WeightDifference]:
    """With each norm's share of the base's, which the catalogue remembers or the base's file tells."""
    known = _base_norms(repository, [weight.name for weight in weights])
    return [
        replace(
            weight, measures=replace(weight.measures, relative=_share(weight.norm, known.get(weight.name)))
        )
        for weight in weights
        if weight.measures is not None
    ]


def _share(norm: float, base: float | None) -> float | None:
    return norm / base if base else None


def _base_norms(repository: Repository, names: list[str]) -> dict[str, float]:
    known = repository.catalogue.base_norms(repository.settings.base_fingerprint)
    missing = [name for name in names if name not in known]
    try:
        checkpoint = repository.checkpoint() if missing else None
    except PatchkitError:  # the base is not here: what is not known stays open
        return known
    if checkpoint is None:
        return known
    return {**known, **{name: float(checkpoint.read(name).double().norm()) for name in missing}}


def _read(repository: Repository, revision: str) -> tuple[dict[str, Patch], dict[Key, tuple[str, Fact]]]:
    if revision == BASE:
        return {}, {}
    stack = repository.stack(revision)
    return repository.patches(stack), dict(stack.facts_in_force())


def _commit(repository: Repository, revision: str) -> str | None:
    return None if revision == BASE else repository.store.resolve(revision)


def _parent(repository: Repository, revision: str) -> str:
    try:
        return repository.store.resolve(f"{revision}~1")[:10]
    except NotFound:
        return BASE
