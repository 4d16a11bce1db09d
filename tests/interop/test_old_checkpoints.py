"""Checkpoints of nanoGPT and nano-gpt: read with equal logits, written as nanoGPT has them, refused when they hold programs."""

import math
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bardling.config import RunConfig
from bardling.errors import UserError
from bardling.interop.nano_gpt import read_nano_gpt_checkpoint, run_config_from_nano_gpt
from bardling.interop.nanogpt import run_config_from_nanogpt
from bardling.interop.nanogpt_checkpoint import read_nanogpt_checkpoint, write_nanogpt_checkpoint
from bardling.interop.nanogpt_keys import TRAIN_DEFAULTS
from bardling.model.gpt import GPT
from bardling.optim.build import build_optimizer
from bardling.optim.serialization import load_optimizer_tensors, optimizer_tensors

ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 6, "vocab_size": 13}


def state_dict(bias: bool, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names and in the order of nanoGPT's state dict, the head last and sharing its storage."""
    generator = torch.Generator().manual_seed(seed)
    width, state = ARGS["n_embd"], {}

    def add(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(*shape, generator=generator) * 0.3
        if bias and not name.endswith(("wte", "wpe")):
            state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.3

    add("transformer.wte", ARGS["vocab_size"], width)
    add("transformer.wpe", ARGS["block_size"], width)
    for layer in range(ARGS["n_layer"]):
        block = f"transformer.h.{layer}"
        add(f"{block}.ln_1", width)
        add(f"{block}.attn.c_attn", 3 * width, width)
        add(f"{block}.attn.c_proj", width, width)
        add(f"{block}.ln_2", width)
        add(f"{block}.mlp.c_fc", 4 * width, width)
        add(f"{block}.mlp.c_proj", width, 4 * width)
    add("transformer.ln_f", width)
    return {**state, "lm_head.weight": state["transformer.wte.weight"]}


def reference(state: dict[str, Tensor], tokens: Tensor, gelu: str) -> Tensor:
    """A GPT-2's logits, head by head and without any of the package's code: tokens [T] -> [T, V]."""

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state.get(f"{name}.bias", 0.0)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)

    time, size = len(tokens), ARGS["n_embd"] // ARGS["n_head"]
    x = state["transformer.wte.weight"][tokens] + state["transformer.wpe.weight"][:time]
    for layer in range(ARGS["n_layer"]):
        block = f"transformer.h.{layer}"
        q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, -1)
        heads = []
        for h in range(ARGS["n_head"]):
            one = slice(h * size, (h + 1) * size)
            scores = (q[:, one] @ k[:, one].T / math.sqrt(size)).masked_fill(torch.ones(time, time).triu(1) > 0, -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, one])
        x = x + linear(torch.cat(heads, -1), f"{block}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"), approximate=gelu), f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["transformer.wte.weight"].T


def adamw(state: dict[str, Tensor]) -> dict[str, Any]:
    """The state dict of an AdamW with nanoGPT's two groups after two steps; every moment identifies its parameter."""
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in state.items() if name != "lm_head.weight"}
    groups = [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for scale in (1.0, 2.0):
        for name, parameter in parameters.items():
            parameter.grad = state[name] * scale
        optimizer.step()
    return optimizer.state_dict()


def nanogpt_file(bias: bool, prefix: str = "") -> dict[str, Any]:
    state = state_dict(bias)
    return {
        "model": {prefix + name: value for name, value in state.items()},
        "optimizer": adamw(state),
        "model_args": {**ARGS, "bias": bias, "dropout": 0.1},
        "iter_num": 2,
        "best_val_loss": torch.tensor(2.5),
        "config": {**TRAIN_DEFAULTS, **ARGS, "out_dir": "out", "bias": bias, "dataset": "plays"},
    }


def saved(tmp_path: Path, content: object, name: str = "ckpt.pt") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_logits(tmp_path: Path, bias: bool, prefix: str) -> None:
    imported = read_nanogpt_checkpoint(saved(tmp_path, nanogpt_file(bias, prefix)))
    model = GPT(imported.config, seed=None)
    model.load_state_dict(imported.weights)
    tokens = torch.tensor([3, 12, 0, 7, 7, 1])
    expected = reference(state_dict(bias), tokens, "none")
    torch.testing.assert_close(model.eval()(tokens[None])[0], expected, rtol=1e-5, atol=1e-5)
    assert (imported.step, imported.best_val_loss, imported.config.dropout, imported.config.gelu) == (2, 2.5, 0.1, "erf")
    assert imported.weights["transformer.wte.weight"].shape == (64, 8)
    assert not imported.weights["transformer.wte.weight"][13:].any()
    assert run_config_from_nanogpt(imported.settings).config.model.n_embd == 8


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_adam_state_goes_to_its_parameters(tmp_path: Path, bias: bool) -> None:
    content = nanogpt_file(bias)
    imported = read_nanogpt_checkpoint(saved(tmp_path, content))
    assert imported.optimizer is not None
    start = state_dict(bias)
    for name, value in start.items():
        if name != "lm_head.weight":
            # Gradients w and 2w: the mean is 0.9 * 0.1 w + 0.1 * 2w.
            moment = imported.optimizer[f"{name}.exp_avg"][: len(value)]
            torch.testing.assert_close(moment, value * 0.29)
            assert imported.optimizer[f"{name}.step"] == 2
    # The state loads into the optimizer of a run, and one update there gives what one update gives here.
    model = GPT(imported.config, seed=None)
    model.load_state_dict(imported.weights)
    names = dict(model.named_parameters())
    optimizer = build_optimizer(names.items(), RunConfig().optim, torch.device("cpu"))
    load_optimizer_tensors(optimizer, names, imported.optimizer, imported.optimizer_meta)
    back, _ = optimizer_tensors(optimizer, names)
    assert back.keys() == imported.optimizer.keys()
    assert all(torch.equal(back[key], imported.optimizer[key]) for key in back)


def test_old_nanogpt_files_with_sorted_groups_and_masks(tmp_path: Path) -> None:
    content = nanogpt_file(True)
    names = [name for name in content["model"] if name != "lm_head.weight"]
    decayed = [name for name in names if content["model"][name].dim() >= 2]
    order = [*decayed, *(name for name in names if name not in decayed)]
    ordered = [*sorted(decayed), *sorted(name for name in names if name not in decayed)]
    state = content["optimizer"]["state"]
    content["optimizer"]["state"] = {i: state[order.index(name)] for i, name in enumerate(ordered)}
    content["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, 6, 6)
    del content["model_args"]["bias"], content["model_args"]["dropout"], content["config"]
    imported = read_nanogpt_checkpoint(saved(tmp_path, content))
    assert imported.optimizer is not None
    assert imported.config.bias
    assert imported.settings == {}
    name = "transformer.h.1.mlp.c_fc.weight"
    torch.testing.assert_close(imported.optimizer[f"{name}.exp_avg"], content["model"][name] * 0.29)


def same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("bias", [True, False])
def test_round_trip_is_equal_to_the_bit(tmp_path: Path, bias: bool) -> None:
    content = nanogpt_file(bias)
    imported = read_nanogpt_checkpoint(saved(tmp_path, content))
    config = replace(run_config_from_nanogpt({**imported.settings, "learning_rate": 1e-3}).config, model=imported.config)
    path = tmp_path / "out" / "ckpt.pt"
    path.parent.mkdir()
    arguments: dict[str, Any] = {
        "config": config,
        "weights": imported.weights,
        "optimizer": imported.optimizer,
        "step": imported.step,
        "best_val_loss": imported.best_val_loss,
        "out": path.parent,
        "dataset": "plays",
    }
    assert write_nanogpt_checkpoint(path, **arguments) == []
    written = torch.load(path, weights_only=True)
    for key in ("model", "optimizer", "model_args", "iter_num", "best_val_loss"):
        assert same(written[key], content[key]), key
    assert list(written) == list(content)
    assert written["model"]["lm_head.weight"].data_ptr() == written["model"]["transformer.wte.weight"].data_ptr()
    assert list(written["config"]) == list(TRAIN_DEFAULTS)
    again = read_nanogpt_checkpoint(path)
    assert same(again.weights, imported.weights)
    assert same(again.optimizer, imported.optimizer)
    assert path.stat().st_size < 1.5 * (tmp_path / "ckpt.pt").stat().st_size  # the padding's rows are not saved along
    tanh = replace(config, model=replace(config.model, gelu="tanh"))
    notes = write_nanogpt_checkpoint(path, **{**arguments, "optimizer": {}, "config": tanh})
    assert ["tanh" in notes[0], "optimizer from scratch" in notes[1]] == [True, True]
    assert read_nanogpt_checkpoint(path).optimizer is None
    assert not list((tmp_path / "out").glob(".*"))


def nano_gpt_file() -> dict[str, Any]:
    state = state_dict(bias=True)
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    return {
        "model_state_dict": {**state, "transformer.h.0.attn.bias": torch.ones(1, 1, 6, 6).tril()},
        "config": ARGS,
        "step": 2,
        "val_loss_accum": 3.5,
        "optimizer_state_dict": adamw(state),
        "train_config": {
            **{"seed": 1, "step": 2, "total_batch_size": 48, "micro_batch_size": 2, "sequence_length": 6, "max_lr": 1e-3},
            **{"min_lr_ratio": 0.1, "warmup_steps": 715, "max_steps": 50, "eval_steps": 10, "checkpoint_steps": 20},
            **{"checkpoint_dir": "c", "log_file": None},
        },
        "dataset_config": {"dataset_dir": "d", "dataset_name": "x", "micro_batch_size": 2, "sequence_length": 6},
        "eval_config": {"validation_steps": 20, "hellaswag_samples": None},
        "sample_config": {"num_return_sequences": 5, "max_length": 30, "text": "Hello", "seed": 42},
        "name": None,
    }


def test_nano_gpt(tmp_path: Path) -> None:
    imported = read_nano_gpt_checkpoint(saved(tmp_path, nano_gpt_file(), "checkpoint_000002.bin"))
    model = GPT(imported.config, seed=None)
    model.load_state_dict(imported.weights)
    tokens = torch.tensor([3, 12, 0, 7, 7, 1])
    expected = reference(state_dict(bias=True), tokens, "tanh")
    torch.testing.assert_close(model.eval()(tokens[None])[0], expected, rtol=1e-5, atol=1e-5)
    assert imported.optimizer is not None
    assert (imported.step, imported.best_val_loss, imported.origin) == (2, 3.5, "nano-gpt")
    config = run_config_from_nano_gpt(imported)
    assert (config.train.batch_size, config.train.micro_batch, config.train.steps) == (8, 2, 50)
    assert (config.optim.warmup_steps, config.optim.lr, config.optim.final_lr) == (715, 1e-3, 1e-4)
    assert (config.eval.windows, config.sample.prompt, config.model) == (40, "Hello", imported.config)


def test_nano_gpt_without_optional_parts(tmp_path: Path) -> None:
    content = nano_gpt_file()
    for key in ("optimizer_state_dict", "val_loss_accum", "dataset_config", "eval_config", "sample_config", "step"):
        content[key] = None
    imported = read_nano_gpt_checkpoint(saved(tmp_path, content))
    assert (imported.optimizer, imported.best_val_loss, imported.step) == (None, None, 0)
    assert list(imported.settings) == ["train_config"]


class Creates:
    """Pickles into a program that makes the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("read", [read_nanogpt_checkpoint, read_nano_gpt_checkpoint])
def test_a_program_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, read: Any) -> None:
    victim = tmp_path / "made"
    for content in ({**nanogpt_file(True), **nano_gpt_file(), "extra": Creates(victim)}, Creates(victim)):
        path = saved(tmp_path, content)
        with pytest.raises(UserError, match=r"ckpt\.pt: refused") as caught:
            read(path)
        assert "mkdir" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not victim.exists()
    torch.load(path, weights_only=False)  # it does run where pickles are run: the test can fail
    assert victim.exists()


def test_files_that_are_no_archive_or_an_odd_one(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    with pytest.raises(UserError, match="no such file"):
        read_nanogpt_checkpoint(path)
    torch.save(nanogpt_file(True), path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="zip format"):
        read_nanogpt_checkpoint(path)
    torch.save(nanogpt_file(True), path)
    whole = path.read_bytes()
    for data in (b"", b"x" * 100, whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"ckpt\.pt"):
            read_nanogpt_checkpoint(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N.")
    with pytest.raises(UserError, match="compressed"):
        read_nanogpt_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("b/data.pkl", b"N.")
    with pytest.raises(UserError, match=r"2 members named data\.pkl"):
        read_nanogpt_checkpoint(path)


def broken(content: dict[str, Any], *keys: str, value: object) -> dict[str, Any]:
    """`content` with the entry at the path `keys` replaced, or removed when `value` is `...`."""
    table = content
    for key in keys[:-1]:
        table = table[key]
    if value is ...:
        del table[keys[-1]]
    else:
        table[keys[-1]] = value
    return content


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("model",), ..., "has no 'model'"),
        (("model_args",), [1], "model_args"),
        (("model_args", "n_layer"), 3, "the tensor 'transformer.h.2.*is missing"),
        (("model_args", "n_layer"), 1, "is not part of the model"),
        (("model_args", "n_layer"), 1 << 39, "n_layer = 549755813888"),
        (("model_args", "n_layer"), 900, "layers"),
        (("model_args", "n_head"), 3, "n_embd"),
        (("model_args", "n_embd"), 8.0, "n_embd"),
        (("model_args", "vocab_size"), 10**9, "wte"),
        (("model_args", "bias"), "no", "bias"),
        (("model_args", "dropout"), 2.0, "dropout"),
        (("model", "transformer.wpe.weight"), torch.zeros(1).expand(6, 8), "not stored contiguously"),
        (("model", "transformer.wpe.weight"), torch.zeros(6, 8, dtype=torch.int64), "int64"),
        (("model", "transformer.ln_f.weight"), "x", "is missing"),
        (("model", "lm_head.weight"), torch.zeros(13, 8), "head differs"),
        (("iter_num",), -1, "iter_num"),
        (("best_val_loss",), "low", "best_val_loss"),
        (("config",), 5, "config"),
        (("optimizer",), {}, "AdamW"),
        (("optimizer", "state"), {0: 1}, "does not match"),
        (("optimizer", "param_groups"), [], "two parameter groups"),
    ],
)
def test_checkpoints_that_do_not_fit_themselves(tmp_path: Path, keys: tuple[str, ...], value: object, words: str) -> None:
    path = saved(tmp_path, broken(nanogpt_file(True), *keys, value=value))
    with pytest.raises(UserError, match=words) as caught:
        read_nanogpt_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_diverged_run_has_no_best_loss(tmp_path: Path) -> None:
    for value in (torch.tensor(math.nan), 1e9):
        path = saved(tmp_path, {**nanogpt_file(False), "best_val_loss": value})
        assert read_nanogpt_checkpoint(path).best_val_loss is None
