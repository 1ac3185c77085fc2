"""Batches of 10, 100 and 1,000 facts: seconds a fact, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from benchmarks.laboratory import laboratory
from benchmarks.machine import peak_memory
from benchmarks.report import Bar, Effort, Measured
from patchkit.editing.memit import Memit

__all__ = ["measure"]

COUNTS = {Effort.QUICK: (2, 4), Effort.USUAL: (10, 100), Effort.FULL: (10, 100, 1000)}


def measure(effort: Effort) -> Measured:
    """One edit of each size with the default recipe, in a process of its own; statistics are there."""
    counts = COUNTS[effort]
    runs = {count: _apart(effort, count) for count in counts}
    rows = [{"facts": count, **run} for count, run in runs.items()]
    least, most = runs[counts[0]], runs[counts[-1]]
    bars = [
        Bar(f"{what}, the largest batch over the smallest", most[what] / least[what], bound, most=True)
        for what, bound in (("s a fact", 1.1), ("peak MB", 1.5))
    ]
    return Measured(rows, bars)


def _apart(effort: Effort, count: int) -> dict[str, float]:
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", effort.value, str(count)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(ran.stdout.splitlines()[-1])


def _work(effort: Effort, count: int) -> dict[str, float]:
    lab = laboratory(effort)
    facts = lab.facts("even", count)
    recipe = lab.resolve(lab.default)
    statistics = lab.statistics(recipe)
    begun = time.perf_counter()
    edited = Memit().edit(lab.model, lab.tokenizer, facts, recipe, statistics)
    seconds = time.perf_counter() - begun
    phases = {f"{name}, s a fact": edited.timings[name] / count for name in ("targets", "keys", "solve")}
    return {"s a fact": seconds / count, **phases, "peak MB": peak_memory() / 1e6}


if __name__ == "__main__":
    print(json.dumps(_work(Effort(sys.argv[1]), int(sys.argv[2]))))
