"""LoRA (Hu et al. 2021, arXiv:2106.09685): the weights stay as they are, and a product of two small matrices is added to each.

    y = W x + scale * B A x        A [rank, in], B [out, rank]; scale = alpha / rank

A fused matrix has an adapter of its own for each of its parts (queries, keys, values; gate and input of the MLP), as a model
with separate matrices has. A starts as in PEFT, uniform within 1 / sqrt(in), and B at zero, so that training starts from the
model as it is. Tokens that are new to the model also get trained embeddings, since nothing else tells them apart.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardling.config import TuneConfig
from bardling.model.gpt import GPT
from bardling.model.init import named_generator
from bardling.model.layers import Embedding, Linear
from bardling.planning.parameter_shapes import adapted_parts, matrix_rows


class Adapter(nn.Module):
    """Changes to the output of a linear layer with `inputs` columns and `rows` rows in each of its parts."""

    def __init__(self, inputs: int, rows: Mapping[str, int], parts: Sequence[str], rank: int, scale: float) -> None:
        super().__init__()
        self.rows, self.rank, self.scale = dict(rows), rank, scale
        self.A = nn.ParameterDict({part: nn.Parameter(torch.empty(rank, inputs)) for part in parts})
        self.B = nn.ParameterDict({part: nn.Parameter(torch.zeros(rows[part], rank)) for part in parts})

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the changes for the inputs x [..., in] to the outputs y [..., out]."""
        parts = list(self.A.keys())
        inner = F.linear(x, torch.cat([self.A[part] for part in parts]))  # [..., parts * rank]: reads x once
        low = torch.split(inner, self.rank, dim=-1)
        changes = {part: F.linear(each, self.B[part]) for part, each in zip(parts, low, strict=True)}
        pieces = zip(self.rows, torch.split(y, list(self.rows.values()), dim=-1), strict=True)
        added = [torch.add(piece, changes[part], alpha=self.scale) if part in changes else piece for part, piece in pieces]
        return added[0] if len(added) == 1 else torch.cat(added, dim=-1)


class TrainedRows(nn.Module):
    """The rows of a fixed matrix from row `start` on that are trained."""

    def __init__(self, start: int, rows: Tensor) -> None:
        super().__init__()
        self.start, self.rows = start, nn.Parameter(rows)

    def forward(self, weight: Tensor) -> Tensor:
        """The whole matrix [V, C]."""
        return torch.cat([weight[: self.start], self.rows, weight[self.start + len(self.rows) :]])


def add_adapters(model: GPT, tune: TuneConfig, seed: int) -> None:
    """Fix all weights of a model and add adapters, in place. Their initial values depend on the seed and their names only.

    Raises:
        UserError: the model has none of the layers in `tune.lora_targets`.
    """
    model.requires_grad_(False)
    rows, parts, device = matrix_rows(model.config), adapted_parts(model.config, tune), model.device
    for block in model.transformer.h:
        for name in rows:
            layer = block.get_submodule(name)
            assert isinstance(layer, Linear)
            layer.weight.data = layer.weight.data.to(getattr(torch, tune.base_dtype))
            if name in parts:
                adapter = Adapter(layer.in_features, rows[name], parts[name], tune.lora_rank, tune.scale)
                layer.adapter = adapter.to(device)
    first, end = tune.new_tokens
    if first < end:
        tables: list[Embedding | Linear] = [model.transformer.wte]
        tables += [] if model.transformer.architecture.tied else [model.lm_head]
        for table in tables:
            table.adapter = TrainedRows(first, table.weight.detach()[first:end].clone())
    for name, parameter in model.named_parameters():
        if ".adapter.A." in name:
            bound = 1 / math.sqrt(parameter.size(1))
            value = torch.empty(parameter.shape).uniform_(-bound, bound, generator=named_generator(seed, name))
            with torch.no_grad():
                parameter.copy_(value)
    model.lora = tune


def trained_state(model: GPT) -> dict[str, Tensor]:
    """The part of a model's state dict that training changes: without LoRA all of it."""
    state = model.state_dict()
    return state if model.lora is None else {name: tensor for name, tensor in state.items() if ".adapter." in name}
