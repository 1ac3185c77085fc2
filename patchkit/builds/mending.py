"""A build whose bytes were altered, put right in place: what it should hold is known, so no more is written.

`build` believes the record of a finished build. Here the record is first marked as unfinished, with the
altered tensors among those that may be half written, and config.json goes: from there `build` goes on as
after a kill. Promises: files that are not the build's are not touched; killed, no half-mended build loads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from patchkit.algebra.factors import Patch
from patchkit.builds.build import build, file_record, is_whole, locked
from patchkit.builds.checks import check_place
from patchkit.builds.record import BUILD_RECORD, UNFINISHED, BuildRecord
from patchkit.checkpoint import CONFIG, Checkpoint, Progress
from patchkit.errors import BadInput
from patchkit.files import fsync_folder, write_durably, writing

__all__ = ["mend_build"]


def mend_build(
    checkpoint: Checkpoint,
    patches: Mapping[str, Patch],
    folder: Path,
    record: BuildRecord,
    wrong: Iterable[str],
    progress: Progress = None,
) -> BuildRecord:
    """Write the ``wrong`` tensors, and all files that are not as ``record`` says, again; the new record.

    ``patches`` by id, those of the record. Files that the base has not, such as a card, stay. Errors as of
    `build`; BadInput, with nothing changed, where such a file is altered, of which there is no other.
    """
    check_place(checkpoint, Path(os.path.realpath(folder)))
    own = _own_files(checkpoint, folder, record)
    with writing(folder), locked(folder):
        with suppress(FileNotFoundError):
            os.unlink(folder / CONFIG)
        fsync_folder(folder)
        pending = tuple(sorted({*record.pending, *record.touched, *wrong}))
        unfinished = replace(record, state=UNFINISHED, pending=pending)
        write_durably(folder / BUILD_RECORD, unfinished.to_bytes())
    return build(checkpoint, patches, folder, instead=own, untouched=True, progress=progress)


def _own_files(checkpoint: Checkpoint, folder: Path, record: BuildRecord) -> dict[str, Path]:
    """The files of a build that are not the base's, whole as they are."""
    own: dict[str, Path] = {}
    for name, file in record.files.items():
        base = checkpoint.folder / name
        if name == CONFIG or (base.is_file() and file_record(base) == file):
            continue
        if not is_whole(folder / name, file, file.size):
            raise BadInput(
                f"{folder / name}: is altered or gone, and the base has none like it; write the build anew, "
                "with what it was written with (patchkit build --card for a card)"
            )
        own[name] = folder / name
    return own
