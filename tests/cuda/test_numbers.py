"""On a GPU, every path computes what the CPU computes: kernels, losses, gradients, updates and generated tokens."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from bardling.config import ModelConfig, OptimConfig
from bardling.data.batches.loader import Batch
from bardling.data.batches.packing import document_bounds
from bardling.distributed.context import SINGLE
from bardling.distributed.device import Precision, backend
from bardling.generation.generate import generate
from bardling.model.document_masks import make_documents
from bardling.model.gpt import GPT
from bardling.model.kernels.attention import attention, reference_attention, within_window
from bardling.model.kernels.head_loss import full_logits_loss, head_loss
from bardling.model.kernels.linear import linear
from bardling.training.build import Execution, build
from bardling.training.objective import NextToken
from bardling.training.recovery.spikes import Limits
from bardling.training.step import StepSettings, train_step

GPT2 = ModelConfig(n_layer=2, n_head=4, n_embd=128, block_size=128, vocab_size=500, vocab_multiple=64)
MODELS = {
    "gpt2": GPT2,
    "gpt2, bias": dataclasses.replace(GPT2, bias=True),
    "llama": dataclasses.replace(GPT2, family="llama", n_kv_head=2),
    "qwen3, untied": dataclasses.replace(GPT2, family="qwen3", n_kv_head=1, tied=False),
    "window": dataclasses.replace(GPT2, family="llama", sliding_window=32, global_every=2, value_embeddings=1),
    "softcap": dataclasses.replace(GPT2, logit_softcap=15.0),
}
# Compiled code reduces more than 1024 channels in loops, which has to be right too.
WIDE = {
    f"{name}, wide": dataclasses.replace(MODELS[name], n_embd=1600, n_head=25, n_kv_head=5 if name != "gpt2" else None)
    for name in ("gpt2", "llama", "qwen3, untied")
}
START = 3


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the norm of the expected value."""
    one, other = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((one - other).norm() / other.norm().clamp_min(1e-30))


def tokens(rows: int, length: int, vocab: int = 500, seed: int = 0) -> Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch(device: torch.device, *, documents: bool = False, seed: int = 0) -> Batch:
    """Four sequences of 128 tokens; the first eight targets have no loss."""
    sequences = tokens(4, 129, seed=seed)
    inputs, targets = sequences[:, :-1].contiguous(), sequences[:, 1:].clone()
    targets[0, :8] = -100
    bounds = document_bounds(inputs == START).to(device) if documents else None
    return Batch(inputs.to(device), targets.to(device), bounds)


def loss_and_gradients(model: GPT, given: Batch, precision: Precision, forward=None) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss and gradients by name, on the CPU."""
    model.zero_grad(set_to_none=True)
    with precision.autocast():
        loss = (model if forward is None else forward)(given.inputs, given.targets, documents=given.documents)
    loss.backward()
    return loss.detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def models(config: ModelConfig, gpu: torch.device) -> tuple[GPT, GPT]:
    """The same model in float64 on the CPU and in float32 on the GPU."""
    model = GPT(config, seed=0).train()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            generator = torch.Generator().manual_seed(number)
            if "wte" not in name and "lm_head" not in name:  # whose padding is zero
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return copy.deepcopy(model).double(), model.to(gpu)


@pytest.mark.parametrize("documents", [False, True], ids=["plain", "documents"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_the_float64_models(gpu, name, dtype, tolerance, documents):
    reference, model = models(MODELS[name], gpu)
    expected_loss, expected = loss_and_gradients(
        reference, batch(torch.device("cpu"), documents=documents), Precision("float32", "", "cpu")
    )
    with backend(gpu, deterministic=True):  # without TF32
        loss, found = loss_and_gradients(model, batch(gpu, documents=documents), Precision(dtype, "", "cuda"))
    assert relative(loss, expected_loss) < tolerance / 10
    assert found.keys() == expected.keys()
    assert {key: value for key in found if (value := relative(found[key], expected[key])) > tolerance} == {}


@pytest.mark.parametrize("name", ["gpt2", "qwen3, untied", "window", "softcap", *WIDE])
@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["compiled", "graphs"])
def test_compiled_passes_compute_the_eager_gradients(gpu, name, cuda_graphs):
    execution = Execution(Precision("bfloat16", "", "cuda"), compiled=True, cuda_graphs=cuda_graphs)
    context = dataclasses.replace(SINGLE, device=gpu)
    assembly = build((MODELS | WIDE)[name], OptimConfig(), execution, context)
    model = assembly.state.model.train()
    for seed in range(3):  # with CUDA graphs, the first passes record
        given = batch(gpu, seed=seed)
        eager_loss, eager = loss_and_gradients(model, given, execution.precision)
        loss, found = loss_and_gradients(model, given, execution.precision, assembly.forward)
        assert relative(loss, eager_loss) < 2e-3
        # A value mix sums rounded products over all tokens, with both signs.
        limits = {key: 8e-2 if key.endswith("value_mix") else 3e-2 for key in found}
        assert {key: value for key in found if (value := relative(found[key], eager[key])) > limits[key]} == {}
        again, _ = loss_and_gradients(model, given, execution.precision, assembly.forward)
        assert again == loss


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize(("time", "window"), [(128, None), (128, 32), (120, 50)])
@pytest.mark.parametrize("documents", [False, True], ids=["plain", "documents"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_attention_equals_the_formula(gpu, dtype, tolerance, documents, time, window, kv_heads):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, time, 32, generator=random).to(gpu, dtype) for n in (4, kv_heads, kv_heads))
    positions = torch.arange(time, device=gpu)
    visible = within_window(positions[:, None], positions, window or time)[None, None]
    masks = None
    if documents:
        bounds = torch.tensor([0, 1, 5, 70, time, time + 33, 2 * time], dtype=torch.int32, device=gpu)
        numbers = torch.searchsorted(bounds, torch.arange(2 * time, device=gpu), right=True).view(2, time)
        visible = visible & (numbers[:, :, None] == numbers[:, None])[:, None]
        config = ModelConfig(n_layer=1, n_head=4, n_embd=128, block_size=time, sliding_window=window, global_every=0)
        masks = make_documents(bounds, 2, time, config.architecture, dtype, dropout=0.0)
    narrow = [part.requires_grad_() for part in (q, k, v)]
    wide = [part.detach().double().requires_grad_() for part in narrow]
    with backend(gpu, deterministic=True):
        found, expected = attention(*narrow, window=window, documents=masks), reference_attention(*wide, visible)
        slope = torch.randn(expected.shape, generator=random).to(gpu)
        ours = (found, *torch.autograd.grad(found, narrow, slope.to(dtype)))
    theirs = (expected, *torch.autograd.grad(expected, wide, slope.double()))
    assert [relative(mine, reference) < tolerance for mine, reference in zip(ours, theirs, strict=True)] == [True] * 4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_the_chunked_loss_equals_full_logits(gpu, dtype, tolerance):
    """16,384 tokens and 50,304 rows: several chunks and groups."""
    random = torch.Generator(gpu).manual_seed(0)
    hidden = torch.randn(16384, 256, generator=random, device=gpu).requires_grad_()
    weight = (0.05 * torch.randn(50304, 256, generator=random, device=gpu)).requires_grad_()
    targets = torch.randint(50257, (16384,), generator=random, device=gpu)
    targets[5:500] = -100
    autocast = torch.autocast("cuda", dtype, enabled=dtype != torch.float32)
    with backend(gpu, deterministic=True):
        with autocast:
            found = head_loss(hidden, weight, targets, vocab_size=50257)
        ours = (found, *torch.autograd.grad(found, (hidden, weight)))
        expected = full_logits_loss(hidden, weight, targets, vocab_size=50257, dtype=torch.float32).sum()
        theirs = (expected, *torch.autograd.grad(expected, (hidden, weight)))
    assert [round(relative(mine, other), 6) for mine, other in zip(ours, theirs, strict=True)] == pytest.approx(
        [0] * 3, abs=tolerance
    )
    assert not ours[2][50257:].any()


@pytest.mark.parametrize("shape", [(64, 128, 256), (50, 128, 256), (1024, 768, 3072)], ids=str)
def test_float8_products_equal_their_emulation(gpu, shape):
    """The hardware's products are those of the same float8 numbers in float32; the emulation has tests of its own."""
    rows, inputs, outputs = shape
    if torch.cuda.get_device_capability(gpu) < (8, 9):
        pytest.skip("needs float8 products")
    random, results = torch.Generator().manual_seed(0), []
    x, w, slope = (torch.randn(*size, generator=random) for size in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    for device in (gpu, torch.device("cpu")):
        a, b = (part.detach().to(device).requires_grad_() for part in (x, w))
        with torch.autocast(device.type, torch.bfloat16):
            y = linear(a, b, fp8=True)
        results.append((y.detach(), *torch.autograd.grad(y, (a, b), slope.to(device, y.dtype))))
    assert [relative(one, other) < 1e-2 for one, other in zip(*results, strict=True)] == [True] * 3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_updates_equal_the_cpus(gpu, name):
    """Five steps of two batches in float32; the optimizer's kernels are others there."""
    weights = {}
    for device in (torch.device("cpu"), gpu):
        context = dataclasses.replace(SINGLE, device=device)
        precision = Precision("float32", "", device.type)
        with backend(device, deterministic=True):
            optim = OptimConfig(name=name, muon_precision="float32") if name == "muon" else OptimConfig(name=name)
            assembly = build(MODELS["llama"], optim, Execution(precision), context)
            assembly.state.model.train()
            for number in range(5):
                given = [batch(device, seed=2 * number), batch(device, seed=2 * number + 1)]
                settings = StepSettings(NextToken(), precision, context)
                train_step(assembly.state, given, settings, forward=assembly.forward, lr=1e-3, limits=Limits())
        weights[device.type] = {key: value.cpu() for key, value in assembly.state.model.state_dict().items()}
    worst = max(relative(weights["cuda"][key], value) for key, value in weights["cpu"].items())
    assert worst < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "optim",
    [OptimConfig(), OptimConfig(name="muon"), OptimConfig(name="muon", cautious_decay=True)],
    ids=["adamw", "muon", "cautious"],
)
def test_a_step_makes_the_host_wait_for_nothing(gpu, optim, dtype):
    precision, context = Precision(dtype, "", "cuda"), dataclasses.replace(SINGLE, device=gpu)
    assembly = build(MODELS["window"], optim, Execution(precision), context)
    assembly.state.model.train()
    settings = StepSettings(NextToken(), precision, context)
    given = [batch(gpu, documents=True), batch(gpu, documents=True, seed=1)]
    for number in range(3):
        if number == 1:
            torch.cuda.set_sync_debug_mode("error")
        try:
            result = train_step(assembly.state, given, settings, forward=assembly.forward, lr=1e-3, limits=Limits())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not result.bad.item()
    assert result.loss.isfinite()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_the_cpus_and_the_cache_equals_full_passes(gpu, name):
    config = dataclasses.replace(MODELS[name], block_size=96)
    reference, model = models(config, gpu)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 17, 40)]
    with backend(gpu, deterministic=True):
        found = list(generate(model.eval(), prompts, max_new_tokens=30, temperature=0, vocab_size=500))
    expected = list(generate(reference.eval(), prompts, max_new_tokens=30, temperature=0, vocab_size=500))
    assert found == expected
    row = prompts[0] + [step[0] for step in found]
    with torch.no_grad(), backend(gpu, deterministic=True):
        full = model(torch.tensor([row[:-1]], device=gpu))[0, len(prompts[0]) - 1 :, :500]
    assert full.argmax(-1).tolist() == row[len(prompts[0]) :]
