"""The file in which the choices of a merge are made, by hand; `merge --continue` reads it.

It lies in Git's own folder for this work tree, and belongs to one merge: that of the two commits that it
names. TOML, with what each side says as comments beside the choice.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.errors import BadInput, NotFound
from patchkit.facts import Key
from patchkit.files import write_durably
from patchkit.git.locks import MERGE_FILE
from patchkit.merging.choices import OURS, THEIRS
from patchkit.merging.plan import Conflict, Held
from patchkit.problem import one_line

if TYPE_CHECKING:
    from patchkit.git.store import GitStore

__all__ = ["Stopped", "merge_file", "read_merge_file", "write_merge_file"]

_HEAD = (
    'A merge that waits for choices. Write choose = "ours" (the branch that is merged into) or "theirs" (the',
    "branch that is merged) for each conflict, and then: patchkit merge --continue",
    "To give the merge up: patchkit merge --abort",
)
_FIELDS = {"into", "merge", "left", "joint", "message", "conflict"}


@dataclass(frozen=True)
class Stopped:
    """A merge that stopped: of which commits, how Git's index and work tree were left, and what is wanted."""

    into: str
    merge: str
    left: str
    joint: bool
    message: str
    chosen: Mapping[Key | str, str] = field(default_factory=dict)


def merge_file(store: GitStore) -> Path:
    """Where the choices are made."""
    return store.git_dir / MERGE_FILE


def write_merge_file(store: GitStore, stopped: Stopped, conflicts: Iterable[Conflict]) -> Path:
    """Write the file; what was chosen already is filled in."""
    import tomlkit

    document = tomlkit.document()
    for line in _HEAD:
        document.add(tomlkit.comment(line))
    document.add(tomlkit.nl())
    for name in ("into", "merge", "left", "joint", "message"):
        document.add(name, getattr(stopped, name))
    tables = tomlkit.aot()
    for conflict in conflicts:
        table = tomlkit.table()
        table.add(tomlkit.comment(one_line(f"{conflict.name}: {conflict.says}")))
        for side in (OURS, THEIRS):
            table.add(tomlkit.comment(one_line(f"{side}: {_said(getattr(conflict, side))}")))
        if conflict.key is not None:
            table.add("key", list(conflict.key))
        else:
            table.add("patch", conflict.patch)
        table.add("choose", stopped.chosen.get(conflict.what, ""))
        tables.append(table)
    if len(tables):
        document.add("conflict", tables)
    path = merge_file(store)
    write_durably(path, tomlkit.dumps(document).encode("utf-8"))
    return path


def read_merge_file(store: GitStore) -> Stopped:
    """What was written and chosen; `NotFound` without the file, `BadInput` where it cannot be read."""
    path = merge_file(store)
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise NotFound(
            f"{path}: there is no merge of patchkit's to go on with; finish Git's own with git commit, or "
            "start again: git merge --abort, then patchkit merge BRANCH"
        ) from None
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path}: cannot be read ({one_line(str(error))}); mend it, or merge --abort"
        ) from None
    kinds = {"into": str, "merge": str, "left": str, "joint": bool, "message": str}
    wrong = [name for name, kind in kinds.items() if not isinstance(table.get(name), kind)]
    if wrong or set(table) - _FIELDS:
        named = one_line(", ".join([*wrong, *sorted(set(table) - _FIELDS)]))
        raise BadInput(f"{path}: {named} is not as it was written; only choose = … is to be changed")
    values = {name: table[name] for name in kinds}
    return Stopped(**values, chosen=dict(_choices(path, table.get("conflict", []))))


def _choices(path: Path, tables: Any) -> Iterable[tuple[Key | str, str]]:
    for number, table in enumerate(tables if isinstance(tables, list) else [None], 1):
        what = _what(table) if isinstance(table, dict) else None
        side = table.get("choose") if isinstance(table, dict) else None
        if what is None:
            raise BadInput(
                f"{path}: conflict {number} names no key and no patch; only choose = … is to be changed"
            )
        if side not in (OURS, THEIRS, ""):
            raise BadInput(
                f'{path}: conflict {number} chooses {one_line(str(side))!r}; write "ours" or "theirs"'
            )
        if side:
            yield what, side


def _what(table: Mapping[str, Any]) -> Key | str | None:
    key, patch = table.get("key"), table.get("patch")
    if isinstance(patch, str) and key is None:
        return patch
    if isinstance(key, list) and len(key) == 2 and all(isinstance(part, str) for part in key):
        return key[0], key[1]
    return None


def _said(held: Held | None) -> str:
    if held is None:
        return "not in force"
    source = f", source {held.fact.source}" if held.fact.source else ""
    return f"{held.fact.text} → {held.fact.target} (in {held.patch}{source})"
