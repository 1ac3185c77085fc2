"""What an edit does to the rest: numbers as a literal float64 writing has them, gates that refuse by them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from command_helpers import Cli, cli, facts_file, git_environment, home, knowledge
from git_helpers import git

from patchkit.actions.gates import parse_gate
from patchkit.actions.harm import TEXT
from patchkit.editing.written import text_name
from patchkit.errors import BadInput
from patchkit.evaluation.harm import GROWTH, PERPLEXITY, Harm, perplexity
from patchkit.evaluation.likelihood import Score
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
    base = repository.checkpoint().fingerprint()
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


def test_warnings_begin_at_the_thresholds() -> None:
    below = Harm(10 * PERPLEXITY * 0.999, 10.0, GROWTH * 0.999)
    assert below.warnings() == ()
    (line,) = Harm(10 * PERPLEXITY * 1.001, 10.0, GROWTH * 0.999).warnings()
    assert f"perplexity of the base's own text is {PERPLEXITY:.3g} times" in line
    (line,) = Harm(10 * PERPLEXITY, 10.0, GROWTH * 1.5).warnings()
    assert f"and the edited weights are {GROWTH * 1.5:.3g} times as large" in line
    lost = Harm(math.inf, 10.0, math.nan)
    assert len(lost.warnings()) == 1
    assert lost.to_dict() == {"perplexity": None, "base_perplexity": 10.0, "rise": None, "growth": None}


class _Scripted:
    """Says of every pair what it was told; scripts without spaces are asked in two halves."""

    def __init__(self, log_p: float) -> None:
        self.log_p, self.asked = log_p, []  # type: ignore[var-annotated]

    def score(self, pairs):  # type: ignore[no-untyped-def]
        self.asked += pairs
        return [Score(self.log_p * 2, 2, 0, 0) for _ in pairs]


def test_perplexity_by_hand() -> None:
    voice = _Scripted(math.log(0.25))
    assert perplexity(voice, ["two words", "日本語の文", " ", "x"]) == pytest.approx(4.0)  # type: ignore[arg-type]
    assert voice.asked == [("two", "words"), ("日本", "語の文")]
    assert perplexity(_Scripted(-math.inf), ["two words"]) == math.inf  # type: ignore[arg-type]
    assert perplexity(_Scripted(math.nan), ["two words"]) == math.inf  # type: ignore[arg-type]
    assert math.isnan(perplexity(voice, [" "]))  # type: ignore[arg-type]
