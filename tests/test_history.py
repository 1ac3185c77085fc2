"""A history that was kept is the one that Git tells, whatever happened since."""

from __future__ import annotations

from pathlib import Path

import pytest
from git_helpers import add, git, git_environment, make_store, numbers  # noqa: F401

from patchkit.git import history
from patchkit.git.store import GitStore
from patchkit.stack import read_stack

pytestmark = pytest.mark.usefixtures("git_environment")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GitStore:
    """Three commits, kept."""
    monkeypatch.setattr(history, "LONG", 1)
    made = make_store(tmp_path / "knowledge")
    for number in range(2):
        add(made, numbers(number))
    assert as_git_tells(made) == made.history()
    assert history._kept(made)[0] == made.head()
    return made


def as_git_tells(store: GitStore, rev: str = "HEAD") -> list[history.Commit]:
    return list(history._parse(history._log(store, store.resolve(rev)), store.prefix))


def asked(store: GitStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `git log` is asked for, from here on."""
    found: list[str] = []
    log = history._log
    monkeypatch.setattr(history, "_log", lambda s, c, n=None: (found.append(c), log(s, c, n))[1])
    return found


def test_nothing_is_asked_twice_and_only_what_is_new(
    store: GitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tip, ranges = store.head(), asked(store, monkeypatch)
    assert [commit.subject for commit in store.history()] == ["Add", "Add", "Start"]
    assert ranges == []
    add(store, numbers(7), message="Newest")
    assert [commit.subject for commit in store.history()] == ["Newest", "Add", "Add", "Start"]
    assert ranges == [f"{tip}..{store.head()}"]
    store.history()
    assert len(ranges) == 1


def test_branches_and_merges_are_told_as_git_does(store: GitStore) -> None:
    git(store.root, "switch", "-q", "-c", "side", "HEAD~1")
    add(store, numbers(5), message="On the side")
    assert store.history() == as_git_tells(store)
    git(store.root, "merge", "-q", "--no-edit", "main")
    assert store.history() == as_git_tells(store)
    assert len(store.history()) == 5
    git(store.root, "switch", "-q", "main")
    assert store.history() == as_git_tells(store)
    assert store.history("HEAD~1") == as_git_tells(store, "HEAD~1")


@pytest.mark.parametrize("place", [0, 70, 100, 140, -1])
def test_a_kept_history_that_was_altered_is_not_believed(store: GitStore, place: int) -> None:
    file = store.own / "history"
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    assert history._kept(store) == ("", b"")
    assert store.history() == as_git_tells(store)


def test_a_shallow_history_is_asked_again(store: GitStore, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--depth", "1", store.root.as_uri(), "shallow")
    shallow = GitStore.find(tmp_path / "shallow")
    (end,) = shallow.history()
    assert end.cut
    assert (end.added, end.changed, end.removed, end.settings_changed) == ((), (), (), False)
    git(shallow.root, "fetch", "-q", "--unshallow")
    assert [commit.id for commit in shallow.history()] == [commit.id for commit in store.history()]


def test_commits_of_one_second_stand_in_the_order_in_which_they_were_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script makes a branch and merges it within the clock's tick; a parent is older all the same."""
    for kind in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{kind}_DATE", "2026-01-01T00:00:00+00:00")
    store = make_store(tmp_path / "one-second")
    names = add(store, numbers(1))
    git(store.root, "switch", "-q", "-c", "side")
    names += add(store, numbers(2)) + add(store, numbers(3))
    git(store.root, "switch", "-q", "main")
    git(store.root, "merge", "-q", "--no-ff", "-m", "Merge", "side")
    dated = read_stack(store).by_date(store.history())
    assert [patch.name for patch, _ in dated] == names
