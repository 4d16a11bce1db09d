"""Muon against the same rule written out in float64 with a singular value decomposition, alone and in two processes."""

import copy
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from bardling.config import ModelConfig, OptimConfig
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.optim.build import build_optimizer, resolve_muon_precision, row_splits, set_learning_rate
from bardling.optim.muon import Muon
from bardling.optim.polar import SAFETY, coefficients, newton_schulz, quintic
from bardling.optim.serialization import load_optimizer_tensors, optimizer_tensors

CPU = torch.device("cpu")
MODEL = ModelConfig(n_layer=2, n_head=4, n_embd=16, block_size=8, vocab_size=20, vocab_multiple=4)
CONFIG = OptimConfig(name="muon", lr=1e-3, muon_lr=0.02, embed_lr=4e-3, weight_decay=0.1, muon_precision="float32")
SPLITS = row_splits(MODEL)


def orthogonalize(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    return newton_schulz(x, coefficients(steps))


def polar_factor(matrix: torch.Tensor) -> torch.Tensor:
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vt


def graded(k: int, m: int, n: int, low: float, seed: int = 0) -> torch.Tensor:
    """[k, m, n] matrices with singular values from `low` to 1, times 7."""
    torch.manual_seed(seed)
    r = min(m, n)
    u, v = torch.linalg.qr(torch.randn(k, m, r).double()).Q, torch.linalg.qr(torch.randn(k, n, r).double()).Q
    return 7 * (u * torch.logspace(torch.tensor(low).log10().item(), 0, r).double()) @ v.mT


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, lr: float = 1e-3) -> None:
    set_gradients(model, step)
    set_learning_rate(optimizer, lr)
    optimizer.step()


def build(model: nn.Module | dict[str, nn.Parameter], config: OptimConfig = CONFIG, **options) -> Muon:
    parameters = model if isinstance(model, dict) else named(model)
    optimizer = build_optimizer(parameters.items(), config, CPU, splits=SPLITS, **options)
    assert isinstance(optimizer, Muon)
    return optimizer


@pytest.mark.parametrize("shape", [(3, 12, 12), (2, 8, 40), (2, 40, 8)])
def test_more_steps_reach_the_polar_factor_of_the_decomposition(shape):
    x = graded(*shape, low=0.02)
    torch.testing.assert_close(orthogonalize(x, 10), polar_factor(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(orthogonalize(x.float(), 10).double(), polar_factor(x), rtol=0, atol=2e-4)


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 0.001), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 64), (2, 64, 16)])
def test_five_steps_bring_singular_values_near_one(dtype, slack, shape):
    values = torch.linalg.svdvals(orthogonalize(graded(*shape, low=0.01).to(dtype), 5).double())
    assert (values - 1).abs().max() < 0.14 + slack


def test_each_matrix_of_a_stack_is_its_own_affair_and_zero_stays_zero():
    x = torch.stack([torch.zeros(6, 9), *graded(2, 6, 9, low=0.1).float()])
    before = x.clone()
    together = orthogonalize(x, 5)
    assert torch.equal(x, before)
    assert not together[0].any()
    for row in (1, 2):
        torch.testing.assert_close(together[row], orthogonalize(x[row : row + 1], 5)[0])


def test_quintic_is_the_minimax_polynomial():
    # The first of the Polar Express for [0.001, 1], arXiv:2505.16932.
    assert quintic(1e-3, 1.0) == pytest.approx((8.4703, -25.1081, 18.6293), abs=1e-4)
    low, high = 0.05, 1.9
    a, b, c = quintic(low, high)
    x = torch.linspace(low, high, 20001).double()
    error = 1 - (a * x + b * x**3 + c * x**5)
    # It touches both bounds of its error in turn, four times: no other polynomial of the form has a smaller largest error.
    largest = error.abs().max()
    touched = error[(error.abs() > largest * (1 - 1e-6))].sign()
    turns = [touched[0], *(b for a, b in itertools.pairwise(touched) if a != b)]
    assert len(turns) == 4


def test_coefficients_converge_to_those_of_the_classical_iteration():
    # (15 x - 10 x^3 + 3 x^5) / 8, about the middle of the last interval, which the safety factor keeps open.
    middle = (1 + SAFETY) / 2
    assert coefficients(12)[-1] == pytest.approx((15 / 8 / middle, -10 / 8 / middle**3, 3 / 8 / middle**5), abs=1e-3)


@pytest.mark.parametrize("cautious", [False, True])
def test_equals_the_rule_written_out(cautious):
    model = GPT(MODEL, seed=1)
    config = OptimConfig(
        name="muon", lr=1e-3, muon_lr=0.02, weight_decay=0.1, momentum=0.9, muon_steps=12, cautious_decay=cautious
    )
    optimizer = build(model, config)
    matrices = [name for name, p in named(model).items() if ".h." in name and p.dim() == 2]
    assert len(matrices) == 8
    weights = {name: named(model)[name].detach().double().clone() for name in matrices}
    means = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(4):
        lr = 1e-3 * (step + 1) / 4
        update(model, optimizer, step, lr)
        set_gradients(model, step)
        for name in matrices:
            gradient = named(model)[name].grad.double()
            means[name] = 0.9 * means[name] + 0.1 * gradient
            ahead = 0.9 * means[name] + 0.1 * gradient
            pieces = ahead.chunk(3) if name.endswith("c_attn.weight") else [ahead]
            move = torch.cat([polar_factor(p) * max(1.0, p.size(0) / p.size(1)) ** 0.5 for p in pieces])
            w = weights[name]
            kept = (w * move >= 0).double() if cautious else torch.ones_like(w)
            weights[name] = w - 20 * lr * 0.1 * kept * w - 20 * lr * move
    for name in matrices:
        torch.testing.assert_close(named(model)[name].double(), weights[name], rtol=1e-4, atol=1e-5)


def test_the_rest_is_what_torch_adamw_makes_of_it():
    model, reference = GPT(MODEL, seed=1), GPT(MODEL, seed=1)
    optimizer = build(model)
    rest = {name: p for name, p in named(reference).items() if not (".h." in name and p.dim() == 2)}
    adamw = torch.optim.AdamW(
        [
            {"params": [p for n, p in rest.items() if p.dim() >= 2], "weight_decay": 0.1, "lr_scale": 4.0},
            {"params": [p for p in rest.values() if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=CONFIG.betas,
        eps=CONFIG.eps,
        fused=True,
    )
    for step in range(5):
        update(model, optimizer, step)
        update(reference, adamw, step)
    for name, parameter in rest.items():
        assert torch.equal(named(model)[name], parameter), name


def test_each_kind_of_parameter_has_its_group():
    parts = dataclasses.replace(MODEL, family="custom", qk_norm="weight", tied=False, value_embeddings=1)
    model = GPT(parts, seed=1)
    assert {"lm_head.weight", "transformer.wve.0.weight"} < named(model).keys()
    optimizer = build(model, OptimConfig(name="muon", lr=1e-3, muon_lr=0.02, embed_lr=3e-3, head_lr=2e-3))
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(of) == len(named(model))
    set_learning_rate(optimizer, 5e-4)
    for name, parameter in named(model).items():
        group = of[id(parameter)]
        assert group["muon"] == (".h." in name and parameter.dim() == 2), name
        expected = 0.01 if group["muon"] else 1.5e-3 if name.startswith("transformer.w") else 5e-4
        assert group["lr"] == pytest.approx(1e-3 if "lm_head" in name else expected), name
        assert group["weight_decay"] == (0.1 if parameter.dim() >= 2 else 0.0), name


def test_a_model_without_blocks_is_left_to_adamw():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = build(net)
    update(net, optimizer, 0)
    assert not any(group["muon"] for group in optimizer.param_groups)
    assert all(set(entries) == {"step", "exp_avg", "exp_avg_sq"} for entries in optimizer.state.values())


def test_parts_must_fill_the_matrix():
    with pytest.raises(ValueError, match=r"\[6, 4\], parts \(4, 4\)"):
        Muon([{"params": [p := nn.Parameter(torch.zeros(6, 4))], "muon": True}], splits={p: (4, 4)})


def test_grouped_queries_have_parts_of_their_own_size():
    assert SPLITS == {"attn.c_attn.weight": (16, 16, 16)}
    assert row_splits(dataclasses.replace(MODEL, n_kv_head=2)) == {"attn.c_attn.weight": (16, 8, 8)}
    llama = dataclasses.replace(MODEL, family="llama", n_kv_head=1, mlp_hidden=24)
    assert row_splits(llama) == {"attn.c_attn.weight": (16, 4, 4), "mlp.c_fc.weight": (24, 24)}
    model = GPT(llama, seed=1)
    optimizer = build_optimizer(model.named_parameters(), CONFIG, CPU, splits=row_splits(llama))
    before = {name: p.detach().clone() for name, p in named(model).items()}
    update(model, optimizer, 0)
    name = "transformer.h.1.mlp.c_fc.weight"
    for old, new, gradient in zip(
        before[name].chunk(2), named(model)[name].chunk(2), named(model)[name].grad.chunk(2), strict=True
    ):
        move = (old * (1 - 0.02 * 0.1) - new).double() / 0.02 / 1.5**0.5
        torch.testing.assert_close(move, orthogonalize(gradient[None].double())[0], rtol=0, atol=1e-4)


def test_parameters_without_a_gradient_stay():
    model = GPT(MODEL, seed=1)
    optimizer = build(model)
    set_gradients(model, 0)
    left = named(model)["transformer.h.0.mlp.c_fc.weight"]
    left.grad, before = None, left.detach().clone()
    set_learning_rate(optimizer, 1e-3)
    optimizer.step()
    assert torch.equal(left, before)
    assert left not in optimizer.state


def through_files(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    tensors, meta = optimizer_tensors(optimizer, named(model))
    return load(save(tensors)), json.loads(json.dumps(meta))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumes_to_the_bit(precision):
    config = OptimConfig(name="muon", lr=1e-3, muon_precision=precision)
    straight = GPT(MODEL, seed=1)
    optimizer = build(straight, config)
    for step in range(3):
        update(straight, optimizer, step)
    resumed = GPT(MODEL, seed=2)
    resumed.load_state_dict(straight.state_dict())
    again = build(resumed, config)
    tensors, meta = through_files(optimizer, straight)
    assert "transformer.h.0.attn.c_attn.weight.momentum" in tensors
    load_optimizer_tensors(again, named(resumed), tensors, meta)
    for step in range(3, 6):
        update(straight, optimizer, step)
        update(resumed, again, step)
    for name, parameter in named(straight).items():
        assert torch.equal(parameter, named(resumed)[name]), name


def test_torchs_own_state_dict_goes_on_to_the_bit():
    straight, resumed = GPT(MODEL, seed=1), GPT(MODEL, seed=1)
    optimizer, again = build(straight), build(resumed)
    update(straight, optimizer, 0)
    resumed.load_state_dict(straight.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    update(straight, optimizer, 1)
    update(resumed, again, 1)
    assert all(torch.equal(p, named(resumed)[name]) for name, p in named(straight).items())


def test_state_of_another_optimizer_or_incomplete_is_refused():
    model = GPT(MODEL, seed=1)
    optimizer = build(model)
    update(model, optimizer, 0)
    tensors, meta = through_files(optimizer, model)
    adamw = build_optimizer(model.named_parameters(), OptimConfig(), CPU)
    with pytest.raises(UserError, match="holds the state of Muon, but this run uses AdamW"):
        load_optimizer_tensors(adamw, named(model), tensors, meta)
    name = "transformer.h.0.attn.c_proj.weight"
    tensors[f"{name}.exp_avg"] = tensors.pop(f"{name}.momentum")
    with pytest.raises(UserError, match=r"incomplete.*momentum"):
        load_optimizer_tensors(optimizer, named(model), tensors, meta)


def test_precision_follows_the_run():
    auto = OptimConfig(name="muon")
    assert [resolve_muon_precision(auto, name).muon_precision for name in ("float32", "bfloat16", "float16")] == [
        "float32",
        "bfloat16",
        "float32",
    ]
    assert resolve_muon_precision(CONFIG, "bfloat16") is CONFIG


@pytest.mark.slow
def test_compiled_agrees():
    plain, compiled = GPT(MODEL, seed=1), GPT(MODEL, seed=1)
    optimizers = build(plain), build(compiled, compiled=True)
    for step in range(2):
        update(plain, optimizers[0], step)
        update(compiled, optimizers[1], step)
    for name, parameter in named(plain).items():
        torch.testing.assert_close(named(compiled)[name], parameter, rtol=1e-5, atol=1e-6)


def shape(kind):
    """The model of `kind`; of a single layer's stacks the second process has no share."""
    return dataclasses.replace(MODEL, n_layer=1) if kind == "one layer" else MODEL


PROCESSES = """
import sys
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_muon import OptimConfig, build, named, set_gradients, set_learning_rate, shape
from bardling.model.gpt import GPT

folder, rank, kind, precision = sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]
MODEL = shape(kind)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
model, shards, options = GPT(MODEL, seed=1), None, {"rank": rank, "world_size": 2}
if kind == "fsdp":
    from bardling.distributed.context import Context
    from bardling.distributed.matrices import ShardedMatrices
    from bardling.distributed.sharding import initialize, shard
    from bardling.planning.layout import Layout
    context = Context(rank, 2, torch.device("cpu")).arranged(Layout(shard=2))
    settings = {"precision": "float32", "compiled": False, "reshard": True, "offload": False}
    model, shards = shard(lambda: GPT(MODEL, seed=None), context, **settings)
    initialize(shards, MODEL, 1)
    options = {"exchange": ShardedMatrices(shards)}
config = OptimConfig(name="muon", lr=1e-3, weight_decay=0.1, muon_precision=precision)
parameters = named(model) if shards is None else shards.parameters
optimizer = build(parameters, config, **options)
for step in (0, 1, None, 2):
    bad = step is None  # left out by the flag, in all processes
    set_gradients(plain := GPT(MODEL, seed=1), step or 0)
    for name, parameter in parameters.items():
        gradient = named(plain)[name].grad * (float("nan") if bad else 1.0)
        parameter.grad = gradient if shards is None else shards.take(name, gradient)
    set_learning_rate(optimizer, 1e-3)
    optimizer.found_inf = torch.tensor(float(bad))
    optimizer.step()
whole = {n: (p if shards is None else shards.gather(n, p)).detach().clone() for n, p in parameters.items()}
torch.save(whole, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("kind", "precision"), [("ddp", "float32"), ("ddp", "bfloat16"), ("fsdp", "float32"), ("one layer", "float32")]
)
def test_two_processes_share_the_work_and_agree_with_one(tmp_path, kind, precision):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESSES, str(Path(__file__).parent), str(tmp_path), str(rank), kind, precision],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [process.communicate(timeout=600)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], ends
    alone = GPT(shape(kind), seed=1)
    optimizer = build(alone, OptimConfig(name="muon", lr=1e-3, weight_decay=0.1, muon_precision=precision))
    for step in range(3):
        update(alone, optimizer, step)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, parameter in named(alone).items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], parameter.detach(), rtol=1e-6, atol=1e-7 if precision == "float32" else 1e-4)
