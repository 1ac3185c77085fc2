"""Finds any altered byte in Git's objects, references and index, and in the work tree's patches.

Hashes everything and trusts no time stamps. `git fsck` checks what objects say to one another; what
it does not look at (the spelling of references, a HEAD that leads to another or to no branch, an
index, packs' helper files) is checked here. Changes nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from patchkit.errors import PatchkitError
from patchkit.git.locks import at_root, git_at_root
from patchkit.git.objects import object_id
from patchkit.git.store import GitStore, Tree
from patchkit.problem import Problem, one_line
from patchkit.settings import FILE as SETTINGS

__all__ = ["fsck_git", "fsck_worktree"]

Check = Callable[[GitStore], Iterator[Problem]]

_SHOWN = 50
_PIECE = 1 << 20
_FETCH = "get it from another clone (git fetch), or restore the .git folder from a backup"
_HASHED = ("*.pack", "*.idx", "*.rev", "*.bitmap", "*.mtimes", "multi-pack-index*")
_OID = "(?:[0-9a-f]{40}|[0-9a-f]{64})"
_REFERENCE = re.compile(rf"{_OID}\n|ref: refs/\S+\n".encode())
_PACKED_HEADER = re.compile(rb"# pack-refs with:(?: peeled| fully-peeled| sorted)* ")
_PACKED = re.compile(rf"({_OID}) (refs/\S+)|\^{_OID}".encode())
_LOG_LINE = re.compile(rf"{_OID} ({_OID}) ".encode())


def fsck_git(store: GitStore) -> list[Problem]:
    """Every altered byte in Git's objects (loose and packed), references and index that can be found."""
    checks = [_loose_objects, _hashed_files, _indexes, _git_fsck]
    if not (store.common_dir / "reftable").is_dir():
        checks += [_loose_references, _packed_references, _named_tags, _logged_references]
    return [problem for check in checks for problem in _told(check, store)]


def fsck_worktree(store: GitStore) -> list[Problem]:
    """Every file of HEAD's patches, and patchkit.toml, whose bytes in the work tree are not the committed."""
    tree = store.tree()
    left_out = store.sparse()
    wanted = {
        entry.path: entry.oid
        for entry in tree.entries
        if entry.mode in ("100644", "100755") and entry.path not in left_out
    }
    if tree.settings is not None:
        wanted[SETTINGS] = tree.settings.oid
    return [problem for path, oid in wanted.items() for problem in _worktree_file(store, tree, path, oid)]


def _told(check: Check, store: GitStore) -> Iterator[Problem]:
    """A check's findings; one that Git cannot even begin is a finding itself."""
    try:
        yield from check(store)
    except (PatchkitError, OSError) as error:
        yield Problem(str(store.common_dir), f"cannot be checked ({one_line(str(error))})", _FETCH)


def _worktree_file(store: GitStore, tree: Tree, path: str, oid: str) -> Iterator[Problem]:
    place = store.folder / path
    how = f"restore --source=HEAD --staged --worktree -- {at_root(store, path)}"
    restore = f"put it back: {git_at_root(store)} {how}"
    try:
        data = place.read_bytes()
    except OSError as error:
        yield Problem(path, f"cannot be read in the work tree ({error.strerror})", restore)
        return
    # A pointer of Git LFS may lie there itself: a clone can leave the files where they are.
    ways = [tree.blob_id(path, data), object_id("blob", data, store.objects.hash_name)]
    if path == SETTINGS:
        ways.append(tree.blob_id(path, data.replace(b"\r\n", b"\n")))  # as core.autocrlf checks it out
    if place.is_symlink() or oid not in ways:
        yield Problem(path, "is not the file that is committed", restore)


def _loose_objects(store: GitStore) -> Iterator[Problem]:
    for folder in sorted((store.common_dir / "objects").glob("[0-9a-f][0-9a-f]")):
        for path in sorted(folder.glob("*")):  # of none, where Git has packed them meanwhile
            if re.fullmatch("[0-9a-f]{38}|[0-9a-f]{62}", path.name) and not _is_object(
                path, folder.name + path.name, store.objects.hash_name
            ):
                yield Problem(f"object {folder.name}{path.name}", "was altered", _FETCH)


def _is_object(path: Path, oid: str, hash_name: str) -> bool:
    inflate = zlib.decompressobj()
    try:
        data = inflate.decompress(path.read_bytes())
    except FileNotFoundError:
        return True  # packed since it was listed; what is in no pack either, `git fsck` misses
    except (OSError, zlib.error):
        return False
    header, _, body = data.partition(b"\0")
    whole = inflate.eof and not inflate.unused_data and header.endswith(b" %d" % len(body))
    return whole and hashlib.new(hash_name, data, usedforsecurity=False).hexdigest() == oid


def _hashed_files(store: GitStore) -> Iterator[Problem]:
    """Packs and their helper files end in a hash of all that stands before it."""
    objects = store.common_dir / "objects"
    files = [path for pattern in _HASHED for path in (objects / "pack").glob(pattern)]
    files += [objects / "info" / "commit-graph", *(objects / "info" / "commit-graphs").glob("*.graph")]
    for path in sorted(set(files)):
        if path.is_file() and not _ends_in_hash(path, store.objects.hash_name):
            remedy = (
                _FETCH
                if path.suffix == ".pack"
                else f"make it anew: rm -f {path}; git gc (or git index-pack)"
            )
            yield Problem(str(path), "was altered", remedy)


def _indexes(store: GitStore) -> Iterator[Problem]:
    places = [store.git_dir, store.common_dir, *(store.common_dir / "worktrees").glob("*")]
    indexes = {path for place in places for path in (place / "index", *place.glob("sharedindex.*"))}
    for path in sorted(indexes):
        if path.exists() and not _ends_in_hash(path, store.objects.hash_name):
            yield Problem(str(path), "Git's index was altered", f"make it anew: rm -f {path} && git reset")


def _ends_in_hash(path: Path, hash_name: str) -> bool:
    digest = hashlib.new(hash_name, usedforsecurity=False)
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - digest.digest_size  # another may put a new file in its place
        while left > 0 and (piece := file.read(min(_PIECE, left))):
            digest.update(piece)
            left -= len(piece)
        end = file.read()
    return end == digest.digest() or end == bytes(digest.digest_size)  # zeros: index.skipHash


def _loose_references(store: GitStore) -> Iterator[Problem]:
    heads = {
        store.git_dir / "HEAD",
        store.common_dir / "HEAD",
        *(store.common_dir / "worktrees").glob("*/HEAD"),
    }
    files = [path for path in (store.common_dir / "refs").rglob("*") if path.is_file()]
    for path in sorted({*heads, *files}):
        if path.suffix != ".lock" and not _is_reference(path):
            yield Problem(str(path), "is not spelled as Git writes a reference", "restore it: see git reflog")


def _is_reference(path: Path) -> bool:
    try:
        return _REFERENCE.fullmatch(path.read_bytes()) is not None
    except FileNotFoundError:
        return True  # another command packed or deleted it since it was listed


def _packed_references(store: GitStore) -> Iterator[Problem]:
    path = store.common_dir / "packed-refs"
    if not path.exists():
        return
    head, *lines = path.read_bytes().split(b"\n")
    found = [_PACKED.fullmatch(line) for line in lines[:-1]]
    names = [match[2] for match in found if match and match[2]]
    spelled = _PACKED_HEADER.fullmatch(head) and all(found) and lines[-1:] == [b""]
    if not (spelled and names == sorted(set(names)) and _peeled_rightly(store, lines)):
        yield Problem(
            str(path), "is not spelled as Git writes packed references", "restore it: see git reflog"
        )


def _peeled_rightly(store: GitStore, lines: list[bytes]) -> bool:
    """Whether each line "^ID" names what the tag on the line before it stands for."""
    peeled = [
        (before[: len(line) - 1], line[1:]) for before, line in pairwise(lines) if line.startswith(b"^")
    ]
    found = store.objects.infos([f"{tag.decode('ascii', 'replace')}^{{}}" for tag, _ in peeled])
    return all(info and info.oid.encode() == oid for info, (_, oid) in zip(found, peeled, strict=True))


def _named_tags(store: GitStore) -> Iterator[Problem]:
    """An annotated tag knows its own name (a lightweight one does not: Git keeps it in one place only).

    A second name for it, beside its own, is nobody's mistake, nor is a remote's.
    """
    out = store.git.read("for_each_ref", "--format=%(objectname) %(refname) %(tag)")
    rows = [line.split(" ", 2) for line in out.decode("utf-8", "replace").splitlines()]
    known = {(oid, name) for oid, name, _ in rows}
    for oid, name, tag in rows:
        if tag and not name.startswith("refs/remotes/") and (oid, f"refs/tags/{tag}") not in known:
            yield Problem(one_line(name), f"is the tag {one_line(tag)}", "name it so again: git tag")


def _logged_references(store: GitStore) -> Iterator[Problem]:
    """A reference that has a log is there, and HEAD is where its log says: unlike an altered name.

    A log that is one commit ahead of its reference is what a killed Git leaves, and no harm; where a name was
    altered, the logged commit is the tip of what has, or had, the right name.
    """
    logs = store.common_dir / "logs"
    tips = set(store.git.read("for_each_ref", "--format=%(objectname)").decode("ascii").split())
    for path in sorted((logs / "refs").rglob("*")):
        name = path.relative_to(logs).as_posix()
        if path.is_file() and _last_logged(path) in tips and not _exists(store, name):
            yield Problem(
                name, "has a log but is gone", f"bring it back: git branch NAME COMMIT (see {path})"
            )
    log = store.git_dir / "logs" / "HEAD"
    logged, head = _last_logged(log), store.head()
    if logged in tips and head != logged and _last_logged(log) == logged:  # else another command moved both
        where = f"at {head[:10]}" if head else "on a branch that has no commit"
        yield Problem(
            "HEAD",
            f"is {where}, its log says {logged}",
            "if you did not do that, go back: git symbolic-ref HEAD refs/heads/BRANCH",
        )


def _exists(store: GitStore, name: str) -> bool:
    return store.git.ask("show_ref", "--verify", "--quiet", "--", name) is not None


def _last_logged(path: Path) -> str | None:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return None
    found = _LOG_LINE.match(lines[-1]) if lines else None
    oid = found[1].decode() if found else None
    return oid if oid and oid.strip("0") else None


def _git_fsck(store: GitStore) -> Iterator[Problem]:
    status, said = store.git.check("fsck", "--full", "--strict", "--no-dangling", "--no-progress")
    if status:
        lines = [one_line(line) for line in said.splitlines() if not line.startswith("notice: ")]
        for line in lines[:_SHOWN] or [f"git fsck ended with status {status}"]:
            yield Problem(str(store.common_dir), line, _FETCH)
