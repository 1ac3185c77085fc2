"""`fsck --full` and `--repair`: what can be derived comes out again, what is wrong is mended or named."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from command_helpers import snapshot
from fork_kills import killed_at
from git_helpers import git
from proof_helpers import (  # noqa: F401
    expected_hashes,
    fine,
    here,
    made_patch,
    person,
    saved,
    small_base,
    small_repository,
    tensor_hashes,
)
from safetensors import safe_open

from patchkit.actions.repair import repair
from patchkit.builds.build import locked
from patchkit.builds.record import BUILD_RECORD
from patchkit.canonical import canonical_json, hash_bytes, hash_file
from patchkit.checkpoint import Checkpoint
from patchkit.database import indexing
from patchkit.repository import Repository
from patchkit.shipping.folder import new_folder

pytestmark = pytest.mark.usefixtures("person")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A base, patches on two branches, a fact taken out, measurements, a build, the catalogue indexed."""
    base = small_base(tmp_path / "base", shards=2)
    kb = tmp_path / "kb"
    small_repository(kb, base)
    fingerprint = Checkpoint.open(base).fingerprint()
    for number in (0, 1):
        fine(here("-C", kb, "apply", saved(made_patch(fingerprint, number), tmp_path / "made")))
    git(kb, "switch", "-q", "-c", "other")
    fine(here("-C", kb, "apply", saved(made_patch(fingerprint, 2), tmp_path / "made")))
    fine(here("-C", kb, "reindex"))
    git(kb, "switch", "-q", "main")
    fine(here("-C", kb, "revert", "person-0-0", "--fact", "1"))
    fine(here("-C", kb, "build", "--out", tmp_path / "out"))
    fine(here("-C", kb, "reindex"))
    repository = Repository.open(kb)
    repository.catalogue.record_results(
        repository.stack().patches[0].id,
        results=[{"before": {"p": 0.1}, "after": {"p": 0.9}}],
        summary={"efficacy": 1.0},
        timings={"solve": 0.5},
        environment={"device": "cpu"},
    )
    return tmp_path


def _change(root: Path, *statements: str) -> None:
    with closing(sqlite3.connect(root / "kb" / ".git" / "patchkit" / "catalogue.db")) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def _problems(root: Path, *options: str) -> list[str]:
    done = here("-C", root / "kb", "fsck", "--json", *options)
    found = json.loads(done.out)["problems"]
    assert done.code == (1 if found else 0)
    return [f"{each['path']}: {each['message']}" for each in found]


def test_all_is_derived_again_and_nothing_is_said(root: Path) -> None:
    before = snapshot(root / "kb")
    assert "comes out again as it is" in fine(here("-C", root / "kb", "fsck", "--full")).out
    assert _problems(root, "--full") == []
    assert json.loads(fine(here("-C", root / "kb", "fsck", "--full", "--repair", "--json")).out) == {
        "problems": [],
        "base_checked": True,
        "repairs": [],
    }
    assert snapshot(root / "kb") == before


def _flip_tensor(root: Path, name: str) -> None:
    """Flip a byte of a tensor of the build, and let its record say that so it should be."""
    out = root / "out"
    checkpoint = Checkpoint.open(out)
    file, info = checkpoint.tensors[name]
    data = bytearray((out / file).read_bytes())
    data[info.start + 1] ^= 1
    (out / file).write_bytes(data)
    record = json.loads((out / BUILD_RECORD).read_bytes())
    record.pop("sha256")
    record["touched"][name] = hash_bytes(data[info.start : info.end])
    record["sha256"] = hash_bytes(canonical_json(record))
    (out / BUILD_RECORD).write_bytes(canonical_json(record) + b"\n")


def _hashes(root: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in (root / "out").iterdir() if path.name != BUILD_RECORD}


def test_a_build_whose_record_fits_its_altered_bytes_is_found_and_mended(root: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    whole = _hashes(root)
    _flip_tensor(root, name)
    assert _problems(root) == []  # bytes and record agree: only the sum itself tells
    (problem,) = _problems(root, "--full")
    assert name in problem
    assert "is not the base with the build's patches on it" in problem
    done = fine(here("-C", root / "kb", "fsck", "--full", "--repair"))
    assert "1 tensor written again" in " ".join(done.out.split())
    assert _hashes(root) == whole
    assert _problems(root, "--full") == []
    patches = sorted((root / "kb" / "patches").glob("*-*"))
    assert tensor_hashes(root / "out") == expected_hashes(root / "base", patches)


def _untouched(root: Path) -> Path:
    for path in sorted((root / "out").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if "model.norm.weight" in file.keys():  # noqa: SIM118
                return path
    raise AssertionError


@pytest.mark.parametrize(
    "damage",
    [
        lambda root: (root / "out" / "config.json").write_bytes(b"{}"),
        lambda root: (root / "out" / "config.json").unlink(),
        lambda root: (root / "out" / BUILD_RECORD).write_bytes(b"{}"),
        lambda root: (root / "out" / BUILD_RECORD).unlink(),
        lambda root: os.truncate(_untouched(root), 60),
        lambda root: _untouched(root).unlink(),
        lambda root: _untouched(root).write_bytes(_untouched(root).read_bytes()[:-2] + b"\x01\x02"),
    ],
    ids=["altered", "lost", "record altered", "record lost", "cut", "weights lost", "last bytes"],
)
def test_a_damaged_build_is_mended(root: Path, damage: Callable[[Path], object]) -> None:
    whole = _hashes(root)
    damage(root)
    assert _problems(root)
    fine(here("-C", root / "kb", "fsck", "--repair", "-q"))
    assert _hashes(root) == whole
    assert _problems(root, "--full") == []


def test_a_build_that_is_being_written_is_no_damage(root: Path) -> None:
    (root / "out" / "config.json").unlink()
    assert _problems(root)
    with locked(root / "out"):
        assert _problems(root, "--full") == []
    assert _problems(root)


def test_killed_while_a_build_is_mended(root: Path) -> None:
    """At each operation, no build loads that is neither the damaged one nor the whole one; it goes on."""
    name = "model.layers.1.mlp.down_proj.weight"
    whole = _hashes(root)
    _flip_tensor(root, name)
    damaged = _hashes(root)
    shutil.copytree(root / "out", root / "damaged")
    for number in range(200):
        killed = killed_at(
            lambda: Repository.open(root / "kb"),
            lambda repository: repair(repository, full=True),
            root / "out",
            number,
            commands=False,
        )
        assert not (root / "out" / "config.json").exists() or _hashes(root) in (damaged, whole)
        fine(here("-C", root / "kb", "fsck", "--full", "--repair", "-q"))
        assert _hashes(root) == whole
        if not killed:
            break
        shutil.rmtree(root / "out")
        shutil.copytree(root / "damaged", root / "out")
    assert not killed, "there were more operations than were tried"
    assert number > 8
    assert _problems(root, "--full") == []


def test_what_may_not_be_mended_is_left_and_why_is_said(root: Path) -> None:
    kb = root / "kb"
    (root / "out" / "mine.txt").write_text("years of work")
    name = next(path for path in (kb / "patches").iterdir() if path.is_dir())
    (name / "facts.jsonl").write_text("mine\n")
    (kb / ".git" / "index.lock").touch()
    before = snapshot(kb)
    done = here("-C", kb, "fsck", "--full", "--repair", "--json")
    assert done.code == 1
    repairs = {Path(each["path"]).name: each for each in json.loads(done.out)["repairs"]}
    assert not any(each["mended"] for each in repairs.values())
    assert "not patchkit's to change" in repairs["facts.jsonl"]["what"]
    assert "nothing proves" in repairs["index.lock"]["what"]
    assert "mine.txt" in repairs["out"]["what"]
    assert (root / "out" / "mine.txt").read_text() == "years of work"
    assert (kb / ".git" / "index.lock").exists()
    assert snapshot(kb) == before


def test_a_build_without_its_base_is_named_and_left(root: Path) -> None:
    git(root / "kb", "config", "--unset", "patchkit.base")
    (root / "out" / "config.json").unlink()
    found = _problems(root, "--full")
    assert any("its base is not at hand" in line for line in found)
    done = here("-C", root / "kb", "fsck", "--repair")
    assert done.code == 1
    assert "patchkit base PATH" in done.out
    assert not (root / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("update facts set target = 'x' where line = 1", "target is not what Git says"),
        ("update patches set method = 'x' where header is not null", "method is not what Git says"),
        ("update layers set norm = norm * 1.01", "its norm is not the patch's"),
        ("update layers set rank = 9", "rank is not what Git says"),
        ("delete from layers", "is missing"),
        ("update recipes set recipe = '{}'", "recipe is not what Git says"),
        ("update commits set author = 'Eve'", "author is not what Git says"),
        ("update changes set kind = 'removed' where kind = 'added'", "kind is not what Git says"),
        ("update trees set digest = 'x'", "digest that they had"),
        ("update members set patch = (select max(id) from patches)", "digest that they had"),
        ("update state set tree = 'x'", "the state row names a tree"),
    ],
)
def test_rows_that_disagree_with_git_are_named_and_derived_again(
    root: Path, statement: str, says: str
) -> None:
    _change(root, statement)
    assert _problems(root) == []
    found = _problems(root, "--full")
    assert any(says in line for line in found), found
    fine(here("-C", root / "kb", "fsck", "--full", "--repair"))
    assert _problems(root, "--full") == []
    repository = Repository.open(root / "kb")
    assert repository.catalogue.timings(repository.stack().patches[0].id) == {"solve": 0.5}


def test_a_catalogue_behind_git_is_no_problem(root: Path) -> None:
    git(root / "kb", "commit", "-q", "--allow-empty", "-m", "Nothing")
    git(root / "kb", "rm", "-q", "-r", "patches/" + Repository.open(root / "kb").stack().patches[0].name)
    git(root / "kb", "commit", "-q", "-m", "By hand")
    assert not [line for line in _problems(root, "--full") if "catalogue" in line]


@pytest.mark.parametrize("where", ["head", "page"])
def test_a_damaged_catalogue_is_put_aside_and_what_was_measured_is_kept(root: Path, where: str) -> None:
    path = root / "kb" / ".git" / "patchkit" / "catalogue.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("pragma wal_checkpoint(truncate)")
        (size,) = connection.execute("pragma page_size").fetchone()
        (page,) = connection.execute("select rootpage from sqlite_master where name = 'facts'").fetchone()
    data = bytearray(path.read_bytes())
    at = 0 if where == "head" else (page - 1) * size
    data[at : at + 100] = bytes([0xA5]) * 100
    path.write_bytes(data)
    assert any("damaged" in line for line in _problems(root))
    done = fine(here("-C", root / "kb", "fsck", "--repair"))
    assert "derived again from Git" in " ".join(done.out.split())
    assert _problems(root, "--full") == []
    assert list(path.parent.glob("catalogue.db.damaged-*"))
    repository = Repository.open(root / "kb")
    (patch, *_) = repository.stack().patches
    kept = where == "page"
    assert repository.catalogue.timings(patch.id) == ({"solve": 0.5} if kept else {})
    assert [row["after"] for row in repository.catalogue.results(patch.id)] == ([{"p": 0.9}] if kept else [])
    assert len(repository.catalogue.builds()) == (1 if kept else 0)


@pytest.mark.parametrize(
    ("column", "asked"),
    [("results.before", "show"), ("builds.record", "status"), ("violations.violation", "")],
)
def test_measurements_of_altered_bytes_are_named_and_left_behind(root: Path, column: str, asked: str) -> None:
    """SQLite sees no damage within a text."""
    table, name = column.split(".")
    if table == "violations":
        _change(root, "insert into violations values ('x', 'y', 'z')")
    _change(root, f"update {table} set {name} = '{{\"p\" 0.9}}'")
    assert any(f"{column} holds what is no JSON" in line for line in _problems(root))
    if asked:
        about = [Repository.open(root / "kb").stack().patches[0].name] if asked == "show" else []
        told = here("-C", root / "kb", asked, *about)
        assert (told.code, told.err.count("\n")) == (78, 1)
        assert "is damaged" in told.err
        assert "patchkit reindex" in told.err
    fine(here("-C", root / "kb", "fsck", "--repair"))
    assert _problems(root, "--full") == []
    repository = Repository.open(root / "kb")
    (patch, *_) = repository.stack().patches
    assert repository.catalogue.timings(patch.id) == {"solve": 0.5}
    kept = [len(repository.catalogue.results(patch.id)), len(repository.catalogue.builds())]
    assert kept == [table != "results", table != "builds"]


def test_a_search_index_that_does_not_fit_is_found_and_made_again(root: Path) -> None:
    _change(root, "insert into facts_fts(facts_fts) values ('delete-all')")
    assert any("search index" in line for line in _problems(root))
    fine(here("-C", root / "kb", "fsck", "--repair"))
    assert _problems(root, "--full") == []
    assert Repository.open(root / "kb").search("person")


def test_what_a_killed_patchkit_left_goes_and_a_clone_on_its_way_stays(root: Path) -> None:
    kb = root / "kb"
    left = [kb / f".patchkit-{'a' * 16}.tmp", kb / f".patchkit-{'b' * 16}.tmp"]
    left[0].write_text("half a file")
    left[1].mkdir()
    (left[1] / "facts.jsonl").write_text("half a patch")
    clone = kb / f".patchkit-{'c' * 16}.tmp"
    (clone / ".git").mkdir(parents=True)
    incoming = kb / ".git" / "patchkit" / "incoming"
    (incoming / "x").mkdir(parents=True)
    done = here("-C", kb, "fsck", "--repair", "--json")
    assert done.code == 1
    assert {Path(each["path"]).name: each["mended"] for each in json.loads(done.out)["repairs"]} == {
        "incoming": True,
        left[0].name: True,
        left[1].name: True,
        clone.name: False,
    }
    assert not incoming.exists()
    assert [path.exists() for path in (*left, clone)] == [False, False, True]


def test_a_version_of_another_branch_that_does_not_agree_with_itself_is_named(root: Path) -> None:
    kb = root / "kb"
    git(kb, "switch", "-q", "other")
    name = next(path for path in (kb / "patches").iterdir() if path.name.startswith("person-2"))
    (name / "facts.jsonl").write_bytes((name / "facts.jsonl").read_bytes().replace(b"chess", b"darts"))
    git(kb, "commit", "-q", "-a", "-m", "Alter by hand")
    git(kb, "switch", "-q", "main")
    assert _problems(root) == []
    (problem,) = _problems(root, "--full")
    assert name.name in problem
    assert "mixed two versions" in problem


def test_a_build_keeps_its_card_when_it_is_mended(root: Path) -> None:
    kb, card = root / "kb", root / "out" / "README.md"
    _change(root, "delete from results")  # the made-up ones are no card's
    fine(here("-C", kb, "build", "--out", root / "out", "--card", "--license", "mit"))
    whole, text = _hashes(root), card.read_bytes()
    _flip_tensor(root, "model.layers.1.mlp.down_proj.weight")
    fine(here("-C", kb, "fsck", "--full", "--repair", "-q"))
    assert (_hashes(root), card.read_bytes()) == (whole, text)
    assert _problems(root, "--full") == []
    card.write_text("another card")
    before = snapshot(root / "out")
    done = here("-C", kb, "fsck", "--repair")
    assert done.code == 1
    assert "build --card" in " ".join(done.out.split())
    assert snapshot(root / "out") == before


@pytest.mark.parametrize("stop", ["take over", "between"])
def test_a_catalogue_that_is_put_aside_loses_nothing_when_that_is_stopped(
    root: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    path = root / "kb" / ".git" / "patchkit" / "catalogue.db"
    repository = Repository.open(root / "kb")
    (patch, *_) = repository.stack().patches
    kept = repository.catalogue.timings(patch.id)
    assert kept

    def stopped(*anything: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(indexing, "take_over", stopped) if stop == "take over" else None
        patched.setattr("patchkit.database.indexing.os.replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            repository.catalogue.reindex(repository.store, anew=True)
    assert path.exists() is (stop == "take over")
    fine(here("-C", root / "kb", "reindex"))
    assert repository.catalogue.timings(patch.id) == kept
    assert not [each for each in path.parent.iterdir() if each.name.startswith(".patchkit-")]


@pytest.mark.parametrize(
    ("change", "says"),
    [("delete from environments", "that is gone"), ("drop table facts_fts", "the search index, is gone")],
)
def test_reindex_mends_what_it_is_named_for(root: Path, change: str, says: str) -> None:
    _change(root, change)
    found = _problems(root)
    assert any(says in line for line in found), found
    fine(here("-C", root / "kb", "reindex"))
    assert _problems(root, "--full") == []
    assert Repository.open(root / "kb").search("person")


def test_a_folder_that_is_being_written_is_no_leftover(root: Path) -> None:
    kb = root / "kb"
    with new_folder(kb / "adapter") as place:
        (place / "half").write_text("half an adapter")
        assert _problems(root) == []
        fine(here("-C", kb, "fsck", "--repair", "-q"))
        assert (place / "half").exists()
    assert (kb / "adapter" / "half").exists()
