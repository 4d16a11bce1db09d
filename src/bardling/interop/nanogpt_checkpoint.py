"""Reads nanoGPT's checkpoints, `ckpt.pt`, and writes files that nanoGPT samples from and continues to train.

A file holds the keys `model` (state dict, head included), `optimizer` (AdamW's), `model_args`, `iter_num` (optimizer steps
done), `best_val_loss` and `config`. Limits: nanoGPT uses the exact GELU and always ties the head; a model with the tanh GELU is
written with a note, because its logits differ slightly there. The format has no random number states and no data position.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bardling.config import OptimConfig, RunConfig
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error
from bardling.interop.imported import (
    MOMENTS,
    NO_LOSS_YET,
    SIZES,
    ImportedCheckpoint,
    import_checkpoint,
    model_config_from_sizes,
    number_at,
    optimizer_order,
    plain_values,
    read_content,
    string_keyed,
    unpadded_shapes,
)
from bardling.interop.nanogpt import nanogpt_settings
from bardling.planning.parameter_shapes import EMBEDDING, HEAD


def read_nanogpt_checkpoint(path: Path) -> ImportedCheckpoint:
    """Read the nanoGPT checkpoint at `path`, which must match its own description and hold nothing executable."""
    content = read_content(path, "nanoGPT", ("model", "model_args"))
    args = string_keyed(path, content["model_args"], "model_args")
    # Old files have neither key; these models always have biases.
    dropout = number_at(path, args, "dropout") if "dropout" in args else 0.0
    if not isinstance(bias := args.get("bias", True), bool):
        raise UserError(f"{path}: its 'bias' is not a bool")
    config = model_config_from_sizes(path, args, bias=bias, dropout=dropout, gelu="erf")
    settings = plain_values(string_keyed(path, content.get("config", {}), "config"))
    return import_checkpoint(path, "nanoGPT", content, config, settings, "model", "optimizer", "iter_num", "best_val_loss")


def write_nanogpt_checkpoint(
    path: Path,
    *,
    config: RunConfig,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    step: int,
    best_val_loss: float | None,
    out: Path,
    dataset: str,
) -> list[str]:
    """Write a `ckpt.pt` that nanoGPT's programs accept, and return what nanoGPT will do differently, one sentence each.

    Args:
        config: the run's configuration, with `model.vocab_size` set.
        weights: the model's parameters by name, the embedding padded or not.
        optimizer: AdamW's tensors by name, as `optimizer_tensors` returns them. If they are those of another optimizer, the
            state is left empty and nanoGPT starts AdamW from scratch.
        best_val_loss: nats per token; None before the first validation.
        out, dataset: as for `nanogpt_settings`.
    """
    model, notes = config.model, []
    if model.gelu != "erf":
        notes.append(
            "this model was trained with the tanh GELU; nanoGPT uses the exact GELU, so its losses will differ slightly"
        )
    if config.optim.schedule in ("linear", "wsd"):
        notes.append(f"nanoGPT has no {config.optim.schedule} schedule and will use a cosine schedule")
    shapes = unpadded_shapes(model)
    state_dict = {name: _unpadded(name, weights.get(name), shapes[name]) for name in shapes}
    state, groups = _optimizer_state(config.optim, optimizer, shapes)
    if not state:
        notes.append("it contains no AdamW state, so nanoGPT starts its optimizer from scratch")
    content = {
        "model": {**state_dict, HEAD: state_dict[EMBEDDING]},  # one storage under two names, as in nanoGPT's own files
        "optimizer": {"state": state, "param_groups": groups},
        "model_args": {**{key: getattr(model, key) for key in SIZES}, "bias": model.bias, "dropout": model.dropout},
        "iter_num": step,
        "best_val_loss": torch.tensor(NO_LOSS_YET if best_val_loss is None else best_val_loss),
        "config": nanogpt_settings(config, out, dataset),
    }
    with os_error_as_user_error(path, "write"):
        try:
            torch.save(content, path)
        except RuntimeError as error:  # how PyTorch's writer reports system errors such as a full disk
            raise UserError(f"{out / path.name}: cannot write: {str(error).splitlines()[0][:200]}") from None
    return notes


def write_meta(path: Path, tokenizer: Tokenizer) -> None:
    """Write the `meta.pkl` from which nanoGPT's sample.py reads a character vocabulary: a dict of plain values.

    The end-of-document token, if there is one, appears in the tables under its name.
    """
    itos = {number: tokenizer.decode([number]) for number in range(tokenizer.vocab_size)}
    meta = {"vocab_size": tokenizer.vocab_size, "itos": itos, "stoi": {text: number for number, text in itos.items()}}
    with os_error_as_user_error(path, "write"):
        path.write_bytes(pickle.dumps(meta, protocol=4))


def _unpadded(name: str, value: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """A float32 CPU copy of `value` without padding rows. Not a view: `torch.save` would write all of its storage."""
    rows = 0 if value is None else value.size(0)
    if value is None or value.shape[1:] != shape[1:] or rows < shape[0] or (rows > shape[0] and name != EMBEDDING):
        found = "missing" if value is None else list(value.shape)
        raise UserError(f"the tensor {name!r} is {found}, but this model needs {list(shape)}")
    return value.detach()[: shape[0]].to("cpu", torch.float32, copy=True).contiguous()


def _optimizer_state(
    optim: OptimConfig, optimizer: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[int, dict[str, Tensor]], list[dict[str, Any]]]:
    """AdamW's state numbered as in nanoGPT, and its two parameter groups with the keys of this PyTorch's AdamW."""
    order = optimizer_order(shapes)
    groups = [
        {"params": [torch.zeros(1, requires_grad=True) for _ in names], "weight_decay": weight_decay}
        for names, weight_decay in zip(order, (optim.weight_decay, 0.0), strict=True)
    ]
    param_groups = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps).state_dict()["param_groups"]
    state: dict[int, dict[str, Tensor]] = {}
    names = [*order[0], *order[1]]
    if all(f"{name}.{key}" in optimizer for name in names for key in (*MOMENTS, "step")):
        for number, name in enumerate(names):
            state[number] = {"step": optimizer[f"{name}.step"].detach().to("cpu", torch.float32, copy=True).reshape(())}
            state[number] |= {key: _unpadded(name, optimizer[f"{name}.{key}"], shapes[name]) for key in MOMENTS}
    return state, param_groups
