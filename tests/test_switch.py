"""`switch`: Git's, once the tree is checked; then the build holds that branch's stack, for what differs.

Oracles: Git itself, a build from nothing, and the base's tensors with Σ B A added in fractions.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from git_helpers import commit_all, git, git_environment
from proof_helpers import (
    CONV1D,
    LINEAR,
    Outcome,
    expected_hashes,
    file_hashes,
    fine,
    here,
    made_patch,
    one_line,
    small_base,
    small_repository,
    tensor_hashes,
)

from patchkit import stack
from patchkit.algebra.factors import Patch
from patchkit.builds import rewriting
from patchkit.builds.record import BuildRecord, verify_build
from patchkit.checkpoint import Checkpoint
from patchkit.git.store import Changes, GitStore
from patchkit.repository import Repository

__all__ = ["git_environment"]
pytestmark = pytest.mark.usefixtures("git_environment")

FIRST, SECOND = LINEAR


def patch_on(base: Path, number: int, *weights: str) -> Patch:
    """A patch that edits only these weights."""
    whole = made_patch(Checkpoint.open(base).fingerprint(), number)
    keys = whole.solution.keys if whole.solution else {}
    return replace(
        whole,
        deltas={name: whole.deltas[name] for name in weights},
        solution=replace(whole.solution, keys={name: keys[name] for name in weights}),
    )


def add(repository: Repository, *patches: Patch) -> None:
    repository.store.record(Changes(patches={p.name: p.files() for p in patches}), "Add")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return small_base(tmp_path / "base")


@pytest.fixture
def repository(tmp_path: Path, base: Path) -> Repository:
    """On main a patch of two weights; on side also one of the second weight and one of a third."""
    repository = small_repository(tmp_path / "kb", base)
    add(repository, patch_on(base, 2, FIRST, SECOND))
    git(repository.store.root, "switch", "-q", "-c", "side")
    add(repository, patch_on(base, 3, SECOND), patch_on(base, 5, CONV1D))
    git(repository.store.root, "switch", "-q", "main")
    return repository


def switch(repository: Repository, *words: str) -> Outcome:
    return here("switch", "-C", repository.store.folder, *words)


def folders(repository: Repository) -> list[Path]:
    return sorted(path for path in (repository.store.folder / "patches").iterdir() if path.is_dir())


def test_it_goes_where_git_goes_and_the_build_with_it(repository: Repository, base: Path) -> None:
    place = repository.build_folder
    assert "side" in fine(switch(repository, "side")).out
    assert not place.exists()  # there was no build, and none was asked for
    fine(here("build", "-C", repository.store.folder))
    assert tensor_hashes(place) == expected_hashes(base, folders(repository))
    done = fine(switch(repository, "-"))
    assert git(repository.store.root, "branch", "--show-current") == "main"
    assert f"build {place}: 1 patch in force" in done.out
    assert done.out.count("\n- ") == 2
    assert tensor_hashes(place) == expected_hashes(base, folders(repository))
    assert verify_build(place) == []
    assert repository.status().builds[0].state == "up to date"
    assert git(repository.store.root, "status", "--porcelain") == ""


def test_only_the_tensors_that_differ_are_computed_and_written(
    repository: Repository, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine(here("build", "-C", repository.store.folder))
    computed, read, written = [], [], []
    real = rewriting.materialise_rows
    monkeypatch.setattr(
        rewriting, "materialise_rows", lambda w, d, at, name: (computed.append(name), real(w, d, at, name))[1]
    )
    rows_of = rewriting._Tensor._rows
    monkeypatch.setattr(rewriting._Tensor, "_rows", lambda self: (read.append(self.name), rows_of(self))[1])
    put = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda f, data, at: (written.append(len(data)), put(f, data, at))[1])
    sizes = {name: info.size for name, (_, info) in Checkpoint.open(base).tensors.items()}
    fine(switch(repository, "side"))
    assert sorted(computed) == sorted(read) == sorted([SECOND, CONV1D])  # FIRST has the same patch on it
    assert sum(written) == sizes[SECOND] + sizes[CONV1D]
    del computed[:], read[:], written[:]
    fine(switch(repository, "main"))
    assert computed == [SECOND]
    assert sorted(read) == sorted([SECOND, CONV1D])  # CONV1D is the base's again
    assert sum(written) == sizes[SECOND] + sizes[CONV1D]
    fine(here("build", "-C", repository.store.folder, "--out", tmp_path / "anew"))
    assert file_hashes(repository.build_folder) == file_hashes(tmp_path / "anew")
    assert BuildRecord.read(repository.build_folder) == BuildRecord.read(tmp_path / "anew")


def test_only_the_patches_that_are_needed_are_read(
    repository: Repository, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stack of a thousand patches costs no more than the one that came, where they edit other weights."""
    fine(here("build", "-C", repository.store.folder))
    git(repository.store.root, "switch", "-q", "-c", "near")
    one = patch_on(base, 5, CONV1D)
    add(repository, one)
    git(repository.store.root, "switch", "-q", "main")
    read = []
    real = stack.read_patch

    def watched(store: GitStore, patch: stack.StoredPatch, *, without: Sequence[str] = ()) -> Patch:
        read.append((patch.id, set(patch.files).difference(without)))
        return real(store, patch, without=without)

    monkeypatch.setattr(stack, "read_patch", watched)
    fine(switch(repository, "near"))
    assert read == [(one.id, {"facts.jsonl", "delta.safetensors"})]
    fine(switch(repository, "main"))
    assert len(read) == 1
    folders = [repository.store.folder / "patches" / repository.stack().patches[0].name]
    assert tensor_hashes(repository.build_folder) == expected_hashes(base, folders)


def test_a_build_of_which_less_is_known_is_computed_whole(repository: Repository, base: Path) -> None:
    """Plain Git went there and came back changed: the patches of the build are not all known any more."""
    fine(here("build", "-C", repository.store.folder))
    git(repository.store.root, "switch", "-q", "side")
    git(repository.store.root, "rm", "-r", "-q", "patches/" + patch_on(base, 2, FIRST, SECOND).name)
    git(repository.store.root, "commit", "-q", "-m", "Away")
    fine(here("build", "-C", repository.store.folder))
    assert tensor_hashes(repository.build_folder) == expected_hashes(base, folders(repository))


def test_killed_while_the_build_is_brought_in_line_it_is_mended(
    repository: Repository, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each write: what is there cannot be loaded, and building again gives the right bytes."""
    fine(here("build", "-C", repository.store.folder))
    place, kept = repository.build_folder, repository.build_folder.with_name("kept")
    shutil.copytree(place, kept)
    real, left = rewriting._put, 0

    class Killed(BaseException):
        pass

    def overwrite(*args: object) -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        real(*args)  # type: ignore[arg-type]

    for writes in range(2):
        left = writes
        with monkeypatch.context() as context:
            context.setattr(rewriting, "_put", overwrite)
            with pytest.raises(Killed):
                repository.switch("side")
        assert not (place / "config.json").exists()
        fine(switch(repository, "main"))
        assert tensor_hashes(place) == expected_hashes(base, folders(repository))
        assert file_hashes(place) == file_hashes(kept)


def test_a_new_branch(repository: Repository) -> None:
    fine(switch(repository, "-c", "spring"))
    assert git(repository.store.root, "branch", "--show-current") == "spring"
    fine(switch(repository, "-c", "summer", "side"))
    assert git(repository.store.root, "rev-parse", "summer") == git(
        repository.store.root, "rev-parse", "side"
    )
    assert "is a branch already" in one_line(switch(repository, "-c", "main"), 65)


def test_a_branch_of_a_remote(repository: Repository, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", str(repository.store.root), "clone")
    fine(here("switch", "-C", tmp_path / "clone", "side"))
    assert git(tmp_path / "clone", "rev-parse", "--abbrev-ref", "side@{upstream}") == "origin/side"


def test_a_new_branch_follows_the_remote_s_that_it_begins_at(repository: Repository, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", str(repository.store.root), "clone")
    clone = Repository.open(tmp_path / "clone")
    fine(switch(clone, "-c", "mine", "origin/side"))
    assert git(tmp_path / "clone", "rev-parse", "--abbrev-ref", "mine@{upstream}") == "origin/side"


def test_where_a_hook_fails_behind_it_the_line_says_where_head_is(repository: Repository) -> None:
    hook = repository.store.common_dir / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 3\n")
    hook.chmod(0o755)
    said = " ".join(switch(repository, "side").err.split())
    assert "side is checked out, but a hook failed behind it" in said
    assert git(repository.store.root, "branch", "--show-current") == "side"


def test_a_dry_run_changes_nothing(repository: Repository) -> None:
    fine(here("build", "-C", repository.store.folder))
    before = file_hashes(repository.build_folder), git(repository.store.root, "reflog")
    found = fine(switch(repository, "side", "-n", "--json")).json
    assert len(found["added"]) == 2
    assert "would go to side" in fine(switch(repository, "side", "-n")).out
    assert fine(switch(repository, "side", "-n", "-q")).out == ""
    assert (file_hashes(repository.build_folder), git(repository.store.root, "reflog")) == before


def test_a_tree_that_cannot_be_believed_is_not_gone_to(repository: Repository, tmp_path: Path) -> None:
    root = repository.store.root
    git(root, "switch", "-q", "-c", "bad")
    (root / "patches" / "link").symlink_to(tmp_path / "base")
    commit_all(repository.store)
    git(root, "switch", "-q", "main")
    assert "patches/link: is a symbolic link" in one_line(switch(repository, "bad"), 65)
    assert git(root, "branch", "--show-current") == "main"


def test_gits_refusals_are_one_line(repository: Repository, tmp_path: Path) -> None:
    root = repository.store.root
    assert "did you mean side?" in one_line(switch(repository, "sude"), 66)
    assert "is no branch" in one_line(switch(repository, "nothing"), 66)
    assert "is no name for a branch" in one_line(switch(repository, "--", "--orphan"), 65)
    assert "START goes with -c" in one_line(switch(repository, "side", "main"), 2)
    assert "names no commit" in one_line(switch(repository, "-c", "x", "nowhere"), 66)
    assert "is no name for a branch" in one_line(switch(repository, "-c", "a..b"), 65)
    git(root, "worktree", "add", "-q", str(tmp_path / "tree"), "side")
    told = one_line(switch(repository, "side"), 75)
    assert "is checked out in the worktree" in told
    assert one_line(switch(repository, "side", "-n"), 75) == told
    fine(switch(repository, "main", "-n"))
    git(root, "worktree", "remove", str(tmp_path / "tree"))
    new = next(name for name in git(root, "diff", "--name-only", "main", "side").splitlines())
    (root / new).parent.mkdir(parents=True)
    (root / new).write_text("mine")
    assert f"{new}: is not committed and would be overwritten" in one_line(switch(repository, "side"), 73)
    assert "would be overwritten" in one_line(switch(repository, "side", "-n"), 73)
    assert git(root, "branch", "--show-current") == "main"


def test_where_the_build_fails_the_line_says_that_the_branch_is_the_new_one(
    repository: Repository, base: Path
) -> None:
    fine(here("build", "-C", repository.store.folder))
    shutil.move(base, base.with_name("gone"))
    line = one_line(switch(repository, "side"), 78)
    assert "side is checked out, but the build is not in line with it" in line
    assert "patchkit base PATH" in line
    assert git(repository.store.root, "branch", "--show-current") == "side"


def test_a_commit_that_no_branch_holds_is_told_when_it_is_left(repository: Repository, base: Path) -> None:
    root = repository.store.root
    git(root, "switch", "-q", "--detach")
    assert fine(switch(repository, "main", "--json")).json["left"] is None  # main holds it
    git(root, "switch", "-q", "--detach")
    add(repository, patch_on(base, 7, FIRST))
    alone = git(root, "rev-parse", "HEAD").strip()
    for dry in (["--dry-run"], []):
        assert f"git branch NAME {alone[:10]}" in fine(switch(repository, "side", *dry)).out
    git(root, "tag", "kept", alone)
    git(root, "switch", "-q", "--detach", "kept")
    assert "git branch NAME" not in fine(switch(repository, "main")).out
