"""History as patchkit lists it: the commits that touched patches/ or patchkit.toml.

One `git log` gives everything, a thousand commits in some tens of milliseconds. A merge is
compared with its first parent: it lists what it brought in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from patchkit.settings import FILE as SETTINGS

if TYPE_CHECKING:
    from patchkit.gitstore import GitStore

__all__ = ["PATCHES", "Commit", "FileChange", "added_in", "read_history"]

PATCHES = "patches"

_FIELDS = ("%H", "%P", "%an", "%ae", "%aI", "%B", "%(trailers:only,unfold)")
_TELLING = ("facts.jsonl", "delta.safetensors")  # their coming and going is the patch's


@dataclass(frozen=True, slots=True)
class FileChange:
    """One file of a commit's change; `status` as Git has it (A, M, D, T), `oid` of the new blob and
    `old` of the one before (zeros where there is none)."""

    status: str
    path: str
    oid: str
    old: str


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit; `added`, `changed` and `removed` are names of patch folders, sorted."""

    id: str
    parents: tuple[str, ...]
    author: str
    email: str
    date: datetime
    message: str
    trailers: tuple[tuple[str, str], ...]
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    settings_changed: bool
    files: tuple[FileChange, ...]

    @property
    def subject(self) -> str:
        """The first line of the message."""
        return self.message.strip().partition("\n")[0]

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "parents": list(self.parents),
            "author": self.author,
            "email": self.email,
            "date": self.date.isoformat(),
            "subject": self.subject,
            "message": self.message,
            "trailers": [list(pair) for pair in self.trailers],
            "added": list(self.added),
            "changed": list(self.changed),
            "removed": list(self.removed),
            "settings_changed": self.settings_changed,
        }


def read_history(store: GitStore, commit: str, limit: int | None = None) -> list[Commit]:
    """The commits up to `commit` that touched the stack, newest first."""
    out = store.git.read(
        "log",
        "-z",
        "--raw",
        "--no-renames",
        "--no-abbrev",
        "--no-color",
        "--no-ext-diff",
        "--no-show-signature",
        "--full-history",
        "--diff-merges=first-parent",
        "--encoding=UTF-8",
        "--format=" + "%x00".join(_FIELDS) + "%x00",
        *([f"--max-count={limit}"] if limit else []),
        commit,
        "--",
        *store.pathspecs(),
    )
    return list(_parse(out, store.prefix))


def added_in(commits: Sequence[Commit]) -> dict[str, Commit]:
    """For each patch folder, the newest commit that added it."""
    found: dict[str, Commit] = {}
    for commit in commits:
        for name in commit.added:
            found.setdefault(name, commit)
    return found


def _parse(out: bytes, prefix: str) -> Iterator[Commit]:
    """Messages hold no NUL, so the fields are told apart by their place alone."""
    tokens = [token.decode("utf-8", "surrogateescape") for token in out.split(b"\0")]
    at = 0
    while at + len(_FIELDS) <= len(tokens):
        fields = tokens[at : at + len(_FIELDS)]
        at += len(_FIELDS)
        changes: list[FileChange] = []
        while at < len(tokens) and (tokens[at] == "" or tokens[at].lstrip("\n").startswith(":")):
            if tokens[at]:
                words = tokens[at].split(" ")
                changes.append(FileChange(words[4], tokens[at + 1].removeprefix(prefix), words[3], words[2]))
                at += 1
            at += 1
        yield _commit(fields, changes)


def _commit(fields: list[str], changes: list[FileChange]) -> Commit:
    oid, parents, author, email, date, message, trailers = fields
    statuses: dict[str, dict[str, str]] = {}
    for change in changes:
        parts = change.path.split("/", 2)
        if parts[0] == PATCHES and len(parts) == 3:
            statuses.setdefault(parts[1], {})[parts[2]] = change.status
    kinds = {name: _kind(files) for name, files in statuses.items()}
    return Commit(
        id=oid,
        parents=tuple(parents.split()),
        author=author,
        email=email,
        date=_date(date),
        message=message,
        trailers=tuple(_trailers(trailers)),
        added=tuple(sorted(name for name, kind in kinds.items() if kind == "A")),
        changed=tuple(sorted(name for name, kind in kinds.items() if kind == "M")),
        removed=tuple(sorted(name for name, kind in kinds.items() if kind == "D")),
        settings_changed=any(change.path == SETTINGS for change in changes),
        files=tuple(changes),
    )


def _date(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:  # Git writes down any date that it is told; the commit is no worse for it
        return datetime.fromtimestamp(0, UTC)


def _kind(files: dict[str, str]) -> str:
    """A(dded), D(eleted) or M(odified): what became of the patch whose files changed so."""
    found = {files[name] for name in _TELLING if name in files} or set(files.values())
    return found.pop() if found in ({"A"}, {"D"}) else "M"


def _trailers(text: str) -> Iterator[tuple[str, str]]:
    for line in text.split("\n"):
        key, colon, value = line.partition(":")
        if colon:
            yield key.strip(), value.strip()
