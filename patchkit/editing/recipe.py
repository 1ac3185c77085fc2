"""Every number that an edit depends on, in one flat table.

A recipe stands in ``patchkit.toml`` as the base's own and, resolved, in the header of each patch:
the same recipe, base, facts and machine give the same patch. Names and defaults are MEMIT's
(Meng et al. 2022, arXiv 2210.07229, and its public hyperparameters). A method reads some of the fields;
the others are not in its table, and setting one is an error. No torch here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from patchkit.errors import BadInput

__all__ = ["CONTEXTS", "Recipe", "fields_read", "format_layers", "parse_layers", "positions"]

_OPENINGS = ("The", "Therefore", "Because", "I", "You")
CONTEXTS = ("contexts", "context_tokens", "context_top_k", "context_openings", "context_seed")
"""The fields that templates are written by."""
_TEXTS = (
    *(*CONTEXTS, "templates"),
    *("wordings", "avoid_sinks"),
    *("statistics_text", "statistics_tokens", "statistics_length", "statistics_seed", "statistics_digest"),
)
_TARGETS = (
    *("clamp", "optimiser", "learning_rate", "rate_decay", "momentum", "steps", "weight_decay"),
    *("kl_factor", "kl_prompt", "stop_loss", "stop_argmax", "templates_per_step", "curvature"),
)
_ALWAYS = ("method", "layers", "guess")
_READ: dict[str, tuple[str, ...]] = {
    "memit": (*_ALWAYS, "lambda", "shrinkage", "context_weight", *_TARGETS, *_TEXTS, "norm_anchor"),
    "emmet": (*_ALWAYS, *_TARGETS, *_TEXTS, "norm_anchor"),
    "rome": (*_ALWAYS, *_TARGETS, *_TEXTS, "mean_key"),
    "ft": (*_ALWAYS, "learning_rate", "rate_decay", "steps", "weight_decay", "stop_loss", "norm_bound"),
    "alphaedit": (*_ALWAYS, "lambda", *_TARGETS, *_TEXTS, "norm_anchor", "nullspace_threshold"),
    "encore": (*_ALWAYS, "lambda", "lambda_norm", *_TARGETS, *_TEXTS, "norm_anchor"),
    "ultraedit": (*_ALWAYS, "lambda", "learning_rate"),
    "mend": (*_ALWAYS, "network_digest"),
}
"""The fields that each of patchkit's own methods reads. One of another package reads what memit does."""
_ONE_LAYER = ("rome", "ft")


@dataclass(frozen=True)
class Recipe:
    """How facts become factors.

    ``lambda_`` weighs what the model knew against the new facts (``lambda`` in JSON and TOML).
    ``clamp``: ||z - init|| <= clamp x ||init||. ``contexts`` texts of ``context_tokens`` tokens are
    written by the base (top-k sampling, seeded); ``templates`` are they, resolved: empty means not
    yet written. A fact borrows at most ``wordings`` prompts of others of its relation, which take turns with
    its own in the templates. With ``avoid_sinks`` a fact whose bare prompt ends its subject in an attention
    sink is edited in a context instead (`editing.sinks`). ``statistics_text`` is "self" or a corpus;
    ``statistics_digest`` is the SHA-256 of the second moments C that were used. ``guess`` marks a recipe
    found by a rule of thumb.

    A fact's search ends with a loss below ``stop_loss``, or the ``stop_argmax``-th time that every token of
    its target is the most probable one in all contexts that a step reads (0: never). ``norm_anchor`` is the
    norm to which values are scaled, that of the unedited model's; 0 leaves them as they are. ``curvature``,
    from 0 to 1: how far the search shuns directions in which text is easily harmed (`editing.curvature`);
    0: not at all, as published. ``shrinkage``, from 0 to 1: how far the solve draws C to a multiple of the
    identity (`Statistics.cholesky`); 0: not at all, as published. ``context_weight``: how much it weighs in
    the solve that a fact's key is another in each context; at 1 each of them is solved for, at 0 their mean
    alone, as published.

    Of one method each: ``mean_key`` (rome) puts the mean key of all contexts everywhere, as R-ROME does;
    ``norm_bound`` (ft) is the most that an entry of the weight may change, 0 for no bound;
    ``nullspace_threshold`` (alphaedit): directions of C with a smaller eigenvalue are free to be edited;
    ``lambda_norm`` (encore) weighs the update's own norm; ``network_digest`` (mend) is the SHA-256 of the
    trained hypernetwork that was used.
    """

    layers: tuple[int, ...]
    lambda_: float = 0.0  # of a method that does not read it
    method: str = "memit"
    clamp: float = 0.75
    optimiser: str = "adam"
    learning_rate: float = 0.5
    rate_decay: float = 1.0
    momentum: float = 0.5
    steps: int = 25
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    kl_prompt: str = "{} is a"
    stop_loss: float = 0.05
    stop_argmax: int = 0
    templates_per_step: int = 0
    curvature: float = 0.0
    shrinkage: float = 0.0
    context_weight: float = 0.0
    contexts: int = 5
    context_tokens: int = 10
    context_top_k: int = 5
    context_openings: tuple[str, ...] = _OPENINGS
    context_seed: int = 0
    templates: tuple[str, ...] = ()
    wordings: int = 0
    avoid_sinks: bool = False
    statistics_text: str = "self"
    statistics_tokens: int = 15360
    statistics_length: int = 128
    statistics_seed: int = 0
    statistics_digest: str = ""
    guess: bool = False
    mean_key: bool = True
    norm_bound: float = 0.0
    nullspace_threshold: float = 0.02
    norm_anchor: float = 0.0
    lambda_norm: float = 0.0
    network_digest: str = ""

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_type(_outer(f.name), _plain(getattr(self, f.name)))
        for name, default in _unread(self.method).items():
            if getattr(self, _inner(name)) != default:
                raise BadInput(f"{name} is nothing that {self.method} reads; leave it out")
        _check_values(self)

    def to_dict(self) -> dict[str, Any]:
        """A flat table of JSON and TOML types, of the fields that the method reads; see `from_dict`."""
        names = (_outer(f.name) for f in fields(self))
        return {n: _plain(getattr(self, _inner(n))) for n in names if n in fields_read(self.method)}

    def reads(self, name: str) -> bool:
        """Whether the method does anything with the field ``name``."""
        return name in fields_read(self.method)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Read a table strictly; BadInput names ``where``, the key and what it should hold."""
        for name in table:
            _known(name, where)
        method = table.get("method", cls.method)
        read = fields_read(method) if isinstance(method, str) else frozenset(table)
        for name in table:
            if name not in read:
                raise BadInput(f"{where}: {name} is nothing that {method} reads; leave it out")
        for name in ("layers", "lambda", "lambda_norm"):
            if name in read and name not in table:
                raise BadInput(f"{where}: {name} is missing")
        try:
            return cls(**{_inner(name): _frozen(name, value) for name, value in table.items()})
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None

    def override(self, **changes: Any) -> Recipe:
        """The same recipe with some fields changed (``lambda`` or ``lambda_``, both work).

        What was resolved from a changed field is resolved again: new contexts give new templates.
        A recipe is no guess any more once its layers and its λ, if it reads one, are given by hand. What
        another method does not read is left behind.
        """
        changes = {_inner(name): _frozen(_outer(name), value) for name, value in changes.items()}
        for name in changes:
            _known(_outer(name), "recipe")
        if not changes.keys().isdisjoint(CONTEXTS):
            changes.setdefault("templates", ())
        if any(name.startswith("statistics") or name == "layers" for name in changes):
            changes.setdefault("statistics_digest", "")
        if "layers" in changes:
            changes.setdefault("network_digest", "")
        method = changes.get("method", self.method)
        if {"layers", "lambda_"} - {_inner(name) for name in _unread(method)} <= changes.keys():
            changes.setdefault("guess", False)
        for name, default in _unread(method).items():
            changes.setdefault(_inner(name), default)
        return replace(self, **changes)


def fields_read(method: str) -> frozenset[str]:
    """The fields that a method reads, by the names in its table; an unknown method reads what memit does."""
    return frozenset(_READ.get(method, _READ["memit"]))


def parse_layers(text: str) -> tuple[int, ...]:
    """ "4-8,10" to (4, 5, 6, 7, 8, 10); BadInput where it is something else."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isascii() or not first.isdigit() or (dash and not (last.isascii() and last.isdigit())):
            raise BadInput(f"layers {text!r}: expected numbers and ranges such as 4-8,10")
        if max(len(first), len(last)) > 4:
            raise BadInput(f"layers {text[:40]!r}: no model has so many")
        run = range(int(first), int(last or first) + 1)
        if not run:
            raise BadInput(f"layers {text!r}: {part.strip()} goes from high to low")
        layers += run
    if not layers or layers != sorted(set(layers)):
        raise BadInput(f"layers {text!r}: each layer once, from low to high, such as 4-8,10")
    return tuple(layers)


def format_layers(layers: Sequence[int]) -> str:
    """(4, 5, 6, 7, 8, 10) to "4-8,10", as `parse_layers` reads it."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def positions(config: Any) -> int | None:
    """The most tokens that a model reads at once, by its transformers config; None where it does not say."""
    found: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found


def _unread(method: Any) -> dict[str, Any]:
    """Field -> default of the fields that a method does not read, by the names in its table."""
    if not isinstance(method, str):
        return {}
    return {_outer(f.name): f.default for f in fields(Recipe) if _outer(f.name) not in fields_read(method)}


def _outer(name: str) -> str:
    return name.removesuffix("_")


def _inner(name: str) -> str:
    return "lambda_" if name == "lambda" else name


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _frozen(name: str, value: Any) -> Any:
    if isinstance(value, str) and name == "layers":
        return parse_layers(value)
    if isinstance(value, list):
        return tuple(value)
    # TOML and the command line write 300 where 300.0 is meant; the header says one of the two, always.
    number = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if number and _HINTS.get(_inner(name)) is float and abs(value) < 2**53 else value


_HINTS = get_type_hints(Recipe)
_WORDS = {
    float: "a number",
    int: "a whole number",
    str: "a text",
    bool: "true or false",
    tuple[int, ...]: 'whole numbers, such as [4, 5, 6] or "4-6"',
    tuple[str, ...]: "a list of texts",
}


def _known(name: str, where: str) -> None:
    names = [_outer(f.name) for f in fields(Recipe)]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; it knows {', '.join(names)}"
        raise BadInput(f"{where}: {name!r} is not a field of a recipe{hint}")


def _check_type(name: str, value: Any) -> None:
    hint = _HINTS[_inner(name)]
    if hint in (tuple[int, ...], tuple[str, ...]):
        kind = int if hint == tuple[int, ...] else str
        right = isinstance(value, list) and all(type(item) is kind for item in value)
    else:
        right = type(value) is hint
    if not right:
        raise BadInput(f"{name} should be {_WORDS[hint]}, not {value!r}")


def _check_values(recipe: Recipe) -> None:
    def require(right: bool, name: str, rule: str) -> None:
        if not right and recipe.reads(name):
            raise BadInput(f"{name} should be {rule}, not {_plain(getattr(recipe, _inner(name)))!r}")

    layers: Sequence[int] = recipe.layers
    ordered = bool(layers) and list(layers) == sorted(set(layers)) and layers[0] >= 0
    require(ordered, "layers", "at least one layer, each once, from low to high")
    alone = len(layers) == 1 or recipe.method not in _ONE_LAYER
    require(alone, "layers", f"one layer, which is all that {recipe.method} edits")
    for name in ("lambda", "clamp", "learning_rate", "nullspace_threshold"):
        value = getattr(recipe, _inner(name))
        require(math.isfinite(value) and value > 0, name, "a positive number")
    from_nought = ("weight_decay", "kl_factor", "stop_loss", "norm_bound", "norm_anchor", "lambda_norm")
    for name in (*from_nought, "context_weight"):
        value = getattr(recipe, name)
        require(math.isfinite(value) and value >= 0, name, "a number from 0 up")
    require(recipe.optimiser in ("adam", "momentum"), "optimiser", '"adam" or "momentum"')
    for name in ("curvature", "shrinkage"):
        require(0 <= getattr(recipe, name) <= 1, name, "from 0 to 1")
    require(0 < recipe.rate_decay <= 1, "rate_decay", "above 0 and at most 1")
    require(0 <= recipe.momentum < 1, "momentum", "from 0 up and below 1")
    require(0 <= recipe.templates_per_step <= 1001, "templates_per_step", "from 0 to 1001")
    require(1 <= recipe.steps <= 10_000, "steps", "from 1 to 10000")
    require(0 <= recipe.stop_argmax <= 10_000, "stop_argmax", "from 0 to 10000")
    require(recipe.kl_prompt.count("{}") == 1, "kl_prompt", 'a text that holds "{}" once')
    require(0 <= recipe.contexts <= 1000, "contexts", "from 0 to 1000")
    require(bool(recipe.context_openings) and all(recipe.context_openings), "context_openings", "some texts")
    for name in ("context_tokens", "context_top_k", "statistics_tokens"):
        require(getattr(recipe, name) >= 1, name, "at least 1")
    require(recipe.statistics_length >= 2, "statistics_length", "at least 2")
    require(bool(recipe.statistics_text), "statistics_text", '"self", a file or the name of a data set')
    for name in ("context_seed", "statistics_seed"):
        require(0 <= getattr(recipe, name) < 2**63, name, "a number from 0 up")
    require(0 <= recipe.wordings <= 1000, "wordings", "from 0 to 1000")
    once = all(template.count("{}") == 1 for template in recipe.templates)
    require(
        once and len(set(recipe.templates)) == len(recipe.templates),
        "templates",
        'texts that hold "{}" once each',
    )
    require(not recipe.templates or recipe.templates[0] == "{}", "templates", 'a list that begins with "{}"')
