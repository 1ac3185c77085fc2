"""Where a base comes from: a local folder, a short name, or a repository of the Hugging Face hub.

`resolve_base` takes what a person types and gives a checkpoint folder on this machine. Nothing
here imports torch or transformers; the hub's client is imported only for a hub id.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from patchkit.errors import BadInput, NotFound, NotWritten, PatchkitError, Unavailable
from patchkit.models.cache import Progress, cache_folder
from patchkit.models.wheels import (
    DTYPES,
    MODELS,
    Copy,
    Listing,
    Model,
    find_copy,
    get_model,
    list_models,
)
from patchkit.problem import one_line

__all__ = ["Base", "Copy", "Listing", "cache_folder", "get_model", "list_models", "resolve_base"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*"]
_UNWANTED = ["*/*", "consolidated*"]  # other formats in subfolders, and the weights a second time
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
_TRUE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True, slots=True)
class Base:
    """A checkpoint folder, and how to name it again: the source, and the revision if it has one.

    For a hub id the revision is the commit that was fetched; for a short name it is the dtype.
    """

    source: str
    revision: str | None
    folder: Path


def resolve_base(
    source: str | Path,
    revision: str | None = None,
    *,
    download: bool = True,
    local: bool = True,
    pickles: bool = False,
    progress: Progress | None = None,
    models: Mapping[str, Model] = MODELS,
) -> Base:
    """The checkpoint folder that ``source`` names: a folder, a short name, or a hub id.

    A short name and a hub id may carry their revision behind "@" ("smollm2-135m@float32",
    "openai-community/gpt2@main"); the hub is asked for OWNER/NAME only. With ``download=False`` only
    what is on this machine is found; without ``local`` no folder is taken for a name; with ``pickles`` a
    hub's repository without safetensors comes with its .bin files. NotFound, BadInput or Unavailable say in
    one line what to do.
    """
    text = os.fspath(source)
    shown = "".join(letter if letter.isprintable() else "�" for letter in text)
    if local and (folder := _local(text)):
        if revision is not None:
            raise BadInput(f"{text}: is a local folder, which has no revision ({revision}); leave it out")
        return Base(text, None, folder)
    name, revision = _apart(text, revision)
    if name in models:
        return _short(models[name], revision, download, progress, models)
    if not _HUB_ID.fullmatch(name) or isinstance(source, Path):
        raise NotFound(
            f"{shown[:200]}: there is no such folder, short name or hub id; "
            f"name a checkpoint folder, {_choices(models)}"
        )
    return _hub(name, revision, download and not _offline(), pickles, models)


def _local(text: str) -> Path | None:
    """The folder at a path, if the text is one; a file is a mistake that is worth a word."""
    try:
        path = Path(text).expanduser()
        if text and path.is_dir():
            return path.resolve()
        if path.is_file():
            raise BadInput(f"{text}: is a file; name the folder that holds the checkpoint")
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, no such user
        return None
    return None


def _apart(text: str, revision: str | None) -> tuple[str, str | None]:
    name, at, behind = text.partition("@")
    if at and not behind:
        raise BadInput(f"{text}: nothing stands behind the @; write NAME@REVISION")
    if at and revision is not None and revision != behind:
        raise BadInput(f"{text}: the revision {revision} is asked for too; name one of the two")
    return name, behind or revision


def _short(
    model: Model, dtype: str | None, download: bool, progress: Progress | None, models: Mapping[str, Model]
) -> Base:
    dtype = dtype or DTYPES[0]
    if dtype not in DTYPES:
        raise BadInput(f"{model.name}@{dtype}: the model comes as {' or '.join(DTYPES)}")
    copy = find_copy(model, dtype)
    if copy is None and not download:
        raise NotFound(
            f"{model.name}: is not on this machine; run patchkit model get {model.name} --dtype {dtype}"
        )
    folder = copy.folder if copy else get_model(model.name, dtype, progress=progress, models=models)
    return Base(model.name, dtype, folder)


def _hub(name: str, revision: str | None, online: bool, pickles: bool, models: Mapping[str, Model]) -> Base:
    """A snapshot of a hub repository: safetensors, configuration and tokenizer, no code.

    Pickles only where they are asked for and nothing else is there.
    """
    folder = _snapshot(name, revision, _WANTED, online, models)
    if not any(folder.glob("*.safetensors")):
        if pickles:
            folder = _snapshot(name, revision, [*_WANTED, "pytorch_model*.bin"], online, models)
        if not any(folder.glob("pytorch_model*.bin")):
            if not online:  # another program may have fetched a part
                raise BadInput(f"{name}: what is here of it has no safetensors weights; fetch it online")
            raise BadInput(
                f"{name}: its repository has no safetensors weights; name one that has, or convert its .bin "
                f"files with patchkit init {name} --convert"
            )
    return Base(name, folder.name if _COMMIT.fullmatch(folder.name) else revision, folder)


def _snapshot(
    name: str, revision: str | None, wanted: list[str], online: bool, models: Mapping[str, Model]
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        place = snapshot_download(
            name,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=_UNWANTED,
            local_files_only=not online,
        )
    except Exception as error:  # the hub's client and what it stands on share no family of errors
        raise _hub_error(name, revision, error, online, models) from error
    return Path(place)


def _hub_error(
    name: str, revision: str | None, error: Exception, online: bool, models: Mapping[str, Model]
) -> PatchkitError:
    from huggingface_hub import errors

    asked = f"{name}@{revision}" if revision else name
    if isinstance(error, errors.GatedRepoError):
        return Unavailable(
            f"{asked}: its owner wants terms accepted; do so on the hub, then run hf auth login"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return NotFound(f"{asked}: the hub has no such repository (or a private one: hf auth login)")
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFound(f"{asked}: the hub's repository has no such revision; name a branch, tag or commit")
    if isinstance(error, errors.HFValidationError):
        return BadInput(f"{asked}: is not a name that the hub can have; name a folder, {_choices(models)}")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return Unavailable(f"{asked}: the hub does not know you; log in: hf auth login")
    if status is not None:
        return Unavailable(f"{asked}: the hub refuses ({one_line(str(error))[:200]}); try again later")
    if isinstance(error, OSError) and error.filename and error.errno in _NOT_WRITTEN:
        where = f"{asked}: {error.filename} cannot be written ({error.strerror})"
        return NotWritten(f"{where}; make room, or name another folder in HF_HOME")
    why = "the hub is out of reach" if online else "it is not on this machine and the hub is not asked"
    return Unavailable(f"{asked}: there is no such folder, and {why}; name a folder, {_choices(models)}")


def _choices(models: Mapping[str, Model]) -> str:
    return f"a short name ({', '.join(models)}) or a hub id (OWNER/NAME@REVISION) that can be fetched"


def _offline() -> bool:
    return any(
        os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
