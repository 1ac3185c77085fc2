"""Derives from Git's history what the catalogue can derive: commits, patch versions, facts, norms.

Everything is read and checked first and written in one transaction: killed, the old catalogue
stands. A version in the history that cannot be believed is left out and counted, not an error:
it is not in force, or `problems` names it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from patchkit.canonical import canonical_json, hash_bytes
from patchkit.database.beliefs import put_patches
from patchkit.database.opening import Database
from patchkit.database.salvage import take_over
from patchkit.database.schema import LOST_INDEX, odd_json
from patchkit.errors import Misconfigured, PatchkitError
from patchkit.facts import load_canonical
from patchkit.files import writing
from patchkit.git.history import Commit
from patchkit.git.store import Entry, GitStore
from patchkit.patch import DELTA, FACTS, KEYS, read_patch_header
from patchkit.stack import StoredPatch, read_stack

if TYPE_CHECKING:
    from patchkit.catalogue import Catalogue

__all__ = ["change_rows", "commit_row", "reindex"]

_DERIVED = ("changes", "commits", "members", "trees", "state", "checked_tips", "violations")


def reindex(catalogue: Catalogue, store: GitStore, *, norms: bool, anew: bool = False) -> dict[str, int]:
    """Write everything derivable anew; `norms` computes each version's ‖ΔW‖ (imports torch).

    A damaged catalogue (with `anew` any) is put aside, and what was measured is taken over from it as far as
    SQLite can read it.
    """
    taken = _mended(catalogue) if anew or _is_damaged(catalogue) else _left_behind(catalogue)
    head = store.head()  # once: another command may commit meanwhile, which is then not in these rows
    commits = store.history(head) if head else []
    versions = _Versions(store, commits)
    found = list(versions)
    computed = {patch.id: _norms(versions, patch) for patch in found} if norms else {}
    with catalogue.writing() as db:
        _clear(db)
        put_patches(db, found)
        rows = (
            {"patch": patch, "weight": weight, "norm": norm}
            for patch, weights in computed.items()
            for weight, norm in weights.items()
        )
        db["layers"].upsert_all(rows, pk=("patch", "weight"))
        db["commits"].insert_all(map(commit_row, commits))
        db["changes"].insert_all(row for commit in commits for row in change_rows(commit, versions.ids))
    with contextlib.suppress(PatchkitError):  # a tree that cannot be believed is not kept as one that was
        stack = read_stack(store, head or "HEAD")
        with catalogue.writing() as db:
            if stack.tree:
                catalogue.put_tree(
                    db, stack.tree, store.settings(head or "HEAD").base_fingerprint, stack.patches
                )
            db["state"].insert({"id": 1, "tree": stack.tree, "commit": stack.commit}, replace=True)
    counts = {"commits": len(commits), "patches": len(found), "facts": sum(len(p.facts) for p in found)}
    if versions.skipped:
        counts["unreadable versions"] = versions.skipped
    return counts if taken is None else {**counts, "measurements taken over": taken}


class _Versions:
    """Every patch version in the history, each read once; `ids` maps a delta's blob to its version."""

    def __init__(self, store: GitStore, commits: Sequence[Commit]) -> None:
        self._store = store
        self.ids: dict[str, str] = {}
        self.skipped = 0
        self._deltas: dict[str, str] = {}  # blob -> folder name
        self._facts: dict[str, str] = {}  # SHA-256 -> blob
        facts: dict[str, None] = {}
        self._keys: dict[str, str] = {}
        for commit in commits:
            for change in commit.files:
                parts = change.path.split("/")
                if change.status == "D" or len(parts) != 3:
                    continue
                if parts[2] == DELTA:
                    self._deltas.setdefault(change.oid, parts[1])
                elif parts[2] == FACTS:
                    facts.setdefault(change.oid)
        for oid in facts:
            with contextlib.suppress(PatchkitError):
                self._facts[hash_bytes(store.read(oid))] = oid

    def __iter__(self) -> Iterator[StoredPatch]:
        seen: set[str] = set()
        for oid, name in self._deltas.items():
            try:
                patch = self._read(oid, name)
            except (PatchkitError, KeyError):
                self.skipped += 1
                continue
            self.ids[oid] = patch.id
            if patch.id not in seen:
                seen.add(patch.id)
                yield patch

    def _read(self, oid: str, name: str) -> StoredPatch:
        data = self._store.read(oid)
        header = read_patch_header(data, name)
        facts_oid = self._facts[header.facts]
        text = self._store.read(facts_oid)
        files = {
            FACTS: Entry(f"patches/{name}/{FACTS}", "100644", facts_oid, len(text)),
            DELTA: Entry(f"patches/{name}/{DELTA}", "100644", oid, len(data)),
        }
        return StoredPatch.read(name, header, load_canonical(text, name), hash_bytes(data), files)

    def files(self, patch: StoredPatch) -> dict[str, bytes]:
        """A version's facts and delta."""
        return {name: self._store.read(entry.oid) for name, entry in patch.files.items() if name != KEYS}


def _norms(versions: _Versions, patch: StoredPatch) -> Mapping[str, float]:
    from patchkit.algebra.factors import Patch

    try:
        return Patch.from_files(versions.files(patch), patch.name).norms()
    except PatchkitError:
        return {}


def _clear(db: Any) -> None:
    for table in _DERIVED:
        db[table].delete_where()


def commit_row(commit: Commit) -> dict[str, Any]:
    return {
        "id": commit.id,
        "parents": " ".join(commit.parents),
        "author": _printed(commit.author),
        "email": _printed(commit.email),
        "date": _in_utc(commit.date),
        "subject": _printed(commit.subject),
        "message": _printed(commit.message),
        "trailers": canonical_json([[_printed(k), _printed(v)] for k, v in commit.trailers]).decode(),
    }


def _in_utc(date: datetime) -> str:
    """As what was measured is dated, so that dates sort as texts wherever commits were made."""
    try:
        return date.astimezone(UTC).isoformat()
    except OverflowError:  # the first and the last hours that a calendar has
        return date.isoformat()


def change_rows(commit: Commit, ids: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    deltas = {change.path.split("/")[1]: change.oid for change in commit.files if change.path.endswith(DELTA)}
    for kind, names in (("added", commit.added), ("changed", commit.changed), ("removed", commit.removed)):
        for name in names:
            version = ids.get(deltas.get(name, "")) if kind != "removed" else None
            yield {"commit": commit.id, "name": _printed(name), "kind": kind, "patch": version}


def _printed(text: str) -> str:
    """Text that SQLite takes: bytes that were not UTF-8 are shown as the replacement character."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _is_damaged(catalogue: Catalogue) -> bool:
    if not catalogue.path.exists():
        return False
    try:
        with contextlib.closing(sqlite3.connect(catalogue.path)) as connection:
            if connection.execute("pragma quick_check(1)").fetchone()[0] != "ok":
                return True
            if connection.execute("pragma foreign_key_check").fetchone() is not None:
                return True
            return bool(connection.execute(LOST_INDEX).fetchone()[0] or odd_json(connection))
    except sqlite3.DatabaseError as error:
        return not isinstance(error, sqlite3.OperationalError)  # locked or not readable: not the file's fault


def _mended(catalogue: Catalogue) -> int | None:
    """Another catalogue in the place of a damaged one, with what was measured: so many rows.

    Until that one is whole the damaged one stands.
    """
    if not catalogue.path.exists():
        return _left_behind(catalogue)
    path = catalogue.path
    with writing(path), TemporaryDirectory(prefix=".patchkit-", suffix=".tmp", dir=path.parent) as place:
        new = Path(place, path.name)
        taken = take_over(Database(new), path)
        _put_aside(catalogue)
        os.replace(new, path)
    return taken


def _left_behind(catalogue: Catalogue) -> int | None:
    """What was measured in a catalogue that a command put aside and, killed, put no other in its place."""
    aside = sorted(catalogue.path.parent.glob(f"{catalogue.path.name}.damaged-*[0-9]"))
    return take_over(catalogue, aside[-1]) if aside and not catalogue.path.exists() else None


def _put_aside(catalogue: Catalogue) -> None:
    """A catalogue that SQLite cannot read stands in the way of none; it is kept beside the new one."""
    aside = catalogue.path.with_name(f"{catalogue.path.name}.damaged-{int(time.time())}")
    try:
        catalogue.path.rename(aside)
        for suffix in ("-wal", "-shm"):
            beside = catalogue.path.with_name(catalogue.path.name + suffix)
            if beside.exists():
                beside.rename(aside.with_name(aside.name + suffix))
    except OSError as error:
        raise Misconfigured(f"{catalogue.path}: is damaged and cannot be moved ({error.strerror})") from error
