"""Metrics on cases worked out by hand, and on a model against prompts asked one at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from patchkit.errors import BadInput
from patchkit.evaluation.cases import Case, Question
from patchkit.evaluation.generation import continue_greedily, says
from patchkit.evaluation.intervals import differences, intervals, names_with_whole, share_of_ceiling
from patchkit.evaluation.likelihood import Score, score_targets
from patchkit.evaluation.metrics import METRICS, Asked, Seen, entropy, look, tally
from patchkit.evaluation.references import References, read_references
from patchkit.evaluation.voice import Loaded
from patchkit.facts import Fact, Reverse

NAMES = list(METRICS)


def score(nll: float, tokens: int = 2, hits: int = 0, next_token: int = 5) -> Score:
    return Score(-nll * tokens, tokens, hits, next_token)


def case_of(seen: Seen, reference: Seen | None = None) -> dict[str, tuple[float, float]]:
    (row,) = tally([seen], [reference or seen])
    return {name: tuple(pair) for name, pair in zip(NAMES, row.tolist(), strict=True)}


def mean(total: float, prompts: int) -> tuple[float, int]:
    """What a case adds that has that many such prompts."""
    return total / prompts, 1


SEEN = Seen(
    rewrite=Asked(score(1.0, 2, 2), score(2.0), said="football is", right=True),
    paraphrases=(
        Asked(score(1.0, 4, 3), score(0.5), right=False),
        Asked(score(0.1, 2, 2), score(0.5), right=True),
    ),
    neighbors=(
        Asked(score(3.0, next_token=1), score(1.0), answer=score(1.0, 4, 4), right=True),
        Asked(score(1.0, next_token=2), score(3.0), answer=score(3.0, 4, 1), right=False),
        Asked(score(2.0, next_token=3), score(1.0), answer=score(1.0, 4, 2)),
    ),
    portability=(Asked(score(1.0, 3, 1), right=False),),
    reverse=(),
    texts=("a b a b", ""),
)


def test_counterfact_and_zsre_by_hand() -> None:
    found = case_of(SEEN)
    assert found["ES"] == (1, 1)
    assert found["PS"] == mean(1, 2)
    assert found["NS"] == mean(2, 3)
    assert found["rewrite argmax"] == (1, 1)
    assert found["paraphrase argmax"] == mean(1, 2)
    assert found["neighbour argmax"] == mean(1, 3)
    assert found["rewrite tokens"] == (1, 1)
    assert found["paraphrase tokens"] == pytest.approx(mean(3 / 4 + 1, 2))
    assert found["neighbour tokens"] == pytest.approx(mean(1 + 1 / 4 + 2 / 4, 3))
    assert found["rewrite diff"] == pytest.approx((math.exp(-1) - math.exp(-2), 1))
    wanted = (math.exp(-1) - math.exp(-3)) + (math.exp(-3) - math.exp(-1)) + (math.exp(-1) - math.exp(-2))
    assert found["neighbour diff"] == pytest.approx(mean(wanted, 3))
    assert found["rewrite says"] == (1, 1)
    assert found["paraphrase says"] == mean(1, 2)
    assert found["neighbour says"] == mean(1, 2), "the third was not asked freely"
    assert found["portability says"] == (0, 1)
    assert found["portability tokens"] == pytest.approx((1 / 3, 1))
    assert found["reverse says"] == found["reverse argmax"] == (0, 0)
    assert found["neighbours kept"] == mean(3, 3)


def test_a_case_weighs_the_same_whatever_number_of_prompts_it_has() -> None:
    """One of one paraphrase won and none of two: one half, where prompts would give one third."""
    won = Asked(score(0.5, 2, 2), score(1.0), right=True)
    lost = Asked(score(1.0, 2, 0), score(0.5), right=False)
    cases = [replace(SEEN, paraphrases=(won,)), replace(SEEN, paraphrases=(lost, lost))]
    found = intervals(tally(cases, cases), NAMES)
    for name in ("PS", "paraphrase says", "paraphrase argmax", "paraphrase tokens"):
        assert found[name].value == 0.5
    assert found["paraphrase diff"].value == 0.0


def test_neighbours_of_which_the_old_object_is_not_true_have_no_part_in_ns() -> None:
    """zsRE's: what is asked there is neither object."""
    odd = [replace(one, was_is_true=False) for one in SEEN.neighbors[:2]]
    found = case_of(replace(SEEN, neighbors=(*odd, SEEN.neighbors[2])))
    assert found["NS"] == (1, 1)
    assert found["neighbour diff"] == pytest.approx((math.exp(-1) - math.exp(-2), 1))
    assert found["neighbour tokens"] == pytest.approx(mean(1 + 1 / 4 + 2 / 4, 3))
    assert case_of(replace(SEEN, neighbors=tuple(odd)))["NS"] == (0, 0)


def test_neighbours_are_kept_where_the_reference_says_the_same() -> None:
    moved = Seen(SEEN.rewrite, (), (SEEN.neighbors[0], SEEN.neighbors[0], SEEN.neighbors[2]), (), (), ())
    assert case_of(moved, SEEN)["neighbours kept"] == mean(2, 3)


def test_s_is_the_harmonic_mean_of_the_three() -> None:
    found = intervals(tally([SEEN] * 3, [SEEN] * 3), NAMES)
    assert found["S"].value == pytest.approx(3 / (1 / 1 + 1 / 0.5 + 1 / (2 / 3)))
    assert found["S"].low == found["S"].high == pytest.approx(found["S"].value)
    assert names_with_whole(["x", "NS", "ES", "PS"]) == ["x", "NS", "ES", "PS", "S"]
    assert names_with_whole(["ES", "PS"]) == ["ES", "PS"]


def test_a_score_of_few_facts_is_drawn_from_those_that_have_it() -> None:
    bare = Seen(SEEN.rewrite, (), (), (), (), ())
    found = intervals(tally([bare, SEEN], [bare, SEEN]), NAMES)
    assert found["PS"].value == 0.5
    assert math.isnan(found["PS"].low), "one fact alone says nothing of others"
    assert math.isnan(found["S"].low)
    assert found["ES"].low == found["ES"].high == 1.0
    assert math.isnan(found["reverse says"].value)


def test_a_difference_of_a_model_and_itself_is_nothing() -> None:
    counts = tally([SEEN] * 4, [SEEN] * 4)
    found = differences(counts, counts, NAMES)
    assert (found["S"].value, found["S"].low, found["S"].high) == (0, 0, 0)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        # a b c d: three bigrams and two trigrams, each once.
        ("a b c d", (2 / 3 * math.log2(3) + 4 / 3 * 1) / 2),
        # Bigrams ab, ba, ab: 2/3 and 1/3; trigrams aba, bab.
        ("A, b; a b!", (2 / 3 * (2 / 3 * math.log2(3 / 2) + 1 / 3 * math.log2(3)) + 4 / 3 * 1) / 2),
        ("the the the the", 0.0),
        ("one", 0.0),
        ("", 0.0),
    ],
)
def test_entropy_by_hand(text: str, bits: float) -> None:
    assert entropy(text) == pytest.approx(bits)


CASES = [
    Case(
        Fact(
            "LeBron James",
            "{} plays the sport of",
            "football",
            was="basketball",
            paraphrases=("LeBron James is a painter of",),
            neighbors=("Ann plays the sport of", "Paris plays the sport of"),
            reverse=Reverse("football", "{} is the sport of", "LeBron James"),
        ),
        answers=(("basketball",), ("dancers",)),
        portability=(Question("Who is Ann?", ("a painter",)),),
        texts=("The dancers",),
    ),
    Case(Fact("Ann", "Who is {}? She is a well known", "pope of Rome")),
]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_is_asked_as_one_prompt_at_a_time(kind: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    first, second = look(Loaded(model, tokenizer), CASES, texts=True)
    fact = CASES[0].fact

    def alone(prompt: str, object_: str) -> Any:
        return score_targets(model, tokenizer, [(prompt, object_)])[0]

    def close(found: Score | None, wanted: Score) -> None:
        assert found is not None
        assert found.log_probability == pytest.approx(wanted.log_probability, rel=1e-4, abs=1e-4)
        assert (found.hits, found.next_token) == (wanted.hits, wanted.next_token)

    close(first.rewrite.target, alone(fact.text, "football"))
    close(first.rewrite.was, alone(fact.text, "basketball"))
    assert [one.was_is_true for one in first.neighbors] == [True, False]
    close(first.neighbors[1].answer, alone(fact.neighbors[1], "dancers"))
    close(first.neighbors[0].target, alone(fact.neighbors[0], "football"))
    close(first.portability[0].target, alone("Who is Ann?", "a painter"))
    close(first.reverse[0].target, alone("football is the sport of", "LeBron James"))
    with torch.no_grad():
        (said,) = continue_greedily(model, tokenizer, [fact.paraphrases[0]])
        (written,) = continue_greedily(model, tokenizer, ["The dancers"], new_tokens=100)
    assert first.paraphrases[0].said == said
    assert first.paraphrases[0].right == says(said, "football")
    assert first.texts == (written,)
    assert second.rewrite.was is None
    assert second.neighbors == second.portability == second.reverse == second.texts == ()


def test_any_of_several_right_answers_is_right() -> None:
    """Freely: one of them is said. Teacher forced: the one that scores best counts."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompt = "Ann plays the sport of"
    (said,) = continue_greedily(model, tokenizer, [prompt])
    own = said.strip().split()[0]
    wrong = ("painter", "pope of Rome")
    fact = Fact("LeBron James", "{} plays", "football", was="Paris", neighbors=("Rome lies in",))
    hop = Case(fact, (("France", "Paris"),), portability=(Question(prompt, (*wrong, own)),))
    other = Case(replace(fact, was="Japan"), (("France", "Paris"),), portability=(Question(prompt, wrong),))
    first, second = look(Loaded(model, tokenizer), [hop, other])
    assert says(said, own)
    assert first.portability[0].right is True
    assert second.portability[0].right is False
    by_name = {name: score_targets(model, tokenizer, [(prompt, name)])[0] for name in (*wrong, own)}
    for seen, names in ((first, (*wrong, own)), (second, wrong)):
        scores = [by_name[name] for name in names]
        best = max(one.hits / one.tokens for one in scores)
        found = seen.portability[0].target
        assert found.hits / found.tokens == best
        assert found.nll == pytest.approx(
            min(one.nll for one in scores if one.hits / one.tokens == best), rel=1e-4
        )
    answers = [score_targets(model, tokenizer, [("Rome lies in", name)])[0] for name in ("France", "Paris")]
    assert first.neighbors[0].answer is not None
    assert first.neighbors[0].answer.hits == max(answers, key=lambda one: one.hits / one.tokens).hits
    assert [seen.neighbors[0].was_is_true for seen in (first, second)] == [True, False]


def test_the_first_neighbours_are_answered_freely_where_the_record_says_what_is_right() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = ("Ann plays the sport of", "Rome lies in", "Paris plays the sport of")
    said = continue_greedily(model, tokenizer, list(prompts))
    own = [text.strip().split()[0] for text in said]
    assert says(said[0], own[0])
    fact = Fact("LeBron James", "{} plays", own[1], was="Paris", neighbors=prompts)
    known = Case(fact, (("painter", own[0]), ("pope of Rome",), (own[2],)))
    first, unknown = look(Loaded(model, tokenizer), [known, Case(fact)])
    assert [one.right for one in first.neighbors] == [True, False, None], "the new object is not right there"
    longest = max(map(Loaded(model, tokenizer).length, own[:2]))
    whole = continue_greedily(model, tokenizer, list(prompts[:2]), max(12, longest))
    assert [one.said for one in first.neighbors] == [*whole, None]
    assert case_of(first)["neighbour says"] == mean(1, 2)
    assert case_of(unknown)["neighbour says"] == (0, 0)


def test_a_neighbour_whose_answer_is_not_given_is_not_answered_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as one of which the old object is true, as where none is given; the others as they are."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = ("Ann plays the sport of", "Rome lies in", "Paris plays the sport of")
    fact = Fact("LeBron James", "{} plays", "painter", was="Paris", neighbors=prompts)
    (seen,) = look(Loaded(model, tokenizer), [Case(fact, ((), ("Japan",), ("Paris", "Rome")))])
    assert [one.was_is_true for one in seen.neighbors] == [True, False, True]
    assert [one.said is None for one in seen.neighbors] == [True, False, False]
    assert [one.right is None for one in seen.neighbors] == [True, False, False]
    assert [one.answer is None for one in seen.neighbors] == [True, False, False]


def test_a_long_object_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt is followed by as many tokens as the longest object has, so no length is given away."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    asked: list[int] = []
    real = continue_greedily

    def counted(*args: Any, new_tokens: int) -> list[str]:
        asked.append(new_tokens)
        return real(*args, new_tokens=new_tokens)

    monkeypatch.setattr("patchkit.evaluation.voice.continue_greedily", counted)
    look(Loaded(model, tokenizer), CASES)
    long = Fact("Ann", "{} is", "a painter of the dancers of the city of Paris in France, and a pope of Rome")
    look(Loaded(model, tokenizer), [*CASES, Case(long)])
    assert asked == [12, len(tokenizer(f" {long.target}", add_special_tokens=False)["input_ids"])]
    assert asked[1] > 12


def test_texts_are_written_only_where_they_are_asked_for() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert [seen.texts for seen in look(Loaded(model, tokenizer), CASES)] == [(), ()]


def test_the_sums_of_every_score_are_numbers() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    seen = look(Loaded(model, tokenizer), CASES)
    counts = tally(seen, seen)
    assert counts.shape == (2, len(METRICS), 2)
    assert np.isfinite(counts).all()


def test_s_is_a_share_of_what_the_unedited_neighbours_let_it_be() -> None:
    """Unedited NS 3/4: the ceiling is 3 / (2 + 4/3) = 0.9; ES and PS 1 and NS 1/2 give S 3/4."""
    names = ["ES", "PS", "NS"]
    edited = np.array([[[1, 1], [2, 2], [1, 2]], [[1, 1], [2, 2], [1, 2]]], dtype=float)
    unedited = np.array([[[0, 1], [0, 2], [2, 2]], [[0, 1], [0, 2], [1, 2]]], dtype=float)
    found = share_of_ceiling(edited, unedited, names)
    assert found.value == pytest.approx(0.75 / 0.9)
    assert found.low == pytest.approx(0.75)  # drawn twice, the first fact's ceiling is 1
    assert found.high == pytest.approx(1.0)  # and the second's 3/4
    assert math.isnan(share_of_ceiling(edited[:1], unedited[:1], names).low)
    assert math.isnan(share_of_ceiling(edited, np.zeros_like(unedited), names).value)
    none = unedited * [[[1], [1], [0]], [[1], [1], [1]]] * [1, 1]
    none[0, 2] = [0, 2]  # of the first fact's neighbours none prefers the old object
    found = share_of_ceiling(edited, none, names)
    assert np.isfinite([found.value, found.low, found.high]).all()


BASKETBALL, ROMAN = ("P641", "Q5372"), ("P19", "Rome")
TEXTS = {BASKETBALL: ["He plays basketball.", "Basketball is a sport"], ROMAN: ["He was born in Rome"]}


def test_likeness_by_hand() -> None:
    """Of three texts two hold "he", one "born": weights ln(4/3) + 1 and ln(4/2) + 1."""
    references = References(TEXTS)
    he, one, none = math.log(4 / 3) + 1, math.log(2) + 1, math.log(4) + 1
    rome = references.of(Case(Fact("Ann", "{} was born in", "Rome", relation="P19")))
    assert rome is not None
    assert dict(rome) == dict.fromkeys(("he", "was", "born", "in", "rome"), 1)
    length = math.sqrt(he**2 + 4 * one**2)
    assert references.likeness(["Rome!", "rome"], rome) == pytest.approx(2 * one**2 / (2 * one * length))
    own = math.sqrt(he**2 + none**2)
    assert references.likeness(["He swims"], rome) == pytest.approx(he**2 / (own * length))
    assert references.likeness(["He was born in Rome"], rome) == pytest.approx(1.0)
    assert references.likeness([""], rome) == 0.0
    assert references.likeness(["swims"], rome) == 0.0


def test_reference_texts_are_found_by_ids_or_by_relation_and_target() -> None:
    references = References(TEXTS)
    named = Case(Fact("Ann", "{} plays", "basketball"), object_ids=BASKETBALL)
    found = references.of(named)
    assert found is not None
    assert found["basketball"] == 2
    assert references.of(replace(named, object_ids=None)) is None
    assert references.of(replace(named, object_ids=("P641", "Q1"))) is None


SNIPPETS = '{"P19": {"Q220": [{"name": "Ann", "text": "born in Rome"}, {"name": "Bob", "text": "a Roman"}]}}'
LINE = '{"relation": "P19", "target": "Rome", "text": "born in Rome"}'
SAMPLES = (  # as the file that goes with CounterFact has them
    '[{"relation_id": "P19", "target_id": "Q220", "samples": [{"name": "Ann", "text": "born in Rome"}]}, '
    '{"relation_id": "P19", "target_id": "Q90", "samples": [{"name": "Bob", "text": "born in Paris"}]}, '
    '{"relation_id": "P19", "target_id": "Q220", "samples": [{"name": "Eve", "text": "a Roman"}]}]'
)


def test_files_of_reference_texts(tmp_path: Path) -> None:
    path = tmp_path / "texts.json"
    case = Case(Fact("Ann", "{} was born in", "Rome", relation="P19"), object_ids=("P19", "Q220"))
    spread = SNIPPETS.replace(" [", "\n[")
    for text, words in {SNIPPETS: 5, spread: 5, SAMPLES: 5, LINE: 3, f"{LINE}\n{LINE}\n": 6}.items():
        path.write_text(text)
        found = read_references(str(path)).of(case)
        assert found is not None
        assert found.total() == words
    for text in ('{"P19": {"Q220": [{"text": "%s"}]}}', SAMPLES.replace("a Roman", "%s")):
        path.write_text(text % ("word " * 300_000))  # over what a line may have
        assert read_references(str(path)).of(case) is not None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no reference texts"),
        ("{}", "holds no reference texts"),
        ("[1]", r"texts.json:1: is no reference text"),
        ("nonsense", r"texts.json:1: "),
        ('{"text": "x"}', r"texts.json:1: is no reference text"),
        (LINE + "\n" + '{"relation": 1, "target": "x", "text": "y"}', r"texts.json:2: is no reference text"),
        ('{"P19": {"Q220": [{"name": "Ann"}]}}', r"texts.json:1: P19 Q220 has no text"),
        ('{"P19": {"Q220": 3}}', r"texts.json:1: P19 Q220 has no text"),
        (SAMPLES.replace('"text": "a Roman"', '"x": 1'), r"texts.json:1: P19 Q220 has no text"),
        (SAMPLES.replace('"target_id": "Q90"', '"x": 1'), r"texts.json:1: is no reference text"),
        (LINE + "\n{", r"texts.json:2: "),
    ],
)
def test_a_file_of_no_reference_texts_is_refused_by_its_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "texts.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=says):
        read_references(str(path))


def test_what_a_model_writes_is_held_against_the_references() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    fact = Fact("Ann", "{} plays", "football", relation="P641")
    case = Case(fact, texts=("Ann plays", "The sport of Ann is"))
    references = References({("P641", "football"): [f"Ann plays football number {n}" for n in range(3)]})
    voice = Loaded(model, tokenizer)
    (seen,) = look(voice, [case], texts=True, references=references)
    reference = references.of(case)
    assert reference is not None
    assert seen.likeness == references.likeness(seen.texts, reference)
    assert case_of(seen)["RS"] == (seen.likeness, 1.0)
    (without,) = look(voice, [case], texts=True)
    (unwritten,) = look(voice, [replace(case, texts=())], texts=True, references=references)
    assert case_of(without)["RS"] == case_of(unwritten)["RS"] == (0.0, 0.0)
