"""What a base wrote is written once: the second time it is read, and what is damaged is written again."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch

from patchkit.editing import written
from patchkit.editing.recipe import Recipe
from patchkit.editing.templates import write_templates
from patchkit.editing.written import contexts_for, contexts_name, text_for, text_name
from patchkit.errors import NotWritten

RECIPE = Recipe(layers=(1, 2), lambda_=5.0, contexts=4, statistics_tokens=60, statistics_length=16)
BASE = "sha256:" + "1" * 64


@pytest.fixture
def tiny():
    return tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()


@pytest.fixture
def silenced(monkeypatch):
    """From here on the model may write nothing."""

    def silence():
        def refuse(*_, **__):
            raise AssertionError("written again")

        monkeypatch.setattr(written, "write_templates", refuse)
        monkeypatch.setattr(written, "write_text", refuse)

    return silence


def test_contexts_are_those_that_the_model_writes_and_are_written_once(tiny, silenced, tmp_path):
    first = contexts_for(*tiny, RECIPE, folder=tmp_path, base=BASE)
    assert first == write_templates(*tiny, RECIPE)
    silenced()
    assert contexts_for(*tiny, RECIPE, folder=tmp_path, base=BASE) == first


def test_a_base_in_half_precision_writes_its_contexts_in_float32_and_keeps_its_bits(tmp_path):
    model, tokenizer = tiny_models.tiny_model("llama", torch.bfloat16), tiny_models.tiny_tokenizer()
    wanted = write_templates(tiny_models.tiny_model("llama", torch.bfloat16).float(), tokenizer, RECIPE)
    assert contexts_for(model, tokenizer, RECIPE, folder=tmp_path, base=BASE) == wanted
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())


def test_a_recipe_that_names_its_templates_keeps_them(tiny, silenced, tmp_path):
    silenced()
    named = RECIPE.override(templates=("{}", "So. {}"))
    assert contexts_for(*tiny, named, folder=tmp_path, base=BASE) == ("{}", "So. {}")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other",
    [
        {"contexts": 3},
        {"context_tokens": 12},
        {"context_top_k": 3},
        {"context_openings": ["Because"]},
        {"context_seed": 1},
    ],
)
def test_other_settings_and_other_bases_have_contexts_of_their_own(other):
    names = {contexts_name(RECIPE, BASE), contexts_name(RECIPE, "sha256:" + "2" * 64)}
    assert len(names | {contexts_name(RECIPE.override(**other), BASE)}) == 3
    assert contexts_name(RECIPE.override(clamp=0.5), BASE) in names


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "\xff",
        '["{}"',
        "{}",
        "[1]",
        "[]",
        '["So. {}"]',
        '["{}", "So."]',
        '["{}", "{} {}"]',
        '["{}", "{}"]',
    ],
)
def test_damaged_contexts_are_written_again(tiny, tmp_path, damaged):
    wanted = contexts_for(*tiny, RECIPE, folder=tmp_path, base=BASE)
    path = tmp_path / contexts_name(RECIPE, BASE)
    whole = path.read_bytes()
    path.write_bytes(damaged.encode("latin-1"))
    assert contexts_for(*tiny, RECIPE, folder=tmp_path, base=BASE) == wanted
    assert path.read_bytes() == whole
    assert tuple(json.loads(whole)) == wanted


def test_the_text_of_statistics_is_written_once(tiny, silenced, tmp_path):
    first = list(text_for(*tiny, RECIPE, folder=tmp_path, base=BASE))
    assert (tmp_path / text_name(RECIPE, BASE)).is_file()
    silenced()
    assert list(text_for(*tiny, RECIPE, folder=tmp_path, base=BASE)) == first


@pytest.mark.parametrize("kept", [contexts_for, text_for])
def test_a_cache_that_cannot_be_written_is_one_line(tiny, tmp_path, kept):
    (tmp_path / "file").touch()
    with pytest.raises(NotWritten, match=r"Not a directory; make room or give write access"):
        kept(*tiny, RECIPE, folder=tmp_path / "file" / "cache", base=BASE)
