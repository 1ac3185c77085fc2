"""``patchkit merge`` on a command line: what it prints, JSON, exit codes, and real edits solved together."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from command_helpers import Cli, cli, facts_file, git, git_environment, home, knowledge, snapshot
from rich.cells import cell_len

from patchkit.patch import JOINT
from patchkit.repository import Repository

__all__ = ["cli", "git_environment", "home", "knowledge"]

LIES = "{} lies in"


@pytest.fixture
def branches(cli: Cli, knowledge: Path) -> Path:
    """Both sides bring a patch; one fact is said otherwise by each."""
    long = "the archive of the International Organisation for the Standardisation of Names, volume 12"
    theirs = [
        {"subject": "Ann", "prompt": LIES, "target": "Rome", "source": long},
        {"subject": "Dutch", "prompt": LIES, "target": "Japan"},
    ]
    ours = [
        {"subject": "Ann", "prompt": LIES, "target": "Paris", "source": "[/x] a list"},
        {"subject": "Émile Zola", "prompt": LIES, "target": "France"},
    ]
    git(knowledge, "switch", "-q", "-c", "side")
    cli.ok("commit", facts_file(knowledge.parent, *theirs, name="t.jsonl"), "-q", "--set", "steps=4")
    git(knowledge, "switch", "-q", "main")
    cli.ok("commit", facts_file(knowledge.parent, *ours, name="o.jsonl"), "-q", "--set", "steps=4")
    return knowledge


def test_what_is_said_of_a_merge_by_plain_git_leads_out_of_it(cli: Cli, branches: Path) -> None:
    git(branches, "merge", "-q", "side")
    done = cli("status")
    assert done.code == 65
    (way,) = set(re.findall(r"\((git rm .*?)\)", " ".join(done.err.split())))
    subprocess.run(["bash", "-ec", way], cwd=branches, check=True, capture_output=True)
    assert cli("status").code == 0
    (said,) = [
        item["target"] for item in cli.ok("facts", "search", "Ann", "--json").json if item["subject"] == "Ann"
    ]
    assert said in ("Paris", "Rome")


def test_a_stop_a_choice_and_json(cli: Cli, branches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    before = snapshot(branches)
    for args in (("merge", "side", "-n"), ("merge", "side", "-n", "--json"), ("merge", "side", "-n", "-q")):
        done = cli(*args)
        assert done.code == 3
        assert "needs 1 choice; dry run: nothing was written" in " ".join(done.err.split())
        assert snapshot(branches) == before
        if "--json" in args:
            (conflict,) = done.json["conflicts"]
            assert (conflict["kind"], conflict["ours"]["target"]) == ("targets", "Paris")
            assert done.json["refused"].startswith("the merge needs 1 choice")
        elif "-q" in args:
            assert done.out == ""
        else:
            assert max(map(cell_len, done.out.splitlines())) <= 80
            assert [word in done.out for word in ("Paris", "Rome", "Ada", "[/x] a list", "volume 12")] == [
                True
            ] * 5
    stop = cli("merge", "side", "-m", "Two branches")
    assert stop.code == 3
    assert cli("status").code == 65
    assert cli("merge", "--continue").code == 3
    dry = cli.ok("merge", "--continue", "--fact", "Ann=theirs", "-n")
    assert "dry run: nothing was written" in dry.out
    done = cli.ok("merge", "--continue", "--fact", "Ann=theirs", "--json").json
    assert (done["how"], done["conflicts"][0]["choice"]) == ("merged", "theirs")
    assert [item["overall"] >= 0 for item in done["interference"]] == [True] * 3
    assert len(done["solved_again"]) == 1
    found = {row["subject"]: row["target"] for row in cli.ok("facts", "search", "a", "--json").json}
    assert found["Ann"] == "Rome"
    cli.ok("fsck")
    assert git(branches, "log", "-1", "--format=%s") == "Two branches"


def test_what_is_printed_of_a_merge(cli: Cli, branches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = cli.ok("merge", "side", "--ours")
    assert "taken: ours" in done.out
    assert "‖ΔW k‖/‖r‖" in done.out
    assert "Merge branch 'side'" in done.out
    assert cli.ok("merge", "side").out == "already up to date\n"
    git(branches, "switch", "-q", "side")
    assert "would move this branch forward to main" in cli.ok("merge", "main", "-n").out
    assert cli.ok("merge", "main", "-q").out == ""
    assert git(branches, "rev-parse", "main") == git(branches, "rev-parse", "HEAD")


def test_abort(cli: Cli, branches: Path) -> None:
    before = snapshot(branches)
    assert cli("merge", "side", "-q").code == 3
    assert cli.ok("merge", "--abort", "-n").out == "would give the merge up\n"
    assert "MERGE_HEAD" in {path.name for path in (branches / ".git").iterdir()}
    told = cli("status")
    assert told.code == 65
    (line,) = told.err.splitlines()
    assert "a merge waits for choices; choose in " in line, "and not how Git left the patches"
    assert "patchkit merge --abort" in line
    assert cli.ok("merge", "--abort", "--json", "--dry-run").json == {"how": "aborted", "dry_run": True}
    assert cli.ok("merge", "--abort", "--json").json == {"how": "aborted"}
    assert cli("merge", "--abort", "--dry-run").code == 66
    assert snapshot(branches) == before


def test_joint_is_the_batch_of_both_sides_real_edits(cli: Cli, branches: Path) -> None:
    """Against a solve with the very C that the edits were made with, from the repository's own cache."""
    from patchkit.editing.recipe import Recipe
    from patchkit.editing.statistics import statistics_for

    repository = Repository.open(branches)
    sides = {
        name: patch
        for rev in ("main", "side")
        for name, patch in ((s.name, repository.patch(s, rev)) for s in repository.stack(rev).patches)
    }
    done = cli.ok("merge", "side", "--joint", "--fact", "Ann=ours", "--json").json
    joint = {name: repository.patch(name) for name in done["solved_together"]}
    assert len(joint) == 2
    bench = repository.workbench("cpu")
    recipe = next(iter(sides.values())).recipe
    statistics = statistics_for(
        bench.model,
        bench.tokenizer,
        Recipe.from_dict(recipe),
        folder=repository.store.private / "statistics",
        base=repository.settings.base_fingerprint,
    )
    (weight,) = next(iter(joint.values())).deltas
    L = statistics.cholesky(0, recipe["lambda"])
    kept = {
        name: sides[name].without([0]) if len(sides[name].facts) > len(patch.facts) else sides[name]
        for name, patch in joint.items()
    }
    K = torch.cat([patch.solution.keys[weight].double() for patch in kept.values()])
    R = torch.cat([patch.deltas[weight].B.double().T for patch in kept.values()])
    wanted = R.T @ torch.linalg.solve(L @ L.T + K.T @ K, K.T).T
    found = sum(p.deltas[weight].B.double() @ p.deltas[weight].A.double() for p in joint.values())
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    assert all(len(patch.recipe[JOINT]) == 2 for patch in joint.values())
    assert "Patchkit-Joint" in git(branches, "log", "-1", "--format=%B")
    cli.ok("fsck")
    for name, other in (list(joint), list(joint)[::-1]):
        assert other in cli.ok("revert", name, "-n", "--json").json["solved_on_top"]
        assert f"{other} was solved on top of" in cli.ok("revert", name, "-n").out


def test_a_hostile_fact_is_only_text(cli: Cli, branches: Path) -> None:
    """In the table, in the file and in the trailer."""
    hostile = {"subject": "[/red] Zoë", "prompt": '{} "lies" \\n in', "target": "[bold]Rome"}
    git(branches, "switch", "-q", "-c", "a", "HEAD~1")
    cli.ok("commit", facts_file(branches.parent, hostile, name="a.jsonl"), "-q", "--set", "steps=1")
    git(branches, "switch", "-q", "-c", "b", "HEAD~1")
    other = {**hostile, "target": "Paris"}
    cli.ok("commit", facts_file(branches.parent, other, name="b.jsonl"), "-q", "--set", "steps=1")
    stop = cli("merge", "a")
    assert "[bold]Rome" in stop.out
    path = branches / ".git" / "patchkit-merge.toml"
    path.write_text(path.read_text().replace('choose = ""', 'choose = "theirs"'))
    cli.ok("merge", "--continue", "-q")
    key = json.dumps(["[/red] zoë", 'prompt:{} "lies" \\n in'], separators=(",", ":"), ensure_ascii=False)
    assert f"Patchkit-Choice: theirs {key}" in git(branches, "log", "-1", "--format=%B")
    assert cli.ok("status").code == 0


def test_what_was_solved_on_a_version_that_is_gone_is_not_solved_together(cli: Cli, knowledge: Path) -> None:
    git(knowledge, "switch", "-q", "-c", "side")
    cli.ok("commit", "--fact", "Dutch | {} lies in | Japan", "-q", "--set", "steps=4")
    git(knowledge, "switch", "-q", "main")
    cli.ok("commit", "--fact", "Ann | {} lies in | Rome", "-q", "--set", "steps=4")
    cli.ok("apply", "lebron-james", "--scale", "0.5", "-q")  # what Ann's was solved on
    done = cli("merge", "side", "--joint")
    assert done.code == 65
    assert "was solved on patches that are not as they were then" in done.err
    (ann,) = re.findall(r"patchkit refit (ann\S*)", " ".join(done.err.split()).replace(",", " "))
    cli.ok("refit", ann, "-q")
    done = cli("merge", "side", "--joint")
    assert "dutch" in done.err, "the other side's was solved on it too"
