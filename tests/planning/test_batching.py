"""Batch arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bardling.config import TrainConfig
from bardling.errors import UserError
from bardling.planning.batching import make_plan


def test_the_batch_is_divided_over_processes_and_passes():
    plan = make_plan(TrainConfig(steps=3, batch_size=24, micro_batch=4), block_size=128, data_size=2)
    assert (plan.accumulation, plan.samples_per_step, plan.tokens_per_step) == (3, 24, 24 * 128)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 100), st.integers(1, 3))
def test_every_sample_of_a_step_is_read_once_by_one_process(world_size, accumulation, micro, first, steps):
    batch = world_size * accumulation * micro
    plan = make_plan(TrainConfig(batch_size=batch, micro_batch=micro), block_size=8, data_size=world_size)
    seen = [
        sample
        for rank in range(world_size)
        for start, size in plan.requests(first, steps, rank)
        for sample in range(start, start + size)
    ]
    assert sorted(seen) == list(range(first, first + steps * batch))


@pytest.mark.parametrize(
    ("batch", "micro", "world", "says"),
    [
        (10, None, 4, "does not divide among 4 processes: use 8 or 12"),
        (3, None, 4, "use 4"),
        (12, 5, 1, "use --train.micro_batch 4"),
        (12, 100, 1, "use --train.micro_batch 12"),
    ],
)
def test_batches_that_do_not_divide_are_refused_with_sizes_that_do(batch, micro, world, says):
    with pytest.raises(UserError) as error:
        make_plan(TrainConfig(batch_size=batch, micro_batch=micro), block_size=8, data_size=world)
    assert says in str(error.value)
