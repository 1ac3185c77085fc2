"""CounterFact-R records for measurements: even cases choose settings, odd ones report them."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Literal

from patchkit.errors import NotFound
from patchkit.fact import Fact
from patchkit.facts import read_facts

__all__ = ["Half", "counterfact", "data_folder"]

Half = Literal["even", "odd", "both"]


def data_folder() -> Path:
    """Where the records lie: ``PATCHKIT_DATA``, or ``shared/data`` beside the checkout."""
    return Path(os.environ.get("PATCHKIT_DATA") or Path(__file__).parents[2] / "shared" / "data")


def counterfact(half: Half, count: int) -> list[Fact]:
    """``count`` facts drawn from the records whose ``case_id`` is even, or odd, or any; the same each time.

    NotFound where the file is absent, ValueError where it holds fewer.
    """
    path = data_folder() / "counterfact-r.jsonl"
    if not path.is_file():
        raise NotFound(f"{path} is not there; name the folder of counterfact-r.jsonl in PATCHKIT_DATA")
    cases = [json.loads(line)["case_id"] for line in path.read_text(encoding="utf-8").splitlines()]
    wanted = {"even": (0,), "odd": (1,), "both": (0, 1)}[half]
    facts = [fact for fact, case in zip(read_facts(path).facts, cases, strict=True) if case % 2 in wanted]
    return random.Random(0).sample(facts, count)
