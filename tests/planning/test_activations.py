"""The memory of activations, against what autograd holds."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bardling.config import ModelConfig
from bardling.data.batches.packing import document_bounds
from bardling.model.gpt import GPT
from bardling.model.kernels import head_loss
from bardling.planning import activations
from bardling.planning.activations import activation_bytes

GPT2 = ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, bias=False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False])
def test_saved_activations_match_autograd_to_the_byte(
    precision: str, bias: bool, monkeypatch: pytest.MonkeyPatch, held_bytes: Callable[..., int]
) -> None:
    monkeypatch.setattr("bardling.model.kernels.select.EXPLICIT_LENGTH", 0)  # the fused kernel, as on a GPU
    config = ModelConfig(n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=200, bias=bias)
    model = GPT(config)
    tokens = torch.randint(0, 200, (3, 32))
    found = held_bytes(model, precision, tokens, tokens)
    assert found == activation_bytes(config, 3, precision=precision).saved


def test_activations_grow_with_the_batch_and_logits_only_up_to_a_chunk() -> None:
    one, many = activation_bytes(GPT2, 1), activation_bytes(GPT2, 64)
    assert many.blocks == 64 * one.blocks
    assert many.weight_copies == one.weight_copies
    full_logits = 64 * 1024 * GPT2.padded_vocab_size * 4
    assert many.head < full_logits / 4
    assert activation_bytes(GPT2, 64, device_type="cpu").head < many.head
    dropout = ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, bias=False, dropout=0.1)
    assert activation_bytes(dropout, 1).saved - one.saved == 1024 * 768 * (2 * 12 + 1)


def test_logit_chunks_are_those_of_the_loss() -> None:
    assert (activations.LOGIT_CHUNK_BYTES, activations.LOGIT_GRAD_BYTES) == (head_loss.CHUNK_BYTES, head_loss.SLOPE_BYTES)


LLAMA = ModelConfig(
    n_layer=3, n_head=4, n_embd=64, block_size=96, vocab_size=200, norm="rmsnorm", positions="rotary", mlp="swiglu", bias=False
)
WINDOWS: dict[str, dict[str, Any]] = {
    "none": {},
    "as long as the context": {"sliding_window": 96, "global_every": 0},
    "longer": {"sliding_window": 200, "global_every": 2},
    "in blocks": {"sliding_window": 16, "global_every": 0},
    "in blocks of many": {"sliding_window": 256, "global_every": 2, "block_size": 768},
    "not in blocks": {"sliding_window": 40, "global_every": 2},
    "not in blocks, all layers": {"sliding_window": 48, "global_every": 0},
}
OTHERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"positions": "learned", "norm": "layernorm", "mlp": "gelu"},
    "grouped": {"n_kv_head": 2},
    "one key head": {"n_kv_head": 1},
    "normed": {"qk_norm": "weight"},
    "values": {"value_embeddings": 2, "n_kv_head": 2},
}


def compare(
    config: ModelConfig, batch: int, precision: str, documents: bool, held_bytes: Callable[..., int], tolerance: float = 0.01
) -> None:
    tokens = torch.randint(1, 200, (batch, config.block_size))
    tokens[:, ::37] = 0
    named = {"documents": document_bounds(tokens == 0)} if documents else {}
    held = held_bytes(GPT(config), precision, tokens, tokens, **named)
    made = activation_bytes(config, batch, precision=precision, device_type="cpu", document_mask=documents)
    if documents and precision == "bfloat16":  # explicit attention lets go of the masks, which are planned for
        tolerance += 0.03
    assert made.saved == pytest.approx(held, rel=tolerance)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", WINDOWS)
def test_layers_with_a_window_keep_what_is_planned(
    window: str, precision: str, documents: bool, held_bytes: Callable[..., int]
) -> None:
    compare(dataclasses.replace(LLAMA, **WINDOWS[window]), 4, precision, documents, held_bytes)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("window", ["none", "in blocks", "not in blocks"])
@pytest.mark.parametrize("other", OTHERS)
def test_so_they_do_with_heads_that_share_keys_norms_and_value_embeddings(
    other: str, window: str, batch: int, held_bytes: Callable[..., int]
) -> None:
    config = dataclasses.replace(LLAMA, **WINDOWS[window], **OTHERS[other])
    for precision in ("float32", "bfloat16"):
        compare(config, batch, precision, False, held_bytes)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", ["none", "longer", "in blocks of many"])
def test_explicit_attention_keeps_weights_twice_with_dropout(
    window: str, documents: bool, held_bytes: Callable[..., int]
) -> None:
    config = dataclasses.replace(LLAMA, **{**WINDOWS[window], "global_every": 0}, dropout=0.1)
    made = [activation_bytes(dataclasses.replace(config, dropout=rate), 4, device_type="cpu").saved for rate in (0.0, 0.1)]
    assert made[1] > 1.1 * made[0]
    if window == "in blocks of many":
        return  # the other blocks' kernel keeps scores, which are not counted
    compare(config, 4, "bfloat16", documents, held_bytes)


def test_the_kernel_for_documents_takes_no_blocks() -> None:
    config = dataclasses.replace(LLAMA, **WINDOWS["in blocks"])
    without, blocked = (activation_bytes(dataclasses.replace(config, sliding_window=window), 4) for window in (96, 16))
    assert blocked.blocks > without.blocks
    packed = [activation_bytes(dataclasses.replace(config, sliding_window=w), 4, document_mask=True) for w in (96, 16)]
    assert packed[0] == packed[1]
    assert packed[0].blocks == without.blocks
