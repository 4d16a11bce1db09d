"""CUDA graphs: gradients that every pass writes to the same memory are added up elsewhere; other devices refuse them."""

import pytest
import torch

from bardling.bench import bench
from bardling.config import ModelConfig, OptimConfig, RunConfig
from bardling.data.loader import Batch
from bardling.distributed.context import SINGLE
from bardling.distributed.device import Precision
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.optim.build import build_optimizer
from bardling.train.compiling import _Replayed, asked_to_compile
from bardling.train.run import train
from bardling.train.state import TrainState
from bardling.train.step import train_step

CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=12, vocab_size=11, vocab_multiple=8, tied=False)
CUDA = torch.device("cuda", 0)


class _SameMemory(torch.autograd.Function):
    """Hands on a tensor, and its gradient in memory that is used again for the next one, as a graph does."""

    @staticmethod
    def forward(ctx, x, memory):
        ctx.memory = memory
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.memory.copy_(grad), None


def replaying(model):
    memory = {name: torch.empty_like(parameter) for name, parameter in model.named_parameters()}

    def forward(*arguments, **options):
        seen = {name: _SameMemory.apply(parameter, memory[name]) for name, parameter in model.named_parameters()}
        return torch.func.functional_call(model, seen, arguments, options)

    return forward


def three_steps(passes, make_forward, **options):
    model = GPT(CONFIG, seed=0).train()
    state = TrainState(model, build_optimizer(model.named_parameters(), OptimConfig(), torch.device("cpu")))
    forward = make_forward(model)
    random, gradients = torch.Generator().manual_seed(1), []
    for _ in range(3):
        batches = [Batch(*torch.randint(11, (2, 4, 12), generator=random)) for _ in range(passes)]
        precision = Precision("float32", "test", "cpu")
        train_step(state, batches, forward=forward, lr=1e-2, grad_clip=1.0, precision=precision, context=SINGLE, **options)
        gradients.append([parameter.grad for parameter in model.parameters()])  # held, so that no memory is used again
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), gradients


@pytest.mark.parametrize("passes", [1, 3])
def test_gradients_are_added_up_in_memory_of_their_own(passes):
    expected, _ = three_steps(passes, lambda model: model)
    found, gradients = three_steps(passes, replaying, keep_gradients=True)
    assert torch.equal(found, expected)
    assert all(one is two is three for one, two, three in zip(*gradients, strict=True))


@pytest.mark.slow
def test_what_is_replayed_computes_the_same():
    """On a CPU `reduce-overhead` compiles and replays nothing, so that only the way there is tried."""
    expected, _ = three_steps(2, lambda model: model)
    found, _ = three_steps(2, _Replayed, keep_gradients=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_they_are_compiled_where_that_is_left_open():
    assert asked_to_compile(RunConfig(cuda_graphs=True), CUDA) == (True, "for CUDA graphs")
    assert asked_to_compile(RunConfig(cuda_graphs=True, compile="on"), CUDA) == (True, "as asked")
    assert asked_to_compile(RunConfig(), CUDA) == (None, "")
    assert asked_to_compile(RunConfig(compile="off"), CUDA) == (False, "as asked")


def test_other_devices_refuse_them(tiny, change, tmp_path):
    config = change(tiny, compile="auto")
    config = change(config, cuda_graphs=True)
    with pytest.raises(UserError, match=r"cuda_graphs = True on cpu: .* leave it out"):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="cuda_graphs = True on cpu"):
        bench(config, steps=1)


def test_settings_that_exclude_each_other_are_refused(tiny, change):
    with pytest.raises(UserError, match="cuda_graphs = True with compile = 'off'"):
        change(tiny, cuda_graphs=True)
    with pytest.raises(UserError, match=r"attention = 'fa3' with model.dropout = 0.1"):
        change(tiny, attention="fa3", model={"dropout": 0.1})


def test_a_run_with_kernels_of_another_device_leaves_nothing(tiny, change, tmp_path):
    with pytest.raises(UserError, match="attention = 'fa4' on cpu"):
        train(change(tiny, attention="fa4"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
