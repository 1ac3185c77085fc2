"""`init`, `commit`, `revert`, `apply` as a person types them, on a tiny model with real edits."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_helpers import (
    LEBRON,
    MICROSOFT,
    Cli,
    Ran,
    cli,
    facts_file,
    git,
    git_environment,
    home,
    knowledge,
    run_process,
    save_checkpoint,
    set_recipe,
    snapshot,
    tiny_base,
)
from tiny_models import tiny_model

from patchkit.actions import changes
from patchkit.editing import targets, written
from patchkit.evaluation.measure import FactChange
from patchkit.facts import FactsError, read_facts
from patchkit.repository import Repository
from patchkit.settings import load_settings

__all__ = ["cli", "git_environment", "home", "knowledge"]

ANN = {"subject": "Ann", "prompt": "{} plays the sport of", "target": "football"}
DUTCH = {"subject": "Dutch", "prompt": "{} lies in", "target": "France"}
QUICK = ("--set", "steps=2")


def names(at: Path) -> list[str]:
    """The slugs in force."""
    return [stored.slug for stored in Repository.open(at).stack().patches]


def lines(ran: Ran) -> list[str]:
    return ran.err.splitlines()


# init


def test_init_makes_a_repository_in_a_new_folder(cli: Cli, home: Path) -> None:
    done = cli.ok("init", tiny_base(), "deep/new")
    folder = home / "deep" / "new"
    assert "made" in done.out
    assert "next: patchkit commit" in done.out
    assert git(folder, "rev-list", "--count", "HEAD") == "1"
    assert set(git(folder, "ls-files").split()) == {"patchkit.toml", "patches/.gitattributes"}
    assert git(folder, "status", "--porcelain", "--ignored") == ""
    settings = load_settings(folder / "patchkit.toml")
    assert settings.base_source == "folder:tiny"
    assert str(home) not in (folder / "patchkit.toml").read_text()
    assert git(folder, "config", "patchkit.base") == str(tiny_base())
    assert f"Patchkit-Base: {settings.base_fingerprint}" in git(folder, "log", "-1", "--format=%B")


def test_init_uses_a_repository_that_is_there_and_leaves_staged_files_alone(cli: Cli, home: Path) -> None:
    git(home, "init", "-q", "-b", "trunk")
    (home / "README").write_text("mine\n")
    (home / "staged").write_text("not yet\n")
    git(home, "add", "README")
    git(home, "commit", "-q", "-m", "Mine")
    git(home, "add", "staged")
    cli.ok("init", tiny_base())
    assert not list(home.glob("*/.git"))
    assert git(home, "log", "--format=%s").splitlines()[-1] == "Mine"
    assert git(home, "status", "--porcelain") == "A  staged"
    assert git(home, "branch", "--show-current") == "trunk"


def test_init_in_a_subfolder_never_nests(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(home, "init", "-q")
    cli.ok("init", tiny_base(), "models/knowledge")
    assert not (home / "models" / "knowledge" / ".git").exists()
    assert git(home, "ls-files").split() == [
        "models/knowledge/patches/.gitattributes",
        "models/knowledge/patchkit.toml",
    ]
    set_recipe(home / "models" / "knowledge", "\n[recipe]\nlayers = [0]\nlambda = 3.0\ncontexts = 0\n")
    cli.ok("-C", "models/knowledge", "commit", facts_file(home, ANN), *QUICK, "-q")
    monkeypatch.chdir(home / "models" / "knowledge" / "patches")
    assert [row["name"][:4] for row in cli.ok("stack", "--json").json] == ["ann-"]


def test_two_stacks_in_one_repository_keep_to_themselves(
    cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(home, "init", "-q")
    other = save_checkpoint(tiny_model("llama", torch.bfloat16, seed=1), home / "other")
    cli.ok("init", tiny_base(), "a", "-q")
    cli.ok("init", other, "deep/b.c", "-q")
    set_recipe(home / "a", "\n[recipe]\nlayers = [0]\nlambda = 3.0\ncontexts = 0\n")
    cli.ok("-C", "a", "commit", facts_file(home, ANN), *QUICK, "-q")
    for folder, base in (("a", tiny_base()), ("deep/b.c", other)):
        cli.ok("-C", folder, "build", "-q")
        cli.ok("-C", folder, "fsck")
        assert cli.ok("-C", folder, "base", "--json").json["folder"] == str(base)
    for folder, count in (("a", 1), ("deep/b.c", 0)):
        found = cli.ok("-C", folder, "status", "--json").json
        assert (found["patches"], found["problems"]) == (count, [])
        assert [build["state"] for build in found["builds"]] == ["up to date"]
    for what in ("catalogue", "build", "kept", "base"):
        assert cli.ok("-C", "a", "path", what).out != cli.ok("-C", "deep/b.c", "path", what).out
    shared = [cli.ok("-C", folder, "path", "statistics").out for folder in ("a", "deep/b.c")]
    assert shared[0] == shared[1]


@pytest.mark.parametrize("below", ["patches", "patches/new", "notes/deep"])
def test_init_below_a_stack_finds_that_stack(
    cli: Cli, knowledge: Path, home: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    (knowledge / "patches" / "lone").mkdir()
    before = snapshot(knowledge)
    assert cli.ok("init", tiny_base(), below, "--json").json["folder"] == str(knowledge)
    assert f"there already: {knowledge}" in cli.ok("init", tiny_base(), below, "--dry-run").out
    monkeypatch.chdir(knowledge / "patches" / "lone")
    assert f"there already: {knowledge}" in cli.ok("init", tiny_base()).out
    other = save_checkpoint(tiny_model("llama", torch.bfloat16, seed=1), home / "other")
    done = cli("init", other)
    assert done.code == 73
    assert f"{knowledge / 'patchkit.toml'}: stands on another base already (folder:tiny)" in done.err
    assert snapshot(knowledge) == before
    assert cli.ok("-C", knowledge, "status", "--json").json["patches"] == 2


def test_init_twice_says_that_it_is_there(cli: Cli, knowledge: Path) -> None:
    before = snapshot(knowledge)
    done = cli.ok("init", tiny_base(), "--json")
    assert done.json["commit"] is None
    assert "there already" in cli.ok("init", tiny_base()).out
    assert "recipe  memit, layers 0, λ 3 (in patchkit.toml)" in cli.ok("init", tiny_base()).out
    assert snapshot(knowledge) == before


def test_init_says_that_a_recipe_is_none(cli: Cli, knowledge: Path) -> None:
    path = knowledge / "patchkit.toml"
    path.write_text(path.read_text("utf-8").replace("lambda = 3.0", 'lambda = "much"'), "utf-8")
    git(knowledge, "commit", "-qam", "a wrong hand")
    done = cli.ok("init", tiny_base())
    assert "nothing can be edited with this recipe" in done.out
    assert f"{path}: [recipe]: lambda should be a number" in done.out
    assert "next: " not in done.out
    assert "(in patchkit.toml)" not in done.out, "no other recipe is said to be there"
    told = cli.ok("init", tiny_base(), "--json").json
    assert told["recipe"] is None
    assert told["fault"].startswith(str(path))


def test_the_place_of_a_base_named_from_here_holds_from_anywhere(
    cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "models").mkdir()
    base = shutil.copytree(tiny_base(), home / "models" / "tiny")
    monkeypatch.chdir(home / "models")
    cli.ok("init", "../models/tiny", "../kb", "-q")
    assert git(home / "kb", "config", "patchkit.base") == str(base)
    monkeypatch.chdir(home / "kb")
    (home / "link").symlink_to(base)
    assert str(base) in cli.ok("base", "../link").out
    assert git(home / "kb", "config", "patchkit.base") == str(base)
    monkeypatch.chdir(base)
    assert cli.ok("init", ".", home / "other", "--json").json["source"] == "folder:tiny"
    done = cli("-C", home / "kb", "base", "nosuch")
    assert done.code == 66
    assert "nosuch: there is no such folder, short name or hub id" in done.err


def test_init_on_another_base_is_refused(cli: Cli, knowledge: Path, home: Path) -> None:
    other = save_checkpoint(tiny_model("llama", torch.bfloat16, seed=1), home / "other")
    before = snapshot(knowledge)
    done = cli("init", other)
    assert done.code == 73
    assert "stands on another base already (folder:tiny)" in done.err
    assert snapshot(knowledge) == before


def test_init_dry_run_writes_nothing(cli: Cli, home: Path) -> None:
    done = cli.ok("init", tiny_base(), "new", "--dry-run")
    assert "would make" in done.out
    assert list(home.iterdir()) == []


def test_init_json_names_everything(cli: Cli, home: Path) -> None:
    made = cli.ok("init", tiny_base(), "k", "--json").json
    assert made["folder"] == str(home / "k")
    assert made["base_folder"] == str(tiny_base())
    assert made["commit"] == git(home / "k", "rev-parse", "HEAD")
    assert made["recipe"]["method"] == "memit"
    assert made["recipe"]["guess"] is True
    assert "guess" in cli.ok("init", tiny_base(), "l").out


# commit


def test_commit_of_a_file_records_the_patch_and_prints_what_was_measured(
    cli: Cli, knowledge: Path, home: Path
) -> None:
    done = cli.ok("commit", facts_file(home, ANN))
    name = Repository.open(knowledge).show().name
    assert name.startswith("ann-")
    assert {path.name for path in (knowledge / "patches" / name).iterdir()} == {
        "facts.jsonl",
        "delta.safetensors",
        "keys.safetensors",
    }
    assert "Ann → football" in done.out
    assert "football." in done.out  # what the edited model says
    assert "efficacy 100 %" in done.out
    assert f"committed {git(knowledge, 'rev-parse', 'HEAD')[:10]}" in done.out
    assert git(knowledge, "status", "--porcelain", "--ignored") == ""
    measured = cli.ok("show", "--json").json["facts"][0]["measured"]
    model, tokenizer = Repository.open(knowledge).load()
    with torch.no_grad():
        ids = torch.tensor([tokenizer("Ann plays the sport of")["input_ids"]])
        text = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :])
    assert measured["after"]["rewrite"]["text"] == text.replace("</s>", "")
    assert measured["before"]["rewrite"]["text"] == " basketball."


def test_commit_reads_standard_input_and_inline_facts(cli: Cli, knowledge: Path) -> None:
    cli.ok("commit", "-", *QUICK, stdin=json.dumps(ANN).encode() + b"\n")
    cli.ok("commit", "--fact", "Dutch | {} lies in | France", "--fact", "Rome|{} lies in|Japan", *QUICK)
    assert names(knowledge) == ["ann", "dutch", "lebron-james", "microsoft"]
    newest = Repository.open(knowledge).show().facts
    assert [(fact.subject, fact.target) for fact in newest] == [("Dutch", "France"), ("Rome", "Japan")]


def test_commit_takes_counterfact_records(cli: Cli, knowledge: Path, home: Path) -> None:
    record = {
        "case_id": 7,
        "requested_rewrite": {
            "prompt": "{} plays the sport of",
            "relation_id": "P641",
            "target_new": {"str": "football", "id": "Q1"},
            "target_true": {"str": "basketball", "id": "Q2"},
            "subject": "Ann",
        },
        "paraphrase_prompts": ["You see. Ann plays the sport of"],
        "neighborhood_prompts": ["Rome plays the sport of", "Paris lies in"],
    }
    path = home / "counterfact.json"
    path.write_text(json.dumps([record]))
    found = cli.ok("commit", path, "--json").json
    assert found["summary"]["facts"] == 1
    assert found["summary"]["paraphrases"] in (0.0, 1.0)
    assert found["summary"]["neighbors"] in (0.0, 0.5, 1.0)
    assert found["summary"]["specificity"] in (0.0, 0.5, 1.0)
    (fact,) = Repository.open(knowledge).show().facts
    assert (fact.target, fact.was, fact.relation) == ("football", "basketball", "P641")
    assert len(fact.neighbors) == 2


def test_commit_keeps_the_order_of_lines_and_writes_the_canonical_form(
    cli: Cli, knowledge: Path, home: Path
) -> None:
    untidy = '{"target":" football ", "prompt": "Ann plays the sport of" ,"subject":"Ann"}'
    cli.ok("commit", facts_file(home, DUTCH, untidy), *QUICK)
    written = (knowledge / "patches" / Repository.open(knowledge).show().name / "facts.jsonl").read_text()
    assert [json.loads(line) for line in written.splitlines()] == [DUTCH, ANN]


FAULTY = ['{"subject": "Ann"', json.dumps(ANN), json.dumps({**DUTCH, "target": " "}), "7", '{"subject": 3}']


def test_commit_lists_all_faults_with_their_lines(cli: Cli, knowledge: Path, home: Path) -> None:
    path = facts_file(home, *FAULTY)
    before = snapshot(knowledge)
    done = cli("commit", path)
    assert done.code == 65
    assert done.out == ""
    told = [re.match(rf"patchkit: {re.escape(str(path))}:(\d+): .+", line) for line in lines(done)]
    assert all(told)
    assert {match[1] for match in told if match} == {"1", "3", "4", "5"}
    assert snapshot(knowledge) == before


def test_clashes_with_the_stack_are_listed_with_all_other_faults(
    cli: Cli, knowledge: Path, home: Path
) -> None:
    path = facts_file(home, FAULTY[0], {**LEBRON, "target": "dancers"}, FAULTY[3], ANN, MICROSOFT)
    before = snapshot(knowledge)
    for command in (("commit",), ("facts", "check")):
        done = cli(*command, path)
        assert done.code == 65
        told = [re.match(rf"patchkit: {re.escape(str(path))}:(\d+): (.+)", line) for line in lines(done)]
        assert [match and match[1] for match in told] == ["1", "2", "3", "5"]
        assert "contradicts" in lines(done)[1]
        assert "already in force" in lines(done)[3]
    assert len(lines(cli("commit", path, "--replace"))) == 2, "what is replaced is no fault"
    with pytest.raises(FactsError) as error:
        Repository.open(knowledge).commit(path)
    assert len(error.value.faults) == 4
    assert snapshot(knowledge) == before
    git(knowledge, "rm", "-q", "patchkit.toml")
    git(knowledge, "commit", "-q", "-m", "No stack any more")
    assert [line.partition(".jsonl:")[2][:2] for line in lines(cli("commit", path))] == ["1:", "3:"]


def test_faults_are_found_before_torch_is_imported(knowledge: Path, home: Path) -> None:
    code = (
        "import sys; from patchkit.commands import main; code = main(sys.argv[1:]); "
        "print(code, [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    for facts in (FAULTY, [json.dumps(LEBRON)]):  # a faulty file; one that clashes with the stack
        done = subprocess.run(
            [sys.executable, "-c", code, "commit", facts_file(home, *facts)],
            cwd=knowledge,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "65 []\n", done.stderr


def test_commit_refuses_what_the_stack_says_already_or_otherwise(
    cli: Cli, knowledge: Path, home: Path
) -> None:
    path = facts_file(home, {**LEBRON, "target": "dancers"}, ANN, MICROSOFT)
    before = snapshot(knowledge)
    done = cli("commit", path)
    assert done.code == 65
    assert len(lines(done)) == 2
    assert f'{path}:1: "dancers" contradicts "football" of patch lebron-james-' in lines(done)[0]
    assert "--replace" in lines(done)[0]
    assert f"{path}:3: already in force in patch microsoft-" in lines(done)[1]
    assert snapshot(knowledge) == before


def test_replace_takes_the_older_fact_out_and_adds_the_new_one_in_one_commit(
    cli: Cli, knowledge: Path, home: Path
) -> None:
    cli.ok("commit", facts_file(home, ANN, DUTCH), *QUICK)
    first = git(knowledge, "rev-parse", "HEAD")
    done = cli.ok("commit", "--replace", "--fact", "ann | {} plays the sport of | dancers", *QUICK, "--json")
    assert git(knowledge, "rev-list", "--count", f"{first}..HEAD") == "1"
    assert [item["facts"] for item in done.json["replaced"]] == [["Ann plays the sport of"]]
    held = {pair[1].target for pair in Repository.open(knowledge).stack().facts_in_force().values()}
    assert held == {"football", "Rome", "France", "dancers"}
    assert len(Repository.open(knowledge).history()[0].changed) == 1
    whole = cli.ok("commit", "--replace", "--fact", "Dutch | {} lies in | Japan", *QUICK)
    assert "replaced in ann-" in whole.out
    assert [name.rpartition("-")[0] for name in Repository.open(knowledge).history()[0].removed] == ["ann"]


def test_the_recipe_is_that_of_as_many_facts_as_are_edited(cli: Cli, knowledge: Path, home: Path) -> None:
    """Of two facts, from which on a batch is large here, one is known."""
    settings = knowledge / "patchkit.toml"
    settings.write_text(settings.read_text() + "\n[recipe.many]\nfacts = 2\nlambda = 7.0\n")
    git(knowledge, "commit", "-q", "-am", "Large batches")
    known = {"subject": "Rome", "prompt": "{} plays the sport of", "target": "dancers"}
    both = facts_file(home, known, ANN)
    large = cli.ok("commit", both, "--dry-run", "--json", *QUICK).json
    assert any("2 facts in one batch were edited with λ 7" in note for note in large["notes"])
    own = cli.ok("commit", both, "--dry-run", "--json", "--lambda", "8", *QUICK).json
    assert not any("λ 7" in note for note in own["notes"]), "what was asked for otherwise was not used"
    few = cli.ok("commit", both, "--skip-known", "--json", *QUICK).json
    assert not any("in one batch" in note for note in few["notes"])
    assert Repository.open(knowledge).show().recipe["lambda"] != 7.0


def test_replace_with_the_very_same_fact_solves_it_again(cli: Cli, knowledge: Path, home: Path) -> None:
    cli.ok("commit", "--replace", facts_file(home, MICROSOFT), *QUICK)
    assert names(knowledge) == ["lebron-james", "microsoft"]
    assert Repository.open(knowledge).show("microsoft").recipe["steps"] == 2
    assert git(knowledge, "status", "--porcelain", "--ignored") == ""


def test_known_facts_are_reported_and_left_in_or_out(cli: Cli, knowledge: Path, home: Path) -> None:
    known = {"subject": "Rome", "prompt": "{} plays the sport of", "target": "dancers"}
    path = facts_file(home, known, ANN)
    done = cli.ok("commit", path, "--dry-run", *QUICK, "--json").json
    assert done["known"] == ["Rome plays the sport of"]
    assert done["summary"]["facts"] == 2
    assert "already says 1 of them, left in: Rome" in cli.ok("commit", path, "--dry-run", *QUICK).out
    done = cli.ok("commit", path, "--skip-known", *QUICK)
    assert "already says 1 of them, left out: Rome" in done.out
    assert [fact.subject for fact in Repository.open(knowledge).show().facts] == ["Ann"]
    before = snapshot(knowledge)
    refused = cli("commit", facts_file(home, known), "--skip-known", *QUICK)
    assert refused.code == 65
    assert "already says this fact" in refused.err
    assert snapshot(knowledge) == before


def test_facts_are_edited_from_both_ends(cli: Cli, knowledge: Path, home: Path) -> None:
    """With the option the reverse is a fact of the patch, measured and taken back as every other."""
    back = {"subject": "Rome", "prompt": "{} is where one finds", "target": "Ann"}
    fact = {"subject": "Ann", "prompt": "{} lies in", "target": "Rome", "reverse": back}
    path = facts_file(home, fact)
    assert "the reverse is listed but not edited in 1 fact (line 1)" in cli.ok("facts", "check", path).out
    done = cli.ok("commit", path, "--with-reverse", *QUICK, "--json").json
    assert done["summary"]["facts"] == 2
    stored = Repository.open(knowledge).show().facts
    assert [(f.subject, f.target) for f in stored] == [("Ann", "Rome"), ("Rome", "Ann")]
    cli.ok("revert", "ann", "--fact", "2")
    assert [f.subject for f in Repository.open(knowledge).show("ann").facts] == ["Ann"]
    cli.ok("revert", "ann", "-q")
    cli.ok(
        "commit", facts_file(home, back, name="back.jsonl"), *QUICK, "-q"
    )  # in force, so that one end is left
    assert cli.ok("commit", path, "--with-reverse", *QUICK, "--json").json["summary"]["facts"] == 1
    told = cli("commit", facts_file(home, ANN), "--with-reverse", *QUICK)
    assert told.code == 65
    assert 'no fact has a "reverse"' in told.err


def test_a_gate_refuses_and_the_line_says_how_to_commit_all_the_same(
    cli: Cli, knowledge: Path, home: Path
) -> None:
    before = snapshot(knowledge)
    weak = ("--set", "learning_rate=0.0001", *QUICK)
    done = cli("commit", facts_file(home, ANN), "--gate", "efficacy=0.9, argmax=1", *weak)
    assert done.code == 3
    assert len(lines(done)) == 1
    assert "efficacy 0 < 0.9; argmax 0 < 1" in done.err
    assert re.search(r"^✗  Ann → football +\d\.\d{3} ", done.out, re.MULTILINE), "which facts failed"
    assert "efficacy 0 %" in done.out
    assert "committed" not in done.out
    assert "dry run" not in done.out
    assert snapshot(knowledge) == before
    command = shlex.split(done.err.partition("with: ")[2])
    assert command[:2] == ["patchkit", "apply"]
    (Path(command[2]) / "delta.safetensors").unlink()  # as a kill leaves it, or a full disk
    assert cli("commit", facts_file(home, ANN), "--gate", "efficacy=0.9, argmax=1", *weak).code == 3
    cli.ok(*command[1:])
    assert names(knowledge) == ["ann", "lebron-james", "microsoft"]
    fact = cli.ok("show", "ann", "--json").json["facts"][0]
    assert fact["target"] == "football"
    assert fact["measured"]["before"]["rewrite"]["text"] == " basketball."
    assert cli.ok("show", "ann", "--json").json["weights"][0]["share"] is not None
    cli.ok("revert", "ann", "-q")
    said = cli("commit", facts_file(home, ANN), "--gate", "efficacy=0.9, argmax=1", *weak, "--json")
    assert said.code == 3
    assert said.json["summary"]["efficacy"] == 0
    assert said.json["commit"] is None
    assert f"patchkit: {said.json['refused']}" == said.err.strip()
    assert cli("commit", facts_file(home, ANN), "--gate", "efficacy=0.9", *weak, "-q").out == ""


@pytest.mark.parametrize("whole", [True, False])
def test_a_refused_replacement_is_committed_by_the_command_that_its_line_gives(
    cli: Cli, knowledge: Path, home: Path, whole: bool
) -> None:
    """The older facts leave with it: a whole patch, or a part of one that is solved again."""
    if not whole:
        cli.ok("commit", facts_file(home, ANN, DUTCH), *QUICK)
    wanted = facts_file(home, {**(LEBRON if whole else DUTCH), "target": "dancers"})
    weak = ("--set", "learning_rate=0.0001", *QUICK)
    done = cli("commit", wanted, "--replace", "--gate", "efficacy=1", *weak)
    assert done.code == 3
    command = shlex.split(done.err.partition("with: ")[2])
    assert command[:3] == ["patchkit", "apply", "--replace"]
    clash = cli("apply", *command[3:])
    assert clash.code == 65
    (place,) = re.findall(r"revert \S+ --fact (\S+),", " ".join(clash.err.split()))
    assert place == (LEBRON if whole else DUTCH).get("id", "1" if whole else "2")
    first = git(knowledge, "rev-parse", "HEAD")
    would = cli.ok(*command[1:], "--dry-run")
    assert "would replace in" in would.out
    assert git(knowledge, "rev-parse", "HEAD") == first
    found = cli.ok(*command[1:], "--json").json
    fact = "LeBron James plays the sport of" if whole else "Dutch lies in"
    assert [item["facts"] for item in found["replaced"]] == [[fact]]
    assert git(knowledge, "rev-list", "--count", f"{first}..HEAD") == "1"
    targets = sorted(pair[1].target for pair in Repository.open(knowledge).stack().facts_in_force().values())
    assert targets == (["Rome", "dancers"] if whole else ["Rome", "dancers", "football", "football"])
    assert cli.ok("status", "--json").json["problems"] == []


def test_a_command_to_copy_holds_paths_with_spaces(
    cli: Cli, knowledge: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = knowledge.rename(home / "it's my kb")
    monkeypatch.chdir(place)
    done = cli("commit", facts_file(home, ANN), "--gate", "argmax=1", "--set", "learning_rate=1e-4", *QUICK)
    command = shlex.split(done.err.partition("with: ")[2])
    assert len(command) == 3
    cli.ok(*command[1:])
    assert "ann" in names(place)


def test_apply_replace_of_a_patch_solved_anew_keeps_its_folder(cli: Cli, knowledge: Path, home: Path) -> None:
    weak = ("--set", "learning_rate=0.0001", *QUICK)
    done = cli("commit", facts_file(home, MICROSOFT), "--replace", "--gate", "efficacy=1", *weak)
    name = Repository.open(knowledge).show("microsoft").name
    cli.ok(*shlex.split(done.err.partition("with: ")[2])[1:])
    shown = Repository.open(knowledge).show("microsoft")
    assert (shown.name, shown.recipe["learning_rate"]) == (name, 0.0001)
    assert git(knowledge, "status", "--porcelain", "--ignored") == ""


def test_a_gate_that_is_met_commits(cli: Cli, knowledge: Path, home: Path) -> None:
    cli.ok("commit", facts_file(home, ANN), "--gate", "efficacy=0,argmax=0", *QUICK)
    assert "ann" in names(knowledge)


@pytest.mark.parametrize("name", ["neighbors", "paraphrases"])
def test_a_gate_on_what_no_fact_lists_is_refused_before_a_model_is_loaded(
    cli: Cli, knowledge: Path, home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    known = {"subject": "Rome", "prompt": "{} plays the sport of", "target": "dancers"}
    some = facts_file(home, {**known, name: ["Rome lies in"]}, ANN, name="some.jsonl")
    left = cli("commit", some, "--skip-known", "--gate", f"{name}=0", *QUICK)
    assert left.code == 3, "the one fact that lists some was left out"
    assert f"{name} was not measured" in left.err
    monkeypatch.setattr(Repository, "workbench", lambda *_: pytest.fail("a model was loaded"))
    before = snapshot(knowledge)
    done = cli("commit", facts_file(home, ANN, DUTCH), "--gate", f"efficacy=0.5,{name}=0.95")
    assert done.code == 65
    (line,) = lines(done)
    assert f"--gate {name}: no fact of" in line
    assert f'add "{name}": ["…"]' in line
    assert snapshot(knowledge) == before


def test_a_dry_run_measures_and_writes_nothing(cli: Cli, knowledge: Path, home: Path) -> None:
    before = snapshot(knowledge)
    done = cli.ok("commit", facts_file(home, ANN), "--dry-run", *QUICK)
    assert "dry run: nothing was written" in done.out
    assert "Ann → football" in done.out
    weak = ("--set", "learning_rate=1e-4", *QUICK)
    refused = cli("commit", facts_file(home, ANN), "-n", "--gate", "argmax=1", *weak)
    assert refused.code == 3
    assert "kept" not in refused.err
    both = ("--gate", "argmax=1", "--gate", "growth=1e6")  # neither takes the other's place
    assert cli("commit", facts_file(home, ANN), "-n", *both, *weak).code == 3
    twice = cli("commit", facts_file(home, ANN), "-n", "--gate", "argmax=1", "--gate", "argmax=0", *weak)
    assert (twice.code, "argmax: is set twice" in twice.err) == (65, True)
    assert snapshot(knowledge) == before
    assert not (knowledge / ".git" / "patchkit" / "kept").exists()


def test_overrides_stand_in_the_patch_and_not_in_patchkit_toml(cli: Cli, knowledge: Path, home: Path) -> None:
    corpus = home / "corpus.txt"
    corpus.write_text("The painter plays. " * 200)
    settings = (knowledge / "patchkit.toml").read_bytes()
    cli.ok(
        "commit", facts_file(home, ANN), "--layers", "0-1", "--lambda", "7", "--corpus", corpus,
        "--set", "steps=3", "--set", "kl_prompt={} is the", "--set", "clamp = 2",
    )  # fmt: skip
    recipe = Repository.open(knowledge).show().recipe
    assert recipe["layers"] == [0, 1]
    assert recipe["lambda"] == 7.0
    assert recipe["steps"] == 3
    assert recipe["clamp"] == 2.0
    assert recipe["kl_prompt"] == "{} is the"
    assert recipe["statistics_text"] == "corpus.txt"
    assert re.fullmatch(r"[0-9a-f]{64}", recipe["statistics_digest"])
    assert recipe["templates"] == ["{}"]
    assert (knowledge / "patchkit.toml").read_bytes() == settings
    weights = cli.ok("show", "--json").json["weights"]
    assert [weight["name"] for weight in weights] == [
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)
    ]


def test_a_corpus_that_is_too_short_is_named(cli: Cli, knowledge: Path, home: Path) -> None:
    corpus = home / "corpus.txt"
    corpus.write_text("The painter plays. " * 200)
    asked = ("commit", facts_file(home, ANN), "-n", "--corpus", corpus, *QUICK)
    said = " ".join(cli.ok(*asked, "--set", "statistics_tokens=99999").out.split())
    assert re.search(r"statistics_text has \d+ tokens for the 99999 that statistics_tokens asks for", said)
    assert "statistics_text" not in cli.ok(*asked, "--set", "statistics_tokens=300").out


@pytest.mark.parametrize(
    ("options", "says", "code"),
    [
        (("--set", "context_tokens=2000", "--set", "contexts=1"), "context_tokens = 2000: the base has", 65),
        (("--set", f"kl_prompt={'very ' * 300}{{}} is a"), "kl_prompt: with 'Ann' it has", 65),
        (("--layers", "8-4,10"), "layers '8-4,10'", 65),
        (("--layers", "8-4"), "layers '8-4'", 65),
        (("--layers", "x"), "layers 'x'", 65),
        (("--layers", "3-9"), "layer", 65),
        (("--lambda", "-1"), "lambda should be a positive number", 65),
        (("--lambda", "nan"), "lambda should be a positive number", 65),
        (("--lambda", "much"), "not a valid float", 2),
        (("--set", "stepz=3"), "did you mean steps?", 65),
        (("--set", "steps=many"), "steps should be a whole number", 65),
        (("--set", "steps"), "is not NAME=VALUE", 2),
        (("--method", "magic"), "'magic' is not an editor", 65),
        (("--corpus", "nowhere.txt"), "nowhere.txt: no such corpus file", 66),
        (("--gate", "beauty=1"), "--gate 'beauty=1'", 65),
        (("--gate", "efficacy=2"), "--gate 'efficacy=2'", 65),
        (("--gate", "efficacy=nan"), "--gate 'efficacy=nan'", 65),
        (("--batch-size", "0"), "a whole number from 1, or auto", 2),
        (("--device", "abacus"), "'abacus' is not a device", 65),
    ],
)
def test_bad_overrides(
    cli: Cli, knowledge: Path, home: Path, options: tuple[str, ...], says: str, code: int
) -> None:
    before = snapshot(knowledge)
    done = cli("commit", facts_file(home, ANN), *options)
    assert done.code == code
    assert says in done.err
    assert snapshot(knowledge) == before


def test_the_message_and_the_trailers(cli: Cli, knowledge: Path, home: Path) -> None:
    cli.ok("commit", facts_file(home, ANN), "-m", "Correct Ann\n\nShe plays football.", *QUICK)
    body = git(knowledge, "log", "-1", "--format=%B")
    assert body.startswith("Correct Ann\n\nShe plays football.\n\n")
    shown = Repository.open(knowledge).show()
    trailers = dict(Repository.open(knowledge).history()[0].trailers)
    assert trailers["Patchkit-Patch"] == shown.name
    assert trailers["Patchkit-Id"] == shown.id
    assert trailers["Patchkit-Results"].startswith("efficacy ")
    assert float(trailers["Patchkit-Seconds"]) >= 0
    assert f"torch {torch.__version__}" in trailers["Patchkit-Versions"]
    assert git(knowledge, "log", "-1", "--format=%(trailers:key=Patchkit-Id,valueonly)") == shown.id
    blank = cli("commit", facts_file(home, DUTCH), "-m", "  ", *QUICK)
    assert blank.code == 65
    assert "a commit needs a message" in blank.err


def test_a_commit_that_was_cut_short_goes_on_from_its_targets_to_the_same_id(
    knowledge: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = Repository.open(knowledge)
    batch = read_facts(facts_file(home, ANN, DUTCH, {**ANN, "subject": "Émile Zola"}))
    whole = repository.commit(batch, batch_size=1, dry_run=True)
    unfinished = repository.store.private / "unfinished"
    assert unfinished.is_dir()  # a dry run's targets serve the commit that follows
    shutil.rmtree(unfinished)

    def killed(phase: str, done: int, _total: int) -> None:
        if (phase, done) == ("targets", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repository.commit(batch, batch_size=1, progress=killed)
    found: list[int] = []
    really = targets._optimise
    monkeypatch.setattr(targets, "_optimise", lambda *a: found.append(len(a[2])) or really(*a))
    done = repository.commit(batch, batch_size=1)
    assert found == [1]
    assert done.patch.id == whole.patch.id
    assert not unfinished.exists()


def test_a_commit_leaves_what_other_edits_and_trainings_keep(cli: Cli, knowledge: Path, home: Path) -> None:
    """The folder is one for all worktrees and stacks, and a training of mend goes on from there."""
    unfinished = Repository.open(knowledge).store.private / "unfinished"
    others = [unfinished / "mend-0123.safetensors", unfinished / "0123456789abcdef" / "targets-x.safetensors"]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"kept")
    cli.ok("commit", facts_file(home, ANN), *QUICK)
    assert sorted(path for path in unfinished.rglob("*") if path.is_file()) == sorted(others)


def test_a_corrected_config_finds_nothing_that_was_computed_without_it(
    cli: Cli, knowledge: Path, home: Path
) -> None:
    """Same weights, other numbers: C, text, contexts and targets are of the model as it is read now."""
    batch = read_facts(facts_file(home, ANN))
    overrides = {"steps": 2, "contexts": 3}

    def tried(at: Path) -> tuple[str, str]:
        done = Repository.open(at).commit(batch, overrides=overrides, dry_run=True, device="cpu")
        return str(done.patch.recipe["statistics_digest"]), done.patch.id

    first = tried(knowledge)
    corrected = shutil.copytree(tiny_base(), home / "corrected")
    config = json.loads((corrected / "config.json").read_text("utf-8"))
    config["rms_norm_eps"] = 0.1
    (corrected / "config.json").write_text(json.dumps(config), "utf-8")
    cli.ok("base", corrected)
    again = tried(knowledge)
    assert again[0] != first[0]
    cli.ok("clone", knowledge, home / "fresh", "--base", corrected)
    assert tried(home / "fresh") == again
    cli.ok("base", tiny_base())
    assert tried(knowledge) == first


def test_contexts_are_written_once_for_all_commits(
    cli: Cli, knowledge: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrote: list[int] = []
    really = written.write_templates
    monkeypatch.setattr(written, "write_templates", lambda *a: wrote.append(1) or really(*a))
    for fact in (ANN, DUTCH):
        cli.ok("commit", facts_file(home, fact), "--set", "contexts=3", *QUICK)
    assert wrote == [1]
    stored = {
        each.slug: each.header.recipe["templates"] for each in Repository.open(knowledge).stack().patches
    }
    assert stored["ann"] == stored["dutch"]
    assert len(stored["ann"]) > 1


def test_settings_that_are_not_committed_are_said_not_to_be_used(
    cli: Cli, knowledge: Path, home: Path
) -> None:
    said = "patchkit.toml has changes that are not committed, and this edit used the recipe that is"
    assert said not in cli.ok("commit", facts_file(home, ANN), *QUICK).out
    settings = knowledge / "patchkit.toml"
    settings.write_text(settings.read_text() + "# mine\n")
    assert said in cli.ok("commit", facts_file(home, DUTCH), *QUICK).out
    git(knowledge, "commit", "-q", "patchkit.toml", "-m", "Say whose it is")
    assert said not in cli.ok("commit", facts_file(home, {**ANN, "subject": "Émile Zola"}), *QUICK).out


def test_quiet_commit_prints_nothing(cli: Cli, knowledge: Path, home: Path) -> None:
    assert cli.ok("commit", facts_file(home, ANN), "--quiet", *QUICK).out == ""
    assert "ann" in names(knowledge)


def test_the_same_commit_in_two_processes_gives_the_same_id(knowledge: Path, home: Path) -> None:
    facts = facts_file(home, ANN)
    ids = set()
    for seed in ("1", "2"):
        copy = home / f"copy{seed}"
        shutil.copytree(knowledge, copy)
        done = run_process("commit", facts, "--json", at=copy, env={"PYTHONHASHSEED": seed})
        assert done.code == 0, done.err
        assert done.err == ""
        ids.add(done.json["id"])
    assert len(ids) == 1


# revert


def test_revert_without_words_takes_the_newest_patch_back(cli: Cli, knowledge: Path) -> None:
    done = cli.ok("revert")
    assert "took back microsoft-" in done.out
    assert names(knowledge) == ["lebron-james"]
    assert git(knowledge, "log", "-1", "--format=%s").startswith("Revert microsoft-")
    assert git(knowledge, "status", "--porcelain", "--ignored") == ""
    cli.ok("revert", "-q")
    assert names(knowledge) == []
    empty = cli("revert")
    assert empty.code == 66
    assert "no patch is in force" in empty.err


@pytest.mark.parametrize("how", ["slug", "name", "path"])
def test_revert_by_slug_name_or_path_and_what_stood_on_it(cli: Cli, knowledge: Path, how: str) -> None:
    name = Repository.open(knowledge).show("lebron-james").name
    word = {"slug": "lebron-james", "name": name, "path": f"patches/{name}/"}[how]
    done = cli.ok("revert", word)
    assert f"took back {name}" in done.out
    assert re.search(r"microsoft-\w{8} was solved on top of what left", done.out)
    assert names(knowledge) == ["microsoft"]


def test_revert_of_two_patches_is_one_commit(cli: Cli, knowledge: Path) -> None:
    before = git(knowledge, "rev-parse", "HEAD")
    found = cli.ok("revert", "lebron-james", "microsoft", "-m", "Both wrong", "--json").json
    assert [name.rpartition("-")[0] for name in found["removed"]] == ["lebron-james", "microsoft"]
    assert found["solved_on_top"] == []
    assert git(knowledge, "rev-list", "--count", f"{before}..HEAD") == "1"
    assert git(knowledge, "log", "-1", "--format=%s") == "Both wrong"


def test_revert_of_a_commit_and_of_that_revert(cli: Cli, knowledge: Path) -> None:
    tree = git(knowledge, "rev-parse", "HEAD:patches")
    added = git(knowledge, "rev-parse", "HEAD")
    cli.ok("revert", added[:12])
    assert names(knowledge) == ["lebron-james"]
    again = cli.ok("revert", "HEAD")
    assert "put back microsoft-" in again.out
    assert git(knowledge, "rev-parse", "HEAD:patches") == tree
    settings = cli("revert", git(knowledge, "rev-list", "--max-parents=0", "HEAD"))
    assert settings.code == 65
    assert "changed no patches" in settings.err


def test_revert_of_a_revert_says_nothing_twice(cli: Cli, knowledge: Path) -> None:
    """Another patch says it by now: both together would be a stack that nothing believes."""
    cli.ok("revert", "lebron-james")
    taken_back = git(knowledge, "rev-parse", "HEAD")
    cli.ok("commit", "--fact", "LeBron James | {} plays the sport of | painter", *QUICK, "-q")
    before = snapshot(knowledge)
    for more in ([], ["-n"]):
        done = cli("revert", taken_back, *more)
        assert done.code == 65
        assert "'LeBron James plays the sport of' would come back with it" in done.err
        assert (
            "says it otherwise ('painter'); take that back first: patchkit revert lebron-james-" in done.err
        )
    assert snapshot(knowledge) == before
    cli.ok(*shlex.split(done.err.rpartition("patchkit ")[2]))
    cli.ok("revert", taken_back)
    assert names(knowledge) == ["lebron-james", "microsoft"]


def test_revert_of_a_commit_whose_patch_changed_since(cli: Cli, knowledge: Path, home: Path) -> None:
    cli.ok("commit", facts_file(home, ANN, DUTCH), *QUICK)
    added = git(knowledge, "rev-parse", "HEAD")
    cli.ok("revert", "ann", "--fact", "2")
    done = cli("revert", added)
    assert done.code == 65
    assert "changed since" in done.err


def test_revert_of_facts_by_id_and_by_line(cli: Cli, knowledge: Path, home: Path) -> None:
    rome = {"id": "r-1", "subject": "Rome", "prompt": "{} lies in", "target": "Japan"}
    cli.ok("commit", facts_file(home, ANN, rome, DUTCH), *QUICK)
    name = Repository.open(knowledge).show().name
    done = cli.ok("revert", "ann", "--fact", "r-1")
    assert f"took back Rome lies in → Japan  (of {name})" in done.out
    assert [fact.subject for fact in Repository.open(knowledge).show(name).facts] == ["Ann", "Dutch"]
    found = cli.ok("revert", "ann", "--fact", "2", "--json").json
    assert [(fact["prompt"], fact["target"]) for fact in found["facts"]] == [("Dutch lies in", "France")]
    assert [fact.subject for fact in Repository.open(knowledge).show(name).facts] == ["Ann"]
    last = cli.ok("revert", "ann", "--fact", "1")
    assert f"took back {name}" in last.out
    assert names(knowledge) == ["lebron-james", "microsoft"]


def test_a_fact_taken_out_is_an_edit_of_the_others_alone(cli: Cli, knowledge: Path, home: Path) -> None:
    """The closed form keeps the others' targets: it is near what an edit of the others alone gives."""
    cli.ok("commit", facts_file(home, ANN, DUTCH))
    cli.ok("revert", "ann", "--fact", "2")
    left = Repository.open(knowledge).patch("ann")
    cli.ok("revert", "ann")
    cli.ok("commit", facts_file(home, ANN))
    alone = Repository.open(knowledge).patch("ann")
    (name,) = alone.deltas
    one, other = (patch.deltas[name].B.double() @ patch.deltas[name].A.double() for patch in (left, alone))
    assert float((one - other).norm() / other.norm()) < 1e-3
    assert left.facts == alone.facts


def test_revert_dry_run_says_and_changes_nothing(cli: Cli, knowledge: Path) -> None:
    before = snapshot(knowledge)
    assert "would take back lebron-james-" in cli.ok("revert", "lebron-james", "-n").out
    assert snapshot(knowledge) == before


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        (("nobody",), "no such patch is in force", 66),
        (("lebron",), "did you mean lebron-james-", 66),
        (("deadbeef",), "that is a commit", 66),
        (("lebron-james", "--fact", "9"), "it has 1 lines", 66),
        (("lebron-james", "--fact", "0"), "it has 1 lines", 66),
        (("lebron-james", "--fact", "²"), "it has 1 lines", 66),
        (("lebron-james", "microsoft", "--fact", "1"), "name one", 65),
        (("lebron-james", "HEAD"), "no such patch", 66),
        (("--", "-x"), "no such patch", 66),
        (("a\0b",), "", 65),
    ],
)
def test_revert_of_what_is_not_there(
    cli: Cli, knowledge: Path, words: tuple[str, ...], says: str, code: int
) -> None:
    before = snapshot(knowledge)
    done = cli("revert", *words)
    assert done.code == code
    assert says in done.err
    assert len(lines(done)) == 1
    assert snapshot(knowledge) == before


def test_an_ambiguous_slug_lists_the_patches(cli: Cli, knowledge: Path, home: Path) -> None:
    cli.ok("commit", "--fact", "LeBron James | {} lies in | Rome", *QUICK)
    done = cli("revert", "lebron-james")
    assert done.code == 66
    assert "names 2 patches" in done.err
    assert len(re.findall(r"lebron-james-[0-9a-f]{8}", done.err)) == 2


# apply


@pytest.fixture
def foreign(knowledge: Path, home: Path) -> Path:
    """Microsoft's patch as a folder outside; the repository does not have it any more."""
    store = Repository.open(knowledge)
    name = store.show("microsoft").name
    shutil.copytree(knowledge / "patches" / name, home / name)
    store.revert("microsoft")
    return home / name


def test_apply_takes_the_very_bytes(cli: Cli, knowledge: Path, foreign: Path) -> None:
    done = cli.ok("apply", foreign)
    assert f"took in {foreign.name}" in done.out
    for path in foreign.iterdir():
        assert (knowledge / "patches" / foreign.name / path.name).read_bytes() == path.read_bytes()
    again = cli("apply", foreign)
    assert again.code == 65
    assert "is in force already" in again.err
    assert "--replace" in again.err
    way_out = re.search(r"patchkit (revert \S+ --fact 1),", again.err)
    assert way_out
    cli.ok(*way_out[1].split())
    cli.ok("apply", foreign)


def test_apply_names_a_folder_of_any_name_by_its_facts(cli: Cli, knowledge: Path, foreign: Path) -> None:
    other = foreign.with_name("from a colleague")
    foreign.rename(other)
    (other / "keys.safetensors").unlink()  # may be left out when shipping
    (other / "run.py").write_text("print(1)\n")
    found = cli.ok("apply", other, "-m", "Theirs", "--json").json
    assert found["patch"] == foreign.name
    assert found["facts"] == 1
    assert {path.name for path in (knowledge / "patches" / foreign.name).iterdir()} == {
        "facts.jsonl",
        "delta.safetensors",
    }
    assert git(knowledge, "log", "-1", "--format=%s") == "Theirs"


def test_a_file_that_is_too_large_for_a_hub_is_told(
    cli: Cli, knowledge: Path, foreign: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(path.stat().st_size for path in foreign.iterdir())
    monkeypatch.setattr(changes, "PLAIN", largest)
    assert "hub" not in cli.ok("apply", foreign, "--dry-run").out
    monkeypatch.setattr(changes, "PLAIN", largest - 1)
    assert "the Hugging Face hub refuses" in cli.ok("apply", foreign).out
    monkeypatch.setattr(changes, "PLAIN", 100)
    done = cli.ok("commit", facts_file(home, ANN), *QUICK)
    assert "the Hugging Face hub refuses" in done.out
    assert "committed" in done.out


def test_apply_dry_run(cli: Cli, knowledge: Path, foreign: Path) -> None:
    before = snapshot(knowledge)
    assert f"would take in {foreign.name}" in cli.ok("apply", foreign, "--dry-run").out
    assert snapshot(knowledge) == before


@pytest.mark.parametrize("damage", ["flip", "facts", "missing", "file", "nothing", "clash"])
def test_apply_of_what_is_no_sound_patch(cli: Cli, knowledge: Path, foreign: Path, damage: str) -> None:
    delta = foreign / "delta.safetensors"
    if damage == "flip":
        data = bytearray(delta.read_bytes())
        data[-1] ^= 1
        delta.write_bytes(data[:-3])
    elif damage == "facts":
        (foreign / "facts.jsonl").write_text(json.dumps({**MICROSOFT, "target": "Paris"}) + "\n")
    elif damage == "missing":
        delta.unlink()
    elif damage == "file":
        shutil.rmtree(foreign)
        foreign.write_text("")
    elif damage == "nothing":
        shutil.rmtree(foreign)
    else:
        Repository.open(knowledge).commit([{**MICROSOFT, "target": "Paris"}], overrides={"steps": 2})
    before = snapshot(knowledge)
    done = cli("apply", foreign)
    assert done.code in (65, 66)
    assert len(lines(done)) == 1
    assert foreign.name in done.err
    assert snapshot(knowledge) == before


def test_apply_of_a_patch_for_another_base(cli: Cli, knowledge: Path, foreign: Path, home: Path) -> None:
    other = save_checkpoint(tiny_model("llama", torch.bfloat16, seed=1), home / "other")
    cli.ok("init", other, home / "second", "-q")
    before = snapshot(home / "second")
    done = cli("-C", home / "second", "apply", foreign)
    assert done.code == 65
    assert "was made on another base" in done.err
    assert snapshot(home / "second") == before


def test_facts_that_look_like_trailers_are_none(cli: Cli, knowledge: Path) -> None:
    cli.ok("commit", "--fact", "Ann | Question: where is {}? Answer: | Rome", "-q", *QUICK)
    keys = git(knowledge, "log", "-1", "--format=%(trailers:keyonly)").split()
    assert keys
    assert all(key.startswith("Patchkit-") for key in keys)
    assert "- Question: where is Ann? Answer: → Rome" in git(knowledge, "log", "-1", "--format=%b")


def test_what_a_model_that_broke_down_says_is_null(
    cli: Cli, knowledge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: FactChange) -> dict[str, Any]:
        return {**to_dict(self), "after": {"rewrite": {"p": math.nan, "tokens": (math.inf, 1.0)}}}

    to_dict = FactChange.to_dict
    monkeypatch.setattr(FactChange, "to_dict", broken)
    done = cli.ok("commit", "--fact", "Ann | {} lies in | Rome", "--json", *QUICK).json
    assert done["facts"][0]["after"]["rewrite"] == {"p": None, "tokens": [None, 1.0]}
    assert not any("catalogue" in note for note in done["notes"])
    (kept,) = Repository.open(knowledge).catalogue.results(done["id"])
    assert kept["after"] == {"rewrite": {"p": None, "tokens": [None, 1.0]}}
