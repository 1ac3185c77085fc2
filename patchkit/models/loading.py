"""Load a checkpoint folder to compute with, put a stack's weights into it, and pick the device.

A model is loaded in float32 whatever it is stored in (exact from bfloat16 and float16): the
optimisation of targets and the keys need it. `float32_compute` lends the same to a model that a
caller holds in half precision, and gives every bit back.
"""

from __future__ import annotations

import copy
import logging
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as their_logging

from patchkit.errors import BadInput, NotFound, Unavailable
from patchkit.models.names import StoredNames

if TYPE_CHECKING:
    from patchkit.checkpoint import Checkpoint

__all__ = [
    "float32_compute",
    "frozen",
    "load_model",
    "load_tokenizer",
    "loader_of",
    "pick_device",
    "put_weights",
    "read_config",
    "silence",
    "stored_parameters",
    "without_weights",
]

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_DATA: dict[str, Any] = {
    **_LOCAL,
    "use_safetensors": True,  # no fallback may open a pickle
    "ignore_mismatched_sizes": True,  # they are named below instead
}
_TOKENIZER = ("tokenizer.json", "tekken.json", "vocab*", "merges*", "*.model", "*.tiktoken", "*.spm")
_FOR_LABELS = ("Classification", "QuestionAnswering", "MultipleChoice", "RewardModel")


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is CUDA, else MPS, else the CPU.

    BadInput for what is no device's name, Unavailable for a device that is not there.
    """
    if name == "auto":
        return torch.device(next((kind for kind in ("cuda", "mps") if _present(kind)), "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"{name!r} is not a device; choose auto, cpu, cuda, cuda:1 or mps") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not _present(device.type) or (device.index or 0) >= count:
        raise Unavailable(f"the device {name} is not there; choose another, or auto")
    return device


def load_model(
    folder: Path, device: str = "auto", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a checkpoint folder: eval mode, no gradients for weights.

    Reads nothing from a network. NotFound where the folder is no checkpoint, BadInput where
    transformers cannot read it.
    """
    place = pick_device(device)
    if not (folder / "config.json").is_file():
        raise NotFound(f"{folder}: no config.json; name the folder of a transformers checkpoint")
    config = read_config(folder)
    loader = loader_of(config, folder)
    tokenizer = load_tokenizer(folder)
    with _one_line(folder, "get the checkpoint again, or choose another"):
        found: Any = loader.from_pretrained(folder, dtype=dtype, output_loading_info=True, **_DATA)
    model, report = found
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise BadInput(
            f"{folder}: {name} is {list(stored)} in the files, but config.json makes it {list(wanted)}; "
            "get the checkpoint again"
        )
    if missing := sorted(report["missing_keys"]):
        _refuse_headless(model, folder, missing)
        raise BadInput(f"{folder}: the checkpoint lacks {missing[0]}; get it again, whole")
    model.to(device=place).eval().requires_grad_(False)
    return model, tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder; BadInput where there is none, or transformers cannot read it.

    Without files it would give some models one that knows no words.
    """
    if not any(next(folder.glob(name), None) for name in _TOKENIZER):
        raise BadInput(
            f"{folder}: holds no tokenizer; put its model's tokenizer.json and tokenizer_config.json beside "
            "the weights"
        )
    with _one_line(folder, "use its model's fast tokenizer (tokenizer.json)"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **_LOCAL)
    return tokenizer


def read_config(folder: Path) -> Any:
    """The transformers config of a checkpoint folder; BadInput where this transformers does not know it."""
    path = folder / "config.json"
    try:
        with silence():
            return AutoConfig.from_pretrained(folder, **_LOCAL)
    except Exception as error:  # configs check themselves, and raise what they like
        said = " ".join(str(error).split()).partition(". ")[0][:200]
        raise BadInput(
            f"{path}: transformers cannot load it: {said}; name a checkpoint that it knows"
        ) from error


def loader_of(config: Any, folder: Path) -> Any:
    """The auto class that builds the language model of ``config``, whether it stands alone or is wrapped."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise BadInput(f"{folder}: {kind} is an encoder-decoder; patchkit edits decoders, so choose one")
    named = getattr(config, "architectures", None) or ()
    if named and all(any(word in name for word in _FOR_LABELS) for name in named):
        raise BadInput(
            f"{folder}: is a {named[0]}, which was trained to label texts and not to write them; name the "
            "language model that it was made from"
        )
    for loader in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if type(config) in loader._model_mapping:
            return loader
    for name in named:  # the text part of a wrapped model, saved alone
        found = getattr(transformers, name, None)
        if name.endswith(("ForCausalLM", "ForConditionalGeneration")) and found is not None:
            return found
    raise BadInput(
        f"{folder}: transformers has no language model that writes text from left to right for {kind}; "
        "choose a decoder"
    )


def without_weights(config: Any, folder: Path) -> PreTrainedModel:
    """The model of a checkpoint's config with all its modules and no memory for its weights.

    Built as ``load_model`` has it built before it reads weights: what fails here would fail there.
    """
    loader = loader_of(config, folder)
    make = getattr(loader, "from_config", None) or loader._from_config
    with _one_line(folder, "choose another model"), torch.device("meta"):
        model: PreTrainedModel = make(copy.deepcopy(config), dtype=torch.float32)
    return model


def _refuse_headless(model: PreTrainedModel, folder: Path, missing: Sequence[str]) -> None:
    """BadInput where nothing is ``missing`` from the files but the part that turns states into tokens."""
    head = model.get_output_embeddings()
    kept = {name for name, weight in model.named_parameters() if head is not None and weight is head.weight}
    if missing and kept.issuperset(missing):
        raise BadInput(
            f"{folder}: has no language-model head ({missing[0]}), so it writes no text; name the checkpoint "
            f"of the {type(model).__name__} that it was taken from"
        )


@contextmanager
def _one_line(folder: Path, way_out: str) -> Iterator[None]:
    """Whatever transformers raises of files that it cannot read, as BadInput; and nothing besides."""
    try:
        with silence():
            yield
    except Exception as error:  # its modules share no family of errors
        reason = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" …").rstrip(".")
        raise BadInput(f"{folder}: transformers cannot load it: {reason}; {way_out}") from error


@contextmanager
def silence() -> Iterator[None]:
    """Without transformers' warnings, reports and bars, which would stand beside our one line."""
    level, bars = their_logging.get_verbosity(), their_logging.is_progress_bar_enabled()
    their_logging.set_verbosity(logging.CRITICAL)
    their_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        their_logging.set_verbosity(level)
        if bars:
            their_logging.enable_progress_bar()


def stored_parameters(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, torch.nn.Parameter]:
    """The model's parameters by their names in the checkpoint."""
    found: dict[str, torch.nn.Parameter] = {}
    names = StoredNames(model, checkpoint)
    for name, parameter in model.named_parameters():
        with suppress(NotFound, BadInput):  # not stored, as a tied one's twin, or stored in another form
            found[names.of(name)] = parameter
    return found


def put_weights(model: PreTrainedModel, tensors: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Put stored tensors (by their names in the checkpoint) into a loaded model, in place.

    Each value is the stored one converted to the model's dtype: exact for bfloat16 and float16 in a
    float32 model. BadInput where a name or shape is not the model's; then nothing was changed.
    """
    found = stored_parameters(model, checkpoint)
    for name, tensor in tensors.items():
        if name not in found:
            raise BadInput(
                f"{name}: the loaded model has no such weight; load the base that the stack stands on"
            )
        if found[name].shape != tensor.shape:
            raise BadInput(f"{name}: shape {list(tensor.shape)}, but the model has {list(found[name].shape)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            found[name].copy_(tensor)


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode and no gradients for the weights; both are as they were afterwards."""
    training = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, want in wanted.items():
            parameter.requires_grad_(want)


@contextmanager
def float32_compute(model: PreTrainedModel) -> Iterator[None]:
    """Widen a half-precision model to float32, and give back each tensor with the bits it had.

    A model that computes in float32 or float64 already is left alone.
    """
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    half = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]
    try:
        for tensor, data in half:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in half:
            tensor.data = data


def _present(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_available()
    return kind == "cpu" or (kind == "mps" and torch.backends.mps.is_available())
