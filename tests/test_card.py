"""The model card: what it tells is so, whatever a fact holds is shown as text, and a build keeps its own."""

from __future__ import annotations

import hashlib
import re
from html import unescape
from pathlib import Path

import pytest
import yaml
from command_helpers import (
    LEBRON,
    Cli,
    cli,
    facts_file,
    git_environment,
    home,
    knowledge,
    save_checkpoint,
    set_recipe,
)
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchkit.builds.build import verify_build
from patchkit.errors import BadInput
from patchkit.repository import Repository
from patchkit.shipping.card import Card, FactRow, PatchRow, WeightRow, escaped, markdown

__all__ = ["cli", "git_environment", "home", "knowledge"]

HOSTILE = (
    "a | b",
    "<script>alert(1)</script>",
    "[free](https://example.org/x) ![p](x.png)",
    "`code` **bold** _it_ ~~no~~ $x$",
    "https://example.org www.example.org me@example.org @somebody #1",
    "&lt; &amp; \\| \\",
    "{{ template }} {% raw %}",
)


def front_matter(card: str) -> dict[str, object]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def table(card: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, as a reader's program splits them."""
    rows = card.partition(f"\n## {heading}\n\n")[2].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def made_card(text: str, **changes: object) -> str:
    fields: dict[str, object] = {
        "kind": "peft",
        "source": "owner/base",
        "revision": None,
        "fingerprint": "sha256:" + "a" * 64,
        "commit": None,
        "licence": None,
        "patches": [PatchRow("ann-12345678", "b" * 64, "memit", 1)],
        "facts": [FactRow(text, text, text, 0.1, 0.9, text, text)],
        "weights": [WeightRow("model.layers.0.mlp.down_proj.weight", 1, 2.0, 0.0)],
        "measured": [],
    }
    return markdown(Card(**{**fields, **changes}))  # type: ignore[arg-type]


def test_the_card_tells_what_was_measured(cli: Cli, knowledge: Path) -> None:
    repository = Repository.open(knowledge)
    card = cli.ok("card").out
    assert card == repository.card()
    assert f"`{repository.settings.base_fingerprint}`" in card
    assert f"`{repository.store.head()}`" in card
    rows = table(card, "Facts")
    assert [row[:3] for row in rows] == [
        ["LeBron James plays the sport of", "football", "–"],
        ["Microsoft lies in", "Rome", "–"],
    ]
    for row, word in zip(rows, ("lebron-james", "microsoft"), strict=True):
        (found,) = repository.show(word).results.values()
        assert row[3:5] == [f"{found[side]['rewrite']['target']:.3f}" for side in ("before", "after")]
    assert "2 of 2 facts" in card
    for stored in repository.stack().patches:
        assert f"| {stored.name} | {stored.id[:12]} | memit, layers 0, λ 3 | 1 |" in card
    for heading in ("Limits", "Put it on", "Take it off", "Licence"):
        assert f"\n## {heading}\n" in card
    assert front_matter(card)["license"] == "unknown"


def test_ranks_add_up_to_no_more_than_a_weight_has(cli: Cli, knowledge: Path) -> None:
    for subject in ("Ann", "Dutch"):
        cli.ok("commit", "--fact", f"{subject} | {{}} lies in | Rome", "--method", "ft", "-q")
    base = Repository.open(knowledge).checkpoint()
    (rows,) = (part for part in cli.ok("card").out.split("\n\n") if part.startswith("| weight"))
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()[2:]]
    assert cells
    for name, rank, *_ in cells:
        assert int(rank) <= min(base.read(unescape(name.strip("`"))).shape)


def test_a_card_names_the_class_that_loads_the_base() -> None:
    plain = made_card("x")
    assert 'AutoModelForCausalLM.from_pretrained("BASE")' in plain
    seen = made_card("x", loader="AutoModelForImageTextToText")
    assert "from transformers import AutoModelForImageTextToText\n" in seen
    assert 'AutoModelForImageTextToText.from_pretrained("BASE")' in seen
    assert "CausalLM" not in seen


def test_one_patch_at_a_commit_with_a_licence_to_a_file(cli: Cli, knowledge: Path, home: Path) -> None:
    said = cli.ok("card", "lebron-james", "--rev", "HEAD", "--license", "apache-2.0", "--out", home / "c.md")
    assert "c.md" in said.out
    card = (home / "c.md").read_text()
    assert front_matter(card)["license"] == "apache-2.0"
    assert len(table(card, "Facts")) == 1
    assert "microsoft" not in card
    assert cli("card", "--out", home / "c.md").code == 73
    assert (home / "c.md").read_text() == card
    assert cli("card", "--license", "a\nb: c").code == 65
    assert cli("card", "nobody").code == 66


def test_without_measurements_it_says_so(cli: Cli, knowledge: Path, home: Path) -> None:
    """On another machine, where the catalogue has none of them."""
    cli.ok("clone", knowledge, home / "theirs", "--base", Repository.open(knowledge).base_folder)
    card = cli.ok("-C", home / "theirs", "card").out
    assert "Nothing was measured here." in card
    assert table(card, "Facts")[0][3:6] == ["–", "–", "–"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_text(text: str) -> None:
    card = made_card(text)
    (row,) = table(card, "Facts")
    assert len(row) == 7
    html = MarkdownIt("gfm-like", {"linkify": False}).render(escaped(text))
    assert not re.search(r"<(?!/?p>|!-- -->)", html), html
    shown = re.sub(r"<[^>]*>", "", html).strip()
    import html as entities

    assert entities.unescape(shown) == text


@given(st.text(max_size=200))
def test_any_text_is_one_line_and_one_cell(text: str) -> None:
    shown = escaped(text)
    assert shown.count("&#64;<!-- -->") == text.count("@"), "else an address becomes a link"
    shown = shown.replace("&#64;<!-- -->", "&#64;")
    assert "\n" not in shown
    assert not re.search(r"[|<>`*_\[\]]", shown)
    assert len(table(made_card(text), "Facts")[0]) == 7


def test_the_bases_name_is_text_too() -> None:
    card = made_card("x", source="a/b\nlicense: mit\n# Heading <img src=x>")
    assert front_matter(card)["license"] == "unknown"
    assert "<img" not in card.split("---\n", 2)[2]
    assert "\n# Heading" not in card


def test_a_long_list_is_cut_and_counted() -> None:
    facts = [FactRow(f"Person {n} plays", "chess") for n in range(700)]
    card = made_card("x", facts=facts)
    assert len(table(card, "Facts")) == 500
    assert "… and 200 more." in card
    assert "# owner/base with 700 edited facts" in card


# In exports and builds


@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_every_export_holds_one(cli: Cli, knowledge: Path, home: Path, form: str) -> None:
    done = cli.ok("export", form, "--out", home / "a", "--license", "mit", "--json").json
    card = (home / "a" / "README.md").read_text()
    assert done["files"]["README.md"] == len(card.encode())
    assert front_matter(card)["license"] == "mit"
    listed = dict(line.split("  ")[::-1] for line in re.findall(r"^[0-9a-f]{64}  \S+$", card, re.MULTILINE))
    assert listed == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (home / "a").iterdir()
        if path.name != "README.md"
    }
    assert ("PeftModel" in card) == (form == "peft")
    assert "| none |" in card


def test_a_probed_export_tells_what_the_probe_found(cli: Cli, knowledge: Path, home: Path) -> None:
    done = cli.ok("export", "peft", "--out", home / "a", "--probe", "--json").json
    card = (home / "a" / "README.md").read_text()
    assert "it takes effect on 2 of 2 facts" in card
    for row, one in zip(table(card, "Facts"), done["probed"], strict=True):
        expected = [one[side]["rewrite"]["target"] for side in ("base", "shipped")]
        assert row[3:5] == [f"{value:.3f}" for value in expected]


def test_a_build_with_a_card_is_whole_and_loads(cli: Cli, knowledge: Path, home: Path) -> None:
    cli.ok("build", "--out", home / "model", "--card", "--license", "mit")
    card = (home / "model" / "README.md").read_text()
    assert "AutoModelForCausalLM" in card
    assert front_matter(card) == {
        "license": "mit",
        "library_name": "transformers",
        "tags": ["model-editing", "patchkit"],
    }
    assert verify_build(home / "model") == []
    AutoModelForCausalLM.from_pretrained(home / "model")
    AutoTokenizer.from_pretrained(home / "model")
    (home / "model" / "README.md").write_text("altered")
    assert any("README.md: was changed" in line for line in verify_build(home / "model"))
    cli.ok("build", "--out", home / "model", "--card", "--license", "mit")
    assert (home / "model" / "README.md").read_text() == card
    cli.ok("revert", "microsoft", "-q")
    cli.ok("build", "--out", home / "model", "-q", "--card")
    assert "Microsoft" not in (home / "model" / "README.md").read_text()
    cli.ok("build", "--out", home / "model", "-q")
    assert not (home / "model" / "README.md").exists()


def test_the_bases_own_readme_comes_back_with_a_build_without_a_card(cli: Cli, home: Path) -> None:
    base = save_checkpoint(tiny_model("llama"), home / "base")
    (base / "README.md").write_text("# The base\n")
    cli.ok("init", base, "k")
    set_recipe(home / "k", "\n[recipe]\nlayers = [0]\nlambda = 3.0\nstatistics_tokens = 200\ncontexts = 0\n")
    cli.ok("-C", "k", "commit", facts_file(home, LEBRON), "--set", "steps=2", "-q")
    cli.ok("-C", "k", "build", "--out", "model", "--card")
    assert "football" in (home / "model" / "README.md").read_text()
    assert (base / "README.md").read_text() == "# The base\n"
    cli.ok("-C", "k", "build", "--out", "model")
    assert (home / "model" / "README.md").read_text() == "# The base\n"


def test_options_that_would_do_nothing_are_refused(cli: Cli, knowledge: Path, home: Path) -> None:
    base = Repository.open(knowledge).base_folder
    assert cli("build", "--base", base, "--out", home / "o", "--card").code == 2
    assert cli("build", "--license", "mit", "--out", home / "o").code == 2
    assert not (home / "o").exists()
    with pytest.raises(BadInput, match="is no identifier"):
        Repository.open(knowledge).export([], home / "o", licence="x\ny")
    assert not (home / "o").exists()
