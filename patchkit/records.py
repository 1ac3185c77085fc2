"""Other people's fact records, told in patchkit's own fields.

CounterFact, ROME's known facts, zsRE and EasyEdit each spell a fact in their own way. `native_records`
recognises a record by the fields that it has (nothing is declared) and gives it back as patchkit's
fields, unchecked: `facts.py` checks them as it checks any other fact, and reports faults under the
names that the file itself uses. Fields of a foreign record that say nothing to patchkit are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Record", "native_records"]

NO_OBJECT = "<|endoftext|>"  # what zsRE and EasyEdit put where the old object is not known


@dataclass(frozen=True, slots=True)
class Record:
    """One fact, unchecked: its values, and what the file calls each field."""

    fields: Mapping[str, Any]
    names: Mapping[str, str]
    native: bool

    def called(self, field: str) -> str:
        """The field's name in the file, for a fault."""
        return self.names.get(field, field)


def native_records(raw: Mapping[str, Any]) -> list[Record]:
    """The facts that one JSON object holds: one, or several for EasyEdit's form with lists.

    ValueError says in one line what keeps an EasyEdit list form from being taken apart.
    """
    if "requested_rewrite" in raw:
        return [_counterfact(raw, raw["requested_rewrite"], "requested_rewrite.")]
    if isinstance(raw.get("target_new"), dict) and "target" not in raw:
        return [_counterfact(raw, raw, "")]
    if "attribute" in raw and "template" in raw and "target" not in raw:
        return [_known(raw)]
    if "src" in raw and ("alt" in raw or "answers" in raw):
        return [_zsre(raw)]
    if "prompts" in raw and "target_new" in raw:
        return [_easyedit(one) for one in _apart(raw)]
    if "target_new" in raw and "target" not in raw:
        return [_easyedit(raw)]
    return [Record(raw, {}, native=True)]


def _counterfact(raw: Mapping[str, Any], rewrite: Any, inner: str) -> Record:
    """CounterFact (Meng et al. 2022): `requested_rewrite` and lists of probes; ``inner``: what leads to its
    fields in the file.

    Key: subject and `relation_id`. `paraphrase_prompts` are taken as they are.
    """
    rewrite = rewrite if isinstance(rewrite, Mapping) else {}
    fields = {
        "id": _case(raw, "counterfact"),
        "subject": rewrite.get("subject"),
        "prompt": rewrite.get("prompt"),
        "target": _string_of(rewrite.get("target_new")),
        "was": _string_of(rewrite.get("target_true")),
        "relation": rewrite.get("relation_id"),
        "paraphrases": raw.get("paraphrase_prompts"),
        "neighbors": raw.get("neighborhood_prompts"),
    }
    names = {
        "subject": f"{inner}subject",
        "prompt": f"{inner}prompt",
        "target": f"{inner}target_new.str",
        "was": f"{inner}target_true.str",
        "relation": f"{inner}relation_id",
        "paraphrases": "paraphrase_prompts",
        "neighbors": "neighborhood_prompts",
    }
    return _foreign(fields, names)


def _known(raw: Mapping[str, Any]) -> Record:
    """A fact that a model knows (ROME, Meng et al. 2022): `template` begins the whole `prompt`."""
    subject, prompt, template = raw.get("subject"), raw.get("prompt"), raw["template"]
    if isinstance(subject, str) and isinstance(template, str):
        begin = template.replace("{}", subject)
        if prompt is None:
            prompt = template
        elif isinstance(prompt, str) and prompt.startswith(begin):
            prompt = template + prompt[len(begin) :]
    fields = {
        "id": f"known-{known}" if isinstance(known := raw.get("known_id"), int) else None,
        "subject": subject,
        "prompt": prompt,
        "target": raw["attribute"],
        "was": None,
        "relation": raw.get("relation_id"),
    }
    return _foreign(fields, {"target": "attribute", "relation": "relation_id"})


def _zsre(raw: Mapping[str, Any]) -> Record:
    """zsRE as MEND edits it: the question `src` is to be answered with `alt`.

    Without `alt`, or with a blank one (MEND's own file has some), the first of `answers` is the target; with
    it, that answer is what was said.
    """
    answer, other = _first(raw.get("answers")), raw.get("alt")
    edited = other is not None and other != ""
    fields = {
        "subject": raw.get("subject"),
        "prompt": raw.get("src"),
        "target": other if edited else answer,
        "was": answer if edited else None,
        "paraphrases": _listed(raw.get("rephrase")),
        "neighbors": _listed(raw.get("loc")),
    }
    names = {
        "prompt": "src",
        "target": "alt" if edited else "answers",
        "was": "answers",
        "paraphrases": "rephrase",
        "neighbors": "loc",
    }
    return _foreign(fields, names)


def _easyedit(raw: Mapping[str, Any]) -> Record:
    """One flat EasyEdit record, KnowEdit's `locality` tables included.

    In EasyEdit's flat CounterFact (the one with `case_id`) four of five `rephrase_prompt`s are
    prompts for free generation, not paraphrases; to score them would mislead, so they are left out.
    """
    rephrased = raw.get("rephrase_prompt", raw.get("rephrase"))
    fields = {
        "id": _case(raw, "counterfact"),
        "subject": raw.get("subject"),
        "prompt": raw.get("prompt"),
        "target": raw.get("target_new"),
        "was": _first(raw.get("ground_truth")),
        "paraphrases": None if "case_id" in raw else _listed(rephrased),
        "neighbors": _localities(raw),
    }
    names = {
        "target": "target_new",
        "was": "ground_truth",
        "paraphrases": "rephrase_prompt" if "rephrase_prompt" in raw else "rephrase",
        "neighbors": "locality_prompt" if "locality_prompt" in raw else "locality",
    }
    return _foreign(fields, names)


def _apart(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of EasyEdit's `edit(prompts=[…], target_new=[…], …)` as flat records."""
    prompts = _listed(raw["prompts"])
    if not prompts:
        raise ValueError("prompts is an empty list")
    columns: dict[str, list[Any]] = {"prompt": prompts}
    for plural, field in (
        ("subject", "subject"),
        ("target_new", "target_new"),
        ("ground_truth", "ground_truth"),
        ("rephrase_prompts", "rephrase_prompt"),
    ):
        if raw.get(plural) is not None:
            columns[field] = _column(plural, raw[plural], len(prompts))
    probes = [_column(f"locality_inputs.{kind}.prompt", value, len(prompts)) for kind, value in _inputs(raw)]
    flat = []
    for row in range(len(prompts)):
        one = {field: column[row] for field, column in columns.items()}
        one["locality"] = [prompt for column in probes for prompt in _listed(column[row])]
        flat.append(one)
    return flat


def _column(name: str, value: Any, rows: int) -> list[Any]:
    column = _listed(value)
    if len(column) != rows:
        raise ValueError(f"{name} has {len(column)} items and prompts has {rows}")
    return column


def _inputs(raw: Mapping[str, Any]) -> list[tuple[str, Any]]:
    inputs = raw.get("locality_inputs")
    tables = inputs.items() if isinstance(inputs, dict) else ()
    return [
        (str(kind), table["prompt"])
        for kind, table in tables
        if isinstance(table, dict) and "prompt" in table
    ]


def _localities(raw: Mapping[str, Any]) -> list[Any]:
    """Prompts that must not change: `locality_prompt`, and those in `locality`'s tables."""
    found = _listed(raw.get("locality_prompt"))
    locality = raw.get("locality")
    tables = list(locality.values()) if isinstance(locality, dict) else _listed(locality)
    for table in tables:
        for probe in _listed(table):
            found += _listed(probe.get("prompt")) if isinstance(probe, dict) else [probe]
    return found


def _foreign(fields: dict[str, Any], names: Mapping[str, str]) -> Record:
    """Leave out an old object that is unknown or the same as the new one: it says nothing."""
    was, target = fields["was"], fields["target"]
    same = isinstance(was, str) and isinstance(target, str) and was.strip() == target.strip()
    if was in (None, "", NO_OBJECT) or same:
        fields["was"] = None
    return Record(fields, names, native=False)


def _case(raw: Mapping[str, Any], dataset: str) -> str | None:
    case = raw.get("case_id")
    return f"{dataset}-{case}" if isinstance(case, int | str) and case != "" else None


def _string_of(target: Any) -> Any:
    return target.get("str") if isinstance(target, dict) else target


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _first(value: Any) -> Any:
    """The first answer of a list, of lists within lists too (KnowEdit)."""
    for _ in range(4):
        if not isinstance(value, list):
            break
        value = value[0] if value else None
    return value
