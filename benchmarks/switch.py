"""`switch` between two branches that differ by one patch, above stacks of one patch and of many."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.commands import run
from benchmarks.machine import scratch, seconds_of
from benchmarks.references import git_helpers
from benchmarks.report import Bar, Effort, Measured
from patchkit.algebra.factors import Delta, Patch
from patchkit.checkpoint import Checkpoint
from patchkit.git.store import Changes, GitStore
from patchkit.repository import Repository
from patchkit.settings import BASE_KEY, Settings, dump_settings

__all__ = ["measure"]

LAYERS = 5  # that a patch edits
FACTS = 10  # in a patch


def measure(effort: Effort) -> Measured:
    """Seconds of `patchkit switch`, its build included; the median of five there and back."""
    width, inner, many = (16, 32, 4) if effort is Effort.QUICK else (576, 1536, 1000)
    os.environ.update(git_helpers.ENVIRONMENT)
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        base = _write_base(Path(folder) / "base", width, inner)
        stacks = {
            "one patch, on other weights": _stack(Path(folder) / "one", base, 1, LAYERS),
            f"{many:,} patches, on other weights": _stack(Path(folder) / "apart", base, many, LAYERS),
            f"{many:,} patches, on the same weights": _stack(Path(folder) / "same", base, many, 0),
        }
        times = 1 if effort is Effort.QUICK else 5
        taken = {name: _seconds(stack, times) for name, stack in stacks.items()}
    one, apart, _ = taken.values()
    rows = [{"the stack below": name, "s": s, "times": s / one} for name, s in taken.items()]
    bars = [Bar("switch above many patches, times above one", apart / one, 2.0, most=True)]
    note = f"The branches differ by {FACTS} facts on {LAYERS} weights of {width} x {inner}, bfloat16."
    return Measured(rows, bars, [note])


def _seconds(place: Path, times: int) -> float:
    def there_and_back() -> None:
        for name in ("with", "main"):
            run(place, ["switch", name])

    if times > 1:
        there_and_back()
    return seconds_of(there_and_back, times) / 2


def _stack(place: Path, base: Path, count: int, first: int) -> Path:
    """``count`` patches on the weights from ``first`` on, built; the branch `with` has one on the first."""
    fingerprint = Checkpoint.open(base).fingerprint()
    place.mkdir()
    git_helpers.git(place, "init", "-q", "-b", "main")
    store = GitStore.init(place)
    patches = [_patch(base, fingerprint, number, first) for number in range(count)]
    settings = dump_settings(Settings("folder:base", None, fingerprint, {"method": "memit"}))
    store.record(Changes({patch.name: patch.files() for patch in patches}, settings=settings), "Start")
    store.config_set(BASE_KEY, str(base))
    repository = Repository.open(place)
    repository.build()
    git_helpers.git(place, "switch", "-q", "-c", "with")
    one = _patch(base, fingerprint, count, 0)
    repository.store.record(Changes({one.name: one.files()}), "One more")
    git_helpers.git(place, "switch", "-q", "main")
    return place


def _patch(base: Path, fingerprint: str, number: int, first: int) -> Patch:
    generator = torch.Generator().manual_seed(number)
    facts = git_helpers.numbers(*range(number * FACTS, (number + 1) * FACTS)).facts
    names = [_name(layer) for layer in range(first, first + LAYERS)]
    with_shapes = {name: Checkpoint.open(base).tensors[name][1].shape for name in names}
    deltas = {
        name: Delta(
            torch.randn(rows, FACTS, generator=generator) * 1e-3,
            torch.randn(FACTS, columns, generator=generator) * 1e-3,
        )
        for name, (rows, columns) in with_shapes.items()
    }
    return Patch(facts, deltas, fingerprint, "memit", {})


def _name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.down_proj.weight"


def _write_base(folder: Path, width: int, inner: int) -> Path:
    """A checkpoint of twice the weights that a patch edits."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        _name(layer): (0.02 * torch.randn(width, inner, generator=generator)).to(torch.bfloat16)
        for layer in range(2 * LAYERS)
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder
