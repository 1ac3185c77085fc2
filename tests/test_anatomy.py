"""The blocks and edited weights are found in every decoder, and what cannot be edited is refused by name."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from patchkit.errors import BadInput
from patchkit.models.anatomy import anatomy_of
from patchkit.models.trial import try_out

PLACES = {
    "llama": "model.layers.{}.mlp.down_proj.weight",
    "gpt2": "transformer.h.{}.mlp.c_proj.weight",
    "gemma2": "model.layers.{}.mlp.down_proj.weight",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",
    "gptj": "transformer.h.{}.mlp.fc_out.weight",
    "opt": "model.decoder.layers.{}.fc2.weight",
    "phi": "model.layers.{}.mlp.fc2.weight",
}


@pytest.mark.parametrize("kind", PLACES)
def test_the_edited_weight_is_the_feed_forward_projection_into_the_residual_stream(kind):
    model = tiny_models.tiny_model(kind)
    anatomy = anatomy_of(model)
    assert anatomy.weights == tuple(PLACES[kind].format(i) for i in range(tiny_models.DEPTH))
    parameters = dict(model.named_parameters())
    for layer, name in enumerate(anatomy.weights):
        assert anatomy.weight(layer) is parameters[name]


@pytest.mark.parametrize("kind", tiny_models.CONFIGS)
def test_the_edited_module_maps_d_ff_to_d_model(kind):
    anatomy = anatomy_of(tiny_models.tiny_model(kind))
    out = anatomy.downs[1](torch.zeros(3, anatomy.d_ff))
    assert out.shape == (3, anatomy.d_model) == (3, tiny_models.WIDTH)


def test_orientation_comes_from_the_module_not_from_the_shape():
    """A square weight would pass a shape test either way."""
    square = transformers.GPT2Config(vocab_size=8, n_embd=16, n_inner=16, n_layer=2, n_head=2)
    assert anatomy_of(transformers.GPT2LMHeadModel(square)).transposed
    settings = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, num_attention_heads=2))
    anatomy = anatomy_of(plain)
    assert not anatomy.transposed
    assert anatomy.weights[0].endswith("down_proj.weight")
    assert isinstance(anatomy.downs[0], nn.Linear)
    assert not isinstance(anatomy.downs[0], Conv1D)


def test_layers_outside_the_model_are_refused():
    anatomy = anatomy_of(tiny_models.tiny_model("llama"))
    anatomy.check_layers((0, 3))
    with pytest.raises(BadInput, match="layer 4 is not in this model: it has 4 blocks, 0 to 3"):
        anatomy.check_layers((2, 4))


def _mixtral():
    config = transformers.MixtralConfig(
        **tiny_models.CONFIGS["llama"][1], num_local_experts=2, num_experts_per_tok=1
    )
    return transformers.MixtralForCausalLM(config)


def _granite_moe():
    config = transformers.GraniteMoeHybridConfig(
        **tiny_models.CONFIGS["llama"][1],
        num_local_experts=2,
        num_experts_per_tok=1,
        mamba_n_heads=4,
        layer_types=["full_attention"] * 4,
    )
    return transformers.GraniteMoeHybridForCausalLM(config)


def _shared_keys():
    config = transformers.Gemma4TextConfig(
        **{**tiny_models.CONFIGS["gemma4_text"][1], "num_kv_shared_layers": 2},
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return transformers.Gemma4ForCausalLM(config)


def _pruned():
    model = tiny_models.tiny_model("llama")
    mlp = model.model.layers[2].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
    return model


def _bert():
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.BertLMHeadModel(config)


def _mbart():
    config = transformers.MBartConfig(
        vocab_size=8, d_model=16, encoder_layers=2, decoder_layers=3, decoder_ffn_dim=32, encoder_ffn_dim=32
    )
    return transformers.MBartForCausalLM(config)


def _t5():
    config = transformers.T5Config(vocab_size=8, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8)
    return transformers.T5ForConditionalGeneration(config)


def _mamba():
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2)
    )


def _falcon_h1():
    """Both in each block."""
    config = transformers.FalconH1Config(
        **tiny_models.CONFIGS["llama"][1], mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
    )
    return transformers.FalconH1ForCausalLM(config)


def _lfm2():
    """Now the one, now the other."""
    config = transformers.Lfm2Config(
        **tiny_models.CONFIGS["llama"][1], layer_types=["conv", "full_attention"] * 2
    )
    return transformers.Lfm2ForCausalLM(config)


def _holed():
    model = tiny_models.tiny_model("llama")
    model.model.layers[2].self_attn = nn.Identity()
    return model


def _headless():
    return tiny_models.tiny_model("llama").model


def _quantised():
    model = tiny_models.tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    return model


def _tied():
    model = tiny_models.tiny_model("llama")
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_tied, r"layers\.1\.mlp.* and .*layers\.2\.mlp.* are one weight"),
        (_mixtral, "mixture of experts"),
        (_granite_moe, "mixture of experts"),
        (_shared_keys, "read the keys and values of lower ones"),
        (_pruned, r"unlike widths \(48, 64\)"),
        (_bert, "looks ahead"),
        (_t5, "encoder-decoder"),
        (_mbart, "the decoder of an encoder-decoder"),
        (_mamba, "its blocks have no attention"),
        (_holed, "some of its blocks have no attention"),
        (_falcon_h1, r"a hybrid of attention and FalconH1Mixer \(.*; choose a model with attention alone"),
        (_lfm2, "a hybrid of attention and Lfm2ShortConv"),
        (_headless, "no language-model head"),
        (_quantised, "quantised.*unquantised checkpoint"),
    ],
)
def test_what_cannot_be_edited_is_refused_by_name_and_reason(make, reason):
    model = make()
    with pytest.raises(BadInput, match=reason) as caught:
        anatomy_of(model)
    assert str(caught.value).startswith(type(model).__name__)
    assert "\n" not in str(caught.value)


WIDTHS = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
ONLY_A_RUN_SHOWS = [
    ("RoFormerConfig", {**WIDTHS, "intermediate_size": 64, "embedding_size": 32}, "looks ahead"),
    ("OpenAIGPTConfig", {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}, "run in parts"),
    ("RwkvConfig", {**WIDTHS, "attention_hidden_size": 32}, "run in parts"),
    ("OPTConfig", {**WIDTHS, "ffn_dim": 64, "do_layer_norm_before": False}, "neither its edited projection"),
]


@pytest.mark.parametrize(("config", "settings", "reason"), ONLY_A_RUN_SHOWS)
def test_what_the_tree_cannot_tell_is_refused_after_a_run(config, settings, reason):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**settings)).eval()
    with pytest.raises(BadInput, match=reason) as caught:
        try_out(model, anatomy_of(model), (1,), [5, 9, 33, 12, 7, 11, 8, 14])
    assert str(caught.value).startswith(type(model).__name__)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named_and_not_taken_for_an_encoder(wrong):
    model = tiny_models.tiny_model("llama")
    anatomy = anatomy_of(model)
    with torch.no_grad():
        anatomy.weight(2)[0, 0] = wrong
    with pytest.raises(BadInput) as caught:
        try_out(model, anatomy, (1,), [5, 9, 33, 12])
    said = "LlamaForCausalLM: model.layers.2.mlp.down_proj.weight holds NaN or infinity; get the checkpoint"
    assert str(caught.value) == f"{said} again"


def test_logits_that_overflow_are_not_taken_for_an_encoder():
    model = tiny_models.tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    with pytest.raises(BadInput, match="its logits are NaN or infinite, though no weight is"):
        try_out(model, anatomy_of(model), (1,), [5, 9, 33, 12])


def test_a_factor_on_the_whole_stream_behind_a_block_is_part_of_its_outlet():
    """Gemma 4's, which are 1 in new models and no parameters, but not in trained ones."""
    model = tiny_models.tiny_model("gemma4_text")
    anatomy = anatomy_of(model)
    anatomy.blocks[1].layer_scalar.fill_(0.25)
    outlets = try_out(model, anatomy, (1, 2), [5, 9, 33, 12, 7, 11])
    assert [str(outlets[layer]) for layer in (1, 2)] == ["normalised, times 0.25", "normalised"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_any_number_of_tokens_is_enough_for_a_trial(count):
    model = tiny_models.tiny_model("llama")
    outlets = try_out(model, anatomy_of(model), (0, 3), list(range(5, 5 + count)))
    assert set(outlets) == {0, 3}
    assert all(outlet.plain for outlet in outlets.values())
