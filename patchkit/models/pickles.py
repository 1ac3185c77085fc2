"""A checkpoint folder whose weights are PyTorch's own files, as one in safetensors in the user's cache.

Promises: the folder itself is never written; the copy is made once for the same files (it is named
by their SHA-256) and is whole or not there; reading runs no code of a pickle (`unpickling`). torch
is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from patchkit.canonical import canonical_json, hash_bytes, hash_file
from patchkit.checkpoint import (
    PICKLE,
    PICKLE_INDEX,
    Checkpoint,
    check_config,
    has_safetensors,
    is_weights,
    weight_map,
)
from patchkit.errors import BadInput, NotFound
from patchkit.files import clone_file, reading, writing
from patchkit.models.cache import (
    Progress,
    alone,
    clear,
    convert_apart,
    keep,
    models_home,
    need_room,
    record,
    silent,
    whole,
    workplace,
)

__all__ = ["safetensors_folder", "shards_of"]

_SPARE = 64 << 20  # beside the weights: tokenizer, configuration, what the file system takes


def safetensors_folder(folder: Path, progress: Progress | None = None) -> Path:
    """``folder`` itself if its weights are in safetensors, else the copy of it that is made of its pickles.

    BadInput where there are none either, or where one holds more than tensors; NotWritten without room.
    """
    if has_safetensors(folder):
        return folder
    check_config(folder)
    shards, _ = shards_of(folder)
    report = progress or silent
    source = {"pickles": _digest(folder, shards, report)}
    name = f"converted-{source['pickles'][:16]}"
    place = models_home() / name
    if whole(place, source) is not None:
        return place
    with alone(models_home() / f".{name}.lock", report, "waiting for another patchkit that converts it"):
        if whole(place, source) is None:  # no other process made it while this one waited
            clear(place, name)
            need_room(place.parent, sum((folder / shard).stat().st_size for shard in shards) + _SPARE)
            _convert(folder, place, source, report)
    return place


def shards_of(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The files of pickles, and the index's table: stored name -> file (empty where there is no index)."""
    if (folder / PICKLE).is_file():
        return [PICKLE], {}
    if not (folder / PICKLE_INDEX).is_file():
        raise BadInput(f"{folder}: holds neither safetensors nor {PICKLE}; name the folder of a checkpoint")
    said = weight_map(folder, PICKLE_INDEX, ".bin")
    shards = sorted(set(said.values()))
    for shard in shards:
        if not (folder / shard).is_file():
            raise NotFound(f"{folder / shard}: is not there, though the index names it; get it again")
    return shards, said


def _convert(folder: Path, place: Path, source: Mapping[str, str], report: Progress) -> None:
    with workplace(place.parent, place.name) as work:
        made = work / place.name
        with writing(made):
            made.mkdir()
        for name in _others(folder):
            clone_file(folder / name, made / name)
        arguments = ["pickles", str(folder.absolute()), str(made)]
        if reason := convert_apart(arguments, work, report, "convert"):
            raise BadInput(f"{folder}: cannot be converted: {reason}")
        Checkpoint.open(made)
        files = keep(made, place)
    record(place, source, files)


def _others(folder: Path) -> list[str]:
    """What stands beside the weights: configuration, tokenizer, licence. No other form of the weights."""
    names = (path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(name for name in names if not is_weights(name.removesuffix(".index.json")))


def _digest(folder: Path, shards: list[str], report: Progress) -> str:
    """SHA-256 over the names and hashes of all files that the copy is made of."""
    names = [*shards, *_others(folder), *[PICKLE_INDEX][: len(shards) > 1]]
    sizes = {name: (folder / name).stat().st_size for name in names}
    hashes, done = {}, 0
    for name, size in sizes.items():
        report(done, max(1, sum(sizes.values())), "hashing")
        with reading(folder / name):  # one line where it cannot be read
            hashes[name] = hash_file(folder / name)
        done += size
    return hash_bytes(canonical_json(hashes))
