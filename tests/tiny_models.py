"""Tiny random decoders and a tiny fast tokenizer, made in code: no download, milliseconds to build."""

from __future__ import annotations

import functools

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from patchkit.facts import Fact

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
_GPT2_LIKE = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4, "n_positions": 128}

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
}


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random decoder of 4 blocks, d_model 32, in eval mode; the same on every call."""
    name, settings = CONFIGS[kind]
    config = getattr(transformers, name)(
        **settings, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True
    )
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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
