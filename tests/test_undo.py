"""`undo`: the branch goes where its own reflog says, nothing of the person's is lost, killed or not.

Git itself is the oracle: `git rev-parse main@{1}`, `git status`, and the trees' ids.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from git_helpers import (
    SETTINGS,
    add,
    commit_all,
    git,
    git_environment,
    make_store,
    numbers,
    write,
)
from proof_helpers import Outcome, here

import patchkit.git.moving as moving
from patchkit.git.check import fsck_git, fsck_worktree
from patchkit.git.moving import current_branch, move_branch
from patchkit.git.store import Changes, GitStore
from patchkit.repository import Repository
from patchkit.stack import problems

__all__ = ["git_environment"]
pytestmark = pytest.mark.usefixtures("git_environment")

FIRST, SECOND = numbers(1, 2), numbers(3)


@pytest.fixture
def store(tmp_path: Path) -> GitStore:
    """Two patches, each committed by patchkit."""
    store = make_store(tmp_path / "kb")
    add(store, FIRST, message="Add the first")
    add(store, SECOND, message="Add the second")
    return store


def undo(store: GitStore, *options: str, code: int = 0) -> Outcome:
    done = here("undo", "-C", store.folder, *options)
    assert done.code == code, done
    return done


def said(done: Outcome) -> str:
    (line,) = done.lines
    return line


def in_force(store: GitStore) -> set[str]:
    return {item.name for item in (store.folder / "patches").iterdir() if item.is_dir()}


def test_the_branch_goes_where_its_own_reflog_says(store: GitStore) -> None:
    before = git(store.root, "rev-parse", "main@{1}")
    done = undo(store)
    assert git(store.root, "rev-parse", "main") == before == git(store.root, "rev-parse", "HEAD")
    assert git(store.root, "status", "--porcelain") == ""
    assert in_force(store) == {FIRST.name}
    assert "undid “patchkit: Add the second”" in done.out
    assert f"- {SECOND.name}" in done.out
    assert problems(store) == []
    assert fsck_git(store) == [] == fsck_worktree(store)


def test_the_branch_counts_and_not_head(store: GitStore) -> None:
    """After a visit elsewhere HEAD@{1} is another branch's."""
    git(store.root, "switch", "-q", "-c", "side", "HEAD~2")
    git(store.root, "switch", "-q", "main")
    assert git(store.root, "rev-parse", "HEAD@{1}") != git(store.root, "rev-parse", "main@{1}")
    undo(store)
    assert git(store.root, "log", "-1", "--format=%s") == "Add the first"


def test_undo_of_an_undo_does_it_again(store: GitStore) -> None:
    tip = store.head()
    undo(store)
    listed = undo(store, "--list", "--json").json
    assert [entry["did"].split(":")[0] for entry in listed[:2]] == ["patchkit undo", "patchkit"]
    assert f"+ {SECOND.name}" in undo(store).out
    assert store.head() == tip
    undo(store)
    assert git(store.root, "log", "-1", "--format=%s") == "Add the first"


def test_several_at_once_by_the_number_in_the_list(store: GitStore) -> None:
    (gone,) = add(store, numbers(5), message="Add the third")
    store.record(Changes(removed=[gone]), "Revert it")
    lines = undo(store, "--list").out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4"]
    assert "Revert it" in lines[0]
    assert "Add the second" in lines[2]
    wanted = git(store.root, "rev-parse", "main@{3}")
    undo(store, "--to", "3")
    assert store.head() == wanted
    assert in_force(store) == {FIRST.name}


def test_a_dry_run_and_quiet(store: GitStore) -> None:
    before = git(store.root, "rev-parse", "HEAD"), git(store.root, "reflog"), in_force(store)
    assert "would undo “patchkit: Add the second”" in undo(store, "-n").out
    found = undo(store, "-n", "--json").json
    assert found["new"] == git(store.root, "rev-parse", "HEAD~1")
    assert found["removed"] == [SECOND.name]
    assert (git(store.root, "rev-parse", "HEAD"), git(store.root, "reflog"), in_force(store)) == before
    assert undo(store, "-q").out == ""


def test_what_the_person_changed_and_staged_elsewhere_stays(store: GitStore) -> None:
    (store.root / "notes").write_text("committed")
    commit_all(store, "Notes")
    add(store, numbers(7))
    (store.root / "notes").write_text("changed")
    (store.root / "staged").write_text("staged")
    git(store.root, "add", "staged")
    (store.root / "untracked").write_text("untracked")
    undo(store)
    left = git(store.root, "status", "--porcelain").splitlines()
    assert sorted(line.strip() for line in left) == ["?? untracked", "A  staged", "M notes"]
    assert (store.root / "notes").read_text() == "changed"


@pytest.mark.parametrize("how", ["changed", "staged", "untracked"])
def test_what_would_be_overwritten_stops_it(store: GitStore, how: str) -> None:
    if how == "untracked":  # going back to where the patch was would write over it
        store.record(Changes(removed=[SECOND.name]), "Away")
        write(store, SECOND.name, {"facts.jsonl": b"mine\n"})
    else:
        (store.folder / "patches" / SECOND.name / "facts.jsonl").write_bytes(b"mine\n")
        git(store.root, *(("add", "-A") if how == "staged" else ("status",)))
    before = store.head(), git(store.root, "status", "--porcelain")
    line = said(undo(store, code=73))
    assert "facts.jsonl: has changes that are not committed and would be overwritten" in line
    assert (store.head(), git(store.root, "status", "--porcelain")) == before
    assert said(undo(store, "-n", code=73)) == line


def test_a_new_time_stamp_is_no_change(store: GitStore) -> None:
    for path in (store.folder / "patches").rglob("*.*"):
        os.utime(path, (1, 1))
    undo(store)
    assert in_force(store) == {FIRST.name}


def test_a_new_time_stamp_is_no_change_for_a_dry_run_either(store: GitStore) -> None:
    for path in (store.folder / "patches").rglob("*.*"):
        os.utime(path, (1, 1))
    index = (store.git_dir / "index").read_bytes()
    undo(store, "--dry-run")
    assert (store.git_dir / "index").read_bytes() == index


def test_what_was_pushed_is_not_undone_unless_forced(store: GitStore, tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "--bare", "remote")
    git(store.root, "remote", "add", "origin", str(tmp_path / "remote"))
    git(store.root, "push", "-q", "-u", "origin", "main")
    tip = store.head()
    assert "origin/main has what would be undone" in said(undo(store, code=3))
    assert "--force" in said(undo(store, "-n", code=3))
    add(store, numbers(9))
    undo(store)  # this one is not there
    assert store.head() == tip
    undo(store)  # and to do it again takes nothing back
    undo(store)
    assert "origin/main" in said(undo(store, "--to", "5", code=3))
    undo(store, "--to", "5", "--force")
    assert git(store.root, "log", "-1", "--format=%s") == "Add the first"


def test_commits_that_are_not_patchkits_are_left_alone(store: GitStore) -> None:
    (store.root / "notes").write_text("x")
    mine = commit_all(store, "My notes")
    line = said(undo(store, code=66))
    assert "was not patchkit's (“commit: My notes”)" in line
    assert git(store.root, "rev-parse", "HEAD~1")[:10] in line
    assert "nothing can be undone" in undo(store, "--list").out
    add(store, numbers(9))
    assert "only 1 can be undone on main" in said(undo(store, "--to", "2", code=66))
    undo(store)
    assert store.head() == mine


def test_a_rebase_of_patchkits_commits_is_not_patchkits_command(store: GitStore) -> None:
    git(store.root, "commit", "-q", "--amend", "-m", "Reworded\n\nPatchkit-Id: x")
    assert "commit (amend)" in said(undo(store, code=66))


def test_a_commit_from_before_the_reflog_was_marked_is_known_by_its_trailers(store: GitStore) -> None:
    for text, code in (("Accept\n\nPatchkit-Accept: abc", 66), ("Add\n\nPatchkit-Patch: x", 0)):
        git(store.root, "commit", "-q", "--allow-empty", "-m", text)
        undo(store, code=code)


def test_the_list_says_when_the_branch_moved_not_when_a_commit_was_made(store: GitStore, monkeypatch) -> None:
    with monkeypatch.context() as then:
        then.setenv("GIT_COMMITTER_DATE", "2001-02-03T04:05:06Z")
        add(store, numbers(4))
        old = store.head()
        assert json.loads(undo(store, "--list", "--json").out)[0]["date"] == "2001-02-03T04:05:06+00:00"
    git(store.root, "reset", "-q", "--hard", "HEAD~1")
    move_branch(store, current_branch(store), store.head(), old, "pull: go forward")
    assert json.loads(undo(store, "--list", "--json").out)[0]["date"] > "2026"


def test_a_date_that_no_calendar_has_stands_in_nobodys_way(store: GitStore, monkeypatch) -> None:
    before = store.head()
    monkeypatch.setenv("GIT_COMMITTER_DATE", "@99999999999999 +0000")
    add(store, numbers(4))
    assert json.loads(undo(store, "--list", "--json").out)[0]["date"].startswith("1970-01-01")
    undo(store)
    assert store.head() == before


def test_nothing_to_go_back_to(tmp_path: Path) -> None:
    store = make_store(tmp_path / "kb")
    assert "main begins with “patchkit: Start”" in said(undo(store, code=66))
    git(store.root, "reflog", "expire", "--expire=all", "--all")
    assert "no reflog" in said(undo(store, code=66))
    git(store.root, "switch", "-q", "--detach")
    assert "no branch is checked out" in said(undo(store, code=66))
    assert "only shows" in said(undo(store, "--list", "--force", code=2))


def test_in_the_middle_of_a_merge(store: GitStore) -> None:
    git(store.root, "switch", "-q", "-c", "side", "HEAD~1")
    (store.root / "notes").write_text("x")
    commit_all(store)
    git(store.root, "switch", "-q", "main")
    git(store.root, "merge", "-q", "--no-commit", "side")
    assert "a merge is in progress" in said(undo(store, code=75))


def test_a_stack_in_a_subfolder_and_a_worktree(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    git(top, "init", "-q", "-b", "main")
    (top / "model.txt").write_text("x")
    git(top, "add", "-A")
    git(top, "commit", "-q", "-m", "The model's own")
    GitStore.init(top / "a b").record(Changes(settings=SETTINGS), "Start")
    store = GitStore.find(top / "a b")
    add(store, FIRST)
    git(top, "worktree", "add", "-q", "-b", "side", str(tmp_path / "tree"))
    other = GitStore.find(tmp_path / "tree" / "a b")
    add(other, SECOND)
    undo(other)
    undo(store)
    assert in_force(store) == set()
    assert in_force(other) == {FIRST.name}
    assert git(top, "status", "--porcelain") == "" == git(tmp_path / "tree", "status", "--porcelain")


def test_another_writer_that_moved_the_branch_meanwhile_loses_nothing(
    store: GitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit of plain Git comes when the files are back already, just before the reference."""
    real = store.git.__class__.write
    made = []

    def write(git_: object, command: str, *args: str, **options: object) -> bytes:
        if command == "update_ref" and not made:
            (store.root / "theirs").write_text("theirs")
            git(store.root, "add", "theirs")
            git(store.root, "commit", "-q", "--only", "-m", "Theirs", "theirs")
            made.append(git(store.root, "rev-parse", "HEAD"))
        return real(git_, command, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store.git.__class__, "write", write)
    line = said(undo(store, code=75))
    assert "main: was moved by another command meanwhile; nothing was changed" in line
    assert store.head() == made[0]
    assert git(store.root, "status", "--porcelain") == ""
    assert in_force(store) == {FIRST.name, SECOND.name}


def test_a_branch_that_moved_before_the_files_were_touched(store: GitStore) -> None:
    branch, old = moving.current_branch(store), git(store.root, "rev-parse", "HEAD~1")
    with pytest.raises(moving.Busy, match="moved by another command"):
        moving.move_branch(store, branch, old, git(store.root, "rev-parse", "HEAD~2"), "undo")
    assert git(store.root, "status", "--porcelain") == ""


def test_a_hook_that_refuses_the_reference_leaves_the_old_state(store: GitStore) -> None:
    hook = store.common_dir / "hooks" / "reference-transaction"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text('#!/bin/sh\nif [ "$1" = prepared ]; then echo no >&2; exit 1; fi\n')
    hook.chmod(0o755)
    before = store.head()
    undo(store, code=70)
    hook.unlink()
    assert store.head() == before
    assert git(store.root, "status", "--porcelain") == ""


_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "subprocess.Popen"}


def _killed_at(place: Path, number: int) -> bool:
    """Undo in a fork that ends itself at its `number`-th file operation or Git command; whether it did."""
    child = os.fork()
    if child == 0:
        left = number

        def watch(event: str, args: object) -> None:
            nonlocal left
            if event in _EVENTS:
                left -= 1
                if left == 0:
                    os._exit(77)

        sys.addaudithook(watch)
        code = 1
        try:
            Repository.open(place).undo()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    ended = os.waitstatus_to_exitcode(status)
    assert ended in (0, 77)
    return ended == 77


def test_killed_at_each_operation_it_leaves_the_old_state_or_the_new(store: GitStore, tmp_path: Path) -> None:
    (store.root / "mine.txt").write_text("mine")
    git(store.root, "add", "mine.txt")
    old, new = (git(store.root, "rev-parse", name) for name in ("HEAD", "HEAD~1"))
    seen = []
    for number in range(1, 200):
        place = tmp_path / f"copy{number}"
        shutil.copytree(store.root, place, symlinks=True)
        killed = _killed_at(place, number)
        copy = GitStore.find(place)
        seen.append(copy.head())
        assert copy.head() in (old, new)
        for finding in copy.leftovers():
            assert subprocess.run(finding.remedy, shell=True, cwd="/", check=False).returncode == 0, finding
        assert copy.leftovers() == []
        assert git(place, "status", "--porcelain") == "A  mine.txt"
        assert fsck_worktree(copy) == []
        if not killed:
            break
        shutil.rmtree(place)
    assert set(seen) == {old, new}
    assert len(seen) > 8


def test_the_list_is_json_for_scripts(store: GitStore) -> None:
    found = json.loads(undo(store, "--list", "--json").out)
    assert [entry["number"] for entry in found] == [1, 2]
    assert found[0]["to"] == store.head()
    assert found[0]["before"] == found[1]["to"]
