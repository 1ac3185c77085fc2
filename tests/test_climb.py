"""Texts read upward while weights change: the bits of a reading from the bottom, and fewer blocks run."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from patchkit.editing import keys as reading
from patchkit.editing.keys import Reader, collect_keys, collect_states
from patchkit.editing.templates import rewriting_passages
from patchkit.models.anatomy import anatomy_of

TEMPLATES = ("{}", "Therefore the dancers. {}", "I say it. {}")
KINDS = ("llama", "gpt2", "mistral", "gemma2", "bloom", "falcon_alibi", "gptj", "olmo2", "gemma3_text", "mpt")


def disturb(weight, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


def counted(anatomy):
    """How often each block really ran."""
    runs = [0] * anatomy.depth
    for index, block in enumerate(anatomy.blocks):

        def run(*_, index=index):
            runs[index] += 1

        next(block.children()).register_forward_pre_hook(run)
    return runs


@pytest.mark.parametrize("kept", [1 << 28, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_is_read_to_the_bit_as_from_the_bottom(kind, kept, monkeypatch):
    monkeypatch.setattr(reading, "_KEPT", kept)
    model, tokenizer = tiny_models.tiny_model(kind), tiny_models.tiny_tokenizer()
    anatomy = anatomy_of(model)
    passages = rewriting_passages(tokenizer, tiny_models.FACTS, TEMPLATES, None)
    reader = Reader(model, anatomy, passages)
    for layer in (0, 1, 3):
        keys, states = reader.keys(layer), reader.states(layer, 3)
        assert torch.equal(keys, collect_keys(model, anatomy, passages, layer))
        assert torch.equal(states, collect_states(model, anatomy, passages, 3))
        disturb(anatomy.weight(layer), layer)


def test_blocks_below_the_change_run_once():
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    anatomy = anatomy_of(model)
    passages = rewriting_passages(tokenizer, tiny_models.FACTS[:1], TEMPLATES[:1], None)
    reader, runs = Reader(model, anatomy, passages), counted(anatomy)
    for layer in (1, 2, 3):
        reader.keys(layer)
    assert runs == [2, 4, 4, 2]  # twice a pass: what rows share at their start, and the rest


def test_what_there_is_no_room_for_is_not_held(monkeypatch):
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    passages = rewriting_passages(tokenizer, tiny_models.FACTS, TEMPLATES, None)

    def held(kept):
        """How many things a reader holds between two layers."""
        monkeypatch.setattr(reading, "_KEPT", kept)
        reader = Reader(model, anatomy_of(model), passages)
        reader.keys(2)
        way_up = [reader._all.openings, *reader._all.climbs]
        return len(way_up[0].kept) + sum(climb.way.given is not None for climb in way_up)

    assert held(1 << 28) > 0
    assert held(0) == 0


def test_rows_behind_long_openings_are_cut_into_pieces_that_fit(monkeypatch):
    """However little is run behind an opening, each row holds the opening's keys and values."""
    model, tokenizer = tiny_models.tiny_model("llama"), tiny_models.tiny_tokenizer()
    anatomy = anatomy_of(model)
    passages = rewriting_passages(tokenizer, tiny_models.FACTS, TEMPLATES, None)
    whole = collect_keys(model, anatomy, passages, 2)
    monkeypatch.setattr(reading, "_HELD", 40)
    reader = Reader(model, anatomy, passages)
    rows, chunks = reader._all._rows, reader._all._chunks
    assert sorted(place for chunk in chunks for place in chunk) == list(range(len(rows)))
    assert all(
        len(chunk) == 1 or len(chunk) * max(len(rows[place].prefix) for place in chunk) <= 40
        for chunk in chunks
    )
    assert max(map(len, chunks)) > 1
    assert torch.allclose(reader.keys(2), whole, atol=1e-6)
