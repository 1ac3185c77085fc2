"""`patchkit tune`: what is tried, what takes over, what is written; on a base whose recipe is a bad one."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_helpers import (
    LIES,
    PLAYS,
    RECIPE,
    WORLD,
    Cli,
    cli,
    facts_file,
    git,
    git_environment,
    home,
    knowledge,
    set_recipe,
    snapshot,
)

from patchkit.actions import trials as trials_of
from patchkit.actions import tune as tuning
from patchkit.editing.recipe import Recipe
from patchkit.errors import BadInput, Unavailable
from patchkit.evaluation.intervals import Interval
from patchkit.evaluation.metrics import METRICS
from patchkit.evaluation.tracing import Tracer, deviation, prompt_of
from patchkit.evaluation.tuning import Knob, knobs, merit, peak, scores_of, shown
from patchkit.facts import Fact
from patchkit.models.loading import load_model
from patchkit.repository import Repository
from patchkit.settings import Settings

__all__ = ["cli", "git_environment", "home", "knowledge"]

PROMPTS = {PLAYS: "Ann said that {} plays the sport of", LIES: "Ann said that {} lies in"}
OTHERS = {PLAYS: ("basketball", "football", "painter", "dancers"), LIES: ("France", "Japan", "Rome", "Paris")}


def record(subject: str, prompt: str, was: str) -> dict[str, Any]:
    others = OTHERS[prompt]
    target = others[(others.index(was) + 1) % 4]
    neighbors = [text.replace("{}", name) for (name, text), said in WORLD.items() if said == was][:3]
    return {
        "subject": subject,
        "prompt": prompt,
        "target": target,
        "was": was,
        "paraphrases": [PROMPTS[prompt].replace("{}", subject)],
        "neighbors": [text for text in neighbors if subject not in text] or ["Paris plays"],
    }


RECORDS = [record(subject, prompt, was) for (subject, prompt), was in WORLD.items()]


@pytest.fixture
def records(home: Path) -> Path:
    return facts_file(home, *RECORDS)


@pytest.fixture
def only_lambda(monkeypatch: pytest.MonkeyPatch) -> None:
    """λ alone is tried, which costs no search."""
    monkeypatch.setattr(trials_of, "knobs", lambda recipe, depth, middle: [Knob("lambda", (2.0, 9.0))])


def a_scores(**values: float) -> dict[str, Interval]:
    return {name: Interval(value, value, value) for name, value in values.items()}


def test_the_settings_that_are_tried() -> None:
    recipe = Recipe(layers=(4, 5, 6, 7, 8), lambda_=1536.0, optimiser="momentum", learning_rate=0.35)
    tried = {knob.name: knob.values for knob in knobs(recipe, 30, lambda: 12)}
    assert list(tried) == [
        "lambda",
        "shrinkage",
        "layers",
        "curvature",
        "learning_rate",
        "contexts",
        "clamp",
        "stop_loss",
    ]
    assert (tried["shrinkage"], tried["curvature"]) == ((0.15,), (0.5,))
    assert tried["lambda"] == (100.0, 300.0, 5000.0)
    assert tried["layers"] == ((10, 11, 12, 13, 14), (8, 9, 10, 11, 12))
    assert tried["contexts"] == (10,)
    emmet = Recipe(layers=(4, 5, 6, 7, 8), method="emmet", stop_loss=0.0)
    assert [knob.name for knob in knobs(emmet, 30, lambda: 12)] == [
        "layers",
        "curvature",
        "learning_rate",
        "contexts",
        "clamp",
    ]


@pytest.mark.parametrize("depth", range(1, 9))
@pytest.mark.parametrize("middle", [None, 0, 1, 3, 7])
def test_windows_lie_in_the_model_below_its_last_block(depth: int, middle: int | None) -> None:
    layers = tuple(range(min(2, depth)))
    windows = {knob.name: knob.values for knob in knobs(Recipe(layers, 1.0), depth, lambda: middle)}["layers"]
    for window in windows:
        assert len(window) == len(layers)
        assert window != layers
        assert window[0] >= 0
        assert window[-1] <= max(depth - 2, len(layers) - 1)


def test_a_peak_lies_in_its_reach_and_a_merit_is_that_of_the_page() -> None:
    assert peak([9.0, 1.0, 2.0, 3.0, 9.0], range(1, 4)) == 3
    scores = a_scores(S=0.8, **{"paraphrase argmax": 0.6})
    assert merit(scores) == pytest.approx(0.95)
    assert [shown("layers", each) for each in ((4, 5, 6), (4,), (1, 3))] == ["4-6", "4", "1,3"]
    assert (shown("lambda", 300.0), shown("contexts", 10)) == ("300", "10")


def test_recall_is_what_the_trace_has_at_the_last_subject_token(knowledge: Path) -> None:
    model, tokenizer = load_model(Repository.open(knowledge).base_folder, device="cpu")
    fact = Fact("LeBron James", PLAYS, WORLD["LeBron James", PLAYS])
    prompt = prompt_of(tokenizer, fact, fact.target)
    assert len(prompt.subject) > 1
    tracer, scale = Tracer(model, 2), 3 * deviation(model, [prompt])
    traced = tracer.trace(prompt, scale=scale, samples=3, seed=5)
    place = len(prompt.subject) - 1
    recalled = tracer.recall(prompt, scale=scale, samples=3, seed=5)
    assert recalled.shape == (tracer.depth,)
    assert torch.allclose(recalled, traced.indirect("mlp")[place], atol=1e-6)


def test_a_bad_recipe_is_mended_and_says_why(cli: Cli, knowledge: Path, records: Path) -> None:
    """λ so high that nothing moves: tuning must find a lower one, and others must confirm it."""
    set_recipe(knowledge, RECIPE.replace("lambda = 3.0", "lambda = 40.0 # mine"))
    before = Repository.open(knowledge)
    stack = before.stack().tree
    done = cli.ok("tune", records, "--json").json
    assert (done["chosen_by"], done["held_out"]) == (8, 8)
    assert done["was"]["lambda"] == 40.0
    assert done["recipe"]["lambda"] < 20.0
    assert done["confirmed"]
    assert done["traced"]["facts"] == 8
    assert len(done["traced"]["effects"]) == 4
    first, *others = done["trials"]
    assert (first["name"], first["taken"]) == ("as it begins", True)
    best = first
    for trial in others:
        assert trial["taken"] == (trial["merit"] > best["merit"] + 0.005)
        best = trial if trial["taken"] else best
    settings = tomllib.loads((knowledge / "patchkit.toml").read_text())["recipe"]
    assert settings["lambda"] == done["recipe"]["lambda"] == done["changed"]["lambda"]
    assert {name: settings[name] for name in done["changed"]} == done["changed"]
    (line,) = [text for text in (knowledge / "patchkit.toml").read_text().splitlines() if "lambda" in text]
    assert "# mine; tuned: S/paraphrases before " in line
    assert git(knowledge, "log", "-1", "--format=%H") == done["commit"]
    assert git(knowledge, "log", "-1", "--format=%s").startswith("Tune the recipe: lambda ")
    assert git(knowledge, "status", "--porcelain") == ""
    after = Repository.open(knowledge)
    assert after.stack().tree == stack, "the patches in force stay"
    assert after.recipe().to_dict() == Recipe.from_dict(done["recipe"]).override(templates=()).to_dict()
    cli.ok("undo", "-q")
    assert Repository.open(knowledge).recipe().lambda_ == 40.0


def test_what_is_reported_is_an_edit_with_that_recipe(cli: Cli, knowledge: Path, records: Path) -> None:
    """The trials' scores, held against a commit of the same facts and the command that scores it."""
    cli.ok("revert", "lebron-james", "microsoft", "-q")
    found = cli.ok("tune", records, "--dry-run", "--minutes", "0.0001", "--json").json
    assert [trial["name"] for trial in found["trials"]] == ["as it begins"]
    assert len(found["untried"]) >= 8
    assert found["held"] is None
    from patchkit.evaluation.cases import read_cases
    from patchkit.evaluation.studies import pool

    chosen = pool(read_cases(str(records)), 0)[:16][:8]
    wanted = {case.fact.text for case in chosen}
    lines = [each for each in RECORDS if each["prompt"].replace("{}", each["subject"]) in wanted]
    again = facts_file(knowledge.parent, *lines, name="again.jsonl")
    cli.ok("commit", again, "-q")
    scored = cli.ok("eval", again, "--json").json
    (trial,) = found["trials"]
    for name, (value, *_) in trial["scores"].items():
        assert scored["scores"][name]["b"]["value"] == pytest.approx(value), name


def test_a_dry_run_and_a_recipe_that_is_good_write_nothing(
    cli: Cli, knowledge: Path, records: Path, only_lambda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_recipe(knowledge, RECIPE.replace("lambda = 3.0", "lambda = 40.0"))

    def state() -> Any:
        return (
            snapshot(knowledge / "patches"),
            (knowledge / "patchkit.toml").read_bytes(),
            git(knowledge, "rev-parse", "HEAD"),
        )

    before = state()
    shown = cli.ok("tune", records, "--dry-run").out
    assert "dry run: lambda " in shown
    monkeypatch.setattr(trials_of, "better", lambda scores, than: False)
    assert "patchkit.toml stays" in cli.ok("tune", records).out
    assert state() == before


def test_what_is_worse_on_other_facts_is_not_kept(
    cli: Cli, knowledge: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials_of, "knobs", lambda recipe, depth, middle: [Knob("lambda", (900.0,))])
    monkeypatch.setattr(trials_of, "better", lambda scores, than: True)
    before = git(knowledge, "rev-parse", "HEAD"), (knowledge / "patchkit.toml").read_bytes()
    done = cli.ok("tune", records)
    assert "not better on the facts that were held out" in done.out
    assert before == (git(knowledge, "rev-parse", "HEAD"), (knowledge / "patchkit.toml").read_bytes())


def test_it_begins_with_the_rule_of_thumb_where_it_is_asked_to(
    cli: Cli, knowledge: Path, records: Path
) -> None:
    done = cli.ok("tune", records, "--from-scratch", "--minutes", "0.0001", "--json", "--dry-run").json
    assert done["recipe"]["optimiser"] == "momentum"
    assert done["was"]["optimiser"] == "adam"
    assert done["held"] is not None


def test_the_same_twice(cli: Cli, knowledge: Path, records: Path, only_lambda: None) -> None:
    once, again = (cli.ok("tune", records, "--dry-run", "--json").json for _ in range(2))
    for done in (once, again):
        done.pop("seconds")
        for trial in done["trials"]:
            trial.pop("seconds")
    assert once == again


def test_progress_and_patches_in_force_play_no_part(cli: Cli, knowledge: Path, records: Path) -> None:
    from patchkit.evaluation.cases import read_cases

    told: list[tuple[str, int, int]] = []
    repository, cases = Repository.open(knowledge), read_cases(str(records))
    options: dict[str, Any] = {"minutes": 0.0001, "dry_run": True, "device": "cpu"}
    done = repository.tune(cases, progress=lambda *said: told.append(said), **options)
    assert {"loading", "trials"} <= {phase for phase, _, _ in told}
    assert all(0 <= part <= whole for _, part, whole in told)
    assert (done.traced, done.middle) == (0, None), "there was no time for it"
    cli.ok("revert", "lebron-james", "microsoft", "-q")
    bare = Repository.open(knowledge).tune(cases, **options)
    assert scores_values(done) == scores_values(bare)


def scores_values(done: Any) -> list[list[float]]:
    return [[found.value for found in trial.scores.values()] for trial in done.trials]


def test_scores_are_of_the_metrics() -> None:
    counts = np.ones((4, len(METRICS), 2))
    counts[:2, list(METRICS).index("NS"), 0] = 0
    found = scores_of(counts, 0)
    assert (found["ES"].value, found["NS"].value) == (1.0, 0.5)
    assert found["S"].value == pytest.approx(3 / (1 + 1 + 2))


def test_what_cannot_be_tuned_is_refused(cli: Cli, knowledge: Path, home: Path, records: Path) -> None:
    few = facts_file(home, *RECORDS[:5], *({**each, "neighbors": []} for each in RECORDS[5:]))
    before = git(knowledge, "rev-parse", "HEAD")
    done = cli("tune", few)
    assert (done.code, done.err.count("\n")) == (65, 1)
    assert "5 of its 16 facts have was, paraphrases and neighbors" in done.err
    set_recipe(knowledge, '\n[recipe]\nmethod = "ft"\nlayers = [2]\n')
    done = cli("tune", records)
    assert (done.code, done.err.count("\n")) == (65, 1)
    assert "the method is ft; tune chooses for memit" in done.err
    assert git(knowledge, "rev-parse", "HEAD~1") == before


def test_a_file_that_is_not_committed_is_refused_before_anything_is_measured(
    cli: Cli, knowledge: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = knowledge / "patchkit.toml"
    path.write_text("# mine\n" + path.read_text())
    monkeypatch.setattr(Repository, "workbench", lambda *_: pytest.fail("loaded"))
    done = cli("tune", records)
    assert (done.code, done.err.count("\n")) == (73, 1)
    assert "patchkit.toml: has changes that are not committed" in done.err


def test_an_edit_that_fails_is_named_and_the_next_one_tried(
    cli: Cli, knowledge: Path, records: Path, only_lambda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trials_of.Trials.run

    def failing(self: Any, recipe: Recipe, *rest: Any) -> Any:
        if recipe.lambda_ == 2.0:
            raise BadInput("the loss is not a number")
        return run(self, recipe, *rest)

    monkeypatch.setattr(trials_of.Trials, "run", failing)
    done = cli.ok("tune", records, "--dry-run")
    assert "lambda 2: the loss is not a number" in done.out
    found = cli.ok("tune", records, "--dry-run", "--json").json
    assert [(trial["failed"] is None, trial["merit"] is None) for trial in found["trials"]] == [
        (True, False),
        (False, True),
        (True, False),
    ]


def test_a_confirmation_that_fails_loses_no_trial(
    cli: Cli, knowledge: Path, records: Path, only_lambda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_recipe(knowledge, RECIPE.replace("lambda = 3.0", "lambda = 40.0"))
    for error, told in (
        (BadInput("the loss is not a number"), "the loss is not a number"),
        (torch.OutOfMemoryError("CUDA"), "the device has too little memory"),
    ):

        def failing(*_: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(trials_of.Trials, "confirm", failing)
        done = cli("tune", records)
        assert (done.code, done.err.count("\n")) == (65, 1)
        assert f"could not be confirmed: {told}" in done.err
        assert "lambda 2" in done.out
        assert "no trial was better" not in done.out
        found = cli("tune", records, "--json")
        assert (found.json["failed"].startswith(told), len(found.json["trials"])) == (True, 3)
    assert git(knowledge, "status", "--porcelain") == ""


def test_too_little_memory_for_one_trial_ends_that_trial(
    cli: Cli, knowledge: Path, records: Path, only_lambda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trials_of.Trials.run

    def failing(self: Any, recipe: Recipe, *rest: Any) -> Any:
        if recipe.lambda_ in (2.0, 9.0):
            raise torch.OutOfMemoryError("CUDA") if recipe.lambda_ == 2.0 else Unavailable("out of memory")
        return run(self, recipe, *rest)

    monkeypatch.setattr(trials_of.Trials, "run", failing)
    found = cli.ok("tune", records, "--dry-run", "--json").json
    assert [trial["failed"] for trial in found["trials"]] == [
        None,
        "the device has too little memory for it",
        "out of memory",
    ]


def test_what_a_trial_reads_is_collected_before_its_time_begins(
    cli: Cli, knowledge: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Curvature takes a pass with gradients, once; later trials are not held to cost as much."""
    order: list[tuple[str, float]] = []
    prepare, run = trials_of.Trials.prepare, trials_of.Trials.run

    def prepared(self: Any, recipe: Recipe, *halves: Any) -> Recipe:
        order.append(("prepare", recipe.curvature))
        return prepare(self, recipe, *halves)

    def ran(self: Any, recipe: Recipe, *rest: Any) -> Any:
        order.append(("run", recipe.curvature))
        return run(self, recipe, *rest)

    monkeypatch.setattr(trials_of, "knobs", lambda *_: [Knob("curvature", (0.5,))])
    monkeypatch.setattr(trials_of.Trials, "prepare", prepared)
    monkeypatch.setattr(trials_of.Trials, "run", ran)
    cli.ok("tune", records, "--dry-run", "-q")
    assert order.index(("prepare", 0.5)) < order.index(("run", 0.5))


def test_facts_so_many_that_another_recipe_edits_them_are_told(
    cli: Cli, knowledge: Path, records: Path, only_lambda: None
) -> None:
    set_recipe(knowledge, f"{RECIPE}\n[recipe.many]\nfacts = 6\nlambda = 50.0\n")
    found = cli.ok("tune", records, "--dry-run", "--json").json
    assert any("takes lambda from [recipe.many], which is not tuned" in note for note in found["notes"])
    set_recipe(knowledge, f"{RECIPE}\n[recipe.many]\nfacts = 600\nlambda = 50.0\n")
    assert not any(
        "recipe.many" in note for note in cli.ok("tune", records, "--dry-run", "--json").json["notes"]
    )


def test_a_commit_that_cannot_be_made_says_what_was_found(
    cli: Cli, knowledge: Path, records: Path, only_lambda: None
) -> None:
    set_recipe(knowledge, RECIPE.replace("lambda = 3.0", "lambda = 40.0"))
    hook = knowledge / ".git" / "hooks" / "pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    done = cli("tune", records)
    assert done.code != 0
    assert done.err.count("\n") == 1
    assert "what was found is lambda " in done.err
    assert Repository.open(knowledge).recipe().lambda_ == 40.0


def test_records_without_what_s_is_made_of_are_refused(cli: Cli, knowledge: Path, home: Path) -> None:
    zsre = {"subject": "Ann", "src": "Where does Ann lie?", "rephrase": "Where is Ann?", "alt": "Rome"}
    more = {"answers": ["Paris"], "loc": "nq question: where is Japan", "loc_ans": "Asia"}
    lines = [{**zsre, **more, "subject": f"Ann {n}", "src": f"Where does Ann {n} lie?"} for n in range(20)]
    done = cli("tune", facts_file(home, *lines))
    assert (done.code, done.err.count("\n")) == (65, 1)
    assert "0 of its 20 facts have" in done.err


@pytest.mark.parametrize(
    "wrong", [{"minutes": np.nan}, {"minutes": 0}, {"sample": -1}, {"seed": -1}, {"seed": 2**63}]
)
def test_arguments_are_checked(knowledge: Path, records: Path, wrong: dict[str, Any]) -> None:
    from patchkit.evaluation.cases import read_cases

    with pytest.raises(BadInput):
        Repository.open(knowledge).tune(read_cases(str(records)), **wrong)


def test_pinned_texts_leave_where_other_contexts_were_chosen() -> None:
    was = Recipe((1,), 3.0, contexts=1, templates=("{}", "Then. {}"))
    recipe = {"layers": [1], "lambda": 3.0, "contexts": 1, "templates": ["{}", "Then. {}"], "guess": True}
    settings = Settings("x", None, "sha256:" + 64 * "0", recipe)
    assert tuning._table(settings, was, was) == recipe
    found = tuning._table(settings, was, was.override(contexts=5))
    assert found == {"layers": [1], "lambda": 3.0, "contexts": 5, "guess": False}
    assert tuning._table(settings, was, was.override(clamp=1.0))["templates"] == ["{}", "Then. {}"]
