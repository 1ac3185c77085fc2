"""How what an edited projection writes reaches the residual stream.

In most decoders it is added as it is. Some multiply it (Granite, MiniCPM), some normalise it first
(Gemma 2 and 3, OLMo 2, GLM-4): there an update that ignored it would miss its target. Nothing is
known by name: the way is found by a run, and one that is neither is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchkit.errors import BadInput
from patchkit.models.anatomy import Anatomy
from patchkit.models.hooks import stop_after

__all__ = ["Outlet", "outlet_of"]

_CLOSE = 1e-3  # of the effect's norm, in float32


@dataclass(frozen=True)
class Outlet:
    """The stream takes ``scale`` x y, or ``scale`` x g * y / rms(y) where a norm with ``gain`` g stands.

    y [..., d_model] is the edited projection's output.
    """

    scale: float = 1.0
    gain: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether y is added as it is."""
        return self.gain is None and self.scale == 1.0

    def passed(self, output: Tensor) -> Tensor:
        """What the stream takes of y = ``output`` [..., d_model]."""
        return self.scale * (output if self.gain is None else _normed(output, self.gain))

    def pull_back(self, output: Tensor, residual: Tensor) -> Tensor:
        """What to add to y = ``output`` [N, d_model] so that the stream moves by ``residual`` [N, d_model].

        A norm lets only directions through. There y is turned to where the norm gives the wanted sum's
        direction, and keeps its own length; what is missing in length is left to the layers above.
        """
        wanted = residual / self.scale
        if self.gain is None:
            return wanted
        direction = (_normed(output, self.gain) + wanted) / self.gain
        length = output.norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True)
        return length * direction - output

    def __str__(self) -> str:
        if self.gain is not None:
            return "normalised" if self.scale == 1.0 else f"normalised, times {self.scale:.4g}"
        return "added as it is" if self.plain else f"added times {self.scale:.4g}"


def outlet_of(model: PreTrainedModel, anatomy: Anatomy, layer: int, tokens: Tensor) -> Outlet:
    """Find the outlet of ``layer`` by running ``tokens`` [1, S] with and without a push at the last one.

    BadInput where the stream takes something else of the edited output.
    """
    block, down = anatomy.blocks[layer], anatomy.downs[layer]
    with torch.no_grad(), _watching(block, down) as seen, stop_after(block):
        model(input_ids=tokens, use_cache=False)
    # The row's last token, whether or not the block flattens [1, S, d_model].
    output, before = seen.output.flatten(0, -2)[-1], seen.stream.flatten(0, -2)[-1]
    generator = torch.Generator().manual_seed(0)
    push = torch.randn(output.shape, generator=generator, dtype=output.dtype).to(output.device)
    push *= output.norm() / push.norm() / 2
    with torch.no_grad(), _watching(block, down, push) as pushed, stop_after(block):
        model(input_ids=tokens, use_cache=False)
    effect = pushed.stream.flatten(0, -2)[-1] - before
    gain = _gain(seen.norm, output)
    expected = push if gain is None else _normed(output + push, gain) - _normed(output, gain)
    scale = float((effect * expected).sum() / expected.square().sum())
    if not float((effect - scale * expected).norm()) <= _CLOSE * float(effect.norm()) or not scale:
        raise BadInput(
            f"{type(model).__name__}: what block {layer} adds to the residual stream is neither its edited "
            "projection's output nor a norm of it, so a ΔW cannot be aimed; choose another model"
        )
    # A model that adds y as it is differs from 1 by rounding only.
    return Outlet(1.0 if abs(scale - 1) < _CLOSE else scale, gain)


@dataclass
class _Seen:
    """What one run showed: the projection's output, the stream after the block, the norm in between."""

    output: Tensor
    stream: Tensor
    norm: nn.Module | None = None


@contextmanager
def _watching(block: nn.Module, down: nn.Module, push: Tensor | None = None) -> Iterator[_Seen]:
    seen = _Seen(torch.empty(0), torch.empty(0))

    def write(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        seen.output = output.detach().clone()
        if push is not None:
            output = output.clone()
            output[..., -1, :] += push
        return output

    def after(module: nn.Module, args: tuple[object, ...], _output: object) -> None:
        value = args[0] if args else None
        if isinstance(value, Tensor) and value.numel() == seen.output.numel():
            taken = value.detach().reshape(seen.output.shape).equal(seen.output)
            seen.norm = module if taken else seen.norm

    def end(_module: nn.Module, _args: object, output: object) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        assert isinstance(stream, Tensor)
        seen.stream = stream.detach()

    norms = [module for module in block.modules() if "norm" in type(module).__name__.lower()]
    handles = [down.register_forward_hook(write), block.register_forward_hook(end)]
    handles += [module.register_forward_hook(after) for module in norms]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _gain(norm: nn.Module | None, output: Tensor) -> Tensor | None:
    """g of a norm that gives g * y / rms(y); None where there is no norm, or one of another form."""
    if norm is None:
        return None
    with torch.no_grad():
        gain = norm(torch.ones_like(output))
        normed = norm(output)
    wrong = normed - _normed(output, gain)
    fits = float(wrong.norm()) <= _CLOSE * float(normed.norm()) and bool((gain != 0).all())
    return gain if fits else None


def _normed(output: Tensor, gain: Tensor) -> Tensor:
    return gain * output / output.square().mean(-1, keepdim=True).sqrt()
