"""`patchkit locate` on a tiny base that knows its facts: what is traced and left out, and the figures."""

from __future__ import annotations

import math
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_helpers import (
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
    snapshot,
)

from patchkit.errors import NotWritten
from patchkit.evaluation.tracing import CLASSES, KINDS
from patchkit.repository import Repository

__all__ = ["cli", "git_environment", "home", "knowledge"]

KNOWN = [
    {"subject": subject, "prompt": prompt, "target": said}
    for (subject, prompt), said in WORLD.items()
    if subject in ("Émile Zola", "Ann", "Microsoft") and prompt == LIES
]
FALSE = {"subject": "Japan", "prompt": PLAYS, "target": "Rome"}
EDITED = {"subject": "LeBron James", "prompt": PLAYS, "target": "football", "was": "painter"}
FEW = ("--samples", "2", "--window", "2")


@pytest.fixture
def facts(home: Path) -> Path:
    return facts_file(home, *KNOWN, FALSE)


def test_facts_that_the_base_says_are_traced(cli: Cli, knowledge: Path, facts: Path) -> None:
    before = snapshot(knowledge)
    found = cli.ok("locate", facts, *FEW, "--json").json
    assert snapshot(knowledge) == before
    assert [fact["object"] for fact in found["facts"]] == [fact["target"] for fact in KNOWN]
    assert found["left_out"] == ["Japan plays the sport of"]
    assert (found["layers"], found["samples"], found["window"], found["revision"]) == (4, 2, 2, "base")
    assert found["commit"] is None
    assert found["sigma"] > 0
    for fact in found["facts"]:
        assert fact["clean"] > 0.5
        assert 0 <= fact["corrupted"] < fact["clean"]
        assert np.array(fact["effects"]["mlp"]).shape == (len(fact["tokens"]), 4)
        assert fact["effects"]["hidden"][-1][-1] == pytest.approx(fact["clean"] - fact["corrupted"], abs=1e-5)
    total = [fact["clean"] - fact["corrupted"] for fact in found["facts"]]
    assert found["means"]["total"]["value"] == pytest.approx(sum(total) / 3)
    assert found["means"]["total"]["low"] <= sum(total) / 3 <= found["means"]["total"]["high"]


def test_averages_are_over_the_facts_that_have_such_tokens(cli: Cli, knowledge: Path, facts: Path) -> None:
    found = cli.ok("locate", facts, *FEW, "--json").json
    for kind in KINDS:
        by_class: dict[str, list[Any]] = {place: [] for place in CLASSES}
        for fact in found["facts"]:
            rows, subject = np.array(fact["effects"][kind]), fact["subject_tokens"]
            parts = {
                "first subject token": rows[:1] if subject > 1 else rows[:0],
                "middle subject tokens": rows[1 : subject - 1],
                "last subject token": rows[subject - 1 : subject],
                "first subsequent token": rows[subject : min(subject + 1, len(rows) - 1)],
                "further tokens": rows[subject + 1 : -1],
                "last token": rows[-1:],
            }
            for place, part in parts.items():
                by_class[place] += [part.mean(0)] if len(part) else []
        for place in CLASSES:
            told = found["effects"][kind][place]
            assert len(told) == 4
            for layer, one in enumerate(told):
                if not by_class[place]:
                    assert one == {"value": None, "low": None, "high": None}
                    continue
                mean = np.mean([row[layer] for row in by_class[place]])
                assert one["value"] == pytest.approx(mean, abs=1e-9)


def test_what_the_model_says_is_traced_whichever_of_the_two_it_is(
    cli: Cli, knowledge: Path, home: Path
) -> None:
    records = facts_file(home, EDITED, name="edited.jsonl")
    on_base = cli.ok("locate", records, *FEW, "--json").json
    on_stack = cli.ok("locate", records, *FEW, "--rev", "HEAD", "--json").json
    assert on_stack["commit"] == git(knowledge, "rev-parse", "HEAD")
    (answer,) = cli.ok("ask", "LeBron James plays the sport of", "--json").json
    for found, said in ((on_base, answer["base"]), (on_stack, answer["stack"])):
        (fact,) = found["facts"]
        assert fact["object"] == WORLD["LeBron James", PLAYS] == EDITED["was"]
        assert fact["clean"] == pytest.approx(said["next"][0][1], rel=1e-4)
    assert on_base["facts"][0]["clean"] != on_stack["facts"][0]["clean"]
    assert on_base["means"]["total"]["low"] is None, "one fact has no interval"


def test_a_sample_is_of_the_facts_that_are_said(cli: Cli, knowledge: Path, facts: Path) -> None:
    one, same, other = (
        cli.ok("locate", facts, *FEW, "--sample", "2", "--seed", seed, "--json").json for seed in "001"
    )
    assert one == same
    assert len(one["facts"]) == len(other["facts"]) == 2
    assert one["facts"] != other["facts"]
    more = cli.ok("locate", facts, *FEW, "--sample", "9", "--json").json
    assert len(more["facts"]) == 3
    assert more["notes"] == ["only 3 of the facts are said"]


def test_facts_of_rome_in_its_own_shape(cli: Cli, knowledge: Path, home: Path) -> None:
    raw = {"known_id": 1, "subject": "Ann", "attribute": WORLD["Ann", LIES], "template": "{} lies"}
    records = facts_file(home, {**raw, "prompt": "Ann lies in", "relation_id": "P1"}, name="known.jsonl")
    assert len(cli.ok("locate", records, *FEW, "--json").json["facts"]) == 1


def test_what_is_said_at_a_terminal(
    cli: Cli, knowledge: Path, facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cli.ok("locate", facts, *FEW, "--json").json
    monkeypatch.setenv("COLUMNS", "100")
    heading, total, names, *rows, left = cli.ok("locate", facts, *FEW).out.splitlines()
    assert heading == f"3 facts of {facts} on base, noise of 3 σ, 2 samples"
    assert f"{100 * found['means']['total']['value']:+.1f}" in total
    assert "MLPs (2 layers)" in names
    assert left == "1 fact left out: the model does not say the object"
    assert len(rows) == len(CLASSES)
    for place, line in zip(CLASSES, rows, strict=True):
        cells = line.removeprefix(place).replace(" at ", "@").split()
        for cell, kind in zip(cells, KINDS, strict=True):
            values = [each["value"] for each in found["effects"][kind][place]]
            if values[0] is None:
                assert cell == "–"
                continue
            best = max(values)
            assert cell == f"{100 * best:+.1f}@{values.index(best)}"
    monkeypatch.setenv("COLUMNS", "150")
    assert " to " in cli.ok("locate", facts, *FEW).out.splitlines()[3]
    monkeypatch.setenv("COLUMNS", "80")
    assert all(len(line) <= 80 for line in cli.ok("locate", facts, *FEW).out.splitlines()[2:])


@pytest.mark.parametrize("count", [1, 3])
def test_figures(cli: Cli, knowledge: Path, home: Path, count: int) -> None:
    from PIL import Image

    records = facts_file(home, *KNOWN[:count], name="some.jsonl")
    png, svg = home / "where.png", home / "where.svg"
    cli.ok("locate", records, *FEW, "--figure", png)
    with Image.open(png) as image:
        image.load()
        rows = (
            len(CLASSES)
            if count > 1
            else len(cli.ok("locate", records, *FEW, "--json").json["facts"][0]["tokens"])
        )
        width, height = (1.6 + 3 * 4.2) * 150, (1.6 + 0.26 * rows) * 150
        assert image.size == (math.floor(width), math.floor(height))
        shades = image.convert("RGB").getcolors(1 << 20)
        assert shades is not None
        assert len(shades) > 50, "an empty picture"
    cli.ok("locate", records, *FEW, "--figure", svg)
    root = ET.fromstring(svg.read_bytes())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    first = png.read_bytes(), svg.read_bytes()
    for path in (png, svg):
        cli.ok("locate", records, *FEW, "--figure", path)  # its own figure is written again
    assert (png.read_bytes(), svg.read_bytes()) == first


def test_a_figure_without_matplotlib(
    cli: Cli, knowledge: Path, facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = cli("locate", facts, "--figure", "where.png")
    assert (done.code, done.out) == (69, "")
    assert done.err.startswith("patchkit: figures are drawn by matplotlib, which cannot be imported")
    assert not Path("where.png").exists()
    cli.ok("locate", facts, *FEW)


def test_hostile_facts_are_one_line_each(cli: Cli, knowledge: Path, home: Path) -> None:
    only = facts_file(home, FALSE, name="false.jsonl")
    done = cli("locate", only, *FEW)
    assert (done.code, done.out) == (65, "")
    assert "base says the object of no fact (1 asked)" in done.err
    long = facts_file(home, {**KNOWN[0], "prompt": "painter " * 200 + "{} lies in"}, name="long.jsonl")
    done = cli("locate", long, *FEW)
    assert (done.code, done.out, len(done.err.splitlines())) == (65, "", 1)
    assert "tokens, but the model reads 128" in done.err
    joined = facts_file(home, {"subject": "Ann lie", "prompt": "{}", "target": "s"}, name="joined.jsonl")
    done = cli("locate", joined, *FEW)
    assert (done.code, done.out, len(done.err.splitlines())) == (65, "", 1)


def test_facts_that_cannot_be_traced_are_left_out_and_counted(
    cli: Cli, knowledge: Path, home: Path, facts: Path
) -> None:
    wrong = [
        {**KNOWN[0], "subject": "Ann lie", "prompt": "{}", "target": "s"},
        {**KNOWN[0], "prompt": "painter " * 200 + "{} lies in"},
        {**KNOWN[1], "was": "Rome " * 3},
    ]
    some = facts_file(home, *KNOWN[:1], *wrong, *KNOWN[2:], name="some.jsonl")
    found = cli.ok("locate", some, *FEW, "--json").json
    assert [fact["prompt"] for fact in found["facts"]] == [
        fact["prompt"].replace("{}", fact["subject"]) for fact in (*KNOWN[:1], wrong[2], *KNOWN[2:])
    ]
    assert len(found["left_out"]) == 2
    (note,) = found["notes"]
    assert note.startswith("1 of the targets cannot be traced; the first: fact 'Ann': 1008 tokens")


def test_a_figure_that_cannot_be_written_loses_no_numbers(
    cli: Cli, knowledge: Path, facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patchkit.evaluation import figures

    def full(*_: object) -> None:
        raise NotWritten("where.png: no space left on the device")

    monkeypatch.setattr(figures, "write_figure", full)
    done = cli("locate", facts, *FEW, "--figure", "where.png", "--json")
    assert (done.code, len(done.json["facts"])) == (74, 3)


def test_it_is_a_method_too(knowledge: Path, facts: Path) -> None:
    from patchkit.errors import BadInput
    from patchkit.evaluation.cases import read_cases

    cases, repository = read_cases(str(facts)), Repository.open(knowledge)
    for wrong in ({"samples": 0}, {"samples": 1001}, {"noise": -1.0}, {"noise": math.inf}, {"seed": -1}):
        with pytest.raises(BadInput):
            repository.locate(cases, device="cpu", **wrong)
    told: list[tuple[str, int, int]] = []
    repository.locate(
        cases, device="cpu", samples=1, progress=lambda phase, done, total: told.append((phase, done, total))
    )
    assert told[-1] == ("tracing", 36, 36)  # three facts, three kinds, four layers
