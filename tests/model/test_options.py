"""The model's options: each against a plain computation, and caches against full passes for every one of them."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bardling.config import ModelConfig
from bardling.errors import UserError
from bardling.generation.generate import generate
from bardling.model.cache import KVCache
from bardling.model.gpt import GPT
from bardling.model.init import init_weights
from bardling.model.kernels import head_loss as loss_module
from bardling.model.kernels.attention import attention
from bardling.model.kernels.elementwise import rms_norm, swiglu
from bardling.model.kernels.head_loss import head_loss, soft_cap
from bardling.model.kernels.linear import tied_views
from bardling.model.layers import Linear
from bardling.model.rotary import rotate, rotation

TINY = ModelConfig(n_layer=3, n_head=4, n_embd=32, block_size=24, vocab_size=75, vocab_multiple=50)

OPTIONS: dict[str, dict[str, Any]] = {
    "rmsnorm": {"norm": "rmsnorm"},
    "rotary": {"positions": "rotary"},
    "qk_norm": {"qk_norm": "plain"},
    "qk_norm_weight": {"qk_norm": "weight", "positions": "rotary"},
    "gqa": {"n_kv_head": 2},
    "mqa": {"n_kv_head": 1, "positions": "rotary"},
    "head_dim": {"head_dim": 6},
    "swiglu": {"mlp": "swiglu"},
    "relu2": {"mlp": "relu2", "mlp_hidden": 40},
    "untied": {"tied": False},
    "softcap": {"logit_softcap": 0.5},
    "window": {"sliding_window": 5, "global_every": 2},
    "window_blocks": {"sliding_window": 4, "global_every": 0, "positions": "rotary"},
    "values": {"value_embeddings": 2, "n_kv_head": 2},
    "llama": {"family": "llama", "n_kv_head": 2},
    "qwen3": {"family": "qwen3", "n_kv_head": 2, "head_dim": 12},
    "qwen3_window": {"family": "qwen3", "sliding_window": 7, "global_every": 3},
    "all": {
        "family": "qwen3",
        "mlp": "relu2",
        "n_kv_head": 1,
        "qk_norm": "plain",
        "tied": False,
        "logit_softcap": 3.0,
        "sliding_window": 6,
        "global_every": 3,
        "value_embeddings": 1,
    },
}


def option(name: str) -> ModelConfig:
    return dataclasses.replace(TINY, **OPTIONS[name])


def perturbed(config: ModelConfig, seed: int = 3) -> GPT:
    """A model in which every parameter differs from its initial value, but for the padding."""
    model = GPT(config, seed=seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            rows = config.vocab_size if parameter.size(0) == config.padded_vocab_size else parameter.size(0)
            parameter[:rows] += 0.1 * torch.randn((rows, *parameter.shape[1:]), generator=generator)
    return model


def tokens(batch: int = 3, time: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, TINY.vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize("name", OPTIONS)
def test_every_parameter_gets_a_gradient_and_padding_stays_zero(name: str) -> None:
    config = option(name)
    model = perturbed(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(tokens(), tokens(seed=step + 1)).backward()
        for place, parameter in model.named_parameters():
            assert parameter.grad is not None, place
            assert bool(torch.isfinite(parameter.grad).all()), place
            assert bool(parameter.grad.any()), place
        optimizer.step()
    padded = [parameter for parameter in model.parameters() if parameter.size(0) == 100]
    assert len(padded) == 1 + (not config.architecture.tied) + config.value_embeddings
    for parameter in padded:
        assert not bool(parameter[75:].any())
    assert model(tokens()).shape[-1] == 75


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_changes_the_logits_and_only_the_future_is_hidden(name: str) -> None:
    model = perturbed(option(name)).eval()
    inputs = tokens()
    logits = model(inputs)
    other = inputs.clone()
    other[:, 12:] = (other[:, 12:] + 1) % 75
    assert relative(model(other)[:, :12], logits[:, :12]) < 1e-6
    assert relative(model(other)[:, 12:], logits[:, 12:]) > 1e-3
    plain = {
        **dict.fromkeys(OPTIONS[name]),
        "family": "gpt2",
        "logit_softcap": 0.0,
        "global_every": 4,
        "value_embeddings": 0,
    }
    without = perturbed(dataclasses.replace(option(name), **plain)).eval()
    assert without.state_dict().keys() != model.state_dict().keys() or relative(without(inputs), logits) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("portions", [[24], [1] * 24, [7, 1, 1, 15], [1, 2, 21], [2, 22]])
def test_cached_equals_full(name: str, portions: list[int]) -> None:
    config = option(name)
    model = perturbed(config)
    inputs = tokens()
    cache = KVCache(config, 3)
    parts = [model(part, cache=cache) for part in inputs.split(portions, dim=1)]
    assert relative(torch.cat(parts, dim=1), model(inputs)) < 1e-5
    assert cache.keys is not None
    assert cache.keys.shape == (3, 3, config.architecture.n_kv_head, 24, config.architecture.head_dim)


@torch.no_grad()
@pytest.mark.parametrize("name", OPTIONS)
def test_cached_rows_of_different_lengths_equal_full(name: str) -> None:
    config = option(name)
    model = perturbed(config)
    inputs, lengths = tokens(), [9, 2, 13]
    cache = KVCache(config, 3)
    model(inputs[:, :13], cache=cache)
    cache.lengths = list(lengths)
    for step in range(8):
        new = torch.stack([inputs[row, lengths[row] + step] for row in range(3)])[:, None]
        logits = model(new, cache=cache)[:, 0]
        for row in range(3):
            assert relative(logits[row], model(inputs[row : row + 1, : lengths[row] + step + 1])[0, -1]) < 1e-5


def filled(model: GPT, inputs: Tensor, lengths: list[int]) -> KVCache:
    """A cache with the first `lengths[row]` tokens of each row of `inputs`, and stale values in the slots after them."""
    cache = KVCache(model.config, len(lengths))
    model(inputs[:, : max(lengths)], cache=cache)
    cache.lengths = list(lengths)
    return cache


def assert_continues(model: GPT, cache: KVCache, texts: list[Tensor], time: int) -> None:
    """The last `time` tokens of each text, fed to a cache that holds the others, get the logits of a full forward pass."""
    assert cache.lengths == [len(text) - time for text in texts]
    logits = model(torch.stack([text[-time:] for text in texts]), cache=cache)
    assert cache.lengths == [len(text) for text in texts]
    for row, text in zip(logits, texts, strict=True):
        assert relative(row, model(text[None])[0, -time:]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", OPTIONS)
def test_cached_rows_of_different_lengths_take_several_tokens_at_once(name: str) -> None:
    model, inputs, lengths = perturbed(option(name)), tokens(), [9, 2, 13]
    cache = filled(model, inputs, lengths)
    for time in (4, 1, 6):
        lengths = [length + time for length in lengths]
        assert_continues(model, cache, [inputs[row, :length] for row, length in enumerate(lengths)], time)


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("name", ["gqa", "mqa", "all"])
def test_rows_dropped_from_a_cache_leave_the_others_intact(name: str, first: int) -> None:
    model, inputs, lengths = perturbed(option(name)), tokens(), [9, 2, 13]
    cache, rows = filled(model, inputs, lengths), [0, 1, 2]
    for place in (first, 0, 0):
        cache.drop(place)
        rows[place] = rows[-1]
        rows.pop()
        lengths = [length + 1 for length in lengths]
        if rows:
            assert_continues(model, cache, [inputs[row, : lengths[row]] for row in rows], 1)
    assert cache.lengths == []
    assert cache.length == 0


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("name", ["gqa", "mqa", "all"])
def test_one_row_of_a_cache_can_be_refilled(name: str, place: int) -> None:
    model, inputs, lengths = perturbed(option(name)), tokens(), [9, 2, 13]
    cache = filled(model, inputs, lengths)
    texts = [inputs[row, : length + 1] for row, length in enumerate(lengths)]
    texts[place] = tokens(seed=1)[0, :6]
    view = cache.row(place)
    assert view.lengths == [lengths[place]]
    view.lengths = [0]
    model(texts[place][None, :5], cache=view)
    assert view.length == 5
    assert cache.lengths == lengths  # the view has lengths of its own
    cache.lengths[place] = 5
    assert_continues(model, cache, texts, 1)


@torch.no_grad()
def test_one_row_of_an_unused_cache_is_an_empty_cache() -> None:
    model, inputs = perturbed(TINY), tokens(batch=1)[0]
    assert_continues(model, KVCache(TINY, 3).row(1), [inputs], 24)


@torch.no_grad()
def test_a_cache_has_room_for_its_capacity_but_never_for_more_than_the_context() -> None:
    model, inputs = perturbed(TINY), tokens()
    for asked, room in ((8, 8), (24, 24), (25, 24), (1000, 24), (None, 24)):
        cache = KVCache(TINY, 3, capacity=asked)
        logits = torch.cat([model(part, cache=cache) for part in inputs[:, :room].split([5, room - 5], dim=1)], dim=1)
        assert relative(logits, model(inputs[:, :room])) < 1e-5
        assert cache.keys is not None
        assert cache.keys.size(3) == room  # memory for what fits, no more
        with pytest.raises(ValueError, match=f"capacity of {room}"):
            model(inputs[:, :1], cache=cache)
    with pytest.raises(ValueError, match="2 rows of tokens for a cache of 3 rows"):
        model(inputs[:2, :1], cache=KVCache(TINY, 3))


@torch.no_grad()
@pytest.mark.parametrize(
    ("window", "portions", "masked"),
    [
        (None, [6, 1, 1, 2, 1], [False, False, False, True, False]),
        (5, [4, 1, 1, 2], [False, False, True, True]),
        (5, [5, 1], [False, True]),
        (5, [6], [True]),
    ],
)
def test_caches_mask_only_where_a_query_may_not_see_every_key(
    window: int | None, portions: list[int], masked: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of equal length usually need no mask, and fused attention kernels are available only without one."""
    config = dataclasses.replace(TINY, n_layer=1, sliding_window=window, global_every=0)
    model, cache, attention, found = GPT(config), KVCache(config, 3), F.scaled_dot_product_attention, []

    def record(*inputs: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
        found.append(attn_mask is not None)
        return attention(*inputs, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    for part in tokens()[:, : sum(portions)].split(portions, dim=1):
        model(part, cache=cache)
    assert found == masked


@torch.no_grad()
@pytest.mark.parametrize("name", ["rotary", "window", "llama", "qwen3", "all"])
def test_generation_slides_as_a_fresh_context_would(name: str) -> None:
    """Greedy text beyond block_size equals that of full passes over what is remembered."""
    config = option(name)
    model = perturbed(config)
    prompt = tokens(batch=1, time=10)[0].tolist()
    made = [step[0] for step in generate(model, [prompt], max_new_tokens=40, temperature=0)]
    seen, expected = list(prompt), []
    for _ in range(40):
        expected.append(int(model(torch.tensor([seen]))[0, -1].argmax()))
        if len(seen) == config.block_size:
            seen = seen[-(config.block_size // 2) :]
        seen.append(expected[-1])
    assert made == expected


@pytest.mark.parametrize("name", OPTIONS)
def test_meta_first_gives_the_same_model(name: str) -> None:
    config = option(name)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    init_weights(model, 7)
    direct = GPT(config, seed=7)
    assert torch.equal(model(tokens()), direct(tokens()))
    assert not list(model.buffers())


def test_families_fill_what_is_unset_and_explicit_options_win() -> None:
    made = ModelConfig(family="qwen3", mlp="relu2", tied=False).architecture
    assert (made.norm, made.positions, made.qk_norm, made.mlp, made.tied) == ("rmsnorm", "rotary", "weight", "relu2", False)
    assert made.bias is False
    assert made.rope_theta == 1e6
    assert ModelConfig(family="llama").architecture.norm_eps == 1e-5
    resolved = ModelConfig(family="qwen3", n_embd=64, n_head=4).resolved()
    assert resolved.norm == "rmsnorm"
    assert resolved.bias is False
    assert resolved.architecture == ModelConfig(family="qwen3", n_embd=64, n_head=4).architecture
    assert dataclasses.replace(resolved, family="custom").architecture == resolved.architecture
    assert ModelConfig(family="llama", n_embd=384).architecture.mlp_hidden == 1024


@pytest.mark.parametrize(
    ("options", "opens"),
    [
        ({}, "gpt2"),
        ({"bias": False, "gelu": "erf", "zero_init": True}, "gpt2"),
        ({"family": "custom"}, "gpt2"),
        ({"family": "llama"}, "llama"),
        ({"family": "llama", "qk_norm": "weight", "tied": True}, "qwen3"),
        ({"family": "qwen3", "sliding_window": 8}, "qwen3"),
        ({"family": "llama", "sliding_window": 8}, None),
        ({"family": "qwen3", "mlp": "relu2"}, None),
        ({"family": "qwen3", "qk_norm": "plain"}, None),
        ({"tied": False}, "gpt2"),
        ({"logit_softcap": 15.0}, None),
        ({"family": "llama", "value_embeddings": 1}, None),
        ({"family": "llama", "head_dim": 32}, "llama"),
        ({"family": "llama", "head_dim": 32, "n_head": 5}, None),
    ],
)
def test_what_transformers_opens_is_read_off_the_architecture(options: dict[str, Any], opens: str | None) -> None:
    made = ModelConfig(**options).architecture
    assert made.transformers_family == opens
    assert bool(made.transformers_mismatch) == (opens is None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_kv_head": 4}, "n_kv_head = 4: must divide model.n_head = 6"),
        ({"n_kv_head": 0}, "n_kv_head"),
        ({"head_dim": 33, "positions": "rotary"}, "head_dim = 33: must be even"),
        ({"value_embeddings": 4}, "value_embeddings = 4"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"logit_softcap": -1.0}, "logit_softcap"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"init_std": float("nan")}, "init_std"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(**options)


def test_zero_init_makes_every_block_the_identity() -> None:
    model = GPT(dataclasses.replace(TINY, family="qwen3", zero_init=True))
    inputs = tokens()
    expected = F.linear(rms_norm(model.transformer.wte(inputs), None, 1e-6), model.transformer.wte.weight[:75])
    torch.testing.assert_close(model(inputs), expected)


def test_initial_values_of_the_options() -> None:
    config = dataclasses.replace(TINY, n_embd=128, tied=False, value_embeddings=1, init_std=0.05, vocab_size=530, n_kv_head=2)
    for name, parameter in GPT(config).named_parameters():
        if name.endswith("value_mix"):
            assert torch.equal(parameter, torch.tensor([0.5, 0.5]))
        elif parameter.dim() == 2:
            expected = 0.05 / math.sqrt(6) if "c_proj" in name else 0.05 * (math.sqrt(128) if "wve" in name else 1)
            rows = 530 if parameter.size(0) == 550 else parameter.size(0)
            assert float(parameter[:rows].std()) == pytest.approx(expected, rel=0.05), name


# ---- parts ----


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rms_norm_and_its_gradients(weighted: bool, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(5, 7, 24, generator=generator, dtype=torch.float64) + 1).to(dtype).requires_grad_()
    weight = torch.rand(24, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() if weighted else None
    above = torch.randn(5, 7, 24, generator=generator, dtype=torch.float64).to(dtype)
    inputs = (x,) if weight is None else (x, weight)
    wide = [value.detach().double().requires_grad_() for value in inputs]
    expected = wide[0] / (wide[0].square().mean(-1, keepdim=True) + 1e-3).sqrt() * (wide[1] if weighted else 1)
    ours = rms_norm(x, weight, 1e-3)
    assert ours.dtype == dtype
    theirs = torch.autograd.grad((expected * above).sum(), wide)
    for mine, reference in zip((ours, *torch.autograd.grad(ours, inputs, above)), (expected, *theirs), strict=True):
        assert mine.dtype == dtype
        assert float((mine.double() - reference).norm() / reference.norm()) < tolerance


def test_rotary_scores_depend_on_the_distance_and_its_gradient_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator, dtype=torch.float64)

    def score(i: int, j: int) -> float:
        turned = [rotate(x, rotation(torch.tensor([p]), 16, 100.0, x.dtype)) for x, p in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-12)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-3)
    assert score(3, 3) == pytest.approx(float((q * k).sum()), rel=1e-12)
    x = torch.randn(2, 3, 2, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    turn = rotation(torch.tensor([[0, 5, 2], [1, 1, 40]]), 8, 100.0, torch.float64)
    assert torch.autograd.gradcheck(lambda value: rotate(value, turn), (x,))


@pytest.mark.parametrize("window", [1, 3, 4, 6, 8, 24, 30])
@pytest.mark.parametrize("shared", [1, 2])
def test_windows_equal_a_masked_softmax(window: int, shared: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 24, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 2, 4 // shared, 24, 8, generator=generator, dtype=torch.float64).requires_grad_()
    keys, values = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    distance = torch.arange(24)[:, None] - torch.arange(24)
    scores = (q @ keys.mT / math.sqrt(8)).masked_fill((distance < 0) | (distance >= window), -math.inf)
    expected = scores.softmax(-1) @ values
    ours = attention(q, k, v, window=window)
    torch.testing.assert_close(ours, expected)
    above = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (q, k, v), above), torch.autograd.grad(expected, (q, k, v), above), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("padded", [False, True])
def test_soft_capped_loss_and_gradients(ignored: bool, reduction: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", {"cpu": 16 * 75 * 4})
    if padded:  # the path of accelerators
        monkeypatch.setattr(loss_module, "head_rows", lambda weight, vocab_size: weight.size(0))
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, 25, 24, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(128, 24, generator=generator, dtype=torch.float64)
    weight[75:] = 0
    weight.requires_grad_()
    targets = torch.randint(0, 75, (2, 25), generator=generator)
    if ignored:
        targets[0, 3:17] = -100
    logits = 2.0 * torch.tanh(hidden @ weight[:75].T / 2.0)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100).view(2, 25)
    loss = head_loss(hidden, weight, targets, vocab_size=75, reduction=reduction, softcap=2.0)  # type: ignore[arg-type]
    above = torch.linspace(0.5, 2.0, 50, dtype=torch.float64).view(2, 25) if reduction == "none" else 3.0
    theirs = torch.autograd.grad((expected * above).sum(), (hidden, weight))
    ours = torch.autograd.grad((loss * above).sum(), (hidden, weight))
    torch.testing.assert_close(loss, expected.sum() if reduction == "sum" else expected)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(hidden, weight, targets, vocab_size=75, reduction="none", softcap=2.0), expected)


def test_soft_cap_leaves_small_logits_and_bounds_large_ones() -> None:
    logits = torch.tensor([-1e9, -0.01, 0.0, 0.01, 1e9])
    torch.testing.assert_close(soft_cap(logits, 30.0), torch.tensor([-30.0, -0.01, 0.0, 0.01, 30.0]))
    assert soft_cap(logits, 0.0) is logits


@pytest.mark.parametrize("name", ["llama", "qwen3_window", "all"])
def test_autocast_stays_near_float32(name: str) -> None:
    model = perturbed(option(name))
    exact = model(tokens(), tokens(seed=1))
    with torch.autocast("cpu", torch.bfloat16):
        near = model(tokens(), tokens(seed=1))
    near.backward()
    assert near.dtype == torch.float32
    assert near.item() == pytest.approx(exact.item(), rel=2e-2)
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "all"])
def test_compiles_without_a_graph_break(name: str) -> None:
    model = perturbed(option(name))
    plain = model(tokens(), tokens(seed=1))
    plain.backward()
    expected = {place: parameter.grad.clone() for place, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True)(tokens(), tokens(seed=1))
    loss.backward()
    torch.testing.assert_close(loss, plain)
    for place, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert relative(parameter.grad, expected[place]) < 1e-3, place


def test_rms_norm_takes_a_weight_for_each_of_some_rows() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3), (x, weight))
    apart = torch.stack([rms_norm(x[:, :, row], weight[row], 1e-3) for row in range(3)], dim=2)
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), apart)


def test_norms_under_autocast_are_rounded_as_the_next_product_would() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 6, 16), torch.rand(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = rms_norm(x, weight, 1e-5)
        assert rms_norm(x.double(), weight.double(), 1e-5).dtype == torch.float64
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, rms_norm(x, weight, 1e-5).bfloat16())


@pytest.mark.parametrize("shape", [None, (16,), (6, 16)])
def test_norms_under_autocast_on_cuda_keep_the_dtype(shape: tuple[int, ...] | None) -> None:
    """Autocast would widen PyTorch's own; attention within documents takes queries, keys and values of one dtype."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)  # torch.autocast would not, for want of a GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
            x, weight = torch.zeros(4, 6, 16, dtype=torch.bfloat16), None if shape is None else torch.zeros(shape)
            assert F.rms_norm(x, (16,)).dtype == torch.float32
            assert rms_norm(x, weight, 1e-5).dtype == torch.bfloat16
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def test_swiglu_has_the_gradient_of_its_formula() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x), gate * torch.sigmoid(gate) * up)
    assert torch.autograd.gradcheck(swiglu, (x,))


@pytest.mark.parametrize("bias", [True, False])
def test_large_matrices_under_autocast_give_what_small_ones_do(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x, above = Linear(24, 40, bias=bias), torch.randn(3, 5, 24, requires_grad=True), torch.randn(3, 5, 40)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    found = []
    for entries in (10**9, 1):
        monkeypatch.setattr("bardling.model.kernels.select.RECAST_MIN_ELEMENTS", entries)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product = layer(x)
        found.append((product, *torch.autograd.grad(product.float(), (x, *layer.parameters()), above)))
    for usual, lean in zip(*found, strict=True):
        assert usual.dtype == lean.dtype
        torch.testing.assert_close(lean, usual, rtol=2e-2, atol=2e-2)
    assert type(found[1][0].grad_fn).__name__ == "_RecastLinearBackward"


def test_a_tied_table_gets_the_sum_of_both_gradients() -> None:
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=20, vocab_multiple=1)
    model = GPT(config).double()
    tokens = torch.tensor([[1, 1, 4, 19], [0, 3, 3, 3]])
    weight = model.transformer.wte.weight
    (ours,) = torch.autograd.grad(model(tokens, tokens.roll(1, 1)), weight)
    logits = F.linear(model(tokens, output="hidden"), weight)
    (expected,) = torch.autograd.grad(
        F.cross_entropy(logits.flatten(0, 1), tokens.roll(1, 1).flatten(), reduction="sum"), weight
    )
    assert not ours.is_sparse
    torch.testing.assert_close(ours, expected)
    lookups, head = tied_views(weight)
    assert lookups is not None
    for one in (lookups[tokens].sum(), F.embedding(tokens, lookups, sparse=True).sum(), head.square().sum()):
        assert not torch.autograd.grad(one, weight, retain_graph=True)[0].is_sparse
