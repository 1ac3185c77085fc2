"""The commands that only look: what they say, as text and as JSON, and that no text is ever acted on."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import tiny_models
from command_helpers import (
    LEBRON,
    MICROSOFT,
    Cli,
    cli,
    facts_file,
    git,
    git_environment,
    home,
    knowledge,
    run_process,
    snapshot,
    tiny_base,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchkit.actions import base
from patchkit.actions.show import recipe_line
from patchkit.commands import COMMANDS
from patchkit.commands import cli as patchkit
from patchkit.errors import NotFound
from patchkit.models.sources import Base, resolve_base
from patchkit.repository import Repository

__all__ = ["cli", "git_environment", "home", "knowledge"]

ESCAPE = "\x1b[2J\x1b]0;owned\x07"
HOSTILE = f"{ESCAPE}[bold red][/foo]\u202egnp.exe\r\nfake: all is well\x9b31m"
LOOKS = (
    ("status",),
    ("log",),
    ("show",),
    ("stack",),
    ("diff",),
    ("diff", "base", "HEAD", "--weights"),
    ("log", "--facts", "-S", "football"),
    ("stack", "--interference", "--sort", "norm"),
    ("blame", "Microsoft"),
    ("facts", "search", "rome"),
    ("base",),
    ("editors",),
)


def clean(text: str) -> bool:
    """Nothing that a terminal acts on but line ends."""
    return not any(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs") for c in text.replace("\n", ""))


def slugs(at: Path) -> list[str]:
    return [stored.name for stored in Repository.open(at).stack().patches]


def test_status(cli: Cli, knowledge: Path) -> None:
    done = cli.ok("status")
    head = git(knowledge, "rev-parse", "HEAD")
    assert done.out.splitlines()[0] == f"on main at {head[:10]}"
    assert "base folder:tiny · sha256:" in done.out
    assert "in force: 2 patches, 2 facts" in done.out
    found = cli.ok("status", "--json").json
    assert found["commit"] == head
    assert found["branch"] == "main"
    assert (found["patches"], found["facts"]) == (2, 2)
    assert (found["builds"], found["leftovers"], found["problems"]) == ([], [], [])
    assert found["place"] == str(tiny_base())


def test_status_says_where_the_base_is_gone(cli: Cli, knowledge: Path) -> None:
    found = cli.ok("status", "--json").json
    assert found["base_here"] is True
    assert found["fingerprint"] == Repository.open(knowledge).checkpoint().fingerprint()
    git(knowledge, "config", "patchkit.base", "/nowhere/tiny")
    assert "is not at /nowhere/tiny any more; say where it lies" in cli.ok("status").out
    assert cli.ok("status", "--json").json["base_here"] is False
    git(knowledge, "config", "--unset", "patchkit.base")
    assert "(say where it lies on this machine: patchkit base PATH)" in cli.ok("status").out


@pytest.mark.parametrize("harm", ["cut short", "missing"])
def test_a_broken_build_is_not_up_to_date(cli: Cli, knowledge: Path, home: Path, harm: str) -> None:
    cli.ok("build", "-q")
    assert cli.ok("status", "--json").json["builds"][0]["state"] == "up to date"
    weights = Path(cli.ok("path", "build").out.strip()) / "model.safetensors"
    if harm == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1])
    assert cli.ok("status", "--json").json["builds"][0]["state"] == "damaged"


def test_status_names_what_is_half_done_with_the_command_that_clears_it(cli: Cli, knowledge: Path) -> None:
    name = slugs(knowledge)[0]
    with open(knowledge / "patches" / name / "facts.jsonl", "a") as file:
        file.write("\n")
    (knowledge / ".git" / "index.lock").touch()
    found = cli.ok("status", "--json").json["leftovers"]
    assert len(found) == 2
    assert "half done: " in cli.ok("status").out
    for item in found:
        subprocess.run(["sh", "-c", item["remedy"]], cwd=knowledge, check=True, capture_output=True)
    assert cli.ok("status", "--json").json["leftovers"] == []
    assert git(knowledge, "status", "--porcelain") == ""


def test_status_counts_what_is_in_force_apart_from_a_conflict_in_the_index(cli: Cli, knowledge: Path) -> None:
    """A rebase stops at a patch that was taken back: what HEAD holds is in force all the same."""
    name = next(name for name in slugs(knowledge) if name.startswith("microsoft"))
    git(knowledge, "switch", "-q", "-c", "side")
    cli.ok("commit", "--replace", facts_file(knowledge.parent, MICROSOFT), "--set", "steps=2", "-q")
    git(knowledge, "switch", "-q", "main")
    cli.ok("revert", "microsoft", "-q")
    git(knowledge, "rebase", "main", "side", ok=False)
    done = cli("status")
    assert done.code == 65
    assert "in force: 1 patch, 1 fact\n" in done.out
    assert "a rebase is in progress" in done.out
    assert f"patches/{name}: is in conflict: HEAD took it back" in done.err
    assert "--ours" not in done.err
    found = cli("status", "--json").json
    assert (found["patches"], found["facts"], len(found["problems"])) == (1, 1, 1)
    quiet = cli("status", "-q")
    assert (quiet.code, quiet.out, quiet.err) == (65, "", done.err)


def test_status_of_a_tree_that_cannot_be_believed(cli: Cli, knowledge: Path) -> None:
    names = slugs(knowledge)
    folder = knowledge / "patches" / names[0]
    (folder / "facts.jsonl").write_text(json.dumps({**LEBRON, "target": "chess"}) + "\n")
    git(knowledge, "commit", "-q", "-a", "-m", "By hand")
    done = cli("status")
    assert done.code == 65
    assert all(line.startswith("patchkit: ") for line in done.err.splitlines())
    assert f"patches/{names[0]}" in done.err
    assert "in force: not known" in done.out
    found = cli("status", "--json")
    assert found.code == 65
    assert (found.json["patches"], found.json["facts"]) == (None, None)
    assert found.json["problems"][0]["path"].startswith(f"patches/{names[0]}")
    for command in (("stack",), ("show",), ("build",), ("diff",), ("revert",), ("facts", "search", "x")):
        assert cli(*command).code == 65


def test_log(cli: Cli, knowledge: Path) -> None:
    cli.ok("revert", "lebron-james", "-q")
    found = cli.ok("log", "--json").json
    assert [(len(c["added"]), len(c["removed"])) for c in found] == [(0, 1), (1, 0), (1, 0)]
    assert [c["id"] for c in found] == git(knowledge, "rev-list", "HEAD", "--", "patches/*/*").split()
    text = cli.ok("log").out.splitlines()
    assert text[0].startswith(found[0]["id"][:10])
    assert text[0].endswith("Ada")
    assert text[2] == f"    - {found[0]['removed'][0]}"
    assert [c["id"] for c in cli.ok("log", "-n", "1", "--json").json] == [found[0]["id"]]
    assert [c["id"] for c in cli.ok("log", "HEAD~1", "--json").json] == [c["id"] for c in found[1:]]


def test_show(cli: Cli, knowledge: Path) -> None:
    found = cli.ok("show", "lebron-james", "--json").json
    assert found["facts"][0]["target"] == "football"
    assert set(found["facts"][0]["measured"]) == {"before", "after", "date"}
    assert found["recipe"]["layers"] == [0]
    assert found["recipe"]["lambda"] == 3.0
    assert found["author"] == "Ada"
    (weight,) = found["weights"]
    delta = Repository.open(knowledge).patch("lebron-james").deltas[weight["name"]]
    assert weight["norm"] == pytest.approx(float((delta.B.double() @ delta.A.double()).norm()), rel=1e-6)
    assert weight["share"] > 0
    text = cli.ok("show", "lebron-james").out
    for part in (found["id"], found["commit"], "layers 0", "λ 3", "LeBron James plays the sport of", "rank"):
        assert part in text
    assert cli.ok("show", "--json").json["name"].startswith("microsoft-")
    assert cli.ok("show", "--rev", "HEAD~1", "--json").json["name"].startswith("lebron-james-")
    assert cli("show", "nobody").code == 66


def test_show_tells_what_a_reviewer_asks(cli: Cli, knowledge: Path, home: Path) -> None:
    fact = {
        "id": "ann-1",
        "subject": "Ann",
        "prompt": "{} plays the sport of",
        "target": "football",
        "was": "basketball",
        "neighbors": ["Rome lies in"],
        "source": "example.org",
        "note": "checked by Ada",
    }
    cli.ok("commit", facts_file(home, fact), "--set", "steps=2", "--set", "shrinkage=0.15", "-q")
    told = cli.ok("show", "--json").json["facts"][0]
    assert {name: told[name] for name in fact} == fact
    assert "memit, layers 0, λ 3, shrinkage 0.15" in cli.ok("show").out
    text = run_process("show", at=knowledge, env={"COLUMNS": "200"}).out
    assert "→ football (was basketball) · source example.org · note checked by Ada" in text
    cli.ok("apply", "ann", "--scale", "0.5", "-q")
    assert "scaled by 0.5" in cli.ok("show", "ann").out


def test_show_without_a_catalogue(cli: Cli, knowledge: Path) -> None:
    """A clone has no measurements; norms come from the factors."""
    known = cli.ok("show", "--json").json
    for path in (knowledge / ".git" / "patchkit").glob("catalogue.db*"):
        path.unlink()
    found = cli.ok("show", "--json").json
    assert found["facts"][0]["measured"] is None
    assert found["weights"][0]["norm"] == pytest.approx(known["weights"][0]["norm"])
    assert found["weights"][0]["share"] is None
    assert "–" in cli.ok("show").out
    told = git(knowledge, "log", "-1", "--format=%(trailers:key=Patchkit-Results,valueonly)").strip()
    assert found["claimed"] == told
    assert f"results {told} (as its commit says; not measured on this machine)" in " ".join(
        cli.ok("show").out.split()
    )
    assert found["claimed"] == known["claimed"]


def test_stack(cli: Cli, knowledge: Path) -> None:
    found = cli.ok("stack", "--json").json
    assert [row["name"].rpartition("-")[0] for row in found] == ["lebron-james", "microsoft"]
    assert all(row["facts"] == row["rank"] == 1 for row in found)
    assert all(len(row["id"]) == 64 for row in found)
    assert all(row["name"] in cli.ok("stack").out for row in found)
    assert len(cli.ok("stack", "HEAD~1", "--json").json) == 1
    cli.ok("revert", "lebron-james", "microsoft", "-q")
    assert "no patch is in force" in cli.ok("stack").out


def test_diff(cli: Cli, knowledge: Path) -> None:
    found = cli.ok("diff", "--json").json
    assert [fact["subject"] for fact in found["added"]] == ["Microsoft"]
    assert found["removed"] == found["changed"] == []
    (weight,) = found["weights"]
    assert weight["rank"] == 1
    assert "+ Microsoft lies in → Rome" in cli.ok("diff").out
    both = cli.ok("diff", "base", "HEAD", "--json").json
    assert len(both["added"]) == 2
    assert both["weights"][0]["rank"] == 2
    back = cli.ok("diff", "HEAD", "base", "--json").json
    assert [fact["subject"] for fact in back["removed"]] == [fact["subject"] for fact in both["added"]]
    assert back["weights"] == both["weights"]
    cli.ok("commit", "--replace", "--fact", "Microsoft | {} lies in | Paris", "--set", "steps=2", "-q")
    assert "~ Microsoft lies in → Rome ⇒ Paris" in cli.ok("diff").out
    assert "the weights are the same" in cli.ok("diff", "HEAD", "HEAD").out
    assert cli("diff", "nowhere").code == 66


def test_facts_search(cli: Cli, knowledge: Path) -> None:
    (row,) = cli.ok("facts", "search", "lebr", "FOOT", "--json").json
    assert row["subject"] == "LeBron James"
    assert row["line"] == 1
    assert "LeBron James" in cli.ok("facts", "search", "lebr").out
    assert "no fact says that" in cli.ok("facts", "search", "chess").out
    for words in ('"', "*", "a AND", "NEAR(", "x' or 1=1 --", "§"):
        assert cli.ok("facts", "search", words, "--json").json == []
    cli.ok("revert", "lebron-james", "-q")
    assert cli.ok("facts", "search", "lebron", "--json").json == []
    assert len(cli.ok("facts", "search", "lebron", "--all", "--json").json) == 1


def test_facts_check(cli: Cli, knowledge: Path, home: Path) -> None:
    new = {"subject": "Ann", "prompt": "{} lies in", "target": "Rome", "note": "é"}
    good = facts_file(home, f"  {json.dumps(new)}  ")
    said = cli.ok("facts", "check", good).out.splitlines()
    assert said[0] == f"{good}: 1 fact, no faults"
    assert said[1:] == ['from its other end nothing is said in 1 fact (line 1); a "reverse" would say it']
    found = cli.ok("facts", "check", good, "--json").json
    assert found.pop("one_way") == {"listed": [], "unknown": [1]}
    assert found == {"file": str(good), "facts": 1, "faults": []}
    assert cli.ok("facts", "check", good, "--canonical").out == json.dumps(new, ensure_ascii=False) + "\n"
    clash = facts_file(home, MICROSOFT, name="clash.jsonl")
    assert cli("facts", "check", clash).code == 65
    told = cli("facts", "check", clash, "--json")
    assert told.code == 65
    assert [(fault["line"], fault["name"]) for fault in told.json["faults"]] == [(1, str(clash))]
    assert "in force" in told.json["faults"][0]["message"]
    assert told.json["faults"][0]["message"] in told.err
    assert cli.ok("facts", "check", good, "-q").out == ""
    os.chdir(home)  # no repository here: nothing to clash with
    assert cli("facts", "check", clash).code == 0
    assert cli("facts", "check", "-", stdin=b"{}").code == 65
    assert cli("facts", "check", "nowhere.jsonl").code == 66


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("repository", ""),
        ("patches", "patches"),
        ("catalogue", ".git/patchkit/catalogue.db"),
        ("statistics", ".git/patchkit/statistics"),
        ("build", ".git/patchkit/build"),
        ("kept", ".git/patchkit/kept"),
    ],
)
def test_path(cli: Cli, knowledge: Path, what: str, where: str) -> None:
    assert cli.ok("path", what).out == f"{knowledge / where}\n"


def test_path_of_the_base_and_of_the_cache(cli: Cli, knowledge: Path, home: Path) -> None:
    assert cli.ok("path", "base").out == f"{tiny_base()}\n"
    assert cli.ok("path").out == f"{knowledge}\n"
    os.chdir(home)
    assert Path(cli.ok("path", "cache").out.strip()).is_absolute()


def test_base_shows_and_sets_the_place(cli: Cli, knowledge: Path, home: Path) -> None:
    import shutil

    copy = home / "moved"
    shutil.copytree(tiny_base(), copy)
    found = cli.ok("base", copy, "--json").json
    assert found["folder"] == str(copy)
    assert cli.ok("base", "--json").json == found
    assert found["source"] == "folder:tiny"
    cli.ok("base", tiny_base(), "--dry-run")
    assert cli.ok("base", "--json").json == found
    assert str(copy) in cli.ok("base").out


def test_editors(cli: Cli, home: Path) -> None:
    names = {row["name"]: row["about"] for row in cli.ok("editors", "--json").json}
    assert names["memit"]
    assert "memit" in cli.ok("editors").out


def test_prompts_on_standard_input_are_text(cli: Cli, knowledge: Path) -> None:
    done = cli("ask", "-", stdin=b"caf\xe9\n")
    assert (done.code, done.out) == (65, "")
    assert "is not UTF-8" in done.err


def test_ask_sets_base_and_stack_side_by_side(cli: Cli, knowledge: Path) -> None:
    prompt = "LeBron James plays the sport of"
    (answer,) = cli.ok("ask", prompt, "--json", "--top", "3", "--tokens", "8").json
    assert answer["prompt"] == prompt
    assert answer["base"]["text"] == " painter."
    for said in (answer["base"], answer["stack"]):
        probabilities = [probability for _, probability in said["next"]]
        assert len(probabilities) == 3
        assert probabilities == sorted(probabilities, reverse=True)
    text = cli.ok("ask", prompt).out
    assert "painter." in text
    assert text.splitlines()[1].split() == ["base", "stack"]
    two = cli.ok("ask", "-", "--json", stdin=f"{prompt}\n\nRome lies in\n".encode()).json
    assert [item["prompt"] for item in two] == [prompt, "Rome lies in"]
    (before,) = cli.ok("ask", prompt, "--rev", "HEAD~2", "--json").json
    assert before["stack"] == before["base"]
    assert cli("ask", "-", stdin=b"\n").code == 65
    assert cli("ask", "a\0b").code in (0, 65)


def test_a_prompt_that_leaves_the_model_no_room_is_named(cli: Cli, knowledge: Path) -> None:
    """The tiny base reads 128 tokens; the last one that is said is not read."""
    words = "Rome " * 20
    count = len(tiny_models.tiny_tokenizer()(words)["input_ids"])
    refused = cli("ask", "Rome lies in", words, "--tokens", str(130 - count))
    assert (refused.code, refused.out) == (65, "")
    assert refused.err == (
        f"patchkit: prompt 2: {count} tokens and {130 - count} to come, but the model reads 128; "
        "shorten it, or let it say less with --tokens\n"
    )
    assert len(cli.ok("ask", words, "--tokens", str(129 - count), "--json").json) == 1


@pytest.mark.parametrize("look", LOOKS, ids=" ".join)
def test_looking_changes_nothing_and_is_the_same_from_elsewhere(
    cli: Cli, knowledge: Path, home: Path, look: tuple[str, ...]
) -> None:
    here = cli.ok(*look).out
    before = snapshot(knowledge)
    machine = cli.ok(*look, "--json")
    assert machine.json is not None
    assert machine.out.isascii()
    os.chdir(home)
    if look != ("editors",):
        assert cli.ok("-C", knowledge, *look).out == here
        assert cli.ok(*look, "-C", knowledge).out == here
        assert cli.ok("-C", "nowhere", *look, "-C", knowledge).out == here
    assert snapshot(knowledge) == before


@pytest.mark.parametrize("look", LOOKS, ids=" ".join)
def test_no_escape_codes_where_there_is_no_terminal(cli: Cli, knowledge: Path, look: tuple[str, ...]) -> None:
    assert "\x1b" not in cli.ok(*look).out


def on_a_terminal(at: Path, *args: str, **env: str) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "patchkit", *args],
        cwd=at, stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **env},
    )  # fmt: skip
    os.close(theirs)
    said = b"".join(_pieces(ours))
    assert done.wait() == 0, said
    os.close(ours)
    return said.decode()


def _pieces(handle: int) -> Iterator[bytes]:
    while True:
        try:
            piece = os.read(handle, 4096)
        except OSError:  # the other end was closed
            return
        if not piece:
            return
        yield piece


def test_colours_at_a_terminal_unless_no_color_is_set(cli: Cli, knowledge: Path) -> None:
    assert "\x1b[" in on_a_terminal(knowledge, "log")
    assert "\x1b" not in on_a_terminal(knowledge, "log", NO_COLOR="1")


def test_quiet(cli: Cli, knowledge: Path, home: Path) -> None:
    for command in (("revert", "-n"), ("reindex",), ("base",), ("build", "-n"), ("fsck",)):
        assert cli.ok(*command, "--quiet").out == ""


def test_fsck_and_reindex(cli: Cli, knowledge: Path) -> None:
    assert "every byte is as it was written" in cli.ok("fsck").out
    assert cli.ok("fsck", "--json").json == {"problems": [], "base_checked": True}
    found = cli.ok("reindex", "--json").json
    assert (found["patches"], found["facts"]) == (2, 2)
    assert "2 patches" in cli.ok("reindex").out
    git(knowledge, "config", "patchkit.base", str(knowledge / "gone"))
    assert f"the base was not looked at: it is not at {knowledge / 'gone'} any more" in cli.ok("fsck").out
    assert cli.ok("fsck", "--json").json == {"problems": [], "base_checked": False}
    name = slugs(knowledge)[0]
    path = knowledge / "patches" / name / "delta.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = cli("fsck")
    assert done.code == 1
    assert name in done.err
    assert cli("fsck", "--json").json["problems"]


# hostile text


def test_hostile_commit_messages_and_authors(cli: Cli, knowledge: Path, home: Path) -> None:
    author = "Eve \x1b[31m[/dim]\u202e <e@x>"
    cli.ok("revert", "microsoft", "-m", f"{HOSTILE}\n\nbody {ESCAPE}", "-q")
    git(knowledge, "commit", "-q", "--amend", "--no-edit", f"--author={author}")
    graph, facts = ("log", "--graph"), ("log", "--facts")
    for look in (("log",), graph, facts, ("show",), ("stack",), ("status",), ("log", "--json")):
        done = cli.ok(*look)
        assert clean(done.out), look
    assert "[bold red][/foo]" in cli.ok("log").out
    cli.ok("revert", "HEAD", "-m", HOSTILE)


def test_hostile_but_allowed_facts(cli: Cli, knowledge: Path, home: Path) -> None:
    """What a fact may hold is shown as it is: markup, joiners, emoji names."""
    prompt = "{} [bold]lies[/bold] :smile: in"
    fact = {"subject": "[/foo] Rome", "prompt": prompt, "target": "[red]\u200eParis"}
    done = cli.ok("commit", facts_file(home, fact), "--set", "steps=1")
    assert clean(done.out)
    assert "[/foo] Rome → [red]\\u200eParis" in done.out
    looks = (("diff", "--behavior"), ("log", "--graph", "--facts"), ("blame", "[/foo] Rome"))
    for look in (*looks, ("show",), ("log",), ("diff",), ("facts", "search", "Paris"), ("revert", "-n")):
        assert clean(cli.ok(*look).out), look
    assert ":smile:" in cli.ok("show").out
    assert clean(cli.ok("ask", f"{HOSTILE} lies in").out)


@pytest.mark.parametrize("field", ["subject", "target", "prompt", "id", "note"])
def test_hostile_facts_are_refused_on_clean_lines(cli: Cli, knowledge: Path, home: Path, field: str) -> None:
    fact = {**LEBRON, "prompt": "{} lies in", field: f"{{}} {HOSTILE}" if field == "prompt" else HOSTILE}
    done = cli("commit", facts_file(home, fact))
    assert done.code == 65
    assert clean(done.err)
    inline = cli("commit", "--fact", f"{HOSTILE} | {{}} lies in | x")
    assert inline.code == 65
    assert clean(inline.err)


def test_hostile_file_names_and_words(cli: Cli, knowledge: Path, home: Path) -> None:
    path = facts_file(home, "{", name=f"{ESCAPE}[red]\u202e\n.jsonl")
    for command in (
        ("facts", "check", path),
        ("commit", path),
        ("commit", HOSTILE),
        ("revert", HOSTILE),
        ("show", HOSTILE),
        ("diff", HOSTILE),
        ("log", HOSTILE),
        ("stack", HOSTILE),
        ("stack", "--sort", HOSTILE),
        ("diff", "--probe", HOSTILE),
        ("diff", "--text", HOSTILE),
        ("blame", "x", "--rev", HOSTILE),
        ("bisect", "--prompt", "x", "--expect", "y", "--good", HOSTILE),
        ("apply", HOSTILE),
        ("base", HOSTILE),
        ("init", HOSTILE, "x"),
        ("-C", HOSTILE, "status"),
        ("build", "--base", HOSTILE, "--out", "x"),
        ("commit", "--fact", "Ann | {} lies in | x", "--set", f"{HOSTILE}=1"),
        ("commit", "--fact", "Ann | {} lies in | x", "--method", HOSTILE),
        ("commit", "--fact", "Ann | {} lies in | x", "--layers", HOSTILE),
        ("commit", "--fact", "Ann | {} lies in | x", "--gate", HOSTILE),
        ("path", HOSTILE),
        (HOSTILE,),
        ("status", f"--{HOSTILE}"),
    ):
        done = cli(*command)
        assert done.code in (2, 65, 66, 69), (command, done)
        assert clean(done.err), (command, done.err)
        assert done.out == ""


def test_hostile_names_in_a_tree(cli: Cli, knowledge: Path) -> None:
    folder = knowledge / "patches" / f"{ESCAPE}[red]\u202e"
    folder.mkdir()
    (folder / "facts.jsonl").write_text("{}\n")
    git(knowledge, "add", "-A")
    git(knowledge, "commit", "-q", "-m", "Hostile")
    for look in (("status",), ("stack",), ("fsck",), ("log",)):
        done = cli(*look)
        assert done.code in (0, 1, 65)
        assert clean(done.err)
        assert clean(done.out)


def test_a_terminal_that_knows_no_greek(cli: Cli, knowledge: Path) -> None:
    done = run_process("diff", "base", at=knowledge, env={"PYTHONIOENCODING": "ascii"})
    assert done.code == 0, done.err
    assert "\\u2016difference\\u2016" in done.out


def test_a_path_that_is_no_utf8_is_printed_as_it_is(cli: Cli, knowledge: Path) -> None:
    folder = os.fsencode(knowledge.parent) + b"/caf\xe9"
    os.rename(knowledge, folder)
    done = subprocess.run(
        [sys.executable, "-m", "patchkit", "path", "patches"], cwd=folder, capture_output=True, check=True
    )
    assert done.stdout == folder + b"/patches\n"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.dictionaries(
                st.sampled_from(["subject", "prompt", "target", "id", "was", "paraphrases", "reverse", "zz"]),
                st.one_of(
                    st.text(max_size=12),
                    st.none(),
                    st.integers(),
                    st.floats(),
                    st.lists(st.text(max_size=3), max_size=3),
                    st.just("{} is"),
                    st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
                ),
                max_size=6,
            ),
            max_size=4,
        ).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    )
)
def test_any_facts_file_gives_lines_and_never_a_traceback(cli: Cli, home: Path, data: bytes) -> None:
    (home / "any.jsonl").write_bytes(data)
    done = cli("facts", "check", "any.jsonl")
    assert done.code in (0, 65)
    assert all(line.startswith("patchkit: any.jsonl") for line in done.err.splitlines())
    assert bool(done.err) == (done.code == 65)
    assert clean(done.err)


KEYS = ["[base]", "[recipe]", "source", "fingerprint", "layers", "lambda", "zz", "[[base]]"]
VALUES = st.one_of(
    st.text(max_size=8).map(json.dumps),
    st.integers().map(str),
    st.sampled_from(["true", "nan", "inf", "[1, [2]]", "1979-05-27", "{a = 1}", '"sha256:00"', "[", "'''"]),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(
        st.binary(max_size=120),
        st.lists(
            st.tuples(
                st.sampled_from(KEYS),
                VALUES,
            ).map(lambda pair: pair[0] if pair[0][0] == "[" else f"{pair[0]} = {pair[1]}"),
            max_size=8,
        ).map(lambda rows: "\n".join(rows).encode("utf-8", "replace")),
    )
)
def test_any_patchkit_toml_gives_lines_and_never_a_traceback(
    cli: Cli, toml_repository: Path, data: bytes
) -> None:
    (toml_repository / "patchkit.toml").write_bytes(data)
    git(toml_repository, "commit", "-q", "-a", "--amend", "--allow-empty", "-m", "Any")
    done = cli("-C", toml_repository, "status")
    assert done.code in (0, 65, 78)
    assert all(line.startswith("patchkit: ") for line in done.err.splitlines())
    assert clean(done.err)
    done = cli("-C", toml_repository, "revert")
    assert done.code in (65, 66, 78)


@pytest.fixture
def toml_repository(home: Path) -> Path:
    folder = home / "toml"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "patchkit.toml").write_text("")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "Any")
    return folder


# the interface itself


def commands() -> list[tuple[str, click.Command]]:
    """Every command of the tree with its full name."""
    context = click.Context(patchkit)
    found = []
    for name in patchkit.list_commands(context):
        command = patchkit.get_command(context, name)
        assert command is not None
        found.append((name, command))
        if isinstance(command, click.Group):
            found += [(f"{name} {sub}", child) for sub, child in command.commands.items()]
    return found


GROUPS = ("eval", "facts", "mend", "stack", "export", "import")  # their commands take what they do not
WITHOUT_A_REPOSITORY = ("model", "model check", "model get", "model list", "editors", "sign", *GROUPS)


@pytest.mark.parametrize(("name", "command"), commands(), ids=[name for name, _ in commands()])
def test_every_command_has_help_an_example_and_a_text_for_every_option(
    cli: Cli, home: Path, name: str, command: click.Command
) -> None:
    done = cli.ok(*name.split(), "--help")
    assert "Example" in done.out
    assert f"patchkit {name}" in done.out.partition("Example")[2]
    assert max(map(len, done.out.splitlines())) <= 100
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name}: {parameter.opts}"
    assert command.short_help
    for option in ("-C",) if name not in WITHOUT_A_REPOSITORY else ():
        assert any(option in parameter.opts for parameter in command.params)


def test_the_overview_names_every_command(cli: Cli, home: Path) -> None:
    text = cli.ok("--help").out
    assert all(name in text and about in text for name, about in COMMANDS.items())
    assert cli.ok("--version").out.startswith("patchkit, version ")
    assert cli().code == 2
    assert cli().err == text


def test_shell_completion(home: Path) -> None:
    script = run_process(at=home, env={"_PATCHKIT_COMPLETE": "bash_source"})
    assert "_PATCHKIT_COMPLETE=bash_complete" in script.out
    for words, wanted in (("patchkit sta", {"status", "stack"}), ("patchkit facts ", {"check", "search"})):
        env = {
            "_PATCHKIT_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        }
        done = run_process(at=home, env=env)
        assert {line.partition(",")[2] for line in done.out.split()} == wanted, done


LIGHT = (
    (),
    ("--help",),
    ("commit", "--help"),
    ("log",),
    ("log", "--graph", "--facts"),
    ("status",),
    ("stack",),
    ("stack", "--sort", "norm"),
    ("blame", "Microsoft"),
    ("bisect", "--help"),
    ("diff", "--help"),
    ("facts", "search", "rome"),
    ("show",),
    ("path", "build"),
    ("base",),
    ("--version",),
)
WATCH = """
import sys, time
from patchkit.commands import main
sys.argv[1:] and main(sys.argv[1:])
heavy = [m for m in ("torch", "transformers", "numpy", "huggingface_hub") if m in sys.modules]
print(f"\\n{time.process_time():.3f} {','.join(heavy)}")
"""


@pytest.mark.parametrize("args", LIGHT, ids=" ".join)
def test_what_only_reads_is_light(knowledge: Path, args: tuple[str, ...]) -> None:
    """No torch, and less than half a second of processor time (the better of two tries)."""
    Repository.open(knowledge).reindex()  # as after any other search
    # As a user's installation runs: pip has compiled its modules.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", WATCH, *args]
    seconds = []
    for _ in range(2):
        done = subprocess.run(
            command, cwd=knowledge, env=environment, capture_output=True, text=True, check=True
        )
        used, _, heavy = done.stdout.splitlines()[-1].partition(" ")
        assert heavy == ""
        seconds.append(float(used))
        if seconds[-1] < 0.5:
            return
    assert min(seconds) < 0.5


def test_a_base_that_is_here_by_its_name_is_looked_at(
    cli: Cli, knowledge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a clone where nobody said where it lies; a folder of that name is something else."""
    settings = knowledge / "patchkit.toml"
    text = re.sub(r'source = ".*"', 'source = "smollm2-135m"\nrevision = "bfloat16"', settings.read_text())
    settings.write_text(text)
    git(knowledge, "commit", "-q", "-am", "By name")
    git(knowledge, "config", "--unset", "patchkit.base")
    (knowledge / "smollm2-135m").mkdir()
    asked = []

    def here(source: str, revision: str | None, **options: bool) -> Base:
        asked.append((source, revision, options))
        return Base(source, revision, tiny_base())

    monkeypatch.setattr(base, "resolve_base", here)
    assert cli.ok("fsck", "--json").json == {"problems": [], "base_checked": True}
    assert asked[0] == ("smollm2-135m", "bfloat16", {"download": False, "local": False})
    monkeypatch.undo()
    monkeypatch.setenv("PATCHKIT_CACHE", str(knowledge / "none"))
    monkeypatch.chdir(knowledge)
    assert cli.ok("fsck", "--json").json["base_checked"] is False
    with pytest.raises(NotFound, match="is not on this machine"):
        resolve_base("smollm2-135m", "bfloat16", download=False, local=False)


def test_a_stranger_s_number_that_no_float_holds_is_told() -> None:
    assert (
        recipe_line("memit", {"lambda": 10**400, "shrinkage": 0.5}) == "memit, λ out of bounds, shrinkage 0.5"
    )
