"""Tensors kept on this machine between runs, so that what was computed once is not computed again.

A file is written whole or not at all; one that is damaged, or holds something else, counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from patchkit.canonical import canonical_json, hash_bytes
from patchkit.files import write_durably, writing

__all__ = ["computed_on", "kept_name", "key_of", "plain_name", "read_kept", "write_kept"]


def key_of(value: Any) -> str:
    """A short name for what a file holds: 16 hex digits of the SHA-256 of ``value`` as canonical JSON."""
    return hash_bytes(canonical_json(value))[:16]


def computed_on(device: torch.device) -> dict[str, str]:
    """What the name of a kept computation holds of the device: another kind gives other bits."""
    return {} if device.type == "cpu" else {"device": device.type}


def kept_name(kind: str, of: Mapping[str, Any], base: str) -> str:
    """What a file about a base is called, without its ending: KIND-KEY, and -READING for a base `as_read`.

    KEY is of ``of`` and the fingerprint alone; so `plain_name` can be compared where nobody has the files
    that lay beside the weights.
    """
    fingerprint, _, reading = base.partition("+")
    key = key_of({**of, "base": fingerprint})
    return f"{kind}-{key}-{reading}" if reading else f"{kind}-{key}"


def plain_name(path: Path) -> str:
    """The name of such a file as `kept_name` gives it for a fingerprint alone."""
    return "-".join(path.stem.split("-")[:2])


def read_kept(path: Path | None, shapes: Mapping[str, Sequence[int | None]]) -> dict[str, Tensor] | None:
    """The tensors of these names and shapes, None being any length; None where there are not just those."""
    if path is None:
        return None
    try:
        found = load(path.read_bytes())
    except (OSError, SafetensorError):  # not there, or another process has just done with it
        return None
    if found.keys() != shapes.keys() or not all(_fits(found[name], shape) for name, shape in shapes.items()):
        return None
    return found


def _fits(tensor: Tensor, shape: Sequence[int | None]) -> bool:
    return tensor.ndim == len(shape) and all(
        wanted in (None, length) for wanted, length in zip(shape, tensor.shape, strict=True)
    )


def write_kept(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Durably, under ``path``, whose folder is made."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
