"""Any altered byte in Git's objects, references and index, or in the work tree's patches, is found."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from git_helpers import add, git, git_environment, make_store, numbers  # noqa: F401

from patchkit.git import check as gitcheck
from patchkit.git.check import _hashed_files, _is_object, _loose_objects, fsck_git, fsck_worktree
from patchkit.git.store import GitStore

pytestmark = pytest.mark.usefixtures("git_environment")


@pytest.fixture
def store(tmp_path: Path) -> GitStore:
    store = make_store(tmp_path / "kb")
    add(store, numbers(1, 2))
    git(store.root, "tag", "-a", "v1", "-m", "first")
    git(store.root, "branch", "other")
    return store


def _flips(path: Path, step: int = 1) -> list[tuple[int, int]]:
    """Places and masks: one bit of every byte, and now and then the whole byte."""
    return [(at, 1 << (at % 8) if at % 3 else 0xFF) for at in range(0, path.stat().st_size, step)]


@contextmanager
def _flipped(path: Path, at: int, mask: int) -> Iterator[None]:
    """One byte altered in place, and put back."""
    path.chmod(0o644)
    with open(path, "r+b", buffering=0) as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ mask]))
        yield
        file.seek(at)
        file.write(byte)


@pytest.mark.parametrize("object_format", ["sha1", "sha256"])
def test_nothing_is_found_where_nothing_was_altered(tmp_path: Path, object_format: str) -> None:
    store = make_store(tmp_path / "kb", object_format=object_format)
    assert fsck_git(store) == []
    add(store, numbers(1))
    git(store.root, "tag", "-a", "v1", "-m", "first")
    git(store.root, "switch", "-q", "-c", "side")
    add(store, numbers(2))
    git(store.root, "switch", "-q", "main")
    git(store.root, "worktree", "add", "-q", str(tmp_path / "tree"), "side")
    git(store.root, "merge", "-q", "--no-edit", "side")
    assert fsck_git(store) == []
    git(store.root, "commit-graph", "write")
    git(store.root, "repack", "-q", "-a", "-d", "--write-bitmap-index")
    git(store.root, "multi-pack-index", "write")
    git(store.root, "gc", "-q")
    assert fsck_git(store) == []
    assert fsck_worktree(store) == []


def test_a_flipped_byte_in_a_loose_object_is_found(store: GitStore) -> None:
    """Deflate ends in up to seven bits that mean nothing: flipping one leaves the object as it was."""
    harmless = flips = 0
    for path in [p for p in (store.common_dir / "objects").glob("??/*") if p.is_file()]:
        oid, content = path.parent.name + path.name, zlib.decompress(path.read_bytes())
        with _flipped(path, 20, 0xFF):
            assert [problem.path for problem in _loose_objects(store)] == [f"object {oid}"]
        for at, mask in _flips(path):
            with _flipped(path, at, mask):
                if _is_object(path, oid, "sha1"):
                    assert zlib.decompress(path.read_bytes()) == content
                    harmless += 1
            flips += 1
    assert list(_loose_objects(store)) == []
    assert flips > 1000
    assert harmless < flips / 200


def test_a_flipped_byte_in_a_pack_is_found(store: GitStore) -> None:
    git(store.root, "gc", "-q")
    files = [p for p in (store.common_dir / "objects" / "pack").iterdir() if p.suffix in (".pack", ".idx")]
    assert len(files) == 2
    for path in files:
        for at, mask in _flips(path):
            with _flipped(path, at, mask):
                assert list(_hashed_files(store)), (path, at, mask)
        with _flipped(path, 100, 1):
            assert any(str(path) in str(problem) for problem in fsck_git(store))
    assert fsck_git(store) == []


@pytest.mark.parametrize("name", ["HEAD", "refs/heads/main", "refs/tags/v1", "packed-refs", "index"])
def test_a_flipped_byte_in_a_reference_or_the_index_is_found(store: GitStore, name: str) -> None:
    if name == "packed-refs":
        git(store.root, "pack-refs", "--all")
    path = store.common_dir / name
    missed = []
    for at, mask in _flips(path, 7 if name == "index" else 1):
        with _flipped(path, at, mask):
            if not fsck_git(store):
                missed.append((at, mask))
    assert missed == []


def test_a_head_that_leads_to_another_branch_is_found(store: GitStore) -> None:
    git(store.root, "switch", "-q", "-c", "side1")
    add(store, numbers(3))
    git(store.root, "branch", "side2", "main")
    (store.git_dir / "HEAD").write_text("ref: refs/heads/side2\n")
    assert [p.path for p in fsck_git(store)] == ["HEAD"]


def test_a_flipped_byte_in_the_work_tree_is_found_whatever_its_times(store: GitStore) -> None:
    for path in [p for p in (store.folder / "patches").rglob("*") if p.is_file()] + [
        store.folder / "patchkit.toml"
    ]:
        times = path.stat()
        for at, mask in _flips(path, 13):
            with _flipped(path, at, mask):
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
                assert [p.path for p in fsck_worktree(store)] == [path.relative_to(store.folder).as_posix()]
    assert fsck_worktree(store) == []
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)
    assert len(fsck_worktree(store)) == 1
    path.unlink()
    assert "cannot be read" in str(fsck_worktree(store)[0])


def test_a_missing_object_is_found(store: GitStore) -> None:
    blob = git(store.root, "rev-parse", "HEAD:patches/.gitattributes")
    (store.common_dir / "objects" / blob[:2] / blob[2:]).unlink()
    assert any(blob in str(problem) for problem in fsck_git(store))


def test_each_finding_is_one_line_with_a_way_out(store: GitStore) -> None:
    (store.common_dir / "refs" / "heads" / "main").write_bytes(b"\x1b[31mnonsense\n")
    found = fsck_git(store)
    assert found
    assert all(
        "\n" not in str(problem) and "\x1b" not in str(problem) and problem.remedy for problem in found
    )


def test_a_commit_of_another_while_it_looks_is_no_damage(
    store: GitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HEAD and its log are two files: between reading one and the other both may move."""
    read, late = gitcheck._last_logged, [numbers(9)]

    def then_another_commits(path: Path) -> str | None:
        found = read(path)
        if path.name == "HEAD" and late:
            add(store, late.pop())
        return found

    monkeypatch.setattr(gitcheck, "_last_logged", then_another_commits)
    assert fsck_git(store) == []
    assert not late


def test_references_that_another_packs_while_it_looks_are_no_damage(
    store: GitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = gitcheck._is_reference

    def once_packed(path: Path) -> bool:
        git(store.root, "pack-refs", "--all")
        return look(path)

    monkeypatch.setattr(gitcheck, "_is_reference", once_packed)
    assert (store.git_dir / "refs" / "heads" / "other").exists()
    assert fsck_git(store) == []


def test_objects_that_another_packs_while_it_looks_are_no_damage(
    store: GitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, packed = gitcheck._is_object, []

    def once_packed(path: Path, oid: str, hash_name: str) -> bool:
        if not packed:
            packed.append(git(store.root, "gc", "-q"))
        return look(path, oid, hash_name)

    monkeypatch.setattr(gitcheck, "_is_object", once_packed)
    assert fsck_git(store) == []
    assert packed


def test_a_folder_among_the_packs_is_no_file_of_theirs(store: GitStore) -> None:
    """Where Git keeps a multi-pack-index in pieces."""
    git(store.root, "gc", "-q")
    (store.common_dir / "objects" / "pack" / "multi-pack-index.d").mkdir()
    assert list(_hashed_files(store)) == []
