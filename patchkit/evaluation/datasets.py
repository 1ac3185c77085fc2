"""The field's data sets by name: fetched once into the user's cache, believed by their SHA-256 alone.

The digests are those that users of the files have published; a file with another one is refused.
The file of a name can also be put into the cache by hand. No torch here.
"""

from __future__ import annotations

import http.client
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchkit.canonical import hash_file
from patchkit.errors import Unavailable
from patchkit.files import fsync_tree, move_durably, writing
from patchkit.models.cache import (
    Progress,
    alone,
    cache_folder,
    clear_workplaces,
    need_room,
    silent,
    workplace,
)

__all__ = ["DATASETS", "Dataset", "fetch"]

_PATIENCE = 60.0  # seconds without a byte
_PIECE = 1 << 18


@dataclass(frozen=True)
class Dataset:
    """One file: where it is published, its digest, and its size in bytes or what that is at most."""

    name: str
    address: str
    sha256: str
    size: int

    @property
    def place(self) -> Path:
        """Where it lies on this machine, once it is there."""
        return cache_folder() / "datasets" / self.address.rpartition("/")[2]


DATASETS: Mapping[str, Dataset] = {
    found.name: found
    for found in (
        Dataset(
            "counterfact",
            "https://rome.baulab.info/data/dsets/counterfact.json",
            "d017056125178a13728594e66a801357a8db9ed7973a7425554bb4271de9fc6f",
            45_108_470,
        ),
        Dataset(
            "multi_counterfact",
            "https://memit.baulab.info/data/dsets/multi_counterfact.json",
            "977a6acce4705507b5fd6bfcea8f61cd78f9ed0f9cd9c9a6bcd6c8a3ed61c833",
            64_000_000,
        ),
        Dataset(
            "zsre",
            "https://rome.baulab.info/data/dsets/zsre_mend_eval.json",
            "8a371d512f8a6ab175db4ef672181d5c0e52da23298cb51e5a2eeea2f89aa9cd",
            8_091_864,
        ),
    )
}
"""CounterFact (ROME, arXiv 2202.05262), its part without contradictions (MEMIT, arXiv 2210.07229), and zsRE's
evaluation part as MEND and MEMIT use it."""


def fetch(dataset: Dataset, report: Progress = silent) -> Path:
    """The file, checked; fetched where a whole one is not in the cache yet. Unavailable, NotWritten."""
    place = dataset.place
    if _is_whole(place, dataset):
        return place
    with alone(place.parent / f"{place.name}.lock", report, f"wait for {dataset.name}"):
        if _is_whole(place, dataset):  # by whoever held the lock
            return place
        clear_workplaces(place.parent, dataset.name)
        need_room(place.parent, 2 * dataset.size)
        with workplace(place.parent, dataset.name) as work:
            fetched = work / place.name
            _download(dataset, fetched, report)
            if (found := hash_file(fetched)) != dataset.sha256:
                raise Unavailable(
                    f"{dataset.name}: what {dataset.address} gives is not the file that patchkit knows "
                    f"(SHA-256 {found[:12]}… instead of {dataset.sha256[:12]}…); {_by_hand(dataset)}"
                )
            fsync_tree(fetched)
            with writing(place):
                place.unlink(missing_ok=True)
            move_durably(fetched, place)
    return place


def _is_whole(place: Path, dataset: Dataset) -> bool:
    with writing(place):
        return place.is_file() and hash_file(place) == dataset.sha256


def _download(dataset: Dataset, into: Path, report: Progress) -> None:
    """No more bytes than the file has are taken, whatever the other side sends."""
    what = f"fetch {dataset.name}"
    with writing(into):
        file = into.open("wb")
    try:
        with file, urllib.request.urlopen(dataset.address, timeout=_PATIENCE) as answer:
            done, size = 0, _told(answer, dataset)
            while done <= dataset.size and (piece := answer.read(_PIECE)):
                report(min(done, size), size, what)
                with writing(into):
                    file.write(piece)
                done += len(piece)
        if done < size and answer.headers.get("Content-Length"):
            raise ConnectionError(f"it was cut off {size - done} bytes before its end")
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise Unavailable(
            f"{dataset.name}: cannot be fetched from {dataset.address} ({reason}); try again online, or "
            f"{_by_hand(dataset)}"
        ) from error
    report(done, done, what)


def _told(answer: Any, dataset: Dataset) -> int:
    """How many bytes the other side says will come; what the file has at most where it says nothing."""
    said = answer.headers.get("Content-Length") or ""
    return min(int(said), dataset.size) if said.isdecimal() else dataset.size


def _by_hand(dataset: Dataset) -> str:
    return f"put the file there yourself: {dataset.place}"
