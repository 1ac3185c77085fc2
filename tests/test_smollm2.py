"""On the real SmolLM2-135M, through the commands: facts take, come out again, and every byte comes back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from git_helpers import ENVIRONMENT, git
from proof_helpers import OWN, SOURCE, file_hashes, fine, here, records

from patchkit.builds.build import verify_build
from patchkit.canonical import hash_file
from patchkit.checkpoint import Checkpoint
from patchkit.evaluation.generation import says
from patchkit.evaluation.measure import observe
from patchkit.facts import parse_facts
from patchkit.repository import Repository

pytestmark = [pytest.mark.model, pytest.mark.timeout(1200)]

COUNT, TAKEN = 16, (2, 5, 11, 16)  # facts committed; the lines that are taken out again


@pytest.fixture(scope="module")
def repository_folder(
    smollm2: Path, smollm2_statistics: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A repository on the model; statistics that another process collected serve it too."""
    with pytest.MonkeyPatch.context() as context:
        for name in [name for name in os.environ if name.startswith(("GIT_", "PATCHKIT_"))]:
            if name != "PATCHKIT_DATA":
                context.delenv(name)
        for name, value in {**ENVIRONMENT, "NO_COLOR": "1"}.items():
            context.setenv(name, value)
        folder = tmp_path_factory.mktemp("smollm2") / "kb"
        fine(here("init", smollm2, folder))
        kept = Path(fine(here("-C", folder, "path", "statistics")).out.strip())
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.symlink_to(smollm2_statistics)
        yield folder


@pytest.fixture
def knowledge(repository_folder: Path) -> Iterator[Path]:
    """The same with nothing in force, whatever became of the test before."""
    yield repository_folder
    if names := [patch.name for patch in Repository.open(repository_folder).stack().patches]:
        fine(here("-C", repository_folder, "revert", *names))


@pytest.fixture
def counterfact() -> list[dict[str, Any]]:
    with open(records("counterfact-r.jsonl"), encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_corrections_take_show_and_go_again(knowledge: Path, smollm2: Path, tmp_path: Path) -> None:
    base = file_hashes(smollm2)
    done = fine(here("-C", knowledge, "commit", SOURCE / "examples" / "corrections.jsonl", "--json")).json
    print(json.dumps(done["summary"]), {phase: round(s, 1) for phase, s in done["seconds"].items()})
    assert done["summary"]["efficacy"] == 1.0
    assert done["summary"]["generation"] >= 0.5
    shown = fine(here("-C", knowledge, "show")).out
    assert "LeBron James" in shown
    question = "LeBron James plays the sport of"
    answer = fine(here("-C", knowledge, "ask", question)).out
    assert "basketball" in answer
    (asked,) = fine(here("-C", knowledge, "ask", question, "--json")).json
    assert not says(asked["base"]["text"], "basketball")
    assert says(asked["stack"]["text"], "basketball")

    fine(here("-C", knowledge, "build", "--out", tmp_path / "edited"))
    assert file_hashes(tmp_path / "edited") != base
    fine(here("-C", knowledge, "revert"))
    fine(here("-C", knowledge, "build", "--out", tmp_path / "edited"))
    assert file_hashes(tmp_path / "edited") == base
    (again,) = fine(here("-C", knowledge, "ask", question, "--json")).json
    assert again["stack"] == again["base"] == asked["base"]


def test_sixteen_counterfacts_four_taken_out_all_taken_back(
    knowledge: Path, smollm2: Path, counterfact: list[dict[str, Any]], tmp_path: Path
) -> None:
    sixteen_in_four_out_all_back(knowledge, smollm2, counterfact[:COUNT], tmp_path)


def test_sixteen_facts_of_our_own_four_taken_out_all_taken_back(
    knowledge: Path, smollm2: Path, tmp_path: Path
) -> None:
    """The same without a file from elsewhere, so that it never skips where the model is."""
    names = ("subject", "prompt", "target", "was")
    records = [dict(zip(names, values, strict=True)) for values in OWN]
    before = sixteen_in_four_out_all_back(knowledge, smollm2, records, tmp_path)
    assert not any(state["says"] for state in before), "the model says none of them before"


def sixteen_in_four_out_all_back(
    knowledge: Path, smollm2: Path, records: list[dict[str, Any]], tmp_path: Path
) -> list[dict[str, Any]]:
    """Commit, take four out, take all back, each proved; what the base said of each rewrite."""
    chosen = tmp_path / "facts.jsonl"
    chosen.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    facts = parse_facts(chosen.read_bytes(), "facts").facts
    before = file_hashes(smollm2)

    done = fine(here("-C", knowledge, "commit", chosen, "--json")).json
    print("committed", json.dumps(done["summary"]), {k: round(v, 1) for k, v in done["seconds"].items()})
    assert done["summary"]["facts"] == COUNT
    assert done["summary"]["efficacy"] == 1.0  # CounterFact's ES
    repository = Repository.open(knowledge)
    edited = states(repository, facts)
    # What commit printed was measured on the model that the repository's own stack gives.
    printed = [fact["after"]["rewrite"]["target"] for fact in done["facts"]]
    assert printed == [state.rewrite.target for state in edited]

    lines = [word for line in TAKEN for word in ("--fact", str(line))]
    fine(here("-C", knowledge, "revert", done["patch"], *lines))
    after = states(repository, facts)
    gone = {line - 1 for line in TAKEN}
    kept = [i for i in range(COUNT) if i not in gone]
    score = sum(after[i].rewrite.prefers for i in kept) / len(kept)
    print(f"ES of the {len(kept)} that stay: {score:.0%}")
    assert score == 1.0
    original = [fact["before"]["rewrite"] for fact in done["facts"]]
    for i in sorted(gone):
        was, now, then = edited[i].rewrite.target, after[i].rewrite.target, original[i]["target"]
        print(f"{facts[i].text} → {facts[i].target}: {then:.2g}, edited {was:.2g}, taken out {now:.2g}")
        assert abs(now - then) < 0.2 * abs(was - then)  # back near what it was
        assert after[i].rewrite.prefers == original[i]["prefers"]

    out = tmp_path / "build"
    fine(here("-C", knowledge, "build", "--out", out))
    assert verify_build(out, Checkpoint.open(smollm2)) == []
    assert hash_file(out / "model.safetensors") != before["model.safetensors"]
    fine(here("-C", knowledge, "revert"))
    fine(here("-C", knowledge, "build", "--out", out))
    assert file_hashes(out) == before
    assert file_hashes(smollm2) == before
    assert fine(here("-C", knowledge, "status", "--json")).json["patches"] == 0
    assert git(knowledge, "status", "--porcelain") == ""
    assert fine(here("-C", knowledge, "fsck")).code == 0
    return original


def states(repository: Repository, facts: Any) -> list[Any]:
    """Each fact measured on the model with the stack at HEAD."""
    model, tokenizer = repository.load()
    return observe(model, tokenizer, facts)
