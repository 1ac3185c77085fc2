"""Whether the catalogue is whole, and whether what it derived from Git is still what Git says.

Looks at a copy in memory. A catalogue that is behind Git is no problem, one that says otherwise is: each
row is compared with the row that `reindex` would write. What was measured here has no second source.
"""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from patchkit.actions.versions import Reached, Versions, tree_files
from patchkit.database.beliefs import is_outdated, patch_rows
from patchkit.database.indexing import change_rows, commit_row
from patchkit.database.opening import open_to_read
from patchkit.database.schema import LOST_INDEX, newer, odd_json
from patchkit.errors import PatchkitError
from patchkit.git.history import Commit, read_history
from patchkit.merging.merges import Violation, merge_problems
from patchkit.patch import DELTA, KEYS
from patchkit.problem import Problem, one_line
from patchkit.stack import StoredPatch, read_patch

if TYPE_CHECKING:
    from patchkit.repository import Repository

__all__ = ["check_catalogue", "compare_catalogue"]

Progress = Callable[[str, int, int], None] | None
Row = Mapping[str, Any]

_REMEDY = "patchkit fsck --repair, or patchkit reindex"
_WHOLE = "insert into facts_fts(facts_fts, rank) values ('integrity-check', 1)"
_ALL = 1 << 31  # commits: a limit, so that the history is Git's own and not one that was kept
_NEAR = 1e-5  # of a norm: another machine's sums are rounded otherwise


def check_catalogue(repository: Repository) -> list[Problem]:
    """Whether SQLite can read it, its references and its search index hold, and its format is known."""
    path = repository.catalogue.path
    if not os.path.lexists(path):
        return []
    try:
        with closing(_copy(repository)) as copy:
            if (step := newer(copy)) is not None:
                message = f"is in the format of a newer patchkit ({one_line(step)[:60]})"
                return [Problem(str(path), message, "update patchkit")]
            found = _damage(copy)
    except sqlite3.OperationalError as error:
        return [Problem(str(path), f"cannot be read ({error})", "give access to it, or try again")]
    except (sqlite3.Error, ValueError) as error:
        found = [f"is damaged ({one_line(str(error))})"]
    return [Problem(str(path), message, _REMEDY) for message in found]


def compare_catalogue(
    repository: Repository, found: Reached, known: Versions, progress: Progress = None
) -> list[Problem]:
    """The rows that disagree with Git, one problem a row; for a catalogue that `check_catalogue` passed."""
    path = repository.catalogue.path
    if not path.exists():
        return []
    with closing(_copy(repository)) as copy:
        copy.row_factory = sqlite3.Row
        compared = _Comparison(repository, copy, found, known)
        tables = {row["name"] for row in copy.execute("select name from sqlite_master where type = 'table'")}
        messages: list[str] = []
        for number, (table, check) in enumerate(compared.checks, 1):
            messages += check() if table in tables else []
            if progress is not None:
                progress("catalogue", number, len(compared.checks))
    return [Problem(str(path), one_line(message), _REMEDY) for message in messages]


def _copy(repository: Repository) -> sqlite3.Connection:
    copy = sqlite3.connect(":memory:")
    with closing(open_to_read(repository.catalogue.path)) as file:
        file.backup(copy)
    return copy


def _damage(copy: sqlite3.Connection) -> list[str]:
    said = [str(line) for (line,) in copy.execute("pragma integrity_check(5)")]
    if said != ["ok"]:
        return [f"is damaged ({one_line(line)})" for line in said]
    orphans = copy.execute("pragma foreign_key_check").fetchall()
    lost = [f"{row[0]} row {row[1]} refers to a row of {row[2]} that is gone" for row in orphans[:5]]
    lost += [f"{column} holds what is no JSON" for column in odd_json(copy)]
    try:
        copy.execute(_WHOLE)
    except sqlite3.OperationalError:
        if copy.execute(LOST_INDEX).fetchone()[0]:
            return [*lost, "facts_fts, the search index, is gone"]
        return lost  # no table of facts yet
    except sqlite3.DatabaseError:
        return [*lost, "facts_fts, the search index, does not fit the facts"]
    return lost


class _Comparison:
    """The catalogue's derived rows beside those that Git gives."""

    def __init__(
        self, repository: Repository, copy: sqlite3.Connection, found: Reached, known: Versions
    ) -> None:
        self.repository, self.store = repository, repository.store
        self.copy, self.found, self.known = copy, found, known
        self.checks: list[tuple[str, Callable[[], Iterator[str]]]] = [
            ("patches", self._versions),
            ("commits", self._commits),
            ("trees", self._trees),
            ("state", self._state),
            ("violations", self._violations),
        ]

    def _rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        return [dict(row) for row in self.copy.execute(query, values)]

    def _versions(self) -> Iterator[str]:
        for row in self._rows("select * from patches where header is not null order by id"):
            stored = self.known.patches.get(row["id"])
            if stored is not None:  # else of a branch that is gone
                yield from self._version(row, stored)

    def _version(self, row: dict[str, Any], stored: StoredPatch) -> Iterator[str]:
        wanted = patch_rows(stored)
        short = row["id"][:12]
        sizes = {stored.size, stored.size - (stored.files[KEYS].size if KEYS in stored.files else 0)}
        names = self.known.names[stored.id]
        fitting = {
            "name": row["name"] if row["name"] in names else stored.name,
            "bytes": row["bytes"] if row["bytes"] in sizes else stored.size,
        }
        yield from _differing(f"patches row {short}…", row, {**wanted["patch"], **fitting})
        held = self._rows("select * from recipes where id = ?", row["recipe"])
        if held:
            yield from _differing(f"recipes row {row['recipe'][:12]}…", held[0], wanted["recipe"])
        facts = {fact["line"]: fact for fact in self._rows("select * from facts where patch = ?", row["id"])}
        yield from _tables(f"facts of {short}…, line", facts, {f["line"]: f for f in wanted["facts"]})
        layers = {w["weight"]: w for w in self._rows("select * from layers where patch = ?", row["id"])}
        yield from _tables(f"layers of {short}…", layers, {w["weight"]: w for w in wanted["layers"]})
        yield from self._norms(short, stored, layers)

    def _norms(self, short: str, stored: StoredPatch, layers: Mapping[str, Row]) -> Iterator[str]:
        told = {name: row["norm"] for name, row in layers.items() if row["norm"] is not None}
        norms = read_patch(self.store, stored).norms() if told else {}
        for name, norm in told.items():
            right = isinstance(norm, float) and math.isclose(norm, norms.get(name, -1.0), rel_tol=_NEAR)
            if not right:
                yield f"layers of {short}… {name}: its norm is not the patch's"

    def _commits(self) -> Iterator[str]:
        changes: dict[str, dict[Any, Row]] = {}
        for row in self._rows("select * from changes"):
            changes.setdefault(row["commit"], {})[row["name"]] = row
        history = self._history()
        for row in self._rows("select * from commits"):
            commit = history.get(row["id"])
            if commit is not None:  # else of a branch that is gone
                where = f"commits row {row['id'][:10]}"
                yield from _differing(where, row, commit_row(commit))
                wanted = {change["name"]: change for change in change_rows(commit, self.known.deltas)}
                yield from _tables(f"changes of {row['id'][:10]}:", changes.get(row["id"], {}), wanted)

    def _history(self) -> dict[str, Commit]:
        tips = self.store.git.read("for_each_ref", "--format=%(objectname)").decode("ascii").split()
        heads = [*([head] if (head := self.store.head()) else []), *tips]
        history: dict[str, Commit] = {}
        for tip in dict.fromkeys(heads):
            if self.store.git.ask("cat_file", "-e", f"{tip}^{{commit}}") is not None:
                for commit in read_history(self.store, tip, _ALL):
                    history.setdefault(commit.id, commit)
        return history

    def _trees(self) -> Iterator[str]:
        for row in self._rows("select * from trees"):
            if row["id"] not in self.found.trees or is_outdated(row["digest"]):
                continue
            held = self.repository.catalogue.recall(row["id"], row["base"])
            if held is None:
                yield f"trees row {row['id'][:10]} and its members do not have the digest that they had"
                continue
            wanted = {name: dict(files) for name, files in tree_files(self.store, row["id"])}
            if {patch.name: dict(patch.files) for patch in held} != wanted or any(
                self.known.deltas.get(patch.files[DELTA].oid) != patch.id for patch in held
            ):
                yield f"trees row {row['id'][:10]}: its members are not what Git's tree holds"

    def _state(self) -> Iterator[str]:
        for row in self._rows("select * from state"):
            try:
                right = row["commit"] is None or self.store.tree(row["commit"]).id == row["tree"]
            except PatchkitError:
                continue  # a commit that Git has dropped
            if not right:
                yield "the state row names a tree that is not its commit's"

    def _violations(self) -> Iterator[str]:
        tips, known = self.repository.catalogue.checked_merges()
        head = self.store.head()
        if head is None or head not in tips:
            return
        memory = _Listening()
        merge_problems(self.store, head, {}, memory)
        if missing := set(memory.found) - set(known):
            yield f"violations: {len(missing)} of the merges that were looked through are missing"


class _Listening:
    """A memory of nothing, which keeps what it is told."""

    def __init__(self) -> None:
        self.found: list[Violation] = []

    def checked_merges(self) -> tuple[list[str], list[Violation]]:
        return [], []

    def remember_merges(self, tip: str, violations: Sequence[Violation]) -> None:
        self.found += violations


def _tables(where: str, held: Mapping[Any, Row], wanted: Mapping[Any, Row]) -> Iterator[str]:
    for key in sorted(held.keys() | wanted.keys(), key=str):
        if key not in held or key not in wanted:
            yield f"{where} {key}: {'is not in Git' if key in held else 'is missing'}"
        else:
            yield from _differing(f"{where} {key}", held[key], wanted[key])


def _differing(where: str, held: Row, wanted: Row) -> Iterator[str]:
    odd = [name for name, value in wanted.items() if held[name] != value]
    if odd:
        yield f"{where}: {', '.join(odd)} {'is' if len(odd) == 1 else 'are'} not what Git says"
