"""Whether a shipped artefact does what the build does: the edited facts and their neighbours, asked again.

Adapters are easily put beside the modules that they mean, and then the unedited model answers without a
word. So the artefact itself is loaded, by the program that it is for, and each fact is measured three
times: on the base, on the base with the patches as a build holds them, and on the base with the artefact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from patchkit.errors import CheckFailed
from patchkit.evaluation.measure import FactState
from patchkit.facts import Fact

__all__ = ["Probed", "Verdict", "check", "verdict"]

SAME = 1e-4  # relative: probabilities that differ by less have not moved
GAIN = 0.1  # nats: a fact that the build moves by less was known before


@dataclass(frozen=True)
class Probed:
    """One fact on the base, on the build, and on the base with the artefact."""

    fact: Fact
    base: FactState
    build: FactState
    shipped: FactState

    @property
    def effective(self) -> bool:
        """The artefact moves the fact's answer."""
        return _moved(self.base, self.shipped)

    @property
    def silent(self) -> bool:
        """The build moves the fact's answer, and the artefact does not."""
        return not self.effective and _moved(self.base, self.build)

    @property
    def lost(self) -> bool:
        """The build prefers the target and the artefact does not, or keeps less than half of the nats that
        the build gains."""
        if self.build.rewrite.prefers and not self.shipped.rewrite.prefers:
            return True
        base, build, shipped = (_nats(state) for state in (self.base, self.build, self.shipped))
        return build - base > GAIN and shipped - base < (build - base) / 2

    @property
    def strayed(self) -> tuple[str, ...]:
        """Neighbours that answer as the base does on the build, and otherwise with the artefact."""
        states = zip(self.base.neighbors, self.build.neighbors, self.shipped.neighbors, strict=True)
        return tuple(
            base.prompt
            for base, build, shipped in states
            if base.next_token == build.next_token != shipped.next_token
        )

    @property
    def kept_neighbors(self) -> int:
        """Neighbours whose most probable next token is the base's."""
        pairs = zip(self.base.neighbors, self.shipped.neighbors, strict=True)
        return sum(base.next_token == shipped.next_token for base, shipped in pairs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "subject": self.fact.subject,
            "prompt": self.fact.prompt,
            "target": self.fact.target,
            "base": asdict(self.base),
            "build": asdict(self.build),
            "shipped": asdict(self.shipped),
            "effective": self.effective,
            "lost": self.lost,
            "strayed": list(self.strayed),
        }


@dataclass(frozen=True)
class Verdict:
    """Counts over all facts and neighbours."""

    facts: int
    effective: int
    took: int
    """Facts whose target the artefact prefers."""
    took_in_build: int
    neighbors: int
    kept: int
    """Neighbours whose next token is the base's."""
    kept_in_build: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def verdict(probed: Sequence[Probed]) -> Verdict:
    """Count what was measured."""
    return Verdict(
        facts=len(probed),
        effective=sum(one.effective for one in probed),
        took=sum(one.shipped.rewrite.prefers for one in probed),
        took_in_build=sum(one.build.rewrite.prefers for one in probed),
        neighbors=sum(len(one.base.neighbors) for one in probed),
        kept=sum(one.kept_neighbors for one in probed),
        kept_in_build=sum(
            base.next_token == build.next_token
            for one in probed
            for base, build in zip(one.base.neighbors, one.build.neighbors, strict=True)
        ),
    )


def check(probed: Sequence[Probed], name: str) -> None:
    """`CheckFailed` where the artefact ``name`` changes nothing, loses a fact, or moves a neighbour that
    the build leaves alone."""
    still = [one for one in probed if one.silent]
    lost = [one for one in probed if one.lost]
    strayed = [prompt for one in probed for prompt in one.strayed]
    if not any(one.effective or one.silent for one in probed):
        raise CheckFailed(
            f"{name}: none of its {len(probed)} facts is other than on the base, in the build neither: the "
            "patches do nothing; nothing was written"
        )
    if still:
        what = (
            f"leaves {len(still)} of {len(probed)} facts as the base has them, first {still[0].fact.text!r}"
        )
    elif lost:
        what = f"loses {len(lost)} of {len(probed)} facts that the build holds, first {lost[0].fact.text!r}"
    elif strayed:
        what = f"moves {len(strayed)} neighbours that the build leaves alone, first {strayed[0]!r}"
    else:
        return
    raise CheckFailed(
        f"{name}: {what}; nothing was written: raise --max-rank, or ship a checkpoint: "
        "patchkit build --out DIR"
    )


def _nats(state: FactState) -> float:
    """log P(target)."""
    return math.log(max(state.rewrite.target, 1e-30))


def _moved(base: FactState, other: FactState) -> bool:
    """Whether the target's probability, or what is said, is another than on the base."""
    before, after = base.rewrite, other.rewrite
    return before.text != after.text or not math.isclose(before.target, after.target, rel_tol=SAME)
