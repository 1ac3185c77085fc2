"""Facts that were in force before an edit: does the model still say them with it?

An edit is measured on its own facts, and those of earlier patches may go while it takes. A stack holds more
facts than can be asked again at each edit, so those are asked that the edit disturbs most, by
`interference.interference`: from stored keys, without a model. Facts that it tells nothing of, or the same,
are drawn, others at each edit.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from patchkit.actions.asking import Asking
from patchkit.actions.harm import Stacked
from patchkit.algebra.factors import Patch
from patchkit.algebra.interference import Interference, interference
from patchkit.errors import PatchkitError
from patchkit.facts import Fact
from patchkit.stack import Stack

__all__ = ["ASKED", "Earlier", "earlier_facts", "most_disturbed"]

ASKED = 100
"""Facts in force that are asked again after an edit, at most."""


@dataclass(frozen=True)
class Earlier:
    """What became of facts that an edit leaves in force. A fact is said where every token of its target is
    the most probable one."""

    in_force: int
    asked: int
    said: int
    """Of those that were asked: said before the edit."""
    lost: tuple[Fact, ...] = ()
    """Of those that were said: not said with it, the most disturbed first."""
    refittable: tuple[str, ...] = ()
    """The patches of facts that are lost which can be solved again."""

    @property
    def kept(self) -> float | None:
        """The share of what was said that still is; None where nothing was."""
        return (self.said - len(self.lost)) / self.said if self.said else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "in_force": self.in_force,
            "asked": self.asked,
            "said": self.said,
            "kept": self.kept,
            "lost": [{"prompt": fact.text, "target": fact.target} for fact in self.lost],
            "refittable": list(self.refittable),
        }


def earlier_facts(
    asking: Asking, stack: Stack, under: Sequence[Patch], patch: Patch, before: Stacked, after: Stacked
) -> Earlier:
    """Ask facts of ``under``, the patches of ``stack`` that stay below ``patch``, on two models: the stack as
    it was and as it is with the edit."""
    facts = most_disturbed(under, patch)[:ASKED]
    pairs = [(fact.text, fact.target) for fact in facts]
    said = []
    for ids, weights in (before, after):
        voice = asking.voice(ids, weights)
        said.append([score.argmax for score in voice.score(pairs)] if pairs else [])
        with suppress(PatchkitError):  # what cannot be kept costs only time
            voice.answers.keep()
    lost = [fact for fact, old, new in zip(facts, *said, strict=True) if old and not new]
    held, keyed = stack.facts_in_force(), _keyed(under)
    again = sorted({held[fact.key][0] for fact in lost if fact.key in held and fact.key in keyed})
    return Earlier(
        sum(len(each.facts) for each in under), len(facts), sum(said[0]), tuple(lost), tuple(again)
    )


def _keyed(under: Sequence[Patch]) -> set[Any]:
    return {fact.key for each in under if each.solution is not None for fact in each.facts}


def most_disturbed(under: Sequence[Patch], patch: Patch) -> list[Fact]:
    """All facts of ``under``, those first to whose keys ``patch`` does most, against what their own patches
    want there. Facts of patches of which that is not known take turns with the others."""
    known: list[Interference] = []
    unknown: list[Fact] = []
    for each in under:
        try:
            known += interference(each, [patch])
        except PatchkitError:  # without keys, or of an editor that is not here
            unknown += each.facts
    draw = random.Random(patch.id)
    draw.shuffle(known)
    draw.shuffle(unknown)
    known.sort(key=lambda one: one.overall, reverse=True)
    ranked = [one.fact for one in known]
    return [fact for fact in chain.from_iterable(zip_longest(ranked, unknown)) if fact is not None]
