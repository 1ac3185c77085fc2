"""What a commit is given, checked before anything that multiplies is imported: facts and gates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from patchkit.errors import BadInput, PatchkitError
from patchkit.facts import Batch, Fact, FactsError, Key, clashes, parse_records, read_facts

__all__ = ["GATES", "LIMITS", "Facts", "as_batch", "check_gate", "checked", "parse_gate"]

Facts = str | Path | Batch | Sequence[Fact] | Sequence[Mapping[str, Any]]

GATES = ("efficacy", "argmax", "generation", "paraphrases", "neighbors")
LIMITS = ("perplexity", "growth")
"""Gates from above: the stack's perplexity on the base's own text, the edited weights' norm; multiples of the
base's."""
OPTIONAL = ("paraphrases", "neighbors")
"""Gates on prompts that facts may do without."""


def as_batch(facts: Facts) -> Batch:
    """Facts from a file, or checked as if they stood in one; FactsError lists every fault."""
    if isinstance(facts, Batch):
        return facts
    if isinstance(facts, (str, Path)):
        return read_facts(facts)
    return parse_records(json.loads(fact.to_line()) if isinstance(fact, Fact) else fact for fact in facts)


def checked(read: Callable[[], Batch], in_force: Callable[[], Mapping[Key, tuple[str, Fact]]]) -> Batch:
    """What ``read`` gives, where nothing speaks against it; FactsError lists its own faults and its
    clashes with the facts in force together, by line."""
    try:
        batch = read()
    except FactsError as error:
        if error.batch is None:
            raise
        try:
            found = [*error.faults, *clashes(error.batch, in_force())]
        except PatchkitError:  # no stack to compare with: the file's own faults come first
            raise error from None
        raise FactsError(sorted(found, key=lambda f: (f.line is None, f.line or 0)), error.batch) from None
    if faults := clashes(batch, in_force()):
        raise FactsError(faults, batch)
    return batch


def parse_gate(text: str) -> dict[str, float]:
    """ "efficacy=0.9,perplexity=1.05" as numbers by name; BadInput names the part that is wrong."""
    gates: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not (name in GATES and 0 <= share <= 1) and not (name in LIMITS and 1 <= share < math.inf):
            raise BadInput(
                f"--gate {part.strip()!r}: write NAME=SHARE, a share from 0 to 1 of {', '.join(GATES)}, "
                f"or a multiple of the base's from 1 of {', '.join(LIMITS)}"
            )
        gates[name] = share
    return gates


def check_gate(gate: Mapping[str, float], batch: Batch) -> None:
    """BadInput where a gate asks for a share of prompts that no fact has: nothing could be measured."""
    for name in OPTIONAL:
        if name in gate and not any(getattr(fact, name) for fact in batch.facts):
            raise BadInput(
                f"--gate {name}: no fact of {batch.name} lists {name}, so nothing would be measured; "
                f'add "{name}": ["…"] to a fact, or leave that gate out'
            )
