"""Weights for inference: in fewer bytes than float32, since reading them takes most of the time of generating a token.

float32 packs the matrices of the blocks for steps of several rows, in as many bytes. bfloat16 converts everything, and
activations with it. int8 also rounds the matrices of linear layers and of the head further (`model/kernels/int8.py`). Which
input channels of a layer are large is measured on a few random tokens: it depends on the weights more than on the text.
Perplexity of SmolLM2-135M-Instruct on two parts of Shakespeare (6144 tokens each) rises by 0.10% and 0.02% in bfloat16, by
0.13% and 0.26% in int8.

Limits: a converted model is for inference and stays on its device.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bardling.distributed.global_state import NEUTRAL
from bardling.errors import UserError
from bardling.model.gpt import GPT, evaluation_mode
from bardling.model.init import named_generator
from bardling.model.kernels.int8 import quantize
from bardling.model.kernels.select import has_int8_kernel, packs_rows
from bardling.model.layers import Int8Linear, Linear, PackedLinear

Weights = Literal["auto", "float32", "bfloat16", "int8"]

_SEQUENCES, _LENGTH = 4, 64  # of random tokens to measure activations on


def choose_weights(wanted: Weights, device: torch.device) -> tuple[Literal["float32", "bfloat16", "int8"], str]:
    """The weights for `wanted` on a device, with the reason.

    `auto` is what generates fastest for a single prompt: measured with GPT-2 124M on a CPU (`benchmarks/generation.py`).

    Raises:
        UserError: there are no such weights.
    """
    if wanted not in ("auto", "float32", "bfloat16", "int8"):
        raise UserError(f"weights = {wanted!r}: use auto, float32, bfloat16 or int8")
    if wanted != "auto":
        return wanted, "as configured"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16", "this GPU supports bfloat16"
    if device.type == "cpu" and has_int8_kernel():
        return "int8", "this CPU has a fast kernel for int8"
    return "float32", "this device has no fast kernel for int8"


@NEUTRAL.applied()
def convert_weights(model: GPT, weights: Weights, rows: int = 1) -> GPT:
    """Return a model for inference that computes with these weights: a new one, or `model` itself if nothing is gained.

    `model` does not change. For float32, the matrices of the blocks are packed if steps of `rows` rows gain by it; such a model
    computes without autocast only.

    Raises:
        UserError: there are no such weights, or `model` is converted already.
    """
    name, _ = choose_weights(weights, model.device)
    is_float32 = model.int8_head is None and model.head_weight.dtype == torch.float32
    if name == "float32" and not (is_float32 and packs_rows(rows, model.device)):
        return model
    if not is_float32:
        raise UserError(f"weights = {weights!r}: the model's weights are not float32, so they cannot be converted")
    with torch.device("meta"):
        converted = GPT(model.config, seed=None)
    converted.load_state_dict(model.state_dict(), assign=True)
    converted.eval().requires_grad_(False)
    if name == "float32":
        _replace_linear_layers(converted.transformer, lambda layer: PackedLinear(layer, rows))
        return converted
    if name == "int8":
        _convert_to_int8(converted)
    return converted.to(torch.bfloat16)


def _replace_linear_layers(root: nn.Module, replacement: Callable[[Linear], nn.Module]) -> None:
    for parent in list(root.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear):
                setattr(parent, name, replacement(layer))


def _convert_to_int8(model: GPT) -> None:
    magnitudes = _input_magnitudes(model)
    model.int8_head = Int8Linear(quantize(model.head_weight[: model.config.vocab_size], magnitudes.pop(model)), None)
    if not model.transformer.architecture.tied:
        del model.lm_head
    _replace_linear_layers(model, lambda layer: Int8Linear(quantize(layer.weight, magnitudes.pop(layer)), layer.bias))


@torch.no_grad()
def _input_magnitudes(model: GPT) -> dict[nn.Module, Tensor]:
    """Root mean square of each input channel of all linear layers, and of the head, under the key `model`."""
    found: dict[nn.Module, Tensor] = {}

    def measure(layer: nn.Module, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        found[layer] = inputs[0].flatten(0, -2).float().square().mean(dim=0).sqrt()

    config = model.config
    shape = (_SEQUENCES, min(_LENGTH, config.block_size))
    tokens = torch.randint(config.vocab_size, shape, generator=named_generator(0, "calibration")).to(model.device)
    with ExitStack() as stack, evaluation_mode(model):
        for layer in model.transformer.modules():
            if isinstance(layer, Linear):
                record: Callable[..., None] = partial(measure, layer)
                stack.callback(layer.register_forward_pre_hook(record).remove)
        hidden = model(tokens, output="hidden")
    found[model] = hidden.flatten(0, -2).float().square().mean(dim=0).sqrt()
    return found
