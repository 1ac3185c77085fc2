"""mend through the commands: trained, committed, built, taken back; refused where nothing was trained."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from command_helpers import (
    LEBRON,
    Cli,
    cli,
    facts_file,
    git,
    git_environment,
    home,
    knowledge,
    snapshot,
    tiny_base,
)

from patchkit.actions import train_mend as action
from patchkit.canonical import hash_file
from patchkit.repository import Repository

__all__ = ["cli", "git_environment", "home", "knowledge"]

SUBJECTS = ("Ann", "Paris", "Émile Zola", "Japan", "Dutch")
RECORDS = [
    {
        "subject": subject,
        "prompt": "{} lies in",
        "target": target,
        "paraphrases": [f"You see {subject} in"],
        "neighbors": ["Rome lies in", "Microsoft plays the sport of"],
    }
    for subject, target in zip(SUBJECTS, ("Rome", "Japan", "Paris", "France", "Rome"), strict=True)
]
ANN, JAPAN = ({"subject": s, "prompt": "{} lies in", "target": "Rome"} for s in ("Ann", "Japan"))
QUICK = ("--edits", "2", "--rank", "4", "--steps", "4", "--layers", "2-3")


def trained(cli: Cli, home: Path, *options: str) -> dict:
    records = facts_file(home, *RECORDS, name="records.jsonl")
    return cli.ok("mend", "train", records, *QUICK, *options, "--json").json


def commit(cli: Cli, home: Path, *facts: dict) -> str:
    done = cli.ok("commit", facts_file(home, *facts), "--method", "mend", "--layers", "2-3", "--json").json
    return done["patch"]


def build(cli: Cli, out: Path) -> bytes:
    cli.ok("build", "--out", out, "-q")
    return (out / "model.safetensors").read_bytes()


def test_a_trained_network_edits_and_is_named_in_the_patch(cli: Cli, knowledge: Path, home: Path) -> None:
    before, state = build(cli, home / "before"), snapshot(knowledge)
    done = trained(cli, home)
    assert snapshot(knowledge) == state
    path = Path(done["path"])
    assert path.parent == Path(cli.ok("path", "statistics").out.strip())
    assert done["digest"] == hash_file(path)
    assert (done["lessons"], done["held_out"]) == (4, 1)
    assert done["training"]["steps"] == 4
    assert all("mlp" in weight for weight in done["weights"])
    name = commit(cli, home, ANN, JAPAN)
    patch = Repository.open(knowledge).patch(name)
    assert patch.recipe == {
        "method": "mend",
        "layers": [2, 3],
        "guess": patch.recipe["guess"],
        "network_digest": done["digest"],
    }
    assert sorted(patch.deltas) == sorted(done["weights"])
    assert "mend" in cli.ok("show", name).out
    assert cli.ok("fsck").code == 0
    assert build(cli, home / "with") != before
    for refused in (("revert", name, "--fact", "1"), ("refit", name)):
        ended = cli(*refused)
        assert ended.code == 65
        assert f"{name}: mend keeps no" in ended.err
    cli.ok("revert", name, "-q")
    assert build(cli, home / "after") == before


def test_a_network_is_of_the_base_with_its_config(cli: Cli, knowledge: Path, home: Path) -> None:
    """What was trained before config.json was corrected does not edit the model that it makes."""
    trained(cli, home)
    facts = facts_file(home, ANN)
    corrected = shutil.copytree(tiny_base(), home / "corrected")
    config = json.loads((corrected / "config.json").read_text("utf-8"))
    (corrected / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}), "utf-8")
    cli.ok("base", corrected)
    refused = cli("commit", facts, "--method", "mend", "--layers", "2-3")
    assert refused.code == 66
    assert "no hypernetwork of mend is trained for layers 2, 3" in refused.err
    cli.ok("base", tiny_base())
    cli.ok("commit", facts, "--method", "mend", "--layers", "2-3", "--dry-run")


def test_patches_of_mend_are_not_solved_together(cli: Cli, knowledge: Path, home: Path) -> None:
    trained(cli, home)
    git(knowledge, "switch", "-q", "-c", "side")
    commit(cli, home, ANN)
    git(knowledge, "switch", "-q", "main")
    commit(cli, home, JAPAN)
    before = snapshot(knowledge)
    refused = cli("merge", "side", "--joint")
    assert refused.code == 65
    assert "mend keeps no keys" in refused.err
    assert snapshot(knowledge) == before


def test_no_network_and_another_network_are_refused(cli: Cli, knowledge: Path, home: Path) -> None:
    before = snapshot(knowledge)
    facts = facts_file(home, ANN)
    refused = cli("commit", facts, "--method", "mend", "--layers", "2-3")
    assert refused.code == 66
    assert "no hypernetwork of mend is trained for layers 2, 3" in refused.err
    assert "patchkit mend train" in refused.err
    digest = trained(cli, home)["digest"]
    refused = cli(
        "commit", facts, "--method", "mend", "--layers", "2-3", "--set", f"network_digest={64 * '0'}"
    )
    assert refused.code == 65
    assert f"000000000000, but the one here is {digest[:12]}" in refused.err
    assert refused.err.count("\n") == 1
    cli.ok("commit", facts, "--method", "mend", "--layers", "2-3", "--set", f"network_digest={digest}", "-n")
    assert snapshot(knowledge) == before


def test_a_dry_run_trains_nothing(cli: Cli, knowledge: Path, home: Path) -> None:
    folder = knowledge / ".git" / "patchkit"

    def there() -> set[Path]:
        """But for the files that SQLite puts beside one that is read."""
        return {p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(("-wal", "-shm"))}

    files = there()
    done = trained(cli, home, "-n")
    assert (done["digest"], done["training"]) == (None, None)
    assert (done["lessons"], done["held_out"]) == (4, 1)
    assert there() == files
    records = home / "records.jsonl"
    assert "nothing was trained" in cli.ok("mend", "train", records, *QUICK, "--dry-run").out
    assert cli.ok("mend", "train", records, *QUICK, "--dry-run", "-q").out == ""


def test_what_it_says(cli: Cli, knowledge: Path, home: Path) -> None:
    records = facts_file(home, *RECORDS, name="records.jsonl")
    text = home / "text.txt"
    text.write_text("Rome lies in Japan. " * 30)
    shown = cli.ok("mend", "train", records, *QUICK, "--text", text, "--minutes", "1").out
    for word in ("4 facts to train on, 1 held out", "6 weights", "next tokens kept", "ended after 4 steps"):
        assert word in shown


def test_a_killed_training_is_taken_up(
    cli: Cli, knowledge: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(cli, home)
    real = action.train
    steps = []

    def killed(*args, **options):
        def kill(phase, done, total):
            if phase == "training" and done == 3:
                raise KeyboardInterrupt

        return real(*args, **{**options, "progress": kill, "keep_every": 0.0})

    def watched(*args, **options):
        def count(phase, done, total):
            steps.append(done if phase == "training" else 0)

        return real(*args, **{**options, "progress": count})

    Path(whole["path"]).unlink()
    monkeypatch.setattr(action, "train", killed)
    assert cli("mend", "train", home / "records.jsonl", *QUICK).code == 130
    assert not Path(whole["path"]).exists()
    monkeypatch.setattr(action, "train", watched)
    again = trained(cli, home)
    assert again["digest"] == whole["digest"]
    assert min(step for step in steps if step) == 3
    assert list((knowledge / ".git" / "patchkit" / "unfinished").glob("mend-*")) == []


def test_a_sweep_edits_with_what_was_trained(cli: Cli, knowledge: Path, home: Path) -> None:
    """As a commit of the same facts does: the edit that is scored is that of the network."""
    records = facts_file(home, *RECORDS, name="records.jsonl")
    cli.ok("mend", "train", records, "--edits", "2", "--rank", "4", "--steps", "4")
    asked = ("--records", records, "--counts", "1", "--methods", "mend,ft", "--out", home / "swept", "--json")
    rows = cli.ok("eval", "sweep", "scaling", *asked).json["rows"]
    assert [row["method"] for row in rows] == ["unedited", "mend", "ft"]
    assert rows[1]["growth"] != 1.0


def test_gc_keeps_a_network_that_a_patch_names(cli: Cli, knowledge: Path, home: Path) -> None:
    path = Path(trained(cli, home)["path"])
    then = time.time() - 30 * 86400
    os.utime(path, (then, then))
    found = cli.ok("gc", "-n", "--json").json["removed"]
    assert [each["path"] for each in found if each["kind"] == "hypernetwork"] == [str(path)]
    commit(cli, home, ANN)
    assert "hypernetwork" not in cli.ok("gc", "-n").out


def test_patchkit_edit_takes_a_trained_network_too(cli: Cli, knowledge: Path, home: Path) -> None:
    import patchkit
    from patchkit.editing.recipe import Recipe
    from patchkit.errors import NotFound
    from patchkit.models.loading import load_model

    folder = Path(trained(cli, home)["path"]).parent
    base = Repository.open(knowledge).base_folder
    model, tokenizer = load_model(base, "cpu")
    recipe = Recipe(layers=(2, 3), method="mend")
    with pytest.raises(NotFound, match="patchkit mend train"):
        patchkit.edit(model, tokenizer, [ANN], base=base, recipe=recipe, trained=home)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    patch = patchkit.edit(model, tokenizer, [ANN], base=base, recipe=recipe, trained=folder)
    moved = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert len(moved) == len(patch.deltas) == 6


def test_records_that_cannot_be_trained_on(cli: Cli, knowledge: Path, home: Path) -> None:
    before = snapshot(knowledge)
    few = facts_file(home, *RECORDS[:2], name="few.jsonl")
    bare = facts_file(home, *({**LEBRON, "subject": s} for s in SUBJECTS), name="bare.jsonl")
    for args, says in (
        ((few, *QUICK), "2 facts are too few: 1 held out, and 2 edited together"),
        ((bare, *QUICK), "give a text: --text FILE"),
        ((facts_file(home, *RECORDS), *QUICK[:-1], "0-1"), "layer 0: mend edits blocks that stand on others"),
        ((facts_file(home, *RECORDS), *QUICK[:-1], "9"), "layer 9 is not in this model"),
    ):
        refused = cli("mend", "train", *args)
        assert refused.code == 65
        assert says in refused.err
        assert refused.err.count("\n") == 1
    assert snapshot(knowledge) == before
