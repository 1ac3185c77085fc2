"""Records of CounterFact, zsRE and EasyEdit: recognised by their shape, told in our own fields."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proof_helpers import records

from patchkit.facts import Fact, FactsError, parse_facts, parse_records, read_facts
from patchkit.records import native_records

COUNTERFACT = {
    "case_id": 7,
    "pararel_idx": 2796,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["It rained.\nDanielle Darrieux, a native", "Danielle Darrieux spoke the language"],
    "n_real_paraphrase": 1,
    "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
    "generation_prompts": ["Danielle Darrieux was born in"],
}

ZSRE = {
    "subject": "Call the Doctor",
    "src": "What artist created Call the Doctor?",
    "pred": "Riders in the Sky",
    "rephrase": "Which artist created Call the Doctor?",
    "alt": "The X-Files",
    "answers": ["Sleater-Kinney", "SK"],
    "loc": "nq question: who sang nice day for a white wedding",
    "loc_ans": "Billy Idol",
}

EASYEDIT = {
    "subject": "Nokia",
    "prompt": "Nokia is a company from",
    "target_new": "Finland",
    "ground_truth": ["China"],
    "rephrase_prompt": "Nokia has its seat in",
    "locality": {
        "Relation_Specificity": [{"prompt": "Sony is from", "ground_truth": [["Japan"]]}],
        "Forgetfulness": [{"prompt": "Apple is from", "ground_truth": "the US"}],
    },
    "portability": {"Reasoning": []},
}


KNOWN = {
    "known_id": 3,
    "subject": "Audible.com",
    "attribute": "Amazon",
    "template": "{} belongs to",
    "prediction": " Amazon.com, Inc.",
    "prompt": "Audible.com belongs to the company",
    "relation_id": "P127",
}


def only(record: dict[str, Any]) -> Fact:
    [fact] = parse_records([record]).facts
    return fact


def message(record: dict[str, Any]) -> str:
    with pytest.raises(FactsError) as caught:
        parse_records([record])
    [fault] = caught.value.faults
    return fault.message


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {field: value for field, value in record.items() if field != name}


def test_counterfact() -> None:
    assert only(COUNTERFACT) == Fact(
        subject="Danielle Darrieux",
        prompt="The mother tongue of {} is",
        target="English",
        id="counterfact-7",
        relation="P103",
        was="French",
        paraphrases=tuple(COUNTERFACT["paraphrase_prompts"]),  # type: ignore[arg-type]
        neighbors=("The mother tongue of Léon Blum is",),
    )


def test_a_counterfact_request_by_itself() -> None:
    request = COUNTERFACT["requested_rewrite"]
    assert isinstance(request, dict)
    fact = only({**request, "case_id": 7})
    assert (fact.id, fact.target, fact.was, fact.relation) == ("counterfact-7", "English", "French", "P103")


def test_a_known_fact_has_the_whole_prompt_and_the_subject_where_its_template_has_it() -> None:
    wanted = Fact("Audible.com", "{} belongs to the company", "Amazon", id="known-3", relation="P127")
    assert only(KNOWN) == wanted
    twice = {**KNOWN, "prompt": "Audible.com belongs to the company behind Audible.com"}
    assert only(twice).prompt == "{} belongs to the company behind Audible.com"
    assert only(without(KNOWN, "prompt")).prompt == "{} belongs to"
    assert only({**KNOWN, "prompt": "Who owns Audible.com? It is"}).prompt == "Who owns {}? It is"
    assert message({**KNOWN, "attribute": ""}) == "attribute is empty"


def test_zsre_is_edited_to_the_alternative() -> None:
    assert only(ZSRE) == Fact(
        subject="Call the Doctor",
        prompt="What artist created {}?",
        target="The X-Files",
        was="Sleater-Kinney",
        paraphrases=("Which artist created Call the Doctor?",),
        neighbors=("nq question: who sang nice day for a white wedding",),
    )


def test_zsre_with_a_blank_alternative_has_none() -> None:
    assert only({**ZSRE, "alt": ""}) == only(without(ZSRE, "alt"))


def test_zsre_without_an_alternative_is_edited_to_the_answer() -> None:
    fact = only(without(ZSRE, "alt"))
    assert (fact.target, fact.was) == ("Sleater-Kinney", None)


def test_an_old_object_that_says_nothing_is_left_out() -> None:
    assert only({**ZSRE, "answers": ["The X-Files"]}).was is None
    assert only({**EASYEDIT, "ground_truth": "<|endoftext|>"}).was is None


def test_easyedit_flat() -> None:
    assert only(EASYEDIT) == Fact(
        subject="Nokia",
        prompt="{} is a company from",
        target="Finland",
        was="China",
        paraphrases=("Nokia has its seat in",),
        neighbors=("Sony is from", "Apple is from"),
    )


def test_easyedit_counterfact_brings_no_paraphrase() -> None:
    """Four of five of its `rephrase_prompt`s are prompts for free generation."""
    fact = only({**without(EASYEDIT, "locality"), "case_id": 3, "locality_prompt": "Sony is from"})
    assert (fact.id, fact.paraphrases, fact.neighbors) == ("counterfact-3", (), ("Sony is from",))


def test_easyedit_lists_are_several_facts_on_one_line() -> None:
    record = {
        "prompts": ["Nokia is from", "Spotify is from"],
        "subject": ["Nokia", "Spotify"],
        "target_new": ["Finland", "Sweden"],
        "ground_truth": ["China", None],
        "rephrase_prompts": ["Nokia's home is", "Spotify's home is"],
        "locality_inputs": {
            "neighborhood": {"prompt": ["Sony is from", ["Apple is from"]], "ground_truth": ["a", "b"]}
        },
    }
    batch = parse_facts(b"\n" + json.dumps(record).encode(), "f")
    assert batch.lines == (2, 2)
    assert batch.facts == (
        Fact(
            "Nokia",
            "{} is from",
            "Finland",
            was="China",
            paraphrases=("Nokia's home is",),
            neighbors=("Sony is from",),
        ),
        Fact(
            "Spotify",
            "{} is from",
            "Sweden",
            paraphrases=("Spotify's home is",),
            neighbors=("Apple is from",),
        ),
    )
    assert message({**record, "subject": ["Nokia"]}) == "subject has 1 items and prompts has 2"
    assert message({**record, "prompts": []}) == "prompts is an empty list"


def test_a_fault_uses_the_names_of_the_file() -> None:
    rewrite = COUNTERFACT["requested_rewrite"]
    assert isinstance(rewrite, dict)
    missing = {**COUNTERFACT, "requested_rewrite": without(rewrite, "target_new")}
    assert message(missing) == "requested_rewrite.target_new.str is missing"
    assert message(without(rewrite, "target_true") | {"target_new": {"str": ""}}) == "target_new.str is empty"
    assert message({**ZSRE, "src": "Who?"}).startswith('src does not name the subject ("Call the Doctor")')
    assert message({**EASYEDIT, "target_new": " "}) == "target_new is empty"
    assert message(without(EASYEDIT, "subject")) == "subject is missing"


def test_own_records_are_told_apart() -> None:
    own = {"subject": "Nokia", "prompt": "{} is from", "target": "Finland", "target_new": "Sweden"}
    assert native_records(own)[0].native
    assert message(own).startswith('unknown field "target_new"')


NAMES = """attribute template subject prompt prompts src alt answers target_new requested_rewrite ground_truth
locality locality_inputs locality_prompt rephrase rephrase_prompts loc case_id str"""
names = st.sampled_from(NAMES.split())
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4), st.floats()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)),
    max_leaves=6,
)


@given(st.dictionaries(names, values, max_size=7))
def test_any_foreign_record_is_facts_or_faults(record: dict[str, Any]) -> None:
    with suppress(FactsError):
        assert parse_records([record]).facts


@pytest.mark.parametrize(("name", "count"), [("counterfact-r.jsonl", 1000), ("zsre.jsonl", 519)])
def test_the_published_records_are_read_whole(name: str, count: int) -> None:
    path = records(name)
    facts = read_facts(path).facts
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(facts) == len(raw) == count
    for fact, record in zip(facts, raw, strict=True):
        rewrite = record.get("requested_rewrite", record)
        assert fact.subject == rewrite["subject"]
        assert fact.text == rewrite.get("prompt", record.get("src")).replace("{}", fact.subject)
        assert (
            fact.target
            == (rewrite["target_new"]["str"] if "target_new" in rewrite else record["alt"]).strip()
        )
