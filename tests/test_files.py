"""Durable writing: old or new at every call, nothing left behind, one line where it fails."""

from __future__ import annotations

import builtins
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patchkit import files
from patchkit.errors import BadInput, NotFound, NotWritten, WouldOverwrite
from patchkit.files import clone_file, fsync_tree, is_temporary, move_durably, reading, write_durably
from patchkit.shipping.folder import new_folder


class Killed(BaseException):
    """The process ended here: nothing after it has an effect."""


def kill_at(monkeypatch: pytest.MonkeyPatch, count: int) -> Callable[[], bool]:
    """From the ``count``-th call on, every file operation fails as if the process were gone."""
    calls = 0

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= count:
                raise Killed
            return function(*args, **options)

        return call

    for name in ("open", "fsync", "replace", "rename", "unlink", "mkdir", "write", "copy_file_range"):
        monkeypatch.setattr(os, name, wrapped(getattr(os, name)))
    monkeypatch.setattr(builtins, "open", wrapped(open))
    return lambda: calls >= count


def test_a_killed_write_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    states = set()
    for count in range(1, 20):
        path = tmp_path / f"{count}" / "file"
        path.parent.mkdir()
        path.write_bytes(b"old")
        with pytest.MonkeyPatch.context() as patch:
            killed = kill_at(patch, count)
            try:
                write_durably(path, b"new and longer")
            except Killed:
                pass
            else:
                assert not killed()
        states.add(path.read_bytes())
        others = [other.name for other in path.parent.iterdir() if other != path]
        assert all(is_temporary(name) for name in others)
    assert states == {b"old", b"new and longer"}


def test_a_write_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, function=function: (order.append(name), function(*args))[1]
        )
    write_durably(tmp_path / "file", b"data")
    assert order == ["fsync", "replace", "fsync"]
    assert (tmp_path / "file").read_bytes() == b"data"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_a_new_folder_is_as_the_umask_says(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with new_folder(tmp_path / "out") as place:
            (place / "file").write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask


def test_a_file_is_readable_to_others_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_durably(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fails(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(NotWritten) as caught:
        write_durably(path, b"new")
    assert os.strerror(code) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_moving_never_replaces(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    (source / "file").write_bytes(b"x")
    target.mkdir()
    with pytest.raises(WouldOverwrite, match="is there already"):
        move_durably(source, target)
    target.rmdir()
    target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(WouldOverwrite):
        move_durably(source, target)
    target.unlink()
    move_durably(source, target)
    assert (target / "file").read_bytes() == b"x"
    assert not source.exists()


@pytest.mark.parametrize("folder", [True, False])
def test_moving_across_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool) -> None:
    source, target = tmp_path / "a", tmp_path / "below" / "b"
    target.parent.mkdir()
    if folder:
        (source / "deep").mkdir(parents=True)
        (source / "deep" / "file").write_bytes(b"x")
    else:
        source.write_bytes(b"x")
    rename = os.rename

    def across(src: Any, dst: Any) -> None:
        if Path(src) == source:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(src, dst)

    monkeypatch.setattr(os, "rename", across)
    move_durably(source, target)
    assert (target / "deep" / "file" if folder else target).read_bytes() == b"x"
    assert not source.exists()
    assert [path.name for path in target.parent.iterdir()] == ["b"]


def test_a_move_across_file_systems_that_fails_leaves_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "a", tmp_path / "below" / "b"
    target.parent.mkdir()
    source.write_bytes(b"x")

    def across(src: Any, dst: Any) -> None:
        raise OSError(errno.EXDEV if Path(src) == source else errno.ENOSPC, "no")

    monkeypatch.setattr(os, "rename", across)
    with pytest.raises(NotWritten):
        move_durably(source, target)
    assert source.read_bytes() == b"x"
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("way", ["any", "no sharing", "no kernel copy"])
def test_a_clone_is_equal_and_independent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "blob").write_bytes(data)
    (tmp_path / "source").symlink_to(tmp_path / "blob")  # as a hub's cache has it
    if way != "any":

        def refuses(*args: Any) -> None:
            raise OSError(errno.EOPNOTSUPP, "no")

        monkeypatch.setattr(files.fcntl, "ioctl", refuses)
        if way == "no kernel copy":
            monkeypatch.setattr(os, "copy_file_range", refuses, raising=False)
    told: list[int] = []
    clone_file(tmp_path / "source", tmp_path / "copy", told.append)
    assert sum(told) == len(data)
    assert not (tmp_path / "copy").is_symlink()
    assert (tmp_path / "copy").stat().st_nlink == 1
    with open(tmp_path / "copy", "r+b") as file:
        assert file.read() == data
        file.seek(0)
        file.write(b"changed")
    assert (tmp_path / "blob").read_bytes() == data


def test_a_clone_replaces_nothing_and_follows_no_link_to_write(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"new")
    (tmp_path / "precious").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    for name in ("precious", "link"):
        with pytest.raises(NotWritten):
            clone_file(tmp_path / "source", tmp_path / name)
    assert (tmp_path / "precious").read_bytes() == b"old"


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name, error in {"pipe": BadInput, ".": BadInput, "absent": NotFound, "link": NotFound}.items():
        with pytest.raises(error) as caught, reading(tmp_path / name):
            pass
        assert "\n" not in str(caught.value)
    (tmp_path / "file").write_bytes(b"x")
    with reading(tmp_path / "link") as file:
        assert file.read() == b"x"
    with pytest.raises(NotFound), reading(tmp_path / "link", follow=False):
        pass


def test_every_file_of_a_tree_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("one", "a/two", "a/b/three"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a" / "link").symlink_to("/nowhere")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    fsync_tree(tmp_path)
    assert set(synced) == {
        path.lstat().st_ino for path in [tmp_path, *tmp_path.rglob("*")] if path.name != "link"
    }
    assert synced[-1] == tmp_path.stat().st_ino  # a folder after what it holds
