"""History as patchkit lists it: the commits that touched patches/ or patchkit.toml.

One `git log` gives everything. A long one is kept beside the catalogue, since Git compares trees again each
time: what came on top since then is read alone. A merge is compared with its first parent: it lists what it
brought in.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from patchkit.canonical import hash_bytes
from patchkit.errors import PatchkitError
from patchkit.files import reading, write_durably
from patchkit.settings import FILE as SETTINGS

if TYPE_CHECKING:
    from patchkit.git.store import GitStore

__all__ = [
    "LONG",
    "PATCHES",
    "Commit",
    "FileChange",
    "GraphRow",
    "added_in",
    "read_graph",
    "read_history",
    "read_mainline",
    "writers_of",
]

PATCHES = "patches"

_FIELDS = ("%H", "%P", "%an", "%ae", "%aI", "%B", "%(trailers:only,unfold)")
_KEPT = "history"
LONG = 200  # commits from which keeping them saves more than it costs
_COMMIT = re.compile(rb"[0-9a-f]{40,64}")
_TELLING = ("facts.jsonl", "delta.safetensors")  # their coming and going is the patch's


class FileChange(NamedTuple):
    """One file of a commit's change; `status` as Git has it (A, M, D, T), `oid` of the new blob and
    `old` of the one before (zeros where there is none)."""

    status: str
    path: str
    oid: str
    old: str


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit; `added`, `changed` and `removed` are names of patch folders, sorted.

    `cut`: a shallow clone ends here, so Git tells its whole tree as its change; no patch is named then.
    """

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
    cut: bool = False

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
            "cut": self.cut,
        }


@dataclass(frozen=True, slots=True)
class GraphRow:
    """One commit in Git's graph: what stands left of its first line, and of the lines below it."""

    id: str
    left: tuple[str, ...]

    def drawn(self, count: int) -> list[str]:
        """What stands left of a commit of `count` lines; of none, what connects the commits around it.

        Lines that only lead on are left out where there is nothing to say, edges that turn are not.
        """
        left = list(self.left)
        if not count:
            left[0] = left[0].replace("*", "|")
        left += [_leading_on(left[-1])] * (count - len(left))
        return left[:count] + [line for line in left[count:] if line.strip("| ")]


def _leading_on(line: str) -> str:
    return "".join(character if character in "| " else " " for character in line)


_IN_ORDER = ("--date-order",)  # a child before its parent, where a script made both in one second
_CONNECTED = ("--topo-order", "--simplify-merges", "--parents")  # the commits that `git log --graph` connects


def read_history(
    store: GitStore,
    commit: str,
    limit: int | None = None,
    *,
    since: str | None = None,
    connected: bool = False,
) -> list[Commit]:
    """The commits up to `commit` that touched the stack, newest first; those that `since` has left out.

    `connected`: those of `read_graph` in its order, merges of two sides among them; `parents` are then the
    nearest commits of the list.
    """
    edge = _edge(store)  # such a history can grow at its other end
    if limit or since or connected or edge:
        how = _CONNECTED if connected else _IN_ORDER
        return list(_parse(_log(store, _between(since, commit), limit, how), store.prefix, edge))
    tip, out = _kept(store)
    if tip != commit:
        out = _log(store, f"{tip}..{commit}") + out if _in_line(store, tip, commit) else _log(store, commit)
    commits = list(_parse(out, store.prefix))
    if tip != commit and len(commits) >= LONG:
        _keep(store, commit, out)
    return commits


def read_mainline(store: GitStore, commit: str) -> list[Commit]:
    """The commits of one branch that touched the stack, newest first: first parents alone, read from Git."""
    return list(_parse(_log(store, commit, how=("--first-parent",)), store.prefix))


def _edge(store: GitStore) -> frozenset[str]:
    """The commits with which a shallow clone ends; none of a whole one."""
    with suppress(OSError):
        return frozenset((store.common_dir / "shallow").read_text("ascii", "replace").split())
    return frozenset()


def _kept(store: GitStore) -> tuple[str, bytes]:
    """A commit and its history as Git spelled it; ("", b"") where none was kept, or not as it was."""
    try:
        with reading(store.own / _KEPT) as file:
            digest, _, rest = file.read().partition(b"\n")
    except PatchkitError:
        return "", b""
    tip, _, out = rest.partition(b"\n")
    whole = hash_bytes(rest).encode() == digest and bool(_COMMIT.fullmatch(tip))
    return (tip.decode(), out) if whole else ("", b"")


def _keep(store: GitStore, tip: str, out: bytes) -> None:
    rest = tip.encode() + b"\n" + out
    with suppress(PatchkitError):  # what cannot be kept costs only time
        write_durably(store.own / _KEPT, hash_bytes(rest).encode() + b"\n" + rest)


def _in_line(store: GitStore, older: str, newer: str) -> bool:
    """Whether `newer` stands on `older` with nothing but commits of one parent between them."""
    stands = bool(older) and store.is_ancestor(older, newer)
    return stands and not store.git.read("rev_list", "--merges", "-n1", f"{older}..{newer}")


def _between(since: str | None, commit: str) -> str:
    return f"{since}..{commit}" if since else commit


def _log(store: GitStore, commits: str, limit: int | None = None, how: Sequence[str] = _IN_ORDER) -> bytes:
    return store.git.read(
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
        *how,
        *([f"--max-count={limit}"] if limit else []),
        commits,
        "--",
        *store.pathspecs(),
    )


def read_graph(store: GitStore, commit: str, lines: int, since: str | None = None) -> list[GraphRow]:
    """The graph that Git draws of the commits up to `commit`, but those of `since`, that touched the stack.

    Git is told that every commit has `lines` lines, so that it draws what stands left of each of them.
    """
    out = store.git.read(
        "log",
        "--graph",
        "--no-color",
        "--no-show-signature",
        "--full-history",
        "--simplify-merges",
        "--format=%x01%H" + "%n%x02" * (lines - 1),
        _between(since, commit),
        "--",
        *store.pathspecs(),
    )
    rows: list[tuple[str, list[str]]] = []
    for line in out.decode("ascii", "replace").splitlines():
        left, mark, oid = line.partition("\x01")
        if mark:
            rows.append((oid.strip(), [left]))
        elif rows:
            rows[-1][1].append(left.partition("\x02")[0])
    return [GraphRow(oid, tuple(left)) for oid, left in rows]


def added_in(commits: Sequence[Commit]) -> dict[str, Commit]:
    """For each patch folder, the newest commit that added it; a merge only where none of another kind did."""
    return _newest(((name, commit) for commit in commits for name in commit.added), merges=False)


def writers_of(commits: Sequence[Commit], *, merges: bool) -> dict[str, Commit]:
    """For each patch folder the newest commit that wrote it.

    With ``merges`` such a commit may be the merge that brought it in, else only where no other wrote it.
    """
    wrote = ((name, commit) for commit in commits for name in (*commit.added, *commit.changed))
    return _newest(wrote, merges=merges)


def _newest(wrote: Iterable[tuple[str, Commit]], *, merges: bool) -> dict[str, Commit]:
    found: dict[str, Commit] = {}
    brought: dict[str, Commit] = {}
    for name, commit in wrote:
        (brought if len(commit.parents) > 1 and not merges else found).setdefault(name, commit)
    return {**brought, **found}


def _parse(out: bytes, prefix: str, edge: Collection[str] = ()) -> Iterator[Commit]:
    """Messages hold no NUL, so the fields are told apart by their place alone."""
    tokens = out.decode("utf-8", "surrogateescape").split("\0")
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
        yield _commit(fields, changes, cut=fields[0] in edge)


def _commit(fields: list[str], changes: list[FileChange], *, cut: bool) -> Commit:
    oid, parents, author, email, date, message, trailers = fields
    statuses: dict[str, dict[str, str]] = {}
    for change in () if cut else changes:
        parts = change.path.split("/", 2)
        if parts[0] == PATCHES and len(parts) == 3:
            statuses.setdefault(parts[1], {})[parts[2]] = change.status
    kinds: dict[str, list[str]] = {"A": [], "M": [], "D": []}
    for name, files in statuses.items():
        kinds[_kind(files)].append(name)
    return Commit(
        id=oid,
        parents=tuple(parents.split()),
        author=author,
        email=email,
        date=_date(date),
        message=message,
        trailers=tuple(_trailers(trailers)) if trailers else (),
        added=tuple(sorted(kinds["A"])),
        changed=tuple(sorted(kinds["M"])),
        removed=tuple(sorted(kinds["D"])),
        settings_changed=not cut and any(change.path == SETTINGS for change in changes),
        files=tuple(changes),
        cut=cut,
    )


def _date(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:  # Git writes down any date that it is told; the commit is no worse for it
        return datetime.fromtimestamp(0, UTC)


def _kind(files: dict[str, str]) -> str:
    """A(dded), D(eleted) or M(odified): what became of the patch whose files changed so.

    Without its keys, or with a file that is none of a patch's, it is in force as it was.
    """
    found = {files[name] for name in _TELLING if name in files}
    return found.pop() if found in ({"A"}, {"D"}) else "M"


def _trailers(text: str) -> Iterator[tuple[str, str]]:
    for line in text.split("\n"):
        key, colon, value = line.partition(":")
        if colon:
            yield key.strip(), value.strip()
