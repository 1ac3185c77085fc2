"""Patches without a network: Git's bundles carry them both ways, and what comes in one is checked."""

from __future__ import annotations

from pathlib import Path

import pytest
from git_helpers import git
from proof_helpers import (  # noqa: F401
    fine,
    here,
    made_patch,
    one_line,
    person,
    saved,
    small_base,
    small_repository,
    tensor_hashes,
)

from patchkit.checkpoint import Checkpoint
from patchkit.repository import Repository

pytestmark = pytest.mark.usefixtures("person")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """base, and ours with two patches on it."""
    base = small_base(tmp_path / "base")
    small_repository(tmp_path / "ours", base)
    fingerprint = Checkpoint.open(base).fingerprint()
    for number in range(3):
        saved(made_patch(fingerprint, number), tmp_path / "made")
    for number in range(2):
        fine(here("-C", tmp_path / "ours", "apply", made(tmp_path, number)))
    return tmp_path


def made(root: Path, number: int) -> Path:
    return next((root / "made").glob(f"person-{number}-0-*"))


def carried(root: Path) -> Path:
    """Ours, cloned from a bundle."""
    git(root / "ours", "bundle", "create", "-q", str(root / "out.bundle"), "HEAD", "main")
    fine(here("clone", root / "out.bundle", root / "theirs", "--base", root / "base"))
    return root / "theirs"


def in_force(kb: Path) -> dict[str, str]:
    return {patch.name: patch.id for patch in Repository.open(kb).stack().patches}


def built(root: Path, kb: Path) -> dict[str, str]:
    fine(here("-C", kb, "build", "--out", root / f"{kb.name}-build"))
    return tensor_hashes(root / f"{kb.name}-build")


def test_a_bundle_carries_patches_out_and_the_answer_back(root: Path) -> None:
    ours, theirs = root / "ours", carried(root)
    assert in_force(theirs) == in_force(ours)
    assert built(root, theirs) == built(root, ours)
    assert fine(here("-C", theirs, "fsck")).code == 0

    git(theirs, "switch", "-q", "-c", "review")
    fine(here("-C", theirs, "revert", "person-0-0"))
    fine(here("-C", theirs, "apply", made(root, 2)))
    git(theirs, "bundle", "create", "-q", str(root / "back.bundle"), "main..review")
    git(ours, "fetch", "-q", str(root / "back.bundle"), "review:review")
    fine(here("-C", ours, "fsck", "--ci", "main..review"))
    fine(here("-C", ours, "merge", "review"))
    assert in_force(ours) == in_force(theirs)
    assert set(in_force(ours)) == {made(root, 1).name, made(root, 2).name}
    assert built(root, ours) == built(root, theirs)


def test_a_bundle_is_pulled_from_like_a_remote(root: Path) -> None:
    theirs = carried(root)
    fine(here("-C", root / "ours", "apply", made(root, 2)))
    git(root / "ours", "bundle", "create", "-q", str(root / "out.bundle"), "HEAD", "main")
    fine(here("-C", theirs, "pull"))
    assert in_force(theirs) == in_force(root / "ours")


def test_an_altered_bundle_is_refused_and_leaves_nothing(root: Path) -> None:
    carried(root)
    data = bytearray((root / "out.bundle").read_bytes())
    data[-40] ^= 1
    (root / "bad.bundle").write_bytes(data)
    done = here("clone", root / "bad.bundle", root / "new", "--base", root / "base")
    assert done.code != 0
    assert "Traceback" not in done.err
    assert len(done.lines) == 1
    assert not (root / "new").exists()


def test_a_bundle_of_what_cannot_be_believed_is_refused(root: Path) -> None:
    """The facts of one patch beside the numbers of another."""
    ours = root / "ours"
    first, second = (ours / "patches" / made(root, number).name for number in range(2))
    (first / "facts.jsonl").write_bytes((second / "facts.jsonl").read_bytes())
    git(ours, "commit", "-q", "-a", "-m", "Mixed")
    git(ours, "bundle", "create", "-q", str(root / "out.bundle"), "HEAD", "main")
    done = here("clone", root / "out.bundle", root / "new", "--base", root / "base")
    assert done.code == 65
    assert "facts.jsonl: is not the one" in done.err
    assert not (root / "new").exists()
