"""`patchkit eval` on a tiny base that knows its facts: what it says is what `ask` and `commit` say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command_helpers import (
    PLAYS,
    Cli,
    cli,
    facts_file,
    git,
    git_environment,
    home,
    knowledge,
    snapshot,
)

from patchkit.actions.workbench import Workbench
from patchkit.commands.display import printable
from patchkit.errors import BadInput
from patchkit.evaluation.cases import read_cases, sampled
from patchkit.evaluation.generation import continue_greedily, says
from patchkit.evaluation.likelihood import Score, score_targets
from patchkit.evaluation.studies import digest_of
from patchkit.repository import Repository

__all__ = ["cli", "git_environment", "home", "knowledge"]

LEBRON: dict[str, Any] = {
    "case_id": 1,
    "requested_rewrite": {
        "prompt": PLAYS,
        "relation_id": "P641",
        "subject": "LeBron James",
        "target_new": {"str": "football"},
        "target_true": {"str": "painter"},
    },
    "paraphrase_prompts": ["Rome lies in"],
    "neighborhood_prompts": ["Ann plays the sport of", "Rome plays the sport of"],
    "generation_prompts": ["LeBron James plays the"],
}
JAPAN = {"subject": "Japan", "prompt": PLAYS, "target": "dancers"}


@pytest.fixture
def records(home: Path) -> Path:
    return facts_file(home, LEBRON, JAPAN, name="records.jsonl")


def test_the_base_beside_the_stack(cli: Cli, knowledge: Path, records: Path) -> None:
    before = snapshot(knowledge)
    found = cli.ok("eval", records, "--json").json
    assert snapshot(knowledge) == before
    assert (found["cases"], found["a"]["name"], found["b"]["name"]) == (2, "base", "HEAD")
    assert (found["a"]["patches"], found["b"]["patches"]) == (0, 2)
    assert found["a"]["growth"] == 1.0 != found["b"]["growth"]
    assert found["b"]["commit"] == git(knowledge, "rev-parse", "HEAD")
    scores = found["scores"]
    assert scores["neighbours kept"]["a"]["value"] == 1.0
    assert not {"GE", "reverse says"} & scores.keys()
    rewrites = [("LeBron James plays the sport of", "football"), ("Japan plays the sport of", "dancers")]
    neighbours = LEBRON["neighborhood_prompts"]
    for side, revision in (("a", "HEAD~2"), ("b", "HEAD")):
        model, tokenizer = Repository.open(".").load(revision, "cpu")

        def ask(prompt: str, target: str, on: tuple[Any, Any] = (model, tokenizer)) -> Score:
            return score_targets(*on, [(prompt, target)])[0]

        hits = [ask(*pair) for pair in rewrites]
        prefers = hits[0].nll < ask(rewrites[0][0], "painter").nll
        again = ask("Rome lies in", "football").nll < ask("Rome lies in", "painter").nll
        spared = [ask(prompt, "painter").nll < ask(prompt, "football").nll for prompt in neighbours]
        said = continue_greedily(model, tokenizer, [prompt for prompt, _ in rewrites])
        right = [says(text, target) for text, (_, target) in zip(said, rewrites, strict=True)]
        wanted = {
            "ES": float(prefers),
            "PS": float(again),
            "NS": sum(spared) / 2,
            "rewrite argmax": sum(hit.argmax for hit in hits) / 2,
            "rewrite tokens": sum(hit.hits / hit.tokens for hit in hits) / 2,
            "rewrite says": sum(right) / 2,
            "neighbour argmax": sum(ask(prompt, "painter").argmax for prompt in neighbours) / 2,
        }
        assert {name: scores[name][side]["value"] for name in wanted} == pytest.approx(wanted)


def test_the_facts_in_force_are_asked_where_no_records_are_given(cli: Cli, knowledge: Path) -> None:
    found = cli.ok("eval", "--json").json
    assert found["source"] == "the facts in force at HEAD"
    assert found["cases"] == 2
    answers = cli.ok("ask", "LeBron James plays the sport of", "Microsoft lies in", "--json").json
    for side, name in (("a", "base"), ("b", "stack")):
        said = [
            says(answer[name]["text"], target)
            for answer, target in zip(answers, ("football", "Rome"), strict=True)
        ]
        assert found["scores"]["rewrite says"][side]["value"] == sum(said) / 2
    assert cli.ok("eval", "--compare", "HEAD", "base", "--json").json["cases"] == 2
    refused = cli("eval", "--compare", "base", "base")
    assert refused.code == 65
    assert refused.err == (
        "patchkit: the base has no facts in force; name a file of records or facts to ask about\n"
    )


def test_a_stack_beside_itself_differs_in_nothing(cli: Cli, knowledge: Path, records: Path) -> None:
    text = knowledge.parent / "text.txt"
    text.write_text("LeBron James plays the sport of basketball and football. Paris lies in France.")
    found = cli.ok("eval", records, "--compare", "HEAD", "HEAD", "--text", text, "--texts", "--json").json
    for score in found["scores"].values():
        assert score["a"] == score["b"]
        assert score["difference"]["value"] == 0.0
        assert {score["difference"]["low"], score["difference"]["high"]} <= {0.0, None}
    assert found["scores"]["GE"]["a"]["value"] >= 0
    assert found["text"]["mean"] == found["text"]["largest"] == 0.0
    assert found["text"]["perplexity_old"] == found["text"]["perplexity_new"]


def test_perplexity_is_that_of_the_model_itself(cli: Cli, knowledge: Path) -> None:
    words = "LeBron James plays the sport of basketball and football."
    text = knowledge.parent / "text.txt"
    text.write_text(words)
    found = cli.ok("eval", "--text", text, "--json").json["text"]
    for revision, name in (("HEAD~2", "perplexity_old"), ("HEAD", "perplexity_new")):
        model, tokenizer = Repository.open(".").load(revision, "cpu")
        ids = torch.tensor([tokenizer(words)["input_ids"]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        assert found[name] == pytest.approx(float(loss.exp()), rel=1e-4)


def test_a_sample_is_told_and_drawn_again_alike(cli: Cli, knowledge: Path, records: Path) -> None:
    one, again = (cli.ok("eval", records, "--sample", "1", "--seed", "3", "--json").json for _ in range(2))
    assert one == again
    assert (one["cases"], one["sample"], one["seed"]) == (1, 1, 3)
    both = cli.ok("eval", records, "--sample", "2", "--seed", "1", "--json").json
    assert sorted(both["order"]) == [0, 1]
    assert one["records"] == both["records"] == digest_of(read_cases(str(records)))
    asked = read_cases(str(records)).cases
    assert sampled(read_cases(str(records)), 2, 1).cases == tuple(asked[place] for place in both["order"])
    assert "1 fact of" in cli.ok("eval", records, "--sample", "1").out
    assert cli("eval", records, "--sample", "3").code == 65


def test_what_a_person_reads(cli: Cli, knowledge: Path, records: Path) -> None:
    out = cli.ok("eval", records).out
    heading, names, *_ = out.splitlines()
    assert heading == f"2 facts of {records}"
    assert names.split() == ["base", "HEAD", "HEAD", "−", "base"]
    scores = cli.ok("eval", records, "--json").json["scores"]
    score = scores["rewrite tokens"]
    (line,) = [line for line in out.splitlines() if line.startswith("rewrite tokens")]
    told = line.removeprefix("rewrite tokens").split()
    assert float(told[0]) == pytest.approx(100 * score["a"]["value"], abs=0.05)
    assert float(told[4]) == pytest.approx(100 * score["b"]["value"], abs=0.05)
    assert float(told[8]) == pytest.approx(100 * score["difference"]["value"], abs=0.05)
    (alone,) = [line for line in out.splitlines() if line.startswith("PS ")]
    assert " to " not in alone, "one fact alone has no interval"
    assert scores["PS"]["b"]["low"] is None
    assert printable(out.replace("\n", "")) == out.replace("\n", "")


def test_every_fact_is_told_for_a_program(cli: Cli, knowledge: Path, records: Path) -> None:
    found = cli.ok("eval", records, "--json").json
    assert found["failed"] == []
    first, second = found["facts"]
    assert (first["subject"], first["target"]) == ("LeBron James", "football")
    assert [each["prompt"] for each in first["b"]["neighbors"]] == LEBRON["neighborhood_prompts"]
    scores = found["scores"]
    for side in ("a", "b"):
        rewrites = [fact[side]["rewrite"] for fact in (first, second)]
        assert scores["rewrite says"][side]["value"] == sum(one["right"] for one in rewrites) / 2
        assert scores["rewrite argmax"][side]["value"] == sum(one["target"]["argmax"] for one in rewrites) / 2
        model, tokenizer = Repository.open(".").load("HEAD~2" if side == "a" else "HEAD", "cpu")
        (wanted,) = score_targets(model, tokenizer, [("LeBron James plays the sport of", "football")])
        assert rewrites[0]["target"]["probability"] == pytest.approx(wanted.probability, rel=1e-5)
        answers = [one["answer"]["argmax"] for one in first[side]["neighbors"]]
        assert scores["neighbour argmax"][side]["value"] == sum(answers) / 2
    assert second["a"]["rewrite"]["was"] is None


def test_a_gate_refuses_a_stack_after_all_is_shown(cli: Cli, knowledge: Path) -> None:
    said = cli.ok("eval", "--gate", "rewrite says=0,growth=1e6", "-q")
    assert said.out == ""
    refused = cli("eval", "--gate", "rewrite says=0.5,growth=1e6")
    assert refused.code == 3
    assert refused.err == "patchkit: the gate refused HEAD (rewrite says 0 < 0.5)\n"
    assert "rewrite says" in refused.out
    both = cli("eval", "--gate", "rewrite says=0.5", "--gate", "growth=1e6")
    assert (both.code, both.err) == (refused.code, refused.err)
    assert cli("eval", "--gate", "").code == 65, "an empty one is none by mistake"
    assert "write NAME=SHARE" in cli("eval", "--gate", "RS=0.5").err, "nobody lets the models write"
    told = cli("eval", "--gate", "PS=0.5,growth=1", "--json")
    assert told.code == 3
    growth = told.json["b"]["growth"]
    missing = "PS was not measured: the facts that were asked list none"
    assert told.json["failed"] == [missing, f"growth {growth:.4g} > 1"]


def test_facts_in_force_that_are_not_said_are_named(cli: Cli, knowledge: Path, records: Path) -> None:
    known = {"subject": "Ann", "prompt": PLAYS, "target": "basketball"}
    cli.ok("commit", facts_file(knowledge.parent, known, name="known.jsonl"), "--set", "steps=2", "-q")
    out = cli.ok("eval").out
    assert "HEAD does not say: LeBron James plays the sport of → football, but: painter" in out
    assert "HEAD does not say: Ann" not in out
    assert "does not say" not in cli.ok("eval", records).out


def test_a_share_of_no_ceiling_is_not_told(cli: Cli, knowledge: Path, records: Path) -> None:
    """Where the base prefers the old object after no neighbour."""
    wide = json.loads(records.read_text().splitlines()[0])
    shares = {}
    for new, old in (("football", "painter"), ("painter", "football")):
        for name, value in (("target_new", new), ("target_true", old)):
            wide["requested_rewrite"][name]["str"] = value
        wide["neighborhood_prompts"] = LEBRON["neighborhood_prompts"][:1]
        records.write_text(json.dumps(wide))
        out, found = cli.ok("eval", records).out, cli.ok("eval", records, "--json").json
        assert found["scores"]["NS"]["a"]["value"] in (0.0, 1.0)
        shares[found["scores"]["NS"]["a"]["value"]] = found["share_of_ceiling"]["value"]
        told = "of what the base's own NS lets it be" in out
        assert told == (found["share_of_ceiling"]["value"] is not None)
    assert shares[0.0] is None is not shares[1.0]


def test_a_narrow_terminal_shows_no_intervals_but_that_of_the_difference(
    cli: Cli, knowledge: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    *lines, warned = cli.ok("eval", records).out.splitlines()[1:]
    assert "forgets" in warned
    assert all(len(line) <= 80 for line in lines)
    assert all(line.count(" to ") <= 1 for line in lines[1:-1])
    assert sum(line.count(" to ") for line in lines) > 1


def test_a_collapsed_model_is_told_and_its_numbers_are_null(
    cli: Cli, knowledge: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Workbench.use

    def broken(bench: Workbench, weights: Mapping[str, torch.Tensor]) -> None:
        real(bench, {name: weight * float("nan") for name, weight in weights.items()})

    monkeypatch.setattr(Workbench, "use", broken)
    shutil.rmtree(knowledge / ".git" / "patchkit" / "answers")  # what the sound model said to the commits
    text = knowledge.parent / "text.txt"
    text.write_text("LeBron James plays the sport of basketball.")
    found = cli.ok("eval", records, "--text", text, "--json").json
    assert found["notes"][0] == "B gives no likelihood for 5 of 5 prompts: it has collapsed"
    assert found["scores"]["rewrite diff"]["b"]["value"] is None
    assert found["scores"]["rewrite diff"]["a"]["value"] is not None
    assert found["text"]["perplexity_new"] is None
    assert "collapsed" in cli.ok("eval", records).out


def test_the_commit_is_the_one_that_was_scored(cli: Cli, knowledge: Path) -> None:
    repository = Repository.open(knowledge)
    head = git(knowledge, "rev-parse", "HEAD")

    def meanwhile(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("asking", 3):
            git(knowledge, "commit", "-q", "--allow-empty", "-m", "Meanwhile")

    assert repository.evaluate(progress=meanwhile, device="cpu").sides[1].commit == head
    assert git(knowledge, "rev-parse", "HEAD") != head
    with pytest.raises(BadInput, match="negative"):
        repository.evaluate(seed=-1)
    assert cli("eval", "--seed", "-1").code == 2


def test_it_is_kept_in_the_catalogue(cli: Cli, knowledge: Path, records: Path) -> None:
    found = cli.ok("eval", records, "--json").json
    rows = cli.ok(
        "sql", "select dataset, tree, metrics from evaluations where tree is not null", "--json"
    ).json
    (row,) = rows if isinstance(rows, list) else rows["rows"]
    values = row if isinstance(row, list) else list(row.values())
    assert values[0] == str(records)
    assert values[1]
    assert json.loads(values[2]) == {name: found[name] for name in found if name not in ("facts", "failed")}
