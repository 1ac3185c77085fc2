"""The catalogue: SQLite beside Git's data, for questions that Git cannot answer quickly or at all.

What Git's history says is derived again by `reindex`; what was measured on this machine (results,
evaluations, timings, builds) hangs on the patch version's id and is never lost by that. Reading
uses the standard library alone; writing imports sqlite-utils, late. A catalogue that is missing or
damaged costs speed and measurements, never truth: Git holds that.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.canonical import hash_bytes, without_nan
from patchkit.database.beliefs import Beliefs
from patchkit.database.opening import json_text
from patchkit.errors import PatchkitError

if TYPE_CHECKING:
    from patchkit.git.store import GitStore

__all__ = ["Catalogue"]

NAME = "catalogue.db"
_SETTLED = 2.0  # seconds: a file younger than its clock's tick may change and keep its time


class Catalogue(Beliefs):
    """The catalogue in a repository's private folder."""

    def __init__(self, private: Path) -> None:
        super().__init__(private / NAME)

    # -- questions -------------------------------------------------------------------------

    def current(self, tree: str, commit: str | None = None) -> bool:
        """Whether what Git says was derived for this stack (`Stack.tree`), and where a commit is given, from
        the history that ends there: many commits have one tree."""
        rows = self.rows('select "commit" from state where tree = ?', tree)
        return bool(rows) and commit in (None, rows[0]["commit"])

    def search(self, text: str, tree: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """Facts whose subject, prompt or target has words that begin with each of `text`'s, best first.

        With `tree` (`Stack.tree`) only facts in force there; else every fact of the history, one that several
        versions of a patch hold once. Rows have patch (folder name), version, line, subject, prompt, target,
        was, relation.
        """
        words = re.findall(r"\w+", text)
        if not words:
            return []
        query = " ".join(f'"{word}"*' for word in words)
        among = "members where tree = :tree" if tree is not None else "patches"
        version = "patch" if tree is not None else "id"
        found = self.rows(
            f"""with among as materialized (select {version} as version, name from {among}),
            now as materialized (select m.patch from members m join state s on s.tree = m.tree)
            select m.name as patch, m.version, f.line, f.subject, f.prompt, f.target, f.was, f.relation
            from facts_fts t join facts f on f.id = t.rowid join among m on m.version = f.patch
            where facts_fts match :query order by t.rank, patch, f.patch in now desc, f.line""",
            {"query": query, "tree": tree},
        )
        unlike = ("version", "line")
        once = {tuple(row[name] for name in row if name not in unlike): row for row in reversed(found)}
        return list(reversed(once.values()))[:limit]

    def results(self, patch: str) -> list[dict[str, Any]]:
        """What was measured of a version's facts, newest first; before, after and more as values."""
        rows = self.rows("select * from results where patch = ? order by date desc, line", patch)
        return [
            {**row, **{key: self.value(row[key] or "null") for key in ("before", "after", "more")}}
            for row in rows
        ]

    def layers(self, patch: str) -> list[dict[str, Any]]:
        """A version's edited weights: shape, form, rank, norm, and share of the base's norm."""
        return self.rows(
            """select l.*, l.norm / b.norm as share from layers l join patches p on p.id = l.patch
            left join base_weights b on b.base = p.base and b.weight = l.weight
            where l.patch = ? order by l.weight""",
            patch,
        )

    def patch_norms(self) -> dict[str, tuple[float | None, float | None]]:
        """Of each version ‖ΔW‖ over all its weights, and its share of the norm that the base has in these;
        None where one of them was not measured here."""
        rows = self.rows(
            """select l.patch, sum(l.norm * l.norm) as squared, sum(b.norm * b.norm) as base,
                count(*) as weights, count(l.norm) as measured, count(b.norm) as known
            from layers l join patches p on p.id = l.patch
            left join base_weights b on b.base = p.base and b.weight = l.weight group by l.patch"""
        )
        found: dict[str, tuple[float | None, float | None]] = {}
        for row in rows:
            norm = math.sqrt(row["squared"]) if row["measured"] == row["weights"] else None
            whole = math.sqrt(row["base"]) if row["known"] == row["weights"] else None
            found[row["patch"]] = (norm, norm / whole if norm is not None and whole else None)
        return found

    def base_norms(self, base: str) -> dict[str, float]:
        """‖W‖ of a base's weights (by its fingerprint), as far as they were measured here."""
        rows = self.rows("select weight, norm from base_weights where base = ?", base)
        return {row["weight"]: row["norm"] for row in rows}

    def timings(self, patch: str) -> dict[str, float]:
        """Seconds by phase of a version's last edit."""
        rows = self.rows("select phase, seconds from timings where patch = ? order by id", patch)
        return {row["phase"]: row["seconds"] for row in rows}

    def evaluations(self, patch: str) -> list[dict[str, Any]]:
        """Metrics measured of a version, newest first."""
        rows = self.rows("select * from evaluations where patch = ? order by id desc", patch)
        return [{**row, "metrics": self.value(row["metrics"])} for row in rows]

    def builds(self) -> list[dict[str, Any]]:
        """Every build written from here: folder, tree, base, date, record."""
        rows = self.rows("select * from builds order by folder")
        return [{**row, "record": self.value(row["record"])} for row in rows]

    def known_fingerprint(self, folder: Path) -> str | None:
        """A checkpoint's fingerprint, if no file of it changed in size, time or place since it was hashed."""
        rows, listing = self._remembered(folder), _listing(folder)
        return rows[0]["fingerprint"] if rows and listing and rows[0]["files"] == listing[0] else None

    def folders_of(self, fingerprint: str) -> list[Path]:
        """The checkpoints, no builds of ours, that have this fingerprint as far as it is known."""
        rows = self.rows(
            """select folder from fingerprints where fingerprint = ?
            and folder not in (select folder from builds) order by folder""",
            fingerprint,
        )
        folders = [Path(row["folder"]) for row in rows]
        return [folder for folder in folders if self.known_fingerprint(folder) == fingerprint]

    def written_since(self, folder: Path) -> bool:
        """Whether a file of a checkpoint whose fingerprint was known changed in size, time or place."""
        return bool(self._remembered(folder)) and self.known_fingerprint(folder) is None

    def _remembered(self, folder: Path) -> list[dict[str, Any]]:
        return self.rows("select * from fingerprints where folder = ?", _written(folder.resolve()))

    # -- what was measured here ------------------------------------------------------------

    def record_results(
        self,
        patch: str,
        *,
        results: Sequence[Mapping[str, Any]],
        summary: Mapping[str, Any],
        timings: Mapping[str, float],
        environment: Mapping[str, Any],
    ) -> None:
        """What a version's facts said before and after (by line), their sums, seconds by phase."""
        with self.writing() as db:
            measured = self._measured(db, patch, environment)
            db["results"].insert_all(
                {
                    **measured,
                    "line": line,
                    "before": json_text(result.get("before")),
                    "after": json_text(result.get("after")),
                    "more": json_text({key: result[key] for key in result if key not in ("before", "after")}),
                }
                for line, result in enumerate(map(without_nan, results), 1)
            )
            db["evaluations"].insert(
                {**measured, "dataset": "its own facts", "metrics": json_text(without_nan(dict(summary)))}
            )
            db["timings"].insert_all(
                {**measured, "phase": phase, "seconds": seconds} for phase, seconds in timings.items()
            )

    def record_evaluation(
        self,
        patch: str | None,
        dataset: str,
        metrics: Mapping[str, Any],
        environment: Mapping[str, Any],
        tree: str | None = None,
    ) -> None:
        """Metrics of a version, or of a whole stack (`tree`), on a dataset."""
        with self.writing() as db:
            measured = self._measured(db, patch, environment)
            db["evaluations"].insert(
                {**measured, "tree": tree, "dataset": dataset, "metrics": json_text(dict(metrics))}
            )

    def record_norms(
        self, patch: str, norms: Mapping[str, float], base: str, base_norms: Mapping[str, float]
    ) -> None:
        """‖ΔW‖ of a version's weights, and ‖W‖ of the base's."""
        with self.writing() as db:
            _known_patch(db, patch)
            rows = [{"patch": patch, "weight": weight, "norm": norm} for weight, norm in norms.items()]
            db["layers"].upsert_all(rows, pk=("patch", "weight"))
            rows = [{"base": base, "weight": weight, "norm": norm} for weight, norm in base_norms.items()]
            db["base_weights"].upsert_all(rows, pk=("base", "weight"))

    def record_build(self, folder: Path, tree: str, record: Any, fingerprint: str) -> None:
        """A build that was written just now: its `BuildRecord`, and the fingerprint of its weights."""
        value = record.to_json()
        row = {
            "folder": _written(folder.resolve()),
            "tree": tree,
            "base": value.get("base"),
            "date": _now(),
            "record": json_text(value),
        }
        with self.writing() as db:
            db["builds"].upsert(row, pk="folder")
            _put_fingerprint(db, folder, _listing(folder), fingerprint)

    def remember_fingerprint(self, folder: Path, fingerprint: str) -> None:
        """Keep a base's fingerprint for `known_fingerprint`; it is no harm where that cannot be."""
        listing = _listing(folder)
        if listing is None or time.time() - listing[1] < _SETTLED:
            return
        try:
            with self.writing() as db:
                _put_fingerprint(db, folder, listing, fingerprint)
        except PatchkitError:
            return

    def reindex(self, store: GitStore, *, norms: bool = True, anew: bool = False) -> dict[str, int]:
        """Derive everything derivable from Git's history again; counts by name. See `indexing`."""
        from patchkit.database.indexing import reindex

        return reindex(self, store, norms=norms, anew=anew)

    def _measured(self, db: Any, patch: str | None, environment: Mapping[str, Any]) -> dict[str, Any]:
        """The columns that every measurement has."""
        versions = json_text(dict(environment))
        row = {
            "id": hash_bytes(versions.encode()),
            "device": str(environment.get("device", "")),
            "versions": versions,
        }
        db["environments"].upsert(row, pk="id")
        if patch is not None:
            _known_patch(db, patch)
        return {"patch": patch, "date": _now(), "environment": row["id"]}


def _put_fingerprint(db: Any, folder: Path, listing: tuple[str, float] | None, fingerprint: str) -> None:
    if listing is not None:
        row = {"folder": _written(folder.resolve()), "files": listing[0], "fingerprint": fingerprint}
        db["fingerprints"].upsert(row, pk="folder")


def _written(path: str | Path) -> str:
    """A path as SQLite takes it: bytes that are not UTF-8 are spelled out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _known_patch(db: Any, patch: str) -> None:
    """A row for measurements to hang on; `reindex` fills it in."""
    db.execute("insert or ignore into patches(id) values (?)", [patch])


def _listing(folder: Path) -> tuple[str, float] | None:
    """Size, times and place of every file that a fingerprint reads, and when the last one changed."""
    found = []
    newest = 0.0
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
                status = os.stat(path)
                found.append(
                    [
                        _written(path.name),
                        status.st_size,
                        status.st_mtime_ns,
                        status.st_ctime_ns,
                        status.st_ino,
                    ]
                )
                newest = max(newest, status.st_mtime, status.st_ctime)
    except OSError:
        return None
    return json_text(found), newest


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
