"""The recipe of a model and a method: published settings where there are some, else a rule of thumb.

Where each number comes from stands in docs/recipes.md. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from patchkit.editing.many import SIZE, recipe_of_batch
from patchkit.editing.recipe import CONTEXTS, Recipe, fields_read, positions
from patchkit.errors import BadInput
from patchkit.settings import Settings

__all__ = ["AS_PUBLISHED", "SEARCHING", "many_for", "read_recipe", "recipe_for"]

AS_PUBLISHED = "-published"
"""Behind a method's name: with the search of MEMIT's public code, whatever was measured here."""
SEARCHING = ("memit", "emmet", "alphaedit", "encore", "rome")
"""The methods that search targets, so that it says something of them."""

_Shape = tuple[str, int, int]


def recipe_for(config: Any, method: str = "memit", *, guess: bool = False, published: bool = False) -> Recipe:
    """The recipe for a model, by its transformers config: published where there is one, else a guess.

    With ``guess`` it is the rule of thumb in any case; with ``published`` the search of targets is that of
    MEMIT's public code. A method of another package gets memit's.
    """
    config = config.get_text_config(decoder=True)
    kind = "" if guess else config.model_type  # of which nothing is published
    shape = (kind, config.num_hidden_layers, config.hidden_size)
    length = min(Recipe.statistics_length, positions(config) or Recipe.statistics_length)
    size: dict[str, Any] = {"statistics_tokens": 10 * _width(config), "statistics_length": length}
    table = {**_of_memit(config, shape), **size, "method": method}
    if published:
        table = {name: value for name, value in table.items() if not _searched_fast(name, table)}
    if (changes := _CHANGES.get(method)) is not None:
        table |= changes(shape, table)
    read = fields_read(method)
    return Recipe(**{name: value for name, value in table.items() if name.removesuffix("_") in read})


def many_for(config: Any) -> dict[str, Any]:
    """[recipe.many] for a model's own recipe (`editing.many`); empty where none was measured."""
    config = config.get_text_config(decoder=True)
    shape = (config.model_type, config.num_hidden_layers, config.hidden_size)
    return {name.removesuffix("_"): value for name, value in _MANY.get(shape, {}).items()}


def read_recipe(
    settings: Settings,
    where: str,
    overrides: Mapping[str, Any] | None,
    base: Callable[[], Path],
    *,
    facts: int = 1,
) -> Recipe:
    """The recipe of a batch of so many facts, with some fields changed.

    BadInput names ``where`` and the field.
    Another method than the settings' takes over what means the same in both; the rest is what `recipe_for`
    has for the checkpoint in ``base()``. A method's name may end with `AS_PUBLISHED`. What the settings have
    for many facts is of their own method alone.
    """
    recipe = Recipe.from_dict(settings.recipe, f"{where}: [recipe]")
    large = recipe_of_batch(recipe, settings.many, facts, f"{where}: [recipe.many]")
    if not overrides:
        return large
    method, published = _as_published(overrides.get("method", recipe.method))
    if published or _own(method) != _own(recipe.method):
        from patchkit.models.loading import read_config

        recipe = _switched(recipe, method, read_config(base()), published)
    elif method == recipe.method:
        recipe = large
    return recipe.override(**{**overrides, "method": method})


def _as_published(name: Any) -> tuple[Any, bool]:
    """The method that is named, and whether its published search is asked for."""
    if not isinstance(name, str) or not name.endswith(AS_PUBLISHED):
        return name, False
    method = name.removesuffix(AS_PUBLISHED)
    if method not in SEARCHING:
        known = ", ".join(f"{one}{AS_PUBLISHED}" for one in SEARCHING)
        raise BadInput(f"{name!r} is not an editor; those with a published search are {known}")
    return method, True


def _own(method: str) -> str:
    """The method of patchkit's own whose fields a method reads."""
    return method if method in _METHODS else "memit"


def _switched(recipe: Recipe, method: str, config: Any, published: bool) -> Recipe:
    """The method's own recipe for a model, with what was changed by hand in ``recipe`` and means the same.

    Where the published search is asked for, that is the layers, λ and the text for C alone.
    """
    found = recipe_for(config, method, published=published)
    usual = recipe_for(config, recipe.method).to_dict()
    changed = {name: value for name, value in recipe.to_dict().items() if value != usual[name]}
    apart = (*_APART, "guess") if method != recipe.method else _APART[:1]
    same = {name: value for name, value in changed.items() if found.reads(name) and name not in apart}
    if published:
        elsewhere = ("layers", "lambda", "statistics")
        same = {name: value for name, value in same.items() if name.startswith(elsewhere)}
    if method != recipe.method and {method, recipe.method} & set(_OWN_TARGETS):
        same = {
            name: value for name, value in same.items() if name in _OF_TEXTS or name.startswith("statistics")
        }
    elif {method, recipe.method} == {"memit", "encore"} and "lambda" in changed:
        same["lambda"] = changed["lambda"]
        if method == "encore":
            same["lambda_norm"] = found.lambda_norm * changed["lambda"] / found.lambda_
    return found.override(**same)


_METHODS = ("memit", "emmet", "rome", "ft", "alphaedit", "encore", "ultraedit", "mend")
_OWN_TARGETS = ("rome", "ft", "ultraedit", "mend")  # their layers and their way down are not MEMIT's
_OF_TEXTS = (*CONTEXTS, "templates", "wordings", "avoid_sinks")
_APART = ("method", "lambda")  # AlphaEdit's λ weighs a norm, MEMIT's and ENCORE's weigh C


def _layers(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


_EASYEDIT: dict[str, Any] = {"layers": _layers(4, 8), "lambda_": 15000.0, "weight_decay": 1e-3, "clamp": 4.0}
# Chosen on CounterFact-R's even cases: docs/recipes.md.
_FAST: dict[str, Any] = {
    "optimiser": "momentum",
    "learning_rate": 0.35,
    "rate_decay": 0.9,
    "templates_per_step": 2,
    "contexts": 10,
    "context_tokens": 25,
    "wordings": 5,
    "avoid_sinks": True,
    "stop_loss": 0.1,
}
_LLAMA3: dict[str, Any] = {"layers": _layers(4, 8), "lambda_": 15000.0, "learning_rate": 0.1}


def _searched_fast(name: str, table: Mapping[str, Any]) -> bool:
    return table.get("optimiser") == _FAST["optimiser"] and name in (*_FAST, "curvature")


_SMOLLM2 = ("llama", 30, 576)  # SmolLM2-135M
# (model type, blocks, d_model): MEMIT's own settings, EasyEdit's, AlphaEdit's, and our measurements.
_PUBLISHED: dict[_Shape, dict[str, Any]] = {
    ("gpt2", 48, 1600): {"layers": _layers(13, 17), "lambda_": 20000.0, "steps": 20},
    ("gptj", 28, 4096): {"layers": _layers(3, 8), "lambda_": 15000.0},
    ("gpt_neox", 44, 6144): {"layers": _layers(6, 10), "lambda_": 20000.0, "steps": 20},
    ("llama", 32, 4096): _EASYEDIT,
    ("mistral", 32, 4096): _EASYEDIT,
    ("qwen2", 28, 3584): _EASYEDIT,
    ("llama", 28, 3072): _EASYEDIT,
    _SMOLLM2: {"layers": _layers(4, 8), "lambda_": 1000.0, "curvature": 0.5, **_FAST},
}
# What differs for batches of many facts: docs/recipes.md.
_MANY: dict[_Shape, dict[str, Any]] = {
    _SMOLLM2: {
        SIZE: 500,
        "layers": _layers(1, 8),
        "lambda_": 1500.0,
        "shrinkage": 0.15,
        "context_weight": 1.0,
    },
}
# Public settings of ROME and R-ROME for GPT, of EasyEdit and AlphaEdit for Llama: one layer, a wide clamp.
_ROME_GPT: dict[str, Any] = {"steps": 20, "weight_decay": 0.5, "contexts": 20}
_ROME: dict[_Shape, dict[str, Any]] = {
    ("gpt2", 48, 1600): {"layers": (17,), **_ROME_GPT},
    ("gptj", 28, 4096): {"layers": (5,), **_ROME_GPT},
    ("llama", 32, 4096): {"layers": (5,), "steps": 25, "weight_decay": 1e-3},
}
_ALPHAEDIT_PUBLISHED: tuple[_Shape, ...] = (("gpt2", 48, 1600), ("gptj", 28, 4096))  # and Llama-3
_MEND_PUBLISHED: tuple[_Shape, ...] = (("gptj", 28, 4096), ("gpt2", 48, 1600))
_FT_LAYERS: dict[_Shape, int] = {("gptj", 28, 4096): 21, ("llama", 32, 4096): 21}
_SEARCH: dict[str, Any] = {"learning_rate": 0.5, "weight_decay": 0.5, "clamp": 0.75}
# ENCORE's public settings: λ_p, λ_n, how often a fact is said before its search stops; MEMIT's own search.
_ENCORE: dict[_Shape, dict[str, Any]] = {
    ("gpt2", 48, 1600): {"lambda_": 20000.0, "lambda_norm": 10.0, "stop_argmax": 4},
    ("llama", 32, 4096): {"lambda_": 15000.0, "lambda_norm": 10.0, "stop_argmax": 3, **_SEARCH},
}
_ENCORE_LLAMA3: dict[str, Any] = {"lambda_": 15000.0, "lambda_norm": 20.0, "stop_argmax": 2, **_SEARCH}
# UltraEdit's public settings where it edits down-projections; those for GPT-J are its settings for zsRE.
_ULTRAEDIT_LAYERS: dict[_Shape, tuple[int, ...]] = {
    ("mistral", 32, 4096): _layers(29, 30),
    ("gptj", 28, 4096): _layers(18, 26),
}


def _of_memit(config: Any, shape: _Shape) -> dict[str, Any]:
    if shape not in _PUBLISHED:
        return _guess(config.num_hidden_layers, _width(config))
    if shape == ("llama", 32, 4096) and config.vocab_size > 100_000:
        return _LLAMA3
    return _PUBLISHED[shape]


def _is_llama3(memit: dict[str, Any]) -> bool:
    return memit.get("learning_rate") == _LLAMA3["learning_rate"]


def _guess(depth: int, d_ff: int) -> dict[str, Any]:
    """Early-middle layers (published ranges start at 11-27 % of the depth), steps for any norm, λ = d_ff.

    E[kᵀ C⁻¹ k] = d_ff for the very keys that C is made of, whatever their scale, so with λ = d_ff one fact
    alone is met half way by each layer. Published λ lie between a fifth of d_ff and three times it.
    """
    first = max(0, min(round(0.13 * depth), depth - 2))
    last = min(first + 4, max(first, depth - 2))
    return {"layers": _layers(first, last), "lambda_": float(d_ff), "guess": True, **_FAST}


def _of_rome(shape: _Shape, memit: dict[str, Any]) -> dict[str, Any]:
    """Published where there is something; else the middle of MEMIT's layers, and its way down."""
    if shape in _ROME:
        return {**_ROME[shape], "learning_rate": 0.5, "clamp": 4.0}
    layers = memit["layers"]
    middle = layers[len(layers) // 2]
    return {"layers": (middle,), "clamp": 4.0, "curvature": 0.0, "guess": shape != _SMOLLM2}


def _of_ft(shape: _Shape, memit: dict[str, Any]) -> dict[str, Any]:
    """The published rate and layer; elsewhere three quarters up the model, as in GPT-J."""
    layer = _FT_LAYERS.get(shape, min(round(0.75 * shape[1]), shape[1] - 1))
    rest = {"learning_rate": 5e-4, "rate_decay": 1.0, "steps": 25, "weight_decay": 0.0, "stop_loss": 0.01}
    return {"layers": (layer,), **rest, "guess": shape not in (*_FT_LAYERS, _SMOLLM2)}


def _of_mend(shape: _Shape, memit: dict[str, Any]) -> dict[str, Any]:
    """The last three blocks, as published for GPT-J and GPT-2 XL; one block at least is left below them."""
    depth = shape[1]
    guess = shape not in _MEND_PUBLISHED
    return {"layers": _layers(max(depth - 3, min(1, depth - 1)), depth - 1), "guess": guess}


def _of_alphaedit(shape: _Shape, memit: dict[str, Any]) -> dict[str, Any]:
    """λ is the published L2; all else is MEMIT's, as there. The threshold was found for their models' C."""
    published = shape in _ALPHAEDIT_PUBLISHED or _is_llama3(memit)
    return {"lambda_": 10.0, "nullspace_threshold": 0.02, "guess": not published}


def _of_encore(shape: _Shape, memit: dict[str, Any]) -> dict[str, Any]:
    """Published where there is something; else MEMIT's, with λ_n a thousandth of λ, as the published are."""
    if shape not in _ENCORE:
        return {"lambda_norm": memit["lambda_"] / 1000, "stop_argmax": 4, "guess": shape != _SMOLLM2}
    return _ENCORE_LLAMA3 if _is_llama3(memit) else _ENCORE[shape]


def _of_ultraedit(shape: _Shape, memit: dict[str, Any]) -> dict[str, Any]:
    """Published where there is something; else GPT-J's share of the blocks, and a rate that falls with d_ff.

    It goes through the two that are known: 3e-4 takes on SmolLM2-135M, and 1e-6 is published for Mistral 7B.
    """
    if shape in _ULTRAEDIT_LAYERS:
        return {"layers": _ULTRAEDIT_LAYERS[shape], "lambda_": 1.0, "learning_rate": 1e-6}
    depth = shape[1]
    first = min(round(0.64 * depth), depth - 1)
    layers = _layers(first, max(first, depth - 2))
    d_ff = memit["statistics_tokens"] / 10
    rate = min(1e-3, float(f"{3e-4 * (1536 / d_ff) ** 2.5:.1g}"))
    return {"layers": layers, "lambda_": 1.0, "learning_rate": rate, "guess": shape != _SMOLLM2}


_CHANGES = {
    "rome": _of_rome,
    "ft": _of_ft,
    "alphaedit": _of_alphaedit,
    "encore": _of_encore,
    "ultraedit": _of_ultraedit,
    "mend": _of_mend,
}


def _width(config: Any) -> int:
    for name in ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"):
        width = getattr(config, name, None)
        if isinstance(width, int) and width:
            return width
    return 4 * int(config.hidden_size)
