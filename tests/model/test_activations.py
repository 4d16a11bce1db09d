"""The memory of activations, against what autograd holds."""

from collections.abc import Callable

import pytest
import torch

from bardling.config import ModelConfig
from bardling.model import activations, loss
from bardling.model.activations import activation_bytes
from bardling.model.gpt import GPT

GPT2 = ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, bias=False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False])
def test_saved_activations_match_autograd_to_the_byte(
    precision: str, bias: bool, monkeypatch: pytest.MonkeyPatch, held_bytes: Callable[..., int]
) -> None:
    monkeypatch.setattr("bardling.model.explicit.EXPLICIT_LENGTH", 0)  # the fused kernel, as on a GPU
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
    assert (activations.LOGIT_CHUNK_BYTES, activations.LOGIT_SLOPE_BYTES) == (loss.CHUNK_BYTES, loss.SLOPE_BYTES)
