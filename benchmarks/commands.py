"""The commands that people wait for, in a repository of 1,000 patches and 10,000 facts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.machine import seconds_of
from benchmarks.references import git_helpers
from benchmarks.report import Bar, Effort, Measured

__all__ = ["measure", "run"]

COMMANDS = (
    ["--help"],
    ["--version"],
    ["log"],
    ["status"],
    ["stack"],
    ["show"],
    ["facts", "search", "Person 77"],
)
_LIMIT = 0.5
_PROMISED = ("--help", "log", "status", "stack", "facts search Person 77")


def measure(effort: Effort) -> Measured:
    """Seconds from the command line to the prompt again: the median of five warm runs."""
    patches, each = (4, 2) if effort is Effort.QUICK else (1000, 10)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "knowledge"
        _fill(place, patches, each)
        for command in COMMANDS:
            run(place, command)
        taken = {" ".join(command): seconds_of(partial(run, place, command), 5) for command in COMMANDS}
    rows = [{"command": f"patchkit {command}", "s": seconds} for command, seconds in taken.items()]
    bars = [Bar(f"patchkit {name}, s", taken[name], _LIMIT, most=True) for name in _PROMISED]
    return Measured(rows, bars, [f"{patches:,} patches, a commit each, {patches * each:,} facts in force."])


def _fill(place: Path, patches: int, each: int) -> None:
    """One commit a patch, as `commit` writes them; small made-up factors."""
    os.environ.update(git_helpers.ENVIRONMENT)
    store = git_helpers.make_store(place)
    for number in range(patches):
        git_helpers.add(
            store, git_helpers.numbers(*range(number * each, (number + 1) * each)), message=f"Batch {number}"
        )


def run(place: Path, command: list[str]) -> None:
    """As a user's installation runs: its modules compiled once."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(
        [sys.executable, "-m", "patchkit", *command],
        cwd=place,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
