"""What is measured of an edit, against literal one-by-one computations and cases worked out by hand."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import FACTS, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from patchkit.errors import BadInput
from patchkit.evaluation import likelihood
from patchkit.evaluation.generation import NEW_TOKENS, continue_greedily, length_of, normalise, says
from patchkit.evaluation.likelihood import Score, score_targets
from patchkit.evaluation.measure import FactChange, FactState, PromptState, compare, observe, summarise
from patchkit.evaluation.texts import WINDOW, window_of, windows
from patchkit.facts import Fact
from patchkit.models.hooks import forgetting_positions
from patchkit.models.tokens import begun_and_running, in_rows

PAIRS = [(fact.text, fact.target) for fact in FACTS] + [
    ("Who is Ann? You see. Because I say it, the mother tongue of Ann is", "Dutch or French or Japan"),
    ("I", "you"),
    ("I", "say"),
    ("I", "say it"),
    ("I say", "it"),
]
KINDS = [("llama", "bpe"), ("llama", "sentencepiece"), ("gpt2", "bpe"), ("mistral", "sentencepiece")]


def literal(model: Any, tokenizer: Any, prompt: str, target: str) -> tuple[float, int, list[int]]:
    """log p(target | prompt), its tokens that are the argmax, and its tokens: a softmax for each."""
    before = tokenizer(prompt)["input_ids"]
    whole = tokenizer(f"{prompt} {target}")["input_ids"]
    assert whole[: len(before)] == before  # in these texts no token spans the border
    total, hits = 0.0, 0
    for position in range(len(before), len(whole)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([whole[:position]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[whole[position]])
        hits += int(logits.argmax()) == whole[position]
    return total, hits, whole[len(before) :]


@pytest.mark.parametrize(("kind", "pieces"), KINDS)
def test_likelihoods_are_those_of_one_text_at_a_time(kind: str, pieces: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer(pieces)
    for (prompt, target), score in zip(PAIRS, score_targets(model, tokenizer, PAIRS), strict=True):
        wanted, hits, tokens = literal(model, tokenizer, prompt, target)
        assert score.log_probability == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        assert (score.tokens, score.hits) == (len(tokens), hits)
        assert score.argmax == (hits == len(tokens))
        assert score.probability == pytest.approx(math.exp(wanted), rel=1e-3)
        assert score.nll == pytest.approx(-wanted / len(tokens), rel=1e-4)


def test_objects_of_one_prompt_share_a_row_where_one_holds_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    shared = [("I", "say it"), ("I", "say"), ("I say", "it"), ("You", "say it")]
    run: list[int] = []
    whole = likelihood._logits
    monkeypatch.setattr(
        likelihood, "_logits", lambda model, rows, first: run.append(len(rows)) or whole(model, rows, first)
    )
    score_targets(model, tokenizer, shared)
    assert sum(run) == 2


def test_what_the_model_says_itself_is_the_argmax() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompt = "Who is Ann? She"
    ids = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        first = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    (score,) = score_targets(model, tokenizer, [(prompt, "is")])
    assert score.next_token == first


def test_neither_order_nor_batches_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    wanted = dict(zip(PAIRS, score_targets(model, tokenizer, PAIRS), strict=True))
    for limit, seed in ((2048, 1), (40, 2), (1, 3)):
        monkeypatch.setattr(likelihood, "BATCH_TOKENS", limit)
        pairs = random.Random(seed).sample(PAIRS, len(PAIRS))
        for pair, score in zip(pairs, score_targets(model, tokenizer, pairs), strict=True):
            assert score.log_probability == pytest.approx(wanted[pair].log_probability, abs=1e-4)
            assert (score.argmax, score.next_token) == (wanted[pair].argmax, wanted[pair].next_token)
    assert score_targets(model, tokenizer, []) == []


def greedy(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """The most probable token after another, without a cache, up to the end of text."""
    ids = tokenizer(prompt)["input_ids"]
    new: list[int] = []
    while len(new) < count and (not new or new[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize(("kind", "pieces"), KINDS)
def test_generation_in_batches_is_greedy_decoding_of_each_prompt(kind: str, pieces: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer(pieces)
    prompts = [prompt for prompt, _ in PAIRS]
    wanted = [greedy(model, tokenizer, prompt, 8) for prompt in prompts]
    for size in (32, 2, 1):
        assert continue_greedily(model, tokenizer, prompts, 8, batch_size=size) == wanted
    assert continue_greedily(model, tokenizer, [], 8) == []


@pytest.mark.parametrize("kind", ["qwen2_vl", "glm4v"])
def test_generation_leaves_no_positions_behind(kind: str) -> None:
    """Models of images and texts keep an offset for each text, and would add it to those that come next."""
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    keeper = next(module for module in model.modules() if hasattr(module, "rope_deltas"))
    prompts = [fact.text for fact in FACTS[:3]]
    continue_greedily(model, tokenizer, prompts, 3)
    assert keeper.rope_deltas is None
    keeper.rope_deltas = own = torch.ones(1, 1, dtype=torch.long)  # of a caller's own generation
    with forgetting_positions(model):
        assert keeper.rope_deltas is None
    continue_greedily(model, tokenizer, prompts, 3)
    assert keeper.rope_deltas is own


def test_a_checkpoints_own_sampling_settings_do_not_change_what_is_measured() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = [prompt for prompt, _ in PAIRS]
    wanted = [greedy(model, tokenizer, prompt, 12) for prompt in prompts]
    model.generation_config.update(
        do_sample=True,
        temperature=5.0,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        num_beams=3,
        min_new_tokens=9,
    )
    assert continue_greedily(model, tokenizer, prompts, 12) == wanted


@pytest.mark.parametrize(
    ("said", "target", "true"),
    [
        (" basketball. He", "basketball", True),
        (" Basketball, and", "basketball", True),
        ("\n\n“Basketball”", "basketball", True),
        (" basketballs", "basketball", False),
        (" the basketball", "basketball", False),
        (" Bill Gates and Paul", "Bill  Gates", True),
        (" Bill-Gates", "Bill Gates", True),
        (" Bill", "Bill Gates", False),
        (" CAFE\u0301!", "café", True),
        (" STRASSE", "Straße", True),
        (" ﬁne", "fine", True),
        (" 1990s", "1990", False),
        (" U.S. Army", "U.S.", True),
        ("", "x", False),
        ("", "!", False),
        (" !!", "!", True),
        (" ?", "!", False),
        (" हिंदी", "हिंदू", False),
        (" snake_case", "snake case", True),
        (" C++ by a team", "C++", True),
        (" C by a team", "C++", False),
        (" C++ by a team", "C", False),
        (" C# is", "c#", True),
        (" C# is", "C++", False),
        (" -5 degrees", "\u22125", True),
        (" 5 degrees", "-5", False),
        (" .NET framework", ".NET", True),
        (" net income", ".NET", False),
        (" 1990-1995", "1990", True),
        (" (Paris)", "Paris", True),
        (" 3.5 million", "3", False),
        (" 1,500 people", "1", False),
        (" 3:30", "3", False),
        (" 3. Then", "3", True),
        (" 3, 5 and 7", "3", True),
        (" 3.5 million", "3.5", True),
    ],
)
def test_says(said: str, target: str, true: bool) -> None:
    assert says(said, target) is true


def test_normalise_is_idempotent_and_empty_for_punctuation() -> None:
    for text in (" A  b—C!", "ﬁ", "İ", "", "?!…"):
        assert normalise(normalise(text)) == normalise(text)
    assert normalise(" A  b—C!") == "a b c"
    assert normalise("?!…") == ""


def test_a_long_target_has_room_to_be_said() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    said = greedy(model, tokenizer, FACTS[0].text, 16)
    (state,) = observe(model, tokenizer, [replace(FACTS[0], target=said.strip())])
    assert length_of(tokenizer, said.strip()) > NEW_TOKENS
    assert state.rewrite.says


def test_free_generation_goes_on_before_an_end_that_the_tokenizer_appends() -> None:
    model, plain, ending = tiny_model("llama"), tiny_tokenizer(), copy.deepcopy(tiny_tokenizer())
    end = ("</s>", ending.eos_token_id)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[end])
    prompts = [fact.text for fact in FACTS]
    assert ending(prompts[0])["input_ids"][-1] == ending.eos_token_id != plain(prompts[0])["input_ids"][-1]
    assert continue_greedily(model, ending, prompts) == continue_greedily(model, plain, prompts)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_prompt_longer_than_the_model_reads_is_refused_by_name(kind: str) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    longest = model.config.max_position_embeddings
    long = "Ann " * (longest + 1)
    for ask in (
        lambda: score_targets(model, tokenizer, [*PAIRS, (long, "Rome")]),
        lambda: continue_greedily(model, tokenizer, ["Ann", long]),
        lambda: observe(model, tokenizer, [replace(FACTS[0], paraphrases=(long,))]),
    ):
        with pytest.raises(BadInput, match=rf'^"Ann Ann .*the model reads {longest}; shorten'):
            ask()


def test_a_model_that_computes_its_positions_reads_on() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    long = "Ann " * model.config.max_position_embeddings + "is"
    (score,) = score_targets(model, tokenizer, [(long, "Dutch")])
    assert score.log_probability == pytest.approx(literal(model, tokenizer, long, "Dutch")[0], rel=1e-4)


def test_the_last_place_that_a_model_reads_can_be_asked() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    longest, prompt = model.config.max_position_embeddings, "I"
    while len(tokenizer(f"{prompt} I")["input_ids"]) <= longest - 3:
        prompt += " I"
    taken = len(tokenizer(prompt)["input_ids"])
    assert len(continue_greedily(model, tokenizer, [prompt], longest - taken + 1)) == 1
    with pytest.raises(BadInput, match="shorten"):
        continue_greedily(model, tokenizer, [prompt], longest - taken + 2)


def test_observe_measures_each_prompt_of_each_fact() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    facts = [
        replace(
            FACTS[0],
            was="basketball",
            paraphrases=("You see. LeBron James plays",),
            neighbors=("Ann is", "I"),
        ),
        FACTS[1],
        replace(FACTS[2], neighbors=("Paris lies in",)),
    ]
    states = observe(model, tokenizer, facts)
    for fact, state in zip(facts, states, strict=True):
        prompts = [fact.text, *fact.paraphrases, *fact.neighbors]
        found = [state.rewrite, *state.paraphrases, *state.neighbors]
        assert [one.prompt for one in found] == prompts
        for one in found:
            log_p, hits, tokens = literal(model, tokenizer, one.prompt, fact.target)
            assert one.target == pytest.approx(math.exp(log_p), rel=1e-3)
            best = hits == len(tokens)
            assert one.argmax == best
            assert one.next_token == _next(model, tokenizer, one.prompt)
            if fact.was is None:
                assert (one.was, one.prefers) == (None, best)
            else:
                other, _, others = literal(model, tokenizer, one.prompt, fact.was)
                assert one.was == pytest.approx(math.exp(other), rel=1e-3)
                assert one.prefers == (log_p / len(tokens) > other / len(others))
        assert state.rewrite.text == greedy(model, tokenizer, fact.text, 12)
        assert state.rewrite.says == says(state.rewrite.text, fact.target)
        assert all(one.text is None and one.says is None for one in found[1:])


def _next(model: Any, tokenizer: Any, prompt: str) -> int:
    with torch.no_grad():
        return int(model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].argmax())


def test_observing_twice_or_in_another_order_is_the_same() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    forward = observe(model, tokenizer, list(FACTS), batch_size=2)
    backward = observe(model, tokenizer, list(reversed(FACTS)), batch_size=5)
    for one, other in zip(forward, reversed(backward), strict=True):
        assert one.rewrite.target == pytest.approx(other.rewrite.target, rel=1e-4)
        assert one.rewrite.text == other.rewrite.text


def state(
    prefers: bool = False,
    argmax: bool = False,
    said: bool | None = None,
    was: float | None = None,
    top: int = 0,
) -> PromptState:
    text, spares = "said" if said is not None else None, None if was is None else not prefers
    return PromptState("prompt", 0.5, was, prefers, argmax, said, text, top, spares)


def change(
    rewrite: PromptState,
    paraphrases: tuple[PromptState, ...] = (),
    neighbors: tuple[tuple[PromptState, PromptState], ...] = (),
) -> FactChange:
    before = FactState(state(said=False), paraphrases, tuple(pair[0] for pair in neighbors))
    after = FactState(rewrite, paraphrases, tuple(pair[1] for pair in neighbors))
    return FactChange(Fact("a", "{} is", "b"), before, after)


def test_summary_of_cases_worked_out_by_hand() -> None:
    kept, moved = (state(top=3), state(top=3)), (state(top=3), state(top=4))
    true, false = state(was=0.5, prefers=False, top=1), state(was=0.1, prefers=True, top=1)
    changes = [
        change(state(True, True, True), (state(True), state(False)), (kept, moved)),
        change(state(True, False, False), (state(True),), ((true, true), (true, false))),
        change(state(False, False, False)),
        change(state(True, True, False)),
    ]
    summary = summarise(changes)
    assert summary.facts == 4
    assert summary.efficacy == 0.75
    assert summary.argmax == 0.5
    assert summary.generation == 0.25
    assert summary.paraphrases == pytest.approx(2 / 3)
    assert summary.neighbors == 0.75
    assert summary.specificity == 0.5
    assert [one.took for one in changes] == [True, True, False, True]
    assert [one.kept_neighbors for one in changes] == [1, 2, 0, 0]
    bare = summarise([changes[2]])
    assert (bare.efficacy, bare.paraphrases, bare.neighbors, bare.specificity) == (0.0, None, None, None)
    assert summarise([]).facts == 0


def test_a_model_that_is_broken_spares_no_neighbour() -> None:
    """Its log probabilities are not numbers: it prefers neither object."""
    fact = Fact("Ann", "{} plays", "golf", was="chess", neighbors=("Bob plays",))
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = observe(model, tokenizer, [fact])
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    summary = summarise(compare([fact], before, observe(model, tokenizer, [fact])))
    assert (summary.specificity, summary.efficacy) == (0.0, 0.0)


def test_a_longer_object_is_compared_by_its_mean_token() -> None:
    """As CounterFact does: 4 tokens of -1 nat each are preferred to 1 token of -2."""
    long, short = Score(-4.0, 4, 0, 0), Score(-2.0, 1, 0, 0)
    assert long.nll < short.nll
    assert long.probability < short.probability


def test_a_model_that_did_not_change_keeps_every_neighbor() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    facts = [replace(FACTS[0], neighbors=("Ann is", "Paris lies in", "I"))]
    (kept,) = compare(facts, observe(model, tokenizer, facts), observe(model, tokenizer, facts))
    assert kept.kept_neighbors == 3
    other = tiny_model("llama", seed=5)
    (moved,) = compare(facts, observe(model, tokenizer, facts), observe(other, tokenizer, facts))
    wanted = sum(_next(model, tokenizer, p) == _next(other, tokenizer, p) for p in facts[0].neighbors)
    assert moved.kept_neighbors == wanted
    assert set(kept.to_dict()) >= {"before", "after", "took", "neighbors_kept"}


@pytest.mark.parametrize(
    ("continuation", "target", "said"),
    [("東京都です", "東京", True), ("กรุงเทพมหานคร", "กรุงเทพ", True), ("Parisian", "Paris", False)],
)
def test_says_asks_for_whole_words_only_where_words_have_spaces(
    continuation: str, target: str, said: bool
) -> None:
    assert says(continuation, target) is said


def test_a_text_is_read_in_rows_that_the_model_has_positions_for() -> None:
    tokenizer, text = tiny_tokenizer(), "Ann lies in Rome. " * 100
    config = tiny_model("gpt2").config
    length = window_of(config)
    assert length == min(WINDOW, config.n_positions)
    config = copy.deepcopy(config)
    config.n_positions = config.max_position_embeddings = 16
    assert window_of(config) == 16
    _, rows = windows(tokenizer, "text", text, 16)
    assert max(map(len, rows)) == 16


@pytest.mark.parametrize("words", ["bpe", "sentencepiece"])
def test_every_row_of_a_text_begins_as_a_text_begins(words: str) -> None:
    tokenizer, text = tiny_tokenizer(words), "Ann lives in Paris and Bob lives in Rome. " * 40
    ids = tokenizer(text)["input_ids"]
    begun = 1 if words == "sentencepiece" else 0
    name, rows = windows(tokenizer, "a text", text)
    assert len(rows) > 1
    assert all(len(row) <= WINDOW for row in rows)
    assert all(row[:begun] == ids[:begun] for row in rows)
    assert [token for row in rows for token in row[begun:]] == ids[begun:]
    assert name == "a text"


def test_what_a_tokenizer_puts_behind_a_text_is_not_read() -> None:
    class Ending:
        def __call__(self, text: str, return_special_tokens_mask: bool) -> dict[str, list[int]]:
            assert return_special_tokens_mask
            return {"input_ids": [1, 5, 6, 7, 2], "special_tokens_mask": [1, 0, 0, 0, 1]}

    assert begun_and_running(Ending(), "…") == ([1], [5, 6, 7])
    assert in_rows([1], [5, 6, 7], 3) == [[1, 5, 6], [1, 7]]
    assert in_rows([1], [], 3) == []
