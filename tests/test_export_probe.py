"""`export … --probe`: an adapter that works passes, and each way in which one does not is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command_helpers import (
    LEBRON,
    MICROSOFT,
    Cli,
    cli,
    facts_file,
    git_environment,
    home,
    knowledge,
    tiny_base,
)
from shipping_helpers import loaded, logits, with_adapter
from torch import Tensor

from patchkit.actions import export as action
from patchkit.errors import CheckFailed
from patchkit.evaluation.measure import FactState, PromptState
from patchkit.facts import Fact
from patchkit.repository import Repository
from patchkit.shipping.peft_adapter import adapted
from patchkit.shipping.probe import Probed, check

__all__ = ["cli", "git_environment", "home", "knowledge"]

NEIGHBOURS = {**LEBRON, "neighbors": ["Ann plays the sport of", "Paris lies in"]}


@pytest.fixture
def with_neighbours(cli: Cli, knowledge: Path, home: Path) -> Path:
    """The repository with LeBron's fact committed again, now with prompts that must not change."""
    cli.ok("revert", "lebron-james", "-q")
    cli.ok("commit", facts_file(home, NEIGHBOURS), "-q")
    return knowledge


def altered(change: Callable[[str, Tensor], Tensor]) -> Callable[..., dict[str, bytes]]:
    """`adapter_files` with every tensor changed, as a runtime would see it that reads it in another way."""
    from safetensors.torch import load, save

    real = action.adapter_files

    def files(*args: Any, **options: Any) -> dict[str, bytes]:
        made = real(*args, **options)
        tensors: Mapping[str, Tensor] = load(made["adapter_model.safetensors"])
        changed = {name: change(name, value) for name, value in tensors.items()}
        return {**made, "adapter_model.safetensors": save(changed, {"format": "pt"})}

    return files


def test_an_adapter_that_works_passes_and_is_told(cli: Cli, with_neighbours: Path, home: Path) -> None:
    done = cli.ok("export", "peft", "--out", home / "adapter", "--probe", "--json").json
    told = done["verdict"]
    assert (told["facts"], told["effective"], told["neighbors"]) == (2, 2, 2)
    assert told["took"] == told["took_in_build"]
    assert told["kept"] == told["kept_in_build"]
    for one in done["probed"]:
        assert one["shipped"]["rewrite"]["target"] == pytest.approx(
            one["build"]["rewrite"]["target"], abs=0.02
        )
        assert one["base"]["rewrite"]["target"] * 2 < one["shipped"]["rewrite"]["target"]
    text = cli.ok("export", "peft", "--out", home / "again", "--probe").out
    assert "takes effect on 2 of 2 facts" in text
    assert "LeBron James → football" in text


def test_what_was_measured_is_what_peft_says(cli: Cli, knowledge: Path, home: Path) -> None:
    """The probability that the probe tells, computed again on the adapter by PEFT alone."""
    from patchkit.evaluation.likelihood import score_targets
    from patchkit.models.loading import load_model

    done = cli.ok("export", "peft", "--out", home / "adapter", "--probe", "--json").json
    model = with_adapter(tiny_base(), home / "adapter")
    tokenizer = load_model(tiny_base())[1]
    for one in done["probed"]:
        prompt = one["prompt"].replace("{}", one["subject"])
        (score,) = score_targets(model, tokenizer, [(prompt, one["target"])])
        assert score.probability == pytest.approx(one["shipped"]["rewrite"]["target"], rel=1e-4)


def test_a_silent_no_op_is_found(
    cli: Cli, knowledge: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(action, "adapter_files", altered(lambda name, value: torch.zeros_like(value)))
    done = cli("export", "peft", "--out", home / "adapter", "--probe")
    assert done.code == 1
    assert "leaves 2 of 2 facts as the base has them" in done.err
    assert "nothing was written" in done.err
    assert sorted(path.name for path in home.iterdir()) == ["knowledge"]
    cli.ok("export", "peft", "--out", home / "adapter")  # which asks nothing


def test_an_adapter_that_peft_cannot_load_is_found(
    cli: Cli, knowledge: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(action, "adapter_files", altered(lambda name, value: value[:, :-1].contiguous()))
    done = cli("export", "peft", "--out", home / "adapter", "--probe")
    assert done.code == 1
    assert "PEFT does not load the adapter" in done.err
    assert len(done.err.splitlines()) == 1
    assert not (home / "adapter").exists()


def test_facts_that_are_lost_are_found(
    cli: Cli, knowledge: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a tenth of its strength, as where a runtime scales by another alpha."""
    weak = altered(lambda name, value: value * 0.1 if "lora_B" in name else value)
    monkeypatch.setattr(action, "adapter_files", weak)
    done = cli("export", "peft", "--out", home / "adapter", "--probe")
    assert done.code == 1
    assert "facts that the build holds, first '" in done.err
    assert not (home / "adapter").exists()


def test_neighbours_that_stray_are_found(
    cli: Cli, with_neighbours: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty times too strong: the facts hold all the more, and other answers go."""
    build = cli.ok("export", "peft", "--out", home / "adapter", "--probe", "--json").json["verdict"]
    assert build["kept_in_build"] > 0
    strong = altered(lambda name, value: value * 20 if "lora_B" in name else value)
    monkeypatch.setattr(action, "adapter_files", strong)
    done = cli("export", "peft", "--out", home / "again", "--probe")
    assert done.code == 1
    assert "neighbours that the build leaves alone" in done.err or "facts that the build holds" in done.err
    assert not (home / "again").exists()


def test_facts_without_neighbours_are_said(cli: Cli, knowledge: Path, home: Path) -> None:
    assert "no fact lists neighbours" in cli.ok("export", "peft", "--out", home / "a", "--probe").out
    assert "no fact lists neighbours" not in cli.ok("export", "peft", "--out", home / "b").out


def test_a_patch_without_the_one_under_it_is_said(cli: Cli, knowledge: Path, home: Path) -> None:
    """Microsoft's was solved on top of LeBron's."""
    said = cli.ok("export", "peft", "microsoft", "--out", home / "a").out
    assert "was solved on top of lebron-james-" in said
    assert "solved on top" not in cli.ok("export", "peft", "lebron-james", "--out", home / "b").out
    assert "solved on top" not in cli.ok("export", "peft", "--out", home / "c").out


def test_the_model_is_its_own_again_after_the_adapter(cli: Cli, knowledge: Path, home: Path) -> None:
    cli.ok("export", "peft", "--out", home / "adapter")
    model = loaded(tiny_base())
    before, modules = logits(model), [name for name, _ in model.named_modules()]
    with adapted(model, home / "adapter"):
        worn = logits(model)
    assert not torch.equal(worn, before)
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_modules()] == modules
    assert torch.equal(worn, logits(with_adapter(tiny_base(), home / "adapter")))


def test_python_gives_the_same(knowledge: Path, home: Path) -> None:
    done = Repository.open(knowledge).export(["microsoft"], home / "adapter", probe=True)
    assert done.folder == home / "adapter"
    assert done.probed is not None
    assert [one.fact.subject for one in done.probed] == [MICROSOFT["subject"]]


@pytest.mark.parametrize(
    ("base", "build", "shipped", "effective", "lost"),
    [
        (0.02, 0.9, 0.88, True, False),
        (0.02, 0.9, 0.02, False, True),
        (0.02, 0.9, 0.10, True, True),  # less than half of the 3.8 nats
        (0.90, 0.91, 0.90, False, False),  # known before
        (0.02, 0.02, 0.02, False, False),  # the build does not move it either
    ],
)
def test_what_counts_as_taking_effect(
    base: float, build: float, shipped: float, effective: bool, lost: bool
) -> None:
    def state(probability: float) -> FactState:
        rewrite = PromptState("Ann lies in", probability, None, False, False, False, "Rome", 7)
        return FactState(rewrite, (), ())

    fact = Fact("Ann", "{} lies in", "Rome")
    one = Probed(fact, state(base), state(build), state(shipped))
    assert (one.effective, one.lost) == (effective, lost)
    assert one.silent == (not effective and build != base)
    if build == base == shipped:
        with pytest.raises(CheckFailed, match="the patches do nothing"):
            check([one], "adapter")


@pytest.mark.parametrize(
    ("tokens", "strays"),
    [((1, 1, 1), False), ((1, 1, 2), True), ((1, 2, 2), False), ((1, 2, 3), False), ((1, 2, 1), False)],
)
def test_what_counts_as_straying(tokens: tuple[int, int, int], strays: bool) -> None:
    """On base, build and artefact: only what the build leaves alone can stray."""

    def state(token: int, probability: float) -> FactState:
        rewrite = PromptState("Ann lies in", probability, None, True, True, True, "Rome", 7)
        neighbour = PromptState("Paris lies in", 0.1, None, False, False, None, None, token)
        return FactState(rewrite, (), (neighbour,))

    states = [state(*pair) for pair in zip(tokens, (0.1, 0.9, 0.9), strict=True)]
    one = Probed(Fact("Ann", "{} lies in", "Rome"), *states)
    assert one.strayed == (("Paris lies in",) if strays else ())
    if strays:
        with pytest.raises(CheckFailed, match="moves 1 neighbours that the build leaves alone"):
            check([one], "adapter")
    else:
        check([one], "adapter")
