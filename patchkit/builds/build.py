"""Builds: a base with patches on it, as an ordinary checkpoint folder that any program loads.

Promises: no model is loaded; only the byte ranges of edited tensors differ from the base; the bytes
depend on nothing but the base and the set of patches. A folder that has ``config.json`` holds
exactly what its record says: config.json goes first and comes last, so that a build that was
killed, or ran out of disk, cannot be loaded, and building again mends it. The base is never written.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from patchkit.algebra.factors import Delta, Patch
from patchkit.builds.checks import check_build, refuse_other_base, shapes_of
from patchkit.builds.record import (
    BUILD_RECORD,
    FINISHED,
    SIGNATURE,
    UNFINISHED,
    BuildRecord,
    Edited,
    FileRecord,
    verify_build,
)
from patchkit.builds.rewriting import rewrite
from patchkit.checkpoint import (
    CONFIG,
    INDEX,
    SINGLE,
    Checkpoint,
    Progress,
    fingerprint_of,
    hash_range,
    hash_tensors,
    is_weights,
)
from patchkit.errors import BadInput, Busy, WouldOverwrite
from patchkit.files import (
    clone_file,
    fsync_folder,
    is_held,
    is_temporary,
    reading,
    sync,
    write_durably,
    writing,
)

__all__ = [
    "BUILD_RECORD",
    "BuildRecord",
    "FileRecord",
    "build",
    "check_base",
    "file_record",
    "is_whole",
    "locked",
    "stacked",
    "verify_build",
]

_SKIPPED_FOLDERS = {".git", ".cache"}


def build(
    checkpoint: Checkpoint,
    patches: Mapping[str, Patch],
    out: Path,
    *,
    edited: Edited | None = None,
    instead: Mapping[str, Path] | None = None,
    untouched: bool = False,
    progress: Progress = None,
) -> BuildRecord:
    """Write the base with ``patches`` (by id) on it to the folder ``out``, and say what is there.

    ``out`` may be missing, empty, or a build of the same base, which is brought in line by rewriting only
    the tensors that differ. ``edited`` tells which tensors each patch edits, and their shapes in the base's
    files; where it tells of every patch in that build too, those that the same patches edit as before are
    not computed again, and ``patches`` is only asked for those whose numbers are needed.
    ``instead``: files that stand in it by these names, in place of the base's or beside them.
    ``untouched``: nobody else wrote into the weights of the build that is there, so that its record is
    believed; else they are hashed, and what is not as it says is written again.
    `WouldOverwrite` for any other folder; `BadInput` for a patch that is not of
    this base; `NotWritten` when the disk is full or read-only (building again goes on from there).
    """
    out = Path(os.path.realpath(out))
    edited = edited or shapes_of(patches)
    check_build(checkpoint, patches, out, edited)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            plan = _plan(checkpoint, patches, out, edited, instead or {}, untouched, progress)
            return plan.old if plan.old is not None and plan.nothing_to_do else _carry_out(plan, progress)


def stacked(patches: Iterable[Patch]) -> dict[str, list[Delta]]:
    """For each edited tensor (stored name), the updates of all patches."""
    deltas: dict[str, list[Delta]] = {}
    for patch in patches:
        for weight, delta in patch.deltas.items():
            deltas.setdefault(weight, []).append(delta)
    return deltas


@dataclass(frozen=True)
class _Plan:
    """What a build will write.

    ``edited``: the tensors that any patch edits; ``deltas``: the updates of those that are to be computed.
    ``sources``: the base's files to be in it. ``kept``: those that are there and whole (a weights file:
    but for its tensors). ``held``: tensors of kept files that do not hold the base's bytes, with the hash
    of what they hold, or None if that is not known; ``altered``: those that another program wrote.
    ``new``: the record to be; its ``touched`` are the tensors that are as they should be already.
    """

    checkpoint: Checkpoint
    out: Path
    sources: dict[str, Path]
    edited: set[str]
    deltas: dict[str, list[Delta]]
    old: BuildRecord | None
    new: BuildRecord
    kept: set[str]
    held: dict[str, str | None]
    altered: set[str]

    @property
    def nothing_to_do(self) -> bool:
        return (
            self.old is not None
            and self.old == replace(self.new, touched=self.old.touched)
            and self.old.touched.keys() == self.edited
            and self.kept == self.sources.keys()
            and not self.altered
        )

    @property
    def pending(self) -> list[str]:
        """The tensors that may have to be rewritten."""
        return _pending(self.edited, self.held, self.new.touched)


def _plan(
    checkpoint: Checkpoint,
    patches: Mapping[str, Patch],
    out: Path,
    edited: Edited,
    instead: Mapping[str, Path],
    untouched: bool,
    progress: Progress,
) -> _Plan:
    old = BuildRecord.read(out)
    base, hashes = _base_hashes(checkpoint, old, progress)
    refuse_other_base(old, base, out)
    sources, left_out = _sources(checkpoint)
    sources |= instead
    weights = {
        name: FileRecord(file.size, hash_range(checkpoint.folder / name, 0, file.data_start))
        for name, file in checkpoint.files.items()
    }
    files = {name: file_record(path) for name, path in sources.items() if name not in weights}
    kept = {name for name, file in files.items() if is_whole(out / name, file, file.size)}
    for name, file in weights.items():
        start = checkpoint.files[name].data_start
        if old is not None and old.weights.get(name) == file and is_whole(out / name, file, start):
            kept.add(name)
    altered = set() if old is None or untouched else _altered(old, checkpoint, out, kept, progress)
    held = {**_held(old, checkpoint, kept), **dict.fromkeys(altered)}
    wanted = {number: edited[number] for number in patches}
    touched = old.still_right(edited, wanted) if old else {}
    touched = {name: digest for name, digest in touched.items() if name in held and name not in altered}
    names = {name for shapes in wanted.values() for name in shapes}
    pending = _pending(names, held, touched)
    needed = {number: patches[number] for number in wanted if not wanted[number].keys().isdisjoint(pending)}
    check_base(needed, base)
    new = BuildRecord(FINISHED, base, tuple(sorted(patches)), files, weights, hashes, touched, (), left_out)
    return _Plan(checkpoint, out, sources, names, stacked(needed.values()), old, new, kept, held, altered)


def _pending(edited: Iterable[str], held: Iterable[str], right: Iterable[str]) -> list[str]:
    """What is edited, or does not hold the base's bytes, and is not as it should be already."""
    return sorted({*edited, *held}.difference(right))


def _carry_out(plan: _Plan, progress: Progress) -> BuildRecord:
    """The order is the safety: config.json away, record "unfinished", files, tensors, record, config.json."""
    with suppress(FileNotFoundError):
        os.unlink(plan.out / CONFIG)
    fsync_folder(plan.out)  # from here on nothing loads the folder, even after a power cut
    _remove_old(plan)
    unfinished = replace(plan.new, state=UNFINISHED, pending=tuple(plan.pending))
    whole = {name: file for name, file in plan.new.weights.items() if name in plan.kept}
    _write_record(plan.out, replace(unfinished, weights=whole))
    if _copy_files(plan, progress):
        _write_record(plan.out, unfinished)  # a second run need not copy them again
    finished = replace(plan.new, touched=_write_tensors(plan, progress))
    _write_record(plan.out, finished)
    with reading(plan.sources[CONFIG]) as file:
        write_durably(plan.out / CONFIG, file.read())
    return finished


def _copy_files(plan: _Plan, progress: Progress) -> bool:
    missing = sorted(plan.sources.keys() - plan.kept - {CONFIG})
    total = sum(plan.sources[name].stat().st_size for name in missing)
    report = _Counter(progress, total, "copying")
    folders = {plan.out}
    for name in missing:
        target = plan.out / name
        folders |= _make_folders(plan.out, target.parent)
        with suppress(FileNotFoundError):
            os.unlink(target)
        clone_file(plan.sources[name], target, report)
        _sync_file(target)
    for folder in folders:
        fsync_folder(folder)
    return bool(missing)


def _write_tensors(plan: _Plan, progress: Progress) -> dict[str, str]:
    """Rewrite the tensors that may not be what they should be; returns the hashes of the edited ones."""
    wanted = {name: plan.new.tensors[name] for name in plan.pending}
    report = _Counter(progress, sum(plan.checkpoint.tensors[name][1].size for name in wanted), "writing")
    return {**plan.new.touched, **rewrite(plan.checkpoint, plan.out, wanted, plan.deltas, report)}


def _base_hashes(
    checkpoint: Checkpoint, old: BuildRecord | None, progress: Progress
) -> tuple[str, dict[str, str]]:
    """The base's fingerprint and its tensors' hashes: an old record spares hashing, if it agrees with it."""
    if old is not None and old.tensors.keys() == checkpoint.tensors.keys():
        base = checkpoint.fingerprint(progress)
        if fingerprint_of((info for _, info in checkpoint.tensors.values()), old.tensors) == base:
            return base, old.tensors
    hashes = checkpoint.hashes(progress)
    return checkpoint.fingerprint(), hashes


def _held(old: BuildRecord | None, checkpoint: Checkpoint, kept: set[str]) -> dict[str, str | None]:
    if old is None:
        return {}
    edited = {**old.touched, **dict.fromkeys(old.pending)}
    files = {name: checkpoint.tensors[name][0] for name in edited if name in checkpoint.tensors}
    return {name: edited[name] for name, file in files.items() if file in kept}


def _altered(
    old: BuildRecord, checkpoint: Checkpoint, out: Path, kept: set[str], progress: Progress
) -> set[str]:
    """The tensors of kept files whose bytes are not those of the record."""
    there = {name: place for name, place in checkpoint.tensors.items() if place[0] in kept}
    found = hash_tensors(out, there, progress)
    return {name for name in there if name not in old.tensors or found[name] != old.expected(name)}


def _sources(checkpoint: Checkpoint) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The base's files that a build holds, by relative name, and those it leaves out.

    Weights in another form (a .bin or GGUF twin, an unused index) stay behind: a program that picked
    them up would run the unedited model from an edited folder.
    """
    found: dict[str, Path] = {}
    left_out = []
    weights = {*checkpoint.files, *([] if SINGLE in checkpoint.files else [INDEX])}
    for place, folders, names in os.walk(checkpoint.folder, followlinks=True):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for link in (Path(place, name) for name in folders):
            if _leads_back(link):
                raise BadInput(f"{link}: leads back into the folders above it; remove it")
        for path in (Path(place, name) for name in names):
            name = path.relative_to(checkpoint.folder).as_posix()
            if not name.isprintable():
                raise BadInput(f"{checkpoint.folder}: a file's name cannot be printed ({name!r}); rename it")
            # A worktree's or a submodule's .git is a file, and would make the build that repository's own.
            if name in (BUILD_RECORD, SIGNATURE) or path.name == ".git" or is_temporary(path.name):
                continue
            if name not in weights and is_weights(name.removesuffix(".index.json")):
                left_out.append(name)
            else:
                found[name] = path
    return found, tuple(sorted(left_out))


def _leads_back(link: Path) -> bool:
    """Whether a folder that is a symbolic link is one of those that lead to it."""
    return link.is_symlink() and any(parent.samefile(link) for parent in link.parents)


def check_base(patches: Mapping[str, Patch], base: str) -> None:
    """BadInput where one of ``patches`` (by id) was made on another base than that of this fingerprint."""
    for patch_id, patch in patches.items():
        if patch.base != base:
            raise BadInput(
                f"{patch.name}: was made for another base ({patch.base[:19]}…, this is {base[:19]}…)"
            )
        if patch.id != patch_id:
            raise BadInput(f"{patch.name}: its id is {patch.id[:12]}…, not {patch_id[:12]}…")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One writer at a time; the lock ends with the process."""
    handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{out}: another patchkit is building there; try again when it has ended") from None
        yield
    finally:
        os.close(handle)


def _remove_old(plan: _Plan) -> None:
    """What a killed run left behind, and what the old build had and the new one has not.

    Before the old record is replaced: after a kill in between, it still names them.
    """
    for path in plan.out.iterdir():
        if not is_temporary(path.name):
            continue
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif not is_held(path):  # a killed export's; one at work holds its own
            shutil.rmtree(path)
    gone = () if plan.old is None else {*plan.old.files, *plan.old.weights} - plan.sources.keys()
    for name in gone:
        if _is_plain(plan.out / name):
            os.unlink(plan.out / name)
    fsync_folder(plan.out)


def _write_record(out: Path, record: BuildRecord) -> None:
    write_durably(out / BUILD_RECORD, record.to_bytes())


def file_record(path: Path) -> FileRecord:
    """What a record says of a whole file."""
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
    return FileRecord(size, hash_range(path, 0, size))


def is_whole(path: Path, file: FileRecord, end: int) -> bool:
    """Whether the build's own file is there, with its size, and the hash of its first ``end`` bytes."""
    return _is_plain(path) and path.stat().st_size == file.size and hash_range(path, 0, end) == file.sha256


def _is_plain(path: Path) -> bool:
    """A regular file reached by no link and sharing its storage with no other name: safe to write into."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    at_home = os.path.realpath(path.parent) == str(path.parent)
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and at_home


def _make_folders(out: Path, folder: Path) -> set[Path]:
    """Make ``folder`` below ``out``; returns every folder on the way, whose names are to be made durable."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.path.realpath(folder) != str(folder):
        raise WouldOverwrite(f"{folder}: leads out of the build through a symbolic link; remove it")
    return {folder, *(parent for parent in folder.parents if parent.is_relative_to(out))}


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        sync(handle)
    finally:
        os.close(handle)


class _Counter:
    """Adds up pieces for a progress report."""

    def __init__(self, progress: Progress, total: int, what: str) -> None:
        self.progress, self.total, self.what, self.done = progress, total, what, 0

    def __call__(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total, self.what)
