"""Git's side of a merge, and the other place that commits.

Git merges all files without committing; then every patch folder that is not what the facts want is marked
as in conflict in Git's index, written, and added. So at any moment before the commit `git merge --abort`
brings everything back, and a plain `git commit` cannot finish what is not decided. The commit is Git's own.
Before it, the very tree is believed or refused as a commit that no branch holds; after it, a look whether
Git committed that tree (a hook may have altered it; then it is taken back).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from patchkit.canonical import hash_bytes, hash_file
from patchkit.errors import Busy, NotFound, PatchkitError, Refused, WouldOverwrite
from patchkit.files import fsync_folder, writing
from patchkit.git.command import locked
from patchkit.git.history import PATCHES
from patchkit.git.locks import merge_head, uncommitted
from patchkit.git.recording import keep_large, literal_pathspecs, not_committed, refuse_filters, replace_file
from patchkit.git.writers import writers_lock
from patchkit.merging.elsewhere import elsewhere
from patchkit.problem import one_line
from patchkit.settings import FILE as SETTINGS

if TYPE_CHECKING:
    from patchkit.git.store import GitStore, Tree

__all__ = [
    "abort_merge",
    "commit_merge",
    "default_message",
    "fast_forward",
    "lay_out",
    "left_state",
    "mark",
    "merging",
    "refuse_dirty",
]

Folders = Mapping[str, Mapping[str, str]]
"""Patch folder -> file -> object id; no files for a folder that goes."""

_FROM_STDIN = ("--pathspec-from-file=-", "--pathspec-file-nul")


def refuse_dirty(store: GitStore) -> None:
    """`WouldOverwrite` where something is staged, or patches or settings have changes not committed."""
    if problem := next(iter(uncommitted(store)), None):
        raise WouldOverwrite(
            f"{one_line(problem.path)}: has changes that are not committed; commit them, or throw them away "
            f"with: {problem.remedy}"
        )
    if store.git.ask("diff", "--cached", "--quiet", "--no-ext-diff") is None:
        raise WouldOverwrite(
            f"{store.root}: has staged changes, which would go into the merge's commit; commit them, or "
            "take them out with: git reset -q"
        )


@contextlib.contextmanager
def merging(store: GitStore, word: str, head: str, target: str) -> Iterator[Path]:
    """Git's merge of `target` (called `word`) into `head`, not committed; yields a folder for files to come.

    If the body fails, the merge is ended without effect, unless the error says that it `stays`.
    """
    with writers_lock(store) as staging:
        if store.head() != head:
            raise Busy("HEAD moved while the merge was being made; nothing was written, try again")
        if (lock := store.git_dir / "index.lock").exists():
            raise locked(lock)
        refuse_dirty(store)
        with _ended(store, head):
            _merge(store, word, target)
            yield staging


@contextlib.contextmanager
def _ended(store: GitStore, head: str) -> Iterator[None]:
    """Ends the merge under way if the body fails; a merge that stops for a choice stays."""
    try:
        yield
    except BaseException as error:
        if not getattr(error, "stays", False) and store.head() == head:
            left = _end(store)
            if left and isinstance(error, PatchkitError):
                raise error.retold(f"{error}; {left}") from error
        raise


def _end(store: GitStore) -> str:
    if merge_head(store) is None:
        return ""
    try:
        store.git.write("merge", "--abort")
    except PatchkitError as error:
        return f"and the merge could not be ended ({error}), patchkit status names what lies half done"
    return ""


def _merge(store: GitStore, word: str, target: str) -> None:
    how = ("--no-commit", "--no-ff", "--no-squash", "--no-autostash", "--no-edit", "--quiet")
    try:
        store.git.write("merge", *how, "--end-of-options", word)
    except PatchkitError:
        if merge_head(store) is None:
            raise
    if merge_head(store) != target:
        raise Busy(f"{one_line(word)}: moved while it was being merged; try again")


def fast_forward(store: GitStore, head: str, target: str) -> None:
    """Move the branch forward to `target`, as Git does where our side has nothing of its own."""
    with writers_lock(store):
        if store.head() != head:
            raise Busy("HEAD moved while the merge was being made; nothing was written, try again")
        if (lock := store.git_dir / "index.lock").exists():
            raise locked(lock)
        refuse_dirty(store)
        how = ("--ff-only", "--no-squash", "--no-autostash", "--quiet")
        store.git.write("merge", *how, "--end-of-options", target)


def mark(store: GitStore, wanted: Folders, trees: Sequence[Folders]) -> list[str]:
    """Mark the patch folders in conflict that are not as `wanted` in Git's index; which they are.

    `trees`: the merge base's, ours and theirs, as the stages 1, 2 and 3 of the index have them.
    """
    index = _index(store)
    nothing = "0" * (64 if store.objects.hash_name == "sha256" else 40)
    odd = [name for name, files in wanted.items() if _staged(index, name) != dict(files)]
    lines = []
    for name in odd:
        known = {file for tree in trees for file in tree.get(name, {})}
        for path in {f"{PATCHES}/{name}/{file}" for file in known} | _inside(index, name):
            place = f"{store.prefix}{path}\0"
            lines.append(f"0 {nothing}\t{place}")
            for stage, tree in enumerate(trees, 1):
                if oid := tree.get(name, {}).get(path.rpartition("/")[2]):
                    lines.append(f"100644 {oid} {stage}\t{place}")
    if lines:
        data = "".join(lines).encode("utf-8", "surrogateescape")
        store.git.write("update_index", "-z", "--index-info", stdin=data)
    return odd


def lay_out(
    store: GitStore, staging: Path, wanted: Folders, names: Sequence[str], read: Callable[[str], bytes]
) -> None:
    """Write these patch folders as `wanted` and add them; `read` gives the bytes of an object id."""
    plan: dict[str, bytes | None] = {}
    for name in names:
        files = {f"{PATCHES}/{name}/{file}": oid for file, oid in wanted[name].items()}
        there = _inside(_index(store), name) | _on_disk(store, name)
        plan |= dict.fromkeys(there - set(files)) | {path: read(oid) for path, oid in files.items()}
    in_lfs = store.tree().lfs
    refuse_filters(store, plan, in_lfs=in_lfs)
    if in_lfs:
        keep_large(store, plan)
    with writing(store.folder / PATCHES):
        for number, (path, data) in enumerate(sorted(plan.items())):
            target = store.folder / path
            if data is None:
                target.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty yet, or something that is not ours is in it
                    target.parent.rmdir()
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                replace_file(staging / str(number), target, data)
        fsync_folder(store.folder / PATCHES if (store.folder / PATCHES).is_dir() else store.folder)
    if plan:
        store.git.write("add", "--all", "--force", *_FROM_STDIN, stdin=literal_pathspecs(store, plan))


def left_state(store: GitStore) -> str:
    """A mark of the patches in the index and of those in conflict: what a person did to them since alters it.

    patchkit.toml is no part of it: a conflict in that is theirs to settle by hand.
    """
    out = store.git.read("ls_files", "--stage", "-z", "--", *store.pathspecs()[:1])
    said = [hash_bytes(out), *(f"{state} {path}" for state, path in store.status() if path != SETTINGS)]
    for path in elsewhere(store):
        place = store.root / path
        if path.startswith(f"{store.prefix}{PATCHES}/") and place.is_file() and not place.is_symlink():
            said.append(f"{path} {hash_file(place)}")
    return hash_bytes("\n".join(said).encode("utf-8", "surrogateescape"))


def default_message(store: GitStore, word: str) -> str:
    """What Git would say of this merge."""
    try:
        text = (store.git_dir / "MERGE_MSG").read_text("utf-8", "replace")
    except OSError:
        return f"Merge {one_line(word)}"
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return "\n".join(lines).strip() or f"Merge {one_line(word)}"


def commit_merge(
    store: GitStore,
    staging: Path,
    head: str,
    target: str,
    text: bytes,
    believe: Callable[[str], None],
) -> str:
    """Commit the merge under way; `believe` raises what speaks against its tree, given a commit of it.

    `Refused` where a hook refused or altered it; then it is as before the commit, or taken back whole.
    """
    note = staging / "message"
    with writing(note):
        note.write_bytes(text)
    tree = store.git.write("write_tree").decode("ascii").strip()
    parents = ("-p", head, "-p", target)
    candidate = store.git.write("commit_tree", tree, *parents, "-F", str(note)).decode("ascii").strip()
    believe(candidate)
    failure: PatchkitError | None = None
    try:
        store.git.write("commit", "--quiet", "--cleanup=whitespace", f"--file={note}")
    except PatchkitError as error:
        failure = error
    made = _made(store, head, target)
    if made is None:
        raise not_committed(failure)
    wanted, got = store.tree(candidate), store.tree(made)
    if (wanted.id, wanted.settings) != (got.id, got.settings):
        _undo(store, head, made, candidate, "patches")
    if _trailers(store, made) != _trailers(store, candidate):
        try:
            believe(made)
        except PatchkitError:  # without its choices it is another merge
            _undo(store, head, made, candidate, "the choices in the message")
    return made


def _trailers(store: GitStore, commit: str) -> bytes:
    return store.git.read("log", "-1", "--format=%(trailers:only,unfold)", "--no-show-signature", commit)


def _made(store: GitStore, head: str, target: str) -> str | None:
    """The merge of these two, whatever was committed on top of it since."""
    now = store.head()
    if now is None or now == head:
        return None
    out = store.git.read("rev_list", "--parents", "--reverse", now, f"^{head}", f"^{target}")
    for line in out.decode("ascii").splitlines():
        commit, *parents = line.split()
        if parents == [head, target]:
            return commit
    return None


def _undo(store: GitStore, head: str, made: str, candidate: str, altered: str) -> None:
    """Take the commit back if it is still HEAD (Git compares and swaps), and refuse."""
    why = "patchkit: taken back, the merged files were altered"
    try:
        store.git.write("update_ref", "-m", why, "HEAD", head, made)
        store.git.write("reset", "--quiet", "--merge", head)
        _remove_unknown(store, store.tree(candidate))
    except PatchkitError as error:
        raise Refused(
            f"a hook altered {altered} in merge {made[:10]}, which could not be taken back ({error}); "
            f"do it by hand: git reset --merge {head[:10]}"
        ) from error
    raise Refused(f"a hook altered {altered} while the merge was committed; it was taken back, mend the hook")


def _remove_unknown(store: GitStore, tree: Tree) -> None:
    """Remove what the merge brought and Git does not know any more, where it is as the merge wrote it."""
    oids = {entry.path: entry.oid for entry in tree.entries}
    for state, path in store.status():
        place = store.folder / path
        if state == "??" and path in oids and place.is_file() and not place.is_symlink():
            if tree.blob_id(path, place.read_bytes()) == oids[path]:
                place.unlink()
            with contextlib.suppress(OSError):  # not empty
                place.parent.rmdir()


def abort_merge(store: GitStore, *, dry_run: bool = False) -> None:
    """End a merge under way without effect; `NotFound` where there is none."""
    if dry_run:
        _refuse_none(store)
        return
    with writers_lock(store):
        _refuse_none(store)
        store.git.write("merge", "--abort")


def _refuse_none(store: GitStore) -> None:
    if merge_head(store) is None:
        raise NotFound(f"{store.root}: no merge is under way; there is nothing to abort")


def _index(store: GitStore) -> dict[str, dict[str, str]]:
    """Path below the store's folder -> stage -> object id, for what Git's index has under patches/."""
    out = store.git.read("ls_files", "--stage", "-z", "--", *store.pathspecs()[:1])
    found: dict[str, dict[str, str]] = {}
    for token in out.decode("utf-8", "surrogateescape").split("\0")[:-1]:
        about, _, path = token.partition("\t")
        _, oid, stage = about.split(" ")
        found.setdefault(path.removeprefix(store.prefix), {})[stage] = oid
    return found


def _staged(index: Mapping[str, Mapping[str, str]], name: str) -> dict[str, str]:
    """File -> object id in the index; "" for a file in conflict."""
    return {path.rpartition("/")[2]: index[path].get("0", "") for path in _inside(index, name)}


def _inside(index: Mapping[str, object], name: str) -> set[str]:
    return {path for path in index if path.startswith(f"{PATCHES}/{name}/")}


def _on_disk(store: GitStore, name: str) -> set[str]:
    folder = store.folder / PATCHES / name
    if folder.is_symlink() or not folder.is_dir():
        return set()
    return {f"{PATCHES}/{name}/{path.name}" for path in folder.iterdir() if path.is_file()}
