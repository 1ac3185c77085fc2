"""Sweeps: which trials, rows that survive a kill, and scores that are those of one edit made by hand."""

from __future__ import annotations

import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_helpers import RECIPE, Cli, Ran, cli, git_environment, home, set_recipe, snapshot, tiny_base
from markdown_it import MarkdownIt

from patchkit.actions import sweep as action
from patchkit.actions.sweep import _scores
from patchkit.actions.sweep_rows import Rows
from patchkit.editing import targets
from patchkit.editing.emmet import Emmet
from patchkit.editing.finetune import FineTune
from patchkit.errors import BadInput, Busy, WouldOverwrite
from patchkit.evaluation.cases import Case, Cases, Question, parse_cases
from patchkit.evaluation.metrics import METRICS, look, tally
from patchkit.evaluation.studies import UNEDITED, ZSRE, Asked, Trial, as_in_table_1, plan, pool, whole_of
from patchkit.evaluation.tables import csv_table, markdown_table
from patchkit.evaluation.voice import Loaded
from patchkit.fact import Fact
from patchkit.repository import Repository
from patchkit.settings import FILE

__all__ = ["cli", "git_environment", "home"]


def case(subject: str, target: str = "x", relation: str | None = None) -> Case:
    return Case(Fact(subject, "{} is", target, relation=relation))


MANY = [case(f"P{number}", relation="AB"[number % 2]) for number in range(20)]


def test_a_pool_holds_no_contradiction_and_smaller_batches_begin_larger_ones() -> None:
    twice = Cases("file", (*MANY, case("P3", "y", "B"), case("P4", "z", "A")))
    drawn = pool(twice, 7)
    assert drawn == pool(twice, 7) != pool(twice, 8)
    assert sorted(each.fact.subject for each in drawn) == sorted(each.fact.subject for each in MANY)
    trials = plan(Asked("scaling", ("memit", "ft"), (10, 1, 3)), drawn, "file")
    assert [(each.count, each.method) for each in trials] == [
        (count, method) for count in (1, 3, 10) for method in (UNEDITED, "memit", "ft")
    ]
    for each in trials:
        assert each.cases == tuple(range(each.count))


def test_groups_are_of_one_relation_and_a_mixture_takes_turns() -> None:
    trials = plan(Asked("relations", ("memit",), (4,)), MANY, "file")
    assert [each.group for each in trials] == ["A", "A", "B", "B"]
    for each in trials:
        assert {MANY[place].fact.relation for place in each.cases} == {each.group}
        assert len(each.cases) == 4
    mixed = plan(Asked("mixtures", ("memit",), (6,)), MANY, "file")
    assert [each.group for each in mixed] == ["A", "A", "B", "B", "A + B", "A + B"]
    assert [MANY[place].fact.relation for place in mixed[-1].cases] == ["A", "B"] * 3
    assert set(mixed[-1].cases[::2]) == set(mixed[0].cases[:3])
    varied = plan(Asked("tradeoff", ("memit",), (2,), lambdas=(2.0, 1.0)), MANY, "file")
    assert [each.lambda_ for each in varied] == [None, 1.0, 2.0]


def test_an_old_object_that_is_a_neighbours_answer_makes_no_counterfact_of_zsre() -> None:
    """It gives a batch that holds such a fact an S; the sweep's scores are those that all its rows have."""
    zsre = {"tokens S": 1, "rewrite tokens": 1, "paraphrase tokens": 1, "neighbour tokens": 1}
    counterfact = {"S": 1, "ES": 1, "PS": 1, "NS": 1}
    assert whole_of([{"scores": zsre}, {"scores": {**zsre, **counterfact}}]) == tuple(zsre)
    assert whole_of([{"scores": counterfact}, {"scores": {"ES": 1, "PS": 1}}]) == tuple(counterfact)
    assert whole_of([{"scores": {**counterfact, **zsre}}] * 2) == tuple(counterfact)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (Asked("scaling", ("memit",), (21,)), "holds 20 facts that do not contradict one another, so 21"),
        (
            Asked("relations", ("memit",), (11,)),
            "holds 10 facts of A that do not contradict",
        ),
        (Asked("relations", ("memit",), None, ("C",)), "no fact has the relation 'C'; the largest is 'A'"),
        (Asked("mixtures", ("memit",), None, ("A",)), "two relations; 1 were named"),
        (Asked("scaling", ("memit",), lambdas=(1.0,)), "varies no λ"),
        (Asked("scaling", ("memit",), relations=("A",)), "leave out --relations"),
        (Asked("counterfact", ("memit",)), "has no paraphrases"),
    ],
)
def test_what_cannot_be_planned_is_said(asked: Asked, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        plan(asked, MANY, "file")


ROW = {
    "method": "memit",
    "group": "all",
    "count": 1,
    "lambda": None,
    "asked": 1,
    "perplexity": 1.0,
    "growth": 1.0,
    "scores": {},
}


def test_a_folder_is_of_one_sweep_and_one_process(tmp_path: Path) -> None:
    with Rows.open(tmp_path / "s", {"seed": 0}) as rows:
        rows.add(ROW)
        with pytest.raises(Busy, match="another sweep"), Rows.open(tmp_path / "s", {"seed": 0}):
            pass
    path = tmp_path / "s" / "rows.jsonl"
    whole = path.read_bytes()
    with (
        pytest.raises(WouldOverwrite, match=r"other settings \(seed\)"),
        Rows.open(tmp_path / "s", {"seed": 1}),
    ):
        pass
    path.write_bytes(whole + b'{"method": "cut o')
    with Rows.open(tmp_path / "s", {"seed": 0}) as rows:
        assert list(rows.by_key.values()) == [ROW]
    assert path.read_bytes() == whole
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(BadInput, match=r"rows\.jsonl:1: is no row"), Rows.open(tmp_path / "s", {"seed": 0}):
        pass
    for damaged in ({**ROW, "scores": {"S": [0.5]}}, {**ROW, "scores": []}):
        path.write_bytes(json.dumps(damaged).encode() + b"\n")
        with pytest.raises(BadInput, match="is no row"), Rows.open(tmp_path / "s", {"seed": 0}):
            pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(WouldOverwrite, match="no sweep's"), Rows.open(tmp_path / "mine", {}):
        pass
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]
    (tmp_path / "s" / "sweep.json").unlink()
    with pytest.raises(WouldOverwrite, match="no sweep's"), Rows.open(tmp_path / "s", {"seed": 0}):
        pass
    path.write_bytes(b"")  # killed before the settings were written
    (tmp_path / "s" / ".patchkit-0.tmp").write_bytes(b"{")  # or while they were
    with Rows.open(tmp_path / "s", {"seed": 0}) as rows:
        assert rows.by_key == {}


ASKED = {
    "seed": 0,
    "methods": ["memit"],
    "counts": [1, 4],
    "groups": ["all"],
    "lambdas": [],
    "recipes": {"memit": {"layers": [3]}},
}


def test_a_folder_names_all_that_was_asked_of_it(tmp_path: Path) -> None:
    """And keeps the recipes of rows that a command does not ask for, since those stay."""
    with Rows.open(tmp_path, ASKED) as rows:
        rows.add(ROW)
        assert rows.whole
    other = {**ASKED, "methods": ["ft"], "counts": [2], "recipes": {"ft": {"layers": [1]}}}
    with Rows.open(tmp_path, other) as rows:
        assert list(rows.by_key.values()) == [ROW]
        assert not rows.whole
    both = json.loads((tmp_path / "sweep.json").read_text())
    assert (both["methods"], both["counts"]) == (["memit", "ft"], [1, 2, 4])
    assert both["recipes"] == {"memit": {"layers": [3]}, "ft": {"layers": [1]}}
    with Rows.open(tmp_path, both) as rows:
        assert rows.whole
    before = (tmp_path / "sweep.json").read_bytes()
    for changed, says in (
        ({"recipes": {"memit": {"layers": [4]}}}, "the recipe of memit"),
        ({"seed": 1, "sample": 3}, "sample, seed"),
    ):
        refused = pytest.raises(WouldOverwrite, match=rf"other settings \({says}\)")
        with refused, Rows.open(tmp_path, {**other, **changed}):
            pass
    large = {**ASKED, "counts": [500], "many": {"facts": 500}}
    with Rows.open(tmp_path, large) as rows:  # rows of few facts have no recipe of many
        assert list(rows.by_key.values()) == [ROW]
    with Rows.open(tmp_path, ASKED):
        assert json.loads((tmp_path / "sweep.json").read_text())["many"] == large["many"]
    refused = pytest.raises(WouldOverwrite, match=r"other settings \(many\)")
    with refused, Rows.open(tmp_path, {**large, "many": {"facts": 400}}):
        pass
    with Rows.open(tmp_path, {**large, "large": [["memit", 500]]}) as rows:
        rows.add({**ROW, "count": 500})
    for now, name in (({"large": [["memit", 1], ["memit", 500]]}, "1"), ({"large": []}, "500")):
        refused = pytest.raises(WouldOverwrite, match=rf"\(the recipe of memit for {name} facts\)")
        with refused, Rows.open(tmp_path, {**large, "counts": [1, 500], **now}):
            pass
    with Rows.open(tmp_path, {**large, "counts": [700], "large": [["memit", 700]]}) as rows:
        assert len(rows.by_key) == 2
    assert json.loads((tmp_path / "sweep.json").read_text())["large"] == [["memit", 500], ["memit", 700]]
    (tmp_path / "sweep.json").write_bytes(before.replace(b'"counts": [', b'"counts": [{},'))
    with pytest.raises(BadInput, match=r"sweep\.json: cannot be read"), Rows.open(tmp_path, ASKED):
        pass


def test_tables_by_hand() -> None:
    scores = {"S": [0.5, 0.25, 0.75], "ES": [1.0, None, None], "GE": [5.5, 5.0, 6.0]}
    rows = [
        {**ROW, "method": UNEDITED},
        {**ROW, "lambda": 30.0, "perplexity": None, "growth": 1.5, "scores": scores},
        {**ROW, "perplexity": 1.25, "perplexity_low": 1.125, "perplexity_high": 1.5},
        {**ROW, "perplexity_low": 1.0, "perplexity_high": 1.0},
    ]
    assert markdown_table(rows).decode().splitlines() == [
        "| editor | facts | λ | S | ES | GE | perplexity, times | ‖W + ΔW‖ / ‖W‖ |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| unedited | 1 | – | – | – | – | 1.000 | 1.000 |",
        "| memit | 1 | 30 | 50.0 (25.0 to 75.0) | 100.0 | 5.5 (5.0 to 6.0) | – | 1.500 |",
        "| memit | 1 | – | – | – | – | 1.250 (1.125 to 1.500) | 1.000 |",
        "| memit | 1 | – | – | – | – | 1.000 | 1.000 |",
    ]
    (wrecked,) = markdown_table(
        [{**ROW, "perplexity": 1.5e10, "perplexity_low": 999.0, "perplexity_high": 1e11}]
    ).splitlines()[2:]
    assert "| 1.50e+10 (999.000 to 1.00e+11) |" in wrecked.decode()
    head, first, second, third, _ = csv_table(rows).decode().splitlines()
    assert head.startswith(
        "editor,facts,group,lambda,asked,perplexity,perplexity low,perplexity high,growth,S,S low,S high,ES"
    )
    assert first == "unedited,1,all,,1,1.0,,,1.0,,,,,,,,,"
    assert second == "memit,1,all,30.0,1,,,,1.5,50.0,25.0,75.0,100.0,,,5.5,5.0,6.0"
    assert third == "memit,1,all,,1,1.25,1.125,1.5,1.0,,,,,,,,,"


def test_names_of_relations_are_no_markup_and_no_formula() -> None:
    row = {**ROW, "group": "=HYPERLINK(1)|<b>", "scores": {"S": [0.5, None, None]}}
    rows = [row, {**row, "method": "ft", "group": "P1"}]
    assert "| =HYPERLINK(1)\\|&lt;b> |" in markdown_table(rows).decode()
    assert ",'=HYPERLINK(1)|<b>," in csv_table(rows).decode()


@pytest.mark.parametrize(
    "name", ["![x](https://evil)", "[a](b)", "**P27**", "`P27`", "a\\|b", "_a_", "me@evil"]
)
def test_a_relation_is_shown_by_a_markdown_table_as_it_is(name: str) -> None:
    rows = [{**ROW, "group": name, "scores": {}}, {**ROW, "group": "P1", "scores": {}}]
    page = MarkdownIt("gfm-like", {"linkify": False}).render(markdown_table(rows).decode())
    first = page.split("<tr>")[2]
    assert f"<td>{name}</td>" in first
    assert first.count("<td>") == page.split("<tr>")[1].count("<th>")


def rows_of(scores: tuple[str, ...], **fields: list[Any]) -> list[dict[str, Any]]:
    """A row for each combination, with made-up scores that differ."""
    found: list[dict[str, Any]] = [{**ROW, "scores": {}}]
    for name, values in fields.items():
        found = [{**row, name: value} for row in found for value in values]
    for place, row in enumerate(found):
        for number, score in enumerate(scores):
            value = (7 * place + 13 * number) % 90 / 100
            row["scores"] = {
                **row["scores"],
                score: [value, value - 0.05 if place % 2 else None, value + 0.05],
            }
    return found


METHODS = [UNEDITED, "memit", "ft"]
COUNTERFACT = ("S", "ES", "PS", "NS", "rewrite says")
FIGURES = {
    "scaling": (rows_of(COUNTERFACT, count=[1, 10, 100], method=METHODS), 6),
    "counterfact": (rows_of(COUNTERFACT, method=METHODS), 1),
    "zsre": (rows_of(("tokens S", "rewrite tokens", "paraphrase tokens"), method=METHODS), 1),
    "relations": (rows_of(COUNTERFACT, group=["P1", "P2", "P3"], method=METHODS), 1),
    "tradeoff": (
        [
            *rows_of(COUNTERFACT, method=[UNEDITED]),
            *rows_of(COUNTERFACT, method=METHODS[1:], **{"lambda": [1.0, 10.0]}),
        ],
        2,
    ),
    "mixtures": (rows_of(COUNTERFACT, count=[2, 4], group=["A", "B", "A + B"], method=METHODS), 2),
}


@pytest.mark.parametrize("study", list(FIGURES))
def test_figures_show_their_rows(study: str) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    from patchkit.evaluation.curves import draw, figure_of

    rows, panels = FIGURES[study]
    made = draw(study, rows)
    picture = np.asarray(Image.open(io.BytesIO(made["png"])).convert("RGB"))
    assert picture.shape[0] > 350
    assert picture.shape[1] > 700
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20, "blank"
    assert made["svg"].startswith(b"<?xml")
    assert study != "zsre" or draw(study, rows) == made, "the same bytes from the same rows"
    figure = figure_of(study, rows)
    assert len(figure.axes) == panels
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == (["A", "B", "A + B", "mean of the two"] if study == "mixtures" else METHODS)
    if study == "scaling":
        axes = figure.axes[0]
        line = axes.containers[1].lines[0]
        own = [row for row in rows if row["method"] == "memit"]
        assert list(line.get_xdata()) == [1, 10, 100]
        assert list(line.get_ydata()) == pytest.approx([100 * row["scores"]["S"][0] for row in own])
    if study == "tradeoff":
        general, special = figure.axes[1].containers[:2]  # memit's
        own = [row for row in rows if row["method"] == "memit"]
        for score, line in (("PS", general.lines[0]), ("NS", special.lines[0])):
            assert list(line.get_xdata()) == [1, 10]
            assert list(line.get_ydata()) == pytest.approx([100 * row["scores"][score][0] for row in own])


@pytest.mark.parametrize(
    ("study", "fields"),
    [
        ("tradeoff", {"count": [2, 5], "lambda": [1.0]}),
        ("relations", {"group": ["P1", "P2"], "count": [2, 5]}),
    ],
)
def test_an_editor_without_rows_at_one_count_is_drawn_elsewhere(
    study: str, fields: dict[str, list[Any]]
) -> None:
    """Where its edit failed; also where that is the first panel, whose names were the legend's."""
    pytest.importorskip("matplotlib")
    from patchkit.evaluation.curves import draw, figure_of

    rows = rows_of(COUNTERFACT, method=METHODS, **fields)
    for count, legend in ((2, METHODS), (5, METHODS if study == "tradeoff" else [UNEDITED, "ft"])):
        there = [row for row in rows if (row["method"], row["count"]) != ("memit", count)]
        assert draw(study, there)["png"]
        names = [text.get_text() for text in figure_of(study, there).legends[0].get_texts()]
        assert sorted(names) == sorted(legend)


@pytest.mark.parametrize("study", ["relations", "mixtures"])
def test_names_of_relations_are_drawn_as_they_are(study: str) -> None:
    """What matplotlib reads as broken mathematics or leaves out of a legend, and letters that no font has."""
    pytest.importorskip("matplotlib")
    from patchkit.evaluation.curves import draw, figure_of

    names = ["$a_{$", "_hidden", "\ue000"]
    rows = rows_of(COUNTERFACT, group=names, count=[2], method=METHODS)
    with warnings.catch_warnings(action="error"):
        assert draw(study, rows)["svg"].startswith(b"<?xml")
    (legend,) = figure_of(study, rows).legends
    shown = [text.get_text().strip() for text in legend.get_texts()]
    assert study != "mixtures" or set(names) < set(shown)


@pytest.mark.parametrize(
    "names", [["play(P136|P1303|P413|P641)", "maker(P176|P178|P127)"], ["a" * 300, "b" * 300]]
)
def test_long_names_of_relations_leave_room(names: list[str]) -> None:
    """No legend reaches out of its figure, and no name takes the place of what it names."""
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from patchkit.evaluation.curves import figure_of

    for study, groups in (("mixtures", [*names, " + ".join(names)]), ("relations", names)):
        figure = figure_of(study, rows_of(COUNTERFACT, group=groups, count=[2, 4], method=METHODS))
        FigureCanvasAgg(figure).draw()
        legend, whole = figure.legends[0].get_window_extent(), figure.bbox
        assert whole.x0 <= legend.x0 < legend.x1 <= whole.x1
        assert all(axes.get_window_extent().width > whole.width / 4 for axes in figure.axes)


# On a tiny model


RECORDS: list[dict[str, Any]] = [
    {
        "case_id": number,
        "requested_rewrite": {
            "prompt": "{} plays the sport of",
            "relation_id": "P641" if number % 2 else "P1",
            "subject": subject,
            "target_new": {"str": new},
            "target_true": {"str": old},
        },
        "paraphrase_prompts": [f"Because {subject} plays the sport of"],
        "neighborhood_prompts": ["Rome plays the sport of"],
        "generation_prompts": [f"{subject} plays the"],
    }
    for number, (subject, new, old) in enumerate(
        [
            ("Ann", "football", "basketball"),
            ("Paris", "painter", "football"),
            ("LeBron James", "dancers", "painter"),
            ("Microsoft", "basketball", "dancers"),
        ]
    )
]


@pytest.fixture
def base(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("matplotlib")
    cli.ok("init", tiny_base(), "kb")
    set_recipe(home / "kb", RECIPE)
    (home / "records.json").write_text(json.dumps(RECORDS))
    monkeypatch.chdir(home)
    return home / "kb"


def run(cli: Cli, *options: str) -> Ran:
    return cli.ok("eval", "sweep", "-C", "kb", *options)


def test_a_sweep_that_was_killed_goes_on_to_the_same_bytes(
    cli: Cli, base: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(base)
    ask = ("tradeoff", "--records", "records.json", "--methods", "memit", "--counts", "3")
    ask = (*ask, "--lambdas", "1,3,9")
    whole = run(cli, *ask, "--out", "whole", "--json").json
    assert snapshot(base) == before, "nothing is committed"
    assert [row["lambda"] for row in whole["rows"]] == [None, 1.0, 3.0, 9.0]
    real, made = action._Bench.row, []

    def row(bench: Any, trial: Trial, trials: Any) -> dict[str, Any]:
        if len(made) in (2, 3):  # killed twice, each time before a row
            made.append("killed")
            raise KeyboardInterrupt
        made.append(trial.key)
        return real(bench, trial, trials)

    monkeypatch.setattr(action._Bench, "row", row)
    stopped = cli("eval", "sweep", "-C", "kb", *ask, "--out", "parts", "-q")
    assert (stopped.code, stopped.out) == (130, "")
    assert stopped.err.splitlines()[-1] == (
        "patchkit: interrupted; the same command goes on with the rows that parts lacks"
    )
    assert not (home / "parts" / "table.md").exists()
    with open(home / "parts" / "rows.jsonl", "ab") as file:
        file.write(b'{"method": "memit", "cou')
    assert cli("eval", "sweep", "-C", "kb", *ask, "--out", "parts").code == 130
    run(cli, *ask, "--out", "parts", "-q")
    files = sorted(path.name for path in (home / "whole").iterdir())
    assert {"rows.jsonl", "table.md", "table.csv", "table.json", "figure.png", "figure.svg"} < set(files)
    for name in files:
        assert (home / "parts" / name).read_bytes() == (home / "whole" / name).read_bytes(), name
    rows = (home / "parts" / "rows.jsonl").read_bytes()
    again = len(made)
    run(cli, *ask, "--out", "parts", "-q")
    assert (len(made), (home / "parts" / "rows.jsonl").read_bytes()) == (again, rows)
    refused = cli("eval", "sweep", "-C", "kb", *ask, "--out", "parts", "--seed", "1")
    assert refused.code == 73
    assert "other settings" in refused.err
    assert (home / "parts" / "rows.jsonl").read_bytes() == rows


def test_a_sweep_that_asks_for_more_makes_what_is_missing(
    cli: Cli, base: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = action._Bench.row, []

    def row(bench: Any, trial: Trial, trials: Any) -> dict[str, Any]:
        made.append((trial.method, trial.count))
        return real(bench, trial, trials)

    monkeypatch.setattr(action._Bench, "row", row)
    ask = ("counterfact", "--records", "records.json", "--sample", "2", "-q")
    small, large = (
        ("--methods", "memit", "--counts", "1,2"),
        ("--methods", "memit,emmet", "--counts", "1,2,4"),
    )
    run(cli, *ask, *small, "--out", "s")
    before, table = ((home / "s" / name).read_bytes() for name in ("rows.jsonl", "table.json"))
    made.clear()
    run(cli, *ask, *large, "--out", "s")
    assert made == [("emmet", 1), ("emmet", 2), (UNEDITED, 4), ("memit", 4), ("emmet", 4)]
    rows = (home / "s" / "rows.jsonl").read_bytes()
    assert rows.startswith(before)
    run(cli, *ask, *large, "--out", "at once")
    for name in ("sweep.json", "table.md", "table.csv", "table.json", "figure.png", "figure.svg"):
        assert (home / "s" / name).read_bytes() == (home / "at once" / name).read_bytes(), name
    made.clear()
    run(cli, *ask, *small, "--out", "s")
    assert not made
    assert (home / "s" / "rows.jsonl").read_bytes() == rows, "what is not asked for stays"
    assert (home / "s" / "table.json").read_bytes() == table, "and is not shown"
    set_recipe(base, RECIPE.replace("steps = 20", "steps = 19"))
    refused = cli("eval", "sweep", "-C", "kb", *ask, *large, "--out", "s")
    assert refused.code == 73
    assert "the recipe of memit" in refused.err
    assert (home / "s" / "rows.jsonl").read_bytes() == rows


def test_what_an_unfinished_sweep_found_outlives_a_smaller_one(
    cli: Cli, base: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = action._Bench.row

    def killed(bench: Any, trial: Trial, trials: Any) -> dict[str, Any]:
        found = real(bench, trial, trials)
        if trial.count == 4 and trial.method == "memit":
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(action._Bench, "row", killed)
    ask = ("counterfact", "--records", "records.json", "--methods", "memit", "--out", "s", "-q")
    assert cli("eval", "sweep", "-C", "kb", *ask, "--counts", "1,4").code == 130
    kept = sorted((home / "s" / "targets").iterdir())
    run(cli, *ask, "--counts", "1")
    assert kept
    assert sorted((home / "s" / "targets").iterdir()) == kept
    monkeypatch.setattr(action._Bench, "row", real)
    run(cli, *ask, "--counts", "1,4")
    assert not (home / "s" / "targets").exists()


def test_a_trial_is_scored_as_an_edit_made_by_hand(cli: Cli, base: Path, home: Path) -> None:
    set_recipe(base, f"{RECIPE}[recipe.many]\nfacts = 4\nlambda = 0.5\n")
    done = run(
        cli, "scaling", "--records", "records.json", "--methods", "memit,ft", "--counts", "1,4", "--out", "s",
        "--sample", "2", "--texts", "--json",
    ).json  # fmt: skip
    cases = parse_cases(json.dumps(RECORDS).encode(), "records.json")
    drawn = pool(cases, 0)
    repository = Repository.open(base)
    plain = look(Loaded(*repository.load("HEAD", "cpu")), drawn[:2], texts=True)
    for method in ("memit", "ft"):
        facts = [each.fact for each in drawn]
        made = repository.commit(facts, overrides={"method": method}, device="cpu")
        assert made.patch.recipe.get("lambda") == (0.5 if method == "memit" else None)
        said = f"4 facts in one batch were edited with λ 0.5 ([recipe.many] of {FILE})"
        assert (said in made.notes) == (method == "memit")
        harm = made.harm[1]
        seen = look(Loaded(*repository.load("HEAD", "cpu")), drawn[:2], texts=True)
        (row,) = [row for row in done["rows"] if (row["method"], row["count"]) == (method, 4)]
        assert row["asked"] == 2
        assert row["growth"] == pytest.approx(harm.growth, rel=1e-9) != 1
        assert row["perplexity"] == pytest.approx(harm.rise, rel=1e-6) != 1
        bounds = harm.reading.times(harm.of_base)
        assert row["perplexity_low"] == pytest.approx(bounds.low, rel=1e-6) != row["perplexity"]
        assert row["perplexity_high"] == pytest.approx(bounds.high, rel=1e-6) != row["perplexity"]
        sums = tally(seen, plain).sum(0)
        for name in (
            "ES",
            "PS",
            "NS",
            "rewrite argmax",
            "rewrite says",
            "neighbour says",
            "neighbours kept",
            "GE",
        ):
            at = list(action.METRICS).index(name)
            assert row["scores"][name][0] == pytest.approx(sums[at, 0] / sums[at, 1]), name
        parts = [row["scores"][name][0] for name in ("ES", "PS", "NS")]
        harmonic = 3 / sum(1 / part for part in parts) if all(parts) else 0.0
        assert row["scores"]["S"][0] == pytest.approx(harmonic)
        repository.revert()
    shown = run(
        cli, "scaling", "--records", "records.json", "--methods", "memit,ft", "--counts", "1,4", "--out", "s",
        "--sample", "2", "--texts",
    ).out  # fmt: skip
    assert shown.splitlines()[0].split()[:6] == ["editor", "facts", "S", "ES", "PS", "NS"]
    assert "figure.svg" in shown.splitlines()[-1]


def test_a_sweep_knows_the_text_behind_a_files_name(cli: Cli, base: Path, home: Path) -> None:
    text = home / "texts.txt"
    text.write_text("Some words about a town and its people.\n" * 400)
    set_recipe(base, f'{RECIPE}statistics_text = "{text}"\n')
    ask = (
        "eval",
        "sweep",
        "-C",
        "kb",
        "scaling",
        "--records",
        "records.json",
        "--methods",
        "memit",
        "--out",
        "t",
    )
    cli.ok(*ask, "--counts", "1")
    cli.ok(*ask, "--counts", "1,2")
    text.write_text("Other words.\n" * 900)
    told = cli(*ask, "--counts", "1,2,4")
    assert told.code == 73
    assert "other settings (the recipe of memit)" in told.err


def test_targets_are_sought_once_whatever_is_solved_from_them(
    cli: Cli, base: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a run that goes on where one was killed between search and solve."""
    real, sought = targets._optimise, []

    def optimise(*given: Any) -> Any:
        sought.append(len(given[2]))
        return real(*given)

    monkeypatch.setattr(targets, "_optimise", optimise)
    ask = ("scaling", "--records", "records.json", "--counts", "2,4")
    apart = [run(cli, *ask, "--methods", name, "--out", name, "--json").json for name in ("memit", "emmet")]
    assert sum(sought) == 2 * (2 + 4)
    solve = Emmet.terms

    def killed(*given: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Emmet, "terms", killed)
    assert cli("eval", "sweep", "-C", "kb", *ask, "--methods", "emmet,memit", "--out", "both").code == 130
    monkeypatch.setattr(Emmet, "terms", solve)
    sought.clear()
    both = run(cli, *ask, "--methods", "emmet,memit", "--out", "both", "--json").json
    assert sum(sought) == 4, "the first two were found before"
    for rows in (one["rows"] for one in apart):
        assert [row for row in both["rows"] if row["method"] == rows[-1]["method"]] == rows[1::2]
    assert not (home / "both" / "targets").exists()


def test_an_edit_that_fails_is_told_and_the_others_are_made(
    cli: Cli, base: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FineTune.update

    def fail(editor: FineTune, task: Any) -> Any:
        raise BadInput("diverged")

    monkeypatch.setattr(FineTune, "update", fail)
    ask = ("counterfact", "--records", "records.json", "--methods", "ft,memit", "--counts", "1")
    done = cli("eval", "sweep", "-C", "kb", *ask, "--json")
    assert done.code == 65
    assert done.err == "patchkit: ft, 1 fact of all: diverged\n"
    assert [row["method"] for row in done.json["rows"]] == [UNEDITED, "memit"]
    assert done.json["failed"] == ["ft, 1 fact of all: diverged"]
    quiet = cli("eval", "sweep", "-C", "kb", *ask, "-q")
    assert (quiet.code, quiet.out, quiet.err) == (65, "", done.err)
    monkeypatch.setattr(FineTune, "update", real)
    again = run(cli, *ask, "--json").json
    assert [row["method"] for row in again["rows"]] == [UNEDITED, "ft", "memit"]
    assert again["failed"] == []


def test_too_little_memory_for_one_editor_ends_that_editor(
    cli: Cli, base: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the folder goes on with smaller batches, which change no score."""
    real = FineTune.update

    def fail(editor: FineTune, task: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA")

    monkeypatch.setattr(FineTune, "update", fail)
    ask = ("counterfact", "--records", "records.json", "--methods", "ft,memit", "--counts", "1")
    done = cli("eval", "sweep", "-C", "kb", *ask, "--json")
    assert done.code == 65
    assert done.json["failed"] == ["ft, 1 fact of all: the device has too little memory for it"]
    assert [row["method"] for row in done.json["rows"]] == [UNEDITED, "memit"]
    monkeypatch.setattr(FineTune, "update", real)
    again = run(cli, *ask, "--batch-size", "1", "--json").json
    assert [row["method"] for row in again["rows"]] == [UNEDITED, "ft", "memit"]


def test_an_odd_neighbour_of_zsre_gives_no_s() -> None:
    """Of two facts' neighbours one has the old object for its right answer: NS would be of it alone."""
    counts = np.zeros((2, len(METRICS), 2))
    asked = ["ES", "PS", *ZSRE[1:]]
    for name in asked:
        counts[:, list(METRICS).index(name)] = (1.0, 1.0)
    counts[0, list(METRICS).index("NS")] = (1.0, 1.0)
    assert {"S", "NS"} & _scores(counts, counts, 0).keys() == set()
    counts[1, list(METRICS).index("NS")] = (1.0, 1.0)
    assert {"S", "NS", ZSRE[0]} <= _scores(counts, counts, 0).keys()


def test_facts_without_neighbours_show_what_they_have() -> None:
    assert whole_of([{"scores": {"ES": 1, "PS": 1, "rewrite tokens": 1}}]) == ("ES", "PS")


def test_each_edit_that_fails_is_told(
    cli: Cli, base: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(editor: FineTune, task: Any) -> Any:
        raise BadInput("a: diverged\nb: diverged")

    monkeypatch.setattr(FineTune, "update", fail)
    options = ("--records", "records.json", "--methods", "ft", "--counts", "1,2", "--out", "s", "-q")
    for study, groups, shown in (("counterfact", ["all"], True), ("mixtures", ["P1", "P641"], False)):
        done = cli("eval", "sweep", study, "-C", "kb", *options, "--out", study)
        lines = done.err.splitlines()
        assert (done.code, done.out) == (65, "")
        for group in groups:
            assert f"patchkit: ft, 1 fact of {group}: a: diverged; b: diverged" in lines
            assert f"patchkit: ft, 2 facts of {group}: a: diverged; b: diverged" in lines
        rows = (home / study / "rows.jsonl").read_text().splitlines()
        assert {json.loads(row)["method"] for row in rows} == {UNEDITED}
        assert (home / study / "figure.png").exists() == shown


def test_zsre_is_edited_as_in_the_papers_table(home: Path) -> None:
    fact = Fact("Ann", "{} was born in", "Paris", was="Rome", neighbors=("who won", "what is it?"))
    hop = Question("The capital of Ann's country of birth is", ("Paris",))
    (case,) = as_in_table_1(Cases("x", (Case(fact, (("a",), ("b",)), portability=(hop,)),))).cases
    assert (case.fact.target, case.fact.was) == ("Rome", None)
    assert case.fact.neighbors == ("who won?", "what is it?")
    assert case.answers == (("a",), ("b",))
    assert not case.portability, "it follows from what is not edited in"


def test_zsres_score_is_the_mean_of_its_three(cli: Cli, base: Path, home: Path) -> None:
    zsre = [
        {"subject": name, "src": f"{name} plays the sport of", "rephrase": f"Because {name} plays",
         "alt": "football", "answers": ["painter"], "loc": "Rome plays the sport of", "loc_ans": "dancers"}
        for name in ("Ann", "Paris", "Microsoft")
    ]  # fmt: skip
    (home / "zsre.json").write_text(json.dumps(zsre))
    done = run(cli, "zsre", "--records", "zsre.json", "--methods", "memit", "--out", "z", "--json").json
    row = done["rows"][-1]
    assert row["count"] == 3, "as many as there are, where the study's own number is larger"
    three = [row["scores"][f"{name} tokens"][0] for name in ("rewrite", "paraphrase", "neighbour")]
    assert row["scores"]["tokens S"][0] == pytest.approx(3 / sum(1 / v for v in three) if all(three) else 0)
    assert (
        (home / "z" / "table.md")
        .read_text()
        .startswith("| editor | facts | score | efficacy | paraphrase | specificity |")
    )


def test_studies_over_relations_run(cli: Cli, base: Path, home: Path) -> None:
    for study, groups in (("relations", ["P1", "P641"]), ("mixtures", ["P1", "P641", "P1 + P641"])):
        options = ("--records", "records.json", "--methods", "ft", "--counts", "2", "--out", study, "--json")
        done = run(cli, study, *options)
        assert [row["group"] for row in done.json["rows"] if row["method"] == "ft"] == groups


def test_wrong_use_is_one_line_and_leaves_nothing(cli: Cli, base: Path, home: Path) -> None:
    ask = ("eval", "sweep", "scaling", "-C", "kb", "--records", "records.json", "--out", "s")
    for options, code, says in (
        (("--methods", "nobody"), 65, "nobody"),
        (("--counts", "5"), 65, "holds 4 facts"),
        (("--methods", "memit,mend"), 66, "no hypernetwork of mend is trained"),
        (("--counts", "0"), 2, "expected a list such as 1,10,100"),
        (("--counts", "1,1"), 2, "expected a list such as 1,10,100"),
        (("--lambdas", "nan"), 2, "expected a list such as 100,300,1000"),
        (("--records", "nowhere.json"), 66, "no such file"),
    ):
        done = cli(*ask, *options)
        assert (done.code, len(done.err.splitlines())) == (code, 1), done.err
        assert says in done.err
    tradeoff = cli("eval", "sweep", "tradeoff", "-C", "kb", "--records", "records.json", "--methods", "ft")
    assert tradeoff.code == 65
    assert "ft: reads no λ" in tradeoff.err
    assert sorted(path.name for path in home.iterdir()) == ["kb", "records.json"]
