"""Gates: what the numbers of a model must reach, so that a command may go on.

Read and checked before anything that multiplies is imported.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from patchkit.errors import BadInput
from patchkit.facts import Batch

__all__ = ["GATES", "LIMITS", "SHARES", "check_gate", "failed", "parse_gate"]

SHARES = ("efficacy", "argmax", "generation", "paraphrases", "neighbors")
"""Of an edit's own facts, as `evaluation.measure.Summary` has them."""
GATES = (*SHARES, "kept")
"""Gates of a commit from below; "kept" are facts that were in force (`earlier.Earlier`)."""
LIMITS = ("perplexity", "growth")
"""Gates from above: the stack's perplexity on the base's own text, the edited weights' norm; multiples of the
base's."""
OPTIONAL = ("paraphrases", "neighbors")
"""Gates on prompts that facts may do without."""


def parse_gate(text: str, shares: Collection[str] = GATES) -> dict[str, float]:
    """ "efficacy=0.9,perplexity=1.05" as numbers by name; BadInput names the part that is wrong.

    ``shares`` are the names of what may be asked for from below.
    """
    gates: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not (name in shares and 0 <= number <= 1) and not (name in LIMITS and 1 <= number < math.inf):
            raise BadInput(
                f"--gate {part.strip()!r}: write NAME=SHARE, a share from 0 to 1 of {', '.join(shares)}, "
                f"or a multiple of the base's from 1 of {', '.join(LIMITS)}"
            )
        if name in gates:
            raise BadInput(f"--gate {name}: is set twice; leave one of them out")
        gates[name] = number
    return gates


def check_gate(gate: Mapping[str, float], batch: Batch) -> None:
    """BadInput for a gate that is none, or that asks for a share of prompts that no fact has."""
    if unknown := sorted(gate.keys() - {*GATES, *LIMITS}):
        raise BadInput(f"gate {', '.join(unknown)}: there are {', '.join((*GATES, *LIMITS))}")
    for name in OPTIONAL:
        if name in gate and not any(getattr(fact, name) for fact in batch.facts):
            raise BadInput(
                f"--gate {name}: no fact of {batch.name} lists {name}, so nothing would be measured; "
                f'add "{name}": ["…"] to a fact, or leave that gate out'
            )


def failed(
    gate: Mapping[str, float], shares: Mapping[str, float | None], multiples: Mapping[str, float]
) -> list[str]:
    """The gates that were not reached, were passed from below, or were not measured (None, NaN)."""
    found = []
    for name, limit in gate.items():
        value = multiples[name] if name in LIMITS else shares.get(name)
        if value is None:
            found.append(f"{name} was not measured: the facts that were asked list none")
        elif name not in LIMITS and math.isnan(value):
            found.append(f"{name} is not a number on this model")
        elif name in LIMITS and not value <= limit:  # NaN fails too
            found.append(f"{name} {value:.4g} > {limit:g}")
        elif name not in LIMITS and value < limit:
            found.append(f"{name} {value:.3g} < {limit:g}")
    return found
