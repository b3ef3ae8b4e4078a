"""Batches loaded ahead: the same ones, the same positions, the same errors."""

import threading

import pytest
import torch

from mipipe.graphs.errors import DataEnd, RunError
from mipipe.runtime.train.data import Batches
from mipipe.runtime.train.prefetch import Prefetched


class Counting:
    """A loader whose state is one dictionary that it goes on changing."""

    def __init__(self, own: bool, count: int = 5) -> None:
        self.count, self.position = count, {"next": 0}
        if own:
            self.state_dict = lambda: self.position
            self.load_state_dict = self.position.update

    def __iter__(self):
        while self.position["next"] < self.count:
            self.position["next"] += 1
            yield {"input_ids": torch.tensor([self.position["next"]])}
        self.position["next"] = 0


@pytest.mark.parametrize("own", [True, False])
def test_batches_and_positions_are_those_without_prefetching(own):
    plain, ahead = Batches(Counting(own), 1), Prefetched(Batches(Counting(own), 1), False, 20.0)
    assert ahead.state() == plain.state()
    for _ in range(12):
        assert torch.equal(next(ahead)["input_ids"], next(plain)["input_ids"])
        assert ahead.state() == plain.state() and ahead.state(before=True) == plain.state(before=True)


@pytest.mark.parametrize("own", [True, False])
def test_a_run_goes_on_with_the_batch_after_the_last_one_given(own):
    ahead = Prefetched(Batches(Counting(own), 1), False, 20.0)
    for _ in range(3):
        next(ahead)
    second = Prefetched(Batches(Counting(own), 1), False, 20.0)
    second.continue_from(lambda number: ahead.state(), 1, 0, 1)
    assert int(next(second)["input_ids"]) == 4


def test_what_the_loader_raises_is_raised_where_its_batch_is_asked_for():
    def broken():
        yield {"input_ids": torch.ones(1)}
        raise ValueError("a damaged file")
    ahead = Prefetched(Batches(broken()), False, 20.0)
    next(ahead)
    with pytest.raises(DataEnd, match="ValueError: a damaged file"):
        next(ahead)


def test_a_loader_that_hangs_ends_within_the_limit():
    leave = threading.Event()

    def slow():
        leave.wait(60)
        yield {"input_ids": torch.ones(1)}
    try:
        with pytest.raises(RunError, match=r"gave no batch within 0\.2 s"):
            next(Prefetched(Batches(slow()), False, 0.2))
    finally:
        leave.set()
