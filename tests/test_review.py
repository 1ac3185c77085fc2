"""`fsck --ci`: every commit of a range, told one line each; no base, no model, no torch."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from git_helpers import (
    SETTINGS,
    add,
    commit_all,
    fact,
    git,
    git_environment,
    make_store,
    numbers,
    patch,
    write,
)
from proof_helpers import Outcome, fine, here, one_line

from patchkit.canonical import hash_bytes
from patchkit.facts import Fact
from patchkit.git.store import Changes, GitStore

__all__ = ["git_environment"]
pytestmark = pytest.mark.usefixtures("git_environment")


@pytest.fixture
def store(tmp_path: Path) -> GitStore:
    store = make_store(tmp_path / "kb")
    add(store, numbers(1))
    git(store.root, "tag", "start")
    return store


def check(store: GitStore, words: str, *options: str) -> Outcome:
    return here("fsck", "-C", store.folder, "--ci", words, *options)


def told(done: Outcome) -> list[str]:
    assert done.code == 1, done
    assert "Traceback" not in done.err
    return [line.removeprefix("patchkit: ") for line in done.lines]


def test_facts_that_come_go_and_change(store: GitStore) -> None:
    add(store, numbers(2), patch([fact(3, "chess")]))
    store.record(Changes(removed=[patch([fact(3, "chess")]).name]), "Away")
    golf = patch([fact(1, "golf")])
    store.record(Changes(patches={golf.name: golf.files()}, removed=[numbers(1).name]), "Replace")
    out = fine(check(store, "start..HEAD")).out
    assert "+ Person 2 plays the sport of → sport 2" in out
    assert "~ Person 1 plays the sport of → sport 1 ⇒ golf" in out
    assert "Person 3" not in out
    assert "3 commits checked, nothing is wrong" in out
    found = fine(check(store, "start..", "--json")).json
    assert (found["commits"], found["problems"], found["known"]) == (3, [], True)
    assert [row["target_before"] for row in found["changed"]] == ["sport 1"]
    assert fine(check(store, "start..HEAD", "-q")).out == ""
    assert "0 commits checked" in fine(check(store, "HEAD..HEAD")).out


BEFORE = Fact("Ann", "{} plays the sport of", "chess", relation="P641")
REWORDED = {
    "prompt": (
        replace(BEFORE, prompt="{} is allergic to"),
        "Ann plays the sport of → chess ⇒ Ann is allergic to → chess",
    ),
    "neighbors": (
        replace(BEFORE, neighbors=("Bob plays",)),
        "Ann plays the sport of → chess; altered: neighbors",
    ),
}


@pytest.mark.parametrize("field", REWORDED)
def test_a_fact_in_other_words_is_a_change(store: GitStore, field: str) -> None:
    """Its key is of subject and relation, so that the same key may say something else altogether."""
    after, said = REWORDED[field]
    held, new = patch([BEFORE]), patch([after])
    add(store, held)
    start = str(store.head())
    store.record(Changes(patches={new.name: new.files()}, removed=[held.name]), "In other words")
    assert f"~ {said}  ({new.name})" in fine(check(store, f"{start}..HEAD")).out
    (row,) = fine(check(store, f"{start}..HEAD", "--json")).json["changed"]
    assert (row["prompt_before"], row["altered"]) == (BEFORE.prompt, [field])
    assert f"~ {said}" in fine(here("diff", "-C", store.folder, start, "HEAD")).out


def test_a_problem_is_told_once_with_its_first_commit(store: GitStore) -> None:
    (store.folder / "patches" / "note").write_text("x")
    bad = commit_all(store)
    add(store, numbers(2))
    (line,) = told(check(store, "start..HEAD"))
    assert line.startswith(f"{bad[:10]}:patches/note: is not a patch folder")
    assert "the facts are not compared" in check(store, "start..HEAD").out
    git(store.root, "rm", "-q", "patches/note")
    commit_all(store, "Mended")
    assert told(check(store, "start..HEAD")) == [line]  # the commit in the middle stays what it is
    assert "+ Person 2" in check(store, "start..HEAD").out
    assert fine(check(store, "HEAD~1..HEAD")).code == 0
    assert check(store, "start..HEAD", "--json").json["problems"][0]["path"] == f"{bad[:10]}:patches/note"


def test_every_problem_is_a_line(store: GitStore) -> None:
    for number in (5, 6):
        write(store, numbers(number).name, {"facts.jsonl": b"x"})
        commit_all(store)
    assert len(told(check(store, "start..HEAD"))) == 2


def test_a_merge_that_is_wrong_for_the_facts(store: GitStore) -> None:
    """A squash of two patches against a revert of one: clean for Git."""
    add(store, numbers(2))
    git(store.root, "switch", "-q", "-c", "side")
    git(store.root, "rm", "-q", "-r", *(f"patches/{numbers(n).name}" for n in (1, 2)))
    write(store, numbers(1, 2, 11, 12, 13).name, numbers(1, 2, 11, 12, 13))
    commit_all(store, "Join them")
    git(store.root, "switch", "-q", "main")
    store.record(Changes(removed=[numbers(1).name]), "Revert one")
    git(store.root, "tag", "before")
    git(store.root, "merge", "-q", "--no-edit", "side")
    assert any("though one side of it took it out" in line for line in told(check(store, "before..HEAD")))


def test_changed_settings_are_told(store: GitStore) -> None:
    store.record(Changes(settings=SETTINGS.replace(b"tiny", b"small")), "Another base's name")
    assert "patchkit.toml changes" in fine(check(store, "start..HEAD")).out
    assert "patchkit.toml changes" not in fine(check(store, "HEAD..HEAD")).out


@pytest.mark.parametrize("file", ["delta.safetensors", "keys.safetensors"])
def test_a_new_version_that_holds_nan_is_found_without_torch(store: GitStore, file: str) -> None:
    files = dict(numbers(2).files())
    before = hash_bytes(files[file])
    files[file] = files[file][:-4] + struct.pack("<f", math.nan)
    if file == "keys.safetensors":  # the header names its keys by their hash, at one length
        files["delta.safetensors"] = files["delta.safetensors"].replace(
            before.encode(), hash_bytes(files[file]).encode()
        )
    write(store, numbers(2).name, files)
    commit_all(store)
    (line,) = told(check(store, "start..HEAD"))
    assert f"{numbers(2).name}/{file}: tensor" in line
    assert "holds NaN or infinity" in line


def test_a_damaged_object_is_found(store: GitStore) -> None:
    add(store, numbers(2))
    entry = next(e for e in store.tree().entries if e.path.endswith(f"{numbers(2).name}/delta.safetensors"))
    path = store.common_dir / "objects" / entry.oid[:2] / entry.oid[2:]
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-4] + b"xxxx")
    assert any(numbers(2).name in line for line in told(check(store, "start..HEAD")))


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("HEAD", 65, "is no range; say BASE..HEAD"),
        ("..HEAD", 65, "is no range"),
        ("start...HEAD", 65, "is no range"),
        ("nowhere..HEAD", 66, "'nowhere' names no commit"),
        ("start..--all", 66, "'--all' names no commit"),
    ],
)
def test_wrong_ranges_are_one_line(store: GitStore, words: str, code: int, says: str) -> None:
    assert says in one_line(check(store, words), code)


def test_no_torch_and_no_base(store: GitStore) -> None:
    add(store, numbers(2))
    code = (
        "import sys; from patchkit.commands import main; code = main(['fsck', '--ci', 'start..HEAD']); "
        "print(code, [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=store.root, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"
