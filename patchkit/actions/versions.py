"""Every version of every patch that a reference reaches, and every tree and settings file that held them.

Read from Git's trees alone, each folder once however many commits hold it. `fsck --full` hashes them
again, `gc` asks what is still referred to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from patchkit.git.store import PATCHES, Entry, GitStore, sized_entries
from patchkit.inspection import inspect_folders
from patchkit.patch import DELTA, FACTS, KEYS
from patchkit.problem import Problem
from patchkit.stack import StoredPatch

__all__ = ["Reached", "Versions", "reached", "tree_files", "versions"]

Progress = Callable[[str, int, int], None] | None


@dataclass
class Reached:
    """What the commits hold; each object id with the newest commit that has it."""

    trees: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    folders: dict[tuple[str, str], str] = field(default_factory=dict)
    """(name, object id) of patch folders."""


@dataclass
class Versions:
    """The versions that agree with themselves, by id, and what is wrong with the others.

    ``deltas``: the object id of a delta file -> its version. ``names``: every folder that holds a version.
    """

    patches: dict[str, StoredPatch] = field(default_factory=dict)
    deltas: dict[str, str] = field(default_factory=dict)
    names: dict[str, set[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def reached(store: GitStore, *, reflogs: bool = False, progress: Progress = None) -> Reached:
    """What every reference and HEAD reach (with ``reflogs`` also what they stood on before)."""
    start = ["--all", *(["--reflog"] if reflogs else []), *(["HEAD"] if store.head() else [])]
    listed = store.git.read("rev_list", "--full-history", *start, "--", *store.pathspecs())
    commits = listed.decode("ascii").split()
    found = Reached()
    for number, commit in enumerate(commits, 1):
        tree = store.tree(commit)
        if tree.settings is not None:
            found.settings.setdefault(tree.settings.oid, commit)
        if tree.patches is not None and tree.patches.mode == "40000" and tree.id not in found.trees:
            found.trees[tree.id] = commit
            for item in store.objects.tree(tree.id):
                if item.mode == "40000":
                    found.folders.setdefault((item.name, item.oid), commit)
        if progress is not None:
            progress("history", number, len(commits))
    return found


def versions(store: GitStore, found: Reached, progress: Progress = None) -> Versions:
    """Header, facts, keys and id of each folder, every byte hashed."""
    done = Versions()
    for number, ((name, oid), commit) in enumerate(found.folders.items(), 1):
        for _, result in inspect_folders(store, {name: _files(store, name, oid)}):
            if isinstance(result, Problem):
                where = f"{result.path} at {commit[:10]}"
                done.problems.append(Problem(where, result.message, result.remedy))
                continue
            stored = StoredPatch.read(name, *result, _files(store, name, oid))
            done.patches.setdefault(stored.id, stored)
            done.deltas[stored.files[DELTA].oid] = stored.id
            done.names.setdefault(stored.id, set()).add(name)
        if progress is not None:
            progress("patches", number, len(found.folders))
    return done


def tree_files(store: GitStore, tree: str) -> Iterator[tuple[str, Mapping[str, Entry]]]:
    """The patch folders of a patches/ tree by its object id, each with its files."""
    for item in store.objects.tree(tree):
        if item.mode == "40000":
            yield item.name, _files(store, item.name, item.oid)


def _files(store: GitStore, name: str, oid: str) -> dict[str, Entry]:
    items = [item for item in store.objects.tree(oid) if item.name in (FACTS, DELTA, KEYS)]
    found = [(f"{PATCHES}/{name}/{item.name}", item) for item in items]
    return {item.name: e for item, e in zip(items, sized_entries(store.objects, found), strict=True)}
