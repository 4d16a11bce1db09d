import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bardling.config import ModelConfig
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.planning.costs import (
    block_parameters,
    flops_per_token,
    forward_table,
    palm_flops_per_token,
    parameter_table,
    parameters,
    weight_bytes,
)

GPT2 = ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, bias=False)

# The table of nanoGPT's transformer_sizing notebook: one layer's attention and MLP, one sequence of 1024.
NOTEBOOK_FORWARD = {
    "block.attention.qkv": 3_623_878_656,
    "block.attention.scores": 1_610_612_736,
    "block.attention.values": 1_610_612_736,
    "block.attention.proj": 1_207_959_552,
    "block.mlp.up": 4_831_838_208,
    "block.mlp.down": 4_831_838_208,
    "head": 79_047_426_048,
}


def test_gpt2_124m_parameters_are_the_notebooks() -> None:
    assert parameters(GPT2) == 124_337_664
    assert block_parameters(GPT2) == 84_953_088
    each = {part.name: part.each for part in parameter_table(GPT2)}
    assert each["embedding.tokens"] == 38_597_376
    assert each["embedding.positions"] == 786_432
    assert each["block.attention.qkv"] == 1_769_472
    assert each["block.mlp.up"] == each["block.mlp.down"] == 2_359_296
    assert each["head (tied)"] == 0


def test_published_gpt2_sizes_with_biases() -> None:
    # The parameter counts of OpenAI's four checkpoints.
    shapes = {
        (12, 12, 768): 124_439_808,
        (24, 16, 1024): 354_823_168,
        (36, 20, 1280): 774_030_080,
        (48, 25, 1600): 1_557_611_200,
    }
    for (n_layer, n_head, n_embd), expected in shapes.items():
        config = ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=1024, vocab_size=50257)
        assert parameters(config) == expected


def test_gpt2_124m_flops_are_the_notebooks() -> None:
    assert {row.name: row.each for row in forward_table(GPT2)} == NOTEBOOK_FORWARD
    assert sum(row.total for row in forward_table(GPT2)) == 291_648_307_200
    assert flops_per_token(GPT2) * 1024 == 874_944_921_600
    assert palm_flops_per_token(GPT2) * 1024 == 875_062_886_400


def test_files_hold_padded_rows() -> None:
    # The notebook's 1.49 GB is without the padded rows; a file holds them.
    padding = (50304 - 50257) * 768
    assert weight_bytes(GPT2) == 4 * (124_337_664 + padding)


@given(
    n_layer=st.integers(1, 3),
    n_head=st.integers(1, 3),
    width=st.integers(1, 8),
    block_size=st.integers(1, 16),
    vocab_size=st.integers(1, 100),
    multiple=st.sampled_from([1, 64]),
    bias=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_counts_match_the_model_that_is_built(
    n_layer: int, n_head: int, width: int, block_size: int, vocab_size: int, multiple: int, bias: bool
) -> None:
    config = ModelConfig(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_head * width,
        block_size=block_size,
        vocab_size=vocab_size,
        vocab_multiple=multiple,
        bias=bias,
    )
    with torch.device("meta"):
        model = GPT(config)
    assert parameters(config, padding=True) == sum(p.numel() for p in model.parameters())
    assert parameters(config) == parameters(config, padding=True) - (config.padded_vocab_size - vocab_size) * config.n_embd
    assert parameters(config) - parameters(config, positions=False) == model.transformer.wpe.weight.numel()
    blocks = sum(p.numel() for name, p in model.named_parameters() if ".h." in name)
    assert block_parameters(config) == blocks


@pytest.mark.parametrize("context", [32, 17])
def test_forward_flops_are_those_that_torch_counts(context: int) -> None:
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=128)
    model = GPT(config)
    tokens = torch.zeros(3, context, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    # The plain attention kernel, since the counter does not know the CPU's fused one.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(tokens)  # all logits, so that the head is one product
    assert counter.get_total_flops() == 3 * sum(row.total for row in forward_table(config, context))


def test_unknown_vocabulary_and_bad_context_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size = 0"):
        parameters(ModelConfig())
    with pytest.raises(UserError, match="context = 2000"):
        flops_per_token(GPT2, 2000)
