"""One fact: what it says, what it is about, and how a record of a file becomes one.

A fact that comes out of here is sound: its prompt holds "{}" once, its texts are bounded, not
empty, without outer white space and without control characters (line ends and tabs in
paraphrases and neighbors apart). Nothing here depends on a model.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from patchkit.problem import one_line
from patchkit.records import Record

__all__ = [
    "UNSEEN",
    "Fact",
    "Key",
    "Reverse",
    "altered",
    "fact_of",
    "kind_of",
    "normal",
    "shown",
    "told_change",
]

Key = tuple[str, str]

MAX_ITEMS = 1000
MAX_UNKNOWN = 20  # unknown fields told apart in one record
MAX_LENGTH = {
    "subject": 500,
    "prompt": 4000,
    "target": 1000,
    "id": 200,
    "was": 1000,
    "relation": 500,
    "paraphrases": 4000,
    "neighbors": 4000,
    "source": 4000,
    "note": 4000,
}  # in characters; of each item, where the field is a list

# Not to be seen, so not to be reviewed: control characters, line and paragraph separators,
# overrides of the writing direction, halves of surrogate pairs.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Left out of a key: what Unicode calls default ignorable (version 16): soft hyphen,
# zero-width joiners, direction marks, fillers, variation selectors, tags.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_PROBES = ("paraphrases", "neighbors")  # only measured, never edited: CounterFact's hold line ends and tabs


@dataclass(frozen=True, slots=True)
class Reverse:
    """A fact said from its other end: "basketball", "{} is played by", "LeBron James"."""

    subject: str
    prompt: str
    target: str

    @property
    def text(self) -> str:
        return self.prompt.replace("{}", self.subject)


@dataclass(frozen=True, slots=True)
class Fact:
    """After `text`, the model is to say `target`.

    `prompt` holds "{}" exactly once, where the subject goes. `was` is the old object,
    `paraphrases` are whole prompts that mean the same, `neighbors` whole prompts whose answers
    must not change.
    """

    subject: str
    prompt: str
    target: str
    id: str | None = None
    relation: str | None = None
    was: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbors: tuple[str, ...] = ()
    reverse: Reverse | None = None
    source: str | None = None
    note: str | None = None

    @property
    def key(self) -> Key:
        """What the fact is about: at most one fact of a key is in force."""
        about = (
            f"prompt:{normal(self.prompt)}" if self.relation is None else f"relation:{normal(self.relation)}"
        )
        return normal(self.subject), about

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace("{}", self.subject)

    def to_line(self) -> str:
        """The fact's one spelling as a line of JSON, without the line's end."""
        found = {name: _plain(getattr(self, name)) for name in _ORDER}
        return json.dumps({name: value for name, value in found.items() if value}, ensure_ascii=False)


_ORDER = (
    "id",
    "subject",
    "prompt",
    "target",
    "was",
    "relation",
    "paraphrases",
    "neighbors",
    "reverse",
    "source",
    "note",
)
_REVERSE = tuple(field.name for field in fields(Reverse))


def altered(before: Fact, after: Fact) -> list[str]:
    """The fields in which two facts of one key differ."""
    return [name for name in _ORDER if getattr(before, name) != getattr(after, name)]


def told_change(before: Fact, after: Fact) -> str:
    """In a line: what was said of a key, and what is said now."""
    if before.text != after.text:
        return f"{before.text} → {before.target} ⇒ {after.text} → {after.target}"
    if before.target != after.target:
        return f"{after.text} → {before.target} ⇒ {after.target}"
    names = altered(before, after)
    return f"{after.text} → {after.target}" + (f"; altered: {', '.join(names)}" if names else "")


def normal(text: str) -> str:
    """NFC, case folded, runs of white space one space, nothing invisible: alike for a reader's eye."""
    folded = unicodedata.normalize("NFD", _INVISIBLE.sub("", text)).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def fact_of(record: Record) -> Fact | list[str]:
    """The fact that a record holds, or everything that is wrong with it, in a line each."""
    reading = _Reading(record)
    subject, prompt, target = reading.core(_ORDER)
    texts = {name: reading.text(name) for name in ("id", "relation", "was", "source", "note")}
    paraphrases, neighbors = reading.prompts("paraphrases", subject), reading.prompts("neighbors", None)
    reverse = reading.reverse()
    if target and texts["was"] == target:
        reading.fault("was", "is the target itself; leave it out")
    if reading.faults:
        return reading.faults
    return Fact(
        subject, prompt, target, paraphrases=paraphrases, neighbors=neighbors, reverse=reverse, **texts
    )


class _Reading:
    """Reads the fields of one record; `faults` collects everything that is wrong with them."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.faults: list[str] = []

    def core(self, known: tuple[str, ...]) -> tuple[str, str, str]:
        """Subject, prompt as a template, and target; empty texts where they are at fault."""
        if self.record.native:
            self._unknown(known)
        subject = self.text("subject", needed=True) or ""
        prompt = self.text("prompt", needed=True) or ""
        target = self.text("target", needed=True) or ""
        if "{}" in subject:
            self.fault("subject", 'holds "{}", which stands for the subject in a prompt')
        elif subject and prompt:
            prompt = self._template(subject, prompt)
        return subject, prompt, target

    def _template(self, subject: str, prompt: str) -> str:
        """The prompt with "{}" where the subject goes."""
        if (marks := prompt.count("{}")) > 1:
            self.fault("prompt", f'holds "{{}}" {marks} times; it marks the subject\'s one place')
        if marks:
            return prompt
        places = _places(subject, prompt)
        if len(places) != 1:
            times = f"names the subject {len(places)} times" if places else "does not name the subject"
            self.fault("prompt", f'{times} ({shown(subject)}); write "{{}}" in its one place')
            return prompt
        start, end = places[0], places[0] + len(subject)
        if _goes_on(subject[0], prompt[start - 1 : start]) or _goes_on(subject[-1], prompt[end : end + 1]):
            self.fault(
                "prompt",
                f'has {shown(subject)} inside a longer word; write "{{}}" where the subject goes',
            )
        return self._bounded("prompt", f"{prompt[:start]}{{}}{prompt[end:]}") or ""

    def reverse(self) -> Reverse | None:
        value = self.record.fields.get("reverse")
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.fault("reverse", f"is {kind_of(value)}; write an object with subject, prompt and target")
            return None
        inner = _Reading(Record(value, {}, native=True))
        reverse = Reverse(*inner.core(_REVERSE))
        self.faults += [f"reverse: {fault}" for fault in inner.faults]
        return reverse

    def prompts(self, name: str, subject: str | None) -> tuple[str, ...]:
        """A list of whole prompts; "{}" in them is the subject, where that makes sense."""
        value = self.record.fields.get(name)
        if value is None:
            return ()
        if not isinstance(value, list | tuple):
            self.fault(name, f"is {kind_of(value)}; write a list of prompts")
            return ()
        if len(value) > MAX_ITEMS:
            self.fault(name, f"has {len(value)} items; at most {MAX_ITEMS} are read")
            return ()
        return tuple(self._item(name, number, item, subject) for number, item in enumerate(value, 1))

    def _item(self, name: str, number: int, item: Any, subject: str | None) -> str:
        text = self._clean(name, item, f"item {number} ")
        if text is None:
            return ""
        whole = text.replace("{}", subject) if subject else text
        if "{}" in whole:
            self.fault(name, f'item {number} holds "{{}}"; write the prompt out')
        return self._bounded(name, whole, f"item {number} ") or ""

    def text(self, name: str, *, needed: bool = False) -> str | None:
        value = self.record.fields.get(name)
        if value is None:
            if needed:
                self.fault(name, "is missing")
            return None
        text = self._clean(name, value)
        return text if text is None else self._bounded(name, text)

    def _clean(self, name: str, value: Any, which: str = "") -> str | None:
        """A text without outer white space, or None and a fault."""
        if not isinstance(value, str):
            self.fault(name, f"{which}is {kind_of(value)}; write a text")
            return None
        seen = value.replace("\n", " ").replace("\t", " ") if name in _PROBES else value
        if unseen := UNSEEN.search(seen):
            self.fault(name, f"{which}holds the control character U+{ord(unseen[0]):04X}; take it out")
            return None
        if not any(letter.isprintable() and letter != " " for letter in _INVISIBLE.sub("", seen)):
            self.fault(name, f"{which}is empty")
            return None
        return value.strip()

    def _bounded(self, name: str, text: str, which: str = "") -> str | None:
        if len(text) <= MAX_LENGTH[name]:
            return text
        self.fault(name, f"{which}has {len(text):,} characters; at most {MAX_LENGTH[name]:,} are read")
        return None

    def _unknown(self, known: tuple[str, ...]) -> None:
        unknown = [str(name) for name in self.record.fields if name not in known]
        for name in unknown[:MAX_UNKNOWN]:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(known)}"
            self.faults.append(f"unknown field {shown(name)}; {hint}")
        if len(unknown) > MAX_UNKNOWN:
            self.faults.append(f"{len(unknown) - MAX_UNKNOWN:,} more unknown fields")

    def fault(self, name: str, message: str) -> None:
        self.faults.append(f"{self.record.called(name)} {message}")


def _places(subject: str, prompt: str) -> list[int]:
    """Where the subject stands in the prompt, overlaps included."""
    return [start for start in range(len(prompt)) if prompt.startswith(subject, start)]


def _goes_on(edge: str, beside: str) -> bool:
    """Whether what stands beside the subject belongs to its outermost word or number.

    A letter of a script that parts words with spaces (those with case), a mark upon the letter before
    it, or a digit beside a digit or such a letter.
    """
    if not beside:
        return False
    digit = beside.isdigit() and (edge.isdigit() or _cased(edge))
    return _cased(beside) or digit or unicodedata.category(beside).startswith("M")


def _cased(letter: str) -> bool:
    return letter.lower() != letter.upper()


def _plain(value: Any) -> Any:
    """A field's value in JSON's own types."""
    if isinstance(value, Reverse):
        return {name: getattr(value, name) for name in _REVERSE}
    return list(value) if isinstance(value, tuple) else value


def kind_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, int | float):
        return "a number"
    return "a list" if isinstance(value, list | tuple) else "an object"


def shown(text: str) -> str:
    """A quoted piece of untrusted text, short enough for a fault's line, and nothing in it unseen."""
    return f'"{one_line(text)}"' if len(text) <= 60 else f'"{one_line(text[:59])}…"'
