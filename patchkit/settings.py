"""patchkit.toml: the base that a repository's patches stand on, and its editing recipe.

Reads strictly: every wrong key or value is one `Misconfigured` line that names the file and the
key. Writes only what changed, so that a person's comments and order stay. What a recipe's fields
mean is for `editing.recipe` to check; here they only have to be values that TOML can hold.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchkit.errors import Misconfigured, NotFound

__all__ = ["BASE_KEY", "FILE", "FOLDER", "Settings", "dump_settings", "load_settings", "parse_settings"]

FILE = "patchkit.toml"
BASE_KEY = "patchkit.base"  # in `git config`: where the base lies on this machine
FOLDER = "folder:"  # before a base's name: it came from a local folder, whose path is that machine's own
MAX_BYTES = 1 << 20

_BASE = ("source", "revision", "fingerprint")
_TABLES = ("base", "recipe")
_MANY = "many"  # of the recipe's keys, the one that is a table
_FORMAT = 1  # of the file, where it does not say so; a newer one says `format = 2` above its tables
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
_INTEGER = 1 << 63  # TOML's integers are 64 bits
_REASON = "tuned: "  # what a comment behind a field begins with that says why it is so
_HEAD = "What these patches stand on, and how facts are edited in. Commit it like the patches."


@dataclass(frozen=True)
class Settings:
    """`base_source` is a hub id, a short name or "folder:NAME"; `recipe` a flat table.

    `many`, [recipe.many]: another, of what differs for a batch of many facts; empty where nothing does.
    """

    base_source: str
    base_revision: str | None
    base_fingerprint: str
    recipe: dict[str, Any] = field(default_factory=dict)
    many: dict[str, Any] = field(default_factory=dict)

    @property
    def base_on_hub(self) -> bool:
        """Whether others can fetch the base by its name; a short name's revision is a dtype."""
        return "/" in self.base_source and not self.base_source.startswith(FOLDER)


def load_settings(path: Path) -> Settings:
    """Read a patchkit.toml; `NotFound` or `Misconfigured` in one line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise NotFound(f"{path}: cannot be read ({error.strerror}); make one: patchkit init BASE") from error
    return parse_settings(data, str(path))


def parse_settings(data: bytes, name: str = FILE) -> Settings:
    """The settings that a file's bytes spell; `name` is for messages."""
    tables = _toml(data, name)
    _check_format(tables.pop("format", _FORMAT), name)
    _known(tables, _TABLES, name, "")
    base = _table(tables, "base", name)
    _known(base, _BASE, name, "base.")
    recipe = _table(tables, "recipe", name) if "recipe" in tables else {}
    many = _table({"recipe.many": recipe.pop(_MANY)}, "recipe.many", name) if _MANY in recipe else {}
    fingerprint = _text(base, "fingerprint", name)
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise Misconfigured(f"{name}: base.fingerprint is not 'sha256:' and 64 hex digits; see patchkit base")
    for prefix, table in (("recipe", recipe), ("recipe.many", many)):
        for key, value in table.items():
            _check_value(value, f"{name}: {prefix}.{_shown(key)}")
    return Settings(
        base_source=_text(base, "source", name),
        base_revision=_text(base, "revision", name) if "revision" in base else None,
        base_fingerprint=fingerprint,
        recipe=recipe,
        many=many,
    )


def dump_settings(
    settings: Settings, previous: bytes | None = None, reasons: Mapping[str, str] | None = None
) -> bytes:
    """Spell `settings`; with `previous` (the file as it is) its comments and order are kept.

    `reasons`: a line for fields of the recipe, as a comment behind each: behind a person's own, and in the
    place of what such a reason said before.
    """
    import tomlkit

    recipe, many = (
        {key: _listed(value) for key, value in table.items()} for table in (settings.recipe, settings.many)
    )
    for key, value in (*recipe.items(), *many.items()):
        _check_value(value, f"recipe.{_shown(key)}")
    base = {"source": settings.base_source, "fingerprint": settings.base_fingerprint}
    if settings.base_revision is not None:
        base = {**base, "revision": settings.base_revision}
    if previous is None:
        document = tomlkit.document()
        document.add(tomlkit.comment(_HEAD))
    else:
        parse_settings(previous)
        document = tomlkit.parse(previous.decode("utf-8"))
    if reasons and isinstance(document.get("recipe"), tomlkit.items.InlineTable):
        document.append("recipe", tomlkit.item(document.pop("recipe").unwrap()))  # which holds no comments
    comments = {key: _own_comment(document, key) for key in reasons or {}}
    recipe |= {_MANY: many} if many else {}
    for table, values in (("base", base), ("recipe", recipe)):
        if table not in document:
            document[table] = tomlkit.table()
        _update(document[table], values)
    for key, reason in (reasons or {}).items():
        document["recipe"][key].comment(f"{comments[key]}{_REASON}{' '.join(reason.split())}")
    data = tomlkit.dumps(document).encode("utf-8")
    parse_settings(data)
    return data


def _own_comment(document: Any, key: str) -> str:
    """What a person wrote behind a field of the recipe, ready to be gone on with."""
    item = document.get("recipe", {}).get(key)
    said = item.trivia.comment.removeprefix("#").strip() if hasattr(item, "trivia") else ""
    own = said.partition(_REASON)[0].rstrip(" ;")
    return f"{own}; " if own else ""


def _update(table: Any, values: Mapping[str, Any]) -> None:
    for key in [key for key in table if key not in values]:
        del table[key]
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            _update(table[key], value)
        elif key not in table or not _same(table[key], value):
            table[key] = value


def _same(old: Any, new: Any) -> bool:
    """Equal in value and in TOML's type: 1, 1.0 and true are three values."""
    old = old.unwrap() if hasattr(old, "unwrap") else old
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_same, old, new))
    return type(old) is type(new) and bool(old == new)


def _toml(data: bytes, name: str) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise Misconfigured(f"{name}: is over {MAX_BYTES} bytes; this is not a settings file")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Misconfigured(f"{name}:{line}: is not UTF-8; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        place = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        where, what = (f":{place[1]}", str(error)[: place.start()]) if place else ("", str(error))
        readable = "".join(c if c.isprintable() else " " for c in what)[:120]
        raise Misconfigured(f"{name}{where}: is not TOML ({readable}); mend the line") from None


def _check_format(number: Any, name: str) -> None:
    if type(number) is not int or number < 1:
        raise Misconfigured(f"{name}: format is not a number from 1; leave it out or restore the file")
    if number > _FORMAT:
        raise Misconfigured(
            f"{name}: is in format {number}, this patchkit reads up to {_FORMAT}; update patchkit"
        )


def _known(table: Mapping[str, Any], known: tuple[str, ...], name: str, prefix: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            names = f"known are {', '.join(known)} (or update patchkit, if a newer one wrote the file)"
            hint = f"did you mean {near[0]}?" if near else names
            raise Misconfigured(f"{name}: unknown key {prefix}{_shown(key)}; {hint}")


def _table(tables: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    value = tables.get(key)
    if not isinstance(value, dict):
        what = "is missing" if value is None else "is not a table"
        raise Misconfigured(f"{name}: [{key}] {what}; make a fresh file with patchkit init BASE")
    return value


def _text(table: Mapping[str, Any], key: str, name: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        what = "is missing" if value is None else "is not a line of text"
        raise Misconfigured(f"{name}: base.{key} {what}")
    return value


def _check_value(value: Any, where: str) -> None:
    if isinstance(value, list):
        for item in value:
            if isinstance(item, list):
                raise Misconfigured(f"{where}: holds a list in a list; write numbers or texts")
            _check_value(item, where)
    elif isinstance(value, bool | str):
        return
    elif isinstance(value, int):
        if not -_INTEGER <= value < _INTEGER:
            raise Misconfigured(f"{where}: is too large for a 64-bit integer")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise Misconfigured(f"{where}: is not a finite number")
    else:
        raise Misconfigured(f"{where}: is a {type(value).__name__}; write a number, a text or a list of them")


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(key: str) -> str:
    return key if key.isprintable() and len(key) <= 60 else repr(key)[:60]
