"""``patchkit model check``: what an edit would touch, or why it cannot; nothing is written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import tiny_models
import torch
import transformers
from command_helpers import cli, home, save_checkpoint, snapshot, tiny_base
from git_helpers import git_environment
from safetensors.torch import load_file, save_file

import patchkit
from patchkit.editing import written
from patchkit.errors import BadInput
from patchkit.models.loading import load_model

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
def test_pickles_are_refused_with_how_to_convert_them(cli, tmp_path, command):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_base(), folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    ran = cli(*command, folder)
    assert ran.code == 65
    assert f"run patchkit init {folder} --convert" in ran.err
    assert ran.err.count("\n") == 1


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


DOWN = "model.layers.1.mlp.down_proj.weight"
INEXACT = [
    (torch.int8, f"is quantised ('{DOWN}' in model.safetensors is I8)", "use the float32, float16"),
    (torch.float64, f"'{DOWN}' is stored as F64; only float32", "save_pretrained it to a new folder"),
]


def stored_in(dtype, folder, names=(DOWN,)):
    """The tiny base with some tensors stored in another dtype."""
    shutil.copytree(tiny_base(), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.update({name: tensors[name].to(dtype) for name in names})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@COMMANDS
@pytest.mark.parametrize(("dtype", "reason", "way_out"), INEXACT)
def test_edited_weights_in_a_dtype_that_no_sum_is_rounded_to(cli, home, command, dtype, reason, way_out):
    base = stored_in(dtype, home / "base")
    refused(cli, command, base, reason)
    assert way_out in cli(*command, base).err


@COMMANDS
def test_weights_in_such_a_dtype_that_are_not_edited_are_no_matter(cli, home, command):
    cli.ok(*command, stored_in(torch.float64, home / "base", ["model.norm.weight"]))


@pytest.mark.parametrize(("dtype", "reason", "way_out"), INEXACT)
def test_commit_refuses_them_alike_before_it_computes(cli, home, monkeypatch, dtype, reason, way_out):
    """A base that came into patchkit.toml before init looked at its weights, or layers that init did not."""
    base = stored_in(dtype, home / "base")
    with monkeypatch.context() as older:
        older.setattr("patchkit.actions.init.edited_weights", lambda *_: {})
        cli.ok("init", base, "made")
    monkeypatch.setattr("patchkit.actions.commit.text_and_statistics", lambda *_: pytest.fail("computed"))
    before = snapshot(home / "made")
    ran = cli("-C", "made", "commit", "--fact", "Ann | {} lies in | Rome")
    assert ran.code == 65, ran
    assert reason in ran.err
    assert way_out in ran.err
    assert ran.err.count("\n") == 1
    assert snapshot(home / "made") == before


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


def encoder(folder):
    config = transformers.BertConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
    )
    return save_checkpoint(transformers.BertLMHeadModel(config), folder)


def experts(folder):
    settings = {**tiny_models.CONFIGS["llama"][1], "num_local_experts": 2, "num_experts_per_tok": 1}
    return save_checkpoint(transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings)), folder)


def hybrid(folder):
    """transformers tells how to install kernels for it as soon as it runs."""
    config = transformers.FalconH1Config(
        **tiny_models.CONFIGS["llama"][1], mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
    )
    return save_checkpoint(transformers.FalconH1ForCausalLM(config), folder)


@COMMANDS
def test_an_encoder(cli, home, command):
    reason = "BertLMHeadModel: its attention looks ahead (an encoder); patchkit edits decoders"
    refused(cli, command, encoder(home / "encoder"), reason)


@COMMANDS
def test_experts(cli, home, command):
    base = experts(home / "experts")
    refused(cli, command, base, "MixtralForCausalLM: a mixture of experts; ")
    assert "choose a dense model" in cli(*command, base).err


def norms_over_the_sum(folder):
    """OPT-350M's form, of which the module tree tells nothing."""
    settings = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.OPTConfig(**settings, ffn_dim=64, do_layer_norm_before=False)
    return save_checkpoint(transformers.OPTForCausalLM(config), folder)


def test_what_only_a_run_shows_is_refused_before_a_base_writes_text(cli, home, monkeypatch):
    """Or minutes would go by for a model that cannot be edited."""
    monkeypatch.setattr(written, "write_templates", lambda *_, **__: pytest.fail("it writes"))
    monkeypatch.setattr(written, "write_text", lambda *_, **__: pytest.fail("it writes"))
    base = norms_over_the_sum(home / "base")
    cli.ok("init", base, "kb")
    told = cli("commit", "-C", "kb", "--fact", "Ann | {} lies in | Rome")
    assert told.code == 65
    assert "neither its edited projection's output nor a norm of it" in told.err
    model, tokenizer = load_model(base, "cpu")
    with pytest.raises(BadInput, match="neither its edited projection"):
        patchkit.edit(model, tokenizer, [{"subject": "Ann", "prompt": "{} lies in", "target": "Rome"}])


def test_init_leaves_to_other_editors_what_memit_cannot_edit(cli, home, monkeypatch):
    monkeypatch.setattr("patchkit.actions.init.foreign_editors", lambda: {"of-experts"})
    cli.ok("init", experts(home / "experts"), "made")


def copied(folder, **changes):
    """The tiny base with another config.json."""
    shutil.copytree(tiny_base(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@COMMANDS
@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "Qwen2ForRewardModel"])
def test_a_classifier_whose_embeddings_would_pass_for_a_head(cli, home, command, kind):
    base = copied(home / "base", architectures=[kind])
    refused(
        cli, command, base, f"{base}: is a {kind}, which was trained to label texts and not to write them; "
    )


def test_a_checkpoint_without_a_head(cli, home):
    model = tiny_models.tiny_model("qwen3")
    base = save_checkpoint(model.model, home / "base")
    reason = (
        f"{base}: has no language-model head (lm_head.weight), so it writes no text; name the checkpoint of"
    )
    refused(cli, ("model", "check"), base, f"{reason} the Qwen3ForCausalLM")
    tensors = load_file(base / "model.safetensors")
    del tensors["norm.weight"]  # then it is not the head's lack alone
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    refused(cli, ("model", "check"), base, "the checkpoint lacks lm_head.weight; get it again, whole")


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2"]
)  # of the second, transformers makes a tokenizer of one word
def test_a_checkpoint_without_a_tokenizer(cli, home, kind):
    base = save_checkpoint(tiny_models.tiny_model(kind), home / "base")
    (base / "tokenizer.json").unlink()
    reason = (
        "holds no tokenizer; put its model's tokenizer.json and tokenizer_config.json beside the weights\n"
    )
    refused(cli, ("model", "check"), base, f"{base}: {reason}")


def test_what_transformers_says_at_length_is_cut_between_words_and_leaves_room_for_a_way_out(
    cli, home, monkeypatch
):
    def say(*_args, **_options):
        raise ValueError("A long\nword. " * 40)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", say)
    reason = f"{tiny_base()}: transformers cannot load it: A long word. A long"
    refused(cli, ("model", "check"), tiny_base(), reason)
    said = cli("model", "check", tiny_base()).err
    assert said.endswith(" …; use its model's fast tokenizer (tokenizer.json)\n")
    assert said.rpartition(" …")[0].rpartition(" ")[2] in ("A", "long", "word.")


@COMMANDS
def test_an_adapter_beside_the_weights(cli, home, command):
    """transformers would put it on the weights that it loads, so these would not be the files'."""
    base = adapted(home / "base")
    refused(cli, command, base, f"{base}: holds a PEFT adapter (adapter_config.json); name the base itself")
    (base / "config.json").unlink()
    refused(cli, command, base, "holds a PEFT adapter")


def adapted(folder):
    shutil.copytree(tiny_base(), folder)
    model, _ = load_model(folder, "cpu")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"])).save_pretrained(folder)
    return folder


def test_what_transformers_makes_of_an_adapter_beside_the_weights(tmp_path):
    """Why it is refused: the weights have other names then, and another output."""
    model = transformers.AutoModelForCausalLM.from_pretrained(adapted(tmp_path / "base"))
    assert any(".base_layer." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("way", ["check", "init"])
def test_weights_of_another_shape(cli, home, way):
    """``init`` reads no weights; what edits says it, and ``model check`` before."""
    base = home / "base"
    shutil.copytree(tiny_base(), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    if way == "init":
        cli.ok("init", base, "made")
        return
    refused(
        cli, ("model", "check"), base, "[32, 64] in the files, but config.json makes it [32, 48]; get the"
    )


_EACH = """
import json, sys
from patchkit.commands import main
for line in json.loads(sys.argv[1]):
    main(line)
"""


def test_nothing_stands_beside_the_one_line(home):
    """A process of its own, since what transformers says goes to the standard error of the process."""
    bases = {"encoder": encoder(home / "encoder"), "experts": experts(home / "experts")}
    bases["whole"] = tiny_base()
    for name, config in (("t5", {"model_type": "t5"}), ("newer", {"model_type": "newer"})):
        bases[name] = home / name
        shutil.copytree(tiny_base(), bases[name])
        (bases[name] / "config.json").write_text(json.dumps(config))
    bases["shards"] = save_checkpoint(tiny_models.tiny_model("llama"), home / "shards", max_shard_size="40KB")
    sorted(bases["shards"].glob("model-*.safetensors"))[1].unlink()
    bases["pickled"] = home / "pickled"
    shutil.copytree(tiny_base(), bases["pickled"])
    (bases["pickled"] / "model.safetensors").rename(bases["pickled"] / "pytorch_model.bin")
    bases["adapted"] = adapted(home / "adapted")
    bases["hybrid"] = hybrid(home / "hybrid")
    lines = [line for base in bases.values() for line in (["model", "check", base], ["init", base, "made"])]
    done = subprocess.run(
        [sys.executable, "-c", _EACH, json.dumps(lines, default=str)],
        capture_output=True,
        text=True,
        cwd=home,
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert [line for line in said if not line.startswith("patchkit: ")] == []
    assert len(said) == 2 * (len(bases) - 1)


@COMMANDS
def test_one_weight_in_two_layers(cli, home, command, monkeypatch):
    """Some classes tie layers to each other; here Llama's is made to."""
    one, two = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2))
    head = {"lm_head.weight": "model.embed_tokens.weight"}
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_tied_weights_keys", {**head, two: one})
    base = save_checkpoint(tiny_models.tiny_model("llama"), home / "base")
    refused(cli, command, base, f"LlamaForCausalLM: {one} and {two} are one weight, so an edit of one layer")
