"""CUDA graphs: gradients are accumulated although every pass writes them to the same memory; other devices refuse them."""

import pytest
import torch

from bardling.config import ModelConfig, OptimConfig
from bardling.data.batches.loader import Batch
from bardling.distributed.context import SINGLE
from bardling.distributed.device import Precision
from bardling.distributed.wrap import _CudaGraphModel
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.optim.build import build_optimizer
from bardling.tools.bench import bench
from bardling.training.compile_choice import choose_compile
from bardling.training.objective import NextToken
from bardling.training.run import train
from bardling.training.state import TrainState
from bardling.training.step import StepSettings, train_step

CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=12, vocab_size=11, vocab_multiple=8, tied=False)
CUDA = torch.device("cuda", 0)


class _SameMemory(torch.autograd.Function):
    """The identity, whose gradient is always written to the same memory, as a graph does."""

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
        train_step(state, batches, StepSettings(NextToken(), precision, SINGLE, **options), forward=forward, lr=1e-2)
        gradients.append([parameter.grad for parameter in model.parameters()])  # kept, so that their memory is not reused
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), gradients


@pytest.mark.parametrize("passes", [1, 3])
def test_gradients_accumulate_in_separate_memory(passes):
    expected, _ = three_steps(passes, lambda model: model)
    found, gradients = three_steps(passes, replaying, keep_gradients=True)
    assert torch.equal(found, expected)
    assert all(one is two is three for one, two, three in zip(*gradients, strict=True))


@pytest.mark.slow
def test_replayed_passes_compute_the_same():
    """On a CPU, `reduce-overhead` compiles without replaying, so this tests only the path to it."""
    expected, _ = three_steps(2, lambda model: model)
    found, _ = three_steps(2, _CudaGraphModel, keep_gradients=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_cuda_graphs_imply_compilation_unless_it_is_off():
    assert choose_compile("auto", True, CUDA, 0.0, 1.0) == (True, "for CUDA graphs")
    assert choose_compile("on", True, CUDA, 0.0, 1.0) == (True, "as configured")
    assert choose_compile("auto", False, CUDA, 0.0, 1.0) == (False, "would save about 0 s and cost about 60 s")
    assert choose_compile("off", False, CUDA, 1e9, 1.0) == (False, "as configured")


def test_cuda_graphs_are_refused_on_other_devices(tiny, change, tmp_path):
    config = change(tiny, compile="auto")
    config = change(config, cuda_graphs=True)
    with pytest.raises(UserError, match=r"cuda_graphs = True on cpu: .* leave it out"):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="cuda_graphs = True on cpu"):
        bench(config, steps=1)


def test_conflicting_settings_are_refused(tiny, change):
    with pytest.raises(UserError, match="cuda_graphs = True with compile = 'off'"):
        change(tiny, cuda_graphs=True)
    with pytest.raises(UserError, match=r"attention = 'fa3' with model.dropout = 0.1"):
        change(tiny, attention="fa3", model={"dropout": 0.1})


def test_kernels_of_another_device_are_refused_before_anything_is_written(tiny, change, tmp_path):
    with pytest.raises(UserError, match="attention = 'fa4' on cpu"):
        train(change(tiny, attention="fa4"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
