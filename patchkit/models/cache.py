"""Checkpoint folders that patchkit makes, in the user's cache: whole or not there.

Promises: a folder gets its name when all of it is on the disk, and the record beside it is written
last; what an interrupted process left is taken for nothing and cleared by the next one; one process
at a time makes a folder. torch is not imported here.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import patchkit
from patchkit.canonical import canonical_json, hash_bytes, hash_file, strict_json
from patchkit.errors import NotWritten
from patchkit.files import fsync_tree, move_durably, write_durably, writing

__all__ = [
    "Progress",
    "alone",
    "cache_folder",
    "clear",
    "clear_workplaces",
    "convert_apart",
    "keep",
    "last_line",
    "models_home",
    "need_room",
    "record",
    "record_of",
    "running",
    "silent",
    "whole",
    "workplace",
]

Progress = Callable[[int, int, str], None]

_TEMPORARY = ".making-"


def cache_folder() -> Path:
    """The user's cache: $PATCHKIT_CACHE, else $XDG_CACHE_HOME/patchkit, else ~/.cache/patchkit."""
    if own := os.environ.get("PATCHKIT_CACHE"):
        return Path(own).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "patchkit"


def models_home() -> Path:
    """Where the checkpoint folders are."""
    return cache_folder() / "models"


def record_of(folder: Path) -> Path:
    """The record beside a folder that says that it is whole, and what it was made from."""
    return folder.with_name(f"{folder.name}.json")


def whole(folder: Path, source: Mapping[str, str]) -> int | None:
    """The folder's size in bytes if it was made from ``source`` and no file is missing or cut; else None."""
    try:
        said = strict_json(record_of(folder).read_bytes())
        sizes = {file: int(entry["size"]) for file, entry in said["files"].items()}
        same = all(said[name] == value for name, value in source.items())
        same = same and said["fingerprint"] == _fingerprint(said["files"])
        same = same and all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return sum(sizes.values()) if same else None


def keep(made: Path, folder: Path) -> dict[str, Any]:
    """Give a finished folder its name, all of it on the disk first; what its record says of its files."""
    with writing(made):
        for path in made.iterdir():
            path.chmod(0o644)  # safetensors writes files that others cannot read
        files = {
            path.name: {"size": path.stat().st_size, "sha256": hash_file(path)} for path in made.iterdir()
        }
    fsync_tree(made)
    move_durably(made, folder)
    return files


def record(folder: Path, source: Mapping[str, str], files: Mapping[str, Any]) -> None:
    """Say that a named folder is whole; when nothing is left to do for it, its workplace cleared too."""
    said = {**source, "files": dict(files), "fingerprint": _fingerprint(files)}
    write_durably(record_of(folder), canonical_json(said) + b"\n")


@contextmanager
def alone(lock: Path, report: Progress, waiting: str) -> Iterator[None]:
    """One process at a time; the system frees the lock when its holder ends, however it ends."""
    with writing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with writing(lock):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(0, 1, waiting)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def clear(folder: Path, name: str) -> None:
    """Take away what an interrupted call left, and a folder that is not whole (the lock is ours)."""
    with writing(folder):
        record_of(folder).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
    clear_workplaces(folder.parent, name)


def clear_workplaces(home: Path, name: str) -> None:
    """Take away what killed calls were working in (the lock is ours)."""
    with writing(home):
        for left in home.glob(f"{_TEMPORARY}{name}-*"):
            shutil.rmtree(left)


def need_room(home: Path, room: int) -> None:
    """NotWritten where the disk has less than ``room`` bytes free."""
    with writing(home):
        free = shutil.disk_usage(home).free
    if free < room:
        need = f"{room >> 20:,} MiB are needed and {free >> 20:,} are free"
        raise NotWritten(f"{home}: {need}; make room, or name another folder in PATCHKIT_CACHE")


@contextmanager
def workplace(home: Path, name: str) -> Iterator[Path]:
    """A folder to work in that is gone afterwards; ``clear`` finds it if this process is killed."""
    with writing(home):
        folder = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{name}-", dir=home))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def convert_apart(arguments: list[str], at: Path, report: Progress, what: str) -> str | None:
    """Run ``patchkit.models.conversion`` in a process of its own; why it failed, or None."""
    command = [sys.executable, "-P", "-m", "patchkit.models.conversion", *arguments]
    package = str(Path(patchkit.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    settings = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    report(0, 1, what)
    with (
        tempfile.TemporaryFile() as said,
        running(command, settings, stdout=subprocess.PIPE, stderr=said, cwd=at) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            done, total = line.split()
            report(int(done), int(total), what)
        status = child.wait()
        if status < 0:
            return f"ended by signal {-status}, short of memory?"
        said.seek(0)
        return last_line(said.read()) if status else None


@contextmanager
def running(
    command: list[str], settings: dict[str, str], **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that does not outlive this block."""
    options.setdefault("stdout", subprocess.DEVNULL)
    process = subprocess.Popen(command, env={**os.environ, **settings}, stdin=subprocess.DEVNULL, **options)
    with process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def last_line(said: bytes) -> str:
    """The last thing that a program said, as one short printable line."""
    lines = [line.strip() for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
    line = lines[-1].removeprefix("ERROR: ") if lines else "it said nothing"
    return "".join(letter for letter in line if letter.isprintable())[:300]


def silent(done: int, total: int, what: str) -> None:
    """Report to nobody."""


def _fingerprint(files: Mapping[str, Any]) -> str:
    return hash_bytes(canonical_json(dict(files)))
