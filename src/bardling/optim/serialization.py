"""Optimizer state as named tensors, independent of the order and grouping of parameters.

`torch.optim` numbers parameters; a checkpoint names them, so it can be read without the code that built the optimizer. Tensors
are named `<parameter>.<entry>` (`h.0.attn.c_attn.weight.exp_avg`); other values go into a dictionary that JSON can store.
Hyperparameters are not part of the state: they come from the configuration, so changes on resume take effect.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bardling.errors import UserError

# State per parameter of the built-in optimizers. The state of other optimizers is not checked for completeness.
ADAMW_TENSORS = frozenset({"step", "exp_avg", "exp_avg_sq"})
MUON_TENSORS = frozenset({"momentum"})
BUILT_IN = ("AdamW", "Muon")


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state as (tensors by name, metadata).

    The tensors are the optimizer's own, not copies, so save them before the next update.

    Args:
        names: the model's parameters by name, `dict(module.named_parameters())`.

    Raises:
        ValueError: the optimizer has a parameter that is missing in `names`.
    """
    state = {name: optimizer.state.get(parameter, {}) for name, parameter in _named(optimizer, names).items()}
    values = {f"{name}.{key}": value for name, entries in state.items() for key, value in entries.items()}
    tensors = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
    scalars = {name: value for name, value in values.items() if name not in tensors}
    stateless = [name for name, entries in state.items() if not entries]
    return tensors, {"optimizer": type(optimizer).__name__, "scalars": scalars, "without_state": stateless}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    take: Callable[[str, Tensor], Tensor] = lambda name, whole: whole,
) -> None:
    """Load the result of `optimizer_tensors`; the optimizer changes only if all of it is valid.

    Args:
        tensors: may read each tensor when it is asked for.
        take: the part that this process holds of a tensor with the shape of the named parameter.

    Raises:
        UserError: the state is another optimizer's, or does not match the parameters.
    """
    kind = type(optimizer).__name__
    if meta.get("optimizer") != kind:
        raise UserError(
            f"the checkpoint holds the state of {meta.get('optimizer')}, but this run uses {kind}: set optim.name to that "
            "of the checkpoint, or start a new run from its weights alone, with model.init"
        )
    scalars, stateless = meta.get("scalars", {}), meta.get("without_state", [])
    if not isinstance(scalars, Mapping) or not isinstance(stateless, list):
        raise UserError("the metadata of the optimizer state is malformed: use another checkpoint")
    expected = _named(optimizer, names)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    state: dict[str, dict[str, Any]] = {name: {} for name in expected}
    sources: list[Mapping[str, Any]] = [tensors, scalars]
    for source, full_name in [(values, name) for values in sources for name in values]:
        name, _, key = str(full_name).rpartition(".")
        if name not in expected:
            raise UserError(f"the optimizer state has {full_name!r}, which belongs to no parameter of this model")
        value = source[full_name]
        if isinstance(value, Tensor):
            value = value if key == "step" else take(name, value)
            value = _copy_for(expected[name], key, value, full_name, groups[id(expected[name])])
        state[name][key] = value
    missing = sorted(name for name, entries in state.items() if not entries and name not in stateless)
    if missing:
        raise UserError(f"the optimizer state lacks {len(missing)} parameters of this model, {missing[0]!r} first")
    for name, entries in state.items():
        required = MUON_TENSORS if groups[id(expected[name])].get("muon") else ADAMW_TENSORS
        found = {key for key, value in entries.items() if isinstance(value, Tensor)}
        if entries and kind in BUILT_IN and found != required:
            raise UserError(f"the optimizer state of {name!r} is incomplete: {sorted(entries)} instead of {sorted(required)}")
    for name, parameter in expected.items():
        optimizer.state.pop(parameter, None)
        if state[name]:
            optimizer.state[parameter] = state[name]


def _copy_for(parameter: nn.Parameter, key: str, value: Tensor, full_name: str, group: Mapping[str, Any]) -> Tensor:
    """A checked copy of a state tensor on the device where the optimizer expects it."""
    if key != "step" and (value.shape != parameter.shape or not value.is_floating_point()):
        raise UserError(
            f"optimizer state {full_name!r} is {_describe(value)}, but its parameter is {_describe(parameter)}: "
            "the checkpoint is of another model"
        )
    if key == "step" and value.numel() != 1:
        raise UserError(f"optimizer state {full_name!r} is {_describe(value)}, but must be one number")
    # Fused and capturable kernels need the step count on the parameter's device, others in host memory.
    on_device = key != "step" or group.get("fused") or group.get("capturable")
    return value.detach().to(parameter.device if on_device else torch.device("cpu"), copy=True)


def _named(optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by name, sorted."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found = {name: parameter for name, parameter in sorted(names.items()) if id(parameter) in held}
    if len(found) != len(held):
        raise ValueError(f"the optimizer has {len(held)} parameters, but only {len(found)} of them are named")
    return found


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
