"""Where a decoder keeps its blocks and the weights that are edited, found from the module tree.

Nothing here knows an architecture by name. A block's edited weight is the last projection of its
feed-forward part that ends in the residual stream (``down_proj``, ``c_proj``, ``fc_out``,
``dense_4h_to_h``, ...). Orientation comes from the module's type, never from a shape: a square
weight would pass either way. What cannot be edited is refused by name, reason and way out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from patchkit.errors import BadInput

__all__ = ["Anatomy", "anatomy_of", "attention_outputs", "feed_forward", "shape_of"]

_NAMES = ("down_proj", "c_proj", "fc_out", "dense_4h_to_h", "fc2", "w2", "linear_out", "proj_out")
_ATTENTION_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo")

# Not "moe" anywhere: dense models of Granite 4 have classes named GraniteMoeHybrid….
_MIXTURE = re.compile("moe(block|layer)?$|expert|router")
_CROSS = ("encoder_attn", "crossattention", "cross_attn", "cross_attention")


@dataclass(frozen=True)
class Anatomy:
    """The parts of a decoder that an editor touches.

    ``downs[l]`` is the module whose weight is edited at layer l: it maps [..., d_ff] to
    [..., d_model]. ``weights[l]`` is that weight's parameter name. ``transposed`` says that the
    weight is stored as [d_in, d_out] (Conv1D) and not as ``nn.Linear`` does.
    """

    blocks: tuple[nn.Module, ...]
    downs: tuple[nn.Module, ...]
    weights: tuple[str, ...]
    transposed: bool
    d_model: int
    d_ff: int

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def weight(self, layer: int) -> Tensor:
        """The edited weight of ``layer`` as stored: [d_out, d_in], or [d_in, d_out] for Conv1D."""
        weight = self.downs[layer].weight
        assert isinstance(weight, Tensor)
        return weight

    def check_layers(self, layers: Sequence[int]) -> None:
        """BadInput if ``layers`` are not layers of this model."""
        for layer in layers:
            if not 0 <= layer < self.depth:
                raise BadInput(
                    f"layer {layer} is not in this model: it has {self.depth} blocks, 0 to {self.depth - 1}; "
                    "choose others with --layers"
                )


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Find the blocks and the edited weights of a decoder.

    Raises BadInput for encoders, mixtures of experts, quantised weights and models without a
    feed-forward projection back into the residual stream.
    """
    _refuse_config(model)
    config = model.config.get_text_config(decoder=True)
    name, blocks = _blocks(model, _depth(model, config))
    _refuse_blocks(model, blocks)
    found = [_down_projection(model, block, config.hidden_size) for block in blocks]
    first = found[0][1]
    widths = sorted({shape_of(module)[1] for _, module in found})
    if len(widths) > 1:
        raise BadInput(
            f"{_kind(model)}: its feed-forward parts have unlike widths ({', '.join(map(str, widths))}); "
            "choose a model whose blocks are alike"
        )
    weights = tuple(f"{name}.{index}.{path}.weight" for index, (path, _) in enumerate(found))
    _refuse_tied(model, weights)
    return Anatomy(
        blocks=tuple(blocks),
        downs=tuple(module for _, module in found),
        weights=weights,
        transposed=isinstance(first, Conv1D),
        d_model=config.hidden_size,
        d_ff=widths[0],
    )


def feed_forward(model: PreTrainedModel, anatomy: Anatomy, layer: int) -> dict[str, nn.Module]:
    """The feed-forward projections of a block by parameter name: those that stand beside the last one and
    read d_model numbers (``up_proj``, ``gate_proj``, ``c_fc``, ``fc_in``, ...), then the last one itself."""
    down = anatomy.weights[layer]
    home = down.rsplit(".", 2)[0]
    found = {
        f"{home}.{name}.weight": module
        for name, module in model.get_submodule(home).named_children()
        if isinstance(module, nn.Linear | Conv1D) and shape_of(module)[1] == anatomy.d_model
    }
    found.pop(down, None)  # a square one
    _refuse_tied(model, tuple(found))
    return {**found, down: anatomy.downs[layer]}


def attention_outputs(model: PreTrainedModel, anatomy: Anatomy) -> tuple[nn.Module, ...]:
    """By layer, the projection through which attention writes: its output is [..., d_model].

    BadInput where a block's attention has none.
    """
    found = []
    for layer, block in enumerate(anatomy.blocks):
        candidates = _projections(block, anatomy.d_model, of_attention=True)
        named = [pair for pair in candidates if pair[0].rpartition(".")[2].lower() in _ATTENTION_NAMES]
        if not candidates:
            raise BadInput(
                f"{_kind(model)}: the attention of block {layer} has no projection to the residual stream, "
                "so what it writes cannot be told apart; choose another model"
            )
        found.append((named or candidates)[-1][1])
    return tuple(found)


def _depth(model: PreTrainedModel, config: Any) -> int:
    """How many blocks the config says; BART's family counts its encoder's under the usual name."""
    for name in ("decoder_layers", "num_hidden_layers"):
        if isinstance(depth := getattr(config, name, None), int) and depth > 0:
            return depth
    raise BadInput(f"{_kind(model)}: its config counts no blocks; patchkit edits transformer decoders")


def _blocks(model: PreTrainedModel, depth: int) -> tuple[str, list[nn.Module]]:
    """The name and blocks of the text decoder's stack; towers for images and sound stand outside of it."""
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    stacks = [
        (name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    stacks.sort(key=lambda stack: id(stack[1][0]) not in inside)
    for name, blocks in stacks:
        if len({type(block) for block in blocks}) == 1:
            return name, blocks
    raise BadInput(
        f"{_kind(model)}: no stack of {depth} equal blocks was found; patchkit edits transformer decoders "
        "whose blocks are all of one kind, so choose one of these"
    )


def _down_projection(model: PreTrainedModel, block: nn.Module, d_model: int) -> tuple[str, nn.Module]:
    """The path and module of the feed-forward projection that ends in the residual stream."""
    candidates = _projections(block, d_model, of_attention=False)
    if not candidates:
        raise BadInput(f"{_kind(model)}: its blocks have no feed-forward projection to edit; MEMIT needs one")
    named = [pair for pair in candidates if pair[0].rpartition(".")[2] in _NAMES]
    return (named or candidates)[-1]


def _projections(block: nn.Module, d_model: int, *, of_attention: bool) -> list[tuple[str, nn.Module]]:
    """The paths and modules in a block that map to d_model, those of its attention or all others."""
    attention = [path for path, module in block.named_modules() if path and _is_attention(module)]
    return [
        (path, module)
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and shape_of(module)[0] == d_model
        and any(path == part or path.startswith(part + ".") for part in attention) == of_attention
    ]


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) whatever the storage."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def _refuse_config(model: PreTrainedModel) -> None:
    config = model.config
    if getattr(config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        raise BadInput(
            f"{_kind(model)}: its weights are quantised and a ΔW cannot be added to them; "
            "edit the unquantised checkpoint and quantise the build"
        )
    if getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", None):
        raise BadInput(
            f"{_kind(model)}: its upper blocks read the keys and values of lower ones, so it cannot be run "
            "in parts; choose a model whose blocks have their own"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise BadInput(f"{_kind(model)}: an encoder-decoder; patchkit edits decoder-only models")
    if model.get_output_embeddings() is None:
        raise BadInput(f"{_kind(model)}: no language-model head; load it with AutoModelForCausalLM")


def _refuse_blocks(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> None:
    for block in blocks:
        for path, module in block.named_modules():
            kind = type(module).__name__.lower()
            if _MIXTURE.search(kind) or path.endswith("experts"):
                raise BadInput(
                    f"{_kind(model)}: a mixture of experts; a fact lies in many weights at once there, which "
                    "MEMIT does not address; choose a dense model"
                )
            if path.rpartition(".")[2] in _CROSS:
                raise BadInput(
                    f"{_kind(model)}: the decoder of an encoder-decoder, which attends to an encoder; "
                    "patchkit edits decoders that stand alone"
                )
            if getattr(module, "is_causal", None) is False:
                raise BadInput(
                    f"{_kind(model)}: its attention looks ahead (an encoder); patchkit edits decoders"
                )
    attention = [any(_is_attention(module) for module in block.modules()) for block in blocks]
    mixer = next(filter(None, map(_mixer, blocks)), None)
    if mixer and any(attention):
        raise BadInput(
            f"{_kind(model)}: a hybrid of attention and {mixer} (a state-space, recurrent or convolution "
            "mixer), whose past is no list of keys and values, so it cannot be run in parts; choose a model "
            "with attention alone"
        )
    if not all(attention):
        which = "some of its blocks" if any(attention) else "its blocks"
        raise BadInput(f"{_kind(model)}: {which} have no attention; patchkit edits transformer decoders")


def _mixer(block: nn.Module) -> str | None:
    """The class of what mixes tokens in a block besides attention, if anything does.

    State-space mixers, gated delta nets and short convolutions all hold a convolution along the text, and no
    plain transformer does.
    """
    for module in block.modules():
        if any(isinstance(child, nn.Conv1d) for child in module.children()):
            return type(module).__name__
    return None


def _refuse_tied(model: PreTrainedModel, weights: Sequence[str]) -> None:
    """A ΔW for one layer would move every other place that shares the weight."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        if len(shared) > 1 and set(weights) & set(shared):
            raise BadInput(
                f"{_kind(model)}: {shared[0]} and {shared[1]} are one weight, so an edit of one layer would "
                "change the other; choose a model whose layers have weights of their own"
            )


def _kind(model: PreTrainedModel) -> str:
    return type(model).__name__
