"""Four processes in several layouts: which samples, dropout masks, sums and optimizer work each rank gets."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bardling.config import ModelConfig, OptimConfig
from bardling.distributed.context import SINGLE, Context, distributed
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.optim.build import build_optimizer, row_splits, set_learning_rate
from bardling.planning.layout import AXES, DATA_AXES, Layout
from bardling.training.step import seed_dropout

WORLD_SIZE = 4
LAYOUTS = [(4, 1, 1, 1, 1), (2, 2, 1, 1, 1), (2, 1, 2, 1, 1), (1, 1, 2, 2, 1), (1, 2, 1, 1, 2)]
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=20, vocab_multiple=4)
MUON = OptimConfig(name="muon", lr=1e-3, weight_decay=0.1, muon_precision="float32")


def coordinates(rank, sizes):
    """The position of a rank on each axis; the last axis varies fastest."""
    return dict(zip(AXES, list(itertools.product(*map(range, sizes)))[rank], strict=True))


def peers(rank, sizes, axes):
    """The ranks that differ from `rank` along `axes` only."""
    own = coordinates(rank, sizes)
    others = [(other, coordinates(other, sizes)) for other in range(WORLD_SIZE)]
    return [other for other, place in others if all(place[axis] == own[axis] for axis in AXES if axis not in axes)]


def muon_weights(context):
    """The weights after two updates with the same gradients in all processes."""
    model = GPT(MODEL, seed=1)
    optimizer = build_optimizer(
        model.named_parameters(),
        MUON,
        context.device,
        splits=row_splits(MODEL),
        rank=context.data_rank,
        world_size=context.data_size,
        process_group=context.group(),
    )
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_learning_rate(optimizer, MUON.lr)
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def problem_on_primary(context):
    """What this process raises if the primary one cannot do its work."""

    def work():
        raise UserError(f"rank {context.rank} cannot")

    try:
        context.on_primary(work)
    except UserError as error:
        return str(error)


def observe(context, reference):
    """What one process sees in one layout."""
    seed_dropout(7, 3, context.data_rank)
    weights = muon_weights(context)
    return {
        "data_rank": context.data_rank,
        "data_size": context.data_size,
        "dropout": torch.rand(8).tolist(),
        "sums": {
            " ".join(axes): context.sum(torch.tensor([1 << context.rank]), axes).item() for axes in (DATA_AXES, ("tensor",))
        },
        "group_sizes": {axis: dist.get_world_size(context.group([axis])) for axis in AXES},
        "data_group_size": dist.get_world_size(context.group()),
        "on_primary": [context.on_primary(lambda: context.rank), problem_on_primary(context)],
        "any": [context.any(context.rank == rank) for rank in (0, 3)] + [context.any(False)],
        "muon": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
        "muon_error": (weights - reference).abs().max().item(),
    }


def main(folder):
    reference = muon_weights(SINGLE)
    with distributed("cpu") as context:
        seen = [observe(context.arranged(Layout(*sizes)), reference) for sizes in LAYOUTS]
        (folder / f"{context.rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """`observed[rank][layout]`, from a single launch of four processes."""
    folder = tmp_path_factory.mktemp("mesh")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD_SIZE}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [dict(zip(LAYOUTS, json.loads((folder / f"{rank}.json").read_text()), strict=True)) for rank in range(WORLD_SIZE)]


def each_rank(observed, sizes):
    return [(rank, observed[rank][sizes]) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_ranks_on_the_data_axes_have_different_samples(observed, sizes):
    replicate, shard = sizes[:2]
    for rank, seen in each_rank(observed, sizes):
        place = coordinates(rank, sizes)
        assert seen["data_size"] == replicate * shard
        assert seen["data_rank"] == place["replicate"] * shard + place["shard"]


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_sums_and_groups_run_over_the_named_axes(observed, sizes):
    for rank, seen in each_rank(observed, sizes):
        for axes in (DATA_AXES, ("tensor",)):
            assert seen["sums"][" ".join(axes)] == sum(1 << peer for peer in peers(rank, sizes, axes))
        assert seen["group_sizes"] == dict(zip(AXES, sizes, strict=True))
        assert seen["data_group_size"] == seen["data_size"]
        assert seen["any"] == [True, True, False], "over all processes, whatever the layout"


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_dropout_differs_along_the_data_axes_only(observed, sizes):
    seen = dict(each_rank(observed, sizes))
    for one, two in itertools.combinations(range(WORLD_SIZE), 2):
        same_samples = two in peers(one, sizes, ("tensor", "pipeline", "context"))
        assert (seen[one]["dropout"] == seen[two]["dropout"]) == same_samples


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_muon_shares_its_work_over_the_data_axes_and_updates_are_equal(observed, sizes):
    assert len({seen["muon"] for _, seen in each_rank(observed, sizes)}) == 1
    assert all(seen["muon_error"] < 1e-6 for _, seen in each_rank(observed, sizes))


def test_a_layout_for_another_number_of_processes_is_refused():
    assert SINGLE.arranged(Layout()) is SINGLE
    with pytest.raises(ValueError, match="is for 2 processes, but there are 4"):
        Context(0, 4, torch.device("cpu")).arranged(Layout(shard=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_work_of_the_primary_process_succeeds_or_fails_in_all(observed, sizes):
    for _, seen in each_rank(observed, sizes):
        assert seen["on_primary"] == [0, "rank 0 cannot"]
