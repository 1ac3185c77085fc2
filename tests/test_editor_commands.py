"""Each editor through the commands: committed, shown, built, taken back, refitted, squashed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import reference_editors as literal
import torch
from command_helpers import Cli, cli, facts_file, git, git_environment, home, knowledge, snapshot

from patchkit.editing.editor import editor_names, find_editor
from patchkit.editing.recipe import Recipe
from patchkit.editing.statistics import statistics_for
from patchkit.repository import Repository
from patchkit.stack import find_patch

__all__ = ["cli", "git_environment", "home", "knowledge"]

ANN = {"subject": "Ann", "prompt": "{} lies in", "target": "Rome"}
JAPAN = {"subject": "Japan", "prompt": "{} lies in", "target": "Paris"}
LEBRON, MICROSOFT = "lebron-james-da1d451a", "microsoft-f3ee615e"
KEYED = ("alphaedit", "emmet", "encore", "rome", "ultraedit")
SETTINGS = {
    "alphaedit": ["--set", "nullspace_threshold=0.05", "--lambda", "0.1"],
    "emmet": [],
    "encore": ["--set", "stop_argmax=2", "--set", "lambda_norm=0.1"],
    "rome": ["--layers", "0", "--set", "contexts=0"],
    "ultraedit": ["--layers", "1-2", "--set", "learning_rate=1e-3"],
    "ft": ["--layers", "1", "--set", "learning_rate=0.02"],
}


def build(cli: Cli, out: Path) -> bytes:
    cli.ok("build", "--out", out, "-q")
    return (out / "model.safetensors").read_bytes()


def commit(cli: Cli, home: Path, method: str, *facts: dict) -> str:
    done = cli.ok("commit", facts_file(home, *facts), "--method", method, *SETTINGS[method], "--json").json
    return done["patch"]


@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_an_edit_is_committed_shown_built_and_taken_back(
    cli: Cli, knowledge: Path, home: Path, method: str
) -> None:
    before = build(cli, home / "before")
    name = commit(cli, home, method, ANN, JAPAN)
    patch = Repository.open(knowledge).patch(name)
    assert (patch.method, patch.recipe["method"]) == (method, method)
    assert len(patch.solved_on) == 2
    assert (patch.solution is not None) == (method in KEYED)
    assert cli.ok("show", name, "--json").json["method"] == method
    assert method in cli.ok("show", name).out
    assert next(iter(patch.deltas)).removesuffix(".weight") in cli.ok("diff", "HEAD~", "HEAD").out
    assert cli.ok("fsck").code == 0
    assert build(cli, home / "with") != before
    cli.ok("revert", name, "-q")
    assert build(cli, home / "after") == before


@pytest.mark.parametrize("method", KEYED)
def test_one_fact_leaves_and_the_rest_is_refitted(cli: Cli, knowledge: Path, home: Path, method: str) -> None:
    name = commit(cli, home, method, ANN, JAPAN)
    repository = Repository.open(knowledge)
    wanted = repository.patch(name).without([1]).id
    cli.ok("revert", name, "--fact", "2", "-q")
    assert repository.patch(name).id == wanted
    cli.ok("revert", LEBRON, "-q")
    done = cli.ok("refit", name, "--json").json
    assert done["patches"][0]["retried"] == []
    again = repository.patch(name)
    assert again.id != wanted
    assert len(again.solved_on) == 1
    assert (again.method, again.recipe) == (method, repository.patch(name).recipe)


@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_a_squash_leaves_the_build_or_says_how_far_it_is(
    cli: Cli, knowledge: Path, home: Path, method: str
) -> None:
    name = commit(cli, home, method, ANN)
    before = build(cli, home / "before")
    done = cli.ok("stack", "squash", name, MICROSOFT, "--inexact", "--json").json
    assert (build(cli, home / "after") == before) == (done["entries_that_differ"] == 0)
    whole = Repository.open(knowledge).patch(done["patch"])
    assert [part["method"] for part in whole.recipe["parts"]] == ["memit", method]
    if method in KEYED:
        assert done["entries_that_differ"] == 0
        cli.ok("revert", done["patch"], "--fact", "1", "-q")
        assert Repository.open(knowledge).patch(done["patch"]).method == method
    else:
        assert f"no keys are kept, since {name} has none" in done["notes"][0]


@pytest.mark.parametrize("method", ["alphaedit", "emmet", "encore", "ultraedit"])
def test_a_joint_merge_is_one_batch(cli: Cli, knowledge: Path, home: Path, method: str) -> None:
    """In the literal equations, with the very C and the stack that the edits were made with."""
    repository, found = Repository.open(knowledge), {}
    git(knowledge, "switch", "-q", "-c", "side")
    found["side"] = commit(cli, home, method, ANN)
    git(knowledge, "switch", "-q", "main")
    found["main"] = commit(cli, home, method, JAPAN)
    apart = [repository.patch(find_patch(repository.stack(rev), name), rev) for rev, name in found.items()]
    done = cli.ok("merge", "side", "--joint", "--json").json
    assert sorted(done["solved_together"]) == sorted(found.values())
    together = [repository.patch(name) for name in found.values()]
    under = [repository.patch(name) for name in (LEBRON, MICROSOFT)]
    for weight in apart[0].deltas:
        keys = [[p.solution.keys.get(weight, torch.zeros(0, 64)) for p in part] for part in (apart, under)]
        K, K_p = (torch.cat(rows).double().T for rows in keys)
        B = torch.cat([p.deltas[weight].B for p in apart], 1).double()
        A = torch.cat([p.deltas[weight].A for p in apart]).double()
        wanted = literal_batch(method, repository, Recipe.from_dict(apart[0].recipe), K, K_p, B, A)
        sums = [
            sum(p.deltas[weight].B.double() @ p.deltas[weight].A.double() for p in part)
            for part in (together, apart)
        ]
        assert (sums[0] - wanted).norm() <= 1e-4 * wanted.norm()
        assert (sums[1] - wanted).norm() > 1e-3 * wanted.norm(), "the plain union is something else"
    cli.ok("fsck")


def literal_batch(method, repository, recipe, K, K_p, B, A):
    """ΔW of all keys K [d_in, N] at once; B and A are the terms of the patches apart."""
    if method == "ultraedit":
        return B @ K.T @ torch.linalg.inv(K @ K.T + recipe.lambda_ * torch.eye(len(K), dtype=K.dtype))
    bench, (layer,) = repository.workbench("cpu"), recipe.layers
    C = statistics_for(
        bench.model,
        bench.tokenizer,
        recipe,
        folder=repository.store.private / "statistics",
        base=repository.settings.base_fingerprint,
    ).layers[layer]
    solve = {
        "emmet": literal.emmet,
        "alphaedit": literal.alphaedit([K_p], recipe.nullspace_threshold, recipe.lambda_),
        "encore": literal.encore([K_p]),
    }[method]
    R = torch.stack([B[:, i] * (A[i] @ K[:, i]) for i in range(2)], 1) if method == "emmet" else B
    return solve(R, K, C.double(), recipe)


def test_what_has_no_keys_is_taken_back_whole_only(cli: Cli, knowledge: Path, home: Path) -> None:
    name = commit(cli, home, "ft", ANN, JAPAN)
    before = snapshot(knowledge)
    refused = cli("revert", name, "--fact", "1")
    assert refused.code == 65
    assert f"{name}: ft keeps no keys, so no single fact can be taken out" in refused.err
    refused = cli("refit", name)
    assert refused.code == 65
    assert f"{name}: ft keeps no targets, so it cannot be refitted" in refused.err
    assert snapshot(knowledge) == before


@pytest.mark.parametrize("method", ["alphaedit", "encore"])
def test_the_stack_is_spared_and_what_was_reverted_is_forgotten(
    cli: Cli, knowledge: Path, home: Path, method: str
) -> None:
    """Refitted after a revert, a patch is what it would have been without the one that left."""
    commit(cli, home, method, ANN)
    repository = Repository.open(knowledge)
    name = commit(cli, home, method, JAPAN)
    on_three = repository.patch(name)
    cli.ok("revert", "ann", "-q")
    cli.ok("refit", name, "-q")
    on_two = repository.patch(name)
    (weight,) = on_two.deltas
    assert (on_two.deltas[weight].A - on_three.deltas[weight].A).norm() > 1e-3 * on_two.deltas[
        weight
    ].A.norm()
    cli.ok("revert", name, "-q")
    assert commit(cli, home, method, JAPAN) == name
    fresh = repository.patch(name)
    assert (fresh.deltas[weight].A - on_two.deltas[weight].A).norm() < 1e-4 * fresh.deltas[weight].A.norm()


@pytest.mark.parametrize("method", ["alphaedit", "encore"])
def test_a_stack_whose_keys_were_left_out_is_refused(
    cli: Cli, knowledge: Path, home: Path, method: str
) -> None:
    git(knowledge, "rm", "-q", f"patches/{LEBRON}/keys.safetensors")
    git(knowledge, "commit", "-q", "-m", "Ship without keys")
    before = snapshot(knowledge)
    refused = cli("commit", facts_file(home, ANN), "--method", method, *SETTINGS[method])
    assert refused.code == 65
    assert (
        f"{LEBRON}: its keys.safetensors was not shipped, so {method} cannot spare its facts" in refused.err
    )
    assert snapshot(knowledge) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "emmet", "--lambda", "3"], "lambda is nothing that emmet reads; leave it out"),
        (["--set", "norm_bound=0.1"], "norm_bound is nothing that memit reads; leave it out"),
        (["--method", "rome", "--layers", "0-1"], "layers should be one layer, which is all that rome edits"),
        (["--method", "ft", "--set", "clamp=2"], "clamp is nothing that ft reads; leave it out"),
        (["--method", "ft", "--set", "norm_bound=-1"], "norm_bound should be a number from 0 up"),
        (
            ["--method", "alphaedit", "--set", "nullspace_threshold=0"],
            "nullspace_threshold should be a positive",
        ),
        (["--method", "rome", "--set", "mean_key=1"], "mean_key should be true or false"),
        (["--method", "rome", "--set", "norm_anchor=3"], "norm_anchor is nothing that rome reads; leave it"),
        (["--set", "norm_anchor=-3"], "norm_anchor should be a number from 0 up"),
        (["--set", "stop_argmax=-1"], "stop_argmax should be from 0 to 10000"),
        (["--method", "encore", "--set", "lambda_norm=-1"], "lambda_norm should be a number from 0 up"),
        (["--method", "ultraedit", "--set", "contexts=2"], "contexts is nothing that ultraedit reads"),
        (
            ["--method", "romme"],
            "'romme' is not an editor; there are alphaedit, emmet, encore, ft, memit, mend, rome, ultra",
        ),
    ],
)
def test_what_a_method_does_not_read_is_refused(
    cli: Cli, knowledge: Path, home: Path, options: list[str], says: str
) -> None:
    before = snapshot(knowledge)
    refused = cli("commit", facts_file(home, ANN), *options)
    assert refused.code == 65
    assert says in refused.err
    assert refused.err.count("\n") == 1
    assert snapshot(knowledge) == before


def test_a_method_takes_over_what_means_the_same(knowledge: Path) -> None:
    repository = Repository.open(knowledge)
    memit = repository.recipe()
    for method in ("emmet", "alphaedit", "encore"):
        recipe = repository.recipe({"method": method})
        assert (recipe.layers, recipe.clamp, recipe.steps) == (memit.layers, memit.clamp, memit.steps)
        assert recipe.statistics_tokens == memit.statistics_tokens
    assert repository.recipe({"method": "alphaedit"}).lambda_ == 10.0
    encore = repository.recipe({"method": "encore"})
    assert (encore.lambda_, encore.stop_argmax) == (memit.lambda_, 4), "it stops early, and memit does not"
    assert memit.stop_argmax == 0
    ultraedit = repository.recipe({"method": "ultraedit"})
    assert (ultraedit.lambda_, ultraedit.layers[0] > memit.layers[0]) == (1.0, True)
    rome = repository.recipe({"method": "rome"})
    assert rome.statistics_tokens == memit.statistics_tokens
    assert (rome.contexts, len(rome.layers)) == (0, 1)
    assert rome.steps != memit.steps
    assert rome.wordings == memit.wordings == 0, "a text too; the base's own recipe borrows five"
    assert repository.recipe({"method": "ft"}).layers == (3,)
    assert (
        find_patch(repository.stack(), "lebron-james").header.recipe
        == memit.override(
            templates=("{}",),
            statistics_digest=find_patch(repository.stack(), "lebron-james").header.recipe[
                "statistics_digest"
            ],
        ).to_dict()
    )


def test_what_editors_say_of_themselves_is_read_without_loading_one() -> None:
    code = (
        "import sys; from patchkit.editing.editor import about, editor_names; "
        "print('\\n'.join(map(about, editor_names()))); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = [type(find_editor(name)).__doc__.split("\n")[0] for name in editor_names()]
    assert done.stdout.splitlines() == loaded
    assert len(set(loaded)) == len(loaded) >= 8
