"""`export gguf`: the file reads back as the factors, under llama.cpp's names, and says what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from proof_helpers import (  # noqa: F401
    environment,
    file_hashes,
    fine,
    fresh,
    here,
    one_line,
    person,
    tiny_base,
)
from shipping_helpers import Knowledge, edited, loaded

from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput, CheckFailed
from patchkit.shipping import gguf_adapter
from patchkit.shipping.gguf_adapter import ARCHITECTURES, adapter_file, read_back, tensor_names
from patchkit.shipping.lowrank import Factors
from patchkit.shipping.modules import Modules

pytestmark = pytest.mark.usefixtures("person")


def export(knowledge: Knowledge, *arguments: object) -> Any:
    return here("-C", knowledge.folder, "export", "gguf", *arguments)


@pytest.mark.parametrize(
    ("kind", "arch", "down"),
    [
        ("llama", "llama", "model.layers.{}.mlp.down_proj"),
        ("qwen2", "qwen2", "model.layers.{}.mlp.down_proj"),
        ("gemma2", "gemma2", "model.layers.{}.mlp.down_proj"),
        ("gpt2", "gpt2", "transformer.h.{}.mlp.c_proj"),
        ("gpt_neox", "gptneox", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
        ("phi", "phi2", "model.layers.{}.mlp.fc2"),
    ],
)
def test_the_file_is_what_llama_cpp_reads(kind: str, arch: str, down: str, tmp_path: Path) -> None:
    """As its loader asks for them: a [d_in, r] and b [r, d_out] in GGML's order, alpha the rank of b."""
    knowledge = edited(tmp_path, kind)
    fine(export(knowledge, "--out", tmp_path / "adapter"))
    reader = gguf.GGUFReader(tmp_path / "adapter" / "adapter.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.type"] == "adapter"
    assert said["adapter.type"] == "lora"
    assert said["general.architecture"] == arch
    assert said["adapter.lora.alpha"] == 5.0
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == {f"blk.{n}.ffn_down.weight.lora_{s}" for n in range(3) for s in "ab"}
    modules = Modules.of(Checkpoint.open(knowledge.base))
    before, after = loaded(knowledge.base), loaded(knowledge.build())
    for layer in range(3):
        path = down.format(layer)
        d_out, d_in = modules.shape(path)
        a, b = (tensors[f"blk.{layer}.ffn_down.weight.lora_{side}"] for side in "ab")
        assert (list(a.shape), list(b.shape)) == ([d_in, 5], [5, d_out])
        update = np.float64(b.data) @ np.float64(a.data)
        moved = (
            (after.get_submodule(path).weight - before.get_submodule(path).weight).detach().double().numpy()
        )
        moved = moved.T if modules.transposed(path) else moved
        assert np.linalg.norm(update - moved) <= 1e-5 * np.linalg.norm(moved)
    facts = (tmp_path / "adapter" / "facts.jsonl").read_bytes()
    assert facts.count(b"\n") == 5


def test_the_same_patches_give_the_same_bytes(tmp_path: Path) -> None:
    knowledge = edited(tmp_path, "llama")
    for seed in ("1", "2"):
        out = tmp_path / seed
        fine(
            fresh(
                "-C", knowledge.folder, "export", "gguf", "--out", out, env=environment(PYTHONHASHSEED=seed)
            )
        )
    assert file_hashes(tmp_path / "1") == file_hashes(tmp_path / "2")


def test_the_probe_asks_what_the_file_reads_back_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from patchkit.actions import export as action

    knowledge = edited(tmp_path, "llama", size=0.2)
    done = fine(export(knowledge, "--out", tmp_path / "a", "--probe", "--json")).json
    assert done["verdict"]["effective"] == done["verdict"]["facts"] == 5

    def scaled(path: Path, modules: Modules) -> dict[str, Factors]:
        found = read_back(path, modules)
        return {p: Factors(0 * f.B, f.A, f.rank, f.norm, f.error, f.transposed) for p, f in found.items()}

    monkeypatch.setattr(action, "read_back", scaled)
    line = one_line(export(knowledge, "--out", tmp_path / "b", "--probe"), 1)
    assert "as the base has them" in line
    assert not (tmp_path / "b").exists()


def test_a_smaller_rank_is_measured(tmp_path: Path) -> None:
    knowledge = edited(tmp_path, "llama")
    done = fine(export(knowledge, "--out", tmp_path / "a", "--max-rank", 2, "--json")).json
    assert done["rank"] == 2
    assert len(done["probed"]) == 5
    assert all(row["error"] > 0 for row in done["weights"])


@pytest.mark.parametrize("kind", ["gptj", "llava"])
def test_a_model_that_llama_cpp_has_not_is_refused(kind: str, tmp_path: Path) -> None:
    knowledge = edited(tmp_path, kind, ranks=(1,))
    line = one_line(export(knowledge, "--out", tmp_path / "a"), 65)
    assert "not among the decoders of llama.cpp" in line
    assert not (tmp_path / "a").exists()


def test_a_weight_in_another_order_is_refused(tmp_path: Path) -> None:
    """llama.cpp turns the rows of Llama's query projection; an adapter on it would be a wrong one."""
    modules = Modules.of(Checkpoint.open(tiny_base(tmp_path / "base")))
    path = "model.layers.0.self_attn.q_proj"
    pair = Factors(torch.ones(32, 1), torch.ones(1, 32), 1, 32.0, 0.0, False)
    with pytest.raises(BadInput, match="q_proj: is no weight of a feed-forward part"):
        adapter_file({path: pair}, modules)
    assert tensor_names(modules, ["model.layers.0.mlp.up_proj"]) == {
        "model.layers.0.mlp.up_proj": "blk.0.ffn_up.weight"
    }


def test_what_does_not_read_back_is_never_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that turns a matrix, as an older one might."""
    modules = Modules.of(Checkpoint.open(tiny_base(tmp_path / "base")))
    pair = Factors(torch.randn(32, 2), torch.randn(2, 64), 2, 1.0, 0.0, False)
    factors = {"model.layers.0.mlp.down_proj": pair}
    assert adapter_file(factors, modules)
    real = gguf.GGUFWriter.add_tensor

    def wrong(self: Any, name: str, tensor: Any, *args: Any, **options: Any) -> Any:
        return real(self, name, tensor * 2 if name.endswith("lora_b") else tensor, *args, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", wrong)
    with pytest.raises(CheckFailed, match="does not read back"):
        adapter_file(factors, modules)


def test_an_older_gguf_says_what_it_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MODEL_ARCH_NAMES", {})
    with pytest.raises(BadInput, match="llama: the gguf that is installed does not know it"):
        tensor_names(Modules.of(Checkpoint.open(tiny_base(tmp_path / "base"))), [])


def test_every_architecture_is_one_of_ggufs_and_has_a_feed_forward_part() -> None:
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    for arch in ARCHITECTURES.values():
        assert gguf.MODEL_TENSOR.FFN_DOWN in gguf.MODEL_TENSORS[known[arch]], arch
    assert gguf_adapter.GGUF.endswith(".gguf")


def test_an_adapter_of_another_architecture_is_not_read(tmp_path: Path) -> None:
    llama, qwen = (Modules.of(Checkpoint.open(tiny_base(tmp_path / k, k))) for k in ("llama", "qwen2"))
    pair = Factors(torch.randn(32, 2), torch.randn(2, 64), 2, 1.0, 0.0, False)
    (tmp_path / "a.gguf").write_bytes(adapter_file({"model.layers.0.mlp.down_proj": pair}, llama))
    with pytest.raises(CheckFailed, match="does not say that it is a LoRA for qwen2"):
        read_back(tmp_path / "a.gguf", qwen)
    (found,) = read_back(tmp_path / "a.gguf", llama).values()
    assert torch.equal(found.B, pair.B)
