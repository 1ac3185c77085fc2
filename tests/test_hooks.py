"""What one thread hooks into a model, other threads' passes through the same model do not see."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import tiny_models
import torch
from test_replay import SHAPES, replayed_logits, rows_of

from patchkit.algebra.threads import side_by_side
from patchkit.models.anatomy import anatomy_of
from patchkit.models.hooks import listening, reading_inputs, stand_in, stop_after
from patchkit.models.replay import capture

ROUNDS = 20


def elsewhere(work):
    """What ``work`` gives in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_another_thread_runs_the_blocks_themselves():
    block = torch.nn.Linear(3, 3)
    given = torch.ones(3)
    wanted = block(given)
    with stand_in([block], lambda _: lambda x: x + 1):
        assert torch.equal(block(given), given + 1)
        assert torch.equal(elsewhere(lambda: block(given)), wanted)
        with stand_in([block], lambda _: lambda x: x + 2):
            assert torch.equal(block(given), given + 2)
        assert torch.equal(block(given), given + 1)
    assert torch.equal(block(given), wanted)
    assert "forward" not in vars(block)


def test_a_forward_that_was_replaced_before_comes_back():
    block = torch.nn.Linear(3, 3)
    block.forward = lambda x: x * 7  # as accelerate does
    before = vars(block)["forward"]
    with pytest.raises(RuntimeError, match="inside"), stand_in([block], lambda _: lambda x: x):
        raise RuntimeError("inside")
    assert vars(block)["forward"] is before


def test_stand_ins_of_two_threads_may_end_in_any_order():
    block, step = torch.nn.Linear(3, 3), Barrier(2)
    given = torch.ones(3)

    def other():
        step.wait(10)  # the first stands in
        with stand_in([block], lambda _: lambda x: x + 2):
            step.wait(10)
            step.wait(10)  # the first has gone
            return block(given)

    with ThreadPoolExecutor(1) as pool:
        with stand_in([block], lambda _: lambda x: x + 1):
            found = pool.submit(other)
            step.wait(10)
            step.wait(10)
            assert torch.equal(block(given), given + 1)
        step.wait(10)
        assert torch.equal(found.result(), given + 2)
    assert "forward" not in vars(block)


def test_another_thread_is_neither_heard_nor_stopped():
    block = torch.nn.Linear(3, 3)
    heard = []
    went_on = False
    with (
        reading_inputs(block) as seen,
        listening(block, lambda _, __, output: heard.append(output)),
        stop_after(block),
    ):
        elsewhere(lambda: block(torch.ones(3)))
        assert not seen
        assert not heard
        block(torch.zeros(3))
        went_on = True
    assert not went_on
    assert len(seen) == len(heard) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "mpt"])
def test_passes_side_by_side_give_what_one_after_another_gives(kind):
    """Each pass captures and replays through the one model, which is whole again behind them."""
    model = tiny_models.tiny_model(kind)
    anatomy = anatomy_of(model)
    delta = torch.linspace(-1, 1, tiny_models.WIDTH)

    def run(number):
        rows = rows_of([(p + number % 3, s) for p, s in SHAPES])
        tail = capture(model, anatomy, rows, layer=number % 2)
        return replayed_logits(tail, delta)[tail.mask]

    wanted = [run(number) for number in range(ROUNDS)]
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with side_by_side(4) as each:
            found = list(each(run, range(ROUNDS)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert all("forward" not in vars(block) for block in anatomy.blocks)
    assert not any(block._forward_hooks for block in anatomy.blocks)
