"""Killed at any moment, a commit leaves the old state or the new one, and what lies half done is named.

First at each of patchkit's own file operations and before each Git command (in a fork of this process),
then, where strace is present, at the system calls of patchkit and of the Git commands that it starts.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_kills import killed_at
from git_helpers import (  # noqa: F401
    SETTINGS,
    add,
    commit_all,
    git,
    git_environment,
    make_store,
    numbers,
    tree_files,
)

import patchkit
from patchkit.git.check import fsck_git, fsck_worktree
from patchkit.git.store import Changes, GitStore
from patchkit.stack import problems

pytestmark = pytest.mark.usefixtures("git_environment")

_PATCH, _OTHER = numbers(1, 2), numbers(3)
_AGAIN = numbers(1, 2).without([0])
_MOVED = SETTINGS.replace(b"tiny", b"small")
CHANGES = {
    "new": Changes(patches={_OTHER.name: _OTHER.files()}),
    "again": Changes(patches={_PATCH.name: _AGAIN.files()}),
    "away": Changes(removed=[_PATCH.name]),
    "all": Changes(
        patches={_OTHER.name: _OTHER.files(), numbers(4).name: numbers(4).files()},
        removed=[_PATCH.name],
        settings=_MOVED,
    ),
}


@pytest.fixture(params=list(CHANGES))
def changes(request: pytest.FixtureRequest) -> Changes:
    return CHANGES[request.param]


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GitStore:
    """A repository with a patch, and a file of the person's own that is staged."""
    monkeypatch.delenv("GIT_TEST_FSYNC")
    store = make_store(tmp_path / "before")
    add(store, _PATCH)
    (store.root / "mine.txt").write_text("mine")
    git(store.root, "add", "mine.txt")
    return store


def _copy(before: GitStore, number: int) -> Path:
    place = before.root.with_name(f"copy{number}")
    shutil.copytree(before.root, place, symlinks=True)
    return place


def _held(store: GitStore) -> dict[str, bytes]:
    """Patches and settings at HEAD."""
    tree = store.tree()
    settings = {} if tree.settings is None else {"patchkit.toml": store.read(tree.settings.oid)}
    return {**tree_files(store), **settings}


def _wanted(before: GitStore, changes: Changes) -> dict[str, bytes]:
    """What HEAD holds after `changes`."""
    gone = tuple(f"patches/{name}/" for name in (*changes.removed, *changes.patches))
    held = {path: data for path, data in _held(before).items() if not path.startswith(gone)}
    for name, files in changes.patches.items():
        held |= {f"patches/{name}/{file}": data for file, data in files.items()}
    return held | ({} if changes.settings is None else {"patchkit.toml": changes.settings})


def _check(place: Path, old: dict[str, bytes], new: dict[str, bytes], changes: Changes) -> str:
    """Old or new, believed; the commands named clear what is half done; then it can be done again."""
    store = GitStore.find(place)
    held = _held(store)
    assert held in (old, new)
    assert problems(store) == []
    for finding in store.leftovers():
        done = subprocess.run(finding.remedy, shell=True, capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, (str(finding), done.stderr)
    assert store.leftovers() == []
    assert store.status() == []
    assert _held(store) == held
    assert fsck_worktree(store) == []
    assert fsck_git(store) == []
    assert git(place, "status", "--porcelain") == "A  mine.txt", "the person's own staged file is as it was"
    if held == old:
        store.record(changes, "Once more")
        assert _held(store) == new
        assert fsck_worktree(store) == []
        return "old"
    return "new"


def _killed_at(place: Path, changes: Changes, number: int) -> bool:
    return killed_at(
        lambda: GitStore.find(place), lambda store: store.record(changes, "Record"), place, number
    )


def test_killed_at_each_of_its_own_operations(before: GitStore, changes: Changes) -> None:
    old, new = _held(before), _wanted(before, changes)
    seen = []
    for number in range(200):
        place = _copy(before, number)
        killed = _killed_at(place, changes, number)
        seen.append(_check(place, old, new, changes))
        shutil.rmtree(place)
        if not killed:
            break
    assert not killed, "there were more operations than were tried"
    assert number > 12
    assert seen == sorted(seen, reverse=True), "once committed, it stays committed"
    assert seen[0] == "old"
    assert seen[-1] == "new"


def test_killed_before_the_first_commit_of_all(tmp_path: Path) -> None:
    for number in range(200):
        place = tmp_path / f"new{number}"
        GitStore.init(place)
        child = Changes(settings=SETTINGS)
        killed = killed_at(
            lambda place=place: GitStore.init(place),
            lambda store, child=child: store.record(child, "Start"),
            place,
            number,
        )
        store = GitStore.init(place)
        assert problems(store) == []
        for finding in store.leftovers():
            subprocess.run(finding.remedy, shell=True, check=True, capture_output=True, cwd="/")
        assert store.leftovers() == []
        if store.head() is None:
            store.record(child, "Start")
        assert GitStore.find(place).settings().base_source == "tiny"
        if not killed:
            break
    assert not killed
    assert number > 8


_SCRIPT = """
import pickle, sys
from pathlib import Path
from patchkit.git.store import GitStore
GitStore.find(Path(sys.argv[1])).record(pickle.loads(Path(sys.argv[2]).read_bytes()), "Record")
"""
_CALLS = ("rename", "link", "unlink", "mkdir", "rmdir", "fsync", "write", "flock")


def _strace(place: Path, pickled: Path, call: str, number: int) -> subprocess.CompletedProcess[str]:
    """Record under strace, which kills each process at its own `number`-th such system call."""
    inject = f"inject={call}:signal=KILL:when={number}"
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(patchkit.__file__).parents[1]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    log = pickled.with_name("strace.log")
    words = ["strace", "-f", "-qq", "-o", log, "-e", f"trace={call}", "-e", inject]
    return subprocess.run(
        [*words, sys.executable, "-c", _SCRIPT, place, pickled],
        env=env,
        capture_output=True,
        text=True,
    )


def _can_strace() -> bool:
    if shutil.which("strace") is None:
        return False
    words = ["strace", "-qq", "-e", "inject=rename:signal=KILL:when=1", "true"]
    return subprocess.run(words, capture_output=True).returncode == 0


def _system_calls(before: GitStore, changes: Changes, call: str) -> Iterator[str]:
    old, new = _held(before), _wanted(before, changes)
    pickled = before.root.with_name("changes")
    pickled.write_bytes(pickle.dumps(changes))
    log = pickled.with_name("strace.log")
    for number in range(1, 2000):
        place = _copy(before, number)
        _strace(place, pickled, call, number)
        yield _check(place, old, new, changes)
        shutil.rmtree(place)
        if "killed by SIGKILL" not in log.read_text():
            break


@pytest.mark.skipif(not _can_strace(), reason="strace is not here, or may not trace")
@pytest.mark.parametrize("call", ["rename", "link"])
def test_killed_at_the_system_calls_that_name_files(before: GitStore, call: str) -> None:
    seen = list(_system_calls(before, CHANGES["all"], call))
    assert len(seen) > 3
    assert seen[-1] == "new"


@pytest.mark.slow
@pytest.mark.skipif(not _can_strace(), reason="strace is not here, or may not trace")
@pytest.mark.parametrize("call", _CALLS)
def test_killed_at_every_system_call_that_writes(before: GitStore, changes: Changes, call: str) -> None:
    seen = list(_system_calls(before, changes, call))
    assert seen[-1] == "new"
