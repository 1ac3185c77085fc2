"""The numbers of a patch: factors, keys and targets, and the algebra on them.

ΔW = B A with B [d_out, r] and A [r, d_in] in float32, in the orientation of `nn.Linear` whatever the
module. Where keys are kept, term i *is* fact i; for MEMIT B's column its residual, A's row its solved key.
Promises: the same `Patch` gives the same files on every run; `Patch.from_files` believes nothing that does
not agree with everything else; `Patch.without` takes facts out as if they had never been solved for.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchkit.algebra import closed_forms
from patchkit.algebra.rounding import round_sum
from patchkit.canonical import hash_bytes
from patchkit.errors import BadInput, NotFound, WouldOverwrite
from patchkit.facts import Fact, dump_facts, load_canonical
from patchkit.files import fsync_folder, reading, write_durably, writing
from patchkit.patch import (
    DELTA,
    DENSE,
    FACTORS,
    FACTS,
    FORMAT,
    KEYS,
    SQUASH,
    Header,
    WeightEntry,
    break_even,
    check_parts,
    check_tensors,
    header_in,
    patch_name,
)
from patchkit.tensors import TensorFile, header_of, to_bytes

__all__ = ["Delta", "Patch", "Solution", "terms_of"]


@dataclass(eq=False)
class Delta:
    """The update of one weight: factors B [d_out, r] and A [r, d_in], or dense [d_out, d_in].

    ``transposed``: the checkpoint stores this weight as [d_in, d_out] (Conv1D). Tensors are kept as
    contiguous float32 on the CPU. `BadInput` when the shapes do not fit or an entry is not finite.
    """

    B: Tensor | None = None
    A: Tensor | None = None
    dense: Tensor | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        if (self.B is None) != (self.A is None) or (self.B is None) == (self.dense is None):
            raise BadInput("an update is B and A, or dense; not both, and not half")
        for name in ("B", "A", "dense"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, _matrix(value, f"the update's {name}"))
        if self.B is not None and self.A is not None and self.B.shape[1] != self.A.shape[0]:
            raise BadInput(f"an update's factors do not fit: {list(self.B.shape)} times {list(self.A.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        if self.B is not None and self.A is not None:
            return (self.B.shape[0], self.A.shape[1])
        assert self.dense is not None
        return (self.dense.shape[0], self.dense.shape[1])

    @property
    def rank(self) -> int:
        """Terms in the factors; for a dense update the most that its rank can be."""
        return min(self.shape) if self.B is None else self.B.shape[1]

    def norm(self) -> float:
        """‖ΔW‖ (Frobenius), in float64 and from the factors: with B = Q R and Aᵀ = P S, ‖B A‖ = ‖R Sᵀ‖."""
        if self.B is not None and self.A is not None:
            R = torch.linalg.qr(self.B.double(), mode="r").R
            S = torch.linalg.qr(self.A.double().T, mode="r").R
            return float(torch.linalg.matrix_norm(R @ S.T))
        assert self.dense is not None
        return float(torch.linalg.matrix_norm(self.dense.double()))

    def compact(self) -> Delta:
        """This update in the smaller of its two forms; multiplied out, each entry is rounded once."""
        if self.B is None or self.A is None or self.rank <= break_even(*self.shape):
            return self
        product = round_sum(torch.zeros(self.shape, dtype=torch.float32, device="cpu"), [(self.B, self.A)])
        return Delta(dense=product, transposed=self.transposed)

    @property
    def nbytes(self) -> int:
        """What it takes in the patch's file."""
        return sum(part.nbytes for part in (self.B, self.A, self.dense) if part is not None)


@dataclass(eq=False)
class Solution:
    """What it takes to solve a patch again without optimising again; N facts, float32 on the CPU.

    ``targets`` z [N, d_model]; ``keys`` by weight, [N, d_in]; and, only for weights whose update is
    dense (where B and A are not there to be read), ``solved`` (rows of A) [N, d_in] and
    ``residuals`` (columns of B) [N, d_out]. What the terms say depends on the method: `closed_forms`.
    """

    targets: Tensor
    keys: dict[str, Tensor]
    solved: dict[str, Tensor] = field(default_factory=dict)
    residuals: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.targets = _matrix(self.targets, "the targets")
        for part in ("keys", "solved", "residuals"):
            rows = getattr(self, part).items()
            setattr(self, part, {name: _matrix(value, f"the {part} of {name}") for name, value in rows})

    def tensors(self) -> dict[str, Tensor]:
        """By the names in the keys file."""
        parts = {"keys": self.keys, "solved": self.solved, "residuals": self.residuals}
        found = {f"{name}.{part}": value for part, values in parts.items() for name, value in values.items()}
        return {"targets": self.targets, **found}


@dataclass(frozen=True, eq=False)
class Patch:
    """One edit batch: the facts, the update of each weight (by stored name), and how it was made.

    Every update is kept in the smaller of its forms. ``left_out``: the hash of a keys file that the header
    names but that was not shipped. `BadInput` when the parts do not agree.
    """

    facts: tuple[Fact, ...]
    deltas: dict[str, Delta]
    base: str
    method: str
    recipe: dict[str, Any]
    solved_on: tuple[str, ...] = ()
    solution: Solution | None = None
    left_out: str | None = None

    def __post_init__(self) -> None:
        if not self.facts or not self.deltas:
            raise BadInput("a patch needs at least one fact and one changed weight")
        solution = None if self.solution is None else _with_terms(self.solution, self.deltas)
        compact = {name: delta.compact() for name, delta in self.deltas.items()}
        object.__setattr__(self, "deltas", compact)
        object.__setattr__(self, "solution", solution)
        object.__setattr__(self, "solved_on", tuple(sorted(set(self.solved_on))))
        if solution is not None:
            _check_solution(solution, compact, len(self.facts))

    @property
    def name(self) -> str:
        """The folder's name if it is committed now; a folder keeps the name of its first version."""
        return patch_name(self.facts)

    @cached_property
    def id(self) -> str:
        """This version: the SHA-256 of the delta file, 64 hex digits."""
        return hash_bytes(self.files()[DELTA])

    @property
    def nbytes(self) -> int:
        """What the updates take, without facts and keys."""
        return sum(delta.nbytes for delta in self.deltas.values())

    def norms(self) -> dict[str, float]:
        """‖ΔW‖ of each weight."""
        return {name: delta.norm() for name, delta in self.deltas.items()}

    def files(self) -> dict[str, bytes]:
        """The patch folder's files, the delta last; equal patches give equal bytes."""
        facts = dump_facts(self.facts)
        keys = None if self.solution is None else _spell(self.solution.tensors(), {})
        header = self._header(hash_bytes(facts), self.left_out if keys is None else hash_bytes(keys))
        delta = _spell(_delta_tensors(self.deltas), header.to_metadata(self.name))
        return {FACTS: facts, **({} if keys is None else {KEYS: keys}), DELTA: delta}

    def _header(self, facts: str, keys: str | None) -> Header:
        weights = {name: _entry(delta) for name, delta in self.deltas.items()}
        return Header(FORMAT, self.base, facts, keys, self.solved_on, self.method, self.recipe, weights)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], name: str) -> Patch:
        """Read a patch folder's files, believing nothing unchecked; ``name`` is for messages. `BadInput`."""
        if not {FACTS, DELTA} <= set(files) <= {FACTS, DELTA, KEYS}:
            raise BadInput(f"{name}: a patch is {FACTS}, {DELTA} and perhaps {KEYS}, and nothing else")
        where = f"{name}/{DELTA}"
        delta_file = header_of(files[DELTA], where)
        header = header_in(delta_file, where)
        _check_twins(header, files, name)
        facts = load_canonical(files[FACTS], f"{name}/{FACTS}")
        check_parts(header, len(facts), name)
        try:
            deltas = _deltas(header, _tensors(delta_file, files[DELTA]))
            solution = _solution(header, files.get(KEYS), len(facts), f"{name}/{KEYS}")
            left_out = header.keys if solution is None else None
            patch = cls(
                facts, deltas, header.base, header.method, header.recipe, header.solved_on, solution, left_out
            )
        except BadInput as error:
            raise error if str(error).startswith(name) else BadInput(f"{name}: {error}") from None
        patch.__dict__["id"] = hash_bytes(files[DELTA])
        return patch

    def save(self, folder: Path) -> None:
        """Write the patch folder, durably; `WouldOverwrite` when it holds something already.

        The delta goes last: a folder without it is no patch, so a killed save is never mistaken for one.
        """
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise WouldOverwrite(f"{folder}: holds files already; name a new folder")
        for name, data in self.files().items():
            write_durably(folder / name, data)
        fsync_folder(folder.parent)

    @classmethod
    def load(cls, folder: Path) -> Patch:
        """Read a patch folder; other files in it are not looked at. `NotFound`, `BadInput`."""
        if not folder.is_dir():
            raise NotFound(f"{folder}: there is no such patch folder")
        present = {name: folder / name for name in (FACTS, DELTA, KEYS) if os.path.lexists(folder / name)}
        return cls.from_files({name: _read(path) for name, path in present.items()}, str(folder))

    def without(self, indices: Collection[int]) -> Patch:
        """This patch with facts taken out, as if it had been solved without them (counted from 0).

        Needs no statistics, model or forward pass: each method's stored terms are enough (`closed_forms`).
        `BadInput` where the editor keeps no keys or has no closed form, they were not shipped, an index is
        out of range, or no fact would stay.
        """
        dropped = sorted(set(indices))
        if not dropped:
            return self
        kept = [i for i in range(len(self.facts)) if i not in set(dropped)]
        if not 0 <= dropped[0] <= dropped[-1] < len(self.facts) or not kept:
            raise BadInput(f"{self.name}: no fact would stay, or there is no such fact; revert the patch")
        if self.solution is None:
            why = "its keys were not shipped" if self.left_out else f"{self.method} keeps no keys"
            raise BadInput(f"{self.name}: {why}, so no single fact can be taken out; revert the whole patch")
        if self.method == SQUASH:
            from patchkit.algebra import parts  # which stands on this module

            return parts.without(self, dropped)
        form = closed_forms.form_of(self.method)
        if form is None:
            raise BadInput(
                f"{self.name}: how facts leave an edit of {self.method} is not known here, so no single fact "
                "can be taken out; revert the whole patch"
            )
        keys = {name: rows[kept] for name, rows in self.solution.keys.items()}
        deltas = {name: self._without(name, form, kept, dropped) for name in self.deltas}
        return replace(
            self,
            facts=tuple(self.facts[i] for i in kept),
            deltas=deltas,
            solution=Solution(self.solution.targets[kept], keys),
        )

    def _without(self, name: str, form: str, kept: list[int], dropped: list[int]) -> Delta:
        assert self.solution is not None
        K = self.solution.keys[name].double()
        A, B = (rows.double() for rows in terms_of(self.deltas[name], name, self.solution))
        left = closed_forms.without(form, K, A, B, kept, dropped)
        if left is None:
            raise BadInput(f"{self.name}: the facts cannot be told apart by their keys; revert the patch")
        return Delta(left[1].T, left[0], transposed=self.deltas[name].transposed)


def terms_of(delta: Delta, name: str, solution: Solution) -> tuple[Tensor, Tensor]:
    """A weight's rows of A [N, d_in] and columns of B [N, d_out], a row for each fact; for MEMIT its
    solved keys and residuals."""
    if delta.A is not None and delta.B is not None:
        return delta.A, delta.B.T
    return solution.solved[name], solution.residuals[name]


def _with_terms(solution: Solution, deltas: Mapping[str, Delta]) -> Solution:
    """The solution, holding the terms of those updates whose factors are about to be multiplied out."""
    solved, residuals = dict(solution.solved), dict(solution.residuals)
    for name, delta in deltas.items():
        if delta.A is not None and delta.B is not None and delta.rank > break_even(*delta.shape):
            solved[name], residuals[name] = delta.A, delta.B.T
    return replace(solution, solved=solved, residuals=residuals)


def _check_solution(solution: Solution, deltas: Mapping[str, Delta], count: int) -> None:
    if solution.targets.shape[0] != count:
        raise BadInput(f"there are {solution.targets.shape[0]} targets for {count} facts")
    dense = {name for name, delta in deltas.items() if delta.dense is not None}
    if set(solution.keys) != set(deltas) or not set(solution.solved) == set(solution.residuals) == dense:
        raise BadInput("the keys do not belong to the weights that the patch changes")
    for name, delta in deltas.items():
        d_out, d_in = delta.shape
        wanted = {"keys": d_in, "solved": d_in, "residuals": d_out}
        for part, width in wanted.items():
            rows = getattr(solution, part).get(name)
            if rows is not None and rows.shape != (count, width):
                raise BadInput(f"the {part} of {name} are not {count} rows of {width}")
        if delta.B is not None and delta.rank != count:
            raise BadInput(f"{name} has {delta.rank} terms for {count} facts; keys need one term for each")


def _check_twins(header: Header, files: Mapping[str, bytes], name: str) -> None:
    """The three files belong together: a careless merge mixes them."""
    if hash_bytes(files[FACTS]) != header.facts:
        raise BadInput(f"{name}: {FACTS} is not the one that {DELTA} was made from; restore both")
    if KEYS in files and hash_bytes(files[KEYS]) != header.keys:
        raise BadInput(f"{name}: {KEYS} is not the one that {DELTA} was made with; restore both")


def _entry(delta: Delta) -> WeightEntry:
    form = FACTORS if delta.dense is None else DENSE
    return WeightEntry(delta.shape, delta.transposed, form, delta.rank)


def _delta_tensors(deltas: Mapping[str, Delta]) -> dict[str, Tensor]:
    parts = (
        (name, part, getattr(delta, part)) for name, delta in deltas.items() for part in ("B", "A", "dense")
    )
    return {f"{name}.{part}": value for name, part, value in parts if value is not None}


def _deltas(header: Header, tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    return {
        name: Delta(
            tensors.get(f"{name}.B"), tensors.get(f"{name}.A"), tensors.get(f"{name}.dense"), entry.transposed
        )
        for name, entry in header.weights.items()
    }


def _solution(header: Header, data: bytes | None, count: int, name: str) -> Solution | None:
    if data is None:
        return None
    file = header_of(data, name)
    targets = file.tensors.get("targets")
    if file.metadata or targets is None or len(targets.shape) != 2:
        raise BadInput(f"{name}: is not a keys file of patchkit")
    shapes: dict[str, tuple[int, ...]] = {"targets": (count, targets.shape[1])}
    for weight, entry in header.weights.items():
        d_out, d_in = entry.shape
        shapes[f"{weight}.keys"] = (count, d_in)
        if entry.form == DENSE:
            shapes |= {f"{weight}.solved": (count, d_in), f"{weight}.residuals": (count, d_out)}
    check_tensors(file, shapes, name)
    tensors = _tensors(file, data)
    parts = {
        part: {weight: tensors[key] for weight in header.weights if (key := f"{weight}.{part}") in tensors}
        for part in ("keys", "solved", "residuals")
    }
    return Solution(tensors["targets"], **parts)


def _spell(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    return to_bytes(
        {name: ("F32", tuple(value.shape), value.numpy().tobytes()) for name, value in tensors.items()},
        metadata,
    )


def _tensors(file: TensorFile, data: bytes) -> dict[str, Tensor]:
    """Every tensor of a float32 file whose header has been checked."""
    return {name: _float32(data[info.start : info.end], info.shape) for name, info in file.tensors.items()}


def _float32(data: bytes, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    return torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)


def _matrix(value: Tensor, what: str) -> Tensor:
    if value.ndim != 2:
        raise BadInput(f"{what} is not a matrix but has shape {list(value.shape)}")
    plain = value.detach().to("cpu", torch.float32).contiguous()
    if not torch.isfinite(plain).all():
        raise BadInput(f"{what} holds NaN or infinity")
    return plain


def _read(path: Path) -> bytes:
    with reading(path, follow=False) as file:
        return file.read()
