"""What was chosen in a merge, as the trailers of its commit say it.

`Patchkit-Choice: ours ["lebron james","prompt:{} plays the sport of"]` for one fact, by its key: what the
first parent holds of it (or that it holds nothing) is in force after the merge. `theirs` is the second
parent. `Patchkit-Choice: theirs patches/NAME` for a whole patch: its version is theirs, and it comes back
on purpose if the first parent had taken it back.

A repository may hold several stacks, each in a folder of its own. Where a stack is not the whole repository,
its trailers say its folder, and another stack's say nothing about it: `theirs models/small/patches/NAME`, and
`ours ["lebron james","prompt:{} plays the sport of"] models/small/`. One without a folder is every stack's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from patchkit.canonical import canonical_json, strict_json
from patchkit.facts import Key
from patchkit.patch import valid_patch_name

__all__ = ["CHOICE", "OURS", "THEIRS", "Choices", "choice_trailer", "read_choices", "stack_folder"]

CHOICE = "Patchkit-Choice"
OURS, THEIRS = "ours", "theirs"

_PATCHES = "patches/"


@dataclass(frozen=True)
class Choices:
    """`keys`: fact key -> the number of the parent that was chosen, 0 or 1. `brought_back`: patches of the
    second parent that come back on purpose."""

    keys: dict[Key, int] = field(default_factory=dict)
    brought_back: frozenset[str] = frozenset()


def stack_folder(prefix: str) -> str:
    """A stack's folder ("models/small/") as a trailer says it; "" where it is the whole repository, or where
    one line of text cannot hold its name."""
    return prefix if prefix.isprintable() and prefix == prefix.strip() else ""


def choice_trailer(side: str, what: Key | str, folder: str = "") -> tuple[str, str]:
    """The trailer that records a side for a fact's key, or for a patch by its folder's name; `folder` is the
    stack's, from `stack_folder`."""
    if isinstance(what, str):
        return CHOICE, f"{side} {folder}{_PATCHES}{what}"
    return CHOICE, f"{side} {canonical_json(list(what)).decode('utf-8')} {folder}".rstrip()


def read_choices(values: Iterable[str], folder: str = "") -> Choices:
    """The choices in trailers' values that are about the stack in `folder`.

    What is no choice is left out, and so is a key chosen both ways.
    """
    keys: dict[Key, set[int]] = {}
    back = set()
    for value in values:
        side, _, what = value.strip().partition(" ")
        if side not in (OURS, THEIRS):
            continue
        name = what.removeprefix(folder).removeprefix(_PATCHES)
        if valid_patch_name(name):
            if side == THEIRS and what in (f"{_PATCHES}{name}", f"{folder}{_PATCHES}{name}"):
                back.add(name)
        elif (key := _key(what.removesuffix(folder))) is not None:
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
