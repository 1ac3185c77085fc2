"""A tree under patches/, read as what a stranger sent: names, kinds, sizes, hashes.

Gives each patch folder's header and facts, or the one problem that keeps it from being believed.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence

from patchkit.canonical import hash_bytes
from patchkit.errors import PatchkitError
from patchkit.facts import Fact, FactsError, load_canonical
from patchkit.git import lfs
from patchkit.git.lfs import begins_pointer
from patchkit.git.locks import at_root, git_at_root
from patchkit.git.store import ATTRIBUTES, PATCHES, Entry, GitStore, Tree
from patchkit.patch import DELTA, FACTS, KEYS, Header, check_parts, read_patch_header, valid_patch_name
from patchkit.problem import Problem, one_line
from patchkit.tensors import header_of

__all__ = ["inspect_folders", "inspect_layout", "inspect_numbers", "odd_twin"]

MAX_BYTES = {FACTS: 256 << 20, DELTA: 8 << 30, KEYS: 8 << 30, ".gitattributes": 4096}
MAX_PATCHES = 100_000

_REGULAR = ("100644", "100755")
_KINDS = {
    "120000": "is a symbolic link, which could lead anywhere",
    "160000": "is another repository (a gitlink)",
    "40000": "is a folder inside a patch",
}
_REMOVE = "take it out and commit: {} rm -r -- {}"

Believed = tuple[Header, tuple[Fact, ...], str]
Folders = dict[str, dict[str, Entry]]


def inspect_layout(store: GitStore, tree: Tree) -> tuple[Folders, list[Problem]]:
    """Patch folder -> its files, where all are of the kinds and names that a patch has; else problems."""
    found: list[Problem] = []
    folders: Folders = {}
    bad: set[str] = set()
    attributes = False
    in_lfs = tree.lfs
    for entry in tree.entries:
        parts = entry.path.split("/")
        if message := _odd(entry, parts):
            found.append(_problem(store, entry.path, message))
            bad.add("/".join(parts[1:-1]))
        elif entry.pointer and not in_lfs:
            found.append(_unasked(entry))
            bad.add(parts[1])
        elif in_lfs and entry.pointer is None and lfs.large(entry.path):
            found.append(_plain(store, entry))
            bad.add(parts[1])
        elif len(parts) == 2:
            attributes = True
            found += _attributes(store, entry)
        elif parts[2] in folders.setdefault(parts[1], {}):
            found.append(_problem(store, entry.path, "stands twice in one folder"))
        else:
            folders[parts[1]][parts[2]] = entry
    for name, files in folders.items():
        if name not in bad and not {FACTS, DELTA} <= set(files):
            missing = FACTS if FACTS not in files else DELTA
            found.append(_problem(store, f"{PATCHES}/{name}", f"misses {missing}"))
            bad.add(name)
    if folders and not attributes:
        found.append(_without_attributes(store))
    if len(folders) > MAX_PATCHES:
        found.append(Problem(PATCHES, f"holds over {MAX_PATCHES} patches", "join some of them into one"))
    return {name: files for name, files in sorted(folders.items()) if name not in bad}, found


def inspect_folders(store: GitStore, folders: Folders) -> Iterator[tuple[str, Believed | Problem]]:
    """Header, facts and id of each patch folder, every byte hashed; or what is wrong with it."""
    for name, files in folders.items():
        try:
            yield name, _believe(store, name, files)
        except FactsError as error:
            fault = str(error.faults[0])
            yield name, _problem(store, f"{PATCHES}/{name}", f"is not as patchkit writes it: {fault}")
        except PatchkitError as error:
            yield name, _problem(store, f"{PATCHES}/{name}", str(error))


def inspect_numbers(store: GitStore, folders: Folders, seen: set[str]) -> Iterator[Problem]:
    """Tensor files with NaN or infinity, without torch; ``seen``: the object ids of those looked at."""
    import numpy as np

    for name, files in folders.items():
        for file in (DELTA, KEYS):
            if file not in files or files[file].oid in seen:
                continue
            seen.add(files[file].oid)
            where = f"{PATCHES}/{name}/{file}"
            try:
                data = store.read(files[file].oid)
                tensors = header_of(data, file).tensors.values()
            except PatchkitError:  # which `inspect_folders` tells
                continue
            for tensor in tensors:
                rows = np.frombuffer(data[tensor.start : tensor.end], "<f4") if tensor.dtype == "F32" else 0.0
                if not np.isfinite(rows).all():
                    yield _problem(store, where, f"tensor {tensor.name[:120]!r} holds NaN or infinity")
                    break


def _believe(store: GitStore, name: str, files: Mapping[str, Entry]) -> Believed | Problem:
    where = f"{PATCHES}/{name}"
    data = {}
    for file, entry in files.items():
        if entry.pointer and not store.media.has(entry.pointer):
            return _not_here(f"{where}/{file}")
        if file == FACTS and begins_pointer(store.objects.read(entry.oid)):
            return _unasked(entry)
        data[file] = store.read(entry.oid)
        if begins_pointer(data[file]):  # of another version
            return _unasked(entry)
    header = read_patch_header(data[DELTA], DELTA)
    if KEYS in data:
        header_of(data[KEYS], KEYS)
    if odd := odd_twin(header, data):
        return Problem(
            f"{where}/{odd}",
            f"is not the one that {DELTA} was made with (a merge or an edit mixed two versions)",
            f"put back the files of one version: git checkout COMMIT -- {_quoted(store.prefix + where)}",
        )
    facts = load_canonical(data[FACTS], FACTS)
    check_parts(header, len(facts), DELTA)
    return header, facts, hash_bytes(data[DELTA])


def odd_twin(header: Header, files: Mapping[str, bytes]) -> str | None:
    """The file of a patch that is not of the version that its delta is of."""
    twins = {FACTS: header.facts, KEYS: header.keys}
    return next((f for f, wanted in twins.items() if f in files and hash_bytes(files[f]) != wanted), None)


def _odd(entry: Entry, parts: Sequence[str]) -> str | None:
    """What is wrong with a name under patches/, before its bytes are read."""
    if entry.mode not in _REGULAR:
        return _KINDS.get(entry.mode, f"has the unknown mode {one_line(entry.mode)}")
    if len(parts) == 2 and parts[1] != ".gitattributes":
        return "is not a patch folder; only patches lie here"
    if len(parts) == 3 and not valid_patch_name(parts[1]):
        return "lies in a folder that is not named as patches are (a slug and 8 hex digits)"
    if len(parts) == 3 and parts[2] == ".gitattributes":
        return "changes how Git treats this patch"
    if len(parts) == 3 and parts[2] not in (FACTS, DELTA, KEYS):
        return "is not a file of a patch"
    if entry.size < 0:
        return "is missing from Git's objects (a partial clone, or damage; git fetch gets it)"
    limit = MAX_BYTES[parts[-1]]
    return f"has {entry.size} bytes, over the limit of {limit}" if entry.size > limit else None


def _attributes(store: GitStore, entry: Entry) -> list[Problem]:
    try:
        if store.read(entry.oid) in (ATTRIBUTES, lfs.ATTRIBUTES):
            return []
        message = "is not patchkit's own: it can make Git mix two versions of a patch, or alter its bytes"
    except PatchkitError as error:
        message = str(error)
    lines = ATTRIBUTES.decode().replace("\n", "\\n")
    return [
        Problem(
            entry.path,
            message,
            f"commit it again as: printf '{lines}' > {_quoted(store.prefix + entry.path)}",
        )
    ]


def _unasked(entry: Entry) -> Problem:
    return Problem(
        one_line(entry.path),
        "is a Git LFS pointer, not the file",
        "commit the file itself (git lfs migrate export, see the manual of Git LFS), or keep the whole stack "
        "in Git LFS: patchkit init BASE --lfs",
    )


def _plain(store: GitStore, entry: Entry) -> Problem:
    return Problem(
        one_line(entry.path),
        "lies in Git itself, and this stack is kept in Git LFS",
        f"{git_at_root(store)} add --renormalize -- {at_root(store, entry.path)}, and commit it",
    )


def _not_here(path: str) -> Problem:
    return Problem(path, "is kept in Git LFS, and is not here", "get it: git lfs fetch REMOTE COMMIT")


def _without_attributes(store: GitStore) -> Problem:
    path = f"{PATCHES}/.gitattributes"
    lines = ATTRIBUTES.decode().replace("\n", "\\n")
    return Problem(
        path,
        "is missing: Git would merge patches line by line",
        f"write and commit it: printf '{lines}' > {_quoted(store.prefix + path)}",
    )


def _problem(store: GitStore, path: str, message: str) -> Problem:
    return Problem(
        one_line(path), one_line(message), _REMOVE.format(git_at_root(store), at_root(store, path))
    )


def _quoted(path: str) -> str:
    """A path in a command to copy; what would end a line or act on a terminal is escaped."""
    return shlex.quote(one_line(path))
