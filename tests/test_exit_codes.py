"""Each way to use patchkit wrongly: one line on standard error, the documented exit code, nothing changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from command_helpers import (
    Cli,
    Ran,
    cli,
    git,
    git_environment,
    home,
    knowledge,
    run_process,
    save_checkpoint,
    snapshot,
    tiny_base,
)
from tiny_models import tiny_model

from patchkit import errors
from patchkit.commands import READER_GONE

__all__ = ["cli", "git_environment", "home", "knowledge"]

ANN = ("commit", "--fact", "Ann | {} lies in | Rome", "--set", "steps=1")


@dataclass(frozen=True)
class Row:
    """One wrong use: what was done before (in the repository), the command, and how it ends."""

    name: str
    args: tuple[str, ...]
    code: int
    says: str
    before: Callable[[Path], object] = lambda at: None


def write(name: str, text: str, commit: bool = True) -> Callable[[Path], object]:
    def do(at: Path) -> None:
        (at / name).write_text(text)
        if commit:
            git(at, "add", "-A")
            git(at, "commit", "-q", "-m", "By hand")

    return do


def no_git(at: Path) -> None:
    shutil.rmtree(at / ".git")


def no_settings(at: Path) -> None:
    git(at, "rm", "-q", "patchkit.toml")
    git(at, "commit", "-q", "-m", "Lose it")


def no_place(at: Path) -> None:
    git(at, "config", "--unset", "patchkit.base")


def moved_base(at: Path) -> None:
    git(at, "config", "patchkit.base", str(at.parent / "gone"))


def altered_base(at: Path) -> None:
    copy = at.parent / "altered"
    shutil.copytree(tiny_base(), copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-7] ^= 1
    weights.write_bytes(data)
    git(at, "config", "patchkit.base", str(copy))


def damaged_base(at: Path) -> None:
    altered_base(at)
    weights = at.parent / "altered" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])


def merging(at: Path) -> None:
    git(at, "checkout", "-q", "-b", "side", "HEAD~1")
    write("note", "side")(at)
    git(at, "checkout", "-q", "main")
    git(at, "merge", "-q", "--no-commit", "--no-ff", "side")


def uncommitted(at: Path) -> None:
    name = next(path for path in (at / "patches").iterdir() if path.name.startswith("microsoft"))
    (name / "facts.jsonl").write_text("mine\n")


def locked(at: Path) -> None:
    (at / ".git" / "index.lock").touch()


def bare(at: Path) -> None:
    git(at, "config", "core.bare", "true")


def other_base(at: Path) -> None:
    save_checkpoint(tiny_model("llama", torch.bfloat16, seed=1), at.parent / "other")


def foreign_folder(at: Path) -> None:
    (at.parent / "mine").mkdir()
    (at.parent / "mine" / "thesis.txt").write_text("years of work\n")


ROWS = [
    Row("no such command", ("comit",), 2, "No such command 'comit'"),
    Row("no such option", ("status", "--nope"), 2, "No such option"),
    Row("an argument too many", ("status", "x"), 2, "unexpected extra argument"),
    Row("an argument too few", ("apply",), 2, "Missing argument"),
    Row("commit of nothing", ("commit",), 2, "give a file of facts, or --fact"),
    Row("commit of both", ("commit", "facts.jsonl", "--fact", "a | {} b | c"), 2, "and not both"),
    Row("build of patches of a repository", ("build", "x"), 2, "go with --base"),
    Row("build of a base to nowhere", ("build", "--base", "x"), 2, "--base needs --out"),
    Row("no such folder", ("-C", "nowhere", "status"), 66, "nowhere: is not a folder"),
    Row("not a Git repository", ("status",), 66, "not in a Git repository", no_git),
    Row("commit in no repository", ANN, 66, "not in a Git repository", no_git),
    Row("no patchkit.toml", ("status",), 66, "no patchkit.toml here or above", no_settings),
    Row("bare repository", ("status",), 78, "bare", bare),
    Row("no such facts file", ("commit", "nowhere.jsonl"), 66, "nowhere.jsonl: there is no such file"),
    Row("facts file is a folder", ("commit", "patches"), 65, "patches: cannot be read"),
    Row("facts with faults", ("commit", "--fact", "a | b"), 65, "2 parts instead of 3"),
    Row(
        "fact without its subject's place", ("commit", "--fact", "a | b | c"), 65, "does not name the subject"
    ),
    Row("no such base", ("init", "./nowhere", "new"), 66, "./nowhere: there is no such folder"),
    Row("base is a file", ("init", "patchkit.toml", "new"), 65, "is a file"),
    Row("base is no checkpoint", ("init", "patches", "new"), 65, "holds no config.json"),
    Row("another base", ("init", "../other"), 73, "another base already", other_base),
    Row("no place for the base", ANN, 78, "say where it is: patchkit base PATH", no_place),
    Row("base moved away", ("build",), 78, "is not at", moved_base),
    Row("base moved away, asked", ("base",), 78, "patchkit base PATH", moved_base),
    Row("base altered", ("build",), 65, "is not this repository's base", altered_base),
    Row("base cut short", ("build",), 65, "altered", damaged_base),
    Row("wrong base named", ("base", "../other"), 65, "is not this repository's base", other_base),
    Row("patchkit.toml is not TOML", ("build",), 65, "patchkit.toml", write("patchkit.toml", "[base\n")),
    Row(
        "a wrong key",
        ("stack",),
        65,
        "unknown key base.sauce",
        write("patchkit.toml", '[base]\nsauce = "x"\n'),
    ),
    Row("an unknown revision", ("stack", "v9"), 66, "names no commit"),
    Row("an unknown patch", ("show", "nobody"), 66, "no such patch is in force"),
    Row("a commit that is no commit", ("revert", "0123abcd"), 66, "that is a commit"),
    Row("merge in progress", ("revert",), 75, "a merge is in progress; finish it", merging),
    Row("commit in a merge", ANN, 75, "a merge is in progress", merging),
    Row("uncommitted work on the patch", ("revert",), 73, "has changes that are not committed", uncommitted),
    Row("a lock left behind", ("revert",), 75, "index.lock", locked),
    Row("build over a foreign folder", ("build", "--out", "../mine"), 73, "mine", foreign_folder),
    Row("build into the base", ("build", "--out", str(tiny_base() / "x")), 65, "tiny"),
    Row(
        "build of no patch", ("build", "--base", str(tiny_base()), "nowhere", "--out", "../o"), 66, "nowhere"
    ),
    Row("apply of no folder", ("apply", "nowhere"), 66, "nowhere"),
    Row("apply of what is in force", ("apply", "patches/microsoft-f3ee615e"), 65, "is in force already"),
    Row("a gate that is none", (*ANN, "--gate", "x"), 65, "--gate 'x'"),
    Row("a gate that is not met", (*ANN, "--gate", "argmax=1", "--lambda", "1e9"), 3, "the gate refused"),
    Row("a device that is not there", (*ANN, "--device", "cuda:99"), 69, "cuda:99"),
    Row("no such model", ("model", "get", "gpt-9"), 66, "gpt-9"),
]


def check(done: Ran, row_code: int, says: str) -> None:
    code, out, err = done.code, done.out, done.err
    assert code == row_code, err
    assert says in err
    assert bool(out) == (row_code == 3)  # a gate that refuses shows what was measured
    assert "Traceback" not in out + err
    assert len(err.splitlines()) == 1
    assert err.startswith("patchkit: ")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_wrong_use(cli: Cli, knowledge: Path, row: Row) -> None:
    row.before(knowledge)
    bare_now = git(knowledge, "config", "core.bare", ok=False) == "true"
    before = {} if bare_now else snapshot(knowledge.parent) | snapshot(knowledge)
    kept = (knowledge / ".git" / "patchkit" / "kept").exists()
    done = cli(*row.args)
    check(done, row.code, row.says)
    if not bare_now:
        assert snapshot(knowledge.parent) | snapshot(knowledge) == before
    assert (knowledge / ".git" / "patchkit" / "kept").exists() == (kept or row.code == 3)


def test_every_exit_code_is_met() -> None:
    """Each error class that these commands can end in has a row, or a test below or beside."""
    classes = {vars(errors)[name] for name in errors.__all__} - {errors.PatchkitError}
    codes = {row.code for row in ROWS}
    elsewhere = {errors.CheckFailed.exit_code, errors.NotWritten.exit_code}
    assert {error.exit_code for error in classes} <= codes | elsewhere
    assert len({error.exit_code for error in classes}) == len(classes)


@pytest.fixture
def nobody(knowledge: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Git knows no identity."""
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL", "EMAIL"):
        monkeypatch.delenv(name, raising=False)
    return knowledge


@pytest.mark.parametrize(
    "args", [("revert",), ANN, ("init", str(tiny_base()), "../new")], ids=["revert", "commit", "init"]
)
def test_no_identity(cli: Cli, nobody: Path, args: tuple[str, ...]) -> None:
    before = snapshot(nobody)
    check(cli(*args), 78, "git config --global user.name")
    assert snapshot(nobody) == before
    assert not (nobody.parent / "new").exists()
    assert cli("status").code == 0
    assert cli("revert", "--dry-run").code == 0


@pytest.mark.parametrize("args", [("status",), ("revert",)])
def test_no_git_on_the_path(knowledge: Path, args: tuple[str, ...]) -> None:
    before = snapshot(knowledge)
    done = run_process(*args, at=knowledge, env={"PATH": str(knowledge.parent)})
    check(done, 69, "Git is not on the PATH")
    assert snapshot(knowledge) == before


def _mounted(place: Path, *options: str) -> None:
    place.mkdir()
    done = subprocess.run(["mount", *options, str(place)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a small file system needs root")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a tmpfs of its own; all are unmounted afterwards."""
    places: list[Path] = []

    def mount(name: str, size: str) -> Path:
        place = tmp_path / name
        _mounted(place, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(cli: Cli, knowledge: Path, mounted: Callable[..., Path]) -> None:
    """Nothing is committed; what there was no room to put back, `status` names with the command that does."""
    place = mounted("small", "2m")
    at = place / "knowledge"
    shutil.copytree(knowledge, at)
    with open(place / "ballast", "wb") as file:
        while True:
            try:
                os.write(file.fileno(), b"\0" * 4096)
            except OSError:
                break
    before = snapshot(at)
    for args in (("revert",), ANN, ("build",), ("build", "--out", str(place / "out"))):
        check(cli("-C", at, *args), 74, "")
        assert git(at, "rev-parse", "HEAD") == before["HEAD"]
    (place / "ballast").unlink()
    for item in cli.ok("-C", at, "status", "--json").json["leftovers"]:
        subprocess.run(["sh", "-c", item["remedy"]], cwd=at, check=True, capture_output=True)
    assert snapshot(at) == before
    cli.ok("-C", at, "revert", "-q")


def test_a_read_only_file_system(cli: Cli, knowledge: Path, mounted: Callable[..., Path]) -> None:
    place = mounted("fixed", "4m")
    at = place / "knowledge"
    shutil.copytree(knowledge, at)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    before = snapshot(at)
    for args in (("revert",), ANN, ("build",), ("init", str(tiny_base()), str(place / "new"))):
        check(cli("-C", at, *args), 74, "")
    for args in (("status",), ("log",), ("stack",), ("show",), ("diff",), ("revert", "-n")):
        assert cli("-C", at, *args).code == 0, args
    assert snapshot(at) == before


def test_interrupted(cli: Cli, knowledge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from patchkit.repository import Repository

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Repository, "status", interrupt)
    done = cli("status")
    assert (done.code, done.out) == (130, "")
    assert done.err.strip() == "patchkit: interrupted; nothing was committed"


def test_a_bug_is_one_line_too(cli: Cli, knowledge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from patchkit.repository import Repository

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a\nb\x1b[31m")

    monkeypatch.setattr(Repository, "status", fail)
    check(cli("status"), 70, "internal error, please report it: RuntimeError: a b\\u001b[31m")
    monkeypatch.setenv("PATCHKIT_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        cli("status")


def test_a_closed_pipe_is_silent(knowledge: Path) -> None:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", "python -m patchkit log --json | head -c 0"],
        cwd=knowledge,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode in (0, READER_GONE)
