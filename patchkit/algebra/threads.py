"""Independent pieces of work side by side, each with its share of torch's threads.

Many small operations run faster as several lines of one thread each than as one line in which each
operation is cut in pieces and waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

__all__ = ["Each", "side_by_side"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_CPU = torch.device("cpu")


class Each(Protocol):
    """A `map` of one argument: results come in the order of the items."""

    def __call__(self, work: Callable[[_Item], _Result], items: Iterable[_Item], /) -> Iterator[_Result]: ...


@contextmanager
def side_by_side(wanted: int, device: torch.device = _CPU) -> Iterator[Each]:
    """A `map` that works on ``wanted`` items at a time, or on as many as torch has threads.

    Torch's own threads are shared out among them. Where one item is at work at a time, as on any device but
    a CPU, which queues its work itself, the calling thread works, with all of torch's. What is set for a
    thread (`torch.no_grad`, …) is not set in the others.
    """
    threads = torch.get_num_threads()
    workers = max(1, min(threads, wanted)) if device.type == "cpu" else 1
    if workers == 1:
        yield map
        return
    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                yield pool.map
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
