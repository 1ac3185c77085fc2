"""Batches of 10, 100 and 1,000 facts: seconds a fact, memory, the estimate on the way, a kill half way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.laboratory import laboratory
from benchmarks.machine import peak_memory
from benchmarks.report import Bar, Effort, Measured
from patchkit.editing.batching import Budget
from patchkit.editing.memit import Memit

__all__ = ["measure"]

COUNTS = {Effort.QUICK: (2, 4), Effort.USUAL: (10, 100), Effort.FULL: (10, 100, 1000)}


def measure(effort: Effort) -> Measured:
    """One edit of each size with the default recipe, in a process of its own; statistics are there.

    The facts of the last one are edited in batches of the size before it too: facts are of unlike length, so
    only the same ones tell what a batch saves. It runs once more, is killed with half of its targets found,
    and is started again.
    """
    counts = COUNTS[effort]
    runs = {count: _whole(effort, count, count) for count in counts}
    parted = _whole(effort, counts[-1], counts[-2])
    rows = [{"facts": count, "a batch": count, **run} for count, run in runs.items()]
    rows.append({"facts": counts[-1], "a batch": counts[-2], **parted})
    least, fewer, most = runs[counts[0]], runs[counts[-2]], runs[counts[-1]]
    found, kept = _killed(effort, counts[-1])
    bars = [
        Bar(
            "s a fact, the largest batch over the smallest",
            most["s a fact"] / least["s a fact"],
            1.1,
            most=True,
        ),
        Bar(
            f"s a fact, {counts[-1]} facts over {counts[-2]}",
            most["s a fact"] / fewer["s a fact"],
            1.0,
            most=True,
        ),
        Bar(
            f"s a fact, {counts[-1]} facts in one batch over batches of {counts[-2]}",
            most["s a fact"] / parted["s a fact"],
            1.0,
            most=True,
        ),
        Bar(
            "peak MB, the largest batch over the smallest", most["peak MB"] / least["peak MB"], 1.5, most=True
        ),
        Bar(
            "total time by the estimate at a quarter, over the real", most["estimate at 1/4"], 1.3, most=True
        ),
        Bar("targets found before a kill that were sought again", found - kept, _batch(effort), most=True),
    ]
    return Measured(
        rows, bars, [f"Killed with {found} of {counts[-1]} targets found, it went on from {kept}."]
    )


def _batch(effort: Effort) -> int:
    """Facts that are optimised together, and lost together."""
    return Budget.of("auto", laboratory(effort).model.device).facts


def _whole(effort: Effort, count: int, size: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, _apart(effort, count, size, folder) as run:
        assert run.stdout is not None
        return json.loads(list(run.stdout)[-1])["done"]


def _killed(effort: Effort, count: int) -> tuple[int, int]:
    """Targets found when the run was killed, and those that the next run began with."""
    with tempfile.TemporaryDirectory() as folder:
        with _apart(effort, count, count, folder) as run:
            found = next(done for done in _found(run) if 2 * done >= count)
            run.send_signal(signal.SIGKILL)
        with _apart(effort, count, count, folder) as run:
            kept = next(_found(run))
            run.kill()
    return found, kept


def _found(run: subprocess.Popen[str]) -> Iterator[int]:
    assert run.stdout is not None
    for line in run.stdout:
        if "found" in (said := json.loads(line)):
            yield said["found"]


def _apart(effort: Effort, count: int, size: int, folder: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.scale", effort.value, str(count), str(size), folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _work(effort: Effort, count: int, size: int, folder: Path) -> dict[str, Any]:
    """``size`` facts at a time, each batch on the base alone. The estimate is that of a single batch."""
    lab = laboratory(effort)
    facts = lab.facts("both", count)
    recipe = lab.resolve(lab.default_of(size))
    statistics = lab.statistics(recipe)
    told: list[tuple[int, float]] = []

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "targets":
            told.append((done, time.perf_counter()))
            print(json.dumps({"found": done}), flush=True)

    begun = time.perf_counter()
    spent = []
    for first in range(0, count, size):
        batch = facts[first : first + size]
        edited = Memit().edit(
            lab.model, lab.tokenizer, batch, recipe, statistics, unfinished=folder, progress=progress
        )
        spent.append(edited.timings)
    seconds = time.perf_counter() - begun
    phases: dict[str, Any] = {
        f"{name}, s a fact": sum(timings[name] for timings in spent) / count
        for name in ("targets", "keys", "solve")
    }
    estimate = {"estimate at 1/4": _estimate(told, count) if size == count else None}
    return {"s a fact": seconds / count, **phases, **estimate, "peak MB": peak_memory() / 1e6}


def _estimate(told: list[tuple[int, float]], count: int) -> float:
    """The whole time of the search as it is told with a quarter found, over the real."""
    start, end = told[0][1], told[-1][1]
    quarter = next((count / done * (at - start) for done, at in told if 4 * done >= count), end - start)
    return quarter / max(end - start, 1e-9)


if __name__ == "__main__":
    of = Effort(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    print(json.dumps({"done": _work(*of)}))
