"""Opening a repository, reading it, and the one place that commits: what it keeps and what it refuses."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from git_helpers import (  # noqa: F401
    BASE,
    ENVIRONMENT,
    SETTINGS,
    add,
    commit_all,
    git,
    git_environment,
    make_store,
    numbers,
    tree_files,
    write,
)

import patchkit
from patchkit.errors import (
    BadInput,
    Busy,
    Misconfigured,
    NotFound,
    NotWritten,
    PatchkitError,
    Refused,
    Unavailable,
    WouldOverwrite,
)
from patchkit.git import recording, writers
from patchkit.git.messages import compose_message
from patchkit.git.moving import reflog
from patchkit.git.store import ATTRIBUTES, Changes, GitStore
from patchkit.stack import problems, read_stack

pytestmark = pytest.mark.usefixtures("git_environment")


@pytest.fixture
def store(tmp_path: Path) -> GitStore:
    return make_store(tmp_path / "kb")


def _one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    return text


# -- opening -----------------------------------------------------------------------------------


def test_find_looks_upward_to_the_folder_with_the_settings(store: GitStore) -> None:
    add(store, numbers(1))
    found = GitStore.find(store.folder / "patches")
    assert (found.root, found.folder, found.prefix) == (store.root, store.root, "")
    assert found.settings().base_fingerprint == BASE


def test_init_uses_the_repository_around_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    store = GitStore.init(tmp_path / "deep" / "er")
    assert store.root == tmp_path
    assert store.prefix == "deep/er/"
    assert not (tmp_path / "deep" / "er" / ".git").exists()


def test_init_makes_a_repository_and_keeps_the_persons_branch_name(tmp_path: Path, monkeypatch) -> None:
    assert git(GitStore.init(tmp_path / "a").root, "symbolic-ref", "HEAD") == "refs/heads/main"
    config = tmp_path / "config"
    config.write_text("[init]\n\tdefaultBranch = trunk\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    assert git(GitStore.init(tmp_path / "b").root, "symbolic-ref", "HEAD") == "refs/heads/trunk"


def test_what_is_no_repository_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="not in a Git repository; make one: patchkit init"):
        GitStore.find(tmp_path)
    with pytest.raises(NotFound, match="is not a folder"):
        GitStore.find(tmp_path / "nowhere")
    git(tmp_path, "init", "-q", "plain")
    with pytest.raises(NotFound, match=r"no patchkit.toml here or above"):
        GitStore.find(tmp_path / "plain")
    git(tmp_path, "init", "-q", "--bare", "bare")
    with pytest.raises(Misconfigured, match="bare repository"):
        GitStore.find(tmp_path / "bare")


def test_no_git_on_the_path(store: GitStore, tmp_path: Path) -> None:
    """In a fresh process, since GitPython looks for Git when it is imported."""
    code = (
        "from pathlib import Path\n"
        "from patchkit.errors import Unavailable\n"
        "from patchkit.git.store import GitStore\n"
        "try: GitStore.find(Path('.'))\n"
        "except Unavailable as error: print(error)\n"
    )
    env = {
        **os.environ,
        "PATH": str(tmp_path / "empty"),
        "PYTHONPATH": str(Path(patchkit.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=store.root, env=env, capture_output=True, text=True
    )
    assert done.stdout == "Git is not on the PATH; install Git, or put it on the PATH\n", done.stderr


def test_an_old_git_is_refused(store: GitStore, tmp_path: Path, monkeypatch) -> None:
    fake = tmp_path / "bin" / "git"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho git version 2.25.1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(Unavailable, match=r"Git 2\.25 is too old: patchkit needs 2\.36") as error:
        GitStore.find(store.root)
    _one_line(error.value)


def test_dubious_ownership_names_the_command(store: GitStore, monkeypatch) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(Misconfigured, match=r"does not trust .* --add safe\.directory") as error:
        GitStore.find(store.root)
    _one_line(error.value)


def test_no_identity_is_refused_before_work_and_none_is_made_up(store: GitStore, monkeypatch) -> None:
    for name in ENVIRONMENT:
        if name.startswith(("GIT_AUTHOR", "GIT_COMMITTER")):
            monkeypatch.delenv(name)
    monkeypatch.delenv("EMAIL", raising=False)
    for act in (store.ensure_ready, lambda: add(store, numbers(1))):
        with pytest.raises(Misconfigured, match=r"who you are.*user\.name.*user\.email") as error:
            act()
        _one_line(error.value)
    assert not list((store.folder / "patches").glob("*-*"))


def test_settings_of_the_repository_are_kept_in_its_own_configuration(store: GitStore) -> None:
    assert store.config_get("patchkit.base") is None
    for value in ("/models/base", "--global", "with space\nand line", "käse"):
        store.config_set("patchkit.base", value)
        assert store.config_get("patchkit.base") == value


@pytest.mark.parametrize(
    "rev", ["nothing", "", "--output=leak", "HEAD:patches", "a b", "HEAD^9", "é\x1b[31m"]
)
def test_a_revision_that_names_no_commit(store: GitStore, rev: str) -> None:
    with pytest.raises(NotFound, match="names no commit") as error:
        store.resolve(rev)
    assert "\x1b" not in _one_line(error.value)
    assert not (store.root / "leak").exists()


def test_a_text_that_git_cannot_be_given(store: GitStore) -> None:
    with pytest.raises(BadInput, match="leave the character out"):
        store.resolve("a\0b")


# -- reading -----------------------------------------------------------------------------------


def test_bytes_are_hashed_before_they_are_believed(store: GitStore) -> None:
    """Git itself does not notice an object that was put in another's place."""
    add(store, numbers(1))
    blob = next(e.oid for e in store.tree().entries if e.path.endswith("facts.jsonl"))
    wrong = git(store.root, "rev-parse", "HEAD:patchkit.toml")
    objects = store.common_dir / "objects"
    place = objects / blob[:2] / blob[2:]
    place.chmod(0o644)
    place.write_bytes((objects / wrong[:2] / wrong[2:]).read_bytes())
    assert "fingerprint" in git(store.root, "cat-file", "blob", blob)
    with pytest.raises(BadInput, match=f"object {blob} is damaged") as error:
        store.read(blob)
    _one_line(error.value)
    place.write_bytes(b"not zlib at all")
    with pytest.raises(BadInput, match=f"object {blob}"):
        store.read(blob)
    place.unlink()
    with pytest.raises(BadInput, match=f"object {blob} is missing"):
        store.read(blob)
    assert store.tree("HEAD^").entries, "reading goes on after a damaged object"


def test_a_replaced_object_is_not_read(store: GitStore) -> None:
    first = git(store.root, "rev-parse", "HEAD")
    add(store, numbers(1))
    git(store.root, "replace", git(store.root, "rev-parse", "HEAD"), first)
    assert len(read_stack(store).patches) == 1


def test_an_unborn_branch_is_an_empty_stack(tmp_path: Path) -> None:
    store = GitStore.init(tmp_path / "new")
    assert store.head() is None
    assert store.tree().entries == []
    assert store.history() == []
    assert read_stack(store).patches == ()
    assert problems(store) == []


def test_history_tells_what_became_of_each_patch(store: GitStore) -> None:
    one, two = numbers(1, 2), numbers(3)
    store.record(
        Changes(patches={p.name: p.files() for p in (one, two)}), "Two patches\n\nBecause.", [("Key", "v: w")]
    )
    store.record(Changes(patches={one.name: one.without([0]).files()}), "One fact out")
    store.record(Changes(removed=[two.name]), "Away")
    (store.root / "other.txt").write_text("x")
    commit_all(store, "No patch")
    away, out, added, start = store.history()
    assert (away.removed, away.added, away.changed) == ((two.name,), (), ())
    assert (out.removed, out.added, out.changed) == ((), (), (one.name,))
    assert added.added == tuple(sorted((one.name, two.name)))
    assert (added.subject, added.message, added.trailers) == (
        "Two patches",
        "Two patches\n\nBecause.\n\nKey: v: w\n",
        (("Key", "v: w"),),
    )
    assert (added.author, added.email) == ("Ada", "ada@example.org")
    assert abs((datetime.now(UTC) - added.date).total_seconds()) < 600
    assert start.settings_changed
    assert not added.settings_changed
    assert store.history(limit=1) == [away]
    assert store.history(added.id)[0] == added
    assert away.to_dict()["removed"] == [two.name]


def test_history_reads_any_message_and_date(store: GitStore, monkeypatch) -> None:
    monkeypatch.setenv("GIT_AUTHOR_DATE", "@99999999999999 +0000")
    monkeypatch.setenv("GIT_AUTHOR_NAME", "\x1b[31mEve ☃")
    store.record(
        Changes(patches={numbers(1).name: numbers(1).files()}), ":100644 x\n\n\x01\x1b[0m\n:000000 y"
    )
    assert store.history()[0].author.endswith("Eve ☃")
    assert store.history()[0].subject == ":100644 x"
    assert len(store.history()) == 2


def test_the_persons_settings_of_the_log_change_nothing_that_is_read(store: GitStore) -> None:
    store.record(Changes(patches={numbers(1).name: numbers(1).files()}), "Añadir", [("Key", "☃")])
    history, steps = store.history(), reflog(store, "refs/heads/main")
    assert history[-1].settings_changed
    assert len(steps) == 2
    git(store.root, "config", "i18n.logOutputEncoding", "UTF-16")
    git(store.root, "config", "log.showRoot", "false")
    assert (store.history(), reflog(store, "refs/heads/main")) == (history, steps)


def test_a_no_of_gits_with_a_trace_is_a_no(store: GitStore, monkeypatch) -> None:
    monkeypatch.setenv("GIT_TRACE", "1")
    assert store.config_get("patchkit.base") is None
    monkeypatch.setattr(store.git, "_read", lambda *_: (1, b"", "error: bad signature 0x00000000\n"))
    with pytest.raises(BadInput, match="damaged"):
        store.config_get("patchkit.base")


def test_a_thousand_commits_are_listed_quickly(store: GitStore) -> None:
    """Written by fast-import; the bound is loose for a busy machine (some tens of milliseconds alone)."""
    stream = [b"blob\nmark :1\ndata 1\nx\n"]
    for number in range(1000):
        parent = b"from refs/heads/main^0\n" if number == 0 else b""
        name = f"patches/person-{number}-{number:08x}/facts.jsonl".encode()
        stream.append(
            b"commit refs/heads/main\ncommitter A <a@b> %d +0000\ndata 2\nhi\n" % (1700000000 + number)
            + parent
            + b"M 100644 :1 "
            + name
            + b"\n"
        )
    subprocess.run(["git", "fast-import", "--quiet"], cwd=store.root, input=b"".join(stream), check=True)
    start = time.perf_counter()
    found = store.history()
    assert time.perf_counter() - start < 1.0
    assert len(found) == 1001
    assert found[0].added == (f"person-999-{999:08x}",)


# -- recording ---------------------------------------------------------------------------------


def test_what_is_recorded_is_what_the_tree_holds(store: GitStore) -> None:
    one, two = numbers(1, 2), numbers(3)
    commit = store.record(Changes(patches={one.name: one.files(), two.name: two.files()}), "Add")
    assert commit == store.head()
    wanted = {f"patches/{p.name}/{file}": data for p in (one, two) for file, data in p.files().items()}
    assert tree_files(store) == {"patches/.gitattributes": ATTRIBUTES, **wanted}
    assert store.status() == []
    assert (store.folder / "patches" / one.name / "facts.jsonl").read_bytes() == one.files()["facts.jsonl"]
    assert store.leftovers() == []
    assert not (store.private / "incoming").exists()


def test_a_patch_solved_again_loses_the_files_that_it_does_not_have(store: GitStore) -> None:
    one = numbers(1, 2)
    add(store, one)
    files = one.files()
    del files["keys.safetensors"]
    store.record(Changes(patches={one.name: files}), "Without keys")
    assert f"patches/{one.name}/keys.safetensors" not in tree_files(store)
    assert not (store.folder / "patches" / one.name / "keys.safetensors").exists()
    store.record(Changes(removed=[one.name]), "Away")
    assert list(tree_files(store)) == ["patches/.gitattributes"]
    assert not (store.folder / "patches" / one.name).exists()


def test_a_stray_file_keeps_its_folder_and_the_patch_comes_back_into_it(store: GitStore) -> None:
    (store.root / ".gitignore").write_text(".DS_Store\n*.safetensors\n")
    commit_all(store)
    (name,) = add(store, numbers(1))
    stray = store.folder / "patches" / name / ".DS_Store"
    stray.write_bytes(b"finder")
    store.record(Changes(removed=[name]), "Away")
    assert stray.exists()
    assert read_stack(store).patches == ()
    assert add(store, numbers(1)) == [name]
    assert len(read_stack(store).patches) == 1
    assert stray.read_bytes() == b"finder"


def test_the_persons_staged_and_changed_files_stay_out(store: GitStore) -> None:
    for name in ("staged.txt", "changed.txt"):
        (store.root / name).write_text("before")
    commit_all(store)
    (store.root / "staged.txt").write_text("staged")
    git(store.root, "add", "staged.txt")
    (store.root / "changed.txt").write_text("changed")
    (store.root / "new.txt").write_text("new")
    before = git(store.root, "status", "--porcelain")
    add(store, numbers(1))
    assert git(store.root, "status", "--porcelain") == before
    assert "txt" not in git(store.root, "show", "--stat", "--format=", "HEAD")


def test_uncommitted_changes_of_the_same_files_are_not_written_over(store: GitStore) -> None:
    (name,) = add(store, numbers(1, 2))
    facts = store.folder / "patches" / name / "facts.jsonl"
    facts.write_text("mine\n")
    for changes in (Changes(removed=[name]), Changes(patches={name: numbers(1, 2).without([0]).files()})):
        with pytest.raises(WouldOverwrite, match=r"facts.jsonl: has changes that are not committed") as error:
            store.record(changes, "No")
        _one_line(error.value)
    assert facts.read_text() == "mine\n"
    add(store, numbers(9))  # other patches are not held up
    write(store, numbers(5).name, {"facts.jsonl": b"mine\n"})
    with pytest.raises(WouldOverwrite, match="not committed"):
        add(store, numbers(5))


def test_a_link_in_the_place_of_a_folder_is_not_followed(store: GitStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.rmtree(store.folder / "patches")
    (store.folder / "patches").symlink_to(outside)
    with pytest.raises(PatchkitError) as error:
        add(store, numbers(1))
    _one_line(error.value)
    assert list(outside.iterdir()) == []


def test_nothing_to_commit_and_unknown_or_wrong_patches(store: GitStore) -> None:
    (name,) = add(store, numbers(1))
    with pytest.raises(BadInput, match="nothing to commit"):
        store.record(Changes(patches={name: numbers(1).files()}), "Again")
    with pytest.raises(NotFound, match="no such patch at HEAD"):
        store.record(Changes(removed=["nobody-00000000"]), "Away")
    for wrong in ("../evil-00000000", "Evil", "a/b-00000000", ""):
        with pytest.raises(BadInput, match="is not the name and files of a patch"):
            store.record(Changes(patches={wrong: numbers(1).files()}), "No")
    with pytest.raises(BadInput, match="is not the name and files of a patch"):
        store.record(Changes(patches={name: {**numbers(1).files(), "../x": b""}}), "No")
    for message in ("", "  \n", "a\0b"):
        with pytest.raises(BadInput, match="needs a message"):
            store.record(Changes(removed=[name]), message)


def test_a_commit_that_only_says_something(store: GitStore) -> None:
    (store.root / "staged.txt").write_text("staged")
    git(store.root, "add", "staged.txt")
    before = store.head()
    store.record(Changes(), "Accept", [("Patchkit-Accept", "abc")])
    assert git(store.root, "rev-parse", "HEAD^") == before
    assert git(store.root, "diff", "--stat", "HEAD^", "HEAD") == ""
    assert git(store.root, "status", "--porcelain") == "A  staged.txt"


def test_the_head_that_the_work_stood_on(store: GitStore) -> None:
    before = store.head()
    add(store, numbers(1))
    with pytest.raises(Busy, match="HEAD moved from"):
        store.record(Changes(patches={numbers(2).name: numbers(2).files()}), "Add", expected_head=before)
    store.record(Changes(patches={numbers(2).name: numbers(2).files()}), "Add", expected_head=store.head())


@pytest.mark.parametrize(
    ("message", "trailers"),
    [
        ("Subject", [("A", "1"), ("B", "two words")]),
        ("Subject\n\nBody: not a trailer block\nmore", [("A", "1")]),
        ("Subject\n\nSigned-off-by: Ada <a@b>", [("A", "1")]),
        ("Fix: it", [("A", "line\nbreak")]),
        ("# not a comment\n\nBody with -- and 'quotes' $(x)", [("A", "1")]),
        ("Subject\n\nBody\n\n\nMore\n", [("A", "ü")]),
    ],
)
def test_trailers_are_read_back_as_git_reads_them(store: GitStore, message: str, trailers: list) -> None:
    store.record(Changes(patches={numbers(1).name: numbers(1).files()}), message, trailers)
    commit = store.history()[0]
    wanted = tuple((key, " ".join(value.split())) for key, value in trailers)
    signed = (("Signed-off-by", "Ada <a@b>"),) if "Signed" in message else ()
    assert commit.trailers == signed + wanted
    assert commit.subject == message.split("\n")[0]


def test_a_message_without_trailers_is_left_alone() -> None:
    assert compose_message("One\n\nTwo  \n", []) == b"One\n\nTwo\n"


@pytest.mark.parametrize("object_format", ["sha1", "sha256"])
def test_hashes_of_both_kinds(tmp_path: Path, object_format: str) -> None:
    store = make_store(tmp_path / "kb", object_format=object_format)
    (name,) = add(store, numbers(1, 2))
    store.record(Changes(patches={name: numbers(1, 2).without([1]).files()}), "Out")
    assert len(read_stack(store).patches[0].facts) == 1
    assert len(store.history()) == 3


def test_index_version_four_and_a_split_index(tmp_path: Path) -> None:
    store = make_store(tmp_path / "kb")
    git(store.root, "config", "index.version", "4")
    git(store.root, "update-index", "--index-version", "4", "--split-index")
    add(store, numbers(1))
    add(store, numbers(2))
    assert len(read_stack(store).patches) == 2
    assert store.status() == []


def test_a_subfolder_with_awkward_names(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    (tmp_path / "model.txt").write_text("the model's own")
    folder = tmp_path / "[a]*b ü" / ":(top)c"
    store = GitStore.init(folder)
    store.record(Changes(settings=SETTINGS), "Start")
    (name,) = add(store, numbers(1, 2))
    store.record(Changes(patches={name: numbers(1, 2).without([0]).files()}), "Out")
    found = GitStore.find(folder / "patches")
    assert found.folder == folder
    assert [patch.name for patch in read_stack(found).patches] == [name]
    assert [c.added or c.changed for c in found.history()] == [(name,), (name,), ()]
    store.record(Changes(removed=[name]), "Away")
    assert git(tmp_path, "status", "--porcelain") == "?? model.txt"
    write(found, numbers(7).name, numbers(7))
    assert [problem.path for problem in found.leftovers()] == [f"patches/{numbers(7).name}"]
    subprocess.run(found.leftovers()[0].remedy, shell=True, check=True, cwd="/")
    assert found.leftovers() == []


def test_a_worktree_shares_the_private_folder_and_has_its_own_index(store: GitStore, tmp_path: Path) -> None:
    git(store.root, "worktree", "add", "-q", "-b", "side", str(tmp_path / "side"))
    side = GitStore.find(tmp_path / "side")
    assert side.private == store.private
    assert side.git_dir != store.git_dir
    add(side, numbers(1))
    assert len(read_stack(side).patches) == 1
    assert len(read_stack(store).patches) == 0
    (side.git_dir / "index.lock").touch()
    with pytest.raises(Busy, match=r"index\.lock"):
        add(side, numbers(2))
    assert [p.path for p in side.leftovers()] == [str(side.git_dir / "index.lock")]
    assert store.leftovers() == []


def test_the_environment_of_a_hook_elsewhere_names_no_other_repository(
    store: GitStore, tmp_path: Path, monkeypatch
) -> None:
    other = make_store(tmp_path / "other")
    before = git(other.root, "rev-parse", "HEAD"), (other.git_dir / "index").read_bytes()
    for name, value in (
        ("GIT_DIR", other.git_dir),
        ("GIT_WORK_TREE", other.root),
        ("GIT_INDEX_FILE", other.git_dir / "index"),
        ("GIT_LITERAL_PATHSPECS", 1),
    ):
        monkeypatch.setenv(name, str(value))
    found = GitStore.find(store.folder)
    assert found.git_dir == store.git_dir
    made = add(found, numbers(1))
    assert [p.name for p in read_stack(found).patches] == made
    assert found.status() == []
    assert os.environ["GIT_DIR"] == str(other.git_dir)  # the process's own is as it was
    monkeypatch.undo()
    assert (git(other.root, "rev-parse", "HEAD"), (other.git_dir / "index").read_bytes()) == before


def test_a_detached_head(store: GitStore) -> None:
    git(store.root, "switch", "-q", "--detach")
    add(store, numbers(1))
    assert len(read_stack(store).patches) == 1
    assert git(store.root, "rev-parse", "main") != store.head()


def test_line_ends_are_left_alone_whatever_the_configuration(store: GitStore) -> None:
    for key, value in (("core.autocrlf", "true"), ("core.safecrlf", "true"), ("core.eol", "crlf")):
        git(store.root, "config", key, value)
    (name,) = add(store, numbers(1))
    store.record(Changes(settings=SETTINGS.replace(b"tiny", b"small").replace(b"\n", b"\r\n")), "Settings")
    git(store.root, "rm", "-q", "-r", "--cached", "patches")
    git(store.root, "reset", "-q", "--hard")
    assert (store.folder / "patches" / name / "facts.jsonl").read_bytes() == numbers(1).files()["facts.jsonl"]
    assert store.settings().base_source == "small"


def test_every_git_that_writes_is_told_to_fsync(store: GitStore, tmp_path: Path, monkeypatch) -> None:
    """And patchkit's own files are on the disk before they have their names."""
    trace, synced = tmp_path / "trace", []
    monkeypatch.setenv("GIT_TRACE2_EVENT", str(trace))
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), real(handle))
    )
    (name,) = add(store, numbers(1, 2))
    store.record(Changes(patches={name: numbers(1, 2).without([0]).files()}), "Out")
    store.config_set("patchkit.base", "x")
    starts = [json.loads(line) for line in trace.read_text().splitlines() if '"event":"start"' in line]
    writing = [s["argv"] for s in starts if {"add", "commit", "--replace-all"} & set(s["argv"])]
    assert len(writing) == 4  # what Git knows already needs no `git add` before `git commit --only`
    assert all("core.fsync=added,reference" in argv for argv in writing)
    for file in numbers(1, 2).files():
        assert sum(path.endswith(f"/{name}/{file}") and "/incoming/" in path for path in synced) == 1
    assert str(store.folder / "patches" / name) in synced
    assert str(store.folder / "patches") in synced


# -- what others do to a commit ----------------------------------------------------------------


def _hook(store: GitStore, name: str, script: str) -> None:
    path = store.common_dir / "hooks" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def _unchanged(store: GitStore, before: tuple[str | None, dict[str, bytes]]) -> None:
    assert (store.head(), tree_files(store)) == before
    assert store.status() == []
    assert store.leftovers() == []


def test_a_hook_that_alters_the_committed_file_is_found_and_taken_back(store: GitStore) -> None:
    (name,) = add(store, numbers(1, 2))
    before = (store.head(), tree_files(store))
    _hook(store, "pre-commit", "for f in patches/*/facts.jsonl; do echo >> $f; git add $f; done")
    with pytest.raises(Refused, match=r"facts\.jsonl: a hook altered it .* mend the hook") as error:
        add(store, numbers(3))
    _one_line(error.value)
    _unchanged_but(store, before, name)
    for changes in (Changes(patches={name: numbers(1, 2).without([0]).files()}),):
        git(store.root, "checkout", "-q", "--", ".")
        with pytest.raises(Refused, match="a hook altered it"):
            store.record(changes, "Out")
    _unchanged(store, before)


def _unchanged_but(store: GitStore, before: tuple[str | None, dict[str, bytes]], name: str) -> None:
    """The hook also altered a patch that was not ours to commit: that is left as the hook left it."""
    assert (store.head(), tree_files(store)) == before
    assert {path for _, path in store.status()} == {f"patches/{name}/facts.jsonl"}
    git(store.root, "restore", "--staged", "--worktree", "--", ".")


def test_a_hook_that_alters_the_first_commit_of_all(tmp_path: Path) -> None:
    store = GitStore.init(tmp_path / "kb")
    _hook(store, "pre-commit", "echo '# mine' >> patchkit.toml; git add patchkit.toml")
    with pytest.raises(Refused, match=r"patchkit\.toml: a hook altered it"):
        store.record(Changes(settings=SETTINGS), "Start")
    assert store.head() is None
    assert git(store.root, "status", "--porcelain") == ""


def test_a_hook_that_refuses_is_quoted(store: GitStore) -> None:
    before = (store.head(), tree_files(store))
    _hook(store, "pre-commit", "echo 'Not on a Friday' >&2; exit 1")
    with pytest.raises(Refused, match=r"Not on a Friday.*nothing was committed") as error:
        add(store, numbers(1))
    _one_line(error.value)
    _unchanged(store, before)


def test_a_signature_that_fails_is_not_told_as_a_full_disk(store: GitStore) -> None:
    git(store.root, "config", "commit.gpgSign", "true")
    for settings in (("gpg.program", "false"), ("gpg.program", "/nowhere/gpg"), ("gpg.format", "ssh")):
        git(store.root, "config", *settings)
        with pytest.raises(Misconfigured, match="cannot sign the commit"):
            add(store, numbers(1))
        assert store.status() == []
    git(store.root, "config", "user.signingKey", str(store.root / "no-key"))
    with pytest.raises(Misconfigured, match="cannot sign the commit"):
        add(store, numbers(1))
    assert store.status() == []


def test_a_hooks_words_are_not_taken_for_gits(store: GitStore) -> None:
    _hook(store, "pre-commit", "echo 'No space left on device: bad object x' >&2; exit 1")
    with pytest.raises(Refused, match="No space left"):
        add(store, numbers(1))


def test_a_hook_that_rewrites_the_message_or_commits_on_top(store: GitStore) -> None:
    _hook(store, "commit-msg", 'echo "Rewritten" > "$1"')
    commit = store.record(Changes(patches={numbers(1).name: numbers(1).files()}), "Mine")
    assert git(store.root, "log", "-1", "--format=%s", commit) == "Rewritten"
    _hook(store, "post-commit", "rm .git/hooks/post-commit; git commit -q --allow-empty -m Top")
    commit = store.record(Changes(patches={numbers(2).name: numbers(2).files()}), "Mine")
    assert commit == git(store.root, "rev-parse", "HEAD^")


def test_a_hook_sees_the_persons_own_locale(store: GitStore, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    _hook(store, "pre-commit", f"echo $LC_ALL > {tmp_path}/locale")
    add(store, numbers(1))
    assert (tmp_path / "locale").read_text() == "C.UTF-8\n"


def test_a_filter_that_would_store_other_bytes_is_refused(store: GitStore) -> None:
    (store.root / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    commit_all(store)
    before = (store.head(), tree_files(store))
    with pytest.raises(
        Misconfigured, match=r"asks for filter=lfs.*with the line: patches/\*\* !filter"
    ) as error:
        add(store, numbers(1))
    _one_line(error.value)
    _unchanged(store, before)
    with open(store.root / ".gitattributes", "a") as file:
        file.write("patches/** !filter\n")
    commit_all(store)
    add(store, numbers(1))
    assert len(read_stack(store).patches) == 1


@pytest.mark.parametrize("command", ["merge", "cherry-pick", "revert", "rebase"])
def test_nothing_is_recorded_in_the_middle_of_a_merge(store: GitStore, command: str) -> None:
    (store.root / "file").write_text("a")
    commit_all(store)
    git(store.root, "switch", "-q", "-c", "side")
    (store.root / "file").write_text("b")
    commit_all(store)
    git(store.root, "switch", "-q", "main")
    (store.root / "file").write_text("c")
    commit_all(store)
    target = "side~1" if command == "revert" else "side"
    git(store.root, command, target, ok=False)
    with pytest.raises(
        Busy, match=f"is in progress; finish it, or end it with: git .*{command} --abort"
    ) as error:
        add(store, numbers(1))
    _one_line(error.value)
    (finding,) = store.leftovers()
    subprocess.run(finding.remedy, shell=True, check=True, capture_output=True)
    assert store.leftovers() == []
    add(store, numbers(1))


@pytest.mark.parametrize("lock", ["index.lock", "HEAD.lock", "refs/heads/main.lock"])
def test_a_lock_left_behind_is_named_with_its_age_and_the_command(store: GitStore, lock: str) -> None:
    before = (store.head(), tree_files(store))
    path = store.git_dir / lock
    path.touch()
    os.utime(path, (time.time() - 7200, time.time() - 7200))
    with pytest.raises(Busy, match=r"2 hours old.*rm -f -- ") as error:
        add(store, numbers(1))
    assert str(path) in _one_line(error.value)
    found = store.leftovers()
    assert found[0].path == str(path)
    assert "2 hours old" in found[0].message
    for finding in found:
        subprocess.run(finding.remedy, shell=True, check=True)
    _unchanged(store, before)
    add(store, numbers(1))


@pytest.fixture
def plain_user() -> Iterator[Path]:
    """A folder of a user who is not root: root may write everywhere."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


@contextmanager
def _as_plain_user(folder: Path) -> Iterator[None]:
    if os.getuid() != 0:
        yield
        return
    for path in (folder, *folder.rglob("*")):
        os.lchown(path, 65534, 65534)
    os.setresgid(65534, 65534, 0)
    os.setresuid(65534, 65534, 0)  # a shell gives up an effective user that is not its real one
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


@pytest.mark.parametrize("change", ["new", "again", "away"])
@pytest.mark.parametrize("where", [".git", ".git/objects", ".git/refs/heads", ".git/patchkit", "patches"])
def test_a_folder_that_cannot_be_written_is_said_and_nothing_changes(
    plain_user: Path, where: str, change: str
) -> None:
    store = make_store(plain_user / "kb")
    (name,) = add(store, numbers(1, 2))
    before = (store.head(), tree_files(store))
    again = numbers(1, 2).without([0])
    changes = {
        "new": Changes(patches={numbers(3).name: numbers(3).files()}),
        "again": Changes(patches={name: again.files()}),
        "away": Changes(removed=[name]),
    }[change]
    # With the folders inside it: an object whose first two digits are taken needs no new folder.
    folders = [path for path in (store.root / where).rglob("*") if path.is_dir() and where == ".git/objects"]
    folders.append(store.root / where)
    with _as_plain_user(plain_user):
        for folder in folders:
            folder.chmod(0o555)
        try:
            if where == "patches" and change != "new":  # the patch's own folder can be written
                store.record(changes, "Yes")
                assert store.status() == []
                return
            with pytest.raises(NotWritten, match="give write access") as error:
                store.record(changes, "No")
        finally:
            for folder in folders:
                folder.chmod(0o755)
        _one_line(error.value)
        assert store.head() == before[0]
        for finding in store.leftovers():
            subprocess.run(finding.remedy, shell=True, check=True)
        _unchanged(store, before)


def test_a_private_folder_that_cannot_be_made(store: GitStore) -> None:
    before = (store.head(), tree_files(store))
    shutil.rmtree(store.private)
    store.private.write_text("in the way")
    with pytest.raises(NotWritten) as error:
        add(store, numbers(1))
    _one_line(error.value)
    store.private.unlink()
    _unchanged(store, before)


def test_a_full_disk_leaves_the_old_state(store: GitStore, monkeypatch) -> None:
    before = (store.head(), tree_files(store))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording, "fsync_tree", full)
    with pytest.raises(NotWritten, match="No space left on device") as error:
        add(store, numbers(1))
    _one_line(error.value)
    _unchanged(store, before)


# -- two writers -------------------------------------------------------------------------------

_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from git_helpers import numbers
from patchkit.git.store import Changes, GitStore
store = GitStore.find(Path(sys.argv[2]))
for number in map(int, sys.argv[3:]):
    patch = numbers(number)
    store.record(Changes(patches={patch.name: patch.files()}), f"Add {number}")
"""


def _writer(store: GitStore, *values: int) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(patchkit.__file__).parents[1])}
    words = [sys.executable, "-c", _WRITER, str(Path(__file__).parent), str(store.root), *map(str, values)]
    return subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)


def test_two_writers_at_once_lose_nothing(store: GitStore) -> None:
    writers = [_writer(store, *range(10 * n, 10 * n + 5)) for n in (1, 2)]
    for writer in writers:
        assert writer.wait(120) == 0, writer.stderr.read() if writer.stderr else ""
    assert len(read_stack(store).patches) == 10
    assert len(store.history()) == 11
    assert store.leftovers() == []


def test_a_second_writer_is_told_when_it_waits_too_long(store: GitStore, monkeypatch) -> None:
    monkeypatch.setattr(writers, "PATIENCE", 0.1)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with writers.writers_lock(store):
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    try:
        with pytest.raises(Busy, match="another patchkit command is writing here") as error:
            add(store, numbers(1))
        _one_line(error.value)
        assert [p.message for p in store.leftovers()] == ["another patchkit command is writing here"]
    finally:
        done.set()
        thread.join()
    add(store, numbers(1))


def test_a_commit_that_comes_from_plain_git_meanwhile_survives(store: GitStore) -> None:
    """A hook stands in for the other writer: it commits just before we do."""
    (store.root / "theirs.txt").write_text("theirs")
    script = (
        'rm .git/hooks/pre-commit; git update-ref HEAD $(git commit-tree -p HEAD -m Theirs "HEAD^{tree}")'
    )
    _hook(store, "pre-commit", script)
    before = (store.head(), tree_files(store))
    with pytest.raises(Busy, match="another Git command moved HEAD meanwhile"):
        add(store, numbers(1))
    assert git(store.root, "log", "-1", "--format=%s") == "Theirs"
    assert git(store.root, "rev-parse", "HEAD^") == before[0]
    assert store.leftovers() == []
    assert git(store.root, "status", "--porcelain") == "?? theirs.txt"
    (name,) = add(store, numbers(1))
    _hook(store, "pre-commit", script)
    with pytest.raises(Busy, match="another Git command moved HEAD meanwhile"):
        store.record(Changes(patches={numbers(2).name: numbers(2).files()}, removed=[name]), "Instead")
    assert store.leftovers() == []
    assert git(store.root, "status", "--porcelain") == "?? theirs.txt"


def test_patches_that_come_from_plain_git_meanwhile_are_not_taken_for_ours(
    store: GitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `git pull` moves HEAD forward just before we commit: its patches are no alteration of ours."""
    git(store.root, "switch", "-q", "-c", "theirs")
    add(store, numbers(2), message="Theirs")
    git(store.root, "switch", "-q", "main")
    write = store.git.write

    def after_a_pull(command: str, *args: str, **options: Any) -> bytes:
        if command == "commit":
            git(store.root, "merge", "-q", "--ff-only", "theirs")
        return write(command, *args, **options)

    monkeypatch.setattr(store.git, "write", after_a_pull)
    made = store.record(Changes(patches={numbers(1).name: numbers(1).files()}), "Ours")
    assert made == store.head()
    assert git(store.root, "log", "-2", "--format=%s").split() == ["Ours", "Theirs"]
    assert {stored.name for stored in read_stack(store).patches} == {numbers(1).name, numbers(2).name}
    assert store.leftovers() == []


# -- the rules ---------------------------------------------------------------------------------

_FORBIDDEN = {
    "set_reference",
    "set_commit",
    "set_object",
    "create_head",
    "delete_head",
    "create_tag",
    "delete_tag",
    "create_remote",
    "config_writer",
    "checkout",
    "IndexFile",
    "SymbolicReference",
}
_INDEX_WRITES = {"add", "remove", "move", "commit", "reset", "write", "merge_tree", "update", "write_tree"}


def _forbidden_uses(source: str) -> list[str]:
    """GitPython's index writes and reference setters: no compare-and-swap, no hooks, no filters."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in _FORBIDDEN:
            found.append(node.attr)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
            if node.value.attr == "index" and node.attr in _INDEX_WRITES:
                found.append(f"index.{node.attr}")
            stored = isinstance(node.ctx, ast.Store)
            if (
                stored
                and node.value.attr in ("head", "active_branch")
                and node.attr in ("reference", "commit", "object")
            ):
                found.append(f"{node.value.attr}.{node.attr} =")
    return found


def test_the_package_never_writes_through_gitpythons_index_or_references() -> None:
    wrong = "repo.index.add(x)\nrepo.head.reference = y\nrepo.create_head('z')"
    assert sorted(_forbidden_uses(wrong)) == ["create_head", "head.reference =", "index.add"]
    for path in Path(patchkit.__file__).parent.rglob("*.py"):
        assert _forbidden_uses(path.read_text("utf-8")) == [], path


WRITING = {"commit", "add", "rm", "merge", "update_ref"}


def test_only_one_module_starts_git_and_only_the_two_of_recording_commit() -> None:
    package = Path(patchkit.__file__).parent
    for path in package.rglob("*.py"):
        text, name = path.read_text("utf-8"), path.relative_to(package).as_posix()
        if name != "git/command.py":
            assert "import git\n" not in text, path
            assert not ('"git"' in text and "subprocess" in text), path
        allowed = {
            "git/recording.py": WRITING,
            "merging/recording.py": WRITING,
            "git/moving.py": {"update_ref"},
            "actions/pull.py": {"merge"},  # a fast-forward, which makes no commit
        }
        for word in WRITING - allowed.get(name, set()):
            assert f'write("{word}"' not in text, path


def test_opening_and_reading_import_no_torch_and_no_sqlite_utils(store: GitStore) -> None:
    code = (
        "import sys; from pathlib import Path; from patchkit.git.store import GitStore; "
        "from patchkit.stack import problems; from patchkit.catalogue import Catalogue; "
        "s = GitStore.find(Path('.')); problems(s, memory=Catalogue(s.private)); s.history(); s.leftovers(); "
        "print([m for m in ('torch', 'numpy', 'sqlite_utils', 'tomlkit') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(patchkit.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=store.root, env=env, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr
