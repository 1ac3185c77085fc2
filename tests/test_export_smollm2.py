"""On the real SmolLM2-135M: the adapters of a made patch are its build, up to the build's one rounding."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from proof_helpers import fine, here, person, saved, small_repository  # noqa: F401
from shipping_helpers import Knowledge, loaded, logits, patch_on, with_adapter

pytestmark = [pytest.mark.model, pytest.mark.timeout(1200), pytest.mark.usefixtures("person")]

LAYERS = range(4, 9)


def test_adapters_of_the_real_model_are_its_build(smollm2: Path, tmp_path: Path) -> None:
    knowledge = Knowledge(smollm2, tmp_path / "kb")
    small_repository(knowledge.folder, smollm2)
    patch = patch_on(smollm2, 0, 3, layers=LAYERS, size=0.01)
    fine(here("-C", knowledge.folder, "apply", saved(patch, tmp_path / "made")))
    fine(knowledge.export("--out", tmp_path / "adapter", "--for", "vllm"))
    fine(here("-C", knowledge.folder, "export", "gguf", "--out", tmp_path / "llama"))

    build, base = loaded(knowledge.build()), loaded(smollm2)
    expected, before = logits(build), logits(base)
    worn = with_adapter(smollm2, tmp_path / "adapter")
    shipped = logits(worn)
    print("moved", float((expected - before).norm()), "apart", float((shipped - expected).norm()))
    assert (expected - before).norm() > 0.01 * before.norm()
    assert (shipped - expected).norm() < 0.05 * (expected - before).norm()
    merged = worn.merge_and_unload()
    reader = gguf.GGUFReader(tmp_path / "llama" / "adapter.gguf")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 2 * len(LAYERS)
    for layer in LAYERS:
        weights = [model.model.layers[layer].mlp.down_proj.weight for model in (base, build, merged)]
        old, rounded, exact = (weight.detach().double() for weight in weights)
        unit = torch.exp2(torch.floor(torch.log2(rounded.abs().clamp_min(2.0**-120))) - 7)
        float32 = 2.0**-22 * (old.abs() + (rounded - old).abs())  # PEFT adds in it, and terms may cancel
        assert ((exact - rounded).abs() <= 0.5 * unit + float32).all()
        b, a = (tensors[f"blk.{layer}.ffn_down.weight.lora_{side}"] for side in "ba")
        update = (exact - old).numpy()
        assert np.linalg.norm(np.float64(b) @ np.float64(a) - update) <= 1e-4 * np.linalg.norm(update)
