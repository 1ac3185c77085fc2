"""A PEFT LoRA adapter that means the same in every runtime, and the model that PEFT makes of it.

Runtimes differ in what scales B A: PEFT reads alpha and rank of each module, vLLM one alpha over one rank,
llama.cpp one alpha over each tensor's own rank. They agree where all modules have one rank, alpha is that
rank and no pattern says otherwise: then every scale is 1. Module paths are given in full, since PEFT takes
what ends alike for the same (GPT-2's ``c_proj`` is in the attention too).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from patchkit.errors import BadInput, CheckFailed
from patchkit.shipping.lowrank import Factors
from patchkit.shipping.modules import Modules
from patchkit.tensors import to_bytes

__all__ = ["CONFIG", "PREFIX", "WEIGHTS", "adapted", "adapter_files"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def adapter_files(
    factors: Mapping[str, Factors], modules: Modules, *, source: str | None, revision: str | None
) -> dict[str, bytes]:
    """The two files of an adapter; ``factors`` by module path, all of one rank.

    ``source``, ``revision``: how the base is named, for programs that fetch it themselves. Equal factors give
    equal bytes. `BadInput` where PEFT would put the adapter on another set of modules than these.
    """
    (rank,) = {pair.B.shape[1] for pair in factors.values()}
    ways = {pair.transposed for pair in factors.values()}
    if len(ways) > 1:
        odd = next(path for path, pair in sorted(factors.items()) if pair.transposed)
        raise BadInput(
            f"{odd}: is a Conv1D beside Linear modules, which one adapter cannot name; "
            "export the patches apart"
        )
    config = _config(rank, sorted(factors), ways.pop(), source, revision)
    _check_targets(config, factors, modules)
    tensors = {
        f"{PREFIX}{path}.lora_{side}.weight": (
            "F32",
            tuple(value.shape),
            value.contiguous().numpy().tobytes(),
        )
        for path, pair in factors.items()
        for side, value in (("A", pair.A), ("B", pair.B))
    }
    return {CONFIG: _spelled(config), WEIGHTS: to_bytes(tensors, {"format": "pt"})}


def _config(rank: int, paths: list[str], transposed: bool, source: str | None, revision: str | None) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=paths,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=source,
        revision=revision,
    )


def _spelled(config: Any) -> bytes:
    """PEFT's own fields; sets in an order, since theirs changes from run to run."""
    fields = {
        name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()
    }
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def _check_targets(config: Any, factors: Mapping[str, Factors], modules: Modules) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    found = {path for path, _ in modules.model.named_modules() if check_target_module_exists(config, path)}
    if odd := sorted(found ^ factors.keys()):
        raise BadInput(
            f"{odd[0]}: PEFT takes it for one of the edited modules, whose names it ends with; ship the "
            "patches as a checkpoint: patchkit build --out DIR"
        )


@contextmanager
def adapted(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """``model`` with the adapter in ``folder`` put on by PEFT; afterwards as it was.

    `CheckFailed` where PEFT cannot load it or finds tensors missing in it.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings(action="error", category=UserWarning):
            warnings.simplefilter("ignore", FutureWarning)  # what PEFT calls and transformers will rename
            wrapped: Any = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # PEFT has no family of errors
        _plain_again(model)
        said = " ".join(str(error).split())[:200]
        raise CheckFailed(f"{folder.name}: PEFT does not load the adapter: {said}") from error
    try:
        wrapped.eval()
        yield
    finally:
        wrapped.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config


def _plain_again(model: PreTrainedModel) -> None:
    """Without the layers that PEFT put in before it failed."""
    from peft.tuners.lora import LoraLayer

    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            model.set_submodule(path, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
