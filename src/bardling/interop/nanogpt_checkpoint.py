"""nanoGPT's checkpoints, `ckpt.pt`: read, and written so that nanoGPT samples from them and goes on training.

A file holds the keys `model` (state dict, head included), `optimizer` (AdamW's), `model_args`, `iter_num`, `best_val_loss` and
`config`. Its `iter_num` counts the updates done, as our `step` does.

Limits: nanoGPT's GELU is the exact one and its head is always tied; a model with the tanh GELU is written with a note, since
its logits differ a little there. The random state and the data's position are not in nanoGPT's file.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bardling.config import ModelConfig, RunConfig
from bardling.data.tokenizer import Tokenizer
from bardling.errors import UserError
from bardling.files import remove_abandoned, replacing, told_plainly, write_whole
from bardling.interop.imported import (
    EMBEDDING,
    HEAD,
    MOMENTS,
    SIZES,
    ImportedCheckpoint,
    adamw_state,
    described_model,
    loss_in,
    model_weights,
    number_in,
    optimizer_order,
    parameter_shapes,
    text_keys,
    whole_in,
)
from bardling.interop.nanogpt import nanogpt_settings
from bardling.interop.torchfile import load_torch_file

_NO_LOSS_YET = 1e9  # nanoGPT's best_val_loss before the first evaluation


def read_nanogpt_checkpoint(path: Path) -> ImportedCheckpoint:
    """Read nanoGPT's checkpoint at `path`.

    Raises:
        UserError: with the file's name, if it is damaged, holds anything executable, or does not fit its own description.
    """
    content = text_keys(path, load_torch_file(path), "content")
    missing = [key for key in ("model", "model_args") if key not in content]
    if missing:
        raise UserError(f"{path}: lacks {missing[0]!r}: it is not a checkpoint of nanoGPT")
    args = text_keys(path, content["model_args"], "model_args")
    state = text_keys(path, content["model"], "model")
    # Files from before nanoGPT's bias and dropout settings have neither key; biases were always there then.
    bias = args.get("bias", True)
    dropout = number_in(path, args, "dropout") if "dropout" in args else 0.0
    if not isinstance(bias, bool):
        raise UserError(f"{path}: its 'bias' is neither True nor False")
    config = described_model(path, args, bias=bias, dropout=dropout, gelu="erf")
    best = loss_in(path, content, "best_val_loss")
    settings = text_keys(path, content.get("config", {}), "config")
    return ImportedCheckpoint(
        origin="nanoGPT",
        config=config,
        weights=model_weights(path, state, config),
        optimizer=adamw_state(path, content["optimizer"], config) if "optimizer" in content else None,
        step=whole_in(path, content, "iter_num", 0) if "iter_num" in content else 0,
        best_val_loss=None if best == _NO_LOSS_YET else best,
        settings={key: value for key, value in settings.items() if isinstance(value, bool | int | float | str)},
    )


def write_nanogpt_checkpoint(
    path: Path,
    *,
    config: RunConfig,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor] | None,
    step: int,
    best_val_loss: float | None,
    dataset: str,
    overwrite: bool = False,
) -> list[str]:
    """Write a `ckpt.pt` that nanoGPT's programs accept.

    Args:
        path: the file to make, usually `OUT_DIR/ckpt.pt`; its folder is made when it is missing.
        config: the run's configuration, `model.vocab_size` known.
        weights: the model's parameters by name, the embedding padded or not.
        optimizer: AdamW's tensors by name as `optimizer_tensors` gives them; None, or another optimizer's, leaves Adam's state
            empty, and nanoGPT starts it afresh.
        step: updates done.
        best_val_loss: nats per token; None before the first validation.
        dataset: the folder below nanoGPT's `data/` in which its sample.py looks for a meta.pkl.

    Returns:
        What nanoGPT will not do as here, one sentence each.

    Raises:
        UserError: the file exists, cannot be written, or the weights do not fit the configuration.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already: remove it or choose another folder")
    model, notes = config.model, []
    if model.gelu != "erf":
        notes.append(
            "this model was trained with the tanh GELU and nanoGPT computes the exact one: its losses will differ slightly"
        )
    if config.optim.schedule in ("linear", "wsd"):
        notes.append(f"nanoGPT has no {config.optim.schedule} schedule and will follow a cosine")
    shapes = parameter_shapes(model)
    rows = {name: _rows(name, weights.get(name), shapes[name]) for name in shapes}
    state, groups = _numbered(model, config, optimizer, shapes)
    if not state:
        notes.append("there is no AdamW state in it, so nanoGPT starts its optimizer afresh")
    content = {
        "model": {**rows, HEAD: rows[EMBEDDING]},  # one storage under two names, as in nanoGPT's own files
        "optimizer": {"state": state, "param_groups": groups},
        "model_args": {**{key: getattr(model, key) for key in SIZES}, "bias": model.bias, "dropout": model.dropout},
        "iter_num": step,
        "best_val_loss": torch.tensor(_NO_LOSS_YET if best_val_loss is None else best_val_loss),
        "config": nanogpt_settings(config, path.parent, dataset),
    }
    _save(path, content)
    return notes


def write_meta(path: Path, tokenizer: Tokenizer) -> None:
    """Write the `meta.pkl` by which nanoGPT's sample.py knows a vocabulary of characters: a dict of plain values.

    The token that ends a document, where there is one, stands in its tables under its name.

    Raises:
        UserError: the file exists or cannot be written, or the tokenizer's tokens are not characters.
    """
    if path.exists():
        raise UserError(f"{path}: exists already: remove it or choose another folder")
    if tokenizer.kind != "char":
        raise UserError(f"{path}: a meta.pkl lists characters, and this model's tokenizer is of kind {tokenizer.kind!r}")
    itos = {number: tokenizer.decode([number]) for number in range(tokenizer.vocab_size)}
    remove_abandoned(path)
    meta = {"vocab_size": tokenizer.vocab_size, "itos": itos, "stoi": {text: number for number, text in itos.items()}}
    write_whole(path, pickle.dumps(meta, protocol=4))


def _rows(name: str, value: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """`value` on the CPU in float32 without the padding's rows, as a tensor of its own (a view would be saved whole)."""
    if (
        value is None
        or value.shape[1:] != shape[1:]
        or value.size(0) < shape[0]
        or (value.size(0) > shape[0] and name != EMBEDDING)
    ):
        found = "missing" if value is None else list(value.shape)
        raise UserError(f"the tensor {name!r} is {found}, but this model's is {list(shape)}")
    return value.detach()[: shape[0]].to("cpu", torch.float32, copy=True).contiguous()


def _numbered(
    model: ModelConfig, config: RunConfig, optimizer: Mapping[str, Tensor] | None, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[int, dict[str, Tensor]], list[dict[str, Any]]]:
    """AdamW's state under nanoGPT's numbers, and its two groups with the keys that this PyTorch's AdamW has."""
    order = optimizer_order(shapes)
    optim = config.optim
    blank = [[torch.zeros(1, requires_grad=True) for _ in names] for names in order]
    groups = [{"params": blank[0], "weight_decay": optim.weight_decay}, {"params": blank[1], "weight_decay": 0.0}]
    described = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps).state_dict()["param_groups"]
    state: dict[int, dict[str, Tensor]] = {}
    names = [*order[0], *order[1]]
    if optimizer is not None and all(f"{name}.{key}" in optimizer for name in names for key in (*MOMENTS, "step")):
        for number, name in enumerate(names):
            state[number] = {"step": optimizer[f"{name}.step"].detach().to("cpu", torch.float32, copy=True).reshape(())}
            for key in MOMENTS:
                state[number][key] = _rows(name, optimizer[f"{name}.{key}"], shapes[name])
    return state, described


def _save(path: Path, content: dict[str, Any]) -> None:
    """`torch.save` beside `path`, synced and renamed into place."""
    with told_plainly(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        try:
            with replacing(path) as file:
                torch.save(content, file)
        except RuntimeError as error:  # PyTorch's writer hides the system's reason, such as a full disk, in one of these
            raise UserError(f"{path}: cannot write: {str(error).splitlines()[0][:200]}") from None
