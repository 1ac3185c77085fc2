"""The benchmarks run, at sizes whose numbers say nothing; their arithmetic is checked here."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.__main__ import SECTIONS, main
from benchmarks.quality import SCORES, difference, interval
from benchmarks.report import Bar, Measured, load, ratios, save, show
from patchkit.errors import BadInput


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_measures_something(section, tmp_path):
    path = tmp_path / "results.json"
    ran = CliRunner().invoke(main, [section, "--quick", "--json", str(path)], catch_exceptions=False)
    assert ran.exit_code == 0
    measured = json.loads(path.read_text())["sections"][section]
    assert measured["rows"]
    assert measured["effort"] == "quick"
    assert measured["machine"]["cores"] >= 1


def test_scores_are_shares_of_prompts_and_s_their_harmonic_mean():
    counts = np.array(
        [[[1, 1], [1, 2], [2, 4], [1, 1], [0, 2], [1, 1], [4, 4]], [[0, 1], [0, 0], [4, 6]] + 4 * [[0, 1]]]
    )
    found = interval(counts.astype(float))
    wanted = [50, 50, 60, 3 / (1 / 50 + 1 / 50 + 1 / 60), 50, 0, 50, 80]
    assert [found[name].value for name in SCORES] == pytest.approx(wanted)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """300 facts whose prompts succeed together: the true share lies inside about 95 times of 100."""
    random = np.random.default_rng(0)
    inside = 0
    for trial in range(60):
        hits = (random.random(300) < 0.7).astype(float)
        counts = np.stack([np.stack([hits, np.ones(300)], -1)] * 7, axis=1)
        found = interval(counts, seed=trial)["PS"]
        inside += found.low <= 70 <= found.high
    assert 52 <= inside <= 60


def test_a_difference_on_the_same_facts_is_narrower_than_two_intervals():
    random = np.random.default_rng(1)
    hard = random.random((200, 7))
    one, other = (np.stack([(hard < level).astype(float), np.ones((200, 7))], -1) for level in (0.8, 0.75))
    found = difference(one, other)["ES"]
    assert found.value == pytest.approx(interval(one)["ES"].value - interval(other)["ES"].value)
    apart = interval(one)["ES"]
    assert found.high - found.low < apart.high - apart.low
    same = difference(one, one)["S"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_bars_have_two_sides():
    assert Bar("ratio", 8.0, 8.0).met
    assert not Bar("ratio", 7.9, 8.0).met
    assert Bar("seconds", 0.5, 0.5, most=True).met
    assert not Bar("seconds", 0.51, 0.5, most=True).met


@pytest.mark.parametrize(("width", "first"), [(100, ["name", *"abcdefghij"]), (30, ["name", "one", "two"])])
def test_a_table_that_is_too_wide_lies_on_its_side(width, first):
    console = Console(width=width, record=True, file=io.StringIO())
    rows = [{"name": name, **dict.fromkeys("abcdefghij", 0.125)} for name in ("one", "two")]
    show(console, "section", Measured(rows))
    said = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert said[1] == first
    assert sum(line.count("0.125") for line in said) == 20, "no cell is cut"


def test_a_table_too_wide_either_way_is_a_paragraph_a_row():
    rows = [{"recipe": f"number {n}", "less, of all": f"+{n}.0 (-1.0 to +2.0)", "S": n} for n in range(9)]
    console = Console(file=io.StringIO(), width=30)
    show(console, "section", Measured(rows))
    said = " ".join(console.file.getvalue().split())
    assert said.startswith("section recipe number 0; less, of all +0.0 (-1.0 to +2.0); S 0 recipe number 1;")
    assert "…" not in said


def test_results_are_kept_section_by_section_and_compared(tmp_path):
    path = tmp_path / "results.json"
    old = Measured([{"what": "a", "s": 2.0, "how": "x"}, {"what": "b", "s": 3.0, "how": "x"}])
    save(path, {"sections": {"one": old.to_dict()}})
    save(path, {"sections": {"two": Measured([{"what": "c", "s": 1.0}]).to_dict()}})
    assert set(load(path)["sections"]) == {"one", "two"}
    now = Measured([{"what": "a", "s": 1.0, "how": "y"}, {"what": "new", "s": 3.0, "how": "x"}])
    compared = ratios(now, Measured.from_dict(load(path)["sections"]["one"]))
    assert compared.rows == [{"what": "a", "s": 0.5, "how": None}, {"what": "new", "s": None, "how": None}]


@pytest.mark.parametrize("text", ["{", "[]", '{"sections": 3}'])
def test_what_is_no_result_is_refused_in_a_line(text, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"results\.json"):
        load(path)


def test_a_promise_that_is_not_kept_is_an_exit_code(monkeypatch):
    broken = Measured([{"what": "a", "s": 2.0}], [Bar("a, s", 2.0, 1.0, most=True)])
    monkeypatch.setattr("benchmarks.machine.measure", lambda effort: broken)
    ran = CliRunner().invoke(main, ["machine"])
    assert ran.exit_code == 1
    assert "NOT MET" in ran.output
