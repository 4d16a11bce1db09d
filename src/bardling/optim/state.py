"""An optimizer's state as named tensors, independent of the order and grouping of its parameters.

`torch.optim` numbers its parameters; a checkpoint names them, so that it can be read without the code that built the optimizer.
Tensors are called `<parameter>.<entry>` (`h.0.attn.c_attn.weight.exp_avg`); what is no tensor goes into a JSON-able dictionary.
Hyperparameters are not part of the state: they come from the configuration, so that changing them on resume takes effect.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bardling.errors import UserError

# What is kept for each parameter; of optimizers not listed here whatever they keep is taken.
ADAMW_TENSORS = frozenset({"step", "exp_avg", "exp_avg_sq"})
MUON_TENSORS = frozenset({"momentum"})
LISTED = ("AdamW", "Muon")


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state as (tensors by name, what else is needed).

    The tensors are the optimizer's own, not copies: write them before the next update.

    Args:
        names: the model's parameters by name, as `dict(module.named_parameters())`.

    Raises:
        ValueError: the optimizer holds a parameter that `names` lacks.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    stateless: list[str] = []
    for name, parameter in _named(optimizer, names).items():
        entries = optimizer.state.get(parameter, {})
        if not entries:
            stateless.append(name)
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value.detach()
            else:
                scalars[f"{name}.{key}"] = value
    return tensors, {"optimizer": type(optimizer).__name__, "scalars": scalars, "without_state": sorted(stateless)}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
) -> None:
    """Put back what `optimizer_tensors` returned; the optimizer is changed only if everything fits.

    The tensors are copied to the device of their parameters.

    Raises:
        UserError: another optimizer, or tensors that do not belong to these parameters.
    """
    kind = type(optimizer).__name__
    if meta.get("optimizer") != kind:
        raise UserError(
            f"the checkpoint holds the state of {meta.get('optimizer')}, but this run uses {kind}: set optim.name to that "
            "of the checkpoint, or start a new run from its weights alone, with model.init"
        )
    expected = _named(optimizer, names)
    scalars, stateless = meta.get("scalars", {}), meta.get("without_state", [])
    if not isinstance(scalars, Mapping) or not isinstance(stateless, list):
        raise UserError("the optimizer state's description is malformed: take another checkpoint")
    at_device = {id(p): bool(g.get("fused") or g.get("capturable")) for g in optimizer.param_groups for p in g["params"]}
    state: dict[str, dict[str, Any]] = {name: {} for name in expected}
    for full, value in [*tensors.items(), *scalars.items()]:
        name, _, key = str(full).rpartition(".")
        if name not in expected:
            raise UserError(f"the optimizer state has {full!r}, which belongs to no parameter of this model")
        parameter = expected[name]
        if isinstance(value, Tensor):
            if key != "step" and (value.shape != parameter.shape or not value.is_floating_point()):
                raise UserError(
                    f"optimizer state {full!r} is {_describe(value)}, but its parameter is {_describe(parameter)}: "
                    "the checkpoint is of another model"
                )
            if key == "step" and value.numel() != 1:
                raise UserError(f"optimizer state {full!r} is {_describe(value)}, but must be one number")
            # The fused kernels want the count beside the weights, the others in host memory.
            device = parameter.device if key != "step" or at_device[id(parameter)] else torch.device("cpu")
            value = value.detach().to(device, copy=True)
        state[name][key] = value
    missing = sorted(name for name, entries in state.items() if not entries and name not in stateless)
    if missing:
        raise UserError(f"the optimizer state lacks {len(missing)} parameters of this model, {missing[0]!r} first")
    by_muon = {id(p) for group in optimizer.param_groups if group.get("muon") for p in group["params"]}
    for name, entries in state.items():
        if kind not in LISTED:
            continue
        needed = MUON_TENSORS if id(expected[name]) in by_muon else ADAMW_TENSORS
        if entries and {key for key, value in entries.items() if isinstance(value, Tensor)} != needed:
            raise UserError(f"the optimizer state of {name!r} is incomplete: {sorted(entries)} instead of {sorted(needed)}")
    for name, parameter in expected.items():
        optimizer.state.pop(parameter, None)
        if state[name]:
            optimizer.state[parameter] = state[name]


def _named(optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by name, sorted."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found = {name: parameter for name, parameter in sorted(names.items()) if id(parameter) in held}
    if len(found) != len(held):
        raise ValueError(f"the optimizer holds {len(held)} parameters, but only {len(found)} of them have names")
    return found


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
