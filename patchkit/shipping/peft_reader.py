"""A stranger's PEFT LoRA adapter, read as the updates of a base's stored weights.

An adapter is hostile until checked: its configuration says how its tensors are to be taken, so a field that
is not known here could change what they mean and is refused by name. Promises: `BadInput` in one line, or
updates that are, up to one rounding to float32, what PEFT adds to the base; no pickle is opened, no pattern
of the adapter's is run, and nothing is allocated that the files do not hold.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchkit.algebra.factors import Delta
from patchkit.canonical import hash_bytes, hash_file, strict_json
from patchkit.checkpoint import as_tensor, read_range
from patchkit.errors import BadInput, NotFound
from patchkit.files import reading
from patchkit.shipping.modules import Modules
from patchkit.shipping.peft_adapter import CONFIG, PREFIX, WEIGHTS
from patchkit.tensors import TensorFile, TensorInfo, header_of_file

__all__ = ["Adapter", "read_adapter"]

MAX_CONFIG = 1 << 20
MAX_HEADER = 4 << 20  # ten thousand tensors take two
MAX_RANK = 4096
_DTYPES = ("F32", "F16", "BF16")
_TENSOR = re.compile(re.escape(PREFIX) + r"(?P<path>[\w.]{1,300})\.lora_(?P<side>[AB])\.weight")
_NAME = re.compile(r"\^?[\w.]{1,300}")

# Fields that are honoured, or that say nothing of what a trained adapter computes.
_HONOURED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "peft_type"}
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
_NAMED = {
    "use_dora": "is a DoRA, which scales the base's own weights",
    "modules_to_save": "replaces whole modules, which is no low-rank update",
    "lora_bias": "trains biases, which are no low-rank update",
    "trainable_token_indices": "trains embeddings of single tokens, which is no low-rank update",
    "layer_replication": "repeats layers, so that it is of another model",
    "target_parameters": "is put on bare parameters, of which a patch knows nothing",
    "exclude_modules": "leaves out modules by patterns, which are not run here",
    "layers_pattern": "chooses layers by patterns, which are not run here",
    "layers_to_transform": "chooses layers by their numbers, which not every program reads alike",
}
_PLAIN_START = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to initialise that leave the base as it is; others change its weights when the adapter is loaded."""


@dataclass(frozen=True)
class Adapter:
    """The updates by stored name, and what a patch's recipe keeps of where they came from."""

    deltas: dict[str, Delta]
    recipe: dict[str, Any]


@dataclass(frozen=True)
class _Scaling:
    """rank and alpha of each module."""

    where: str
    rank: int
    alpha: float
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    rslora: bool

    def of(self, path: str) -> tuple[int, float]:
        """(r, alpha / r), or (r, alpha / √r) for a rank-stabilised LoRA (Kalajdzievski 2023)."""
        rank = _count(_matching(self.ranks, path, self.rank), f"{self.where}: rank_pattern")
        if rank > MAX_RANK:
            shown = str(rank) if rank < 10**9 else "given"
            raise BadInput(
                f"{self.where}: {path}: rank {shown} is more than {MAX_RANK}; merge it and make a new base"
            )
        alpha = _number(_matching(self.alphas, path, self.alpha), f"{self.where}: alpha_pattern")
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def read_adapter(folder: Path, modules: Modules) -> Adapter:
    """Read the adapter in ``folder`` for the base with these ``modules``.

    `NotFound` without its files; `BadInput` names the field, tensor or module that cannot be believed or is
    more than a low-rank update.
    """
    if not folder.is_dir():
        raise NotFound(f"{folder}: there is no such folder; name the folder of a PEFT adapter")
    config, digest = _config(folder)
    if not os.path.lexists(folder / WEIGHTS):
        raise _no_weights(folder)
    scaling = _scaling(config, f"{folder / CONFIG}")
    file = header_of_file(folder / WEIGHTS, most=MAX_HEADER)
    pairs = _pairs(file, f"{folder / WEIGHTS}")
    deltas: dict[str, Delta] = {}
    for path, (A, B) in sorted(pairs.items()):
        _check_targeted(config, path, f"{folder / CONFIG}")
        stored, transposed = _module(path, A, B, modules, scaling, f"{folder / WEIGHTS}")
        deltas[stored] = _delta(folder / WEIGHTS, A, B, scaling.of(path)[1], transposed)
    if not any(
        bool(delta.B.any() and delta.A.any())
        for delta in deltas.values()
        if delta.B is not None and delta.A is not None
    ):
        raise BadInput(f"{folder / WEIGHTS}: every update is zero: the adapter was not trained")
    recipe = {
        "alpha": scaling.alpha,
        "config": digest,
        "rank": scaling.rank,
        "rslora": scaling.rslora,
        "tensors": hash_file(folder / WEIGHTS),
    }
    return Adapter(deltas, recipe)


def _config(folder: Path) -> tuple[dict[str, Any], str]:
    where = f"{folder / CONFIG}"
    with reading(folder / CONFIG) as file:
        data = file.read(MAX_CONFIG + 1)
    if len(data) > MAX_CONFIG:
        raise BadInput(f"{where}: is larger than {MAX_CONFIG >> 20} MiB, which no configuration is")
    try:
        config = strict_json(data)
    except ValueError as error:
        raise BadInput(f"{where}: is not JSON that can be believed ({str(error)[:120]})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise BadInput(f"{where}: is not that of a LoRA; of PEFT's adapters only LoRA is an update B A")
    _check_fields(config, where)
    return config, hash_bytes(data)


def _check_fields(config: Mapping[str, Any], where: str) -> None:
    """Every field is honoured here, has no effect, or is at a value that means nothing."""
    for name, value in sorted(config.items()):
        if name in _HONOURED or name in _WITHOUT_EFFECT:
            continue
        if name == "bias":
            if value != "none":
                raise BadInput(f"{where}: bias trains biases, which are no low-rank update; train it without")
        elif name == "init_lora_weights":
            if not any(value is plain or (plain and value == plain) for plain in _PLAIN_START):
                raise BadInput(
                    f"{where}: init_lora_weights {str(value)[:40]!r} changes the base's weights when it is "
                    "loaded; convert the adapter to a plain LoRA with PEFT (path_initial_model_for_weight_"
                    "conversion)"
                )
        elif name in _NAMED:
            if value is not None and value is not False and value not in ([], {}, ""):  # 0 may be a layer
                raise BadInput(f"{where}: {name}: {_NAMED[name]}; save the adapter without, modules named")
        elif value:
            raise BadInput(
                f"{where}: the field {name[:60]!r} is not known here and could change what the tensors mean; "
                "merge the adapter with PEFT and make the merged model a base"
            )


def _scaling(config: Mapping[str, Any], where: str) -> _Scaling:
    ranks, alphas = (config.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    for name, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(pattern, dict):
            raise BadInput(f"{where}: {name} is no table")
        for key in pattern:
            if not _NAME.fullmatch(key):  # a stranger's regular expression could run for ever
                raise BadInput(f"{where}: {name}: {key[:60]!r} is no module's name; write names out in full")
    return _Scaling(
        where,
        _count(config.get("r"), f"{where}: r"),
        _number(config.get("lora_alpha"), f"{where}: lora_alpha"),
        ranks,
        alphas,
        bool(config.get("use_rslora")),
    )


def _matching(pattern: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    """The value of the first name that PEFT takes for the end of ``path``, "." being any character to it.

    `_NAME` admits nothing that repeats, so that no name runs for long.
    """
    found = (value for name, value in pattern.items() if re.fullmatch(rf"(.*\.)?({name})", path))
    return next(found, otherwise)


def _pairs(file: TensorFile, where: str) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """(A, B) by module path."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in file.tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            what = "a magnitude of DoRA" if "magnitude" in name else "no factor of a LoRA on a module"
            raise BadInput(f"{where}: tensor {name[:120]!r} is {what}; only lora_A and lora_B are taken in")
        if info.dtype not in _DTYPES or len(info.shape) != 2:
            raise BadInput(f"{where}: tensor {name[:120]!r} is no float matrix")
        found.setdefault(match["path"], {})[match["side"]] = info
    if not found:
        raise BadInput(f"{where}: holds no factors")
    for path, sides in found.items():
        if set(sides) != {"A", "B"}:
            raise BadInput(f"{where}: {path[:120]!r} has lora_{'/'.join(sides)} alone; both are needed")
    return {path: (sides["A"], sides["B"]) for path, sides in found.items()}


def _check_targeted(config: Mapping[str, Any], path: str, where: str) -> None:
    """PEFT passes over tensors of modules that the configuration does not target."""
    targets = config.get("target_modules")
    if isinstance(targets, str):
        raise BadInput(
            f"{where}: target_modules is the pattern {targets[:60]!r}, which is not run here; write the "
            "modules' names as a list"
        )
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise BadInput(f"{where}: target_modules is no list of names")
    if not any(path == target or path.endswith(f".{target}") for target in targets):
        raise BadInput(f"{where}: target_modules does not name {path[:120]!r}, so PEFT would not apply it")


def _module(
    path: str, A: TensorInfo, B: TensorInfo, modules: Modules, scaling: _Scaling, where: str
) -> tuple[str, bool]:
    """(stored name, transposed) of the module's weight, once the factors' shapes fit it."""
    stored = modules.stored(path)
    if stored is None:
        raise BadInput(
            f"{where}: {path[:120]!r} is no Linear or Conv1D module of this base "
            f"({modules.architecture}); is the adapter another model's?"
        )
    d_out, d_in = modules.shape(path)
    rank = scaling.of(path)[0]
    if A.shape != (rank, d_in) or B.shape != (d_out, rank):
        raise BadInput(
            f"{where}: {path}: lora_A {list(A.shape)} and lora_B {list(B.shape)} are not of rank {rank} "
            f"on a weight [{d_out}, {d_in}]"
        )
    return stored, modules.transposed(path)


def _delta(file: Path, A: TensorInfo, B: TensorInfo, scale: float, transposed: bool) -> Delta:
    """scale · B A, without terms that are zero on both sides (an export's padding)."""
    left, right = (_read(file, info) for info in (B, A))
    kept = (left != 0).any(0) | (right != 0).any(1)
    if not kept.any():
        kept[0] = True
    try:
        return Delta(scale * left[:, kept], right[kept], transposed=transposed)
    except BadInput as error:
        raise BadInput(f"{file}: {A.name[:120]!r}: {error}; get the adapter again") from None


def _read(file: Path, info: TensorInfo) -> Tensor:
    """float64, so that scaling rounds once."""
    value: Tensor = as_tensor(read_range(file, info.start, info.end), info).double()
    if not torch.isfinite(value).all():
        raise BadInput(f"{file}: tensor {info.name[:120]!r} holds NaN or infinity; get the adapter again")
    return value


def _no_weights(folder: Path) -> BadInput | NotFound:
    if any(os.path.lexists(folder / name) for name in ("adapter_model.bin", "adapter_model.pt")):
        return BadInput(
            f"{folder}: its tensors are a pickle (.bin), which could run code; save the adapter with PEFT "
            "0.6 or later, which writes safetensors"
        )
    return NotFound(f"{folder}: holds no {WEIGHTS}; name the folder of a PEFT adapter")


def _count(value: Any, what: str) -> int:
    if type(value) is not int or value < 1:
        raise BadInput(f"{what} is not a count from 1")
    return value


def _number(value: Any, what: str) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e9:
        raise BadInput(f"{what} is not a positive number")
    return float(value)
