"""What was believed before, kept in the catalogue: trees without problems, merges looked through.

A believed tree is known by its object id; its rows are vouched for by a digest, so that a catalogue
that was altered is not believed. Nothing here is needed: what cannot be kept or read costs only time.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patchkit.canonical import canonical_json, hash_bytes
from patchkit.database.opening import Database, json_text
from patchkit.errors import PatchkitError
from patchkit.facts import Fact, Reverse
from patchkit.git.store import Entry
from patchkit.merging.merges import Violation
from patchkit.patch import believed_header
from patchkit.stack import StoredPatch

__all__ = ["Beliefs", "is_outdated", "put_patches"]

_DIGEST = "2:"  # the kind of digest of a tree's rows
_TIPS = 20  # histories remembered as looked through
_WORTH_IT = 200  # patches from which remembering pays for importing sqlite-utils


class Beliefs(Database):
    """A `stack.Memory`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        # One command asks for the same tree several times, and for trees that share most of their patches.
        self._recalled: dict[str, list[StoredPatch]] = {}  # by digest
        self._seen: dict[tuple[str, str, str], StoredPatch] = {}

    def recall(self, tree: str, base: str) -> list[StoredPatch] | None:
        """The patches of a tree that was believed on this base; None if it was not, or was altered here."""
        found = self.rows("select digest from trees where id = ? and base = ?", tree, base)
        if not found:
            return None
        digest = found[0]["digest"]
        if digest in self._recalled:
            return list(self._recalled[digest])
        members = self.rows(
            "select m.name, m.patch, m.files, p.header, p.rank "
            "from members m join patches p on p.id = m.patch "
            "where m.tree = ? order by m.name",
            tree,
        )
        # A row a patch: ten thousand of them would take longer to fetch than all the rest. The digest
        # holds their order too, which SQLite keeps but does not promise.
        lines = self.rows(
            "select name, group_concat(record, char(10)) as records from (select m.name, f.record "
            "from members m join facts f on f.patch = m.patch where m.tree = ? order by m.name, f.line) "
            "group by name",
            tree,
        )
        records = {row["name"]: row["records"] for row in lines}
        rows = [(*row.values(), records.get(row["name"], "")) for row in members]
        if _digest(rows) != digest:
            return None
        patches = [self._seen.setdefault(row[:3], _stored(*row)) for row in rows]
        self._recalled[digest] = patches
        return list(patches)

    def believe(self, tree: str, base: str, patches: Sequence[StoredPatch]) -> None:
        """Keep a believed tree for `recall`, where that pays; it is no harm where that cannot be."""
        if "sqlite_utils" not in sys.modules and len(patches) < _WORTH_IT:
            return  # reading so few again is quicker than importing sqlite-utils
        try:
            with self.writing() as db:
                self.put_tree(db, tree, base, patches)
        except PatchkitError:
            return

    def put_tree(self, db: Any, tree: str, base: str, patches: Sequence[StoredPatch]) -> None:
        """Within a transaction: a believed tree and its patches."""
        put_patches(db, patches)
        members = [
            {"tree": tree, "name": patch.name, "patch": patch.id, "files": _files(patch)} for patch in patches
        ]
        db["members"].delete_where("tree = ?", [tree])
        db["members"].insert_all(members)
        rows = [
            (
                patch.name,
                patch.id,
                row["files"],
                json_text(patch.header.to_json()),
                patch.rank,
                "\n".join(fact.to_line() for fact in patch.facts),
            )
            for patch, row in sorted(zip(patches, members, strict=True), key=lambda pair: pair[0].name)
        ]
        db["trees"].upsert({"id": tree, "base": base, "digest": _digest(rows)}, pk=("id", "base"))

    def checked_merges(self) -> tuple[list[str], list[Violation]]:
        """See `merges.MergeMemory`."""
        tips = [row["commit"] for row in self.rows('select "commit" from checked_tips order by number desc')]
        found = self.rows("select violation from violations")
        try:
            return tips, [_violation(json.loads(row["violation"])) for row in found]
        except (ValueError, TypeError, KeyError):
            return [], []

    def remember_merges(self, tip: str, violations: Sequence[Violation]) -> None:
        """See `merges.MergeMemory`; a catalogue that cannot be written is no harm."""
        if "sqlite_utils" not in sys.modules and not violations:
            self.note(*_tip(tip))
            return
        try:
            with self.writing() as db:
                for violation in violations:
                    text = json_text(_plain(violation))
                    row = {"digest": hash_bytes(text.encode()), "merge": violation.merge, "violation": text}
                    db["violations"].upsert(row, pk="digest")
                for query, *values in _tip(tip):
                    db.execute(query, values)
        except PatchkitError:
            return


def _tip(tip: str) -> list[tuple[Any, ...]]:
    """The statements that remember a commit whose history was looked through, and forget the oldest."""
    return [
        ('insert or ignore into checked_tips("commit") values (?)', tip),
        (
            "delete from checked_tips where number not in "
            "(select number from checked_tips order by number desc limit ?)",
            _TIPS,
        ),
    ]


def put_patches(db: Any, patches: Sequence[StoredPatch]) -> None:
    """Within a transaction: patches, their recipes, facts and layers, as `patch_rows` spells them."""
    rows = [patch_rows(patch) for patch in patches]
    recipes = {row["recipe"]["id"]: row["recipe"] for row in rows}
    db["recipes"].upsert_all(recipes.values(), pk="id")
    db["patches"].upsert_all((row["patch"] for row in rows), pk="id")
    db["layers"].upsert_all((layer for row in rows for layer in row["layers"]), pk=("patch", "weight"))
    held: dict[str, list[tuple[int, str]]] = {}
    for fact in db.query("select patch, line, record from facts order by patch, line"):
        held.setdefault(fact["patch"], []).append((fact["line"], fact["record"]))
    for row in rows:
        version = row["patch"]["id"]
        if held.get(version) != [(fact["line"], fact["record"]) for fact in row["facts"]]:
            db["facts"].delete_where("patch = ?", [version])
            db["facts"].insert_all(row["facts"])


def patch_rows(patch: StoredPatch) -> dict[str, Any]:
    """The rows of one patch version: recipe, patch, facts, layers."""
    header = patch.header
    recipe = json_text(header.recipe)
    recipe_id = hash_bytes(recipe.encode())
    return {
        "recipe": {"id": recipe_id, "method": header.method, "recipe": recipe},
        "patch": {
            "id": patch.id,
            "name": patch.name,
            "base": header.base,
            "method": header.method,
            "recipe": recipe_id,
            "facts": len(patch.facts),
            "rank": patch.rank,
            "bytes": patch.size,
            "header": json_text(header.to_json()),
        },
        "facts": [
            {
                "patch": patch.id,
                "line": line,
                "subject": fact.subject,
                "prompt": fact.prompt,
                "target": fact.target,
                "was": fact.was,
                "relation": fact.relation,
                "record": fact.to_line(),
            }
            for line, fact in enumerate(patch.facts, 1)
        ],
        "layers": [
            {
                "patch": patch.id,
                "weight": weight,
                "d_out": entry.shape[0],
                "d_in": entry.shape[1],
                "form": entry.form,
                "rank": entry.rank,
            }
            for weight, entry in header.weights.items()
        ],
    }


def _stored(name: str, patch: str, files: str, header: str, rank: int, records: str) -> StoredPatch:
    entries = json.loads(files)  # of this tree: a version has other sizes with its keys and without
    return StoredPatch(
        name,
        patch,
        records.count("\n") + 1,
        rank,
        sum(size for *_, size in entries.values()),
        lambda: {file: Entry(*values) for file, values in entries.items()},
        lambda: believed_header(json.loads(header)),
        lambda: tuple(map(_fact, records.split("\n"))),
    )


def _fact(record: str) -> Fact:
    """A fact from its canonical line, whose bytes the digest vouches for."""
    values = json.loads(record)
    for key in ("paraphrases", "neighbors"):
        if key in values:
            values[key] = tuple(values[key])
    if "reverse" in values:
        values["reverse"] = Reverse(**values["reverse"])
    return Fact(**values)


def _files(patch: StoredPatch) -> str:
    return json_text({file: [e.path, e.mode, e.oid, e.size] for file, e in patch.files.items()})


def _digest(rows: Sequence[tuple[str | int, ...]]) -> str:
    return _DIGEST + hash_bytes(canonical_json([list(row) for row in rows]))


def is_outdated(digest: str) -> bool:
    """Whether a digest is of the kind before this one, which held what two trees may say differently."""
    return re.fullmatch("[0-9a-f]{64}", digest) is not None


def _plain(violation: Violation) -> dict[str, Any]:
    return {name: getattr(violation, name) for name in Violation.__slots__}


def _violation(value: dict[str, Any]) -> Violation:
    lists: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in value.items()}
    return Violation(**lists)
