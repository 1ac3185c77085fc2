"""Facts taken out of patches that stay: what ``revert --fact`` and ``commit --replace`` share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from patchkit.errors import BadInput
from patchkit.facts import Fact
from patchkit.factors import Patch

__all__ = ["Taken", "take_out"]


@dataclass(frozen=True)
class Taken:
    """Facts that leave a patch; ``remaining`` is None when none are left in it."""

    patch: str
    facts: tuple[Fact, ...]
    remaining: Patch | None


def take_out(patch: Patch, indices: Collection[int], name: str) -> Taken:
    """Take facts out by their place in the patch, solving again in closed form (design: X')."""
    leaving = tuple(patch.facts[i] for i in sorted(indices))
    if len(leaving) == len(patch.facts):
        return Taken(name, leaving, None)
    try:
        return Taken(name, leaving, patch.without(indices))
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from error
