"""`build` from the command line: what it writes, where it refuses, and that any program loads it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_helpers import (
    RECIPE,
    Cli,
    cli,
    git,
    git_environment,
    home,
    knowledge,
    save_checkpoint,
    set_recipe,
    tiny_base,
)
from safetensors.torch import load_file
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchkit.builds.record import BUILD_RECORD, BuildRecord
from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput
from patchkit.repository import Repository
from patchkit.tensors import header_of_file

__all__ = ["cli", "git_environment", "home", "knowledge"]

PROMPT = "LeBron James plays the sport of"
FACT = ("commit", "--fact", "Ann | {} plays the sport of | football", "--set", "steps=3")


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but patchkit's own record."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "patchkit-build.json"
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokenizer(PROMPT)["input_ids"]])).logits


def check_loads(built: Path, repository: Repository) -> None:
    """transformers loads the build, and it computes what the repository's own model computes."""
    model = AutoModelForCausalLM.from_pretrained(built, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert torch.equal(logits(model, tokenizer), logits(*repository.load()))
    base = AutoModelForCausalLM.from_pretrained(repository.base_folder, dtype=torch.float32).eval()
    assert not torch.equal(logits(base, tokenizer), logits(model, tokenizer))


def test_build_goes_to_its_place_and_is_brought_up_to_date(cli: Cli, knowledge: Path) -> None:
    place = Path(cli.ok("path", "build").out.strip())
    done = cli.ok("build")
    assert f"{place}: 2 patches in force, 1 of " in done.out
    check_loads(place, Repository.open(knowledge))
    assert cli.ok("status", "--json").json["builds"] == [{"folder": str(place), "state": "up to date"}]
    cli.ok("revert", "-q")
    assert f"build {place}: behind" in cli.ok("status").out
    found = cli.ok("build", "--json").json
    assert found["folder"] == str(place)
    (row,) = cli.ok("stack", "--json").json
    assert (found["patches"], found["ids"]) == ([row["name"]], [row["id"]])
    assert found["files"]["config.json"]["sha256"] == hashes(place)["config.json"]
    check_loads(place, Repository.open(knowledge))
    cli.ok("revert", "-q")
    cli.ok("build", "-q")
    assert hashes(place) == hashes(tiny_base())
    shutil.rmtree(place)
    assert f"build {place}: gone" in cli.ok("status").out


def test_names_and_ids_of_a_build_stand_in_one_order(cli: Cli, knowledge: Path) -> None:
    for number in range(4):
        cli.ok("commit", "--fact", f"Person {number} | {{}} lives in | Rome", "--set", "steps=1", "-q")
    rows = {row["name"]: row["id"] for row in cli.ok("stack", "--json").json}
    found = cli.ok("build", "--json").json
    assert dict(zip(found["patches"], found["ids"], strict=True)) == rows
    assert sorted(found["ids"]) != found["ids"], "six ids in order by chance would prove nothing"


def test_what_a_killed_export_left_in_a_build_is_taken_away(cli: Cli, knowledge: Path) -> None:
    place = Path(cli.ok("path", "build").out.strip())
    cli.ok("build", "-q")
    left, held = place / ".patchkit-0a.tmp", place / ".patchkit-0b.tmp"
    for folder in (left, held):
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
    handle = os.open(held, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        cli.ok("revert", "-q")
        cli.ok("build", "-q")
    finally:
        os.close(handle)
    assert (left.exists(), held.exists()) == (False, True)
    assert (place / "config.json").exists()


def test_what_stands_where_a_build_was_is_not_repaired(cli: Cli, knowledge: Path, home: Path) -> None:
    """The build was removed, and somebody's own checkpoint, or the base itself, lies in its place now."""
    place = home / "model"
    cli.ok("build", "--out", place, "-q")
    shutil.rmtree(place)
    shutil.copytree(tiny_base(), place)
    (place / "mine.txt").write_text("x")
    before = hashes(place)
    cli.ok("fsck")
    cli.ok("fsck", "--repair")
    assert hashes(place) == before
    assert f"build {place}: gone" in cli.ok("status").out
    git(knowledge, "config", "patchkit.base", str(place))
    cli.ok("fsck", "--repair")
    assert hashes(place) == before


def test_a_base_that_is_a_worktree_keeps_its_git_file(cli: Cli, home: Path) -> None:
    base = shutil.copytree(tiny_base(), home / "base")
    (base / ".git").write_text("gitdir: /elsewhere/.git/worktrees/base\n")
    cli.ok("build", "--base", base, "--out", home / "out", "-q")
    assert hashes(home / "out") == hashes(tiny_base())


def test_a_revision_on_another_base_is_not_built_on_this_one(cli: Cli, home: Path) -> None:
    """A stack of nothing fits every base, and is the whole base."""
    other = save_checkpoint(tiny_model("llama", torch.float16), home / "other")
    cli.ok("init", tiny_base(), "kb", "-q")
    kb = home / "kb"
    git(kb, "tag", "v0")
    cli.ok("-C", "kb", "build", "-q")
    settings = kb / "patchkit.toml"
    first, second = (Checkpoint.open(base).fingerprint() for base in (tiny_base(), other))
    settings.write_text(settings.read_text().replace(first, second))
    git(kb, "commit", "-q", "-a", "-m", "Another base")
    git(kb, "config", "patchkit.base", str(other))
    for extra in ((), ("-n",)):
        done = cli("-C", "kb", "build", "--rev", "v0", "--out", home / "out", *extra)
        assert (done.code, "v0: was made for another base than HEAD" in done.err) == (65, True)
    assert not (home / "out").exists()
    assert [row["state"] for row in cli.ok("-C", "kb", "status", "--json").json["builds"]] == ["behind"]
    with pytest.raises(BadInput, match="v0: was made for another base"):
        Repository.open(kb).load("v0")
    cli.ok("-C", "kb", "build", "--rev", "HEAD", "--out", home / "out", "-q")
    assert hashes(home / "out") == hashes(other)


def test_a_build_that_another_program_wrote_into_is_put_right(cli: Cli, knowledge: Path) -> None:
    """At the same size, in an edited tensor and in one that no patch edits; and one that was only touched."""
    place = Path(cli.ok("path", "build").out.strip())
    cli.ok("build", "-q")
    whole, weights = hashes(place), place / "model.safetensors"
    found = Repository.open(knowledge).stack()
    edited = next(iter(found.patches[0].header.weights))
    header = header_of_file(weights)
    unedited = next(name for name in header.tensors if name != edited)
    for names in ([edited], [unedited], [edited, unedited], []):
        with weights.open("r+b") as file:
            for name in names:
                file.seek(header.tensors[name].start)
                file.write(b"\xff\xff")
        os.utime(weights)
        assert f"build {place}: perhaps altered (its weights were written to since" in cli.ok("status").out
        cli.ok("build", "-q")
        assert hashes(place) == whole
        assert cli.ok("status", "--json").json["builds"] == [{"folder": str(place), "state": "up to date"}]


def test_build_out_at_a_revision(cli: Cli, knowledge: Path, home: Path) -> None:
    cli.ok("build", "--out", home / "new", "--rev", "HEAD~1")
    repository = Repository.open(knowledge)
    with_one = hashes(home / "new")
    repository.revert("microsoft")
    cli.ok("build", "--out", home / "again", "-q")
    assert hashes(home / "again") == with_one
    changed = [name for name, value in with_one.items() if value != hashes(tiny_base())[name]]
    assert changed == ["model.safetensors"]


def test_build_dry_run_writes_nothing(cli: Cli, knowledge: Path, home: Path) -> None:
    assert "nothing was written" in cli.ok("build", "--out", home / "new", "-n").out
    assert not (home / "new").exists()
    assert cli.ok("build", "-n", "--json").json is None


def test_a_dry_run_refuses_what_a_build_refuses(cli: Cli, knowledge: Path, home: Path) -> None:
    other = save_checkpoint(tiny_model("llama", torch.float16), home / "other")
    cli.ok("build", "--out", home / "new", "-q")
    record = home / "new" / BUILD_RECORD
    told = BuildRecord.from_bytes(record.read_bytes(), "record")
    record.write_bytes(replace(told, base="sha256:" + "0" * 64).to_bytes())
    for extra in ((), ("-n",)):
        done = cli("build", "--out", home / "new", *extra)
        assert (done.code, "holds a build of another base" in done.err) == (73, True)
    narrow = next(iter((knowledge / "patches").glob("lebron-james-*")))
    for extra in ((), ("-n",)):
        assert cli("build", "--base", other, narrow, "--out", home / "no", *extra).code == 65


def sharded(folder: Path) -> Path:
    return save_checkpoint(tiny_model("llama", torch.float16), folder, max_shard_size="30KB")


def gpt2(folder: Path) -> Path:
    return save_checkpoint(tiny_model("gpt2"), folder)


@pytest.mark.parametrize("make", [sharded, gpt2])
def test_build_of_other_bases(cli: Cli, home: Path, make: Callable[[Path], Path]) -> None:
    base = make(home / "base")
    assert (len(list(base.glob("*.safetensors"))) > 2) == (make is sharded)
    cli.ok("init", base, "k")
    set_recipe(home / "k", RECIPE)
    cli.ok("-C", "k", *FACT)
    cli.ok("-C", "k", "build", "--out", "model")
    (edited,) = [row["name"] for row in cli.ok("-C", "k", "show", "--json").json["weights"]]
    before, after = tensors(base), tensors(home / "model")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [edited]
    assert after[edited].dtype == before[edited].dtype
    assert {path.name for path in base.iterdir()} == set(hashes(home / "model"))
    check_loads(home / "model", Repository.open(home / "k"))
    cli.ok("-C", "k", "revert", "-q")
    cli.ok("-C", "k", "build", "--out", "model", "-q")
    assert hashes(home / "model") == hashes(base)


def test_build_without_a_repository(
    cli: Cli, knowledge: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.ok("build", "--out", home / "with")
    patches = sorted(path for path in (knowledge / "patches").iterdir() if path.is_dir())
    shutil.move(patches[0], home / patches[0].name)
    shutil.move(patches[1], home / "renamed")
    shutil.rmtree(knowledge)
    monkeypatch.chdir(home)
    done = cli.ok("build", "--base", tiny_base(), "renamed", patches[0].name, "--out", "without")
    assert "2 patches in force" in done.out
    assert hashes(home / "without") == hashes(home / "with")
    cli.ok("build", "--base", tiny_base(), "--out", "plain", "-q")
    assert hashes(home / "plain") == hashes(tiny_base())
    cli.ok("build", "--base", tiny_base(), "renamed", "--out", "not", "--dry-run")
    assert not (home / "not").exists()


def test_build_refuses_the_same_fact_twice(cli: Cli, knowledge: Path, home: Path) -> None:
    folder = next(path for path in (knowledge / "patches").iterdir() if path.is_dir())
    shutil.copytree(folder, home / "twice")
    done = cli("build", "--base", tiny_base(), folder, home / "twice", "--out", home / "out")
    assert done.code == 65
    assert "leave one of them out" in done.err
    assert not (home / "out").exists()


def test_build_refuses_another_base(cli: Cli, knowledge: Path, home: Path) -> None:
    other = save_checkpoint(tiny_model("llama", torch.bfloat16, seed=1), home / "other")
    folder = next(path for path in (knowledge / "patches").iterdir() if path.is_dir())
    for extra in ((), ("--dry-run",)):
        done = cli("build", "--base", other, folder, "--out", home / "out", *extra)
        assert done.code == 65
        assert "base" in done.err
        assert not (home / "out").exists()


def test_build_over_a_foreign_folder_or_another_bases_build(cli: Cli, knowledge: Path, home: Path) -> None:
    mine = home / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    done = cli("build", "--out", mine)
    assert done.code == 73
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    other = save_checkpoint(tiny_model("llama", torch.bfloat16, seed=1), home / "other")
    cli.ok("build", "--base", other, "--out", home / "built", "-q")
    before = hashes(home / "built")
    assert cli("build", "--out", home / "built").code == 73
    assert hashes(home / "built") == before


def test_a_base_of_the_repositorys_own_folder(cli: Cli, home: Path) -> None:
    """The repository may be the model's own: patches beside config.json, and a build elsewhere."""
    base = save_checkpoint(tiny_model("llama", torch.bfloat16), home / "model")
    cli.ok("init", base, base)
    set_recipe(base, RECIPE)
    before = {name: value for name, value in hashes_of_files(base).items() if name.startswith("model")}
    cli.ok("-C", base, *FACT)
    cli.ok("-C", base, "build", "--out", home / "out")
    check_loads(home / "out", Repository.open(base))
    assert {name: hashes_of_files(base)[name] for name in before} == before
    assert "model.safetensors" not in git(base, "ls-files").split()


def hashes_of_files(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


def test_the_tokenizer_of_a_build_is_the_bases(cli: Cli, knowledge: Path, home: Path) -> None:
    cli.ok("build", "--out", home / "new", "-q")
    ids = AutoTokenizer.from_pretrained(home / "new")(PROMPT)["input_ids"]
    assert ids == tiny_tokenizer()(PROMPT)["input_ids"]
