"""``patchkit model check``: what an edit would touch, or why it cannot; nothing is written."""

from __future__ import annotations

import shutil

import pytest
import tiny_models
import transformers
from command_helpers import cli, save_checkpoint, snapshot, tiny_base
from git_helpers import git_environment

__all__ = ["cli", "git_environment"]


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
    assert "not in safetensors ('pytorch_model.bin')" in ran.err
    assert "save_pretrained it to a new folder" in ran.err
