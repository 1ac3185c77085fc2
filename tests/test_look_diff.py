"""`diff`: facts, weights and behaviour, against models loaded apart; its page, against hostile text."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from command_helpers import (
    LEBRON,
    MICROSOFT,
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
from page_helpers import HOSTILE, Reader

from patchkit.actions.behaviour import Behaviour, FactSaid, PromptSaid
from patchkit.actions.diff import Difference, Measures, Superseded, WeightDifference, difference_of
from patchkit.actions.difference_page import difference_page, write_page
from patchkit.actions.workbench import Workbench
from patchkit.algebra.factors import Delta, Patch
from patchkit.checkpoint import Checkpoint
from patchkit.errors import BadInput, WouldOverwrite
from patchkit.evaluation.generation import continue_greedily
from patchkit.evaluation.texts import Divergence
from patchkit.facts import Fact
from patchkit.repository import Repository

__all__ = ["cli", "git_environment", "home", "knowledge"]


# facts


def test_a_fact_that_another_patch_took_over_is_told_apart(cli: Cli, knowledge: Path) -> None:
    cli.ok("commit", "--replace", "--fact", "Microsoft | {} lies in | Paris", "--set", "steps=2", "-q")
    found = cli.ok("diff", "--json").json
    assert (found["added"], found["removed"], found["changed"]) == ([], [], [])
    (item,) = found["superseded"]
    assert (item["target_before"], item["target"]) == ("Rome", "Paris")
    assert item["patch_before"].startswith("microsoft-")
    assert item["patch"] != item["patch_before"]
    assert (
        f"~ Microsoft lies in → Rome ⇒ Paris  ({item['patch_before']} ⇒ {item['patch']})"
        in cli.ok("diff").out
    )


def test_a_fact_taken_out_of_a_batch_is_removed_and_the_rest_is_not_named(cli: Cli, knowledge: Path) -> None:
    both = facts_file(knowledge.parent, {**LEBRON, "subject": "Ann"}, {**MICROSOFT, "subject": "Japan"})
    cli.ok("commit", both, "--set", "steps=2", "-q")
    cli.ok("revert", "ann", "--fact", "1", "-q")
    found = cli.ok("diff", "--json").json
    assert [fact["subject"] for fact in found["removed"]] == ["Ann"]
    assert found["added"] == found["changed"] == found["superseded"] == []
    head, parent = git(knowledge, "rev-parse", "HEAD", "HEAD~1").split()
    assert (found["old_commit"], found["new_commit"]) == (parent, head)
    assert cli.ok("diff", "base", "HEAD", "--json").json["old_commit"] is None


# weights


def test_weights_are_measured_from_the_factors(cli: Cli, knowledge: Path) -> None:
    (weight,) = cli.ok("diff", "HEAD~1", "HEAD", "--weights", "--json").json["weights"]
    repository = Repository.open(knowledge)
    lebron, microsoft = (
        repository.patch(word).deltas[weight["name"]] for word in ("lebron-james", "microsoft")
    )
    X, D = (delta.B.double() @ delta.A.double() for delta in (lebron, microsoft))
    base = repository.checkpoint().read(weight["name"]).double()
    assert weight["norm"] == pytest.approx(float(D.norm()))
    assert weight["spectral_norm"] == pytest.approx(float(torch.linalg.svdvals(D)[0]))
    assert weight["relative"] == pytest.approx(float(D.norm() / base.norm()))
    assert weight["effective_rank"] == pytest.approx(1)
    assert weight["cosine"] == pytest.approx(float((X * (X + D)).sum() / (X.norm() * (X + D).norm())))
    assert weight["output_angles"] == pytest.approx([0], abs=1e-4)  # what A writes, B writes too
    text = cli.ok("diff", "HEAD~1", "HEAD", "--weights").out
    for part in ("eff.", "σ₁", "of ‖W‖", f"{weight['cosine']:.2f}"):
        assert part in text
    (alone,) = cli.ok("diff", "base", "HEAD~1", "--weights", "--json").json["weights"]
    assert (alone["cosine"], alone["input_angles"]) == (None, [])


def test_the_share_of_the_base_is_open_where_neither_base_nor_catalogue_is_here(
    cli: Cli, knowledge: Path
) -> None:
    for path in (knowledge / ".git" / "patchkit").glob("catalogue.db*"):
        path.unlink()
    (weight,) = cli.ok("diff", "--weights", "--json").json["weights"]
    assert weight["relative"] > 0  # read from the base
    git(knowledge, "config", "patchkit.base", "/nowhere")
    (weight,) = cli.ok("diff", "--weights", "--json").json["weights"]
    assert weight["relative"] is None
    assert "–" in cli.ok("diff", "--weights").out


# behaviour


def probability(model: object, tokenizer: object, prompt: str, target: str) -> float:
    """P(target | prompt), the literal way: a forward pass for each token."""
    ids, total = tokenizer(prompt)["input_ids"], 1.0
    for token in tokenizer(f" {target}")["input_ids"]:
        with torch.no_grad():
            total *= float(model(torch.tensor([ids])).logits[0, -1].softmax(-1)[token])
        ids = [*ids, token]
    return total


def test_both_models_are_asked_side_by_side(cli: Cli, knowledge: Path, home: Path) -> None:
    probes = home / "probes.txt"
    probes.write_text("Ann plays the sport of\n\nRome lies in\n")
    before = snapshot(knowledge)
    found = cli.ok("diff", "--probe", probes, "--json").json["behaviour"]
    assert snapshot(knowledge) == before
    repository = Repository.open(knowledge)
    (old, tokenizer), (new, _) = repository.load("HEAD~1", "cpu"), repository.load("HEAD", "cpu")
    (fact,) = found["facts"]
    assert (fact["kind"], fact["prompt"], fact["target"]) == ("added", "Microsoft lies in", "Rome")
    for key, model in (("target_old", old), ("target_new", new)):
        assert fact[key] == pytest.approx(probability(model, tokenizer, fact["prompt"], "Rome"), rel=1e-4)
    assert fact["says_new"] == continue_greedily(new, tokenizer, [fact["prompt"]])[0]
    assert [p["prompt"] for p in found["prompts"]] == ["Ann plays the sport of", "Rome lies in"]
    for prompt in found["prompts"]:
        said = [continue_greedily(model, tokenizer, [prompt["prompt"]])[0] for model in (old, new)]
        assert [prompt["old"], prompt["new"]] == said
        assert prompt["same"] == (said[0] == said[1])
    kl = found["divergence"]
    assert kl["text"] == "the 3 prompts asked"
    values, sums, counts = [], [], []
    for text in ("Microsoft lies in", "Ann plays the sport of", "Rome lies in"):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            p, q = (model(ids).logits[0].double().log_softmax(-1) for model in (old, new))
        row = (p.exp() * (p - q)).sum(-1).tolist()
        values += row
        sums.append(sum(row))
        counts.append(len(row))
    drawn = np.random.default_rng(0).integers(3, size=(2000, 3))
    means = np.array(sums)[drawn].sum(1) / np.array(counts)[drawn].sum(1)
    assert [kl["low"], kl["high"]] == pytest.approx(list(np.percentile(means, [2.5, 97.5])), rel=1e-3)
    assert kl["positions"] == len(values)
    assert kl["mean"] == pytest.approx(sum(values) / len(values), rel=1e-3)
    assert kl["largest"] == pytest.approx(max(values), rel=1e-3)
    text = cli.ok("diff", "--probe", probes).out
    assert "Microsoft lies in → Rome" in text
    assert "nats a token" in text


def test_probes_may_be_facts_and_kl_may_be_of_a_text(cli: Cli, knowledge: Path, home: Path) -> None:
    probe = facts_file(home, {**LEBRON, "neighbors": ["Paris lies in"]})
    text = home / "text.txt"
    text.write_text("LeBron James plays the sport of football. " * 400)
    found = cli.ok("diff", "HEAD", "HEAD", "--probe", probe, "--text", text, "--json").json["behaviour"]
    assert [(fact["kind"], fact["target"]) for fact in found["facts"]] == [("probe", "football")]
    assert [(p["kind"], p["prompt"], p["same"]) for p in found["prompts"]] == [
        ("neighbor", "Paris lies in", True)
    ]
    line = probe.read_bytes()
    for data in (b"\xef\xbb\xbf" + line, b"[ " + line + b"]"):  # with a byte order mark, and as one array
        probe.write_bytes(data)
        again = cli.ok("diff", "HEAD", "HEAD", "--probe", probe, "--json").json["behaviour"]
        assert again["facts"] == found["facts"]
    assert found["divergence"]["text"] == f"{text}, its first 4096 tokens"
    assert found["divergence"]["positions"] == 4096
    assert found["divergence"]["largest"] < 1e-9  # one stack, twice
    for wrong, code in (("nowhere.txt", 66), (facts_file(home, "{", name="bad.jsonl"), 65)):
        assert cli("diff", "--probe", wrong).code == code
    latin = home / "latin.txt"
    latin.write_bytes(b"a\n\xff")
    assert f"{latin}:2: is not UTF-8" in cli("diff", "--text", latin).err
    (home / "empty.txt").write_text("\n")
    assert (
        cli("diff", "--probe", home / "empty.txt").code
        == cli("diff", "--text", home / "empty.txt").code
        == 65
    )


def test_a_fact_that_was_replaced_is_scored_for_both_targets(cli: Cli, knowledge: Path) -> None:
    cli.ok("commit", "--replace", "--fact", "Microsoft | {} lies in | Paris", "--set", "steps=2", "-q")
    (fact,) = cli.ok("diff", "--behavior", "--json").json["behaviour"]["facts"]
    assert (fact["kind"], fact["target"], fact["was"]) == ("superseded", "Paris", "Rome")
    repository = Repository.open(knowledge)
    for key, revision, target in (("was_old", "HEAD~1", "Rome"), ("target_new", "HEAD", "Paris")):
        wanted = probability(*repository.load(revision, "cpu"), fact["prompt"], target)
        assert fact[key] == pytest.approx(wanted, rel=1e-3)


def test_a_patch_left_out_is_subtracted_and_put_back_to_the_bit(knowledge: Path) -> None:
    repository = Repository.open(knowledge)
    bench = repository.workbench("cpu")
    assert isinstance(bench, Workbench)
    bench.put(repository.patches().values())
    patch = repository.patch("microsoft")
    full = {name: value.clone() for name, value in bench.model.state_dict().items()}
    with bench.without(patch):
        changed = {n for n, value in bench.model.state_dict().items() if not torch.equal(value, full[n])}
        (name,) = patch.deltas
        assert changed == {name}
        D = patch.deltas[name].B.double() @ patch.deltas[name].A.double()
        assert torch.allclose(bench.model.state_dict()[name].double(), full[name].double() - D, atol=1e-6)
    assert all(torch.equal(value, full[name]) for name, value in bench.model.state_dict().items())


def test_a_stack_on_another_base_is_not_put_on_this_one(cli: Cli, knowledge: Path) -> None:
    """The base was moved by hand after its patches were taken back; what stood on the old one is refused."""
    cli.ok("revert", "lebron-james", "microsoft", "-q")
    base = Repository.open(knowledge).settings.base_fingerprint
    settings = knowledge / "patchkit.toml"
    settings.write_text(settings.read_text().replace(base, f"sha256:{'c' * 64}"))
    git(knowledge, "commit", "-q", "-am", "Another base")
    (weight,) = cli.ok("diff", "HEAD~2", "HEAD", "--weights", "--json").json["weights"]
    assert weight["relative"] is None
    bench = Workbench.open(Checkpoint.open(tiny_base()), "cpu")
    bench.put(Repository.open(knowledge).patches(Repository.open(knowledge).stack("HEAD~2")).values())
    bench.checkpoint = Checkpoint.open(tiny_base(), fingerprint=f"sha256:{'c' * 64}")
    with pytest.raises(BadInput, match="was made for another base"):
        bench.put(Repository.open(knowledge).patches(Repository.open(knowledge).stack("HEAD~2")).values())


# the page


def difference(word: str) -> Difference:
    """A difference in which every text is ``word``."""
    old, new = Fact(word, "{} is", word), Fact(word, "{} is", f"{word}!")
    measures = Measures(0.1, 2.0, 1.9, 1.5, (2.0, 1.0, 0.5), 0.3, (10.0, 80.0), (5.0, 60.0))
    return Difference(
        old=word,
        new=word,
        added=[(new, word)],
        removed=[(old, word)],
        changed=[(old, new, word)],
        superseded=[Superseded(old, new, word, word)],
        weights=[WeightDifference(word, 3, 2.3, measures), WeightDifference("b", 1, 1.2, measures)],
        behaviour=Behaviour(
            (FactSaid(word, word, word, word, 0.1, 0.9, 0.8, 0.05, word, word),),
            (PromptSaid(word, word, word, f"{word}?"),),
            Divergence(word, 12, 0.01, 0.005, 0.02, 0.4, 20.0, 21.0, 1.02, 1.08),
        ),
    )


def test_hostile_text_stays_text_in_the_page() -> None:
    harmless, hostile = (
        Reader(difference_page(difference("word"))),
        Reader(difference_page(difference(HOSTILE))),
    )
    assert hostile.tags == harmless.tags
    assert hostile.attributes == harmless.attributes
    assert not hostile.tags & {"script", "img", "iframe", "link", "object"}
    assert hostile.text.count("<script>alert(1)</script>") == harmless.text.count("word") > 15
    assert "{{ 7*7 }}" in hostile.text
    page = difference_page(difference("a\x1b[2J\u202eb\ud800c\0d"))
    assert not {"\x1b", "\u202e", "\ud800", "\0"} & set(page)
    assert "a\ufffd[2J\ufffdb\ufffdc\ufffdd" in page


def test_the_page_loads_nothing_and_holds_its_plots(cli: Cli, knowledge: Path, home: Path) -> None:
    out = home / "diff.html"
    cli.ok("diff", "base", "HEAD", "--behavior", "--html", out)
    read = Reader(out.read_text())
    assert {"svg", "polyline", "rect", "table"} <= read.tags
    assert not read.attributes & {"src", "href", "onload", "onclick"}
    assert "default-src 'none'" in out.read_text()
    assert "LeBron James plays the sport of" in read.text
    cli.ok("diff", "--html", out)  # a page of ours is written anew
    assert "LeBron" not in out.read_text()
    (home / "other.html").write_text("mine")
    assert cli("diff", "--html", home / "other.html").code == WouldOverwrite.exit_code
    assert (home / "other.html").read_text() == "mine"
    assert cli("diff", "--html", home / "no" / "folder.html").code == 74


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_runs_nothing_of_what_facts_say(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page(difference(f"{HOSTILE}<script>document.title='owned'</script>"), path)
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
         "--dump-dom", path.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "<title>owned" not in done.stdout
    assert "<polyline" in done.stdout


def test_stacks_on_bases_of_different_size_cannot_be_compared() -> None:
    generator = torch.Generator().manual_seed(0)

    def made(width: int) -> Patch:
        delta = Delta(torch.randn(4, 1, generator=generator), torch.randn(1, width, generator=generator))
        return Patch((Fact("Ann", "{} plays", "go"),), {"w": delta}, "sha256:" + "0" * 64, "ft", {})

    with pytest.raises(BadInput, match="w: has one shape on one side and another on the other"):
        difference_of({"a": made(6)}, {"b": made(8)})
