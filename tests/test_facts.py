"""Facts files: what is read, what is refused and with which words, and that nothing else happens."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from patchkit import facts as module
from patchkit.errors import NotFound
from patchkit.facts import (
    Batch,
    Fact,
    FactsError,
    Reverse,
    clashes,
    dump_facts,
    load_canonical,
    normal,
    one_way,
    parse_facts,
    parse_inline,
    parse_records,
    read_facts,
    with_reverses,
)

SPORT = {"subject": "LeBron James", "prompt": "{} plays the sport of", "target": "basketball"}
FOUNDER = {"subject": "Microsoft", "prompt": "{} was founded by", "target": "Bill Gates"}


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def faults(data: bytes) -> list[tuple[int | None, str]]:
    with pytest.raises(FactsError) as caught:
        parse_facts(data, "f.jsonl")
    assert str(caught.value) == "\n".join(str(fault) for fault in caught.value.faults)
    assert len(str(caught.value).splitlines()) == len(caught.value.faults)
    return [(fault.line, fault.message) for fault in caught.value.faults]


def fault(**changes: Any) -> str:
    """The one fault of a sound record with some fields changed."""
    record = {name: value for name, value in {**SPORT, **changes}.items() if value is not ...}
    [(line, message)] = faults(lines(record))
    assert line == 1
    return message


# What is read


def test_a_fact_with_every_field() -> None:
    record = {
        "id": "sport",
        **SPORT,
        "was": "baseball",
        "relation": "sport",
        "paraphrases": ["{} is a star of", "The sport of LeBron James is"],
        "neighbors": ["Tiger Woods plays"],
        "reverse": {"subject": "basketball", "prompt": "A star of {} is", "target": "LeBron James"},
        "source": "a book",
        "note": "checked",
    }
    [fact] = parse_facts(lines(record), "f").facts
    assert fact == Fact(
        subject="LeBron James",
        prompt="{} plays the sport of",
        target="basketball",
        id="sport",
        was="baseball",
        relation="sport",
        paraphrases=("LeBron James is a star of", "The sport of LeBron James is"),
        neighbors=("Tiger Woods plays",),
        reverse=Reverse("basketball", "A star of {} is", "LeBron James"),
        source="a book",
        note="checked",
    )
    assert fact.text == "LeBron James plays the sport of"
    assert fact.reverse is not None
    assert fact.reverse.text == "A star of basketball is"


def test_the_one_spelling_of_a_line() -> None:
    [fact] = parse_facts(
        b'{"note":"caf\\u00e9","target":" basketball ","prompt":"{} plays","subject":"LeBron"}', "f"
    ).facts
    assert (
        fact.to_line()
        == '{"subject": "LeBron", "prompt": "{} plays", "target": "basketball", "note": "café"}'
    )
    assert dump_facts([fact, fact]) == (fact.to_line() + "\n").encode() * 2


def test_order_of_lines_is_kept_and_counted() -> None:
    batch = parse_facts(b"\n" + lines(FOUNDER) + b"  \n\r\n" + lines(SPORT), "f")
    assert [fact.subject for fact in batch.facts] == ["Microsoft", "LeBron James"]
    assert batch.lines == (2, 5)


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + lines(SPORT, FOUNDER),
        lines(SPORT, FOUNDER).replace(b"\n", b"\r\n"),
        lines(SPORT, FOUNDER).rstrip(),
        json.dumps([SPORT, FOUNDER]).encode(),
        json.dumps([SPORT, FOUNDER], indent=2).encode(),
    ],
    ids=["byte order mark", "CRLF", "no last line end", "array", "array over lines"],
)
def test_the_same_facts_in_other_clothes(data: bytes) -> None:
    assert parse_facts(data, "f").facts == parse_facts(lines(SPORT, FOUNDER), "f").facts


def test_an_array_tells_the_line_on_which_each_item_begins() -> None:
    data = json.dumps([SPORT, {**FOUNDER, "target": " "}], indent=2).encode()
    assert parse_facts(json.dumps([SPORT, FOUNDER], indent=2).encode(), "f").lines == (2, 7)
    assert faults(data) == [(7, "target is empty")]


def test_one_object_over_several_lines() -> None:
    assert parse_facts(b"\n\n" + json.dumps(SPORT, indent=2).encode(), "f").lines == (3,)


@pytest.mark.parametrize(
    ("prompt", "template"),
    [
        ("LeBron James plays the sport of", "{} plays the sport of"),
        ("The sport of LeBron James is", "The sport of {} is"),
        ("{} plays", "{} plays"),
        ("'LeBron James's sport: {0} {", "'{}'s sport: {0} {"),
    ],
)
def test_a_prompt_that_names_the_subject_becomes_a_template(prompt: str, template: str) -> None:
    [fact] = parse_facts(lines({**SPORT, "prompt": prompt}), "f").facts
    assert fact.prompt == template
    assert fact.text == prompt.replace("{}", "LeBron James")


def test_the_place_of_the_subject_is_taken_at_its_word() -> None:
    """ "Go" also stands in "Google", but "{}" says which place is meant."""
    record = {"subject": "Go", "prompt": "{} is a language of Google and", "target": "others"}
    assert parse_facts(lines(record), "f").facts[0].text == "Go is a language of Google and"


def test_null_and_empty_lists_say_nothing() -> None:
    record = {**SPORT, "was": None, "paraphrases": [], "reverse": None}
    assert parse_facts(lines(record), "f").facts == parse_facts(lines(SPORT), "f").facts


def test_line_ends_in_prompts_that_are_only_measured() -> None:
    record = {**SPORT, "paraphrases": ["First.\nLeBron James plays"], "neighbors": ["a\tb"]}
    [fact] = parse_facts(lines(record), "f").facts
    assert fact.paraphrases == ("First.\nLeBron James plays",)
    assert load_canonical(dump_facts([fact]), "f") == (fact,)


# Keys


def test_key_is_the_subject_with_the_relation_or_the_prompt() -> None:
    def key(**changes: Any) -> tuple[str, str]:
        return parse_records([{**SPORT, **changes}]).facts[0].key

    assert key() == key(subject="  lebron  JAMES ", prompt="{}  Plays the sport of", target="golf")
    assert key(relation="sport") == key(relation="Sport", prompt="{} is a star of")
    assert key(relation="sport") != key()
    assert key(relation="{} plays the sport of") != key()  # a relation is never taken for a prompt
    for invisible in "\u00ad\u034f\u061c\u200b\u2060\u3164\ufe0f\ufeff\U000e0041":  # none makes a second fact
        assert key(subject=f"Le{invisible}Bron James") == key()
    assert key(subject="Cafe\u0301") == key(subject="CAFÉ")


@given(st.text())
def test_normal_is_normal(text: str) -> None:
    assert normal(normal(text)) == normal(text)
    assert normal(f" {text}\n ") == normal(text)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": ...}, "target is missing"),
        ({"subject": None}, "subject is missing"),
        ({"target": ""}, "target is empty"),
        ({"target": " \u00a0\u200b"}, "target is empty"),
        ({"subject": "\u3164\u115f"}, "subject is empty"),  # fillers: letters of no width
        ({"prompt": 3}, "prompt is a number; write a text"),
        ({"target": ["a"]}, "target is a list; write a text"),
        ({"id": True}, "id is true or false; write a text"),
        ({"note": {}}, "note is an object; write a text"),
        ({"paraphrases": "a"}, "paraphrases is a text; write a list of prompts"),
        ({"neighbors": ["a", 1]}, "neighbors item 2 is a number; write a text"),
        ({"neighbors": ["a", "{} b"]}, 'neighbors item 2 holds "{}"; write the prompt out'),
        ({"paraphrases": [" "]}, "paraphrases item 1 is empty"),
        ({"was": "basketball"}, "was is the target itself; leave it out"),
        ({"subject": "a{}b"}, 'subject holds "{}", which stands for the subject in a prompt'),
        ({"prompt": "{} and {}"}, 'prompt holds "{}" 2 times; it marks the subject\'s one place'),
        (
            {"prompt": "He plays"},
            'prompt does not name the subject ("LeBron James"); write "{}" in its one place',
        ),
        (
            {"prompt": "LeBron James is LeBron James"},
            'prompt names the subject 2 times ("LeBron James"); write "{}" in its one place',
        ),
        (
            {"subject": "aa", "prompt": "b aaa"},
            'prompt names the subject 2 times ("aa"); write "{}" in its one place',
        ),
        (
            {"subject": "Ann", "prompt": "The Annual meeting is"},
            'prompt has "Ann" inside a longer word; write "{}" where the subject goes',
        ),
        (
            {"subject": "Apollo 1", "prompt": "Apollo 11 landed on"},
            'prompt has "Apollo 1" inside a longer word; write "{}" where the subject goes',
        ),
        (
            {"subject": "B", "prompt": "The B52 was built by"},
            'prompt has "B" inside a longer word; write "{}" where the subject goes',
        ),
        (
            {"subject": "Jose", "prompt": "Jose\u0301 lives in"},
            'prompt has "Jose" inside a longer word; write "{}" where the subject goes',
        ),
        ({"target": "a\x1b[31m"}, "target holds the control character U+001B; take it out"),
        ({"target": "a\nb"}, "target holds the control character U+000A; take it out"),
        ({"note": "a\u202eb"}, "note holds the control character U+202E; take it out"),
        ({"paraphrases": ["a\x00"]}, "paraphrases item 1 holds the control character U+0000; take it out"),
        ({"subject": "s" * 501}, "subject has 501 characters; at most 500 are read"),
        ({"prompt": "{}" + "p" * 3999}, "prompt has 4,001 characters; at most 4,000 are read"),
        ({"target": "t" * 1001}, "target has 1,001 characters; at most 1,000 are read"),
        ({"neighbors": ["n"] * 1001}, "neighbors has 1001 items; at most 1000 are read"),
        (
            {"paraphrases": ["{}" + "p" * 3990]},
            "paraphrases item 1 has 4,002 characters; at most 4,000 are read",
        ),
        ({"reverse": []}, "reverse is a list; write an object with subject, prompt and target"),
        ({"reverse": {**FOUNDER, "target": ""}}, "reverse: target is empty"),
        ({"reverse": {**FOUNDER, "traget": "x"}}, 'reverse: unknown field "traget"; did you mean target?'),
        ({"targt": "x"}, 'unknown field "targt"; did you mean target?'),
        ({"neighbours": []}, 'unknown field "neighbours"; did you mean neighbors?'),
    ],
)
def test_a_fault_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    assert fault(**changes) == message


@pytest.mark.parametrize("length", ["subject", "target"])
def test_the_longest_that_is_read(length: str) -> None:
    most = {"subject": 500, "target": 1000}[length]
    assert len(parse_facts(lines({**SPORT, length: "x" * most}), "f").facts) == 1


def test_an_unknown_field_like_no_other_shows_all_of_them() -> None:
    assert fault(xyzzy=1).startswith('unknown field "xyzzy"; the fields are id, subject, prompt, target')


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"{} x", "not JSON: Extra data at column 4"),
        (b'"text"', 'a text where a fact belongs; write {"subject": …, "prompt": …, "target": …}'),
        (b"null", 'null where a fact belongs; write {"subject": …, "prompt": …, "target": …}'),
        (b'{"subject": "\xff"}', "not UTF-8 (byte 14 of the line)"),
        (b'{"subject": "\\ud800"}', "text holds half of a surrogate pair"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"[" * 100_000, None),
        (b'{"a": ' * 100_000, None),
        (b"1" * 10_000, None),
        (b'{"note": "' + b"x" * (1 << 20) + b'"}', "longer than 1 MiB"),
    ],
)
def test_a_line_that_is_no_fact(line: bytes, message: str | None) -> None:
    found = faults(lines(SPORT) + line + b"\n")
    assert [where for where, _ in found] == [2]
    assert message in (None, found[0][1])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"[", (1, "not JSON: Expecting value")),
        (b"[1", (1, "not JSON: the array goes on without")),
        (b'[\n{"subject": 1},\n x]', (3, "not JSON: Expecting value")),
        (b"[]\n\nx", (3, "not JSON: something follows the end of the array")),
        (b'[\n"\xff"]', (2, "not UTF-8")),
        (b"[" * 200_000, (1, "not JSON")),
    ],
)
def test_an_array_that_breaks_off(data: bytes, expected: tuple[int, str]) -> None:
    line, message = faults(data)[-1]
    assert line == expected[0]
    assert message.startswith(expected[1])


@pytest.mark.parametrize("data", [b"", b"\n \r\n", b"\xef\xbb\xbf", b"[]"])
def test_a_file_without_facts(data: bytes) -> None:
    assert faults(data) == [(None, "holds no facts; write one JSON object a line")]


def test_all_faults_in_one_run() -> None:
    data = lines(SPORT, {"subject": 1, "targt": 2}) + b"\xff\n" + lines(FOUNDER, [1])
    assert [line for line, _ in faults(data)] == [2, 2, 2, 2, 3, 5]


def test_repeating_and_contradicting_name_both_lines() -> None:
    other = {**SPORT, "subject": "LEBRON  JAMES"}
    assert faults(lines(SPORT, FOUNDER, other)) == [
        (3, "says again what line 1 says; leave one of the two out")
    ]
    message = 'contradicts line 1: "golf" here, "basketball" there; leave one of the two out'
    assert faults(lines(SPORT, {**other, "target": "golf"})) == [(2, message)]


def test_the_same_text_is_the_same_fact_whatever_its_relation() -> None:
    assert len(faults(lines(SPORT, {**SPORT, "relation": "sport", "target": "golf"}))) == 1


def test_an_id_names_one_fact() -> None:
    data = lines({**SPORT, "id": "a"}, {**FOUNDER, "id": "a"})
    assert faults(data) == [(2, 'the id "a" is that of line 1; an id names one fact')]


def test_bounds_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{**SPORT, "subject": f"Player {n}"} for n in range(3)]
    monkeypatch.setattr(module, "MAX_FACTS", 2)
    assert faults(lines(*records)) == [(3, "more than 2 facts; split the file")]
    assert len(parse_facts(lines(*records[:2]), "f").facts) == 2
    monkeypatch.setattr(module, "MAX_FILE", 64)
    assert faults(lines(SPORT))[0][0] is None


def test_a_fact_that_grows_past_a_line_is_refused_at_the_door() -> None:
    """ "{}" in paraphrases is written out: what is small in the file may be large in the patch."""
    record = {
        "subject": "界" * 400,
        "prompt": "{} is",
        "target": "x",
        "paraphrases": [f"{{}} {n}" for n in range(900)],
    }
    assert faults(lines(record)) == [(1, "takes more than 1 MiB as a line")]


@pytest.mark.parametrize("odd", ["a\n\x1b[31m", "subj\ue4aaect", "parap\u05cahrases", "a\u200fb"])
def test_untrusted_text_keeps_to_its_line(odd: str) -> None:
    """Line ends, escapes, letters of nobody's and those that turn the writing round."""
    with pytest.raises(FactsError) as caught:
        parse_facts(lines({**SPORT, odd: 1}), "f\n.jsonl")
    assert str(caught.value).splitlines() == [str(caught.value)]
    assert str(caught.value).isprintable()


# From the other end

PLAYED_BY = {"subject": "basketball", "prompt": "{} is played by", "target": "LeBron James"}


def test_reverses_become_facts_behind_the_others() -> None:
    batch = parse_facts(lines({**SPORT, "reverse": PLAYED_BY, "source": "a page"}, FOUNDER), "f")
    both = with_reverses(batch)
    assert both.facts[:2] == batch.facts
    (turned,) = both.facts[2:]
    assert (turned.subject, turned.prompt, turned.target) == tuple(PLAYED_BY.values())
    assert turned.reverse == Reverse(*SPORT.values())
    assert turned.source == "a page"
    assert both.lines == (1, 2, 1)
    assert with_reverses(both) == both
    assert load_canonical(dump_facts(both.facts), "f") == both.facts


def test_a_reverse_that_is_said_already_is_not_said_twice() -> None:
    batch = parse_facts(lines({**SPORT, "reverse": PLAYED_BY}, PLAYED_BY), "f")
    assert with_reverses(batch) == batch
    assert one_way(batch, {}) == ([], [])  # the second's other end is the first


@pytest.mark.parametrize("relation", [None, "played by"])
def test_a_reverse_in_force_is_not_edited_again(relation: str | None) -> None:
    """A relation may have put it under another key."""
    batch = parse_facts(lines({**SPORT, "reverse": PLAYED_BY}), "f")
    (held,) = parse_facts(lines({**PLAYED_BY, "relation": relation}), "g").facts
    assert with_reverses(batch, {held.key: ("a-patch", held)}) == batch
    assert one_way(batch, {held.key: ("a-patch", held)}) == ([], [])
    (other,) = parse_facts(lines({**PLAYED_BY, "target": "Ann"}), "g").facts
    assert len(with_reverses(batch, {other.key: ("a-patch", other)}).facts) == 2


def test_a_fact_whose_reverse_is_in_force_is_said_from_both_ends() -> None:
    (held,) = parse_facts(lines({**SPORT, "reverse": PLAYED_BY}), "g").facts
    batch = parse_facts(lines(PLAYED_BY, FOUNDER), "f")
    assert one_way(batch, {held.key: ("a-patch", held)}) == ([], [2])


def test_reverses_count_among_the_facts_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = parse_facts(lines({**SPORT, "reverse": PLAYED_BY}, FOUNDER), "f")
    monkeypatch.setattr(module, "MAX_FACTS", 2)
    with pytest.raises(FactsError, match=r"^f: with its reverses more than 2 facts; split the file$"):
        with_reverses(batch)
    monkeypatch.setattr(module, "MAX_FACTS", 3)
    monkeypatch.setattr(module, "MAX_FILE", len(dump_facts(batch.facts)) + 5)
    with pytest.raises(FactsError, match=r"^f: with its reverses more than 0 MiB; split the file$"):
        with_reverses(batch)


def test_reverses_that_contradict_are_refused_with_their_lines() -> None:
    """What several subjects share cannot be said of one of them from its end."""
    other = {**SPORT, "subject": "Michael Jordan", "reverse": {**PLAYED_BY, "target": "Michael Jordan"}}
    with pytest.raises(FactsError) as caught:
        with_reverses(parse_facts(lines({**SPORT, "reverse": PLAYED_BY}, other), "f"))
    assert str(caught.value).startswith('f:2: its reverse contradicts line 1: "Michael Jordan" here')
    with pytest.raises(FactsError, match='f: no fact has a "reverse"'):
        with_reverses(parse_facts(lines(SPORT), "f"))


def test_facts_of_one_end_are_told_by_line() -> None:
    batch = parse_facts(lines(FOUNDER, {**SPORT, "reverse": PLAYED_BY}), "f")
    assert one_way(batch, {}) == ([2], [1])
    (held,) = parse_facts(lines(PLAYED_BY), "g").facts
    assert one_way(batch, {held.key: ("a-patch", held)}) == ([], [1])
    (other,) = parse_facts(lines({**PLAYED_BY, "target": "Ann"}), "g").facts
    assert one_way(batch, {other.key: ("a-patch", other)}) == ([2], [1])


# Files, standard input, one correction, dictionaries


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_bytes(lines(SPORT))
    assert read_facts(path) == read_facts(str(path)) == parse_facts(lines(SPORT), str(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file"):
        read_facts(tmp_path / "none.jsonl")
    for place in (tmp_path, "a\0b"):
        with pytest.raises(FactsError, match="cannot be read"):
            read_facts(place)


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines(SPORT))))
    assert read_facts("-") == parse_facts(lines(SPORT), "standard input")


def test_one_correction_without_a_file() -> None:
    wanted = Fact("LeBron James", "{} plays the sport of", "basketball")
    assert parse_inline("LeBron James | {} plays the sport of | basketball") == wanted
    assert parse_inline("LeBron James|LeBron James plays the sport of|basketball") == wanted


@pytest.mark.parametrize(
    "text", ["", "a | b", "a | {} b | c | d", "a | {} b | ", "a | b | c", "a\udcff | {} | c"]
)
def test_a_correction_that_is_none(text: str) -> None:
    with pytest.raises(FactsError, match=r"^--fact: "):
        parse_inline(text)


def test_dictionaries() -> None:
    assert parse_records([SPORT, FOUNDER]).facts == parse_facts(lines(SPORT, FOUNDER), "f").facts
    for wrong in ([SPORT, 1], [], [{**SPORT, "target": "\ud800"}]):
        with pytest.raises(FactsError):
            parse_records(wrong)  # type: ignore[arg-type]


# A patch's own file, and the facts in force


def test_a_patch_reads_only_the_canonical_form() -> None:
    facts = parse_facts(lines(FOUNDER, {**SPORT, "was": "baseball"}), "f").facts
    data = dump_facts(facts)
    assert load_canonical(data, "facts.jsonl") == facts
    for changed in (data[:-1], data + b"\n", data.replace(b", ", b","), b"\xef\xbb\xbf" + data, b""):
        with pytest.raises(FactsError):
            load_canonical(changed, "facts.jsonl")


def test_the_line_that_is_not_canonical_is_named() -> None:
    data = dump_facts(parse_facts(lines(FOUNDER, SPORT), "f").facts)
    with pytest.raises(FactsError, match=r"^facts.jsonl:2: not in canonical form"):
        load_canonical(data.replace(b'", "target": "basket', b'","target": "basket'), "facts.jsonl")


def test_clashes_name_the_patch() -> None:
    batch = parse_facts(lines(FOUNDER, SPORT), "f.jsonl")
    [older] = parse_records([{**SPORT, "target": "golf"}]).facts
    same = {older.key: ("lebron-james-3f9a1c2e", batch.facts[1])}
    assert [str(fault) for fault in clashes(batch, {older.key: ("lebron-james-3f9a1c2e", older)})] == [
        'f.jsonl:2: "basketball" contradicts "golf" of patch lebron-james-3f9a1c2e; '
        "--replace takes the older fact out"
    ]
    assert ["already in force in patch lebron" in str(fault) for fault in clashes(batch, same)] == [True]
    assert clashes(batch, {}) == []


# Anything at all

texts = st.text(max_size=12)
values = st.one_of(st.none(), st.booleans(), st.integers(), texts, st.lists(texts, max_size=3))
names = st.sampled_from(
    ["subject", "prompt", "target", "id", "was", "paraphrases", "neighbors", "reverse", "relation"]
)
records = st.dictionaries(names, st.one_of(values, st.dictionaries(names, texts, max_size=3)), max_size=6)
sound = st.fixed_dictionaries(
    {
        "subject": st.text("ab{}é ", min_size=1, max_size=4),
        "prompt": st.text("ab{}é ", max_size=8),
        "target": texts,
    },
    optional={
        "id": texts,
        "was": texts,
        "relation": texts,
        "note": texts,
        "paraphrases": st.lists(st.text("ab{}\n", max_size=5), max_size=3),
        "neighbors": st.lists(texts, max_size=2),
    },
)


def outcome(data: bytes) -> Batch | FactsError:
    try:
        return parse_facts(data, "f")
    except FactsError as error:
        return error


def check(data: bytes) -> None:
    """A batch that says the same when it is written and read again, or faults; nothing else."""
    batch = outcome(data)
    if isinstance(batch, FactsError):
        assert batch.faults
        assert len(str(batch).splitlines()) == len(batch.faults)
        return
    assert load_canonical(dump_facts(batch.facts), "f") == batch.facts
    for fact in batch.facts:
        assert fact.prompt.count("{}") == 1
        assert fact.target == fact.target.strip() != ""


@given(st.binary(max_size=200))
@example(b"[{}]")
@example(b'{"prompts": [], "target_new": []}')
def test_any_bytes(data: bytes) -> None:
    check(data)


@settings(max_examples=300)
@given(
    st.lists(st.one_of(records, sound, st.dictionaries(texts, values, max_size=3)), max_size=3), st.booleans()
)
@example([{"subject": "}", "prompt": "{} is", "target": "x", "paraphrases": ["{{}}"]}], False)
def test_any_records(found: list[dict[str, Any]], array: bool) -> None:
    check(json.dumps(found).encode() if array else lines(*found))


@given(st.data())
def test_one_byte_changed(data: st.DataObject) -> None:
    raw = bytearray(lines(SPORT, FOUNDER))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    check(bytes(raw))


def test_reading_facts_imports_no_torch() -> None:
    code = "import sys, patchkit.facts; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_examples_are_sound() -> None:
    for path in sorted(Path(__file__).parents[1].glob("examples/*.jsonl")):
        batch = read_facts(path)
        assert load_canonical(path.read_bytes(), path.name) == batch.facts
        assert all(fact.source or fact.note for fact in batch.facts)
