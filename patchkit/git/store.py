"""A repository of patches: Git's, opened, read and (in `recording`) written.

The patches in force at a commit are the folders under `patches/` in its tree. Everything read is
hashed before it is believed; nothing here writes to the work tree or to Git's data except
`init`, `config_set` and, through `recording`, `record`: the one place that commits.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from patchkit.canonical import hash_bytes
from patchkit.errors import BadInput, Misconfigured, NotFound, NotWritten, PatchkitError
from patchkit.git import lfs
from patchkit.git.command import Git
from patchkit.git.history import PATCHES, Commit, read_history
from patchkit.git.lfs import Media, Pointer
from patchkit.git.locks import leftovers, operation_in_progress
from patchkit.git.objects import Info, Objects, TreeItem, object_id
from patchkit.git.recording import ATTRIBUTES, Changes, new_patch_files, record, refuse_filters
from patchkit.problem import Problem, one_line
from patchkit.settings import BASE_KEY, Settings, parse_settings
from patchkit.settings import FILE as SETTINGS

__all__ = ["ATTRIBUTES", "PATCHES", "Changes", "Commit", "Entry", "GitStore", "Tree", "sized_entries"]

MAX_ENTRIES = 400_000
_FILES = ("100644", "100755")


@dataclass(frozen=True, slots=True)
class Entry:
    """One name under patches/ in a tree; `path` is below the folder that holds patchkit.toml."""

    path: str
    mode: str
    oid: str
    size: int
    """Bytes; 0 for what is not a blob, -1 where the object is not in the repository."""
    pointer: Pointer | None = field(default=None, compare=False)
    """Where Git keeps only this of the file; the size is the file's."""


class Tree:
    """What one commit holds for patchkit; `patches` and `settings` are None where it has none."""

    def __init__(
        self, objects: Objects, commit: str | None, patches: TreeItem | None, settings: TreeItem | None
    ) -> None:
        self._objects = objects
        self.commit = commit
        self.patches = patches
        self.settings = settings

    @property
    def id(self) -> str:
        """The object id of patches/ ("" where there is none): equal ids, equal stacks."""
        return self.patches.oid if self.patches else ""

    @cached_property
    def lfs(self) -> bool:
        """Whether its patches are kept in Git LFS."""
        if self.patches is None or self.patches.mode != "40000":
            return False
        named = {item.name: item for item in self._objects.tree(self.patches.oid)}
        item = named.get(".gitattributes")
        return item is not None and item.mode in _FILES and self._objects.read(item.oid) == lfs.ATTRIBUTES

    @cached_property
    def entries(self) -> list[Entry]:
        """Every name under patches/: its files, its folders' files, and anything deeper as one name."""
        if self.patches is None:
            return []
        if self.patches.mode != "40000":
            return [Entry(PATCHES, self.patches.mode, self.patches.oid, 0)]
        top = self._objects.tree(self.patches.oid)
        folders = [item for item in top if item.mode == "40000"]
        found = [(f"{PATCHES}/{item.name}", item) for item in top if item.mode != "40000"]
        for folder, items in zip(folders, self._objects.trees([f.oid for f in folders]), strict=True):
            found += [(f"{PATCHES}/{folder.name}/{item.name}", item) for item in items]
            if len(found) > MAX_ENTRIES:
                raise BadInput(f"{PATCHES}: holds over {MAX_ENTRIES} files; this is not a stack of patches")
        return sized_entries(self._objects, found)

    def blob_id(self, path: str, data: bytes, *, lfs_wanted: bool | None = None) -> str:
        """The id of the blob that Git makes of a file here; `lfs_wanted` stands in for `lfs`."""
        in_lfs = self.lfs if lfs_wanted is None else lfs_wanted
        kept = bytes(Pointer.to(data)) if in_lfs and lfs.large(path) else data
        return object_id("blob", kept, self._objects.hash_name)


class GitStore:
    """A Git work tree and the folder in it that holds patchkit.toml."""

    def __init__(self, root: Path, folder: Path, git_dir: Path, common_dir: Path, hash_name: str) -> None:
        self.root = root
        self.folder = folder
        self.git_dir = git_dir
        self.common_dir = common_dir
        self.git = Git(root)
        self.objects = Objects(self.git, hash_name)
        self.media = Media(self.git, common_dir)
        relative = folder.relative_to(root).as_posix()
        self.prefix = "" if relative == "." else f"{relative}/"

    @property
    def private(self) -> Path:
        """This machine's own, shared by the repository's worktrees and stacks: statistics, the lock."""
        return self.common_dir / "patchkit"

    @property
    def own(self) -> Path:
        """This stack's part of it: catalogue, default build, what was kept aside."""
        if not self.prefix:
            return self.private
        mark = hash_bytes(os.fsencode(self.prefix)).removeprefix("sha256:")[:8]
        return self.private / "stacks" / f"{self.folder.name}-{mark}"

    @property
    def base_key(self) -> str:
        """In `git config`: where this stack's base lies on this machine."""
        section, _, name = BASE_KEY.partition(".")
        return f"{section}.{self.prefix.removesuffix('/')}.{name}" if self.prefix else BASE_KEY

    def stacks(self, rev: str = "HEAD") -> list[GitStore]:
        """Every stack of the repository at `rev`: the folders of its tree that hold a patchkit.toml."""
        out = self.git.read("ls_tree", "-r", "-z", "--full-tree", "--name-only", rev)
        paths = out.decode("utf-8", "surrogateescape").split("\0")
        folders = [(self.root / path).parent for path in paths if path.rpartition("/")[2] == SETTINGS]
        where = (self.git_dir, self.common_dir, self.objects.hash_name)
        return [GitStore(self.root, folder, *where) for folder in folders]

    @classmethod
    def find(cls, path: Path) -> GitStore:
        """The repository whose patchkit.toml is in `path` or above it."""
        root, git_dir, common_dir, hash_name = _locate(path)
        start = path.resolve()
        for folder in (start, *start.parents):
            if (folder / SETTINGS).is_file():
                return cls(root, folder, git_dir, common_dir, hash_name)
            if folder == root:
                break
        raise NotFound(
            f"{path}: no {SETTINGS} here or above; make one with patchkit init BASE, "
            "or name the folder that has it with -C DIR"
        )

    @classmethod
    def init(cls, folder: Path) -> GitStore:
        """Open `folder` for a new stack; makes the folder and a Git repository where there is none."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NotWritten(f"{folder}: cannot be made ({error.strerror}); name another folder") from error
        try:
            located = _locate(folder)
        except NotFound:
            git = Git(folder)
            named = git.ask("config", "--get", "init.defaultBranch")
            git.write("init", "--quiet", config=() if named else ("init.defaultBranch=main",))
            located = _locate(folder)
        root, git_dir, common_dir, hash_name = located
        return cls(root, folder.resolve(), git_dir, common_dir, hash_name)

    # -- reading ---------------------------------------------------------------------------

    def resolve(self, rev: str) -> str:
        """The full id of the commit that `rev` names."""
        named = f"{rev}^{{commit}}"
        try:
            found = self.git.ask("rev_parse", "--verify", "--quiet", "--end-of-options", named)
        except PatchkitError as error:
            if type(error) is not PatchkitError:  # Git said something that is known to mean another thing
                raise
            found = None  # no upstream, no such entry of a reflog, a tree
        commit = (found or b"").decode("ascii", "replace").strip()
        if not re.fullmatch("[0-9a-f]+", commit):  # "^main" is told as an id with a sign in front
            raise NotFound(f"{one_line(rev)!r} names no commit; see git log, git branch and git tag")
        return commit

    def head(self) -> str | None:
        """The id of the commit that is checked out; None before the first one."""
        found = self.git.ask("rev_parse", "--verify", "--quiet", "HEAD^{commit}")
        return None if found is None else found.decode("ascii").strip()

    def branch(self) -> str:
        """The branch that is checked out, or that there is none."""
        name = self.git.ask("symbolic_ref", "--quiet", "--short", "HEAD")
        return "no branch (detached HEAD)" if name is None else os.fsdecode(name).strip()

    def standing(self) -> str:
        """What is checked out: a branch's name, or the commit of a detached HEAD."""
        name = self.git.ask("symbolic_ref", "--quiet", "--short", "HEAD")
        return f"the detached commit {self.head()}" if name is None else os.fsdecode(name).strip()

    def tree(self, rev: str = "HEAD") -> Tree:
        """What `rev` holds; an empty tree for HEAD before the first commit."""
        commit = self.head() if rev == "HEAD" else self.resolve(rev)
        if commit is None:
            return Tree(self.objects, None, None, None)
        at = _root_tree(self.objects.read(commit, "commit"), commit)
        for part in self.prefix.split("/")[:-1]:
            item = self._named(at, part)
            if item is None or item.mode != "40000":
                return Tree(self.objects, commit, None, None)
            at = item.oid
        named = {item.name: item for item in self.objects.tree(at)}
        return Tree(self.objects, commit, named.get(PATCHES), named.get(SETTINGS))

    def read(self, oid: str) -> bytes:
        """A blob's bytes, hashed against its id; of a pointer of Git LFS, the file's."""
        return self.media.resolved(self.objects.read(oid))

    def read_all(self, oids: Sequence[str]) -> list[bytes]:
        """Many blobs' bytes, in order."""
        return [self.media.resolved(blob) for blob in self.objects.read_all(oids)]

    def settings(self, rev: str = "HEAD") -> Settings:
        """patchkit.toml as it is committed at `rev`."""
        tree = self.tree(rev)
        if tree.settings is None:
            raise NotFound(f"{rev} holds no {self.prefix}{SETTINGS}; make one with patchkit init BASE")
        if tree.settings.mode not in _FILES:
            raise Misconfigured(
                f"{self.prefix}{SETTINGS}: is not a regular file; put a real one in its place"
            )
        return parse_settings(self.read(tree.settings.oid))

    def history(self, rev: str = "HEAD", limit: int | None = None) -> list[Commit]:
        """The commits that touched patches/ or patchkit.toml, newest first."""
        if rev == "HEAD" and self.head() is None:
            return []
        return read_history(self, self.resolve(rev), limit)

    def is_ancestor(self, older: str, newer: str) -> bool:
        """Whether `newer` stands on `older`; not where one of them is not here (its branch is gone)."""
        try:
            return self.git.ask("merge_base", "--is-ancestor", older, newer) is not None
        except PatchkitError:
            return False

    def status(self, *, ignored: bool = False) -> list[tuple[str, str]]:
        """(XY, path) of what differs between HEAD, index and work tree, as `git status` spells it.

        Only patches/ and patchkit.toml; paths are below the store's folder. Trusts time stamps.
        """
        out = self.git.read(
            "status",
            "--porcelain=v1",
            "-z",
            "--untracked-files=all",
            "--no-renames",
            *(["--ignored=matching"] if ignored else []),
            "--",
            *self.pathspecs(),
        )
        found = [token for token in out.decode("utf-8", "surrogateescape").split("\0") if token]
        return [(token[:2], token[3:].removeprefix(self.prefix)) for token in found]

    def pathspecs(self) -> list[str]:
        """patches/ and patchkit.toml for a Git command, whatever characters the folder's path holds."""
        return [f":(top,literal){self.prefix}{name}" for name in (PATCHES, SETTINGS)]

    def leftovers(self) -> list[Problem]:
        """What a killed or refused command left half done, each with the command that clears it."""
        return leftovers(self)

    def config_get(self, key: str) -> str | None:
        """A value of this repository's own Git configuration."""
        found = self.git.ask("config", "--local", "--null", "--get", "--", key)
        return None if found is None else os.fsdecode(found.removesuffix(b"\0"))

    # -- writing ---------------------------------------------------------------------------

    def config_set(self, key: str, value: str) -> None:
        """Set a value of this repository's own Git configuration (durably, under Git's lock)."""
        self.git.write("config", "--local", "--replace-all", "--", key, value)

    def sparse(self) -> set[str]:
        """The files of patches/ that a sparse checkout leaves out of the work tree."""
        if not (self.git_dir / "info" / "sparse-checkout").exists():
            return set()
        out = self.git.read("ls_files", "-t", "-z", "--", self.pathspecs()[0])
        lines = out.decode("utf-8", "surrogateescape").split("\0")
        return {line[2:].removeprefix(self.prefix) for line in lines if line.startswith("S ")}

    def ensure_ready(self, *, for_patches: bool = False) -> None:
        """Everything that would refuse a commit, asked before long work: Git, identity, a merge under way;
        ``for_patches``: what would refuse a new patch too, which is how Git's attributes treat its files."""
        self.git.check_version()
        self.git.ensure_identity()
        if busy := operation_in_progress(self):
            raise busy
        in_lfs = self.tree().lfs
        if in_lfs:
            lfs.ensure_installed(self.git, f"{self.prefix}{PATCHES}")
        if self.sparse():
            raise Misconfigured(
                f"{self.folder / PATCHES}: a sparse checkout leaves it out, so Git commits nothing there; "
                f"take it in: git sparse-checkout add {shlex.quote(one_line(self.prefix + PATCHES))}"
            )
        if for_patches:
            refuse_filters(self, new_patch_files(), in_lfs=in_lfs)

    def record(
        self,
        changes: Changes,
        message: str,
        trailers: Sequence[tuple[str, str]] = (),
        *,
        expected_head: str | None = None,
        began_on: str | None = None,
    ) -> str:
        """Commit `changes`, and nothing else; the commit's id. See `recording.record`."""
        return record(self, changes, message, trailers, expected_head=expected_head, began_on=began_on)

    def _named(self, tree: str, name: str) -> TreeItem | None:
        return next((item for item in self.objects.tree(tree) if item.name == name), None)


def _locate(path: Path) -> tuple[Path, Path, Path, str]:
    """Work tree, Git folder, common Git folder and hash of the repository around `path`."""
    if not path.is_dir():
        raise NotFound(f"{path}: is not a folder")
    git = Git(path.resolve())
    git.check_version()
    asked = ("--show-toplevel", "--absolute-git-dir", "--git-common-dir", "--show-object-format")
    lines = os.fsdecode(git.read("rev_parse", "--path-format=absolute", *asked)).splitlines()
    if len(lines) != len(asked):
        raise Misconfigured(f"{one_line(str(path))}: the path holds a line break; move the repository")
    return Path(lines[0]).resolve(), Path(lines[1]), Path(lines[2]), lines[3]


def _may_point(path: str, info: Info | None) -> bool:
    return info is not None and info.kind == "blob" and lfs.large(path) and info.size < lfs.MAX_POINTER


def sized_entries(objects: Objects, found: Sequence[tuple[str, TreeItem]]) -> list[Entry]:
    """These names of a tree, by path, with what `git cat-file` and Git LFS's pointers say of their sizes."""
    blobs = [item.oid for _, item in found if item.mode not in ("40000", "160000")]
    infos = dict(zip(blobs, objects.infos(blobs), strict=True))
    short = [item.oid for path, item in found if _may_point(path, infos.get(item.oid))]
    pointers = dict(zip(short, map(Pointer.read, objects.read_all(short)), strict=True))
    entries = []
    for path, item in found:
        info, pointer = infos.get(item.oid), pointers.get(item.oid)
        missing = -1 if item.oid in infos else 0
        size = pointer.size if pointer else info.size if info else missing
        entries.append(Entry(path, item.mode, item.oid, size, pointer))
    return entries


def _root_tree(commit: bytes, oid: str) -> str:
    word, _, rest = commit.partition(b" ")
    if word != b"tree":
        raise BadInput(f"Git's commit {oid} cannot be read; look with: git fsck --full")
    return rest.partition(b"\n")[0].decode("ascii", "replace")
