"""Second moments: one pass equals a literal sum, a killed run goes on, a cache gives the same numbers."""

from __future__ import annotations

import json
import sys
import types

import pytest
import reference_memit as reference
import tiny_models
import torch
from safetensors.torch import load_file

from patchkit.editing import statistics, written
from patchkit.editing.corpus import corpus_name, read_corpus, sample, uniform, write_text
from patchkit.editing.recipe import Recipe
from patchkit.editing.statistics import Statistics, collect, statistics_for
from patchkit.errors import BadInput, NotFound, Unavailable
from patchkit.models.anatomy import anatomy_of

DOCUMENTS = [
    "LeBron James plays the sport of basketball.",
    "Paris lies in France",
    "She is a well known painter, a pope of Rome. Because I say it.",
    "Microsoft was founded by two people",
] * 6
RECIPE = Recipe(layers=(1, 2), lambda_=5.0, statistics_tokens=400, statistics_length=32)
EVERYTHING = 10**6


@pytest.mark.parametrize("words", ["bpe", "sentencepiece"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_one_pass_equals_a_literal_sum_over_tokens(kind, words):
    model, tokenizer = tiny_models.tiny_model(kind, torch.float64), tiny_models.tiny_tokenizer(words)
    found = collect(model, tokenizer, (0, 2), DOCUMENTS, tokens=EVERYTHING, length=128)
    for layer in (0, 2):
        wanted = reference.second_moment(model, tokenizer, anatomy_of(model).downs[layer], DOCUMENTS)
        assert (found.layers[layer] - wanted).norm() / wanted.norm() < 1e-6
        assert torch.equal(found.layers[layer], found.layers[layer].T)


def test_special_tokens_are_seen_but_not_counted():
    tokenizer = tiny_models.tiny_tokenizer("sentencepiece")
    model = tiny_models.tiny_model("llama")
    found = collect(model, tokenizer, (1,), ["Paris"], tokens=EVERYTHING)
    assert found.tokens == len(tokenizer("Paris")["input_ids"]) - 1


def test_exactly_the_tokens_asked_for_are_counted():
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    assert collect(model, tokenizer, (1,), iter(DOCUMENTS), tokens=37, length=8).tokens == 37


def test_a_text_that_is_too_short_is_said_to_be():
    """More tokens cannot be had from it, so that asking for them is no way out."""
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    short = collect(model, tokenizer, (1,), ["Paris lies in France"], tokens=400)
    with pytest.raises(
        BadInput, match=r"set statistics_tokens to \d+ or more, and statistics_text to a text"
    ):
        short.cholesky(1, 1.0)
    few = collect(model, tokenizer, (1,), DOCUMENTS, tokens=9)
    with pytest.raises(BadInput, match=r"set statistics_tokens to \d+ or more$"):
        few.cholesky(1, 1.0)


@pytest.mark.parametrize("length", [2, 3, 8, 20, 128])
def test_as_much_is_written_as_was_asked_for(length):
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    documents = write_text(model, tokenizer, tokens=200, length=length, seed=0)
    assert len(documents) * (length - 1) >= 200  # each begins with a token that is none of the text


def test_nothing_above_the_deepest_layer_is_run():
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    model.model.layers[2].forward = None
    collect(model, tokenizer, (0, 1), DOCUMENTS, tokens=100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_measured_in_float32_and_keep_their_bits(dtype):
    model, tokenizer = tiny_models.tiny_model("llama", dtype), tiny_models.tiny_tokenizer()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = collect(model, tokenizer, (1,), DOCUMENTS, tokens=300)
    exact = collect(tiny_models.tiny_model("llama", dtype).float(), tokenizer, (1,), DOCUMENTS, tokens=300)
    assert torch.equal(found.layers[1], exact.layers[1])
    assert all(torch.equal(p, before[n]) and p.dtype == dtype for n, p in model.named_parameters())


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_where_it_was_and_gives_the_same_bits(tmp_path):
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    options = {"tokens": EVERYTHING, "length": 16, "base": "b", "keep_every": 0.0}
    whole = collect(model, tokenizer, (1, 2), DOCUMENTS, **options)

    def kill(phase, done, total):
        if done > total / 2:
            raise Killed

    with pytest.raises(Killed):
        collect(model, tokenizer, (1, 2), DOCUMENTS, folder=tmp_path, progress=kill, **options)
    (sums,) = tmp_path.rglob("sums-*")
    done = int(load_file(sums)["done"])
    told = []
    rest = collect(
        model,
        tokenizer,
        (1, 2),
        DOCUMENTS,
        folder=tmp_path,
        progress=lambda *step: told.append(step),
        **options,
    )
    assert told[0][1] > done > 0
    assert not list(tmp_path.rglob("sums-*"))
    assert all(torch.equal(rest.layers[layer], whole.layers[layer]) for layer in (1, 2))
    assert rest.digest((1, 2)) == whole.digest((1, 2))


def test_a_cache_is_read_and_damage_is_measured_again(tmp_path, monkeypatch):
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    options = {"folder": tmp_path, "base": "b"}
    first = statistics_for(model, tokenizer, RECIPE, **options)
    asked = []
    real = statistics._add_up
    monkeypatch.setattr(statistics, "_add_up", lambda *args: asked.append(tuple(args[3].of)) or real(*args))
    monkeypatch.setattr(written, "write_text", lambda *_, **__: pytest.fail("the text is there"))
    again = statistics_for(model, tokenizer, RECIPE, **options)
    assert not asked
    assert again.digest((1, 2)) == first.digest((1, 2))
    statistics_for(model, tokenizer, RECIPE.override(layers=(1, 2, 3)), **options)
    (path,) = tmp_path.rglob("layer-2.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    mended = statistics_for(model, tokenizer, RECIPE, **options)
    assert asked == [(3,), (2,)]
    assert mended.digest((1, 2)) == first.digest((1, 2))


def test_another_base_text_or_seed_has_another_cache(tmp_path):
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    for base in ("a", "b"):
        for seed in (0, 1):
            recipe = RECIPE.override(statistics_seed=seed)
            statistics_for(model, tokenizer, recipe, folder=tmp_path, base=base)
    assert len(list(tmp_path.rglob("layer-1.safetensors"))) == 4


def test_the_factor_is_of_lambda_c_and_is_made_once(monkeypatch):
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    found = statistics_for(model, tokenizer, RECIPE)
    factor = found.cholesky(1, 5.0)
    assert factor.dtype == torch.float64
    assert torch.allclose(factor @ factor.T, 5.0 * found.layers[1].double())
    assert found.cholesky(1, 5.0) is factor
    assert found.cholesky(1, 6.0) is not factor
    held = found.cholesky(1, 6.0)
    monkeypatch.setattr(statistics, "_HELD", 2 * factor.numel() * factor.element_size())
    late = found.cholesky(1, 7.0)
    assert torch.allclose(late @ late.T, 7.0 * found.layers[1].double())
    assert found.cholesky(1, 7.0) is not late, "there is room for two"
    assert (found.cholesky(1, 5.0) is factor, found.cholesky(1, 6.0) is held) == (True, True)


def test_shrinkage_leaves_the_trace_and_draws_eigenvalues_to_their_mean():
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    found = statistics_for(model, tokenizer, RECIPE)
    before = torch.linalg.eigvalsh(found.layers[1].double())
    factor = found.cholesky(1, 5.0, shrinkage=0.25)
    after = torch.linalg.eigvalsh(factor @ factor.T) / 5.0
    assert torch.allclose(after, 0.75 * before + 0.25 * before.mean())
    whole = found.cholesky(1, 5.0, shrinkage=1.0)
    assert torch.allclose(whole, torch.eye(len(whole)).double() * (5.0 * before.mean()).sqrt())


def test_too_few_tokens_are_refused_with_the_way_out():
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    found = collect(model, tokenizer, (1,), DOCUMENTS, tokens=20)
    with pytest.raises(
        BadInput, match=r"layer 1: the statistics of 20 tokens .* set statistics_tokens to 128"
    ):
        found.cholesky(1, 5.0)
    shrunk = found.cholesky(1, 5.0, shrinkage=0.1)
    assert shrunk.diagonal().min() > 0, "an identity beside it has full rank"
    with pytest.raises(BadInput, match="no text to collect"):
        collect(model, tokenizer, (1,), [], tokens=20)
    with pytest.raises(BadInput, match="layer 9 is not in this model"):
        collect(model, tokenizer, (9,), DOCUMENTS, tokens=20)


def test_documents_longer_than_the_model_reads_are_refused():
    model, tokenizer = tiny_models.tiny_model("gpt2"), tiny_models.tiny_tokenizer()
    recipe = Recipe((1,), 3.0, statistics_tokens=64, statistics_length=129)
    with pytest.raises(BadInput, match=r"statistics_length = 129: .* 128 positions; .*=128"):
        statistics_for(model, tokenizer, recipe)


def test_digests_are_of_the_bytes_and_the_layers():
    C = {1: torch.eye(4), 2: 2 * torch.eye(4)}
    digest = Statistics(C, 9).digest((1, 2))
    assert len(digest) == 64
    assert Statistics(dict(C), 5).digest((1, 2)) == digest
    assert Statistics({**C, 2: torch.eye(4)}, 9).digest((1, 2)) != digest
    assert Statistics(C, 9).digest((1,)) != digest


def test_the_bases_own_text_is_seeded_and_long_enough():
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    told = []
    options = {"tokens": 500, "length": 24}
    text = write_text(model, tokenizer, seed=3, progress=lambda *step: told.append(step), **options)
    assert text == write_text(model, tokenizer, seed=3, **options)
    assert text != write_text(model, tokenizer, seed=4, **options)
    assert told[-1][0] == "text"
    assert told[-1][1] == told[-1][2]
    state = torch.random.get_rng_state()
    write_text(model, tokenizer, seed=3, **options)
    assert torch.equal(state, torch.random.get_rng_state())


def test_sampling_follows_the_models_distribution():
    """5,000 draws of one token: the shares are the model's probabilities, and top-k leaves out the rest."""
    model = tiny_models.tiny_model("llama")
    start = torch.full((5000, 1), 7)
    with torch.no_grad():
        wanted = model(start[:1]).logits[0, -1].softmax(-1)
    drawn = sample(model, start, 2, uniform(len(start), torch.Generator().manual_seed(0)))[:, 1]
    shares = torch.bincount(drawn, minlength=len(wanted)) / 5000
    assert (shares - wanted).abs().max() < 0.03
    best = sample(model, start, 2, uniform(len(start), torch.Generator().manual_seed(0)), top_k=3)[:, 1]
    assert set(best.tolist()) == set(wanted.topk(3).indices.tolist())


def test_corpora(tmp_path):
    text, lines, table = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.parquet"
    text.write_text("one\nstill one\n\n  \ntwo\n")
    lines.write_text("".join(json.dumps({"text": word}) + "\n" for word in ("one", " ", "two")) + "\n")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").table({"text": ["one", None, "two"]}), table)
    assert [" ".join(d.split()) for d in read_corpus(str(text))] == ["one still one", "two"]
    assert list(read_corpus(str(lines))) == ["one", "two"]
    assert list(read_corpus(str(table))) == ["one", "two"]


def test_a_corpus_is_named_without_the_folders_of_this_machine(tmp_path):
    bare = tmp_path / "words"
    bare.write_text("one")
    assert corpus_name(str(bare)) == "words"
    assert corpus_name("texts/mine.jsonl") == "mine.jsonl"
    assert corpus_name("some/words:small") == "some/words:small"
    assert corpus_name("self") == "self"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "a.jsonl:2: expected a JSON object"),
        ("a.jsonl", b'{"text": 1}\n', "a.jsonl:1: expected"),
        ("a.jsonl", b"\xff\xfe\n", "a.jsonl:1: expected"),
        ("a.txt", b"\xff\xfe\n", "a.txt: not UTF-8"),
        ("a.parquet", b"PAR1", "a.parquet: not a Parquet file"),
    ],
)
def test_a_bad_corpus_is_refused_in_one_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadInput, match=message) as caught:
        list(read_corpus(str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_data_sets_come_late_and_their_failures_are_one_line(monkeypatch, tmp_path):
    with pytest.raises(NotFound, match="no such corpus file"):
        read_corpus(str(tmp_path / "absent.jsonl"))
    asked = []

    def load_dataset(name, configuration, *, split, streaming):
        asked.append((name, configuration, split, streaming))
        if name == "broken":
            raise ConnectionError("the hub\nis out of reach")
        return [{"text": "one"}, {"text": ""}, {"text": None}] if name == "some/words" else [{"body": "one"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(read_corpus("some/words:small")) == ["one"]
    assert asked == [("some/words", "small", "train", True)]
    with pytest.raises(BadInput, match='no field "text"'):
        list(read_corpus("others"))
    with pytest.raises(Unavailable, match=r"broken: .*the hub is out of reach"):
        list(read_corpus("broken"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(Unavailable, match=r"patchkit-llm\[corpus\]"):
        list(read_corpus("some/words"))
