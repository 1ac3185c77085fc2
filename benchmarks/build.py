"""Build and revert of a large checkpoint: against the disk, and against PEFT's merge and save."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.machine import disk_rate, scratch
from benchmarks.references import git_helpers
from benchmarks.report import Bar, Effort, Measured
from patchkit.algebra.factors import Delta, Patch
from patchkit.checkpoint import Checkpoint

__all__ = ["measure"]

LAYERS = 5
"""How many down projections the patch edits; the rest of the checkpoint is never touched.

With the depth below they are 4 % of it, as in the models that people run (Llama-3.1 8B: 3.6 %).
"""


def measure(effort: Effort) -> Measured:
    """A Llama-shaped bfloat16 checkpoint of random numbers in shards, and a patch of 100 facts."""
    width, inner, depth, facts = (64, 128, 6, 8) if effort is Effort.QUICK else (2048, 8192, 36, 100)
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        place = Path(folder)
        base = _write_base(place / "base", width, inner, depth)
        checkpoint = Checkpoint.open(base)
        _patch(width, inner, facts, checkpoint.fingerprint()).save(place / "patch")
        touched = LAYERS * width * inner * 2
        disk = disk_rate(place, max(touched, 1 << 24))
        runs = {what: _apart(place, what) for what in ("first", "revert", "again")}
        peft = _apart(place, "peft")
    floor = touched / disk
    rows = [
        {"what": "first build (a whole copy)", **_row(runs["first"], None)},
        {"what": "revert", **_row(runs["revert"], floor)},
        {"what": "build again", **_row(runs["again"], floor)},
        {"what": "PEFT: load, merge_and_unload, save_pretrained", **_row(peft, None)},
    ]
    largest = width * inner * 2
    bars = [
        Bar("revert, times the disk's own", runs["revert"]["s"] / floor, 1.3, most=True),
        Bar("build again, times the disk's own", runs["again"]["s"] / floor, 1.3, most=True),
        Bar("times faster than PEFT", peft["s"] / runs["again"]["s"], 10.0),
        Bar("peak memory, MB", runs["again"]["MB"], 400 + 2 * largest / 1e6, most=True),
    ]
    size = sum(info.size for _, info in checkpoint.tensors.values())
    note = f"{size / 1e9:.2f} GB, of which {touched / 1e6:.0f} MB are touched; disk {disk / 1e6:,.0f} MB/s."
    return Measured(rows, bars, [note])


def _row(run: dict[str, float], floor: float | None) -> dict[str, float | None]:
    return {
        "s": run["s"],
        "touched bytes at the disk's rate, s": floor,
        "times": run["s"] / floor if floor else None,
        "peak memory, MB": run["MB"],
    }


def _write_base(folder: Path, width: int, inner: int, depth: int) -> Path:
    """Shards of a block each, as `save_pretrained` names them; written without a model in memory."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for shard in range(depth + 1):
        file = f"model-{shard + 1:05}-of-{depth + 1:05}.safetensors"
        names = [name for name in shapes if _shard(name, depth) == shard]
        tensors = {
            name: (0.02 * torch.randn(shapes[name], generator=generator)).to(torch.bfloat16) for name in names
        }
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _patch(width: int, inner: int, count: int, base: str) -> Patch:
    """Updates that are a few percent of the weights, as edits are."""
    generator = torch.Generator().manual_seed(1)
    deltas = {
        f"model.layers.{i}.mlp.down_proj.weight": Delta(
            torch.randn(width, count, generator=generator) * 1e-2,
            torch.randn(count, inner, generator=generator) * 1e-2,
        )
        for i in range(LAYERS)
    }
    return Patch(git_helpers.numbers(*range(count)).facts, deltas, base, "memit", {})


def _shard(name: str, depth: int) -> int:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else depth


def _apart(place: Path, what: str) -> dict[str, float]:
    """Seconds and peak memory of one piece of work in a process of its own, with its imports alone."""
    command = [sys.executable, "-m", "benchmarks.build_process", what, str(place)]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(ran.stdout.splitlines()[-1])
