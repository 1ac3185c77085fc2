"""Wrote `repository-1.bundle`: a repository of patch format 1 that every later patchkit must read.

``PYTHONPATH=tests python tests/frozen/repository.py NUMBER`` writes the bundle and what it holds
(``repository-NUMBER.json``) for a format that is new, and refuses where they are there already. All numbers
come from whole numbers, so that no library's random numbers are needed to make the base again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from exact_helpers import write_checkpoint
from git_helpers import ENVIRONMENT
from proof_helpers import tensor_hashes
from torch import Tensor

from patchkit.algebra.factors import Delta, Patch, Solution
from patchkit.checkpoint import Checkpoint
from patchkit.facts import Fact
from patchkit.git.store import Changes, GitStore
from patchkit.repository import Repository
from patchkit.settings import BASE_KEY, Settings, dump_settings

FOLDER = Path(__file__).resolve().parent
LINEAR, CONV1D = "model.layers.0.mlp.down_proj.weight", "transformer.h.0.mlp.c_proj.weight"
SHAPES = {LINEAR: (6, 9), CONV1D: (4, 5)}  # [d_out, d_in]


def numbers(seed: int, *shape: int) -> Tensor:
    """float32 in steps of 1/64 within ±2, from a linear congruence."""
    values, state = [], 2 * seed + 1
    for _ in range(torch.Size(shape).numel()):
        state = (state * 48271) % 2147483647
        values.append(((state >> 8) % 257 - 128) / 64)
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


def make_base(folder: Path) -> Path:
    """bfloat16 and float32 tensors; one is stored transposed, as GPT-2's are."""
    return write_checkpoint(
        folder,
        {
            LINEAR: numbers(1, 6, 9).bfloat16(),
            CONV1D: numbers(2, 5, 4),
            "model.embed_tokens.weight": numbers(3, 7, 3).bfloat16(),
        },
    )


def make_patch(base: str, number: int, count: int = 2) -> Patch:
    deltas, keys = {}, {}
    for at, (name, (d_out, d_in)) in enumerate(SHAPES.items()):
        seed = 100 * number + 10 * at
        turned = name == CONV1D
        deltas[name] = Delta(
            numbers(seed + 4, d_out, count), numbers(seed + 5, count, d_in) / 3, transposed=turned
        )
        keys[name] = numbers(seed + 6, count, d_in)
    facts = tuple(
        Fact(f"Émile {number}-{i}", "{} lies in", "Rome", was="Paris", id=f"f{number}-{i}")
        for i in range(count)
    )
    solution = Solution(numbers(100 * number + 7, count, 6), keys)
    return Patch(facts, deltas, base, "memit", {"lambda": 5.0}, (), solution)


def write(number: int) -> None:
    bundle, told = FOLDER / f"repository-{number}.bundle", FOLDER / f"repository-{number}.json"
    if bundle.exists():
        raise SystemExit(f"{bundle} is frozen")
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as scratch:
        kb, base = Path(scratch) / "kb", make_base(Path(scratch) / "base")
        repository = _history(kb, base)
        git(kb, "bundle", "create", "-q", str(bundle), "HEAD", "--branches", "--tags")
        found = {rev: _holds(repository, rev, Path(scratch)) for rev in ("main~3", "side", "v1", "main")}
    told.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _history(kb: Path, base: Path) -> Repository:
    """Two patches side by side, merged; a patch replaced in part; one taken back."""
    kb.mkdir()
    git(kb, "init", "-q", "-b", "main", "--template=")
    store = GitStore.init(kb)
    fingerprint = Checkpoint.open(base).fingerprint()
    _next_day(1)
    settings = dump_settings(Settings("folder:base", None, fingerprint, {"layers": [0], "lambda": 5.0}))
    store.record(Changes(settings=settings), "Start")
    store.config_set(BASE_KEY, str(base))
    first, second, third = (make_patch(fingerprint, number) for number in (1, 2, 3))
    for day, patch in ((2, first), (3, third)):
        _next_day(day)
        store.record(Changes(patches={patch.name: patch.files()}), f"Add {patch.name}")
    git(kb, "switch", "-q", "-c", "side", "HEAD~1")
    _next_day(4)
    store.record(Changes(patches={second.name: second.files()}), "Add the side's")
    git(kb, "switch", "-q", "main")
    _next_day(5)
    git(kb, "merge", "-q", "--no-ff", "-m", "Merge side", "side")
    git(kb, "tag", "-a", "-m", "First", "v1")
    repository = Repository.open(kb)
    _next_day(6)
    repository.revert(first.name, facts=["1"])
    _next_day(7)
    repository.revert(third.name)
    return repository


def _holds(repository: Repository, rev: str, scratch: Path) -> dict[str, Any]:
    stack = repository.stack(rev)
    out = scratch / "out"
    repository.build(out, revision=rev)
    return {
        "commit": repository.store.resolve(rev),
        "tree": stack.tree,
        "patches": {patch.name: patch.id for patch in stack.patches},
        "facts": [[fact.to_line() for fact in patch.facts] for patch in stack.patches],
        "tensors": tensor_hashes(out),
    }


def git(folder: Path, *args: str) -> None:
    subprocess.run(["git", *args], cwd=folder, check=True)


def _next_day(day: int) -> None:
    date = f"2026-01-{day:02}T12:00:00+00:00"
    os.environ.update(GIT_AUTHOR_DATE=date, GIT_COMMITTER_DATE=date)


if __name__ == "__main__":
    write(int(sys.argv[1]))
