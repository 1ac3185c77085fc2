"""What a stack is, in numpy and dictionaries: facts and patches in, the hash of every tensor out.

The oracle of test_machine.py. It knows the paper's equations, the files of a patch and the rules that the
documentation states, and calls nothing of patchkit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file as load_numbers
from safetensors.torch import load_file

Array = NDArray[np.floating]
CLOSE = 1e-4  # numbers that are solved again, against the same equation in numpy


class Said(NamedTuple):
    """A fact: one prompt is used throughout, so the subject is its key."""

    subject: str
    target: str


class Rows(NamedTuple):
    """How a weight came by its update, a row for each fact: residuals [n, d_out], solved keys and keys."""

    R: Array
    X: Array
    K: Array

    def take(self, rows: Sequence[int] | slice) -> Rows:
        return Rows(self.R[rows], self.X[rows], self.K[rows])


@dataclass(frozen=True, eq=False)
class Part:
    """Facts that were solved together; ``scale`` is what its recipe says, if anything."""

    facts: tuple[Said, ...]
    rows: Mapping[str, Rows]
    scale: float | None = None

    def without(self, dropped: Collection[int]) -> Part:
        """X' = X_S + X_J (I - G_JJ)⁻¹ G_JS, for facts as columns; here they are rows."""
        kept = [i for i in range(len(self.facts)) if i not in dropped]
        out = sorted(dropped)
        rows = {}
        for name, (R, X, K) in self.rows.items():
            K64, X64 = K.astype(np.float64), X.astype(np.float64)
            G_JJ, G_JS = K64[out] @ X64[out].T, K64[out] @ X64[kept].T
            more = np.linalg.solve(np.eye(len(out)) - G_JJ, G_JS).T @ X64[out]
            rows[name] = Rows(R[kept], (X64[kept] + more).astype(np.float32), K[kept])
        return replace(self, facts=tuple(self.facts[i] for i in kept), rows=rows)


@dataclass(frozen=True, eq=False)
class Version:
    """What a patch folder holds. ``id``: its delta's SHA-256, once it was seen; ``joint``: marked so."""

    parts: tuple[Part, ...]
    deltas: Mapping[str, tuple[Array, ...]]
    """(B, A), or the update multiplied out."""
    id: str = ""
    joint: bool = False

    @cached_property
    def facts(self) -> tuple[Said, ...]:
        return tuple(fact for part in self.parts for fact in part.facts)

    def without(self, dropped: Collection[int]) -> Version:
        parts, start = [], 0
        for part in self.parts:
            own = {place - start for place in dropped if 0 <= place - start < len(part.facts)}
            start += len(part.facts)
            if len(own) < len(part.facts):
                parts.append(part.without(own) if own else part)
        return replace(single(parts[0]) if len(parts) == 1 else joined(map(single, parts)), joint=self.joint)

    def scaled(self, factor: float) -> Version:
        def part(old: Part) -> Part:
            rows = {name: r._replace(R=_times(r.R, factor)) for name, r in old.rows.items()}
            return Part(old.facts, rows, (1.0 if old.scale is None else old.scale) * factor)

        deltas = {name: (_times(delta[0], factor), *delta[1:]) for name, delta in self.deltas.items()}
        return Version(tuple(map(part, self.parts)), deltas, "", self.joint)

    def same(self, other: Version | None) -> bool:
        """Whether both are the same bits, as far as the model knows them."""
        if other is None or self.facts != other.facts or self.joint != other.joint:
            return False
        if self.id and other.id:
            return self.id == other.id
        scales = [part.scale for part in self.parts] == [part.scale for part in other.parts]
        return scales and all(
            len(delta) == len(other.deltas[name]) and all(map(np.array_equal, delta, other.deltas[name]))
            for name, delta in self.deltas.items()
        )


State = Mapping[str, Version]
"""Patch folder -> what it holds."""


def single(part: Part) -> Version:
    """A patch of one part, in the smaller of its forms."""
    return Version((part,), {name: _compact([(r.R.T, r.X)]) for name, r in part.rows.items()})


def joined(versions: Iterator[Version] | Sequence[Version]) -> Version:
    """Patches squashed into one: factors side by side, zeros for a weight left alone, or multiplied out."""
    each = list(versions)
    shapes = {n: (d[0].shape[0], d[-1].shape[1]) for version in each for n, d in version.deltas.items()}
    deltas = {}
    for name, (d_out, d_in) in shapes.items():
        none = [(np.zeros((d_out, n), "f4"), np.zeros((n, d_in), "f4")) for n in (len(v.facts) for v in each)]
        deltas[name] = _compact([v.deltas.get(name, zero) for v, zero in zip(each, none, strict=True)])
    return Version(tuple(part for version in each for part in version.parts), deltas)


def together(versions: Mapping[str, Version], ridge: float) -> dict[str, Version]:
    """`merge --joint`: X' = (λC + K Kᵀ)⁻¹ K over the keys of all of them, λC = ``ridge`` I."""
    solved = {}
    for name in next(iter(versions.values())).deltas:
        K = np.concatenate([v.parts[0].rows[name].K for v in versions.values()]).astype(np.float64)
        solved[name] = np.linalg.inv(ridge * np.eye(K.shape[1]) + K.T @ K)
    return {folder: _again(version, solved) for folder, version in versions.items()}


def _again(version: Version, solved: Mapping[str, Array]) -> Version:
    (part,) = version.parts
    rows = {
        name: r._replace(X=(r.K.astype(np.float64) @ solved[name]).astype(np.float32))
        for name, r in part.rows.items()
    }
    return replace(single(replace(part, rows=rows)), joint=True)


def _times(rows: Array, factor: float) -> Array:
    return (rows.astype(np.float64) * factor).astype(np.float32)


def _compact(deltas: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
    """Factors where r (d_out + d_in) <= d_out d_in and nothing is multiplied out yet."""
    factors = [delta for delta in deltas if len(delta) == 2]
    rank = sum(B.shape[1] for B, _ in factors)
    d_out, d_in = (deltas[0][0].shape[0], deltas[0][-1].shape[1])
    if len(factors) == len(deltas) and rank * (d_out + d_in) <= d_out * d_in:
        return np.concatenate([B for B, _ in factors], 1), np.concatenate([A for _, A in factors])
    return (exact_sum(np.zeros((d_out, d_in)), deltas).astype(np.float32),)


def exact_sum(base: Array, deltas: Sequence[tuple[Array, ...]]) -> Array:
    """base + Σ ΔW [d_out, d_in]: products of float32 are exact in float64, and so is their `fsum`."""
    terms = [base.astype(np.float64)[None]]
    for delta in deltas:
        wide = [part.astype(np.float64) for part in delta]
        terms.append(wide[0].T[:, :, None] * wide[1][:, None, :] if len(wide) == 2 else wide[0][None])
    flat = np.concatenate(terms).reshape(-1, base.size)
    return np.array([math.fsum(column) for column in flat.T]).reshape(base.shape)


def _rounded(value: Array, dtype: torch.dtype) -> torch.Tensor:
    """Half to even, once: torch goes to bfloat16 by way of float32, which rounds twice."""
    digits = {torch.bfloat16: 8, torch.float32: 24}[dtype]
    _, exponent = np.frexp(value)
    return torch.from_numpy(np.ldexp(np.rint(np.ldexp(value, digits - exponent)), exponent - digits)).to(
        dtype
    )


# -- from facts and patches to hashes ----------------------------------------------------------


class Base:
    """A checkpoint: what a build of a state must hold, tensor by tensor."""

    def __init__(self, folder: Path, *, transposed: bool) -> None:
        self.folder = folder
        self.tensors = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
        self._transposed = transposed
        self._plain = {name: _hash(tensor) for name, tensor in self.tensors.items()}
        self._known: dict[frozenset[str], dict[str, str]] = {}

    def hashes(self, state: State) -> dict[str, str]:
        """Tensor -> SHA-256 of its bytes, with the patches of ``state`` in force."""
        key = frozenset(version.id for version in state.values())
        if key in self._known:
            return self._known[key]
        weights = {name for version in state.values() for name in version.deltas}
        found = {**self._plain, **{name: self._with(name, state) for name in weights}}
        if "" not in key:  # a version that no file was seen of has no id to be known by
            self._known[key] = found
        return found

    def _with(self, name: str, state: State) -> str:
        tensor = self.tensors[name]
        base = (tensor.T if self._transposed else tensor).to(torch.float64).numpy()
        deltas = [version.deltas[name] for version in state.values() if name in version.deltas]
        total = exact_sum(base, deltas)
        found = _rounded(total, tensor.dtype)
        return _hash(found.T if self._transposed else found)


def _hash(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


# -- from a patch folder to the model -----------------------------------------------------------


def read_version(folder: Path, facts: tuple[Said, ...], expected: Version | None) -> Version:
    """What lies in a folder; held against what is ``expected`` of its numbers, where that is known."""
    delta, keys = (load_numbers(folder / f"{name}.safetensors") for name in ("delta", "keys"))
    names = sorted({name.rpartition(".")[0] for name in delta})
    deltas = {n: (delta[f"{n}.dense"],) if f"{n}.dense" in delta else _pair(delta, n) for n in names}
    rows = {n: _rows(n, deltas[n], keys) for n in names}
    sizes = [(part.facts, part.scale) for part in expected.parts] if expected else [(facts, None)]
    parts, start = [], 0
    for own, scale in sizes:
        piece = slice(start, start := start + len(own))
        taken = {n: r.take(piece) for n, r in rows.items()}
        parts.append(Part(own, {n: r for n, r in taken.items() if r.R.any() or r.X.any()}, scale))
    id_ = hashlib.sha256((folder / "delta.safetensors").read_bytes()).hexdigest()
    found = Version(tuple(parts), deltas, id_, expected.joint if expected else False)
    assert found.facts == facts, (folder, found.facts, facts)
    if expected is not None and expected.deltas:
        assert found.deltas.keys() == expected.deltas.keys()
        assert _apart(found, expected) <= CLOSE
    return found


def _pair(delta: Mapping[str, Array], name: str) -> tuple[Array, Array]:
    return delta[f"{name}.B"], delta[f"{name}.A"]


def _rows(name: str, delta: tuple[Array, ...], keys: Mapping[str, Array]) -> Rows:
    if len(delta) == 2:
        return Rows(delta[0].T, delta[1], keys[f"{name}.keys"])
    return Rows(keys[f"{name}.residuals"], keys[f"{name}.solved"], keys[f"{name}.keys"])


def numbers_apart(folder: Path, expected: Version) -> float:
    """The largest share by which the numbers in a folder are off; infinite for those of another form."""
    return _apart(read_version(folder, expected.facts, replace(expected, deltas={})), expected)


def _apart(found: Version, expected: Version) -> float:
    worst = 0.0
    for name, delta in expected.deltas.items():
        got = found.deltas.get(name, ())
        if [part.shape for part in got] != [part.shape for part in delta]:
            return math.inf
        for one, other in zip(got, delta, strict=True):
            worst = max(worst, float(np.linalg.norm(one - other) / (np.linalg.norm(other) or 1.0)))
    return worst


# -- the rules that the documentation states ------------------------------------------------------


def held(state: State) -> dict[str, tuple[str, Said]]:
    """Subject -> its folder and fact; of a state in which no subject is twice."""
    return {fact.subject: (name, fact) for name, version in state.items() for fact in version.facts}


def doubled(state: State) -> bool:
    """Whether a fact's key is in force twice."""
    return len(held(state)) < sum(len(version.facts) for version in state.values())


def merge_folders(base: State, ours: State, theirs: State) -> dict[str, Version] | None:
    """What Git makes of whole folders: the side's that changed it; None for a conflict."""
    out = {}
    for name in base.keys() | ours.keys() | theirs.keys():
        was, one, other = base.get(name), ours.get(name), theirs.get(name)
        if _id(one) == _id(other) or _id(other) == _id(was):
            found = one
        elif _id(one) == _id(was):
            found = other
        else:
            return None
        if found is not None:
            out[name] = found
    return out


def merge_facts(bases: Sequence[State], ours: State, theirs: State) -> dict[str, set[Said | None]]:
    """Subject -> what may be in force after a merge: the side's that changed it, any where both did."""
    sides = [{subject: fact for subject, (_, fact) in held(s).items()} for s in (*bases, ours, theirs)]
    *before, one, other = sides
    out: dict[str, set[Said | None]] = {}
    for subject in {subject for side in sides for subject in side}:
        for base in before:
            was = base.get(subject)
            changed = {side.get(subject) for side in (one, other)} - {was}
            out.setdefault(subject, set()).update(changed or {was})
    return out


def same_state(one: State, other: State) -> bool:
    return {name: v.id for name, v in one.items()} == {name: v.id for name, v in other.items()}


def _id(version: Version | None) -> str | None:
    return None if version is None else version.id
