"""The catalogue's tables and views, as migrations: each is applied once, in order, never changed.

Tables of what Git's history says (commits, changes, patches, facts, layers, trees) can be derived
again; tables of what was measured on this machine (results, evaluations, timings, builds) cannot.
Both hang on the patch version's id, so that nothing measured is lost when the former are written
anew. The views are for people: `datasette catalogue.db` is a usable page.
"""

from __future__ import annotations

import sqlite3
from typing import Any

__all__ = ["JSON", "LOST_INDEX", "MIGRATIONS", "migrate", "newer", "odd_json", "pending", "steps"]

SET = "patchkit"  # of the migrations, in SQLite's table of those that were applied
MIGRATIONS = (
    "m001_history",
    "m002_beliefs",
    "m003_measured",
    "m004_views",
    "m005_utc",
    "m006_authors",
    "m007_versions",
)

LOST_INDEX = """
    select exists (select 1 from sqlite_master where name = 'facts')
       and not exists (select 1 from sqlite_master where name = 'facts_fts')"""
"""Whether there are facts, and the search index that belongs to them is gone."""

_VIEWS = {
    "patches_in_force": """
        select m.name, c.date, c.author, p.facts, p.rank, round(sum(l.norm * l.norm), 6) as squared_norm,
               p.bytes, p.method, p.id as version
        from members m join state s on s.tree = m.tree join patches p on p.id = m.patch
        left join layers l on l.patch = p.id
        left join commits c on c.id = (
            select h.id from changes x join commits h on h.id = x."commit"
            where x.name = m.name and x.kind = 'added' order by h.date desc limit 1)
        group by m.name order by c.date""",
    "facts_in_force": """
        select m.name as patch, f.line, f.subject, f.prompt, f.target, f.was, f.relation
        from facts f join members m on m.patch = f.patch join state s on s.tree = m.tree
        order by m.name, f.line""",
    "layer_shares": """
        select p.name as patch, l.weight, l.form, l.rank, l.norm, b.norm as base_norm,
               l.norm / b.norm as share
        from layers l join patches p on p.id = l.patch
        left join base_weights b on b.base = p.base and b.weight = l.weight
        order by p.name, l.weight""",
    "measured_facts": """
        select p.name as patch, f.line, f.subject, f.prompt, f.target, r.before, r.after, r.date,
               e.device, r.environment
        from results r join patches p on p.id = r.patch
        left join facts f on f.patch = r.patch and f.line = r.line
        left join environments e on e.id = r.environment
        order by r.date desc, p.name, r.line""",
    "log": """
        select c.date, c.author, c.subject,
               group_concat(case x.kind when 'added' then '+' when 'removed' then '-' else '~' end
                            || ' ' || x.name, ', ') as patches, c.id
        from commits c left join changes x on x."commit" = c.id group by c.id order by c.date desc""",
}

_AUTHORS = """
    select m.name, c.date, c.author, p.facts, p.rank, round(sum(l.norm * l.norm), 6) as squared_norm,
           p.bytes, p.method, p.id as version
    from members m join state s on s.tree = m.tree join patches p on p.id = m.patch
    left join layers l on l.patch = p.id
    left join commits c on c.id = (
        select h.id from changes x join commits h on h.id = x."commit"
        where x.name = m.name and x.kind = 'added' order by h.parents like '% %', h.date desc limit 1)
    group by m.name order by c.date"""

_VERSIONS = """
    select p.name as patch, l.weight, l.form, l.rank, l.norm, b.norm as base_norm, l.norm / b.norm as share,
           exists (select 1 from members m join state s on s.tree = m.tree where m.patch = p.id) as in_force,
           p.id as version
    from layers l join patches p on p.id = l.patch
    left join base_weights b on b.base = p.base and b.weight = l.weight
    order by p.name, l.weight"""


JSON = {
    "environments": ("versions",),
    "results": ("before", "after", "more"),
    "evaluations": ("metrics",),
    "builds": ("record",),
    "violations": ("violation",),
}  # columns by table


def odd_json(connection: sqlite3.Connection) -> list[str]:
    """The columns in which a row holds what is no JSON: altered bytes within a text are nothing to SQLite."""
    tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
    return [
        f"{table}.{column}"
        for table, columns in JSON.items()
        if table in tables
        for column in columns
        if connection.execute(f'select 1 from "{table}" where not json_valid("{column}") limit 1').fetchone()
    ]


def migrate(database: Any) -> None:
    """Bring an open `sqlite_utils.Database` to the newest schema."""
    steps().apply(database)


def pending(database: Any) -> bool:
    """Whether `migrate` has anything to do."""
    return bool(steps().pending(database))


def newer(connection: sqlite3.Connection) -> str | None:
    """A migration of a newer patchkit that was applied to an open database; None if there is none."""
    if not connection.execute("select 1 from sqlite_master where name = '_sqlite_migrations'").fetchone():
        return None
    names = connection.execute("select name from _sqlite_migrations where migration_set = ?", [SET])
    return next((str(name) for (name,) in names if name not in MIGRATIONS), None)


def steps() -> Any:
    """All migrations, as `sqlite_utils.Migrations`."""
    from sqlite_utils import Migrations

    migrations = Migrations(SET)

    @migrations()
    def m001_history(db: Any) -> None:
        db["commits"].create(
            {
                "id": str,
                "parents": str,
                "author": str,
                "email": str,
                "date": str,
                "subject": str,
                "message": str,
                "trailers": str,
            },
            pk="id",
        )
        db["recipes"].create({"id": str, "method": str, "recipe": str}, pk="id")
        db["patches"].create(
            {
                "id": str,
                "name": str,
                "base": str,
                "method": str,
                "recipe": str,
                "facts": int,
                "rank": int,
                "bytes": int,
                "header": str,
            },
            pk="id",
            foreign_keys=[("recipe", "recipes", "id")],
        )
        db["changes"].create(
            {"commit": str, "name": str, "kind": str, "patch": str},
            pk=("commit", "name"),
            foreign_keys=[("commit", "commits", "id"), ("patch", "patches", "id")],
        )
        db["facts"].create(
            {
                "id": int,
                "patch": str,
                "line": int,
                "subject": str,
                "prompt": str,
                "target": str,
                "was": str,
                "relation": str,
                "record": str,
            },
            pk="id",
            foreign_keys=[("patch", "patches", "id")],
        )
        db["facts"].create_index(["patch", "line"], unique=True)
        db["facts"].enable_fts(
            ["subject", "prompt", "target"], create_triggers=True, tokenize="unicode61 remove_diacritics 2"
        )
        db["layers"].create(
            {"patch": str, "weight": str, "d_out": int, "d_in": int, "form": str, "rank": int, "norm": float},
            pk=("patch", "weight"),
            foreign_keys=[("patch", "patches", "id")],
        )
        db["base_weights"].create({"base": str, "weight": str, "norm": float}, pk=("base", "weight"))

    @migrations()
    def m002_beliefs(db: Any) -> None:
        db["trees"].create({"id": str, "base": str, "digest": str}, pk=("id", "base"))
        db["members"].create(
            {"tree": str, "name": str, "patch": str, "files": str},
            pk=("tree", "name"),
            foreign_keys=[("patch", "patches", "id")],
        )
        db["state"].create({"id": int, "tree": str, "commit": str}, pk="id")
        db["checked_tips"].create({"number": int, "commit": str}, pk="number")
        db["checked_tips"].create_index(["commit"], unique=True)
        db["violations"].create({"digest": str, "merge": str, "violation": str}, pk="digest")

    @migrations()
    def m003_measured(db: Any) -> None:
        db["environments"].create({"id": str, "device": str, "versions": str}, pk="id")
        measured = {"patch": str, "date": str, "environment": str}
        keys = [("patch", "patches", "id"), ("environment", "environments", "id")]
        db["results"].create(
            {"id": int, **measured, "line": int, "before": str, "after": str, "more": str},
            pk="id",
            foreign_keys=keys,
        )
        db["results"].create_index(["patch", "line"])
        db["evaluations"].create(
            {"id": int, **measured, "tree": str, "dataset": str, "metrics": str}, pk="id", foreign_keys=keys
        )
        db["timings"].create(
            {"id": int, **measured, "phase": str, "seconds": float}, pk="id", foreign_keys=keys
        )
        db["builds"].create(
            {"folder": str, "tree": str, "base": str, "date": str, "record": str}, pk="folder"
        )
        db["fingerprints"].create({"folder": str, "files": str, "fingerprint": str}, pk="folder")

    @migrations()
    def m004_views(db: Any) -> None:
        for name, query in _VIEWS.items():
            db.create_view(name, query)

    @migrations()
    def m005_utc(db: Any) -> None:
        """Commits were dated where they were made, so that their dates did not sort as texts."""
        in_utc = "strftime('%Y-%m-%dT%H:%M:%S+00:00', date)"  # nothing for a date that SQLite does not know
        db.execute(f"update commits set date = {in_utc} where {in_utc} is not null")

    @migrations()
    def m006_authors(db: Any) -> None:
        """A merge adds what it brought; who made a patch is who committed it, as `stack` has it."""
        db.create_view("patches_in_force", _AUTHORS, replace=True)

    @migrations()
    def m007_versions(db: Any) -> None:
        """A patch that was solved again has several versions, whose layers stood under one name alike."""
        db.create_view("layer_shares", _VERSIONS, replace=True)

    return migrations
