"""What the tests of shipping share: models of several kinds with made patches in force, and PEFT's loader."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from proof_helpers import fine, here, saved, small_repository, tiny_base
from torch import Tensor
from transformers import AutoConfig

from patchkit.algebra.factors import Delta, Patch
from patchkit.checkpoint import Checkpoint
from patchkit.facts import Fact
from patchkit.models.anatomy import anatomy_of
from patchkit.models.loading import loader_of
from patchkit.models.names import StoredNames
from patchkit.repository import Repository

__all__ = ["Knowledge", "edited", "loaded", "logits", "patch_on", "with_adapter"]

TOKENS = torch.tensor([[5, 40, 17, 99, 23, 61, 7, 130]])


@dataclass(frozen=True)
class Knowledge:
    """A base folder and a repository on it with patches in force."""

    base: Path
    folder: Path

    @property
    def repository(self) -> Repository:
        return Repository.open(self.folder)

    def export(self, *arguments: object) -> Any:
        return here("-C", self.folder, "export", "peft", *arguments)

    def build(self) -> Path:
        out = self.folder.parent / "build"
        fine(here("-C", self.folder, "build", "--out", out))
        return out


def edited(
    root: Path,
    kind: str,
    dtype: torch.dtype = torch.float32,
    ranks: Sequence[int] = (3, 2),
    size: float = 0.05,
) -> Knowledge:
    """A tiny model with a made patch of each rank in force; the second touches one layer less."""
    base = tiny_base(root / "base", kind, dtype)
    knowledge = Knowledge(base, root / "kb")
    small_repository(knowledge.folder, base)
    for number, rank in enumerate(ranks):
        patch = patch_on(base, number, rank, layers=(1, 2) if number else (0, 1, 2), size=size)
        fine(here("-C", knowledge.folder, "apply", saved(patch, root / "made")))
    return knowledge


def patch_on(base: Path, number: int, rank: int, layers: Sequence[int] = (0, 1), size: float = 0.05) -> Patch:
    """A patch of ``rank`` facts with random factors on the edited weights of a tiny model."""
    model = loaded(base)
    anatomy = anatomy_of(model)
    checkpoint = Checkpoint.open(base)
    names = StoredNames(model, checkpoint)
    generator = torch.Generator().manual_seed(number)
    deltas = {}
    for layer in layers:
        B = size * torch.randn(anatomy.d_model, rank, generator=generator)
        A = torch.randn(rank, anatomy.d_ff, generator=generator)
        deltas[names.of(anatomy.weights[layer])] = Delta(B, A, transposed=anatomy.transposed)
    facts = tuple(
        Fact(f"Person {number}-{i}", "{} plays the sport of", "chess", neighbors=("Paris lies in",))
        for i in range(rank)
    )
    return Patch(facts, deltas, checkpoint.fingerprint(), "made", {})


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as a program loads it that knows nothing of patchkit."""
    loader = loader_of(AutoConfig.from_pretrained(folder), folder)
    return loader.from_pretrained(folder, dtype=dtype).eval()


def with_adapter(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The base with the adapter that PEFT itself reads; a warning of PEFT's is an error."""
    with warnings.catch_warnings(action="error", category=UserWarning):
        return PeftModel.from_pretrained(loaded(base, dtype), adapter).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits
