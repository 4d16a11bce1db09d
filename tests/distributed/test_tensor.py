"""Tensor parallelism computes what one process does: losses over a divided vocabulary, passes of any length, training."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_layouts import check, name

from bardling.config import ModelConfig, ParallelConfig
from bardling.errors import UserError
from bardling.model.divided import Split, tensor_splits
from bardling.model.gpt import GPT
from bardling.planning.activations import ActivationBytes
from bardling.planning.layout import Layout, check_tensor, choose_layout
from bardling.planning.memory import MemoryPlan

FOLDER = Path(__file__).parent
MODEL = ModelConfig(n_layer=2, n_head=12, n_embd=96, vocab_size=101, vocab_multiple=8, family="llama", n_kv_head=6)
GB = 10**9

TENSOR, BOTH, COPIES, FOUR = (1, 1, 2, 1), (1, 2, 2, 1), (2, 1, 2, 1), (1, 1, 4, 1)
COMMON = {"vocab_multiple": 8}
FEW = [
    {"layout": TENSOR, "steps": 5, **COMMON},
    {"layout": BOTH, "optim": "muon", "family": "llama", "tied": False, "steps": 5, **COMMON},
]
ALL = [
    {"layout": layout, "family": family, "optim": optim, "tied": tied, **COMMON}
    for layout, family, optim, tied in itertools.product(
        (TENSOR, BOTH, COPIES), ("gpt2", "llama", "qwen3"), ("adamw", "muon"), (True, False)
    )
] + [
    {"layout": FOUR, "optim": "muon", **COMMON},
    {"layout": TENSOR, "compiled": True, "recompute": True, "family": "llama", "optim": "muon", **COMMON},
    {"layout": BOTH, "recompute": True, "whole_gradients": True, **COMMON},
    {"layout": TENSOR, "precision": "float16", "steps": 5, "family": "qwen3", **COMMON},
]


def launch(processes, *arguments):
    """Run a program of this folder in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def trained(case, folder):
    """The results of a case on all ranks."""
    (folder / "cases.json").write_text(json.dumps([case]))
    launch(Layout(*case["layout"]).world_size, FOLDER / "layout_program.py", folder / "cases.json", folder / "results.json")
    return json.loads((folder / "results.json").read_text())[0]


@pytest.mark.parametrize("case", FEW, ids=name)
def test_tensor_parallelism_trains_as_one_process(case, tmp_path):
    check(case, trained(case, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=name)
def test_all_models_train_with_tensor_parallelism_as_in_one_process(case, tmp_path):
    check(case, trained(case, tmp_path))


def test_two_processes_compute_what_one_does(tmp_path):
    launch(2, FOLDER / "tensor_program.py", tmp_path / "results.json")
    ranks = json.loads((tmp_path / "results.json").read_text())
    assert [found["dropout_rank"] for found in ranks] == [0, 1]
    for found in ranks:
        assert len(found["losses"]) > 40
        for what, difference in found["losses"].items():
            assert difference < 1e-13, what
        for family, parts in found["passes"].items():
            for what, difference in parts.items():
                assert difference < 5e-6, (family, what)


def test_fractions_of_fused_matrices_have_rows_of_every_part():
    split = Split(0, (4, 2, 2))
    whole = torch.arange(8)[:, None].expand(8, 3)
    halves = [split.fraction(whole, rank, 2) for rank in range(2)]
    assert [half[:, 0].tolist() for half in halves] == [[0, 1, 4, 6], [2, 3, 5, 7]]
    assert torch.equal(split.join(halves), whole)
    columns = Split(1, (8,))
    quarters = [columns.fraction(whole.T, rank, 4) for rank in range(4)]
    assert [quarter[0].tolist() for quarter in quarters] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert torch.equal(columns.join(quarters), whole.T)


@pytest.mark.parametrize("options", [{}, {"family": "gpt2", "n_kv_head": None}, {"value_embeddings": 1}, {"mlp": "relu2"}])
def test_splits_are_those_of_the_model(options):
    common = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 40, "family": "llama", "n_kv_head": 2}
    config = ModelConfig(**common | options)
    shapes = {name: parameter.shape for name, parameter in GPT(config).named_parameters()}
    splits = tensor_splits(config)
    for parameter, split in splits.items():
        assert shapes[parameter][split.dim] == sum(split.parts)
    rest = {parameter.rpartition(".")[0].rpartition(".")[2] for parameter in shapes if parameter not in splits}
    assert rest <= {"ln_1", "ln_2", "ln_f", "wpe", "c_proj", "attn"}  # of c_proj the bias, of attn the value_mix


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (4, "parallel.tensor = 4 does not divide model.n_kv_head = 6: nearest possible: --parallel.tensor 2"),
        (5, "parallel.tensor = 5 does not divide model.n_head = 12: nearest possible: --parallel.tensor 2"),
        (48, "parallel.tensor = 48 does not divide model.n_head = 12: nearest possible: --parallel.tensor 2"),
    ],
)
def test_a_size_that_does_not_divide_the_model_is_refused(size, message):
    check_tensor(MODEL, 2)
    with pytest.raises(UserError) as error:
        check_tensor(MODEL, size)
    assert str(error.value) == message


def plan(state, activations):
    """Memory of one process (GB)."""
    found = ActivationBytes(blocks=int(activations * GB), embedding_and_head=0, weight_copies=0, head=0)
    return MemoryPlan(weights=int(state * GB), gradients=0, optimizer=0, trained=0, activations=found)


@pytest.mark.parametrize(
    ("config", "needed", "layout", "reason"),
    [
        (ParallelConfig(tensor=2), plan(1, 1), Layout(replicate=4, tensor=2), "fit in 10 GB"),
        (ParallelConfig(tensor=2), plan(20, 8), Layout(shard=4, tensor=2), "6.5 GB on each of 8 processes"),
        (ParallelConfig(tensor=2, replicate=2), plan(1, 1), Layout(replicate=2, shard=2, tensor=2), "as configured"),
        (ParallelConfig(tensor=2, shard=2), plan(1, 1), Layout(replicate=2, shard=2, tensor=2), "as configured"),
        (ParallelConfig(tensor=2, layout="fsdp"), plan(1, 1), Layout(shard=4, tensor=2), "as configured"),
        (ParallelConfig(), plan(20, 3), Layout(shard=8), "5.5 GB on each of 8 processes"),
        # Sharded among 8, a process still needs 2 + 12 GB, more than 9; with layers in halves 2 + 6.
        (ParallelConfig(), plan(16, 12), Layout(shard=4, tensor=2), "(14 GB on each process even then)"),
        (ParallelConfig(), plan(16, 99), Layout(shard=8), "101 GB on each of 8 processes"),
    ],
)
def test_tensor_parallelism_is_chosen_where_shards_are_not_enough(config, needed, layout, reason):
    chosen, why = choose_layout(config, 8, 8, needed, 10 * GB, MODEL)
    assert chosen == layout
    assert reason in why


def test_sizes_that_do_not_fit_the_processes_are_refused():
    with pytest.raises(UserError, match=r"parallel.tensor = 2: needs a multiple of 2 processes, but there are 3: .* 1$"):
        choose_layout(ParallelConfig(tensor=2), 3, 3, plan(1, 1), None, MODEL)
