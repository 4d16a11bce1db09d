"""What tests of the arithmetic share."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def held_bytes() -> Callable[..., int]:
    """`held_bytes(model, precision, *inputs, **named)`: bytes that autograd keeps after a forward pass, parameters left out."""

    def measure(model: nn.Module, precision: str, *inputs: Tensor, **named: Tensor) -> int:
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        seen: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage  # held, so that no address is used twice
            return tensor

        narrow = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), narrow:
            model(*inputs, **named)
        return sum(storage.nbytes() for storage in seen.values())

    return measure
