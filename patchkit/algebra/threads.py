"""Independent pieces of work side by side, each with its share of torch's threads.

Many small operations run faster as several lines of one thread each than as one line in which each
operation is cut in pieces and waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
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
    thread (`torch.no_grad`, …) is not set in the others. Work goes on while results are taken, a few of them
    ahead: what is not asked for is not worked on, and results do not pile up.
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
                yield partial(_a_few_ahead, pool, workers + 1)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)


def _a_few_ahead(
    pool: ThreadPoolExecutor, most: int, work: Callable[[_Item], _Result], items: Iterable[_Item], /
) -> Iterator[_Result]:
    """As `pool.map`, but at most ``most`` items are begun whose results were not taken."""
    begun: deque[Future[_Result]] = deque()
    for item in items:
        if len(begun) == most:
            yield begun.popleft().result()
        begun.append(pool.submit(work, item))
    while begun:
        yield begun.popleft().result()
