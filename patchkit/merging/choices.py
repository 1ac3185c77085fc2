"""What was chosen in a merge, as the trailers of its commit say it.

`Patchkit-Choice: ours ["lebron james","prompt:{} plays the sport of"]` for one fact, by its key: what the
first parent holds of it (or that it holds nothing) is in force after the merge. `theirs` is the second
parent. `Patchkit-Choice: theirs patches/NAME` for a whole patch: its version is theirs, and it comes back
on purpose if the first parent had taken it back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from patchkit.canonical import canonical_json, strict_json
from patchkit.facts import Key
from patchkit.patch import valid_patch_name

__all__ = ["CHOICE", "OURS", "THEIRS", "Choices", "choice_trailer", "read_choices"]

CHOICE = "Patchkit-Choice"
OURS, THEIRS = "ours", "theirs"

_PATCHES = "patches/"


@dataclass(frozen=True)
class Choices:
    """`keys`: fact key -> the number of the parent that was chosen, 0 or 1. `brought_back`: patches of the
    second parent that come back on purpose."""

    keys: dict[Key, int] = field(default_factory=dict)
    brought_back: frozenset[str] = frozenset()


def choice_trailer(side: str, what: Key | str) -> tuple[str, str]:
    """The trailer that records a side for a fact's key, or for a patch by its folder's name."""
    said = f"{_PATCHES}{what}" if isinstance(what, str) else canonical_json(list(what)).decode("utf-8")
    return CHOICE, f"{side} {said}"


def read_choices(values: Iterable[str]) -> Choices:
    """The choices in trailers' values; what is no choice is left out, and so is a key chosen both ways."""
    keys: dict[Key, set[int]] = {}
    back = set()
    for value in values:
        side, _, what = value.strip().partition(" ")
        if side not in (OURS, THEIRS):
            continue
        name = what.removeprefix(_PATCHES)
        if name != what:
            if side == THEIRS and valid_patch_name(name):
                back.add(name)
        elif (key := _key(what)) is not None:
            keys.setdefault(key, set()).add((OURS, THEIRS).index(side))
    return Choices({key: side.pop() for key, side in keys.items() if len(side) == 1}, frozenset(back))


def _key(text: str) -> Key | None:
    try:
        found = strict_json(text)
    except (ValueError, json.JSONDecodeError):
        return None
    if isinstance(found, list) and len(found) == 2 and all(isinstance(part, str) for part in found):
        return found[0], found[1]
    return None
