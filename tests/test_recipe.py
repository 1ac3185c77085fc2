"""Recipes: published settings by model, strict reading, and one spelling both ways."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from patchkit.editing.published import many_for, read_recipe, recipe_for
from patchkit.editing.recipe import CONTEXTS, Recipe, fields_read, format_layers, parse_layers
from patchkit.errors import BadInput
from patchkit.settings import Settings

PLAIN = Recipe(layers=(4, 5), lambda_=300.0)

PUBLISHED = [
    ("GPT2Config", {"n_layer": 48, "n_embd": 1600}, (13, 17), 20000.0, 0.5, 20, 0.5, 0.75),
    ("GPTJConfig", {"n_layer": 28, "n_embd": 4096}, (3, 8), 15000.0, 0.5, 25, 0.5, 0.75),
    ("GPTNeoXConfig", {"num_hidden_layers": 44, "hidden_size": 6144}, (6, 10), 20000.0, 0.5, 20, 0.5, 0.75),
    ("LlamaConfig", {"vocab_size": 32000}, (4, 8), 15000.0, 0.5, 25, 1e-3, 4.0),
    ("LlamaConfig", {"vocab_size": 128256}, (4, 8), 15000.0, 0.1, 25, 0.5, 0.75),
    ("MistralConfig", {}, (4, 8), 15000.0, 0.5, 25, 1e-3, 4.0),
    ("Qwen2Config", {"num_hidden_layers": 28, "hidden_size": 3584}, (4, 8), 15000.0, 0.5, 25, 1e-3, 4.0),
    ("LlamaConfig", {"num_hidden_layers": 30, "hidden_size": 576}, (4, 8), 1000.0, 0.35, 25, 0.5, 0.75),
]


@pytest.mark.parametrize(("name", "shape", "layers", "lambda_", "rate", "steps", "decay", "clamp"), PUBLISHED)
def test_published_settings(name, shape, layers, lambda_, rate, steps, decay, clamp):
    recipe = recipe_for(getattr(transformers, name)(**shape))
    assert recipe.layers == tuple(range(layers[0], layers[1] + 1))
    found = (recipe.lambda_, recipe.learning_rate, recipe.steps, recipe.weight_decay, recipe.clamp)
    assert found == (lambda_, rate, steps, decay, clamp)
    assert not recipe.guess


@pytest.mark.parametrize(
    ("name", "shape", "lambda_", "norm", "said"),
    [
        ("GPT2Config", {"n_layer": 48, "n_embd": 1600}, 20000.0, 10.0, 4),
        ("LlamaConfig", {"vocab_size": 32000}, 15000.0, 10.0, 3),
        ("LlamaConfig", {"vocab_size": 128256}, 15000.0, 20.0, 2),
    ],
)
def test_published_settings_of_encore(name, shape, lambda_, norm, said):
    recipe = recipe_for(getattr(transformers, name)(**shape), "encore")
    assert (recipe.lambda_, recipe.lambda_norm, recipe.stop_argmax) == (lambda_, norm, said)
    search = (recipe.optimiser, recipe.learning_rate, recipe.weight_decay, recipe.clamp, recipe.stop_loss)
    assert search == ("adam", 0.5, 0.5, 0.75, 0.05)
    assert not recipe.guess


@pytest.mark.parametrize(("name", "layers"), [("MistralConfig", (29, 30)), ("GPTJConfig", (18, 26))])
def test_published_settings_of_ultraedit(name, layers):
    recipe = recipe_for(getattr(transformers, name)(), "ultraedit")
    assert (recipe.layers[0], recipe.layers[-1]) == layers
    assert (recipe.lambda_, recipe.learning_rate, recipe.guess) == (1.0, 1e-6, False)


@pytest.mark.parametrize("depth", range(1, 90))
def test_a_guess_for_ultraedit_lies_inside_the_model(depth):
    recipe = recipe_for(transformers.LlamaConfig(num_hidden_layers=depth, hidden_size=640), "ultraedit")
    assert recipe.guess
    assert 0 <= recipe.layers[0] <= recipe.layers[-1] < depth


def test_what_the_measured_recipe_and_the_guess_share():
    measured = recipe_for(transformers.LlamaConfig(num_hidden_layers=30, hidden_size=576))
    guess = recipe_for(
        transformers.LlamaConfig(num_hidden_layers=30, hidden_size=640, intermediate_size=1700)
    )
    for recipe in (measured, guess):
        assert (recipe.optimiser, recipe.rate_decay, recipe.momentum) == ("momentum", 0.9, 0.5)
        assert (recipe.templates_per_step, recipe.stop_loss) == (2, 0.1)
        assert (recipe.contexts, recipe.context_tokens, recipe.wordings) == (10, 25, 5)
        assert recipe.avoid_sinks
    assert guess.lambda_ == 1700.0


@pytest.mark.parametrize(("words", "guess"), [(128_256, False), (32_000, True)])
def test_alphaedits_threshold_is_published_for_llama_3_and_guessed_for_llama_2(words, guess):
    config = transformers.LlamaConfig(num_hidden_layers=32, hidden_size=4096, vocab_size=words)
    assert recipe_for(config, "alphaedit").guess == guess
    assert not recipe_for(config, "memit").guess


@pytest.mark.parametrize("method", ["memit", "emmet", "alphaedit", "encore", "rome"])
@pytest.mark.parametrize("shape", [(30, 576), (12, 640)])
def test_the_published_search_is_one_option_away(method, shape):
    """MEMIT's public hyperparameters, literally; layers, λ and what else a method has stay."""
    config = transformers.LlamaConfig(num_hidden_layers=shape[0], hidden_size=shape[1])
    measured, published = recipe_for(config, method), recipe_for(config, method, published=True)
    search = {
        "optimiser": "adam",
        "learning_rate": 0.5,
        "rate_decay": 1.0,
        "steps": 25,
        "weight_decay": 0.5,
        "clamp": 4.0 if method == "rome" else 0.75,
        "kl_factor": 0.0625,
        "stop_loss": 0.05,
        "contexts": 5,
        "context_tokens": 10,
        "templates_per_step": 0,
        "wordings": 0,
        "avoid_sinks": False,
        "curvature": 0.0,
    }
    table = published.to_dict()
    assert {name: table[name] for name in search} == search
    assert measured == published.override(
        **{name: getattr(measured, name) for name in search}, guess=measured.guess
    )


SMOLLM2 = transformers.LlamaConfig(num_hidden_layers=30, hidden_size=576)


def _read(overrides, *, facts=1, many=None, **changes):
    """What `commit` reads from a patchkit.toml for SmolLM2 that holds the changes."""
    settings = Settings("m", None, "", {**recipe_for(SMOLLM2).to_dict(), **changes}, many or {})
    with tempfile.TemporaryDirectory() as folder:
        SMOLLM2.save_pretrained(folder)
        return read_recipe(settings, "patchkit.toml", overrides, lambda: Path(folder), facts=facts)


def test_many_facts_in_one_batch_have_fields_of_their_own():
    many = many_for(SMOLLM2)
    few, large = _read(None, many=many, facts=499), _read(None, many=many, facts=500)
    assert few == recipe_for(SMOLLM2)
    assert (large.layers, large.lambda_, large.shrinkage) == (tuple(range(1, 9)), 1500.0, 0.15)
    assert large == few.override(layers=large.layers, lambda_=1500.0, shrinkage=0.15, context_weight=1.0)
    assert _read({"lambda": 3, "method": "memit"}, many=many, facts=500) == large.override(lambda_=3.0)
    for method in ("alphaedit", "memit-published", "ft"):  # of which nothing of the kind was measured
        asked = {"method": method}
        assert _read(asked, many=many, facts=500) == _read(asked), method
    assert many_for(transformers.GPT2Config()) == {}


@pytest.mark.parametrize(
    ("many", "says"),
    [
        ({"lambda": 3.0}, "facts is missing; set it to the size from which on a batch is large"),
        ({"facts": True}, "facts is True; set it to the size"),
        ({"facts": 1}, "facts is 1; set it to the size from which on a batch is large, a whole number from"),
        ({"facts": 9, "method": "emmet"}, "leave out method"),
        ({"facts": 9, "lamda": 3.0}, "did you mean lambda"),
        ({"facts": 9, "shrinkage": 2.0}, "shrinkage should be from 0 to 1"),
        ({"facts": 9, "mean_key": False}, "mean_key is nothing that memit reads"),
    ],
)
def test_a_wrong_table_for_many_facts_is_refused_whatever_the_batch(many, says):
    for facts in (1, 9):
        with pytest.raises(BadInput, match=r"patchkit\.toml: \[recipe\.many\]: ") as error:
            _read(None, many=many, facts=facts)
        assert says in str(error.value)
        assert "\n" not in str(error.value)


def test_a_name_with_published_behind_it_keeps_layers_and_lambda_and_what_is_asked_for():
    plain = _read({"method": "memit-published"})
    assert (plain.method, plain.optimiser, plain.lambda_) == ("memit", "adam", 1000.0)
    by_hand = {"layers": [5, 6], "lambda": 100.0, "learning_rate": 0.1, "kl_factor": 0.0, "wordings": 9}
    changed = _read({"method": "memit-published", "steps": 7}, **by_hand)
    assert changed == plain.override(layers=(5, 6), lambda_=100.0, steps=7, guess=False)
    alphaedit = _read({"method": "alphaedit-published"}, **by_hand)
    assert (alphaedit.layers, alphaedit.lambda_, alphaedit.optimiser) == ((5, 6), 10.0, "adam")


def test_rome_s_published_search_keeps_the_layer_too():
    settings = Settings("m", None, "", {**recipe_for(SMOLLM2, "rome").to_dict(), "layers": [7]}, {})
    with tempfile.TemporaryDirectory() as folder:
        SMOLLM2.save_pretrained(folder)
        found = read_recipe(settings, "patchkit.toml", {"method": "rome-published"}, lambda: Path(folder))
    assert (found.method, found.layers, found.optimiser) == ("rome", (7,), "adam")


def test_of_memit_s_fields_rome_takes_those_of_the_texts_alone():
    """Which contexts a step reads is the search's."""
    found = _read({"method": "rome"}, templates_per_step=0, contexts=3, wordings=2, clamp=0.1)
    usual = _read({"method": "rome"})
    assert found == usual.override(contexts=3, wordings=2)


def test_a_recipe_that_was_tuned_for_one_method_is_a_guess_for_another():
    config = transformers.LlamaConfig(num_hidden_layers=12, hidden_size=640)
    memit = recipe_for(config)
    assert memit.guess
    tuned = memit.override(layers=(3, 4), lambda_=100.0)
    settings = Settings("m", None, "", tuned.to_dict(), {})
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        read = [
            read_recipe(settings, "patchkit.toml", {"method": name}, lambda: Path(folder))
            for name in ("memit", "alphaedit")
        ]
    assert [recipe.guess for recipe in read] == [False, True]


@pytest.mark.parametrize("name", ["ft-published", "nothing-published"])
def test_a_method_without_a_search_has_no_published_one(name):
    with pytest.raises(BadInput, match=f"'{name}' is not an editor.*memit-published, emmet-published"):
        _read({"method": name})


def test_what_is_named_by_hand_is_no_guess_any_more():
    config = transformers.LlamaConfig(num_hidden_layers=12, hidden_size=640)
    memit, rome = recipe_for(config), recipe_for(config, "rome")
    assert memit.override(layers=(3,)).guess
    assert not memit.override(layers=(3,), lambda_=9.0).guess
    assert rome.override(steps=3).guess
    assert not rome.override(layers=(3,)).guess  # it reads no λ


def test_text_grows_with_the_keys_width():
    narrow = transformers.LlamaConfig(num_hidden_layers=30, hidden_size=576, intermediate_size=1536)
    assert recipe_for(narrow).statistics_tokens == 15360
    assert recipe_for(transformers.GPT2Config(n_embd=64)).statistics_tokens == 10 * 4 * 64


def test_a_text_is_no_longer_than_what_the_model_reads():
    assert recipe_for(transformers.GPT2Config(n_positions=64)).statistics_length == 64
    assert recipe_for(transformers.GPT2Config()).statistics_length == 128
    assert recipe_for(transformers.BloomConfig()).statistics_length == 128  # any length


@pytest.mark.parametrize("depth", range(1, 90))
def test_a_guess_is_flagged_and_lies_inside_the_model(depth):
    recipe = recipe_for(transformers.LlamaConfig(num_hidden_layers=depth, hidden_size=640))
    assert recipe.guess
    assert 0 <= recipe.layers[0] <= recipe.layers[-1] < depth
    assert len(recipe.layers) <= 5


def test_a_recipe_is_a_flat_table_both_ways():
    recipe = PLAIN.override(templates=("{}", "You. {}"), guess=True)
    table = recipe.to_dict()
    assert table["lambda"] == 300.0
    assert "lambda_" not in table
    assert Recipe.from_dict(json.loads(json.dumps(table))) == recipe
    assert not any(isinstance(value, dict) for value in table.values())
    assert set(table) == fields_read("memit")


def test_whole_numbers_and_layer_ranges_are_read_where_people_write_them():
    recipe = Recipe.from_dict({"layers": "4-8,10", "lambda": 300, "clamp": 1})
    assert recipe.layers == (4, 5, 6, 7, 8, 10)
    assert type(recipe.lambda_) is type(recipe.clamp) is float
    assert recipe == Recipe.from_dict({"layers": [4, 5, 6, 7, 8, 10], "lambda": 300.0, "clamp": 1.0})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"lambda": 3.0}, "layers is missing"),
        ({"layers": [1]}, "lambda is missing"),
        (
            {"layers": [1], "lambda": 3.0, "lamda": 2},
            "'lamda' is not a field of a recipe; did you mean lambda",
        ),
        ({"layers": [1], "lambda": 3.0, "lambda_": 2}, "'lambda_' is not a field"),
        ({"layers": [1], "lambda": 3.0, "xyzzy": 2}, "it knows layers, lambda"),
        ({"layers": [1], "lambda": "3"}, "lambda should be a number, not '3'"),
        ({"layers": [1], "lambda": True}, "lambda should be a number, not True"),
        ({"layers": [1], "lambda": float("nan")}, "lambda should be a positive number"),
        ({"layers": [1], "lambda": 10**400}, "lambda should be a number"),
        ({"layers": [1], "lambda": 0}, "lambda should be a positive number"),
        ({"layers": [], "lambda": 1}, "layers should be at least one layer"),
        ({"layers": [2, 1], "lambda": 1}, "from low to high"),
        ({"layers": [-1], "lambda": 1}, "from low to high"),
        ({"layers": [1.0], "lambda": 1}, "layers should be whole numbers"),
        ({"layers": [True], "lambda": 1}, "layers should be whole numbers"),
        ({"layers": "4-", "lambda": 1}, "expected numbers and ranges"),
        ({"layers": [1], "lambda": 1, "steps": 0}, "steps should be from 1 to 10000, not 0"),
        ({"layers": [1], "lambda": 1, "steps": 2.0}, "steps should be a whole number"),
        ({"layers": [1], "lambda": 1, "optimiser": "sgd"}, 'optimiser should be "adam" or "momentum"'),
        ({"layers": [1], "lambda": 1, "rate_decay": 0.0}, "rate_decay should be above 0 and at most 1"),
        ({"layers": [1], "lambda": 1, "momentum": 1.0}, "momentum should be from 0 up and below 1"),
        ({"layers": [1], "lambda": 1, "templates_per_step": -1}, "templates_per_step should be from 0"),
        ({"layers": [1], "lambda": 1, "kl_prompt": "is a"}, "kl_prompt should be a text that holds"),
        ({"layers": [1], "lambda": 1, "templates": ["{}", "{} {}"]}, "templates should be texts that hold"),
        ({"layers": [1], "lambda": 1, "templates": ["You. {}"]}, "begins with"),
        ({"layers": [1], "lambda": 1, "templates": "{}"}, "templates should be a list of texts"),
        ({"layers": [1], "lambda": 1, "context_openings": []}, "context_openings should be some texts"),
        ({"layers": [1], "lambda": 1, "weight_decay": -1.0}, "weight_decay should be a number from 0 up"),
        ({"layers": [1], "lambda": 1, "guess": 1}, "guess should be true or false"),
    ],
)
def test_a_wrong_table_is_refused_in_one_line_that_names_place_and_key(table, message):
    with pytest.raises(BadInput, match=message) as caught:
        Recipe.from_dict(table, "patchkit.toml: [recipe]")
    assert str(caught.value).startswith("patchkit.toml: [recipe]: ")
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(list(PLAIN.to_dict())), JSON, max_size=4))
def test_no_table_gives_a_traceback(table):
    try:
        recipe = Recipe.from_dict({"layers": [1], "lambda": 1.0, **table})
    except BadInput as error:
        message = str(error)
    else:
        message = ""
        assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert "\n" not in message


def test_overriding():
    resolved = PLAIN.override(templates=("{}", "You. {}"), statistics_digest="ab", guess=True)
    assert resolved.override(steps=3).templates == resolved.templates
    assert resolved.override(context_seed=1).templates == ()
    assert resolved.override(statistics_seed=1).statistics_digest == ""
    assert resolved.override(layers="1-2").layers == (1, 2)
    assert resolved.override(layers=(1, 2)).statistics_digest == ""
    assert resolved.override(layers=(1, 2)).guess
    assert not resolved.override(layers=(1, 2), **{"lambda": 5}).guess
    assert PLAIN.override(**{"lambda": 5}) == PLAIN.override(lambda_=5.0)
    with pytest.raises(BadInput, match="did you mean steps"):
        PLAIN.override(step=3)
    with pytest.raises(BadInput, match="steps should be"):
        PLAIN.override(steps=0)


@pytest.mark.parametrize(
    ("text", "layers"), [("4-8", (4, 5, 6, 7, 8)), ("3", (3,)), ("1, 4-5,9", (1, 4, 5, 9)), ("7-7", (7,))]
)
def test_layers_are_read(text, layers):
    assert parse_layers(text) == layers


@given(st.sets(st.integers(0, 99), min_size=1))
def test_layers_are_written_as_they_are_read(layers):
    written = format_layers(sorted(layers))
    assert parse_layers(written) == tuple(sorted(layers))
    assert written.count("-") + written.count(",") < len(layers), "no run is longer than its numbers"


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "a",
        "4-",
        "-4",
        "8-4",
        "4,4",
        "5,4",
        "1-3,2",
        "４",
        "1" * 30,
        "0-99999999",
        "8-4,10",
        "4-8,10-9",
    ],
)
def test_layers_that_make_no_sense_are_refused(text):
    with pytest.raises(BadInput, match="layers"):
        parse_layers(text)


def test_recipes_need_no_torch():
    code = "import sys, patchkit.editing.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_what_templates_are_written_by_has_them_written_again():
    recipe = recipe_for(SMOLLM2).override(templates=("{}", "So. {}"))
    assert recipe.override(context_weight=1.0).templates == recipe.templates
    for name in CONTEXTS:
        value = ("It",) if name == "context_openings" else 3
        assert recipe.override(**{name: value}).templates == (), name
