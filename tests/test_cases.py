"""What the records of the field hold besides facts, and which of them are drawn."""

from __future__ import annotations

import json
from typing import Any

import pytest

from patchkit.errors import BadInput, NotFound
from patchkit.evaluation.cases import Cases, Question, parse_cases, read_cases, sampled
from patchkit.facts import FactsError

COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} plays the sport of",
        "relation_id": "P641",
        "target_new": {"str": "football"},
        "target_true": {"str": "basketball"},
        "subject": "LeBron James",
    },
    "paraphrase_prompts": ["LeBron James is a star of"],
    "neighborhood_prompts": ["Ann plays the sport of", "Rome plays the sport of"],
    "generation_prompts": ["LeBron James is known for", "LeBron James"],
}
ZSRE = {
    "subject": "Microsoft",
    "src": "Who founded Microsoft?",
    "pred": "x",
    "rephrase": "By whom was Microsoft founded?",
    "alt": "two dancers",
    "answers": ["two people"],
    "loc": "nq question: where is Paris",
    "loc_ans": "France",
    "portability": {
        "Recalled Relation": "(…)",
        "New Question": "What do its founders do?",
        "New Answer": "Dance",
    },
}
KNOWEDIT = {
    "subject": "Paris",
    "prompt": "Paris lies in",
    "target_new": "Japan",
    "portability": {"Reasoning": [{"prompt": "Its currency is the", "ground_truth": [["yen", "JPY"]]}]},
    "locality": {"Other": [{"prompt": "Rome lies in", "ground_truth": [["Italy"], ["Italia"]]}]},
}
FLAT = {
    "case_id": 3,
    "prompt": "The mother tongue of Émile Zola is",
    "subject": "Émile Zola",
    "target_new": "Dutch",
    "ground_truth": "French",
    "rephrase_prompt": "Émile Zola was born in",
    "locality_prompt": "The mother tongue of Ann is",
    "locality_ground_truth": "English",
}


def lines(*records: dict[str, Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_each_shape_gives_what_it_holds() -> None:
    found = parse_cases(lines(COUNTERFACT, ZSRE, KNOWEDIT), "mixed.jsonl")
    counterfact, zsre, knowedit = found.cases
    assert counterfact.answers == (("basketball",), ("basketball",))
    assert counterfact.texts == ("LeBron James is known for", "LeBron James")
    assert counterfact.portability == ()
    assert zsre.answers == (("France",),)
    assert zsre.portability == (Question("What do its founders do?", ("Dance",)),)
    assert knowedit.answers == (("Italy", "Italia"),)
    assert knowedit.portability == (Question("Its currency is the", ("yen", "JPY")),)
    assert [case.fact.target for case in found.cases] == ["football", "two dancers", "Japan"]
    assert found.notes == ()


def test_the_prompts_that_easyedit_calls_paraphrases_are_left_out_and_told() -> None:
    found = parse_cases(lines(FLAT), "flat.json")
    assert found.cases[0].fact.paraphrases == ()
    assert found.cases[0].answers == (("English",),)
    (note,) = found.notes
    assert note.startswith("1 rephrase prompts were left out")


def test_a_published_file_is_asked_without_the_records_that_cannot_be() -> None:
    """Nobody here can mend it, so that one faulty record must not keep all others from being asked."""
    faulty = {**ZSRE, "subject": "nobody of that name"}
    data = json.dumps([faulty, ZSRE, COUNTERFACT, {**ZSRE, "alt": 5}]).encode()
    with pytest.raises(FactsError):
        parse_cases(data, "zsre.json")
    found = parse_cases(data, "zsre", published=True)
    assert found.cases == parse_cases(lines(ZSRE, COUNTERFACT), "x").cases
    (note,) = found.notes
    assert note == (
        "2 of the records cannot be asked and were left out; the first: record 1, "
        'src does not name the subject ("nobody of that name"); write "{}" in its one place'
    )
    assert parse_cases(json.dumps([ZSRE]).encode(), "zsre", published=True).notes == ()


def test_answers_are_known_only_where_every_neighbour_has_one() -> None:
    two = {**KNOWEDIT, "locality": [{"prompt": "Rome lies in"}, {"prompt": "Ann lies in"}]}
    assert parse_cases(lines(two), "x").cases[0].answers == ()


def test_a_neighbour_without_an_answer_takes_none_from_the_others() -> None:
    """What is not known of one is not known; what is known of the other still is, a number too."""
    tables = {
        "A": [{"prompt": "Rome lies in", "ground_truth": [["Italy"]]}],
        "B": [{"prompt": "Ann lies in"}],
    }
    (case,) = parse_cases(lines({**KNOWEDIT, "locality": tables}), "x").cases
    assert case.answers == (("Italy",), ())
    several = {**ZSRE, "loc": ["where is Paris", "when was Rome"], "loc_ans": ["", 1998]}
    (case,) = parse_cases(lines(several), "x").cases
    assert case.answers == ((), ("1998",))


def test_several_neighbours_have_an_answer_each_and_one_may_have_several() -> None:
    several = {**ZSRE, "loc": ["where is Paris", "where is Rome"], "loc_ans": ["France", ["Italy", "Italia"]]}
    one = {**ZSRE, "loc_ans": ["France", "the Republic", "France"]}
    first, second = parse_cases(lines(several, one), "x").cases
    assert first.answers == (("France",), ("Italy", "Italia"))
    assert second.answers == (("France", "the Republic"),)


def test_facts_of_patchkit_and_list_forms_are_cases_too() -> None:
    columns = {
        "prompts": ["Rome lies in", "Ann lies in"],
        "subject": ["Rome", "Ann"],
        "target_new": ["A", "B"],
    }
    native = {"subject": "Japan", "prompt": "{} lies in", "target": "Asia"}
    found = parse_cases(json.dumps([native, columns, ZSRE]).encode(), "array.json")
    assert [case.fact.subject for case in found.cases] == ["Japan", "Rome", "Ann", "Microsoft"]
    assert found.cases[3].answers == (("France",),)


@pytest.mark.parametrize("odd", [{"portability": 3}, {"portability": [None]}, {"loc_ans": {"a": 1}}])
def test_odd_extras_are_no_questions(odd: dict[str, Any]) -> None:
    (case,) = parse_cases(lines({**ZSRE, "portability": None, **odd}), "x").cases
    assert case.portability == ()
    assert case.answers == (() if "loc_ans" in odd else (("France",),))


def test_faults_are_told_as_of_facts() -> None:
    with pytest.raises(FactsError, match=r"x:2: .*subject"):
        parse_cases(lines(ZSRE, {"prompt": "{} is", "target": "x"}), "x")
    with pytest.raises(NotFound):
        read_cases("nowhere.jsonl")


def test_cases_may_contradict_each_other_as_counterfacts_do() -> None:
    other = json.loads(json.dumps(COUNTERFACT))
    other["requested_rewrite"]["target_new"]["str"] = "polo"
    found = parse_cases(lines(COUNTERFACT, other, COUNTERFACT), "counterfact.json")
    assert [case.fact.target for case in found.cases] == ["football", "polo", "football"]


def test_rephrasings_of_questions_are_no_beginnings_of_texts() -> None:
    found = parse_cases(lines({**ZSRE, "case_id": 4}, {**FLAT, "rephrase_prompt": None, "case_id": 5}), "x")
    assert found.notes == ()
    assert found.cases[0].fact.paraphrases == ("By whom was Microsoft founded?",)


def test_a_sample_is_the_same_each_time_and_never_larger_than_the_source() -> None:
    records = [{"subject": f"P{n}", "prompt": "{} is", "target": "x"} for n in range(30)]
    whole = parse_cases(lines(*records), "many")
    assert sampled(whole, None) is whole
    one, again, other = sampled(whole, 8, 1), sampled(whole, 8, 1), sampled(whole, 8, 2)
    assert one == again != other
    assert len({case.fact.subject for case in one.cases}) == 8
    assert sorted(sampled(whole, 30).cases, key=whole.cases.index) == list(whole.cases)
    with pytest.raises(BadInput, match="holds 30 facts"):
        sampled(whole, 31)


@pytest.mark.parametrize("count", [0, -1])
def test_a_sample_of_nothing_is_refused(count: int) -> None:
    with pytest.raises(BadInput, match=f"a sample of {count} facts: choose 1 or more"):
        sampled(Cases("records", ()), count)
