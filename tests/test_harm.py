"""What an edit does to the rest: numbers as a literal float64 writing has them, gates that refuse by them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from command_helpers import Cli, cli, facts_file, git_environment, home, knowledge
from git_helpers import git

from patchkit.actions.gates import parse_gate
from patchkit.actions.harm import TEXT
from patchkit.editing.written import text_name
from patchkit.errors import BadInput
from patchkit.evaluation.harm import GROWTH, PERPLEXITY, Harm, read
from patchkit.evaluation.likelihood import Score
from patchkit.evaluation.reading import Reading
from patchkit.repository import Repository

__all__ = ["cli", "git_environment", "home", "knowledge"]

ANN = {"subject": "Ann", "prompt": "{} lies in", "target": "Rome"}
QUICK = ("--set", "steps=4", "--device", "cpu")


def literal_perplexity(model: torch.nn.Module, tokenizer: object, documents: list[str]) -> float:
    """One token at a time, in float64."""
    losses = []
    for document in documents:
        head, _, tail = document.strip().partition(" ")
        if not tail:
            head, tail = document.strip()[: len(document.strip()) // 2], document.strip()[len(head) // 2 :]
        if not head.strip() or not tail.strip():
            continue
        before = tokenizer(head)["input_ids"]  # type: ignore[operator]
        whole = tokenizer(f"{head} {tail}")["input_ids"]  # type: ignore[operator]
        for place in range(len(before), len(whole)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([whole[:place]])).logits[0, -1].double()
            losses.append(-float(logits.log_softmax(-1)[whole[place]]))
    return math.exp(sum(losses) / len(losses))


def literal_growth(repository: Repository, revision: str) -> float:
    checkpoint = repository.checkpoint()
    sums: dict[str, torch.Tensor] = {}
    for patch in repository.patches(repository.stack(revision)).values():
        for name, delta in patch.deltas.items():
            assert delta.B is not None
            assert delta.A is not None
            dense = delta.B.double() @ delta.A.double()
            sums[name] = sums.get(name, 0) + (dense.T if delta.transposed else dense)
    before = sum(float(checkpoint.read(name).double().norm()) ** 2 for name in sums)
    after = 0.0
    for name, change in sums.items():
        stored = checkpoint.read(name)
        after += float((stored.double() + change).to(stored.dtype).double().norm()) ** 2
    return math.sqrt(after / before)


def test_a_commit_says_what_it_did_to_the_rest(cli: Cli, knowledge: Path, home: Path) -> None:
    done = cli.ok("commit", facts_file(home, ANN), *QUICK, "--json").json["harm"]
    repository = Repository.open(knowledge)
    base = repository.checkpoint().as_read()
    folder = knowledge / ".git" / "patchkit" / "statistics"
    documents = json.loads((folder / text_name(TEXT, base)).read_text("utf-8"))
    unedited = literal_perplexity(*repository.load("HEAD~3", "cpu"), documents)
    for side, revision in (("before", "HEAD~1"), ("after", "HEAD")):
        found = done[side]
        wanted = literal_perplexity(*repository.load(revision, "cpu"), documents)
        assert found["perplexity"] == pytest.approx(wanted, rel=1e-5)
        assert found["base_perplexity"] == pytest.approx(unedited, rel=1e-5)
        assert found["rise"] == pytest.approx(wanted / unedited, rel=1e-5)
    assert done["after"]["growth"] == pytest.approx(literal_growth(repository, "HEAD"), rel=1e-6)
    assert done["before"]["growth"] < done["after"]["growth"]
    shown = cli.ok("eval", "--compare", "HEAD~1", "HEAD").out
    assert f"own text: {done['before']['perplexity']:.4g} → {done['after']['perplexity']:.4g}" in shown
    assert f"{done['before']['growth']:.4f} → {done['after']['growth']:.4f}" in shown


@pytest.mark.parametrize("gate", ["perplexity=1", "growth=1"])
def test_a_gate_from_above_refuses_and_keeps_the_patch(
    cli: Cli, knowledge: Path, home: Path, gate: str
) -> None:
    head = git(knowledge, "rev-parse", "HEAD")
    done = cli("commit", facts_file(home, ANN), *QUICK, "--gate", gate, "-q")
    name = gate.partition("=")[0]
    assert done.code == 3
    assert f"the gate refused the edit ({name} 1." in done.err
    assert "> 1)" in done.err
    assert git(knowledge, "rev-parse", "HEAD") == head
    (kept,) = (knowledge / ".git" / "patchkit" / "kept").glob("*/*/delta.safetensors")
    cli.ok("apply", kept.parent)
    assert git(knowledge, "rev-parse", "HEAD") != head


def test_a_gate_from_above_that_is_met_commits(cli: Cli, knowledge: Path, home: Path) -> None:
    cli.ok("commit", facts_file(home, ANN), *QUICK, "--gate", "perplexity=1e6,growth=1e6,efficacy=0")


@pytest.mark.parametrize("wrong", ["perplexity=0.9", "growth=0", "growth=nan", "perplexity=inf", "growth=x"])
def test_a_limit_is_a_multiple_from_one(wrong: str) -> None:
    with pytest.raises(BadInput, match=r"a multiple of the base's from 1 of perplexity, growth"):
        parse_gate(wrong)
    assert parse_gate("growth=1, perplexity=1.05") == {"growth": 1.0, "perplexity": 1.05}


def harm(perplexity: float, growth: float) -> Harm:
    """Of a stack on a base whose perplexity is 10."""
    return Harm(Reading((math.log(perplexity),), (1,)), Reading((math.log(10),), (1,)), growth)


def test_warnings_begin_at_the_thresholds() -> None:
    below = harm(10 * PERPLEXITY * 0.999, GROWTH * 0.999)
    assert below.warnings() == ()
    (line,) = harm(10 * PERPLEXITY * 1.001, GROWTH * 0.999).warnings()
    assert f"perplexity of the base's own text is {PERPLEXITY:.3g} times" in line
    (line,) = harm(10 * PERPLEXITY * 1.0001, GROWTH * 1.5).warnings()
    assert f"and the edited weights are {GROWTH * 1.5:.3g} times as large" in line
    lost = harm(math.inf, math.nan)
    assert len(lost.warnings()) == 1
    told = lost.to_dict()
    assert told.pop("base_perplexity") == pytest.approx(10.0)
    assert told == dict.fromkeys(("perplexity", "rise", "rise_low", "rise_high", "growth"))


def test_a_rise_is_bounded_by_drawing_documents_again() -> None:
    """Both readings of a document are drawn together: a document that is hard to read is so for both."""
    random = np.random.default_rng(3)
    tokens = random.integers(5, 30, size=40)
    base = tokens * random.uniform(1, 6, size=40)
    edited = base + tokens * random.normal(0.02, 0.05, size=40)
    found = Reading(tuple(edited), tuple(tokens)).times(Reading(tuple(base), tuple(tokens)))
    drawn = np.random.default_rng(0).integers(40, size=(2000, 40))
    times = [math.exp((edited[rows].sum() - base[rows].sum()) / tokens[rows].sum()) for rows in drawn]
    assert found.value == pytest.approx(math.exp((edited - base).sum() / tokens.sum()))
    assert [found.low, found.high] == pytest.approx(list(np.percentile(times, [2.5, 97.5])))
    apart = np.exp([edited[rows].sum() / tokens[rows].sum() for rows in drawn])
    assert found.high - found.low < 0.2 * np.ptp(np.percentile(apart, [2.5, 97.5])) / math.e


def test_one_document_has_no_bounds_and_no_number_has_none() -> None:
    one, two = Reading((3.0,), (2,)), Reading((4.0,), (2,))
    assert two.times(one).value == pytest.approx(math.exp(0.5))
    assert math.isnan(two.times(one).low)
    lost = Reading((math.inf, 1.0), (2, 2)).times(Reading((1.0, 1.0), (2, 2)))
    assert (lost.value, math.isnan(lost.high)) == (math.inf, True)
    assert math.isnan(Reading((), ()).perplexity)


class _Scripted:
    """Says of every pair what it was told; scripts without spaces are asked in two halves."""

    def __init__(self, log_p: float) -> None:
        self.log_p, self.asked = log_p, []  # type: ignore[var-annotated]

    def score(self, pairs):  # type: ignore[no-untyped-def]
        self.asked += pairs
        return [Score(self.log_p * 2, 2, 0, 0) for _ in pairs]


def test_perplexity_by_hand() -> None:
    voice = _Scripted(math.log(0.25))
    documents = ["two words", "日本語の文", " ", "x"]
    assert read(voice, documents).perplexity == pytest.approx(4.0)  # type: ignore[arg-type]
    assert voice.asked == [("two", "words"), ("日本", "語の文")]
    assert read(_Scripted(-math.inf), ["two words"]).perplexity == math.inf  # type: ignore[arg-type]
    assert read(_Scripted(math.nan), ["two words"]).perplexity == math.inf  # type: ignore[arg-type]
    assert math.isnan(read(voice, [" "]).perplexity)  # type: ignore[arg-type]
