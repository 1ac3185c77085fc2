"""A replayed tail gives the logits of the whole model, on every architecture, padded and narrowed."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from patchkit.models.anatomy import anatomy_of
from patchkit.models.hooks import reading_outputs
from patchkit.models.past import Openings, Row, openings_of, prefill
from patchkit.models.replay import capture


def rows_of(shapes, *, shared=0):
    """Rows of random tokens; those of a group begin with ``shared`` equal ones."""
    random = torch.Generator().manual_seed(1)

    def draw(count):
        return tuple(torch.randint(5, 300, (count,), generator=random).tolist())

    openings = {group: draw(shared) for group in (0, 1)}
    return [Row(openings[i % 2] + draw(p), draw(s), i % 2) for i, (p, s) in enumerate(shapes)]


SHAPES = [(3, 4), (5, 2), (1, 3), (0, 2), (7, 4), (2, 1)]


def full_logits(model, row, layer=None, delta=None):
    """The whole model on one unpadded sequence, with ``delta`` added at the cut."""
    block = anatomy_of(model).blocks[layer or 0]

    def add(_, __, out):
        hidden = out[0] if isinstance(out, tuple) else out
        hidden[0, len(row.prefix)] += delta
        return out

    handle = block.register_forward_hook(add) if delta is not None else None
    with torch.no_grad():
        logits = model(torch.tensor([row.prefix + row.suffix]), use_cache=False).logits[0]
    if handle is not None:
        handle.remove()
    return logits[len(row.prefix) :]


def replayed_logits(tail, delta):
    hidden = tail.hidden.clone()
    hidden[:, 0] += delta
    with torch.no_grad():
        states = tail.states(hidden)
        return tail.logits(states.flatten(0, 1)).view(*states.shape[:2], -1)


def assert_same(model, tail, rows, layer):
    delta = torch.linspace(-1, 1, tiny_models.WIDTH)
    found = replayed_logits(tail, delta)
    for row, logits in zip(rows, found, strict=True):
        wanted = full_logits(model, row, layer, delta)
        error = (logits[: len(row.suffix)] - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-5, (row, float(error))


@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("kind", tiny_models.CONFIGS)
def test_the_replayed_tail_gives_the_whole_models_logits(kind, layer, shared):
    model = tiny_models.tiny_model(kind)
    rows = rows_of(SHAPES, shared=shared)
    tail = capture(model, anatomy_of(model), rows, layer=layer)
    assert_same(model, tail, rows, layer)
    stay = [4, 1]
    assert_same(model, tail.keep(torch.tensor(stay)), [rows[i] for i in stay], layer)


@pytest.mark.parametrize("kind", tiny_models.CONFIGS)
def test_as_many_rows_as_heads_are_narrowed_as_rows_alone(kind):
    """Four heads: what has a number for each of them, and none for the rows, stays whole."""
    model = tiny_models.tiny_model(kind)
    rows = rows_of(SHAPES[:4])
    tail = capture(model, anatomy_of(model), rows, layer=1)
    for stay in ([2], [3, 0]):
        assert_same(model, tail.keep(torch.tensor(stay)), [rows[i] for i in stay], 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_row_that_begins_with_the_subject_has_no_past(kind):
    model = tiny_models.tiny_model(kind)
    rows = rows_of([(0, 3), (0, 2)])
    tail = capture(model, anatomy_of(model), rows, layer=1)
    assert_same(model, tail, rows, 1)
    assert_same(model, tail.keep(torch.tensor([1])), rows[1:], 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_model_is_as_it_was_after_capture_and_replay(kind):
    model = tiny_models.tiny_model(kind)
    before = full_logits(model, Row((), (5, 6, 7)))
    tail = capture(model, anatomy_of(model), rows_of(SHAPES), layer=1)
    replayed_logits(tail, torch.zeros(tiny_models.WIDTH))
    assert torch.equal(full_logits(model, Row((), (5, 6, 7))), before)
    assert not any("forward" in vars(block) for block in anatomy_of(model).blocks)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_inside_a_block_takes_the_stand_ins_away():
    model = tiny_models.tiny_model("llama")
    anatomy = anatomy_of(model)
    with pytest.raises(IndexError):
        capture(model, anatomy, [Row((1,), (tiny_models.VOCABULARY + 1,))], layer=1)
    assert not any("forward" in vars(block) for block in anatomy.blocks)
    assert not any(module._forward_hooks for module in model.modules())


def test_what_a_group_has_in_common_runs_once():
    """Six rows in two groups of opening 9 long: two sequences, then six without their openings."""
    model = tiny_models.tiny_model("llama")
    anatomy = anatomy_of(model)
    rows = rows_of([(2, 1), (3, 1), (1, 1), (2, 1), (2, 1), (3, 1)], shared=9)
    with reading_outputs(anatomy.blocks[0]) as seen:
        prefix = prefill(model, anatomy, rows, until=3)
    assert [tuple(out.shape[:2]) for out in seen] == [(2, 9), (6, 3)]
    assert prefix.lengths.tolist() == [len(row.prefix) for row in rows]


def test_openings_are_there_once_and_rows_are_chosen_without_copies():
    """Six rows in two groups: two openings' keys and values a block, whichever rows are left."""
    model = tiny_models.tiny_model("llama")
    rows = rows_of([(2, 1), (3, 1), (1, 1), (2, 1), (2, 1), (3, 1)], shared=9)
    prefix = prefill(model, anatomy_of(model), rows, until=3)
    some = prefix.cache.keep(torch.tensor([4, 1])).keep(torch.tensor([1]))
    for whole, left in zip(prefix.cache.frozen, some.frozen, strict=True):
        opening, own = whole.pasts
        assert (len(opening.keys), opening.width, len(own.keys), own.width) == (2, 9, 6, 3)
        for before, after in zip(whole.pasts, left.pasts, strict=True):
            assert after.keys.data_ptr() == before.keys.data_ptr()
            assert after.values.data_ptr() == before.values.data_ptr()
            assert torch.equal(after.of_rows()[0], before.of_rows()[0][[1]])
            assert torch.equal(after.of_rows()[1], before.of_rows()[1][[1]])


@pytest.mark.parametrize("kind", tiny_models.CONFIGS)
def test_openings_that_more_rows_have_in_common_serve_some_of_them(kind):
    """As when a batch's chunks are run behind openings that were run once: with too long a row among them."""
    model = tiny_models.tiny_model(kind)
    anatomy = anatomy_of(model)
    rows = rows_of([*SHAPES, (40, 2)], shared=3)
    openings = Openings.run(model, anatomy, openings_of(model, rows), until=3)
    for chosen in ([0, 3, 5], [6, 1], [2]):
        some = [rows[i] for i in chosen]
        tail = capture(model, anatomy, some, layer=2, openings=openings)
        assert_same(model, tail, some, 2)


def test_padding_between_tokens_is_kept_away_from_a_sliding_window():
    """mistral-tiny looks back 12 columns: openings are shared only where no window can tell."""
    model = tiny_models.tiny_model("mistral")
    anatomy = anatomy_of(model)
    with reading_outputs(anatomy.blocks[0]) as seen:
        prefill(model, anatomy, rows_of([(2, 1), (3, 1), (1, 1), (2, 1)], shared=9), until=3)
    assert [tuple(out.shape[:2]) for out in seen] == [(4, 12)]


def test_gradients_reach_the_state_and_no_weight():
    model = tiny_models.tiny_model("llama").requires_grad_(False)
    tail = capture(model, anatomy_of(model), rows_of(SHAPES), layer=1)
    hidden = tail.hidden.clone().requires_grad_()
    tail.logits(tail.states(hidden)[:, 0]).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[:, 0].abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
