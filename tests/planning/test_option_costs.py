"""Parameters, FLOPs and memory of every option, against the model that is built."""

from collections.abc import Callable

import pytest
import torch
from test_options import OPTIONS, option
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bardling.model.gpt import GPT
from bardling.planning.activations import activation_bytes
from bardling.planning.costs import (
    block_parameters,
    flops_per_token,
    forward_table,
    matmul_parameters,
    palm_flops_per_token,
    parameters,
    scores_computed,
)


@pytest.mark.parametrize("name", OPTIONS)
def test_parameters_are_those_of_the_model(name: str) -> None:
    config = option(name)
    with torch.device("meta"):
        model = GPT(config)
    counts = {place: parameter.numel() for place, parameter in model.named_parameters()}
    assert parameters(config, padding=True) == sum(counts.values())
    padded = sum(p.numel() // 100 * 25 for p in model.parameters() if p.size(0) == 100)
    assert parameters(config) == sum(counts.values()) - padded
    assert parameters(config) - parameters(config, positions=False) == counts.get("transformer.wpe.weight", 0)
    assert block_parameters(config) == sum(count for place, count in counts.items() if ".h." in place)
    looked_up = {"transformer.wte.weight"} - ({"transformer.wte.weight"} if config.architecture.tied else set())
    looked_up |= {place for place in counts if ".wpe." in place or ".wve." in place}
    head = 75 * config.n_embd - counts["transformer.wte.weight" if config.architecture.tied else "lm_head.weight"]
    assert matmul_parameters(config) == sum(count for place, count in counts.items() if place not in looked_up) + head


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("context", [24, 17])
def test_forward_flops_are_those_that_torch_counts(name: str, context: int) -> None:
    config = option(name)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        GPT(config)(torch.zeros(3, context, dtype=torch.long))
    assert counter.get_total_flops() == 3 * sum(row.total for row in forward_table(config, context))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_saved_activations_are_near_what_autograd_holds(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch, held: Callable[[str, str], int]
) -> None:
    for module in ("model.kernels.select", "planning.activations"):
        monkeypatch.setattr(f"bardling.{module}.EXPLICIT_LENGTH", 0)  # the fused kernel, as on a GPU
    expected = activation_bytes(option(name), 8, precision=precision, device_type="cpu").saved
    assert expected == pytest.approx(held(name, precision), rel=0.03)


@pytest.mark.parametrize("name", OPTIONS)
def test_on_a_cpu_bfloat16_keeps_the_scores_of_short_contexts(name: str, held: Callable[[str, str], int]) -> None:
    found = activation_bytes(option(name), 8, precision="bfloat16", device_type="cpu").saved
    assert found == pytest.approx(held(name, "bfloat16"), rel=0.03)


@pytest.fixture
def held(held_bytes: Callable[..., int]) -> Callable[[str, str], int]:
    """`held(option, precision)`: bytes that autograd keeps after a forward pass of 8 sequences."""
    tokens = torch.randint(0, 75, (8, 24))
    return lambda name, precision: held_bytes(GPT(option(name)), precision, tokens, tokens)


def test_a_window_saves_work_and_palms_formula_is_near() -> None:
    plain, windowed = option("qwen3"), option("window_blocks")
    assert scores_computed(24, 4) == 4 * 4 + 20 * 8
    assert scores_computed(24, 5) == scores_computed(24, None) == 24 * 24
    names = [row.name for row in forward_table(windowed)]
    assert "block.attention.scores (window)" in names
    assert "block.attention.scores" not in names
    assert palm_flops_per_token(plain) * 24 == pytest.approx(flops_per_token(plain) * 24, rel=0.02)
