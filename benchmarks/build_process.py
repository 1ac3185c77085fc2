"""One piece of work on the checkpoint of `benchmarks.build`: its seconds and peak memory, as JSON.

A process of its own, with the imports of what is measured and no other.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import peak_memory
from patchkit.algebra.factors import Patch
from patchkit.builds.build import build
from patchkit.checkpoint import Checkpoint


def _work(what: str, place: Path) -> None:
    patch = Patch.load(place / "patch")
    checkpoint = Checkpoint.open(place / "base", fingerprint=patch.base)  # believed, as a repository's is
    if what == "peft":  # imports are no part of either side's time
        importlib.import_module("peft")
        importlib.import_module("transformers").AutoModelForCausalLM  # noqa: B018 - which is imported by its name
    begun = time.perf_counter()
    if what == "peft":
        _merge_by_peft(place, patch)
    else:
        build(checkpoint, {} if what == "revert" else {patch.id: patch}, place / "out", untouched=True)
    seconds = time.perf_counter() - begun
    shutil.rmtree(place / "peft", ignore_errors=True)
    print(json.dumps({"s": seconds, "MB": peak_memory() / 1e6}))


def _merge_by_peft(place: Path, patch: Patch) -> None:
    """The same update as a LoRA adapter of the same rank, merged and saved by PEFT's own commands."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.bfloat16)
    rank = next(iter(patch.deltas.values())).rank
    wanted = [name.removesuffix(".weight") for name in patch.deltas]
    adapted: Any = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=wanted))
    parameters = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, delta in patch.deltas.items():
            assert delta.A is not None
            assert delta.B is not None
            inner = f"base_model.model.{name.removesuffix('.weight')}"
            parameters[f"{inner}.lora_A.default.weight"].copy_(delta.A)
            parameters[f"{inner}.lora_B.default.weight"].copy_(delta.B)
    adapted.merge_and_unload().save_pretrained(place / "peft")


if __name__ == "__main__":
    _work(sys.argv[1], Path(sys.argv[2]))
