"""What a patch's files say of themselves: names, header, and the checks that need no arithmetic.

A patch is a folder of ``facts.jsonl``, ``delta.safetensors`` and ``keys.safetensors`` (the last may
be left out). The delta's single metadata key holds canonical JSON, the `Header`, which names the
base and the hashes of the other two files; so the SHA-256 of the delta is the whole version's id.
Promises: nothing is believed that does not agree with everything else; torch is not imported.
The numbers are in `patchkit.algebra.factors`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patchkit.canonical import canonical_json, hash_bytes, strict_json
from patchkit.errors import BadInput
from patchkit.facts import Fact, dump_facts
from patchkit.tensors import TensorFile, header_of

__all__ = [
    "DELTA",
    "FACTS",
    "FORMAT",
    "JOINT",
    "KEYS",
    "SCALE",
    "SQUASH",
    "Header",
    "WeightEntry",
    "break_even",
    "check_parts",
    "delta_shapes",
    "parts_in",
    "patch_name",
    "read_patch_header",
    "solved_by",
    "solving_recipe",
    "valid_patch_name",
]

FORMAT = 1
FACTS, DELTA, KEYS = "facts.jsonl", "delta.safetensors", "keys.safetensors"
FACTORS, DENSE = "factors", "dense"
SQUASH = "squash"  # the method of a patch that others were joined into
SCALE, JOINT = "scale", "joint"
"""Fields of a recipe that say what became of a patch since: the number that it was multiplied by, and the
hashes of the keys files of all patches that were solved together with it."""

_METADATA_KEY = "patchkit"
_FIELDS = {"format", "base", "facts", "keys", "solved_on", "method", "recipe", "weights"}
_ENTRY_FIELDS = {"shape", "transposed", "form", "rank"}
_PART_FIELDS = {"facts", "id", "method", "recipe", "solved_on"}
_HASH = re.compile(r"[0-9a-f]{64}")
_BASE = re.compile(r"sha256:[0-9a-f]{64}")
_METHOD = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?-[0-9a-f]{8}")
_MAX_SLUG = 40
_MAX_SIDE = 1 << 31


@dataclass(frozen=True, slots=True)
class WeightEntry:
    """One edited weight: (d_out, d_in) as `nn.Linear` has it, whatever way the checkpoint stores it.

    ``transposed``: stored as [d_in, d_out] (GPT-2's Conv1D). ``form``: "factors" (B and A) or "dense".
    ``rank``: the terms in the factors; for a dense update the most it can have, min(d_out, d_in).
    """

    shape: tuple[int, int]
    transposed: bool
    form: str
    rank: int

    @property
    def stored_shape(self) -> tuple[int, int]:
        d_out, d_in = self.shape
        return (d_in, d_out) if self.transposed else (d_out, d_in)

    def to_json(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "transposed": self.transposed,
            "form": self.form,
            "rank": self.rank,
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> WeightEntry:
        if not isinstance(value, dict) or set(value) != _ENTRY_FIELDS:
            raise BadInput(f"{where} does not have exactly a shape, transposed, form and rank")
        shape, transposed, form, rank = (value[key] for key in ("shape", "transposed", "form", "rank"))
        if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_side, shape)):
            raise BadInput(f"{where} has a shape that is not two positive counts")
        if not isinstance(transposed, bool) or form not in (FACTORS, DENSE):
            raise BadInput(f"{where} is stored in no form that this patchkit knows; it may be too old")
        most = break_even(*shape) if form == FACTORS else min(shape)
        if not _is_side(rank) or rank > most or (form == DENSE and rank != most):
            raise BadInput(f"{where} has a rank that its shape and form do not allow")
        return cls((shape[0], shape[1]), transposed, form, rank)


@dataclass(frozen=True, slots=True)
class Header:
    """What a patch was made of: all that its id stands for besides the numbers.

    ``base``: the checkpoint's fingerprint. ``facts``, ``keys``: SHA-256 of those files (``keys`` is None
    where the editor has none). ``solved_on``: ids of the patches that were in force when it was solved.
    ``weights``: by the name of the stored tensor.
    """

    format: int
    base: str
    facts: str
    keys: str | None
    solved_on: tuple[str, ...]
    method: str
    recipe: dict[str, Any]
    weights: dict[str, WeightEntry]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "base": self.base,
            "facts": self.facts,
            "keys": self.keys,
            "solved_on": list(self.solved_on),
            "method": self.method,
            "recipe": self.recipe,
            "weights": {name: entry.to_json() for name, entry in self.weights.items()},
        }

    def versions(self, id_: str) -> set[str]:
        """The ids that a patch with this header and id answers to: its own, and those joined into it."""
        joined = parts_in(self.recipe, id_) if self.method == SQUASH else []
        return {id_, *(part["id"] for part in joined)}

    def to_metadata(self, name: str) -> dict[str, str]:
        """The delta file's metadata; `BadInput` for a header that `from_json` would not take back."""
        try:
            text = canonical_json(self.to_json())
            value = strict_json(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise BadInput(f"{name}: the recipe cannot be written as JSON ({error})") from None
        Header.from_json(value, name)  # what is written can be read
        return {_METADATA_KEY: text.decode("utf-8")}

    @classmethod
    def from_json(cls, value: Any, name: str) -> Header:
        """Check every field; ``name`` is for messages. `BadInput`."""
        if not isinstance(value, dict):
            raise BadInput(f"{name}: the patch header is not a table")
        number = value.get("format")
        if type(number) is not int or number < 1:
            raise BadInput(f"{name}: the patch header does not say its format; restore the patch")
        if number > FORMAT:
            raise BadInput(
                f"{name}: is in patch format {number}, this patchkit reads up to {FORMAT}; update patchkit"
            )
        if set(value) != _FIELDS:
            odd = ", ".join(sorted(set(value) ^ _FIELDS))[:120]
            raise BadInput(f"{name}: the patch header misses or adds fields ({odd!r})")
        _check_hash(value["base"], _BASE, f"{name}: the base fingerprint")
        _check_hash(value["facts"], _HASH, f"{name}: the hash of {FACTS}")
        if value["keys"] is not None:
            _check_hash(value["keys"], _HASH, f"{name}: the hash of {KEYS}")
        if not isinstance(value["method"], str) or not _METHOD.fullmatch(value["method"]):
            raise BadInput(f"{name}: the method is not an editor's name")
        if not isinstance(value["recipe"], dict):
            raise BadInput(f"{name}: the recipe is not a table")
        if value["method"] == SQUASH:
            parts_in(value["recipe"], name)
        return cls(
            value["format"],
            value["base"],
            value["facts"],
            value["keys"],
            _solved_on(value["solved_on"], name),
            value["method"],
            value["recipe"],
            _weights(value["weights"], name),
        )


def believed_header(value: Mapping[str, Any]) -> Header:
    """The header of JSON that passed `Header.from_json` before: a thousand checks again are a wait."""
    weights = {
        name: WeightEntry(tuple(entry["shape"]), entry["transposed"], entry["form"], entry["rank"])
        for name, entry in value["weights"].items()
    }
    return Header(**{**value, "solved_on": tuple(value["solved_on"]), "weights": weights})


def break_even(d_out: int, d_in: int) -> int:
    """The largest rank whose factors are no larger than the dense update: r (d_out + d_in) <= d_out d_in."""
    return d_out * d_in // (d_out + d_in)


def read_patch_header(delta: bytes, name: str) -> Header:
    """The header of a delta file, checked against the tensors in it (names, shapes, dtype). `BadInput`."""
    return header_in(header_of(delta, name), name)


def header_in(file: TensorFile, name: str) -> Header:
    """`read_patch_header` for a file whose safetensors header has been read."""
    if set(file.metadata) != {_METADATA_KEY}:
        raise BadInput(f"{name}: is not a patchkit patch (no patch header in its metadata)")
    text = file.metadata[_METADATA_KEY].encode("utf-8")
    try:
        value = strict_json(text)
        canonical = canonical_json(value)
    except ValueError:
        raise BadInput(f"{name}: the patch header is not JSON that can be believed") from None
    if canonical != text:
        raise BadInput(f"{name}: the patch header is not in its one canonical spelling")
    header = Header.from_json(value, name)
    check_tensors(file, delta_shapes(header), name)
    return header


def delta_shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """The tensors that a delta file must hold, all float32: ``W.B`` and ``W.A``, or ``W.dense``."""
    shapes: dict[str, tuple[int, ...]] = {}
    for weight, entry in header.weights.items():
        d_out, d_in = entry.shape
        if entry.form == DENSE:
            shapes[f"{weight}.dense"] = (d_out, d_in)
        else:
            shapes[f"{weight}.B"] = (d_out, entry.rank)
            shapes[f"{weight}.A"] = (entry.rank, d_in)
    return shapes


def parts_in(recipe: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """How each part of a joined patch was made, with the number of its facts. `BadInput`."""
    parts = recipe.get("parts")
    if not isinstance(parts, list) or not parts:
        raise BadInput(f"{name}: is a {SQUASH} that does not say of what; restore it")
    for part in parts:
        if not isinstance(part, dict) or set(part) != _PART_FIELDS or not _is_side(part["facts"]):
            raise BadInput(f"{name}: a part of this {SQUASH} does not say how it was made; restore the patch")
        _check_hash(part["id"], _HASH, f"{name}: the id of a part")
        if not isinstance(part["recipe"], dict) or not isinstance(part["method"], str):
            raise BadInput(f"{name}: a part of this {SQUASH} has no method and recipe; restore the patch")
        _solved_on(part["solved_on"], name)
    return [dict(part) for part in parts]


def check_parts(header: Header, facts: int, name: str) -> None:
    """`BadInput` where the parts of a joined patch have not so many facts together."""
    if header.method != SQUASH:
        return
    told = sum(part["facts"] for part in parts_in(header.recipe, name))
    if told != facts:
        raise BadInput(f"{name}: its parts have {told} facts together, and it has {facts}; restore the patch")


def solving_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe that an editor solved by, without what became of the patch since."""
    return {name: value for name, value in recipe.items() if name not in (SCALE, JOINT)}


def solved_by(header: Header, name: str) -> list[dict[str, Any]]:
    """The recipes that a patch was solved by: one, or one for each part of a joined patch. `BadInput`."""
    joined = header.method == SQUASH
    recipes = [part["recipe"] for part in parts_in(header.recipe, name)] if joined else [header.recipe]
    return [solving_recipe(recipe) for recipe in recipes]


def check_tensors(file: TensorFile, shapes: dict[str, tuple[int, ...]], name: str) -> None:
    """`BadInput` unless the file holds exactly these float32 tensors."""
    if odd := sorted(set(file.tensors) ^ set(shapes)):
        raise BadInput(f"{name}: misses or adds tensors ({odd[0][:120]!r})")
    for key, shape in shapes.items():
        found = file.tensors[key]
        if found.dtype != "F32" or found.shape != shape:
            raise BadInput(f"{name}: tensor {key[:120]!r} is not float32 of the shape that its patch needs")


def patch_name(facts: Sequence[Fact]) -> str:
    """The folder that these facts get when first committed: a slug and 8 hex digits of their file's hash."""
    return f"{_slug(facts[0].subject)}-{hash_bytes(dump_facts(facts))[:8]}"


def valid_patch_name(name: str) -> bool:
    """Whether a folder's name is one that `patch_name` can give."""
    return _NAME.fullmatch(name) is not None


def _slug(subject: str) -> str:
    plain = unicodedata.normalize("NFKD", subject).encode("ascii", "ignore").decode("ascii").lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:_MAX_SLUG].strip("-")
    return slug or "fact"  # a subject in another script still gets a name; the hash tells it apart


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value < _MAX_SIDE


def _check_hash(value: Any, pattern: re.Pattern[str], what: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise BadInput(f"{what} is not a SHA-256")


def _solved_on(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise BadInput(f"{name}: solved_on is not a list of patch ids")
    for item in value:
        _check_hash(item, _HASH, f"{name}: an id in solved_on")
    if value != sorted(set(value)):  # a stack is a set: one order, or equal patches would differ
        raise BadInput(f"{name}: solved_on is not sorted or names a patch twice")
    return tuple(value)


def _weights(value: Any, name: str) -> dict[str, WeightEntry]:
    if not isinstance(value, dict) or not value:
        raise BadInput(f"{name}: the patch changes no weights")
    return {
        weight: WeightEntry.from_json(entry, f"{name}: weight {weight[:120]!r}")
        for weight, entry in value.items()
    }
