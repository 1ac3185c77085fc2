"""The one place that commits.

`record` puts files into the work tree and Git so that a kill at any moment leaves the old state
or the new one: a temporary folder, fsync, rename into `patches/`, `git add`, `git commit --only`,
then a look whether Git committed the very bytes that were written (a hook may have altered them).
What a kill leaves half done, `locks.leftovers` names. The user's own staged files stay theirs.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from patchkit.errors import BadInput, Busy, Misconfigured, NotFound, PatchkitError, Refused, WouldOverwrite
from patchkit.files import fsync_folder, fsync_tree, move_durably, write_durably, writing
from patchkit.git import lfs
from patchkit.git.command import locked
from patchkit.git.history import PATCHES
from patchkit.git.messages import compose_message
from patchkit.git.writers import writers_lock
from patchkit.patch import DELTA, FACTS, KEYS, valid_patch_name
from patchkit.problem import one_line
from patchkit.settings import FILE as SETTINGS

if TYPE_CHECKING:
    from patchkit.git.store import GitStore, Tree

__all__ = [
    "ATTRIBUTES",
    "Changes",
    "NothingToCommit",
    "keep_large",
    "literal_pathspecs",
    "new_patch_files",
    "not_committed",
    "record",
    "refuse_elsewhere",
    "refuse_filters",
    "replace_file",
]

# Whole files or a conflict, never a line merge; no text deltas of float32 (they never pay).
ATTRIBUTES = b"* -text -merge\n*.safetensors -delta\n"

_KEPT = "kept"
_ALTERING = ("filter", "ident", "working-tree-encoding")  # attributes with which Git alters content
_IN_LFS = "; or keep the patches in Git LFS: patchkit init BASE --lfs"
_FROM_STDIN = ("--pathspec-from-file=-", "--pathspec-file-nul")


@dataclass(frozen=True)
class Changes:
    """What a commit changes; empty for a commit that only says something."""

    patches: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    """Folder name -> all its files, for patches that are new or solved again."""
    removed: Collection[str] = ()
    """Folder names of patches taken back."""
    settings: bytes | None = None
    """The new patchkit.toml."""
    lfs: bool = False
    """From now on patches are kept in Git LFS; `patches` names all that are in force."""

    def __bool__(self) -> bool:
        return bool(self.patches or self.removed or self.lfs) or self.settings is not None


class NothingToCommit(BadInput):
    """What was to be committed is so at HEAD."""


def record(
    store: GitStore,
    changes: Changes,
    message: str,
    trailers: Sequence[tuple[str, str]] = (),
    *,
    expected_head: str | None = None,
    began_on: str | None = None,
) -> str:
    """Commit `changes`, and nothing else; the commit's id.

    Raises Busy where another writer holds the repository, HEAD is not `expected_head` any more, something
    else is checked out than when long work began (`began_on`, of `GitStore.standing`), or a merge is under
    way, WouldOverwrite where the files have changes that are not committed, and Refused where a hook refused
    or altered it. After an error the work tree, the index and HEAD are as they were; where that could not be
    done, the line says so and `leftovers` names it.
    """
    store.ensure_ready()
    text = compose_message(message, trailers)
    with writers_lock(store) as staging:
        refuse_elsewhere(store, began_on)
        head = store.head()
        if expected_head is not None and head != expected_head:
            raise Busy(
                f"HEAD moved from {expected_head[:10]} to {(head or 'nothing')[:10]} while this was being "
                "made; nothing was written, try again"
            )
        tree = store.tree()
        in_lfs = changes.lfs or tree.lfs
        plan = _plan(tree, changes, in_lfs)
        if changes and not plan:
            raise NothingToCommit("nothing to commit: the patches and settings are so already")
        if (lock := store.git_dir / "index.lock").exists():
            raise locked(lock)  # Git would say so too late: nothing could be staged, or taken back
        refuse_uncommitted(store, plan)
        refuse_filters(store, plan, in_lfs=in_lfs)
        try:
            if in_lfs:
                keep_large(store, plan)
            _place(store, plan, staging)
            return _commit(store, plan, head, text, staging)
        except BaseException as error:
            left = _take_back(store, plan, head, staging)
            if left and isinstance(error, PatchkitError):
                raise error.retold(f"{error}; {left}") from error
            raise


def refuse_elsewhere(store: GitStore, began_on: str | None) -> None:
    """Busy where HEAD went to another branch since; the commit would go there."""
    if began_on is not None and (now := store.standing()) != began_on:
        raise Busy(f"this began on {began_on}, and HEAD is on {now} now: git switch back before you go on")


def _plan(tree: Tree, changes: Changes, in_lfs: bool) -> dict[str, bytes | None]:
    """Path below the store's folder -> its new bytes (None: it goes); only what differs from ``tree``."""
    present = {entry.path: entry.oid for entry in tree.entries}
    if tree.settings is not None:
        present[SETTINGS] = tree.settings.oid
    plan: dict[str, bytes | None] = {}
    if changes.lfs or (f"{PATCHES}/.gitattributes" not in present and (changes.patches or changes.settings)):
        plan[f"{PATCHES}/.gitattributes"] = lfs.ATTRIBUTES if changes.lfs else ATTRIBUTES
    for name, files in changes.patches.items():
        if not valid_patch_name(name) or not {FACTS, DELTA} <= set(files) <= {FACTS, DELTA, KEYS}:
            raise BadInput(f"{one_line(name)}: is not the name and files of a patch")
        plan |= dict.fromkeys(_inside(present, name))
        plan |= {f"{PATCHES}/{name}/{file}": data for file, data in files.items()}
    for name in changes.removed:
        if not (gone := _inside(present, name)):
            raise NotFound(f"{one_line(name)}: no such patch at HEAD; patchkit stack lists them")
        plan |= dict.fromkeys(gone)
    if changes.settings is not None:
        plan[SETTINGS] = changes.settings.replace(b"\r\n", b"\n")  # as Git stores text

    def same(path: str, data: bytes | None) -> bool:
        return data is not None and present.get(path) == tree.blob_id(path, data, lfs_wanted=in_lfs)

    return {path: data for path, data in plan.items() if not same(path, data)}


def _inside(present: Iterable[str], name: str) -> list[str]:
    return [path for path in present if path.startswith(f"{PATCHES}/{name}/")]


def refuse_uncommitted(store: GitStore, plan: Collection[str]) -> None:
    """Another's work that is not in Git yet is not ours to write over."""
    from patchkit.git.locks import uncommitted  # which looks for what this module leaves behind

    touched = {_unit(path) for path in plan}
    if states := [path for _, path in store.status() if _unit(path) in touched]:
        remedies = [problem.remedy for problem in uncommitted(store) if problem.path in touched]
        raise WouldOverwrite(
            f"{one_line(states[0])}: has changes that are not committed; commit them, or throw them away "
            f"with: {' && '.join(remedies)}; then try again"
        )
    for path in plan:
        for folder in list(Path(path).parents)[:-1]:
            place = store.folder / folder
            if place.is_symlink() or (place.exists() and not place.is_dir()):
                raise BadInput(f"{place}: is not a real folder; put one in its place")


def refuse_filters(store: GitStore, plan: Mapping[str, bytes | None], *, in_lfs: bool) -> None:
    """Where attributes ask for a filter Git would store other bytes, or (LFS not there) too large ones."""
    if in_lfs:
        lfs.ensure_installed(store.git, f"{store.prefix}{PATCHES}")
    paths = [f"{store.prefix}{path}" for path, data in plan.items() if data is not None]
    out = store.git.read("check_attr", "--stdin", "-z", *_ALTERING, stdin="\0".join(paths).encode())
    words = out.decode("utf-8", "surrogateescape").split("\0")
    for path, attribute, value in zip(words[0::3], words[1::3], words[2::3], strict=False):
        ours = in_lfs and attribute == "filter" and value == "lfs" and lfs.large(path)
        if value not in ("unspecified", "unset") and not ours:
            scope = f"{store.prefix}{PATCHES}/**" if PATCHES in path else path
            raise Misconfigured(
                f"{one_line(path)}: .gitattributes asks for {attribute}={one_line(value)}, so Git would "
                f"store other bytes; end the outermost .gitattributes with the line: {scope} !{attribute}"
                + _IN_LFS
                * (value == "lfs")
            )


def new_patch_files() -> dict[str, bytes | None]:
    """Stand-ins for the files of a patch to come, for `refuse_filters`."""
    return {f"{PATCHES}/patch-00000000/{file}": b"" for file in (FACTS, DELTA, KEYS)}


def keep_large(store: GitStore, plan: Mapping[str, bytes | None]) -> None:
    """Put what goes into Git LFS there before Git LFS does, which leaves to the system when it is durable."""
    with writing(store.common_dir):
        for path, data in plan.items():
            if data is not None and lfs.large(path):
                store.media.keep(data)


def _unit(path: str) -> str:
    """The patch folder that a path belongs to, or the path itself."""
    return "/".join(path.split("/")[:2])


def _place(store: GitStore, plan: Mapping[str, bytes | None], staging: Path) -> None:
    """Put the files where they belong: new patch folders in one rename, other files one by one."""
    fresh: set[str] = set()
    patches = store.folder / PATCHES
    with writing(patches):
        if not patches.is_dir() and any(path.startswith(PATCHES) for path in plan):
            patches.mkdir()
            fsync_folder(store.folder)
        for number, (path, data) in enumerate(plan.items()):
            target = store.folder / path
            unit = _unit(path)
            _keep(target, staging / _KEPT / path)
            if data is None:
                target.unlink(missing_ok=True)
            elif unit in fresh or (unit != path and not (store.folder / unit).exists()):
                fresh.add(unit)
                (staging / unit).mkdir(parents=True, exist_ok=True)
                (staging / path).write_bytes(data)
            else:
                replace_file(staging / str(number), target, data)
        for unit in sorted(fresh):
            fsync_tree(staging / unit)
            move_durably(staging / unit, store.folder / unit)
        for folder in {(store.folder / path).parent for path, data in plan.items() if data is None}:
            with contextlib.suppress(OSError):  # something that is not ours keeps the folder
                folder.rmdir()
        fsync_folder(patches if patches.is_dir() else store.folder)


def _keep(target: Path, kept: Path) -> None:
    """Give a file that goes a second name: to put it back then takes no room on a full disk."""
    if target.is_file() and not target.is_symlink():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # no hard links here: Git puts it back
            os.link(target, kept)


def replace_file(temporary: Path, target: Path, data: bytes) -> None:
    """Write one file whole or not at all; its temporary file is not in the work tree where that can be."""
    temporary.write_bytes(data)
    fsync_tree(temporary)
    try:
        os.replace(temporary, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        write_durably(target, data)
    fsync_folder(target.parent)


def _commit(
    store: GitStore, plan: Mapping[str, bytes | None], head: str | None, text: bytes, staging: Path
) -> str:
    paths = literal_pathspecs(store, plan)
    # The others `commit --only` takes from the work tree: the index need not be brought back after a failure.
    if new := sorted(plan.keys() - _known(store, head)):
        store.git.write("add", "--all", "--force", *_FROM_STDIN, stdin=literal_pathspecs(store, new))
    note = staging / "message"
    with writing(note):
        note.write_bytes(text)
    how = ("--only", "--quiet", "--cleanup=whitespace", f"--file={note}")
    failure: PatchkitError | None = None
    try:
        if plan:
            store.git.write("commit", *how, *_FROM_STDIN, stdin=paths)
        else:
            store.git.write("commit", *how, "--allow-empty")
    except PatchkitError as error:
        failure = error
    made = _made(store, plan, head)
    if made is None:
        raise not_committed(failure)
    if altered := _altered(store, plan, made):
        _undo(store, head, made, altered)
    return made  # also when Git failed after the commit (in a hook, or writing its index)


def not_committed(failure: PatchkitError | None) -> PatchkitError:
    if failure is None:
        return Refused(
            "the commit was made and taken away again, by a hook or another command; look: git reflog"
        )
    if type(failure) is PatchkitError:  # nothing that Git itself says: a hook's own words
        return Refused(f"{failure}; nothing was committed (a hook, or signing, refused it?)")
    return failure


def _made(store: GitStore, plan: Mapping[str, bytes | None], head: str | None) -> str | None:
    """Our commit: the first after `head` that touched the plan's paths, whoever committed before or after."""
    now = store.head()
    if now is None or now == head:
        return None
    commits = f"{now}\n" if head is None else f"{now}\n^{head}\n"
    paths = literal_pathspecs(store, plan).replace(b"\0", b"\n")
    out = store.git.read("rev_list", "--reverse", "--stdin", stdin=commits.encode() + b"--\n" + paths)
    return next(iter(out.decode("ascii").split()), None)


def _altered(store: GitStore, plan: Mapping[str, bytes | None], commit: str) -> str | None:
    """The first path whose committed bytes are not the ones that were written."""
    tree = store.tree(commit)
    found = {entry.path: entry.oid for entry in tree.entries}
    if tree.settings is not None:
        found[SETTINGS] = tree.settings.oid
    for path, data in plan.items():
        wanted = None if data is None else tree.blob_id(path, data)
        if found.get(path) != wanted:
            return path
    return None


def _undo(store: GitStore, head: str | None, made: str, altered: str) -> None:
    """Take the commit back if it is still HEAD (Git compares and swaps), and refuse."""
    why = "patchkit: taken back, the committed files were altered"
    try:
        if head is None:
            store.git.write("update_ref", "-d", "-m", why, "HEAD", made)
        else:
            store.git.write("update_ref", "-m", why, "HEAD", head, made)
    except PatchkitError as error:
        raise Refused(
            f"{altered}: a hook altered it in commit {made[:10]}, which could not be taken back ({error}); "
            f"do it by hand: git revert {made[:10]}"
        ) from error
    raise Refused(
        f"{altered}: a hook altered it while it was committed; the commit was taken back, mend the hook"
    )


def _take_back(store: GitStore, plan: Mapping[str, bytes | None], head: str | None, staging: Path) -> str:
    """Bring work tree and index to HEAD for the paths of the plan; says what stood in the way.

    HEAD is `head`, or another's commit that came meanwhile, or ours after all: then all is so already.
    """
    try:
        now = store.head()
        known = _known(store, now)
        new = [path for path in plan if path not in known]
        for path in plan if now == head else ():  # else what was there before is not what HEAD holds
            if (kept := staging / _KEPT / path).exists():
                (store.folder / path).parent.mkdir(exist_ok=True)
                os.replace(kept, store.folder / path)
        for path in new:
            (store.folder / path).unlink(missing_ok=True)
        for folder in {(store.folder / path).parent for path in new} - {store.folder}:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if new:
            how = ("--cached", "--force", "--quiet", "--ignore-unmatch")
            store.git.write("rm", *how, *_FROM_STDIN, stdin=literal_pathspecs(store, new))
        dirty = {path for _, path in store.status()}
        if old := [path for path in plan if path in known and path in dirty]:
            where = (f"--source={now}", "--staged", "--worktree")
            store.git.write("restore", *where, *_FROM_STDIN, stdin=literal_pathspecs(store, old))
    except (OSError, PatchkitError) as error:
        return f"and not all could be taken back ({error}), patchkit status names what lies half done"
    return ""


def _known(store: GitStore, head: str | None) -> set[str]:
    """The paths of ours that a commit holds."""
    if head is None:
        return set()
    tree = store.tree(head)
    return {entry.path for entry in tree.entries} | ({SETTINGS} if tree.settings is not None else set())


def literal_pathspecs(store: GitStore, paths: Iterable[str]) -> bytes:
    return "".join(f":(top,literal){store.prefix}{path}\0" for path in paths).encode(
        "utf-8", "surrogateescape"
    )
