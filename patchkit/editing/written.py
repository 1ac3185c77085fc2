"""What a base wrote itself, kept on this machine: the text that C is collected on, and MEMIT's contexts.

A file is named by the base and by what was asked for; one that is damaged, or holds something else, counts as
absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.canonical import strict_json
from patchkit.editing.corpus import Progress, read_corpus, write_text
from patchkit.editing.kept import kept_name
from patchkit.editing.recipe import Recipe
from patchkit.editing.templates import write_templates
from patchkit.files import mark_used, write_durably, writing
from patchkit.models.loading import float32_compute

__all__ = ["contexts_for", "contexts_name", "kept_text", "text_for", "text_name"]


def contexts_for(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, *, folder: Path, base: str
) -> tuple[str, ...]:
    """The recipe's templates: its own, those in ``folder``, or what the base writes, which is kept there.

    ``base`` names the model: `Checkpoint.as_read`, or a fingerprint alone.
    """
    if recipe.templates:
        return recipe.templates
    path = folder / contexts_name(recipe, base)
    kept = _read(path)
    if (
        kept
        and kept[0] == "{}"
        and all(text.count("{}") == 1 for text in kept)
        and len(set(kept)) == len(kept)
    ):
        return tuple(kept)
    with float32_compute(model):
        templates = write_templates(model, tokenizer, recipe)
    _keep(path, templates)
    return templates


def text_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    folder: Path | None = None,
    base: str = "",
    progress: Progress | None = None,
) -> Iterable[str]:
    """The recipe's documents: the base's own (kept in ``folder``), or a corpus read as far as needed."""
    if recipe.statistics_text != "self":
        return read_corpus(recipe.statistics_text)
    kept = kept_text(recipe, folder, base)
    if kept is not None:
        return kept
    with float32_compute(model), torch.no_grad():
        documents = write_text(model, tokenizer, **_text_settings(recipe), progress=progress)
    if folder is not None:
        _keep(folder / text_name(recipe, base), documents)
    return documents


def kept_text(recipe: Recipe, folder: Path | None, base: str) -> list[str] | None:
    """What the base wrote for this recipe before; None where it is not in ``folder``, or is damaged."""
    return None if folder is None else _read(folder / text_name(recipe, base))


def text_name(recipe: Recipe, base: str) -> str:
    """The file that keeps the text that a base wrote for these settings."""
    return kept_name("text", _text_settings(recipe), base) + ".json"


def contexts_name(recipe: Recipe, base: str) -> str:
    """The file that keeps the templates that a base wrote for these settings."""
    settings = {
        "contexts": recipe.contexts,
        "tokens": recipe.context_tokens,
        "top_k": recipe.context_top_k,
        "openings": list(recipe.context_openings),
        "seed": recipe.context_seed,
    }
    return kept_name("contexts", settings, base) + ".json"


def _text_settings(recipe: Recipe) -> dict[str, int]:
    return {
        "tokens": recipe.statistics_tokens,
        "length": recipe.statistics_length,
        "seed": recipe.statistics_seed,
    }


def _read(path: Path) -> list[str] | None:
    try:
        texts = strict_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    mark_used(path)
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else None


def _keep(path: Path, texts: Sequence[str]) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(texts, ensure_ascii=False, indent=0).encode())
