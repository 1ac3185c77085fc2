"""`clone` and `pull`: what comes is checked before it is believed, and what is refused leaves nothing behind.

Hostile repositories are made with plain Git, as an attacker would; Git is the oracle for what is there after.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from git_helpers import OTHER_BASE, SETTINGS, git, git_environment
from proof_helpers import (
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

from patchkit.git import writers
from patchkit.git.store import Changes
from patchkit.git.writers import writers_lock
from patchkit.repository import Repository
from patchkit.settings import Settings, dump_settings

__all__ = ["git_environment"]
pytestmark = pytest.mark.usefixtures("git_environment")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, beside a base and the repository `origin` with a patch on it."""
    base = small_base(tmp_path / "base")
    origin = small_repository(tmp_path / "origin", base)
    add(origin, 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def add(repository: Repository, number: int) -> str:
    patch = made_patch(repository.settings.base_fingerprint, number)
    repository.store.record(Changes(patches={patch.name: patch.files()}), f"Add {number}")
    return patch.name


def by_hand(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "By hand")


def lines(outcome: Outcome, code: int) -> str:
    """Every line of a refusal; at least one."""
    assert outcome.code == code, outcome
    assert outcome.lines
    assert all(line.startswith("patchkit: ") for line in outcome.lines), outcome
    assert "Traceback" not in outcome.err
    assert "internal error" not in outcome.err
    return outcome.err


# -- clone -------------------------------------------------------------------------------------


def test_a_clone_is_a_repository_that_stands(place: Path) -> None:
    done = fine(here("clone", "origin", "mine", "--base", "base"))
    assert f"cloned into {place / 'mine'}" in done.out
    assert "in force: 1 patch" in done.out
    assert git(place / "mine", "rev-parse", "HEAD") == git(place / "origin", "rev-parse", "HEAD")
    assert git(place / "mine", "status", "--porcelain") == ""
    assert git(place / "mine", "config", "remote.origin.url") == str(place / "origin")
    assert git(place / "mine", "config", "core.hooksPath", ok=False) == ""
    assert git(place / "mine", "config", "core.symlinks") == "false"
    assert git(place / "mine", "config", "patchkit.base") == str(place / "base")
    fine(here("status", "-C", "mine"))
    fine(here("build", "-C", "mine"))
    patches = [path for path in (place / "mine" / "patches").iterdir() if path.is_dir()]
    assert tensor_hashes(Repository.open("mine").build_folder) == expected_hashes(place / "base", patches)
    assert sorted(path.name for path in place.iterdir()) == ["base", "mine", "origin"]


def test_without_a_base_the_next_step_is_said(place: Path) -> None:
    (place / "folder").mkdir()
    assert "next: patchkit base PATH" in fine(here("clone", "origin", "folder")).out
    assert "say where it is: patchkit base PATH" in one_line(here("build", "-C", "folder"), 78)
    assert fine(here("clone", "-C", "folder", "../origin", "again", "-q")).out == ""
    found = fine(here("clone", "origin", "third", "--json")).json
    assert (found["patches"], found["stacks"]) == (1, ["."])


def test_a_clone_into_the_folder_where_one_stands(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder stays the one that it was, so that the next command finds itself there."""
    (place / "folder").mkdir()
    was = (place / "folder").stat().st_ino
    monkeypatch.chdir(place / "folder")
    fine(here("clone", "../origin", ".", "--base", "../base"))
    assert (place / "folder").stat().st_ino == was
    assert "in force" in fine(here("status")).out
    assert git(place / "folder", "status", "--porcelain") == ""
    assert not list(place.rglob(".patchkit-*"))


def test_the_folder_is_named_as_git_names_it(place: Path) -> None:
    for source, name in (("origin/.git", "origin"), ("bare.git/", "bare"), ("knowledge.bundle", "knowledge")):
        (place / "here").mkdir(exist_ok=True)
        if source.startswith("bare"):
            git(place, "clone", "-q", "--bare", "origin", "bare.git")
        if source.startswith("knowledge"):
            git(place / "origin", "bundle", "create", "-q", str(place / source), "HEAD", "main")
        fine(here("clone", "-C", "here", f"../{source}"))
        assert (place / "here" / name / "patchkit.toml").is_file()


def test_a_dry_run_leaves_nothing(place: Path) -> None:
    before = file_hashes(place)
    for folder in ("mine", "deep/er/mine"):
        assert "could be cloned into" in fine(here("clone", "origin", folder, "-n")).out
        assert file_hashes(place) == before
        assert not (place / folder.partition("/")[0]).exists()


def test_stacks_in_subfolders_are_all_checked(place: Path) -> None:
    for name in ("a", "b c"):
        folder = place / "origin" / name
        (folder / "patches").mkdir(parents=True)
        (folder / "patchkit.toml").write_bytes(SETTINGS)
    by_hand(place / "origin")
    assert fine(here("clone", "origin", "m", "--json")).json["stacks"] == ["a", "b c", "."]
    assert "several stacks" in one_line(here("clone", "origin", "n", "--base", "base"), 65)
    (place / "origin" / "b c" / "patches" / "x").write_text("x")
    by_hand(place / "origin")
    assert "b c/patches/x: is not a patch folder" in lines(here("clone", "origin", "n"), 65)
    assert not (place / "n").exists()


def link_in_the_place_of_patches(root: Path) -> None:
    shutil.rmtree(root / "patches")
    (root / "patches").symlink_to(root.parent / "outside")


def link_in_the_place_of_facts(root: Path) -> None:
    (file,) = (root / "patches").glob("*/facts.jsonl")
    file.unlink()
    file.symlink_to(root.parent / "outside" / "secret")


def link_in_the_place_of_settings(root: Path) -> None:
    (root / "patchkit.toml").unlink()
    (root / "patchkit.toml").symlink_to(root.parent / "outside" / "secret")


def gitlink(root: Path) -> None:
    head = git(root, "rev-parse", "HEAD")
    git(root, "update-index", "--add", "--cacheinfo", f"160000,{head},patches/module-00000000")


def attributes(root: Path) -> None:
    (root / "patches" / ".gitattributes").write_text("*.jsonl merge=union\n")


def attributes_of_a_patch(root: Path) -> None:
    (file,) = (root / "patches").glob("*/facts.jsonl")
    file.with_name(".gitattributes").write_text("* text eol=crlf\n")


def odd_name(root: Path) -> None:
    (root / "patches" / "\x1b]0;owned\x07").write_text("x")


def way_out(root: Path) -> None:
    """A tree whose names lead out of it, as no `git add` writes one."""
    blob = git(root, "hash-object", "-w", "patchkit.toml")
    inner = git(root, "rev-parse", "HEAD:patches")
    raw = b"".join(
        mode + b" " + name + b"\0" + bytes.fromhex(oid)
        for mode, name, oid in (
            (b"100644", b"..", blob),
            (b"100644", b"patchkit.toml", blob),
            (b"40000", b"patches", inner),
        )
    )
    (root.parent / "listing").write_bytes(raw)
    tree = git(root, "hash-object", "-t", "tree", "-w", "--literally", str(root.parent / "listing"))
    (root.parent / "listing").unlink()
    commit = git(root, "commit-tree", "-m", "Out", "-p", "HEAD", tree)
    git(root, "update-ref", "refs/heads/main", commit)


def mixed_up(root: Path) -> None:
    (file,) = (root / "patches").glob("*/facts.jsonl")
    file.write_bytes(file.read_bytes().replace(b"chess", b"poker"))


def other_base(root: Path) -> None:
    settings = dump_settings(Settings("folder:base", None, OTHER_BASE, {"layers": [0]}))
    (root / "patchkit.toml").write_bytes(settings)


HOSTILE: list[tuple[Callable[[Path], object], str]] = [
    (link_in_the_place_of_patches, "patches: is a symbolic link"),
    (link_in_the_place_of_facts, "facts.jsonl: is a symbolic link"),
    (link_in_the_place_of_settings, "patchkit.toml: is not a regular file"),
    (gitlink, "is another repository (a gitlink)"),
    (attributes, "patches/.gitattributes: is not patchkit's own"),
    (attributes_of_a_patch, "changes how Git treats this patch"),
    (odd_name, "is not a patch folder"),
    (mixed_up, "is not the one that delta.safetensors was made with"),
    (other_base, "was made for another base"),
    (way_out, "invalid path '..'"),
]


@pytest.fixture
def outside(place: Path) -> Path:
    folder = place / "outside"
    folder.mkdir()
    (folder / "secret").write_text("mine")
    return folder


@pytest.mark.parametrize(("make", "says"), HOSTILE, ids=[make.__name__ for make, _ in HOSTILE])
def test_a_hostile_clone_is_refused_and_leaves_nothing(
    place: Path, outside: Path, make: Callable[[Path], object], says: str
) -> None:
    root = place / "origin"
    make(root)
    if make is not way_out:
        git(root, "add", "-A", *([":!patches/module-00000000"] if make is gitlink else []))
        git(root, "commit", "-q", "-m", "By hand")
    before = {path: path.lstat().st_mode for path in place.rglob("*") if "origin" not in path.parts}
    said = here("clone", "origin", "deep/mine")
    assert says in lines(said, 70 if make is way_out else 65)
    assert "\x1b" not in said.err
    after = {path: path.lstat().st_mode for path in place.rglob("*") if "origin" not in path.parts}
    assert after == before
    assert (outside / "secret").read_text() == "mine"


def test_a_link_elsewhere_in_the_tree_leads_nowhere(place: Path, outside: Path) -> None:
    (place / "origin" / "link").symlink_to(outside)
    by_hand(place / "origin")
    fine(here("clone", "origin", "mine"))
    assert not (place / "mine" / "link").is_symlink()
    assert (place / "mine" / "link").read_text() == str(outside)
    assert git(place / "mine", "status", "--porcelain") == ""


def test_no_hook_runs_before_the_tree_is_checked(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = tmp_path / "template" / "hooks" / "post-checkout"
    hook.parent.mkdir(parents=True)
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    hook.chmod(0o755)
    monkeypatch.setenv("GIT_TEMPLATE_DIR", str(tmp_path / "template"))
    fine(here("clone", "origin", "mine"))
    assert not (tmp_path / "ran").exists()
    git(place / "mine", "checkout", "-q", "-b", "x")
    assert (tmp_path / "ran").exists()  # it is the person's own, and theirs again


PROGRAM = "ext::sh -c touch% owned"
BAD_PLACES = [
    ("nowhere", 66, "there is no Git repository there"),
    ("base", 66, "there is no Git repository there"),
    ("https://no-such-host.invalid/kb.git", 69, "cannot be reached"),
    ("https://user:secret@no-such-host.invalid/kb.git", 69, "cannot be reached"),
    ("ssh://127.0.0.1/kb.git", 69, "cannot be reached"),
    ("gopher://example.org/kb.git", 65, "name an https or ssh URL"),
    (PROGRAM, 65, "starts a program of this machine"),
    ("fd::17", 65, "starts a program"),
    ("--upload-pack=touch owned", 65, "is no address of a repository"),
    ("", 65, "is no address"),
    ("a\x1b[31mb", 65, "holds characters that no address has"),
]


@pytest.mark.parametrize(("url", "code", "says"), BAD_PLACES, ids=[repr(row[0]) for row in BAD_PLACES])
def test_a_place_that_is_none_is_one_line(
    place: Path, url: str, code: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in (("GIT_SSH_COMMAND", "false"), ("GIT_CONFIG_COUNT", "1")):
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "protocol.ext.allow")  # even where the person allows it
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "always")
    line = one_line(here("clone", "--", url, "mine"), code)
    assert says in line
    assert "secret" not in line
    assert "\x1b" not in line
    assert sorted(path.name for path in place.iterdir()) == ["base", "origin"]


def test_a_program_behind_another_address_does_not_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`url.*.insteadOf` in the person's configuration may make an address a program again."""
    git(place, "config", "--file", "config", "url.ext::.insteadOf", "plain:")
    git(place, "config", "--file", "config", "protocol.ext.allow", "always")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(place / "config"))
    assert "'ext' addresses" in one_line(here("clone", "plain:sh -c touch% owned", "mine"), 65)
    assert not (place / "owned").exists()


def test_what_is_in_the_way_and_what_is_no_stack(place: Path) -> None:
    assert "is there already and not empty" in one_line(here("clone", "origin", "base"), 73)
    assert "is there already" in one_line(here("clone", "origin", "base/config.json"), 73)
    git(place, "init", "-q", "empty")
    assert "is an empty repository" in one_line(here("clone", "empty", "mine"), 66)
    (place / "empty" / "x").write_text("x")
    by_hand(place / "empty")
    assert "holds no patchkit.toml" in one_line(here("clone", "empty", "mine"), 66)
    assert "gives no name for a folder" in one_line(here("clone", "/"), 65)
    other = small_base(place / "other", seed=1)
    line = one_line(here("clone", "origin", "mine", "--base", other), 65)
    assert "is not this repository's base" in line
    assert "there is no such folder" in one_line(here("clone", "origin", "mine", "--base", "./no"), 66)
    assert not (place / "mine").exists()


# -- pull --------------------------------------------------------------------------------------


@pytest.fixture
def mine(place: Path) -> Repository:
    fine(here("clone", "origin", "mine", "--base", "base"))
    return Repository.open(place / "mine")


def test_what_came_is_in_force_and_the_build_follows(place: Path, mine: Repository) -> None:
    assert "has all that origin/main has" in fine(here("pull", "-C", "mine")).out
    fine(here("build", "-C", "mine"))
    origin = Repository.open(place / "origin")
    name = add(origin, 4)
    done = fine(here("pull", "-C", "mine"))
    assert f"+ {name}" in done.out
    assert mine.store.head() == origin.store.head()
    assert git(place / "mine", "status", "--porcelain") == ""
    patches = [path for path in (place / "mine" / "patches").iterdir() if path.is_dir()]
    assert tensor_hashes(mine.build_folder) == expected_hashes(place / "base", patches)
    assert mine.status().builds[0].state == "up to date"
    assert "origin/main has what would be undone" in one_line(here("undo", "-C", "mine"), 3)
    fine(here("undo", "-C", "mine", "--force"))
    assert mine.store.head() == git(place / "origin", "rev-parse", "HEAD~1")


def test_a_branch_that_git_would_squash_goes_forward_all_the_same(place: Path, mine: Repository) -> None:
    add(Repository.open(place / "origin"), 3)
    git(mine.store.root, "config", "branch.main.mergeOptions", "--squash")
    fine(here("pull", "-C", mine.store.folder))
    assert mine.store.head() == git(place / "origin", "rev-parse", "HEAD")
    assert git(mine.store.root, "status", "--porcelain") == ""


def test_a_remote_that_is_named_by_its_address_alone_is_pulled_from(place: Path, mine: Repository) -> None:
    """As tools write it for the branch of a fork: there is no branch of it here that Git would keep."""
    add(Repository.open(place / "origin"), 3)
    git(mine.store.root, "config", "branch.main.remote", str(place / "origin"))
    new = fine(here("pull", "-C", mine.store.folder, "-n", "--json")).json["new"]
    fine(here("pull", "-C", mine.store.folder))
    assert mine.store.head() == new == git(place / "origin", "rev-parse", "HEAD")


def test_a_branch_whose_name_ends_alike_is_another(place: Path, mine: Repository) -> None:
    """`git ls-remote` lists it too, and above the one that is asked for."""
    git(place / "origin", "update-ref", "refs/backup/refs/heads/main", "HEAD")
    name = add(Repository.open(place / "origin"), 3)
    assert fine(here("pull", "-C", mine.store.folder, "-n", "--json")).json["added"] == [name]


def test_a_dry_run_moves_no_branch(place: Path, mine: Repository) -> None:
    name = add(Repository.open(place / "origin"), 4)
    before = git(place / "mine", "for-each-ref"), git(place / "mine", "reflog")
    found = fine(here("pull", "-C", "mine", "-n", "--json")).json
    assert found["added"] == [name]
    assert found["new"] == git(place / "origin", "rev-parse", "HEAD")
    assert "would go from" in fine(here("pull", "-C", "mine", "-n")).out
    assert (git(place / "mine", "for-each-ref"), git(place / "mine", "reflog")) == before


@pytest.mark.parametrize(("make", "says"), HOSTILE[:-1], ids=[make.__name__ for make, _ in HOSTILE[:-1]])
def test_what_cannot_be_believed_is_not_taken_in(
    place: Path, outside: Path, mine: Repository, make: Callable[[Path], object], says: str
) -> None:
    before = mine.store.head(), file_hashes(place / "mine" / "patches")
    root = place / "origin"
    make(root)
    git(root, "add", "-A", *([":!patches/module-00000000"] if make is gitlink else []))
    git(root, "commit", "-q", "-m", "By hand")
    for option in ((), ("-n",)):
        said = lines(here("pull", "-C", "mine", *option), 65)
        assert says in said
        assert "origin/main:patch" in said
    assert (mine.store.head(), file_hashes(place / "mine" / "patches")) == before
    assert git(place / "mine", "status", "--porcelain") == ""


def test_commits_on_both_sides_are_left_to_merge(place: Path, mine: Repository) -> None:
    add(Repository.open(place / "origin"), 4)
    add(mine, 5)
    head = mine.store.head()
    line = one_line(here("pull", "-C", "mine"), 3)
    assert "main and origin/main both have commits" in line
    assert line.endswith("patchkit merge @{upstream}")
    assert mine.store.head() == head
    git(place / "mine", "reset", "-q", "--hard", "HEAD~1")
    add(mine, 6)
    git(place / "origin", "reset", "-q", "--hard", "HEAD~1")
    assert "has all that origin/main has" in fine(here("pull", "-C", "mine")).out


def test_wrong_uses_of_pull_are_one_line(place: Path, mine: Repository) -> None:
    origin = Repository.open(place / "origin")
    name = add(origin, 4)
    blocking = place / "mine" / "patches" / name
    blocking.mkdir()
    (blocking / "facts.jsonl").write_text("mine")
    assert "would be overwritten" in one_line(here("pull", "-C", "mine"), 73)
    assert "would be overwritten" in one_line(here("pull", "-C", "mine", "-n"), 73)
    shutil.rmtree(blocking)
    shutil.move(place / "origin", place / "moved")
    assert "there is no Git repository there" in one_line(here("pull", "-C", "mine"), 66)
    git(place / "mine", "config", "remote.origin.url", "ext::sh -c touch% owned")
    git(place / "mine", "config", "protocol.ext.allow", "always")
    assert "'ext' addresses" in one_line(here("pull", "-C", "mine"), 65)
    git(place / "mine", "config", "remote.origin.url", "https://no-such-host.invalid/kb")
    assert "cannot be reached" in one_line(here("pull", "-C", "mine"), 69)
    git(place / "mine", "switch", "-q", "-c", "own")
    assert "own: follows no branch of a remote" in one_line(here("pull", "-C", "mine"), 66)
    git(place / "mine", "switch", "-q", "--detach")
    assert "no branch is checked out" in one_line(here("pull", "-C", "mine"), 66)
    assert not list(place.rglob("owned"))


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when the test's own thread comes to the writers' lock."""
    reached, real, own = threading.Event(), writers._wait_for, threading.get_ident()

    def wait_for(handle: int, path: Path) -> None:
        if threading.get_ident() == own:
            reached.set()
        real(handle, path)

    monkeypatch.setattr(writers, "_wait_for", wait_for)
    return reached


@pytest.mark.parametrize("words", [["pull"], ["switch", "side"]])
def test_head_does_not_move_under_a_commit_that_another_command_makes(
    place: Path, waiting: threading.Event, words: list[str]
) -> None:
    fine(here("clone", "origin", "mine", "--base", "base"))
    git(place / "mine", "branch", "side")
    add(Repository.open("origin"), 3)
    store = Repository.open("mine").store
    held, seen = threading.Event(), []

    def head() -> tuple[str, str]:
        return git(place / "mine", "symbolic-ref", "HEAD"), git(place / "mine", "rev-parse", "HEAD")

    def another() -> None:
        with writers_lock(store):
            waiting.clear()
            held.set()
            assert waiting.wait(30)
            time.sleep(0.1)
            seen.append(head())

    before = head()
    thread = threading.Thread(target=another)
    thread.start()
    assert held.wait(10)
    fine(here("-C", "mine", *words))
    thread.join()
    assert seen == [before]
    assert head() != before


def test_a_commit_that_another_command_makes_while_pull_waits_is_told(
    place: Path, waiting: threading.Event
) -> None:
    fine(here("clone", "origin", "mine", "--base", "base"))
    add(Repository.open("origin"), 3)
    store, held = Repository.open("mine").store, threading.Event()

    def another() -> None:
        with writers_lock(store):
            waiting.clear()
            held.set()
            assert waiting.wait(30)
            git(place / "mine", "commit", "-q", "--allow-empty", "-m", "Mine")

    thread = threading.Thread(target=another)
    thread.start()
    assert held.wait(10)
    assert "was moved by another command meanwhile" in one_line(here("-C", "mine", "pull"), 75)
    thread.join()
    assert git(place / "mine", "log", "-1", "--format=%s") == "Mine"
