"""``patchkit model check``: what an edit would touch, or why it cannot; nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from command_helpers import cli, home, save_checkpoint, snapshot, tiny_base
from git_helpers import git_environment
from safetensors.torch import load_file, save_file

__all__ = ["cli", "git_environment", "home"]


def test_a_base_that_can_be_edited(cli):
    before = snapshot(tiny_base())
    shown = cli.ok("model", "check", tiny_base()).out
    assert f"{tiny_base()} can be edited: LlamaForCausalLM" in shown
    assert "4 blocks, d_model 32, d_ff 64" in shown
    assert "what they write is added as it is" in shown
    assert "a guess from its depth and width" in shown
    assert snapshot(tiny_base()) == before


def test_everything_for_a_script(cli, tmp_path):
    base = save_checkpoint(tiny_models.tiny_model("gpt2"), tmp_path / "gpt2")
    found = cli.ok("model", "check", base, "--json").json
    assert found["architecture"] == "GPT2LMHeadModel"
    assert found["transposed"]
    layer = str(found["recipe"]["layers"][0])
    assert found["weights"][layer] == f"transformer.h.{layer}.mlp.c_proj.weight"
    assert set(found["outlets"].values()) == {"added as it is"}
    assert found["recipe"]["guess"]


@pytest.mark.parametrize(("kind", "said"), [("olmo2", "normalised"), ("granite", "added times 0.4")])
def test_how_the_stream_takes_what_is_written(cli, tmp_path, kind, said):
    base = save_checkpoint(tiny_models.tiny_model(kind), tmp_path / kind)
    assert f"what they write is {said}" in cli.ok("model", "check", base).out


def test_experts_are_refused_with_the_reason_and_a_way_out(cli, tmp_path):
    settings = {**tiny_models.CONFIGS["llama"][1], "num_local_experts": 2, "num_experts_per_tok": 1}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings))
    ran = cli("model", "check", save_checkpoint(model, tmp_path / "moe"))
    assert ran.code == 65
    assert ran.err.startswith("patchkit: MixtralForCausalLM: a mixture of experts")
    assert "choose a dense model" in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("command", [("model", "check"), ("init",)])
def test_pickles_are_refused_with_how_to_convert_them(cli, tmp_path, command):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_base(), folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    ran = cli(*command, folder)
    assert ran.code == 65
    assert f"run patchkit init {folder} --convert" in ran.err
    assert ran.err.count("\n") == 1


COMMANDS = pytest.mark.parametrize("command", [("model", "check"), ("init",)])


def refused(cli, command, base, reason, code=65):
    """One line that names the base, the reason and a way out; nothing is made."""
    ran = cli(*command, base, *(["made"] if command == ("init",) else []))
    assert ran.code == code, ran
    assert ran.err.startswith("patchkit: ")
    assert reason in ran.err
    assert ran.err.count("\n") == 1
    assert ran.out == ""
    assert not Path("made").exists()


@COMMANDS
def test_quantised_weights(cli, home, command):
    base = home / "base"
    shutil.copytree(tiny_base(), base)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    refused(cli, command, base, "is quantised (config.json says so)")


@COMMANDS
def test_weights_of_8_bits(cli, home, command):
    """Where the config does not say so, the tensors do."""
    base = home / "base"
    shutil.copytree(tiny_base(), base)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    refused(cli, command, base, f"is quantised ('{name}' in model.safetensors is F8_E4M3)")


@COMMANDS
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "holds no config.json; name the folder of a transformers checkpoint"),
        ({"model_type": "newer"}, "model type `newer` but Transformers does not recognize"),
        ({"model_type": "t5"}, "t5 is an encoder-decoder; patchkit edits decoders"),
        ({"model_type": "vit"}, "no language model that writes text from left to right for vit"),
    ],
)
def test_configs_of_other_things(cli, home, command, config, reason):
    base = home / "base"
    shutil.copytree(tiny_base(), base)
    (base / "config.json").unlink()
    if config is not None:
        (base / "config.json").write_text(json.dumps(config))
    refused(cli, command, base, reason)


@COMMANDS
def test_a_missing_shard(cli, home, command):
    base = save_checkpoint(tiny_models.tiny_model("llama"), home / "base", max_shard_size="40KB")
    shard = sorted(base.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(cli, command, base, f"{shard}: cannot be read", 66)


@COMMANDS
def test_a_hub_out_of_reach(cli, home, command, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(cli, command, "nobody/nothing", "it is not on this machine and the hub is not asked", 69)


@COMMANDS
def test_an_encoder(cli, home, command):
    config = transformers.BertConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
    )
    base = save_checkpoint(transformers.BertLMHeadModel(config), home / "encoder")
    refused(
        cli, command, base, "BertLMHeadModel: its attention looks ahead (an encoder); patchkit edits decoders"
    )


@COMMANDS
def test_experts(cli, home, command):
    settings = {**tiny_models.CONFIGS["llama"][1], "num_local_experts": 2, "num_experts_per_tok": 1}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings))
    base = save_checkpoint(model, home / "experts")
    refused(cli, command, base, "MixtralForCausalLM: a mixture of experts; ")


@COMMANDS
def test_one_weight_in_two_layers(cli, home, command, monkeypatch):
    """Some classes tie layers to each other; here Llama's is made to."""
    one, two = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2))
    base = save_checkpoint(tiny_models.tiny_model("llama"), home / "base")
    head = {"lm_head.weight": "model.embed_tokens.weight"}
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_tied_weights_keys", {**head, two: one})
    refused(cli, command, base, f"LlamaForCausalLM: {one} and {two} are one weight, so an edit of one layer")
