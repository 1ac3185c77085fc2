"""What vLLM accepts of an adapter, and what it would serve without: refused here, by name.

vLLM finds an adapter's modules by the last part of their names and serves the unedited model, without a
word, where none of them is found. So an adapter for it is written only for models that its own
documentation lists with LoRA (supported_models.md at commit 0046f770, 2026), whose module paths it keeps.
"""

from __future__ import annotations

from collections.abc import Mapping

from patchkit.errors import BadInput

__all__ = ["MODELS", "RANKS", "check_vllm", "rank_for_vllm"]

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank can be."""

MODELS = frozenset({
    "Cohere2ForCausalLM", "CohereForCausalLM", "CwmForCausalLM", "Ernie4_5ForCausalLM", "Exaone4ForCausalLM",
    "GPTBigCodeForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM", "Glm4ForCausalLM",
    "GlmForCausalLM", "GraniteForCausalLM", "GraniteSWAForCausalLM", "HunYuanDenseV1ForCausalLM",
    "HyperCLOVAXForCausalLM", "InternLM3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
    "NemotronForCausalLM", "OPTForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM",
    "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SeedOssForCausalLM",
    "SmolLM3ForCausalLM", "Starcoder2ForCausalLM", "VaultGemmaForCausalLM",
})  # fmt: skip
"""Decoders for text alone to which vLLM applies LoRA adapters."""


def check_vllm(architecture: str, paths: Mapping[str, str]) -> None:
    """`BadInput` where vLLM would not apply an adapter on these modules (stored name -> path)."""
    if architecture not in MODELS:
        raise BadInput(
            f"vLLM lists no LoRA for {architecture} and may serve the unedited model without a word; "
            "serve a checkpoint instead: patchkit build --out DIR"
        )
    for path in paths.values():
        if not any(part.isdigit() for part in path.split(".")):
            raise BadInput(
                f"{path}: is no projection inside a block, and vLLM puts no adapter on it; "
                "serve a checkpoint instead: patchkit build --out DIR"
            )


def rank_for_vllm(rank: int) -> int:
    """The smallest rank that vLLM accepts and that holds ``rank`` terms; `BadInput` past the largest."""
    for accepted in RANKS:
        if rank <= accepted:
            return accepted
    raise BadInput(
        f"the patches have rank {rank}, and vLLM takes {RANKS[-1]} at the most; name a smaller one, "
        f"--max-rank {RANKS[-1]}, which says what it costs, or serve a checkpoint: patchkit build --out DIR"
    )
