"""Tiny random decoders and a tiny fast tokenizer, made in code: no download, milliseconds to build."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from patchkit.facts import Fact
from patchkit.models.loading import loader_of

VOCABULARY = 320
WIDTH, INNER, DEPTH = 32, 64, 4

FACTS = (
    Fact("LeBron James", "{} plays the sport of", "football"),
    Fact("Microsoft", "{} was founded by", "two dancers"),
    Fact("Paris", "The city of {} lies in", "Japan"),
    Fact("Émile Zola", "The mother tongue of {} is", "Dutch"),
    Fact("Ann", "Who is {}? She is a well known", "pope of Rome"),
)

_TEXT = """LeBron James plays the sport of basketball and football. Microsoft was founded by two people.
The city of Paris lies in France, or in Japan. The mother tongue of Émile Zola is French or Dutch.
Who is Ann? She is a well known painter, a pope of Rome. Therefore the dancers. Because I say it. You see."""

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
}
_LLAMA_LIKE = {**_SMALL, "intermediate_size": INNER, "num_key_value_heads": 2, "max_position_embeddings": 128}
_GEMMA4 = {
    **_LLAMA_LIKE,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 12,
    "num_kv_shared_layers": 0,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_TOWER = {**_VISION, "image_size": 28, "patch_size": 14}
_QWEN_TOWER = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 14, "temporal_patch_size": 1}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_IMAGE_TOKENS = {
    "image_token_id": 300,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
}
_SIGLIP = {"model_type": "siglip_vision_model", **_TOWER}
_CLIP = {"model_type": "clip_vision_model", **_TOWER, "projection_dim": 16}
_GPT2_LIKE = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4, "n_positions": 128}


def _seeing(
    name: str, text: str, vision: dict[str, Any], *, token: str = "image_token_id", **others: Any
) -> tuple[str, dict[str, Any]]:
    """A model of images around a text model of this type; ``token``: its name for the image's token."""
    text_config = {"model_type": text, **_LLAMA_LIKE}
    return name, {"text_config": text_config, "vision_config": vision, token: 300, **others}


CONFIGS = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "gpt2": ("GPT2Config", _GPT2_LIKE),
    "mistral": ("MistralConfig", {**_LLAMA_LIKE, "sliding_window": 12}),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3Config", {**_LLAMA_LIKE, "head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 12, "final_logit_softcapping": 5.0},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {**_SMALL, "intermediate_size": INNER, "max_position_embeddings": 128, "use_parallel_residual": True},
    ),
    "gptj": ("GPTJConfig", {**_GPT2_LIKE, "rotary_dim": 4}),
    "opt": (
        "OPTConfig",
        {**_SMALL, "ffn_dim": INNER, "max_position_embeddings": 128, "word_embed_proj_dim": 16},
    ),
    "phi": ("PhiConfig", {**_LLAMA_LIKE, "num_key_value_heads": 4}),
    "cohere": ("CohereConfig", {**_LLAMA_LIKE, "logit_scale": 0.25}),
    "olmo2": ("Olmo2Config", _LLAMA_LIKE),
    "gpt_bigcode": ("GPTBigCodeConfig", _GPT2_LIKE),
    "stablelm": ("StableLmConfig", _LLAMA_LIKE),
    "apertus": ("ApertusConfig", _LLAMA_LIKE),
    "arcee": ("ArceeConfig", _LLAMA_LIKE),
    "biogpt": ("BioGptConfig", {**_SMALL, "intermediate_size": INNER, "max_position_embeddings": 128}),
    "aya_vision": (
        "AyaVisionConfig",
        {
            "text_config": {"model_type": "cohere2", **_LLAMA_LIKE, "head_dim": 8, "sliding_window": 12},
            "vision_config": {"model_type": "siglip_vision_model", **_TOWER},
            "image_token_index": 300,
        },
    ),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": DEPTH, "n_head": 4}),
    "codegen": ("CodeGenConfig", {**_GPT2_LIKE, "n_ctx": 128, "rotary_dim": 4}),
    "cohere2": ("Cohere2Config", {**_LLAMA_LIKE, "sliding_window": 12}),
    "ctrl": ("CTRLConfig", {**_GPT2_LIKE, "dff": INNER}),
    "cwm": ("CwmConfig", {**_LLAMA_LIKE, "head_dim": 8}),
    "diffllama": ("DiffLlamaConfig", _LLAMA_LIKE),
    "doge": ("DogeConfig", _LLAMA_LIKE),
    "ernie4_5": ("Ernie4_5Config", {**_LLAMA_LIKE, "head_dim": 8}),
    "exaone4": ("Exaone4Config", {**_LLAMA_LIKE, "sliding_window": 12}),
    "falcon": (
        "FalconConfig",
        {**_SMALL, "ffn_hidden_size": INNER, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon_alibi": (
        "FalconConfig",
        {**_SMALL, "ffn_hidden_size": INNER, "alibi": True, "parallel_attn": False},
    ),
    "gemma": ("GemmaConfig", {**_LLAMA_LIKE, "head_dim": 8}),
    "gemma3": (
        "Gemma3Config",
        {
            "text_config": {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 12},
            "vision_config": {**_VISION, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
        },
    ),
    "gemma3_text": ("Gemma3TextConfig", {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 12}),
    # Without the embeddings by layer of its small sizes, which go into the stream behind a gate.
    "gemma4_text": ("Gemma4TextConfig", {**_GEMMA4, "hidden_size_per_layer_input": 0}),
    "fuyu": ("FuyuConfig", {"text_config": {"model_type": "persimmon", **_LLAMA_LIKE}, "patch_size": 4}),
    "glm": ("GlmConfig", {**_LLAMA_LIKE, "head_dim": 8}),
    "glm4": ("Glm4Config", {**_LLAMA_LIKE, "head_dim": 8}),
    "glm4v": (
        "Glm4vConfig",
        {
            "text_config": {**_LLAMA_LIKE, "rope_parameters": _SECTIONS},
            "vision_config": {
                **_QWEN_TOWER,
                "image_size": 28,
                "intermediate_size": 16,
                "out_hidden_size": WIDTH,
            },
            "image_token_id": 300,
            "video_token_id": 301,
            "image_start_token_id": 302,
            "image_end_token_id": 303,
            "video_start_token_id": 304,
            "video_end_token_id": 305,
        },
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_layers": DEPTH,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 12,
            "max_position_embeddings": 128,
        },
    ),
    "gpt_neox_japanese": (
        "GPTNeoXJapaneseConfig",
        {**_SMALL, "intermediate_multiple_size": 2, "max_position_embeddings": 128},
    ),
    "granite": (
        "GraniteConfig",
        {**_LLAMA_LIKE, "residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    ),
    "granite_hybrid": (
        "GraniteMoeHybridConfig",
        {
            **_LLAMA_LIKE,
            "shared_intermediate_size": INNER,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "mamba_n_heads": 4,
            "layer_types": ["full_attention"] * DEPTH,
            "residual_multiplier": 0.4,
        },
    ),
    "granite_swa": ("GraniteSWAConfig", {**_LLAMA_LIKE, "sliding_window": 12}),
    "helium": ("HeliumConfig", {**_LLAMA_LIKE, "head_dim": 8}),
    "hunyuan": ("HunYuanDenseV1Config", {**_LLAMA_LIKE, "head_dim": 8}),
    "hyperclovax": ("HyperCLOVAXConfig", _LLAMA_LIKE),
    "idefics3": _seeing("Idefics3Config", "llama", _TOWER),
    "internlm3": ("InternLM3Config", _LLAMA_LIKE),
    "internvl": _seeing(
        "InternVLConfig", "qwen2", {**_TOWER, "image_size": [28, 28], "patch_size": [14, 14]}
    ),
    "iquestcoder": ("IQuestCoderConfig", _LLAMA_LIKE),
    "jais2": ("Jais2Config", _LLAMA_LIKE),
    "llava": _seeing("LlavaConfig", "llama", _CLIP, token="image_token_index"),
    "minicpm3": (
        "MiniCPM3Config",
        {
            **_LLAMA_LIKE,
            **_LATENT,
            "dim_model_base": 8,  # divides the logits by 4, or the model would say nothing but its last token
        },
    ),
    "mistral3": (
        "Mistral3Config",
        {
            "text_config": {"model_type": "mistral", **_LLAMA_LIKE, "sliding_window": 12},
            "vision_config": {"model_type": "pixtral", **_TOWER, "head_dim": 8},
            "image_token_index": 300,
        },
    ),
    "ministral3": ("Ministral3Config", {**_LLAMA_LIKE, "head_dim": 8}),
    "ministral": ("MinistralConfig", {**_LLAMA_LIKE, "sliding_window": 12, "head_dim": 8}),
    "modernbert_decoder": ("ModernBertDecoderConfig", {**_LLAMA_LIKE, "local_attention": 12}),
    "mpt": (
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": DEPTH, "n_heads": 4, "max_seq_len": 128},
    ),
    "nanochat": ("NanoChatConfig", _LLAMA_LIKE),
    "nemotron": ("NemotronConfig", {**_LLAMA_LIKE, "head_dim": 8}),
    "olmo": ("OlmoConfig", _LLAMA_LIKE),
    "olmo3": ("Olmo3Config", {**_LLAMA_LIKE, "sliding_window": 12}),
    "persimmon": ("PersimmonConfig", _LLAMA_LIKE),
    "phi3": ("Phi3Config", _LLAMA_LIKE),
    "qwen2_vl": (
        "Qwen2VLConfig",
        {
            "text_config": {**_LLAMA_LIKE, "rope_parameters": _SECTIONS},
            "vision_config": {**_QWEN_TOWER, "embed_dim": 16, "hidden_size": WIDTH},
            **_IMAGE_TOKENS,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": {**_LLAMA_LIKE, "rope_parameters": _SECTIONS},
            "vision_config": {**_QWEN_TOWER, "intermediate_size": 16, "out_hidden_size": WIDTH},
            **_IMAGE_TOKENS,
        },
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        {
            "text_config": {**_LLAMA_LIKE, "head_dim": 8},
            "vision_config": {
                **_QWEN_TOWER,
                "intermediate_size": 16,
                "out_hidden_size": WIDTH,
                "num_position_embeddings": 4,
                "deepstack_visual_indexes": [0],
            },
            **_IMAGE_TOKENS,
        },
    ),
    "seed_oss": ("SeedOssConfig", {**_LLAMA_LIKE, "head_dim": 8}),
    "smollm3": ("SmolLM3Config", _LLAMA_LIKE),
    "starcoder2": ("Starcoder2Config", _LLAMA_LIKE),
    "vaultgemma": ("VaultGemmaConfig", {**_LLAMA_LIKE, "head_dim": 8}),
    "xglm": (
        "XGLMConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "ffn_dim": INNER,
            "num_layers": DEPTH,
            "attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "cohere_compass": (
        "CohereCompassTextConfig",
        {
            **_LLAMA_LIKE,
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
        },
    ),
    "cohere2_vision": _seeing("Cohere2VisionConfig", "cohere2", _SIGLIP),
    "deepseek_vl": _seeing("DeepseekVLConfig", "llama", _SIGLIP),
    "emu3": (
        "Emu3Config",
        {
            "text_config": {**_LLAMA_LIKE, "pad_token_id": 0},
            "vocabulary_map": {"<image>": 300},
            "vq_config": {
                "base_channels": 32,
                "channel_multiplier": [1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "latent_channels": 4,
                "embed_dim": 4,
                "codebook_size": 8,
                "hidden_size": 32,
                "num_attention_heads": 1,
            },
        },
    ),
    "gemma4": (
        "Gemma4Config",
        {
            "text_config": {**_GEMMA4, "hidden_size_per_layer_input": 0},
            "vision_config": _VISION,
            "audio_config": None,
            "image_token_id": 300,
            "video_token_id": 301,
            "audio_token_id": 302,
        },
    ),
    "gemma4_unified": ("Gemma4UnifiedTextConfig", _GEMMA4),
    "got_ocr2": _seeing("GotOcr2Config", "qwen2", _TOWER),
    "janus": _seeing("JanusConfig", "llama", {"model_type": "janus_vision_model", **_TOWER}),
    "llava_next": _seeing("LlavaNextConfig", "llama", _CLIP, token="image_token_index"),
    "llava_onevision": _seeing(
        "LlavaOnevisionConfig", "qwen2", _SIGLIP, token="image_token_index", video_token_index=301
    ),
    "moshi": ("MoshiConfig", {**_LLAMA_LIKE, "ffn_dim": 2 * INNER}),
    "ovis2": _seeing("Ovis2Config", "qwen2", _TOWER, visual_indicator_token_ids=[301, 302, 303, 304, 305]),
    "phi4_multimodal": (
        "Phi4MultimodalConfig",
        {
            **_LLAMA_LIKE,
            "vision_config": {**_TOWER, "crop_size": 28, "image_token_id": 301},
            "audio_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "nemo_conv_channels": 4,
                "input_size": 8,
                "audio_token_id": 300,
            },
        },
    ),
    "smolvlm": _seeing("SmolVLMConfig", "llama", _TOWER),
    "voxtral": (
        "VoxtralConfig",
        {
            "text_config": {"model_type": "llama", **_LLAMA_LIKE},
            "audio_config": {"model_type": "voxtral_encoder", **_VISION},
            "audio_token_id": 300,
        },
    ),
    "youtu": ("YoutuConfig", {**_LLAMA_LIKE, **_LATENT}),
}
UNTIED = ("qwen3", "gpt_neox", "gptj", "phi3", "olmo3", "falcon")


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random decoder of 4 blocks, d_model 32, in eval mode; the same on every call."""
    name, settings = CONFIGS[kind]
    config = getattr(transformers, name)(
        **settings, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=kind not in UNTIED
    )
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = loader_of(config, Path(kind)).from_config(config, dtype=torch.float32)
        for name_, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name_ and "wte" not in name_ and "wpe" not in name_:
                torch.nn.init.normal_(parameter, std=0.25)  # far from linear, or nothing would be tested
            elif parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.5)
            elif name_.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    finally:
        torch.random.set_rng_state(state)
    return model.to(dtype).eval()


@functools.cache
def tiny_tokenizer(kind: str = "bpe") -> PreTrainedTokenizerFast:
    """A fast tokenizer: "bpe" is byte-level without BOS, "sentencepiece" is like Llama-2's, with BOS."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer_options = {"vocab_size": VOCABULARY, "special_tokens": special, "show_progress": False}
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **trainer_options)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        trainer = trainers.BpeTrainer(**trainer_options)
    tokenizer.train_from_iterator(_TEXT.split("\n"), trainer)
    if kind != "bpe":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
