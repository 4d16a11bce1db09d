"""Context parallelism computes what one process does: passes of any length, training, and runs that resume with it."""

import itertools
import json

import pytest
from test_layouts import check, name
from test_tensor import FOLDER, MODEL, launch, plan, trained

from bardling.config import ParallelConfig
from bardling.errors import UserError
from bardling.planning.layout import Layout, check_context, choose_layout, sharded_bytes

TWO, BOTH, COPIES, FOUR = (1, 1, 1, 1, 2), (1, 2, 1, 1, 2), (2, 1, 1, 1, 2), (1, 1, 1, 1, 4)
FEW = [{"layout": TWO, "steps": 5}, {"layout": BOTH, "optim": "muon", "family": "llama", "tied": False, "steps": 5}]
ALL = [
    {"layout": layout, "family": family, "optim": optim, "tied": tied}
    for layout, family, optim, tied in itertools.product(
        (TWO, BOTH, COPIES), ("gpt2", "llama", "qwen3"), ("adamw", "muon"), (True, False)
    )
    if (family == "gpt2") == tied
] + [
    {"layout": FOUR, "optim": "muon"},
    {"layout": TWO, "compiled": True, "recompute": True, "family": "llama", "optim": "muon"},
    {"layout": BOTH, "recompute": True, "whole_gradients": True, "reshard": False},
    {"layout": TWO, "precision": "float16", "steps": 5, "family": "gpt2"},
]


@pytest.mark.parametrize("case", FEW, ids=name)
def test_context_parallelism_trains_as_one_process(case, tmp_path):
    check(case, trained(case, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=name)
def test_all_models_train_with_context_parallelism_as_in_one_process(case, tmp_path):
    check(case, trained(case, tmp_path))


def test_two_processes_compute_what_one_does(tmp_path):
    launch(2, FOLDER / "tensor_program.py", tmp_path / "results.json", "context")
    ranks = json.loads((tmp_path / "results.json").read_text())
    assert [found["dropout_rank"] for found in ranks] == [0, 1]
    for found in ranks:
        for family, parts in found["passes"].items():
            assert len(parts) > 10
            for what, difference in parts.items():
                assert difference < 5e-6, (family, what)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(context=4), "parallel.context = 4 does not divide model.n_kv_head = 6: nearest possible: --parallel.context 2"),
        (Layout(context=5), "parallel.context = 5 does not divide model.n_head = 12: nearest possible: --parallel.context 1"),
        (
            Layout(context=2, tensor=2),
            "parallel.context = 2 with parallel.tensor = 2: either divides the heads: "
            "nearest possible: --parallel.tensor 1 --parallel.shard 2",
        ),
    ],
)
def test_what_context_parallelism_cannot_divide_is_refused(layout, message):
    check_context(MODEL, Layout(context=2))
    with pytest.raises(UserError) as error:
        check_context(MODEL, layout)
    assert str(error.value) == message


def test_the_rest_of_the_processes_see_other_samples():
    layout, why = choose_layout(ParallelConfig(context=2), 8, 8, plan(1, 1), None, MODEL)
    assert (layout, why) == (Layout(replicate=4, context=2), "as configured")
    assert choose_layout(ParallelConfig(context=2, layout="fsdp"), 8, 8, plan(1, 1), None, MODEL)[0] == Layout(
        shard=4, context=2
    )
    assert str(layout) == "HSDP with context parallelism (replicate 4, context 2)"
    assert sharded_bytes(plan(8, 4), Layout(shard=2, context=2)) == 4 * 10**9
    for size, processes, nearest in ((2, 3, 1), (6, 8, 2)):  # 4 divides 8 processes, but not 6 heads
        message = f"parallel.context = {size}: needs a multiple of {size} processes, but there are {processes}: .* {nearest}$"
        with pytest.raises(UserError, match=message):
            choose_layout(ParallelConfig(context=size), processes, processes, plan(1, 1), None, MODEL)
