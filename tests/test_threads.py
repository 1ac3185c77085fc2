"""Work side by side: as many lines as torch has threads, results in order, the threads given back."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Barrier, get_ident
from time import sleep

import pytest
import torch

from patchkit.algebra.threads import side_by_side


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_items_are_worked_on_together_and_come_in_order():
    together = Barrier(2)

    def work(item):
        together.wait(10)  # breaks where the other does not come
        return item, torch.get_num_threads(), get_ident()

    with side_by_side(2) as each:
        found = list(each(work, range(6)))
    assert [item for item, *_ in found] == list(range(6))
    assert {threads for _, threads, _ in found} == {2}
    assert get_ident() not in {thread for *_, thread in found}
    assert torch.get_num_threads() == 4


def test_one_at_a_time_has_all_threads_and_the_caller_works():
    with side_by_side(1) as each:
        assert list(each(lambda _: (torch.get_num_threads(), get_ident()), [0])) == [(4, get_ident())]


def test_work_for_another_device_is_queued_by_the_caller():
    with side_by_side(3, torch.device("meta")) as each:
        assert list(each(lambda _: get_ident(), range(3))) == [get_ident()] * 3


def test_no_more_lines_than_threads():
    torch.set_num_threads(1)
    with side_by_side(8) as each:
        assert list(each(lambda _: get_ident(), range(3))) == [get_ident()] * 3


def test_results_that_nobody_took_do_not_pile_up():
    """Each may be large: what is made ahead of its being asked for is bounded."""
    made = []
    with side_by_side(3) as each:
        results = each(lambda item: made.append(item) or item, range(100))
        assert next(results) == 0
        sleep(0.05)
        assert len(made) <= 5
        assert list(results) == list(range(1, 100))


def test_an_error_comes_through_and_gives_the_threads_back():
    with pytest.raises(ZeroDivisionError), side_by_side(3) as each:
        list(each(lambda item: 1 / item, [1, 0, 2]))
    assert torch.get_num_threads() == 4
