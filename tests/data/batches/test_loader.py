"""Batches: independent of how a step is divided; evaluation sequences cover a split once; the thread ends cleanly."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bardling.data.batches import IGNORE
from bardling.data.batches.loader import Batch, EvalSequences, Prefetcher, TrainSequences
from bardling.data.batches.order import SequenceOrder
from bardling.data.tokens.manifest import ShardFile
from bardling.data.tokens.shards import TokenSplit
from bardling.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> TokenSplit:
    return make_split(tmp_path_factory.mktemp("split"), 1003)


def make_split(folder: Path, n: int) -> TokenSplit:
    """Tokens 0, 1, 2, ... so that a token tells its place."""
    np.arange(n, dtype="<u2").tofile(folder / "t.bin")
    return TokenSplit(folder, "val", (ShardFile("t.bin", n, 2 * n, ""),), "uint16", 65536)


def test_targets_are_inputs_shifted_by_one(split: TokenSplit) -> None:
    order = SequenceOrder(5, len(split), 16)
    inputs, targets, documents = TrainSequences(split, order).batch(7, 4)
    assert documents is None
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert inputs[:, 0].tolist() == order.starts(7, 4).tolist()
    assert torch.equal(targets, inputs + 1)


@given(
    world=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    micro=st.integers(1, 4),
    first_step=st.integers(0, 50),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=40)
def test_the_same_sequences_however_a_step_is_divided(
    split: TokenSplit, world: int, accumulation: int, micro: int, first_step: int, seed: int
) -> None:
    source = TrainSequences(split, SequenceOrder(seed, len(split), 16))
    per_step = world * accumulation * micro
    whole = source.batch(first_step * per_step, 2 * per_step).inputs
    pieces = []
    for step in range(first_step, first_step + 2):  # the second step as if resumed: nothing is carried over
        for rank in range(world):
            requests = ((step * per_step + (a * world + rank) * micro, micro) for a in range(accumulation))
            with Prefetcher(TrainSequences(split, SequenceOrder(seed, len(split), 16)), requests, CPU) as batches:
                pieces += [batch.inputs for batch in batches]
    assert sorted(torch.cat(pieces).tolist()) == sorted(whole.tolist())


@given(n=st.integers(2, 300), block_size=st.integers(1, 40), size=st.integers(1, 9))
@settings(deadline=None)
def test_all_eval_sequences_contain_each_target_once(
    tmp_path_factory: pytest.TempPathFactory, n: int, block_size: int, size: int
) -> None:
    windows = EvalSequences(make_split(tmp_path_factory.mktemp("split"), n), block_size, None)
    batches = [windows.batch(first, size) for first in range(0, windows.n, size)]
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    inputs = torch.cat([batch.inputs.flatten() for batch in batches])
    counted = targets != IGNORE
    assert targets[counted].tolist() == list(range(1, n))
    assert torch.equal(inputs[counted] + 1, targets[counted])
    assert inputs.min() >= 0
    assert windows.batch(windows.n, 3).inputs.shape == (0, min(block_size, n - 1))


def test_a_subset_of_eval_sequences_is_spread_evenly_and_fixed(split: TokenSplit) -> None:
    windows = EvalSequences(split, 10, 8)
    assert windows.n == 8
    starts = windows.batch(0, 8).inputs[:, 0].tolist()
    assert starts == [0, 120, 250, 370, 500, 630, 750, 880]
    assert starts == [row for first in range(8) for row in windows.batch(first, 1).inputs[:, 0].tolist()]
    assert EvalSequences(split, 10, 5000).n == EvalSequences(split, 10, None).n == 101


def test_a_split_too_short_to_evaluate(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"val split has fewer than 2 tokens \(1\)"):
        EvalSequences(make_split(tmp_path, 1), 8, None)


class Slow:
    """A source that counts its batches and fails at a given sample."""

    def __init__(self, fail_at: int = -1) -> None:
        self.made, self.fail_at = 0, fail_at

    def batch(self, first_sample: int, size: int) -> Batch:
        if first_sample == self.fail_at:
            raise UserError("file.bin: was cut")
        self.made += 1
        row = torch.full((size, 2), first_sample)
        return Batch(row, row)


def endless() -> Iterator[tuple[int, int]]:
    first = 0
    while True:
        yield first, 1
        first += 1


def test_prefetches_in_order_up_to_the_depth() -> None:
    source = Slow()
    with Prefetcher(source, endless(), CPU, depth=3) as batches:
        assert [int(next(batches).inputs[0, 0]) for _ in range(10)] == list(range(10))
        time.sleep(0.05)
        assert source.made <= 10 + 3 + 1


def test_ends_with_the_requests() -> None:
    with Prefetcher(Slow(), iter([(0, 1), (5, 1)]), CPU) as batches:
        assert [int(batch.inputs[0, 0]) for batch in batches] == [0, 5]
        assert list(batches) == []


def test_an_error_in_the_thread_is_raised_in_place_of_its_batch() -> None:
    with Prefetcher(Slow(fail_at=2), endless(), CPU) as batches:
        assert [int(next(batches).inputs[0, 0]) for _ in range(2)] == [0, 1]
        with pytest.raises(UserError, match="was cut"):
            next(batches)
        assert list(batches) == []  # and does not hang


def test_close_joins_a_thread_that_waits_for_room() -> None:
    before = threading.active_count()
    batches = Prefetcher(Slow(), endless(), CPU, depth=1)
    next(batches)
    begun = time.monotonic()
    batches.close()
    batches.close()
    assert time.monotonic() - begun < 30
    assert threading.active_count() <= before  # a thread of another test may have ended meanwhile
    assert list(batches) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_on_a_cuda_device(split: TokenSplit) -> None:
    order = SequenceOrder(5, len(split), 16)
    device = torch.device("cuda", 0)
    with Prefetcher(TrainSequences(split, order), iter([(0, 4), (4, 4)]), device) as batches:
        got = list(batches)
    assert all(batch.inputs.device == device for batch in got)
    assert torch.equal(got[1].targets.cpu(), TrainSequences(split, order).batch(4, 4).targets)
