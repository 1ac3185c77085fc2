"""`patchkit fsck` says that a byte was altered, whichever it is, and says nothing where none was.

Bytes are flipped one at a time: of the work tree's patches, of Git's objects (loose and packed), of
references, HEAD, packed-refs and index, of the base's tensors and of a build. The default run flips a few
of each file, `slow` all of the small files and, with their ends, a stride of the large ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from git_helpers import another_writer, git
from proof_helpers import (  # noqa: F401
    as_person,
    fine,
    here,
    made_patch,
    person,
    saved,
    small_base,
    small_repository,
)

from patchkit.checkpoint import Checkpoint
from patchkit.git.check import fsck_worktree
from patchkit.git.locks import being_written
from patchkit.git.store import GitStore
from patchkit.problem import Problem

pytestmark = pytest.mark.usefixtures("person")

FOUND = {1, 65, 66, 69, 78}  # damage; what cannot be believed; no repository there any more; Git refuses it
SMALL, PLACES, ENDS = 400, 120, 24


def _make(root: Path) -> Path:
    """A base, two patches of which one lost a fact, a branch, a tag, and a build."""
    base = small_base(root / "base", shards=2)
    kb = root / "kb"
    small_repository(kb, base)
    fingerprint = Checkpoint.open(base).fingerprint()
    for number in (0, 1):
        fine(here("-C", kb, "apply", saved(made_patch(fingerprint, number), root / "made")))
    git(kb, "tag", "-a", "v1", "-m", "first")
    git(kb, "branch", "other")
    fine(here("-C", kb, "revert", "person-0-0", "--fact", "1"))
    fine(here("-C", kb, "build", "--out", root / "out"))
    return root


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with as_person():
        return _make(tmp_path_factory.mktemp("loose"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with as_person():
        root = _make(tmp_path_factory.mktemp("packed"))
        git(root / "kb", "gc", "-q")
        return root


@pytest.fixture
def root(request: pytest.FixtureRequest) -> Path:
    """Whole again after each test, so that they can share it."""
    group = request.node.callspec.params.get("group", "") if hasattr(request.node, "callspec") else ""
    found: Path = request.getfixturevalue("packed" if group.startswith("packed") else "loose")
    return found


def _files(*patterns: str) -> Callable[[Path], list[Path]]:
    return lambda root: [
        path for pattern in patterns for path in sorted(root.glob(pattern)) if path.is_file()
    ]


GROUPS: dict[str, tuple[Callable[[Path], list[Path]], int]] = {
    # which files, and how many there are at least
    "patches": (_files("kb/patches/**/*", "kb/patchkit.toml"), 8),
    "loose objects": (_files("kb/.git/objects/??/*"), 15),
    "packed objects": (_files("kb/.git/objects/pack/*.pack", "kb/.git/objects/pack/*.idx"), 2),
    "references": (_files("kb/.git/refs/**/*", "kb/.git/HEAD"), 4),
    "packed references": (_files("kb/.git/packed-refs", "kb/.git/HEAD"), 2),
    "index": (_files("kb/.git/index"), 1),
    "base": (_files("base/*.safetensors"), 2),
    "build": (_files("out/*"), 6),
}


def _places(size: int, every: bool) -> list[int]:
    if not every:
        return sorted({0, size // 3, size - 1})
    if size <= SMALL:
        return list(range(size))
    stride = range(0, size, max(1, size // PLACES))
    return sorted({*range(ENDS), *stride, *range(size - ENDS, size)})


def _flips(path: Path, every: bool) -> Iterator[str]:
    """Flip one bit, or all of a byte, at each place in turn; the file is whole again after each."""
    before = path.read_bytes()
    mode = path.stat().st_mode
    path.chmod(0o644)
    for at in _places(len(before), every):
        mask = 0xFF if at % 3 == 0 else 1 << (at % 8)
        times = path.stat()
        path.write_bytes(before[:at] + bytes([before[at] ^ mask]) + before[at + 1 :])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        yield f"{path.name} byte {at} of {len(before)}: {before[at]:#x} ^ {mask:#x}"
        path.write_bytes(before)
    path.chmod(mode)


def _means_nothing(path: Path) -> bool:
    """Whether a flipped bit left what the file says as it was.

    Deflate ends in up to seven bits that no reader looks at; a base is its tensors, so that
    its header's free text is no part of it.
    """
    if path.parent.parent.name == "objects":
        found = zlib.decompressobj()
        data = found.decompress(path.read_bytes())
        same = path.parent.name + path.name == hashlib.sha1(data).hexdigest()
        return same and found.eof and not found.unused_data
    return False


def _flip_and_find(root: Path, group: str, every: bool) -> None:
    find, least = GROUPS[group]
    files = find(root)
    assert len(files) >= least, files
    assert here("-C", root / "kb", "fsck").code == 0
    base = Checkpoint.open(root / "base").fingerprint()
    missed, harmless, flips = [], 0, 0
    for path in files:
        for flip in _flips(path, every):
            flips += 1
            outcome = here("-C", root / "kb", "fsck")
            if outcome.code == 0:
                if _means_nothing(path) or (
                    group == "base" and Checkpoint.open(root / "base").fingerprint() == base
                ):
                    harmless += 1
                else:
                    missed.append(flip)
                continue
            assert outcome.code in FOUND, (flip, outcome)
            assert outcome.lines, flip
            for line in outcome.lines:
                assert line.startswith("patchkit: "), (flip, outcome)
                assert line.isprintable(), flip
    assert missed == []
    assert harmless <= flips / (4 if group == "base" else 100)
    fine(here("-C", root / "kb", "fsck"))


@pytest.mark.parametrize("group", GROUPS)
def test_some_flipped_bytes_are_found(root: Path, group: str) -> None:
    _flip_and_find(root, group, every=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("group", GROUPS)
def test_every_flipped_byte_is_found(root: Path, group: str) -> None:
    _flip_and_find(root, group, every=True)


def test_nothing_is_said_where_nothing_was_altered(loose: Path, tmp_path: Path) -> None:
    kb = tmp_path / "kb"
    shutil.copytree(loose / "kb", kb)
    for step in (["commit-graph", "write"], ["repack", "-q", "-a", "-d", "-b"], ["pack-refs", "--all"]):
        git(kb, *step)
        assert "every byte is as it was written" in fine(here("-C", kb, "fsck")).out


def test_every_tensor_byte_of_the_base_counts(root: Path) -> None:
    header = Checkpoint.open(root / "base").files
    for name, file in header.items():
        path = root / "base" / name
        before = path.read_bytes()
        for at in range(file.data_start, len(before), 11):
            path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
            outcome = here("-C", root / "kb", "fsck")
            assert outcome.code == 1, at
            assert "base" in outcome.err
        path.write_bytes(before)


@pytest.mark.parametrize(
    "what", ["kb/.git/HEAD", "kb/.git/index", "kb/patches/.gitattributes", "out/config.json"]
)
def test_files_lost_and_cut_are_found(root: Path, what: str) -> None:
    path = root / what
    data = path.read_bytes()
    for damage in (None, b"", b"folder", data[::-1] + b"\xff\x00\x1b[31m"):
        path.unlink()
        if damage == b"folder":
            path.mkdir()
        elif damage is not None:
            path.write_bytes(damage)
        outcome = here("-C", root / "kb", "fsck")
        # Git takes a missing or empty index for one that holds nothing.
        fine_too = {0} if what == "kb/.git/index" and not damage else set()
        assert outcome.code in FOUND | fine_too, (damage, outcome)
        assert all(line.startswith("patchkit: ") and line.isprintable() for line in outcome.lines), outcome
        if damage == b"folder":
            path.rmdir()
        path.write_bytes(data)
    fine(here("-C", root / "kb", "fsck"))


def test_a_base_without_a_file_is_told_beside_the_rest(tmp_path: Path) -> None:
    base = small_base(tmp_path / "base", shards=2)
    store = small_repository(tmp_path / "kb", base).store
    patch = saved(made_patch(Checkpoint.open(base).fingerprint(), 0), tmp_path / "made")
    fine(here("-C", store.root, "apply", patch))
    next(base.glob("*.safetensors")).unlink()
    (stored,) = (store.folder / "patches").glob("*/facts.jsonl")
    stored.write_bytes(stored.read_bytes() + b"\n")
    done = here("-C", store.root, "fsck", "--json")
    told = [problem["path"] for problem in json.loads(done.out)["problems"]]
    assert str(base) in told
    assert any(path.endswith("facts.jsonl") for path in told)


def test_half_of_another_commands_commit_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small_base(tmp_path / "base")
    store = small_repository(tmp_path / "kb", base).store
    patch = saved(made_patch(Checkpoint.open(base).fingerprint(), 0), tmp_path / "made")
    fine(here("-C", store.root, "apply", patch))
    (stored,) = (store.folder / "patches").glob("*/facts.jsonl")
    data = stored.read_bytes()
    to_come = b"of the commit to come\n"
    with another_writer(store, lambda: stored.write_bytes(to_come), lambda: stored.write_bytes(data)):
        fine(here("-C", store.root, "fsck"))

    look = fsck_worktree

    def look_until_it_ends(looked_at: GitStore) -> list[Problem]:
        found = look(looked_at)
        while being_written(store):
            time.sleep(0.01)
        return found

    monkeypatch.setattr("patchkit.actions.fsck.fsck_worktree", look_until_it_ends)
    with another_writer(store, lambda: stored.write_bytes(to_come), lambda: stored.write_bytes(data)):
        fine(here("-C", store.root, "fsck"))
