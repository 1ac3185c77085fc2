"""Facts in force before an edit: asked again on the model that it made, the most disturbed ones first."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_helpers import (
    LEBRON,
    LIES,
    PLAYS,
    WORLD,
    Cli,
    cli,
    facts_file,
    git,
    git_environment,
    home,
    knowledge,
)
from test_interference import literal, made

from patchkit.actions import earlier
from patchkit.actions.earlier import Earlier, most_disturbed
from patchkit.errors import Busy
from patchkit.repository import Repository

__all__ = ["cli", "git_environment", "home", "knowledge"]

ANN, JAPAN = (
    {"subject": subject, "prompt": PLAYS, "target": WORLD[subject, PLAYS]} for subject in ("Ann", "Japan")
)
"""What the base says."""
PARIS = {"subject": "Ann", "prompt": LIES, "target": "Paris"}
ZOLA = {"subject": "Émile Zola", "prompt": "{} lies in", "target": "Rome"}
HARD = ("--method", "ft", "--set", "learning_rate=0.065", "--set", "steps=25", "--device", "cpu")
"""Of PARIS, so hard that JAPAN is lost."""
QUICK = ("--set", "steps=2", "--device", "cpu")


@pytest.fixture
def said(cli: Cli, knowledge: Path, home: Path) -> Path:
    """A repository of four facts, of which its model says ANN's and JAPAN's."""
    for fact in (ANN, JAPAN):
        cli.ok("commit", facts_file(home, fact), *QUICK, "-q")
    return knowledge


def literally_says(repository: Repository, revision: str, prompt: str, target: str) -> bool:
    """Token by token, each of them the argmax of float64 logits."""
    model, tokenizer = repository.load(revision, "cpu")
    before, whole = (tokenizer(text)["input_ids"] for text in (prompt, f"{prompt} {target}"))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole])).logits[0].double()
    return all(int(logits[place - 1].argmax()) == whole[place] for place in range(len(before), len(whole)))


def test_the_most_disturbed_come_first_and_those_without_keys_take_turns() -> None:
    one, other, silent, patch = made(3, 1), made(4, 2), made(2, 3, keys=False), made(2, 4)
    ranked = sorted(
        [
            (literal(each, [patch], i)[1], each.facts[i])
            for each in (one, other)
            for i in range(len(each.facts))
        ],
        key=lambda pair: -pair[0],
    )
    known = [fact for _, fact in ranked]
    first, second = silent.facts
    found = most_disturbed([one, silent, other], patch)
    assert [fact for fact in found if fact in known] == known
    assert {found[1], found[3]} == {first, second}
    assert most_disturbed([], patch) == []


def test_where_all_are_disturbed_as_little_others_are_drawn_at_each_edit() -> None:
    below, first, second = made(40, 1, ("low",)), made(1, 2, ("high",)), made(1, 3, ("high",))
    orders = [most_disturbed([below], edit) for edit in (first, second)]
    assert orders[0] != orders[1]
    assert set(orders[0]) == set(orders[1]) == set(below.facts)
    assert most_disturbed([below], first) == orders[0]


def test_a_patch_below_of_an_editor_that_is_not_here_is_no_obstacle() -> None:
    below = replace(made(2, 1), method="of-another-package")
    assert set(most_disturbed([below], made(1, 2))) == set(below.facts)


def test_a_share_is_exact() -> None:
    facts = made(7, 1).facts
    assert Earlier(100, 100, 100, facts).kept == 0.93
    assert Earlier(0, 0, 0).kept is None


@pytest.mark.parametrize(("fact", "options"), [(PARIS, HARD), (ZOLA, QUICK)])
def test_what_is_said_of_earlier_facts_is_what_the_two_models_say(
    cli: Cli, said: Path, home: Path, fact: dict[str, Any], options: tuple[str, ...]
) -> None:
    done = cli.ok("commit", facts_file(home, fact), *options, "--json").json["earlier"]
    repository = Repository.open(said)
    pairs = {
        ("LeBron James plays the sport of", "football"),
        ("Microsoft lies in", "Rome"),
        ("Ann plays the sport of", "basketball"),
        ("Japan plays the sport of", "football"),
    }
    before = {pair for pair in pairs if literally_says(repository, "HEAD~1", *pair)}
    after = {pair for pair in before if literally_says(repository, "HEAD", *pair)}
    assert {prompt for prompt, _ in before} == {"Ann plays the sport of", "Japan plays the sport of"}
    assert (after != before) is (fact is PARIS)
    assert (done["in_force"], done["asked"], done["said"]) == (4, 4, 2)
    assert {(each["prompt"], each["target"]) for each in done["lost"]} == before - after
    assert done["kept"] == pytest.approx(len(after) / 2)


def test_a_person_is_told_what_is_lost(cli: Cli, said: Path, home: Path) -> None:
    told = cli.ok("commit", facts_file(home, PARIS), *HARD, "--dry-run").out
    assert "facts in force before: 1 of 2 that were said still are\n" in told
    assert "would no longer be said: Japan → football\n" in told
    told = cli.ok("commit", facts_file(home, ZOLA), *QUICK, "--dry-run").out
    assert "facts in force before: 2 of 2 that were said still are\n" in told
    assert "no longer" not in told
    told = cli.ok("commit", facts_file(home, PARIS), *HARD).out
    name = Repository.open(said).show("japan").name
    assert f"no longer said: Japan → football; solve again on this stack: patchkit refit {name}\n" in told
    cli.ok("refit", name, "-n", "-q")


def test_a_gate_on_what_is_kept(cli: Cli, said: Path, home: Path) -> None:
    refused = cli("commit", facts_file(home, PARIS), *HARD, "--gate", "kept=0.9", "-q")
    assert refused.code == 3
    assert "(kept 0.5 < 0.9)" in refused.err
    cli.ok("commit", facts_file(home, PARIS), *HARD, "--gate", "kept=0.5", "-q")


def test_nothing_in_force_is_nothing_lost(cli: Cli, knowledge: Path, home: Path) -> None:
    cli.ok("revert", "microsoft", "-q")
    cli.ok("revert", "lebron-james", "-q")
    done = cli.ok("commit", facts_file(home, LEBRON), *QUICK, "--gate", "kept=1", "--json").json["earlier"]
    assert done == Earlier(0, 0, 0).to_dict()
    assert done["kept"] is None


def test_a_replaced_fact_is_not_in_force_any_more(cli: Cli, said: Path, home: Path) -> None:
    wanted = facts_file(home, {**ANN, "target": "dancers"})
    done = cli.ok("commit", wanted, "--replace", *QUICK, "--json").json["earlier"]
    assert (done["in_force"], done["said"]) == (3, 1)


def test_only_so_many_are_asked_and_that_is_told(
    cli: Cli, said: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(earlier, "ASKED", 1)
    told = cli.ok("commit", facts_file(home, ZOLA), *QUICK).out
    done = cli.ok("commit", facts_file(home, {**ZOLA, "prompt": PLAYS}), *QUICK, "--json").json["earlier"]
    assert (done["in_force"], done["asked"]) == (5, 1)
    assert (
        "facts in force before: 1 of 1 that were said still are (1 of 4 asked, the most disturbed first)"
        in told
    )


# The repository moves on while an edit is computed


def in_the_middle(act: Any) -> Any:
    """A progress that does something once, while the facts are measured after the edit."""
    waiting = [act]

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "measuring after" and waiting:
            waiting.pop()()

    return progress


def test_a_commit_does_not_go_to_a_branch_that_was_checked_out_meanwhile(cli: Cli, knowledge: Path) -> None:
    head = git(knowledge, "rev-parse", "HEAD")
    progress = in_the_middle(lambda: git(knowledge, "switch", "-q", "-c", "other"))
    overrides = {"steps": 2}
    with pytest.raises(Busy, match=r"began on main, and HEAD is on other now.*patchkit apply") as caught:
        Repository.open(knowledge).commit([ANN], progress=progress, overrides=overrides)
    assert git(knowledge, "rev-parse", "HEAD") == head
    git(knowledge, "switch", "-q", "main")
    cli.ok(*shlex.split(str(caught.value).partition("commit it with: patchkit ")[2]))
    assert len(Repository.open(knowledge).stack().patches) == 3


def test_a_refit_does_not_either(cli: Cli, knowledge: Path) -> None:
    head = git(knowledge, "rev-parse", "HEAD")
    progress = in_the_middle(lambda: git(knowledge, "switch", "-q", "--detach"))
    with pytest.raises(Busy, match=r"began on main, and HEAD is on the detached commit"):
        Repository.open(knowledge).refit("lebron-james", progress=progress)
    assert git(knowledge, "rev-parse", "HEAD") == head


def test_numbers_of_a_stack_that_moved_on_are_called_so(cli: Cli, knowledge: Path) -> None:
    progress = in_the_middle(lambda: Repository.open(knowledge).revert("microsoft"))
    done = Repository.open(knowledge).commit([ANN], progress=progress, overrides={"steps": 2})
    assert any("another commit changed the stack meanwhile" in note for note in done.notes)
    assert [each.slug for each in Repository.open(knowledge).stack().patches] == ["ann", "lebron-james"]
