"""Each way to use patchkit wrongly: one line on standard error, the documented exit code, nothing changed."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
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
from patchkit.commands import COMMANDS, READER_GONE

__all__ = ["cli", "git_environment", "home", "knowledge"]

FACTS = "patches/microsoft-f3ee615e/facts.jsonl"
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


def a_fact(at: Path) -> None:
    write("facts.jsonl", '{"subject": "Ann", "prompt": "{} lies in", "target": "Rome"}')(at)


def a_fact_and_no_place(at: Path) -> None:
    a_fact(at)
    no_place(at)


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


def detached(at: Path) -> None:
    git(at, "switch", "-q", "--detach")


def strangers(at: Path) -> None:
    tree = git(at, "rev-parse", "HEAD^{tree}")
    git(at, "branch", "other", git(at, "commit-tree", "-m", "Elsewhere", tree))


def pushed(at: Path) -> None:
    git(at.parent, "init", "-q", "--bare", "remote.git")
    git(at, "remote", "add", "origin", str(at.parent / "remote.git"))
    git(at, "push", "-q", "-u", "origin", "main")


def unreachable(at: Path) -> None:
    pushed(at)
    shutil.rmtree(at.parent / "remote.git")


def diverged(at: Path) -> None:
    pushed(at)
    git(at, "commit", "-q", "--amend", "-m", "Otherwise")


def wrong_remote(at: Path) -> None:
    """What would come mixes the files of two versions."""
    pushed(at)
    uncommitted(at)
    git(at, "commit", "-q", "-a", "-m", "By hand")
    git(at, "push", "-q")
    git(at, "reset", "-q", "--hard", "HEAD~1")


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


def newer_settings(at: Path) -> None:
    write("patchkit.toml", "format = 2\n" + (at / "patchkit.toml").read_text())(at)


def newer_catalogue(at: Path) -> None:
    with closing(sqlite3.connect(at / ".git" / "patchkit" / "catalogue.db")) as connection:
        connection.execute(
            "insert into _sqlite_migrations(migration_set, name) values ('patchkit', 'm999_later')"
        )
        connection.commit()


ROWS = [
    Row("no such command", ("comit",), 2, "No such command 'comit'"),
    Row("no such option", ("status", "--nope"), 2, "No such option"),
    Row("an argument too many", ("status", "x"), 2, "unexpected extra argument"),
    Row("an argument too few", ("apply",), 2, "Missing argument"),
    Row("commit of nothing", ("commit",), 2, "give a file of facts, or --fact"),
    Row("commit of both", ("commit", "facts.jsonl", "--fact", "a | {} b | c"), 2, "and not both"),
    Row("build of patches of a repository", ("build", "x"), 2, "go with --base"),
    Row("build of a base to nowhere", ("build", "--base", "x"), 2, "--base needs --out"),
    Row("a sweep of no records", ("eval", "sweep", "scaling"), 2, "Missing option '--records'"),
    Row("a sweep of no study", ("eval", "sweep", "x", "--records", "x"), 2, "'x' is not one of"),
    Row(
        "a sweep of records that are not there",
        ("eval", "sweep", "zsre", "--records", "x"),
        66,
        "no such file",
    ),
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
    Row("refit of no patch", ("refit", "nobody"), 66, "no such patch is in force"),
    Row(
        "refit onto the base itself",
        ("refit", "--base", str(tiny_base())),
        65,
        "base already",
    ),
    Row("refit of some onto another base", ("refit", "x", "--base", "y"), 65, "leave the patches' names out"),
    Row("refit onto no base", ("refit", "--base", "./nowhere"), 66, "./nowhere: there is no such folder"),
    Row("export nowhere", ("export", "peft"), 2, "Missing option '--out'"),
    Row("export of no patch", ("export", "peft", "x", "--out", "../a"), 66, "no such patch is in force"),
    Row("export over a folder", ("export", "peft", "--out", "patches"), 73, "is there already"),
    Row("export of no rank", ("export", "peft", "--max-rank", "0", "--out", "../a"), 2, "not in the range"),
    Row("export with no base", ("export", "peft", "--out", "../a"), 78, "say where it is", no_place),
    Row("export of no form", ("export", "onnx"), 2, "No such command"),
    Row(
        "export under no licence", ("export", "gguf", "--license", "?", "--out", "../a"), 65, "no identifier"
    ),
    Row("import of nothing", ("import", "peft"), 2, "Missing argument"),
    Row("import of no folder", ("import", "peft", "../x", "--fact", "A | {} is | B"), 66, "no such folder"),
    Row("import of what is none", ("import", "peft", "patches", *ANN[1:3]), 66, "adapter_config.json"),
    Row("import of no facts", ("import", "peft", "patches"), 65, "does not say which facts"),
    Row("import of facts twice", ("import", "peft", "x", "--facts", "a", *ANN[1:3]), 2, "and not both"),
    Row(
        "export to no hub's name", ("export", "peft", "--out", "../a", "--push-to-hub", "x"), 65, "OWNER/NAME"
    ),
    Row("export private and to no hub", ("export", "peft", "--out", "../a", "--private"), 2, "--push-to-hub"),
    Row("sign with no key", ("sign", "patches"), 2, "Missing option '--key'"),
    Row(
        "sign with a key that is none",
        ("sign", "patches", "--key", "patchkit.toml"),
        65,
        "is not a private key",
    ),
    Row("sign nowhere", ("sign", "../nowhere", "--key", "patchkit.toml"), 66, "is not a folder"),
    Row("verify an unknown revision", ("verify", "v9"), 66, "names no commit"),
    Row("verify by no file", ("verify", "--require-signed-by", "keys/ann.pub"), 66, "no such file of keys"),
    Row("verify by nobody", ("verify", "--require-signed-by", "ann"), 65, "is no signer"),
    Row("verify a folder by no key", ("verify", "patches"), 2, "--require-signed-by"),
    Row("verify a commit on a base", ("verify", "--base", "x"), 2, "a commit names its own base"),
    Row("verify outside a repository", ("verify",), 66, "is not in a Git repository", no_git),
    Row(
        "commit of no reverse",
        ("commit", "--fact", "Ann | {} plays | chess", "--with-reverse"),
        65,
        "no fact has",
    ),
    Row("commit of no file", ("commit", ""), 66, '"": there is no such file'),
    Row("canonical facts in JSON", ("facts", "check", "x", "--canonical", "--json"), 2, "leave out --json"),
    Row("import by no file of facts", ("import", "peft", "../lora", "--facts", ""), 66, "no such file"),
    Row("card of no patch", ("card", "nobody"), 66, "no such patch is in force"),
    Row("card over a file", ("card", "--out", "patchkit.toml"), 73, "is there already"),
    Row("card of an unknown revision", ("card", "--rev", "v9"), 66, "names no commit"),
    Row("build with a licence and no card", ("build", "--license", "mit"), 2, "add --card"),
    Row("squash of nothing", ("stack", "squash"), 2, "Missing argument"),
    Row("squash of one", ("stack", "squash", "microsoft"), 65, "name two or more"),
    Row("squash of one twice", ("stack", "squash", "microsoft", "microsoft"), 65, "name two or more"),
    Row("squash of no patch", ("stack", "squash", "microsoft", "nobody"), 66, "no such patch is in force"),
    Row("squash with no base", ("stack", "squash", "microsoft", "lebron-james"), 78, "say where", no_place),
    Row("a scale of nothing", ("apply", "microsoft", "--scale", "0"), 65, "a scale of 0"),
    Row("a scale that is no number", ("apply", "microsoft", "--scale", "nan"), 65, "a scale of nan"),
    Row("a scale without end", ("apply", "microsoft", "--scale", "inf"), 65, "a scale of inf"),
    Row("a scale in words", ("apply", "microsoft", "--scale", "much"), 2, "is not a valid float"),
    Row("an apply of what is in force", ("apply", "microsoft"), 65, "is in force as it is"),
    Row("a scale of no patch", ("apply", "nobody", "--scale", "2"), 66, "there is no such folder"),
    Row("a gate that is none", (*ANN, "--gate", "x"), 65, "--gate 'x'"),
    Row(
        "a gate below the base itself", (*ANN, "--gate", "growth=0.9"), 65, "a multiple of the base's from 1"
    ),
    Row("a gate from above", (*ANN, "--gate", "growth=1"), 3, "the gate refused the edit (growth 1."),
    Row("a gate that is not met", (*ANN, "--gate", "argmax=1", "--lambda", "1e9"), 3, "the gate refused"),
    Row("a device that is not there", (*ANN, "--device", "cuda:99"), 69, "cuda:99"),
    Row("merge of nothing", ("merge",), 2, "give a BRANCH, or --continue, or --abort"),
    Row("merge of a branch and on", ("merge", "x", "--continue"), 2, "give a BRANCH"),
    Row("merge for both sides", ("merge", "x", "--ours", "--theirs"), 2, "exclude each other"),
    Row("joint too late", ("merge", "--continue", "--joint"), 2, "for the beginning of a merge"),
    Row("abort with a choice", ("merge", "--abort", "--fact", "a=ours"), 2, "goes with no choice"),
    Row("a choice that is none", ("merge", "x", "--fact", "a=mine"), 2, "is not KEY=ours or KEY=theirs"),
    Row("merge of an unknown branch", ("merge", "nowhere"), 66, "names no commit"),
    Row("merge of an option", ("merge", "--", "--help"), 66, "names no commit"),
    Row("merge in a merge", ("merge", "side"), 75, "a merge is in progress", merging),
    Row("going on with a merge of Git's", ("merge", "--continue"), 66, "no merge of patchkit's", merging),
    Row("going on with no merge", ("merge", "--continue"), 66, "no merge is under way"),
    Row("abort of no merge", ("merge", "--abort"), 66, "nothing to abort"),
    Row("merge over uncommitted work", ("merge", "HEAD~1"), 73, "not committed", uncommitted),
    Row("merge on no branch", ("merge", "HEAD~1"), 65, "HEAD is on no branch", detached),
    Row("merge of strangers", ("merge", "other"), 65, "shares no commit", strangers),
    Row("fsck of a range and all", ("fsck", "--ci", "HEAD~1..", "--full"), 2, "--ci reads commits alone"),
    Row("repair of a range", ("fsck", "--ci", "HEAD~1..", "--repair"), 2, "leave out --full and --repair"),
    Row("gc of the future", ("gc", "--grace", "-1"), 2, "a number of days from 0"),
    Row("gc of no number", ("gc", "--grace", "nan"), 2, "a number of days from 0"),
    Row("gc in no repository", ("gc",), 66, "not in a Git repository", no_git),
    Row("newer patchkit.toml", ("build", "-n"), 65, "is in format 2", newer_settings),
    Row("newer catalogue", ("reindex",), 78, "newer patchkit (m999_later); update patchkit", newer_catalogue),
    Row("gc with a newer catalogue", ("gc",), 78, "update patchkit", newer_catalogue),
    Row("sql without a question", ("sql",), 2, "Missing argument"),
    Row("sql that is none", ("sql", "selec"), 65, "cannot be answered"),
    Row("sql that writes", ("sql", "delete from facts"), 65, "more than read"),
    Row("sql as two things", ("sql", "select 1", "--csv", "--json"), 2, "exclude each other"),
    Row("report over a foreign file", ("report", "--out", "patchkit.toml"), 73, "no page of patchkit report"),
    Row("report of an unknown revision", ("report", "v9"), 66, "names no commit"),
    Row("report to no folder", ("report", "--out", "no/where.html"), 74, "no/where.html"),
    Row("init with Git LFS that is not set up", ("init", str(tiny_base()), "--lfs"), 78, "Git LFS"),
    Row("undo of more than there was", ("undo", "--to", "99"), 66, "patchkit undo --list"),
    Row("undo of what was pushed", ("undo",), 3, "--force", pushed),
    Row("undo in a merge", ("undo",), 75, "a merge is in progress", merging),
    Row("undo on no branch", ("undo",), 66, "no branch is checked out", detached),
    Row("undo over uncommitted work", ("undo",), 73, "not committed", uncommitted),
    Row("switch to no branch", ("switch", "nowhere"), 66, "is no branch"),
    Row("switch to a branch of a bad name", ("switch", "-c", "bad name"), 65, "is no name for a branch"),
    Row("switch to a new branch that is there", ("switch", "-c", "main"), 65, "is a branch already"),
    Row("switch of an option", ("switch", "--", "--detach"), 65, "no name for a branch"),
    Row("switch in a merge", ("switch", "side"), 75, "a merge or the like is not finished", merging),
    Row("switch to where nothing was", ("switch", "-"), 66, "names no commit"),
    Row("pull from nowhere", ("pull",), 66, "follows no branch of a remote"),
    Row("pull on no branch", ("pull",), 66, "no branch is checked out", detached),
    Row("pull in a merge", ("pull",), 75, "a merge is in progress", merging),
    Row("pull out of reach", ("pull",), 66, "there is no Git repository there", unreachable),
    Row("pull of what diverged", ("pull",), 3, "patchkit merge @{upstream}", diverged),
    Row("pull of what cannot be believed", ("pull",), 65, "origin/main:patches/microsoft", wrong_remote),
    Row("clone of nothing", ("clone",), 2, "Missing argument"),
    Row("clone of no folder", ("clone", "../nowhere", "../new"), 66, "nowhere"),
    Row("clone of a program", ("clone", "ext::sh -c x", "../new"), 65, "starts a program"),
    Row("clone of an option", ("clone", "--", "--upload-pack=x", "../new"), 65, "no address"),
    Row("clone over a foreign folder", ("clone", ".", "../mine"), 73, "not empty", foreign_folder),
    Row("clone onto a base that is none", ("clone", ".", "../new", "--base", "./nowhere"), 66, "./nowhere"),
    Row("clone onto another base", ("clone", ".", "../new", "--base", "../other"), 65, "base", other_base),
    Row("log of an unknown revision", ("log", "v9"), 66, "names no commit"),
    Row("log of no commits", ("log", "-n", "0"), 2, "is not in the range"),
    Row("show of an unknown revision", ("show", "--rev", "v9"), 66, "names no commit"),
    Row("diff of an unknown revision", ("diff", "v9"), 66, "names no commit"),
    Row("diff on no text", ("diff", "--text", "nowhere.txt"), 66, "nowhere.txt"),
    Row("diff with no probes", ("diff", "--probe", "nowhere.txt"), 66, "nowhere.txt"),
    Row("diff over a foreign file", ("diff", "--html", "patchkit.toml"), 73, "patchkit.toml"),
    Row("blame of nothing", ("blame",), 2, "Missing argument"),
    Row("blame with no base", ("blame", "Who won? It was"), 78, "say where it is", no_place),
    Row("blame of an unknown revision", ("blame", "x", "--rev", "v9"), 66, "names no commit"),
    Row("bisect of nothing", ("bisect",), 2, "Missing option"),
    Row(
        "bisect from an unknown revision",
        ("bisect", "--prompt", "x", "--expect", "y", "--good", "v9"),
        66,
        "names no commit",
    ),
    Row("bisect with no base", ("bisect", "--prompt", "x", "--expect", "y"), 78, "say where it is", no_place),
    Row("ask what is no text", ("ask", "caf\udce9"), 2, "is not UTF-8"),
    Row("ask of nothing", ("ask",), 2, "Missing argument"),
    Row("ask with no base", ("ask", "x"), 78, "say where it is", no_place),
    Row("ask of an unknown revision", ("ask", "x", "--rev", "v9"), 66, "names no commit"),
    Row("eval of no records", ("eval", "nowhere.jsonl"), 66, "nowhere.jsonl"),
    Row("eval with no base", ("eval",), 78, "say where it is", no_place),
    Row("eval beside an unknown revision", ("eval", "--compare", "base", "v9"), 66, "names no commit"),
    Row("eval by a gate on no score", ("eval", "--gate", "GE=1"), 65, "write NAME=SHARE"),
    Row("eval on no text", ("eval", "--text", "nowhere.txt"), 66, "nowhere.txt"),
    Row(
        "eval of the base's facts",
        ("eval", "--compare", "HEAD", "base", "--sample", "99"),
        65,
        "99 cannot be drawn",
    ),
    Row("texts of facts that have none", ("eval", "--texts"), 65, "leave out --texts"),
    Row("references for no texts", ("eval", "--references", "x.json"), 2, "name both"),
    Row("references that are none", ("eval", "--texts", "--references", "no.json"), 66, "no.json"),
    Row("locate of nothing", ("locate",), 2, "Missing argument"),
    Row("locate of no file", ("locate", "nowhere.jsonl"), 66, "nowhere.jsonl"),
    Row("locate with endless noise", ("locate", "x", "--noise", "1e40"), 2, "is not in the range"),
    Row("locate of no facts", ("locate", "facts.jsonl"), 65, "holds no facts", write("facts.jsonl", "")),
    Row("locate with no base", ("locate", "facts.jsonl"), 78, "say where it is", a_fact_and_no_place),
    Row(
        "locate on an unknown revision",
        ("locate", "facts.jsonl", "--rev", "v9"),
        66,
        "names no commit",
        a_fact,
    ),
    Row("a window too wide", ("locate", "facts.jsonl", "--window", "9"), 65, "a window of 9 layers", a_fact),
    Row("noise without end", ("locate", "facts.jsonl", "--noise", "inf"), 2, "is not in the range"),
    Row("noise below none", ("locate", "facts.jsonl", "--noise", "-1"), 2, "is not in the range"),
    Row("a figure that is none", ("locate", "facts.jsonl", "--figure", "x.gif"), 65, ".png or .svg", a_fact),
    Row("a figure in no folder", ("locate", "facts.jsonl", "--figure", "no/x.png"), 74, "no/x.png", a_fact),
    Row(
        "a figure over a foreign file",
        ("locate", "facts.jsonl", "--figure", "x.svg"),
        73,
        "no figure of patchkit's",
        write("x.svg", "<?xml?><svg/>"),
    ),
    Row("tune by nothing", ("tune",), 2, "Missing argument"),
    Row("tune by no file", ("tune", "nowhere.jsonl"), 66, "nowhere.jsonl"),
    Row("tune by no facts", ("tune", "facts.jsonl"), 65, "holds no facts", write("facts.jsonl", "")),
    Row("tune by too few facts", ("tune", "facts.jsonl"), 65, "facts have was", a_fact),
    Row("tune in no time", ("tune", "facts.jsonl", "--minutes", "0"), 2, "is not in the range"),
    Row("tune without end", ("tune", "facts.jsonl", "--minutes", "nan"), 2, "a finite number"),
    Row("tune by a handful", ("tune", "facts.jsonl", "--sample", "4"), 2, "is not in the range"),
    Row("check of no file", ("facts", "check", "nowhere.jsonl"), 66, "nowhere.jsonl"),
    Row("search for nothing", ("facts", "search"), 2, "Missing argument"),
    Row("the path of nothing", ("path", "heaven"), 2, "is not one of"),
    Row("the path of no base", ("path", "base"), 78, "say where it is", no_place),
    Row("mend with no records", ("mend", "train"), 2, "Missing argument"),
    Row("mend with no such records", ("mend", "train", "nowhere.jsonl"), 66, "nowhere.jsonl"),
    Row("mend with no steps", ("mend", "train", "x", "--steps", "0"), 2, "is not in the range"),
    Row("mend in no time", ("mend", "train", "x", "--minutes", "nan"), 2, "a finite number"),
    Row("mend at no rate", ("mend", "train", "x", "--learning-rate", "inf"), 2, "is not in the range"),
    Row("mend of a seed too large", ("mend", "train", "x", "--seed", str(2**63)), 2, "is not in the range"),
    Row("mend on no text", ("mend", "train", FACTS, "--text", "no.txt"), 66, "no.txt: "),
    Row("mend that was not trained", (*ANN[:3], "--method", "mend"), 66, "patchkit mend train RECORDS"),
    Row("editors of something", ("editors", "x"), 2, "unexpected extra argument"),
    Row("fsck of an unknown range", ("fsck", "--ci", "v9..HEAD"), 66, "names no commit"),
    Row("no such model", ("model", "get", "gpt-9"), 66, "gpt-9"),
]


def check(done: Ran, row_code: int, says: str) -> None:
    code, out, err = done.code, done.out, done.err
    assert code == row_code, err
    assert says in err
    assert bool(out) == says.startswith("the gate")  # which shows what was measured
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
    assert (knowledge / ".git" / "patchkit" / "kept").exists() == (kept or row.says.startswith("the gate"))


def test_every_verb_has_a_row() -> None:
    assert COMMANDS.keys() <= {row.args[0] for row in ROWS}


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
    assert done.err.strip() == "patchkit: interrupted; see patchkit status"


def test_a_bug_is_one_line_too(cli: Cli, knowledge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from patchkit.repository import Repository

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a\nb\x1b[31m")

    monkeypatch.setattr(Repository, "status", fail)
    check(cli("status"), 70, "internal error, please report it: RuntimeError: a b\\u001b[31m")
    monkeypatch.setenv("PATCHKIT_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        cli("status")


def test_output_that_cannot_be_written_does_not_say_that_nothing_was_done(knowledge: Path) -> None:
    """The revert is made; to run it again would take another patch back."""
    before = git(knowledge, "rev-parse", "HEAD")
    with open("/dev/full", "w", encoding="utf-8") as full:
        command = [sys.executable, "-m", "patchkit", "-C", str(knowledge), "revert"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 74
    assert git(knowledge, "rev-parse", "HEAD~1") == before
    assert "nothing was" not in done.stderr
    assert "see patchkit status, and run the command again if need be" in done.stderr


def test_a_closed_output_is_no_fault(knowledge: Path) -> None:
    command = f"exec {sys.executable} -m patchkit -C {knowledge} status >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("args", [(), ("facts",), ("export",), ("model",)])
def test_a_group_alone_shows_its_help_as_it_is(cli: Cli, home: Path, args: tuple[str, ...]) -> None:
    done = cli(*args)
    assert done.code == 2
    assert done.err.strip() == cli.ok(*args, "--help").out.strip()


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
