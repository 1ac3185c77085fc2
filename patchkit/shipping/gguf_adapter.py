"""A LoRA in GGUF, as llama.cpp puts it on a base in the same format; read back before it is believed.

Tensor names come from the `gguf` package's own map. llama.cpp's converter keeps some weights in another
order than the checkpoint (the rows of Llama's query and key projections); those of the feed-forward part
are kept as they are in every architecture below, so these alone are written. A is [r, d_in] and B [d_out, r]
as in PEFT; alpha is the one rank of all, so that llama.cpp scales by 1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from patchkit.errors import BadInput, CheckFailed
from patchkit.shipping.lowrank import Factors
from patchkit.shipping.modules import Modules

__all__ = ["ARCHITECTURES", "GGUF", "adapter_file", "read_back", "tensor_names"]

GGUF = "adapter.gguf"

ARCHITECTURES = {
    "ApertusForCausalLM": "apertus",
    "ArceeForCausalLM": "arcee",
    "BloomForCausalLM": "bloom",
    "Cohere2ForCausalLM": "cohere2",
    "CohereForCausalLM": "command-r",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "Exaone4ForCausalLM": "exaone4",
    "FalconForCausalLM": "falcon",
    "GPT2LMHeadModel": "gpt2",
    "GPTBigCodeForCausalLM": "starcoder",
    "GPTNeoXForCausalLM": "gptneox",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "GemmaForCausalLM": "gemma",
    "Glm4ForCausalLM": "glm4",
    "GraniteForCausalLM": "granite",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MptForCausalLM": "mpt",
    "NemotronForCausalLM": "nemotron",
    "Olmo2ForCausalLM": "olmo2",
    "OlmoForCausalLM": "olmo",
    "Phi3ForCausalLM": "phi3",
    "PhiForCausalLM": "phi2",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SeedOssForCausalLM": "seed_oss",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}
"""The class that transformers gives a decoder -> what llama.cpp calls its architecture."""


def tensor_names(modules: Modules, paths: Collection[str]) -> dict[str, str]:
    """Module path -> the name of its weight in a GGUF; `BadInput` names what llama.cpp would not apply."""
    known = _feed_forward(modules)
    for path in sorted(paths):
        if path not in known:
            raise BadInput(
                f"{path}: is no weight of a feed-forward part that llama.cpp keeps as it is; ship a "
                "checkpoint, which can be converted: patchkit build --out DIR"
            )
    return {path: known[path] for path in sorted(paths)}


def adapter_file(factors: Mapping[str, Factors], modules: Modules) -> bytes:
    """The bytes of the adapter; ``factors`` by module path, all of one rank. Equal factors, equal bytes.

    `BadInput` for a model or module that llama.cpp does not have, `CheckFailed` where what was written does
    not read as what was meant.
    """
    (rank,) = {pair.B.shape[1] for pair in factors.values()}
    names = tensor_names(modules, factors)
    with tempfile.TemporaryDirectory(prefix="patchkit-") as folder:
        path = Path(folder, GGUF)
        _write(path, _architecture(modules), rank, {names[p]: pair for p, pair in factors.items()})
        back = read_back(path, modules)
        for place, pair in factors.items():
            if not (torch.equal(back[place].A, pair.A) and torch.equal(back[place].B, pair.B)):
                raise CheckFailed(f"{GGUF}: {names[place]}: does not read back as it was written")
        if back.keys() != factors.keys():
            raise CheckFailed(f"{GGUF}: holds other modules than were written")
        return path.read_bytes()


def read_back(path: Path, modules: Modules) -> dict[str, Factors]:
    """The factors in such an adapter by module path, scaled as llama.cpp scales them. `CheckFailed`."""
    import gguf

    reader: Any = gguf.GGUFReader(path)
    said = {name: reader.fields[name].contents() for name in _expected(modules) if name in reader.fields}
    if said != _expected(modules):
        raise CheckFailed(f"{path.name}: does not say that it is a LoRA for {_architecture(modules)}")
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    names = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    paths = {name: path for path, name in _feed_forward(modules).items()}
    found = {}
    for name in sorted(names):
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        rank = A.shape[0]
        found[paths[name]] = Factors(
            (alpha / rank) * B, A, rank, float("nan"), 0.0, modules.transposed(paths[name])
        )
    return found


def _write(path: Path, arch: str, rank: int, factors: Mapping[str, Factors]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for name, pair in sorted(factors.items()):
        writer.add_tensor(f"{name}.lora_a", pair.A.contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", pair.B.contiguous().numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _architecture(modules: Modules) -> str:
    name = ARCHITECTURES.get(modules.architecture)
    if name is None:
        raise BadInput(
            f"{modules.architecture}: is not among the decoders of llama.cpp that patchkit knows; ship a "
            "checkpoint: patchkit build --out DIR"
        )
    return name


def _expected(modules: Modules) -> dict[str, str]:
    import gguf

    return {
        gguf.Keys.General.ARCHITECTURE: _architecture(modules),
        gguf.Keys.General.TYPE: gguf.GGUFType.ADAPTER,
        gguf.Keys.Adapter.TYPE: "lora",
    }


def _feed_forward(modules: Modules) -> dict[str, str]:
    """The base's modules that can be in an adapter: path -> the weight's name in a GGUF."""
    import gguf

    name = _architecture(modules)
    number = {name: value for value, name in gguf.MODEL_ARCH_NAMES.items()}.get(name)
    if number is None:
        raise BadInput(f"{name}: the gguf that is installed does not know it; install a newer one")
    table = gguf.get_tensor_name_map(number, modules.depth)
    as_they_are = {gguf.MODEL_TENSOR.FFN_DOWN, gguf.MODEL_TENSOR.FFN_UP, gguf.MODEL_TENSOR.FFN_GATE}
    found = {
        path: table.get_type_and_name(f"{path}.weight", try_suffixes=(".weight",))
        for path in modules.paths.values()
    }
    return {path: pair[1] for path, pair in found.items() if pair is not None and pair[0] in as_they_are}
