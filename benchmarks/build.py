"""Build and revert of a large checkpoint: against the disk, and against PEFT's merge and save."""

from __future__ import annotations

import json
import os
import statistics
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

TURNS = 3
"""All in each, so that a disk that slows down slows all."""


def measure(effort: Effort) -> Measured:
    """A Llama-shaped bfloat16 checkpoint of random numbers in shards, and a patch of 100 facts."""
    width, inner, depth, facts = (64, 128, 6, 8) if effort is Effort.QUICK else (2048, 8192, 36, 100)
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        place = Path(folder)
        base = _write_base(place / "base", width, inner, depth)
        checkpoint = Checkpoint.open(base)
        _patch(width, inner, facts, checkpoint.fingerprint()).save(place / "patch")
        touched = LAYERS * width * inner * 2
        first = _apart(place, "first")
        turns = [_turn(place, touched) for _ in range(1 if effort is Effort.QUICK else TURNS)]
    rows = [
        {"what": "first build (a whole copy)", **_row([first], None)},
        {"what": "revert", **_row([turn["revert"] for turn in turns], [turn["disk"] for turn in turns])},
        {"what": "build again", **_row([turn["again"] for turn in turns], [turn["disk"] for turn in turns])},
        {
            "what": "PEFT: load, merge_and_unload, save_pretrained",
            **_row([turn["peft"] for turn in turns], None),
        },
    ]
    largest = width * inner * 2
    bars = [
        Bar("revert, times the disk's own", _times(turns, "revert", "disk"), 1.3, most=True),
        Bar("build again, times the disk's own", _times(turns, "again", "disk"), 1.3, most=True),
        Bar("times faster than PEFT", _times(turns, "peft", "again"), 10.0),
        Bar(
            "peak memory, MB", max(turn["again"]["MB"] for turn in turns), 400 + 2 * largest / 1e6, most=True
        ),
    ]
    size = sum(info.size for _, info in checkpoint.tensors.values())
    disk = statistics.median(touched / turn["disk"]["s"] for turn in turns)
    note = f"{size / 1e9:.2f} GB, of which {touched / 1e6:.0f} MB are touched; disk {disk / 1e6:,.0f} MB/s."
    return Measured(rows, bars, [note, f"Medians of {len(turns)} turns, all but the first build in each."])


def _turn(place: Path, touched: int) -> dict[str, dict[str, float]]:
    """The disk, a revert, a build and PEFT's, each with nothing of the last one left to be written."""
    os.sync()
    disk = touched / disk_rate(place, max(touched, 1 << 24))
    return {"disk": {"s": disk}, **{what: _apart(place, what) for what in ("revert", "again", "peft")}}


def _times(turns: list[dict[str, dict[str, float]]], one: str, other: str) -> float:
    return statistics.median(turn[one]["s"] / turn[other]["s"] for turn in turns)


def _row(runs: list[dict[str, float]], disk: list[dict[str, float]] | None) -> dict[str, float | None]:
    median = statistics.median(run["s"] for run in runs)
    return {
        "s": median,
        "touched bytes at the disk's rate, s": statistics.median(run["s"] for run in disk) if disk else None,
        "times": statistics.median(a["s"] / b["s"] for a, b in zip(runs, disk, strict=True))
        if disk
        else None,
        "peak memory, MB": max(run["MB"] for run in runs),
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
    os.sync()
    command = [sys.executable, "-m", "benchmarks.build_process", what, str(place)]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(ran.stdout.splitlines()[-1])
