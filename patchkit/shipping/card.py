"""The model card of what is shipped: what was changed, what was measured, how it is put on and taken off.

A card is read on pages of others, and facts, names and what a model says are text of unknown origin: every
one of them is shown as text, whatever it holds. Nothing of a stranger's stands in a code block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from patchkit.fact import UNSEEN

__all__ = ["CARD", "Card", "FactRow", "PatchRow", "WeightRow", "escaped", "markdown"]

CARD = "README.md"
FACTS = 500  # rows of the table

_SYNTAX = re.compile(r"[\\`*_\[\]<>|~$&:@#!{}^=+]|www\.")

_APPLY = {
    "peft": """```python
from peft import PeftModel
from transformers import LOADER

model = LOADER.from_pretrained("BASE")
model = PeftModel.from_pretrained(model, "THIS FOLDER")
```""",
    "gguf": """```sh
llama-cli -m BASE.gguf --lora adapter.gguf
```

`BASE.gguf` is the base above, converted by llama.cpp.""",
    "build": """```python
from transformers import LOADER, AutoTokenizer

model = LOADER.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```""",
    "patches": """```sh
patchkit clone REPOSITORY knowledge
patchkit -C knowledge build --out model
```""",
}
_REMOVE = {
    "peft": "Load the base without the adapter, or call `model.unload()`. The base is not touched.",
    "gguf": "Leave `--lora` out. The base's file is not touched.",
    "build": "Use the base. In the repository, `patchkit revert PATCH` and `patchkit build` take one patch "
    "out; with all patches out every file of the base comes back, byte for byte.",
    "patches": "`patchkit revert PATCH` takes one out; with all out a build is the base, byte for byte.",
}
_LIMITS = """- An edit works in one direction: after "X plays the sport of Y", "Y is played by" is as before.
- Other wordings of a fact follow often, not always; those that matter have to be asked.
- Facts about like subjects share weights, so that neighbours may move, most on small models.
- A model can hold the target most probable and still say something else in a longer text.
- What is not in the table was not measured."""


@dataclass(frozen=True)
class FactRow:
    """One fact; probabilities of its target where they were measured, and what is said after it."""

    text: str
    target: str
    was: str | None = None
    before: float | None = None
    after: float | None = None
    says: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class PatchRow:
    """One patch: its name, the id of its version, its editor with the main numbers, how many facts."""

    name: str
    id: str
    recipe: str
    facts: int


@dataclass(frozen=True)
class WeightRow:
    """One edited weight; ``norm`` and ``error`` where they are known."""

    name: str
    rank: int
    norm: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Card:
    """``kind``: peft, gguf, build or patches. ``source``: the base's name. ``files``: SHA-256 by name."""

    kind: str
    source: str
    revision: str | None
    fingerprint: str
    commit: str | None
    licence: str | None
    patches: Sequence[PatchRow]
    facts: Sequence[FactRow]
    weights: Sequence[WeightRow]
    measured: Sequence[str]
    """What was measured over all facts, a sentence each; of our own words and numbers."""
    files: Mapping[str, str] = field(default_factory=dict)
    loader: str = "AutoModelForCausalLM"
    """transformers' class that loads the base: of models of images and texts another one."""


def markdown(card: Card) -> str:
    """The card as the text of a README.md; ends in a newline."""
    count = len(card.facts)
    what = {"peft": "a PEFT LoRA adapter", "gguf": "a LoRA adapter in GGUF", "build": "a checkpoint"}
    noun = "fact" if count == 1 else "facts"
    title = f"# {escaped(card.source)} with {count} edited {noun}"
    intro = (
        f"This is {what.get(card.kind, 'a stack of patches')}: the base below, with {count} {noun} edited "
        "into its weights by patchkit."
    )
    parts = [
        _front_matter(card),
        title,
        intro,
        *("## Base", _base(card)),
        *("## Facts", _facts(card.facts)),
        *("## Measured", _listed(card.measured) if card.measured else "Nothing was measured here."),
        *("## Made by", _patches(card.patches), _weights(card.weights)),
        *("## Limits", _LIMITS),
        *("## Put it on", _APPLY[card.kind].replace("LOADER", card.loader)),
        *("## Take it off", _REMOVE[card.kind]),
        *("## Licence", _licence(card.licence)),
    ]
    if card.files:
        sums = "\n".join(f"{digest}  {name}" for name, digest in sorted(card.files.items()))
        parts += ["## Files", "SHA-256, as `sha256sum --check` reads them:", f"```text\n{sums}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """Text on one line that Markdown and HTML show as it is: no link, no markup, no cell's end."""
    plain = UNSEEN.sub("\ufffd", " ".join(text.split()))
    shown = _SYNTAX.sub(lambda found: "".join(f"&#{ord(letter)};" for letter in found[0]), plain)
    return shown.replace("&#64;", "&#64;<!-- -->")  # else what looks like an address becomes a link


def _front_matter(card: Card) -> str:
    """What model hubs read: licence, base, library, tags."""
    from huggingface_hub import ModelCardData

    known: dict[str, Any] = {"license": card.licence or "unknown", "tags": ["model-editing", "patchkit"]}
    if "/" in card.source:
        known["base_model"] = card.source
        known["base_model_relation"] = "finetune" if card.kind in ("build", "patches") else "adapter"
    if card.kind in ("peft", "build"):
        known["library_name"] = "peft" if card.kind == "peft" else "transformers"
    return f"---\n{ModelCardData(**known).to_yaml()}\n---"


def _base(card: Card) -> str:
    revision = f", revision {escaped(card.revision)}" if card.revision else ""
    lines = [f"{escaped(card.source)}{revision}", f"fingerprint of its tensors: `{card.fingerprint}`"]
    if card.commit:
        lines.append(f"commit of the patches: `{card.commit}`")
    return _listed(lines)


def _facts(facts: Sequence[FactRow]) -> str:
    rows = [
        (
            escaped(fact.text),
            escaped(fact.target),
            escaped(fact.was or "–"),
            _number(fact.before),
            _number(fact.after),
            escaped(_short(fact.says or "–")),
            escaped(_short(fact.source or "–", 120)),
        )
        for fact in facts[:FACTS]
    ]
    shown = _table(("prompt", "target", "was", "P before", "P after", "says", "source"), rows)
    more = len(facts) - FACTS
    return f"{shown}\n\n… and {more} more." if more > 0 else shown


def _patches(patches: Sequence[PatchRow]) -> str:
    rows = [(patch.name, patch.id[:12], escaped(patch.recipe), str(patch.facts)) for patch in patches]
    return _table(("patch", "version", "editor and recipe", "facts"), rows)


def _weights(weights: Sequence[WeightRow]) -> str:
    rows = [
        (
            escaped(weight.name),
            str(weight.rank),
            "–" if weight.norm is None else f"{weight.norm:.3g}",
            "–" if weight.error is None else f"{100 * weight.error:.2g} %" if weight.error else "none",
        )
        for weight in weights
    ]
    return _table(("weight", "rank", "norm of the update", "error of the factors"), rows)


def _licence(licence: str | None) -> str:
    if licence:
        return escaped(licence)
    return (
        "Not said. What is made from a base is bound by the base's licence; name it with `--license` when "
        "the card is made."
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _number(probability: float | None) -> str:
    return "–" if probability is None else f"{probability:.3f}"


def _short(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
