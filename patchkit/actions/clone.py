"""A clone that is checked before anything of it is checked out."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchkit.errors import BadInput, NotFound, PatchkitError, WouldOverwrite
from patchkit.files import move_durably, writing
from patchkit.git.command import Git
from patchkit.git.remotes import bring_large, checked_place, name_for, over_network, shown_place
from patchkit.git.store import PATCHES, GitStore
from patchkit.inspection import inspect_layout
from patchkit.problem import Problem
from patchkit.repository import Repository
from patchkit.settings import FILE as SETTINGS
from patchkit.stack import TreeProblems, read_stack

__all__ = ["Cloned", "clone"]

# A link in the tree is written as a file that holds where it leads; the clone keeps to that. No hook runs,
# also not one of a template, before the tree is checked; that setting is taken out again.
_HOOKS = "core.hooksPath"
_SAFE = ("-c", f"{_HOOKS}={os.devnull}", "-c", "core.symlinks=false")
_WAY = ("--quiet", "--no-checkout", "--no-local", "--no-recurse-submodules")
_PLAIN = {"GIT_LFS_SKIP_SMUDGE": "1"}  # what a tree keeps in Git LFS may be many gigabytes


@dataclass(frozen=True)
class Cloned:
    """A clone; ``stacks`` are its folders that have a patchkit.toml, ``patches`` are in force in them."""

    folder: Path
    source: str
    commit: str
    stacks: tuple[str, ...]
    patches: int
    base: str
    place: Path | None
    """Where the base lies on this machine, if that was said."""

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "folder": str(self.folder),
            "stacks": list(self.stacks),
            "place": None if self.place is None else str(self.place),
        }


def clone(
    url: str,
    folder: str | None = None,
    *,
    directory: Path = Path("."),
    base: str | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Cloned:
    """Clone ``url`` into ``folder`` (named after it if left out), if what it brings is believed.

    Made in a temporary folder beside it (in it, where it is there already and empty) and moved when all is
    well, so that nothing of a refused clone stays. TreeProblems lists what is wrong with it; NotFound and
    Unavailable where it cannot be had; WouldOverwrite where ``folder`` is there and not empty.
    """
    place = checked_place(url, directory)
    if base is not None and (own := directory / Path(base).expanduser()).is_dir():
        base = str(own)  # as the other paths are: from the folder that -C names
    target = (directory / (folder or name_for(place))).resolve()
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise WouldOverwrite(f"{target}: is there already and not empty; name another folder")
    missing = [parent for parent in target.parents if not parent.exists()]
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    git = Git(target.parent)
    git.check_version()
    there = target.is_dir()  # maybe the folder that a shell stands in: it stays, and is filled
    temporary = (target if there else target.parent) / f".patchkit-{secrets.token_hex(8)}.tmp"
    try:
        done = _checked(git, place, temporary, base, progress)
        if not dry_run:
            _check_out(Git(temporary), _stores(temporary, target.name))
            if there:
                _move_in(temporary, target)
            else:
                move_durably(temporary, target)
    except BaseException as error:
        _clear(temporary, missing)
        if temporary.exists() and isinstance(error, PatchkitError):
            raise error.retold(f"{error}; what came lies in {temporary}, remove it") from error
        raise
    _clear(temporary, missing)
    return Cloned(target, shown_place(place), *done)


def _move_in(temporary: Path, target: Path) -> None:
    """Git's own folder last: before it is there, nobody takes the rest for a repository."""
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == ".git"):
        move_durably(path, target / path.name)


def _clear(temporary: Path, parents: Sequence[Path]) -> None:
    """Remove what was made for a clone, but for folders that hold something by now."""
    shutil.rmtree(temporary, ignore_errors=True)
    with suppress(OSError):
        for parent in parents:
            parent.rmdir()


def _checked(
    git: Git,
    place: str,
    temporary: Path,
    base: str | None,
    progress: Callable[[int, int, str], None] | None,
) -> tuple[str, tuple[str, ...], int, str, Path | None]:
    """Everything but the work tree, and what it holds."""
    over_network(git, "clone", *_WAY, *_SAFE, "--end-of-options", place, str(temporary), place=place)
    stores = _stores(temporary, shown_place(place))
    found: list[Problem] = []
    patches = 0
    remote = os.fsdecode(Git(temporary).read("remote")).splitlines()[0]  # as clone.defaultRemoteName has it
    for store in stores:
        if not inspect_layout(store, store.tree())[1]:  # what is not sound may ask for any number of bytes
            bring_large(store, remote, "HEAD")
        try:
            patches += len(read_stack(store).patches)
        except TreeProblems as error:
            found += [Problem(f"{store.prefix}{p.path}", p.message, p.remedy) for p in error.problems]
    if found:
        raise TreeProblems(found)
    if base is not None and len(stores) > 1:
        raise BadInput("--base: this repository holds several stacks; clone it, then patchkit base in each")
    placed = Repository(stores[0]).set_base(base, progress=progress) if base is not None else None
    head = stores[0].head()
    assert head is not None
    names = tuple(store.prefix.removesuffix("/") or "." for store in stores)
    return head, names, patches, ", ".join(store.settings().base_source for store in stores), placed


def _stores(root: Path, shown: str) -> list[GitStore]:
    """Every folder of HEAD's tree that has a patchkit.toml, read from Git alone."""
    git = Git(root)
    if git.ask("rev_parse", "--verify", "--quiet", "HEAD^{commit}") is None:
        raise NotFound(f"{shown}: is an empty repository; make one with patchkit init BASE")
    hashes = git.read("rev_parse", "--show-object-format").decode().strip()
    stores = GitStore(root, root, root / ".git", root / ".git", hashes).stacks()
    if not stores:
        raise NotFound(f"{shown}: holds no {SETTINGS}, so it is no repository of patches; see git clone")
    return stores


def _check_out(git: Git, stores: Sequence[GitStore]) -> None:
    git.write("checkout", "--quiet", "--no-recurse-submodules", env=_PLAIN)
    git.write("config", "--local", "--unset-all", _HOOKS)
    for store in stores:
        if store.tree().lfs:
            git.write("lfs", "checkout", "--", f"{store.prefix}{PATCHES}")
