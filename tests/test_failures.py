"""What goes wrong around a command is one line with its exit code, and nothing is changed or lost."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from git_helpers import git
from proof_helpers import (  # noqa: F401
    FACTS,
    SMALL_RECIPE,
    Outcome,
    environment,
    file_hashes,
    fine,
    fresh,
    here,
    made_patch,
    one_line,
    person,
    saved,
    small_base,
    small_repository,
    tiny_base,
)

from patchkit.builds.build import verify_build
from patchkit.checkpoint import Checkpoint
from patchkit.repository import Repository

pytestmark = pytest.mark.usefixtures("person")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """base, kb with one patch in force, and three more to apply in made/."""
    base = small_base(tmp_path / "base", shards=2)
    small_repository(tmp_path / "kb", base)
    fingerprint = Checkpoint.open(base).fingerprint()
    for number in range(4):
        saved(made_patch(fingerprint, number, 3), tmp_path / "made")
    fine(here("-C", tmp_path / "kb", "apply", made(tmp_path, 0)))
    return tmp_path


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and facts for `init` and `commit`."""
    root = tmp_path_factory.mktemp("engine")
    tiny_base(root / "model")
    (root / "facts.jsonl").write_text(FACTS, encoding="utf-8")
    return root


def made(root: Path, number: int) -> Path:
    return next((root / "made").glob(f"person-{number}-0-*"))


def state(kb: Path) -> tuple[str, dict[str, str], str]:
    """HEAD, the work tree's files, and what Git would say of them."""
    files = {name: sha for name, sha in file_hashes(kb).items() if not name.startswith(".git/")}
    return git(kb, "rev-parse", "HEAD"), files, git(kb, "status", "--porcelain", "--ignored")


def in_force(kb: Path) -> set[str]:
    return {patch.name for patch in Repository.open(kb).stack().patches}


# A full disk and a read-only one


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Fill the disk but for ``leave`` bytes."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    os.truncate(filler, max(0, filler.stat().st_size - leave))
    return filler


FREE = (0, 4096, 8192, 16384, 32768, 65536, 131072)


@pytest.mark.parametrize("command", ["apply", "revert", "fact"])
def test_a_full_disk_while_recording(root: Path, disk: Path, command: str) -> None:
    words = {
        "apply": ["apply", made(root, 1)],
        "revert": ["revert"],
        "fact": ["revert", "person-0-0", "--fact", "f0-1"],
    }[command]
    failures = 0
    for leave in FREE:
        kb = disk / "kb"
        shutil.rmtree(kb, ignore_errors=True)
        shutil.copytree(root / "kb", kb)
        before = state(kb)
        filler = fill(disk, leave)
        outcome = here("-C", kb, *words)
        filler.unlink()
        if outcome.code == 0:
            continue
        failures += 1
        one_line(outcome, 74)
        assert state(kb) == before, leave
        assert Repository.open(kb).status().leftovers == (), leave
        fine(here("-C", kb, *words))
        fine(here("-C", kb, "fsck"))
    assert failures


def test_a_full_disk_while_committing(engine: Path, disk: Path) -> None:
    commit = ["commit", engine / "facts.jsonl", *SMALL_RECIPE]
    template = disk.parent / "template"
    fine(here("init", engine / "model", template))
    fine(here("-C", template, *commit, "--dry-run"))
    failures = 0
    for leave in FREE:
        kb = disk / "kb"
        shutil.rmtree(kb, ignore_errors=True)
        shutil.copytree(template, kb)
        before = state(kb)
        filler = fill(disk, leave)
        outcome = here("-C", kb, *commit)
        filler.unlink()
        if outcome.code == 0:
            continue
        failures += 1
        one_line(outcome, 74)
        assert state(kb) == before, leave
        fine(here("-C", kb, *commit))
        fine(here("-C", kb, "fsck"))
    assert failures


def test_a_full_disk_while_making_a_repository(engine: Path, disk: Path) -> None:
    failures = 0
    for leave in FREE:
        kb = disk / "kb"
        shutil.rmtree(kb, ignore_errors=True)
        filler = fill(disk, leave)
        outcome = here("init", engine / "model", kb)
        filler.unlink()
        if outcome.code:
            failures += 1
            one_line(outcome, 74)
            fine(here("init", engine / "model", kb))
        assert Repository.open(kb).problems() == []
        assert Repository.open(kb).status().leftovers == ()
        fine(here("-C", kb, "fsck"))
    assert failures


def test_a_full_disk_while_building(root: Path, disk: Path) -> None:
    failures = 0
    for leave in (0, 4096, 8192, 12288, 16384):
        out = disk / "out"
        shutil.rmtree(out, ignore_errors=True)
        filler = fill(disk, leave)
        outcome = here("-C", root / "kb", "build", "--out", out)
        filler.unlink()
        if outcome.code:
            failures += 1
            one_line(outcome, 74)
            assert not (out / "config.json").exists()
        fine(here("-C", root / "kb", "build", "--out", out))
        assert verify_build(out) == []
    assert failures


def test_a_read_only_repository(root: Path, engine: Path, disk: Path) -> None:
    kb = disk / "kb"
    shutil.copytree(root / "kb", kb)
    before = state(kb)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for words in (
        ["apply", made(root, 1)],
        ["revert"],
        ["revert", "person-0-0", "--fact", "1"],
        ["build"],
        ["build", "--out", disk / "out"],
    ):
        line = one_line(here("-C", kb, *words), 74)
        assert re.search("[Rr]ead-only file system", line), line
    one_line(here("init", engine / "model", disk / "another"), 74)
    for words in (["status"], ["log"], ["stack"], ["show"], ["diff"], ["fsck"]):
        fine(here("-C", kb, *words))
    fine(here("-C", kb, "build", "--out", root / "out"))  # reads the repository, writes elsewhere
    assert state(kb) == before


# Two writers


def test_two_writers_at_once_lose_nothing(root: Path) -> None:
    """Two processes apply different patches, then both the same one."""
    kb = root / "kb"
    outcomes = _at_once(kb, made(root, 1), made(root, 2))
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert in_force(kb) == {made(root, number).name for number in (0, 1, 2)}
    outcomes = _at_once(kb, made(root, 3), made(root, 3))
    assert sorted(outcome.code for outcome in outcomes) == [0, 65], outcomes
    refused = next(outcome for outcome in outcomes if outcome.code)
    assert all("is in force already" in line for line in refused.lines)  # a line for each fact
    assert len(refused.lines) == 3
    assert in_force(kb) == {made(root, number).name for number in range(4)}
    assert len(git(kb, "log", "--format=%H").splitlines()) == 5
    assert Repository.open(kb).problems() == []
    assert Repository.open(kb).status().leftovers == ()
    fine(here("-C", kb, "fsck"))


def _at_once(kb: Path, *folders: Path) -> list[Outcome]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "patchkit", "-C", str(kb), "apply", str(folder)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for folder in folders
    ]
    said = [process.communicate() for process in processes]
    return [Outcome(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


# Hooks


def hook(kb: Path, script: str) -> Path:
    path = kb / ".git" / "hooks" / "pre-commit"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


ALTERING = 'for f in $(git diff --cached --name-only | grep jsonl); do echo "" >> $f; git add $f; done'


def test_a_hook_that_alters_the_file(root: Path) -> None:
    kb = root / "kb"
    before = state(kb)
    altering = hook(kb, ALTERING)
    line = one_line(here("-C", kb, "apply", made(root, 1)), 3)
    assert "facts.jsonl" in line
    assert "hook" in line
    assert state(kb) == before
    altering.unlink()
    fine(here("-C", kb, "apply", made(root, 1)))
    fine(here("-C", kb, "fsck"))


@pytest.mark.parametrize("script", [ALTERING, "echo 'no edits on Sundays' >&2; exit 1"])
def test_a_commit_that_a_hook_refuses_or_alters_keeps_the_work(
    engine: Path, tmp_path: Path, script: str
) -> None:
    kb = tmp_path / "kb"
    fine(here("init", engine / "model", kb))
    before = state(kb)
    refusing = hook(kb, script)
    line = one_line(here("-C", kb, "commit", engine / "facts.jsonl", *SMALL_RECIPE), 3)
    assert "hook" in line
    assert "Sundays" in line or script == ALTERING
    assert state(kb) == before
    refusing.unlink()
    found = re.search(r"patchkit (apply \S+)", line)
    assert found, line
    fine(here("-C", kb, *found[1].split()))  # the line says how the work is committed all the same
    assert len(in_force(kb)) == 1
    fine(here("-C", kb, "fsck"))


# Git not there, not trusting, not knowing who


def test_no_identity_is_said_before_any_work(
    engine: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = root / "engine"
    fine(here("init", engine / "model", template))
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(root))
    commands = [
        ["-C", root / "kb", "apply", made(root, 1)],
        ["-C", root / "kb", "revert"],
        ["-C", template, "commit", engine / "facts.jsonl"],
        ["init", engine / "model", root / "new"],
    ]
    before = state(root / "kb")
    for words in commands:
        assert "git config --global user.name" in one_line(here(*words), 78)
    assert state(root / "kb") == before
    assert not (root / "new").exists()
    assert not (template / ".git" / "patchkit" / "statistics").exists()
    fine(here("-C", root / "kb", "status"))


def test_no_git_on_the_path(root: Path, engine: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for words in (["status"], ["revert"], ["init", engine / "model", root / "new"]):
        line = one_line(fresh("-C", root / "kb", *words, env=environment(PATH=str(empty))), 69)
        assert "Git is not on the PATH" in line
    assert not (root / "new").exists()


def test_a_repository_of_another_user(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    for words in (["status"], ["apply", made(root, 1)], ["fsck"], ["log"]):
        assert "git config --global --add safe.directory" in one_line(here("-C", root / "kb", *words), 78)


# Locks


@pytest.mark.parametrize(
    "lock",
    ["index", "HEAD", "refs/heads/main", "config", "packed-refs", "objects/maintenance", "refs/heads/other"],
)
def test_a_stale_lock_is_named_with_what_clears_it(root: Path, lock: str) -> None:
    kb = root / "kb"
    before = state(kb)
    path = kb / ".git" / f"{lock}.lock"
    path.touch()
    os.utime(path, (path.stat().st_atime - 7200, path.stat().st_mtime - 7200))
    shown = fine(here("-C", kb, "status", "--json")).json["leftovers"]
    assert [problem["path"] for problem in shown] == [str(path)]
    assert "2 hours old" in shown[0]["message"]
    outcome = here("-C", kb, "apply", made(root, 1))
    if outcome.code:
        assert str(path) in one_line(outcome, 75)
        assert path.exists()
        path.unlink()
        assert state(kb) == before
        path.touch()
    subprocess.run(shown[0]["remedy"], shell=True, check=True)
    assert fine(here("-C", kb, "status", "--json")).json["leftovers"] == []
    if outcome.code:
        fine(here("-C", kb, "apply", made(root, 1)))
    assert in_force(kb) == {made(root, 0).name, made(root, 1).name}
