"""Listening to a model, ending its passes early, and standing in for its blocks: for one thread each.

Passes of one model may run side by side. What a thread hooks in here, its own passes see and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from threading import Lock, get_ident
from typing import Any

from torch import Tensor, nn

__all__ = [
    "Stop",
    "ending",
    "forgetting_positions",
    "leaves_at",
    "listening",
    "reading_inputs",
    "reading_outputs",
    "stand_in",
    "stop_after",
]

Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]


class Stop(Exception):
    """Ends a forward pass where nothing above is needed."""


def ending() -> AbstractContextManager[None]:
    """A pass inside may end with `Stop`."""
    return suppress(Stop)


@contextmanager
def listening(module: nn.Module, hook: Hook) -> Iterator[None]:
    """Tell ``hook`` of what ``module`` takes and gives whenever this thread calls it."""
    thread = get_ident()

    def heard(called: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if get_ident() == thread:
            hook(called, args, output)

    handle = module.register_forward_hook(heard)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def forgetting_positions(model: nn.Module) -> Iterator[None]:
    """Without what images did to the positions of the last texts: it is the caller's again behind this.

    Models of images and texts (Qwen's, GLM's) keep it as `rope_deltas` from a generation, of text alone too,
    and add it, a row for each of those texts, to the positions of whatever they are given next.
    """
    kept: list[tuple[Any, Any]] = [
        (module, module.rope_deltas) for module in model.modules() if hasattr(module, "rope_deltas")
    ]
    try:
        for module, _ in kept:
            module.rope_deltas = None
        yield
    finally:
        for module, deltas in kept:
            module.rope_deltas = deltas


@contextmanager
def stop_after(block: nn.Module) -> Iterator[None]:
    """End every forward pass inside once ``block`` has given its output."""

    def stop(*_: Any) -> None:
        raise Stop

    with ending(), listening(block, stop):
        yield


@contextmanager
def reading_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """The first argument of every call of ``module`` inside, in order."""
    seen: list[Tensor] = []
    with listening(module, lambda _, args, __: seen.append(args[0])):
        yield seen


@contextmanager
def reading_outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden states that every call of ``module`` inside gives, in order."""
    seen: list[Tensor] = []
    with listening(module, lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)):
        yield seen


@contextmanager
def leaves_at(block: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden states that every call of ``block`` inside gives, in order, as leaves: what comes after is
    computed from them, so that a gradient ends there."""
    thread = get_ident()
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: Any, output: Any) -> Any:
        if get_ident() != thread:
            return output
        states = output[0] if isinstance(output, tuple) else output
        leaves.append(states.detach().requires_grad_())
        after = leaves[-1].clone()  # which the model may write into
        return (after, *output[1:]) if isinstance(output, tuple) else after

    handle = block.register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


@contextmanager
def stand_in(blocks: Sequence[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Let ``make(i)`` stand in for block i's forward."""
    thread = get_ident()
    with _changing:
        for index, block in enumerate(blocks):
            _Switch.of(block).others.setdefault(thread, []).append(make(index))
    try:
        yield
    finally:
        with _changing:
            for block in blocks:
                _Switch.of(block).back(block, thread)


_changing = Lock()


class _Switch:
    """A block's forward, and by thread what stands in for it, the last one first."""

    def __init__(self, block: nn.Module) -> None:
        self.before = vars(block).get("forward")
        self.own = block.forward
        self.others: dict[int, list[Callable[..., Any]]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mine = self.others.get(get_ident())
        return (mine[-1] if mine else self.own)(*args, **kwargs)

    @classmethod
    def of(cls, block: nn.Module) -> _Switch:
        """The block's, put in place where there is none yet."""
        switch = vars(block).get("forward")
        if not isinstance(switch, cls):
            switch = vars(block)["forward"] = cls(block)
        return switch

    def back(self, block: nn.Module, thread: int) -> None:
        """One stand-in fewer; with the last, the block is as it was."""
        self.others[thread].pop()
        if not self.others[thread]:
            del self.others[thread]
        if self.others:
            return
        if self.before is None:
            del vars(block)["forward"]
        else:
            vars(block)["forward"] = self.before
