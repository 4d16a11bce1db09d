"""The program of one process: tensor or context parallelism beside one process, with the largest differences as JSON.

torchrun --nproc-per-node 2 tensor_program.py RESULTS.json [tensor|context]
"""

import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from layout_program import whole
from torch import Tensor

from bardling.config import ModelConfig, OptimConfig
from bardling.distributed.context import SINGLE, Context, distributed
from bardling.distributed.device import Precision
from bardling.distributed.tensor import vocabulary_shard
from bardling.model.cache import KVCache
from bardling.model.kernels import head_loss as kernel
from bardling.planning.layout import Layout
from bardling.training.build import Execution, build

MODELS = {
    "gpt2": {"family": "gpt2", "bias": True},
    "llama": {"family": "llama", "n_kv_head": 2, "sliding_window": 6, "value_embeddings": 1, "logit_softcap": 5.0},
    "qwen3": {"family": "qwen3"},
}


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest value."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).detach().abs().max() / expected.detach().abs().max().clamp_min(1e-30))


def random_head(size: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [3, 40, 16], a head [rows, 16] and targets, some of them without loss. Logits are exact, so that there are
    equal ones, of which the first is the likeliest."""
    generator = torch.Generator().manual_seed(size)
    hidden = torch.randint(-4, 5, (3, 40, 16), generator=generator).double() / 8
    weight = torch.randint(-2, 3, (rows, 16), generator=generator).double()
    weight[size:] = 0
    weight[size - 1] = weight[0]
    targets = torch.randint(size, (3, 40), generator=generator)
    targets[:, ::7] = -100
    return hidden, weight, targets


def evaluate(hidden: Tensor, weight: Tensor, targets: Tensor, size: int, **options: object) -> dict[str, Tensor]:
    """All that the head computes, and gradients."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        found["each"] = kernel.head_loss(hidden, weight, targets, vocab_size=size, reduction="none", **options)
        found["scores"] = kernel.head_loss(hidden, weight, targets, vocab_size=size, reduction="none", greedy=True, **options)
        found["logits"] = kernel.head_logits(hidden, weight, vocab_size=size, **options)
    tally = torch.arange(size) % 2 == 0
    for kind, settings in {"sum": {"tally": tally}, "none": {"reduction": "none"}}.items():
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        loss = kernel.head_loss(*inputs, targets, vocab_size=size, **settings, **options)
        scale = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        (loss[0] * 3 if kind == "sum" else (loss * scale).sum()).backward()
        found |= {kind: loss, f"hidden gradient, {kind}": inputs[0].grad, f"weight gradient, {kind}": inputs[1].grad}
    return found


def losses(context: Context) -> dict[str, float]:
    """The vocabulary-parallel loss, in float64 and several chunks, beside that of the whole head."""
    kernel.CHUNK_BYTES, kernel.SLOPE_BYTES = {"cpu": 16 * 52 * 8}, {"cpu": 48 * 52 * 8}
    group = dist.group.WORLD
    results = {}
    for (size, rows), softcap in itertools.product(((101, 104), (5, 8), (4, 8)), (0.0, 2.0)):  # with 4 of 8, one has none
        hidden, weight, targets = random_head(size, rows)
        expected = evaluate(hidden, weight, targets, size, softcap=softcap)
        shard = vocabulary_shard(group, rows // context.world_size)
        found = evaluate(hidden, weight.chunk(context.world_size)[context.rank], targets, size, softcap=softcap, shard=shard)
        for name, value in found.items():
            other = expected[name].chunk(context.world_size)[context.rank] if name.startswith("weight") else expected[name]
            if name.startswith("weight") and not other.any():
                assert not value.any()
                continue
            results[f"{name}, {size} of {rows}, cap {softcap}"] = difference(value, other)
    return results


def generate(model: torch.nn.Module, config: ModelConfig, tokens: Tensor) -> Tensor:
    """Logits of tokens computed one after the other with a cache, after a prompt."""
    cache = KVCache(config, len(tokens))
    parts = [model(tokens[:, :7], cache=cache)]
    parts += [model(tokens[:, place : place + 1], cache=cache) for place in range(7, 12)]
    return torch.cat(parts, 1)


def passes(context: Context, options: dict) -> dict[str, float]:
    """Passes of a model of several lengths, also such that do not divide evenly, beside those of one process."""
    config = ModelConfig(n_layer=2, n_head=4, n_embd=48, block_size=24, vocab_size=101, vocab_multiple=8, **options)
    execution = Execution(Precision("float32", "", "cpu"))
    divided, alone = (build(config, OptimConfig(), execution, each, seed=1) for each in (context, SINGLE))
    tokens = torch.randint(101, (3, 25), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[:, ::5] = -100
    bounds = torch.tensor([0, 10, 24, 48, 61, 72, 72], dtype=torch.int32)
    results = {}
    calls = {
        "24 tokens": lambda model: model(tokens[:, :24], targets, reduction="none"),
        "23 tokens": lambda model: model(tokens[:, :23], targets[:, :23].contiguous(), output="scores"),
        "1 token": lambda model: model(tokens[:, :1]),
        "documents": lambda model: model(tokens[:, :24], targets, reduction="none", documents=bounds),
        "hidden states": lambda model: model(tokens[:, :9], output="hidden"),
        "with a cache": lambda model: generate(model, config, tokens),
    }
    with torch.no_grad():
        for name, call in calls.items():
            results[name] = difference(call(divided.state.model), call(alone.state.model))
    for each in (divided, alone):  # with gradients
        each.forward(tokens[:, :23], targets[:, :23].contiguous()).backward()
    assert divided.state.shards is not None
    divided.state.shards.collect_gradients()
    gradients = whole(divided, {name: p.grad for name, p in divided.state.parameters.items()})
    for name, parameter in alone.state.parameters.items():
        if not name.endswith("c_attn.bias"):  # that of the keys is zero but for rounding
            results[f"gradient of {name}"] = difference(gradients[name], parameter.grad)
    return results


def main(results: Path, axis: str = "tensor") -> None:
    torch.set_num_threads(1)
    if axis == "context":
        del MODELS["llama"]["value_embeddings"]
    with distributed("cpu") as context:
        context = context.arranged(Layout(**{axis: context.world_size}))
        found = {"passes": {name: passes(context, options) for name, options in MODELS.items()}}
        found["losses"] = losses(context) if axis == "tensor" else {}
        found["dropout_rank"] = context.dropout_rank
        ranks: list[dict | None] = [None] * context.world_size
        dist.all_gather_object(ranks, found)
        if context.is_primary:
            results.write_text(json.dumps(ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
