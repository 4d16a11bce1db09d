"""nanoGPT's settings, translated: its configuration files and flags start the same run here.

`run_config_from_nanogpt` gives each training key the place where this project keeps that knob; `nanogpt_settings` is the
reverse and serves exported checkpoints. What cannot mean exactly the same is said in the notes of the result, which the
command line prints and a migrated recipe carries.

Limits: nanoGPT draws windows at random with replacement and evaluates on random batches; here the order is a permutation and
the validation windows are fixed, so runs agree in distribution and not number by number.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from bardling.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from bardling.configfile import read_text_file
from bardling.errors import UserError
from bardling.interop.nanogpt_keys import NAMED_DATASETS, PLACES, SAMPLE_DEFAULTS, TRAIN_DEFAULTS
from bardling.model.sizes import size

_GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
_GPT2_CONTEXT = 1024


@dataclass(frozen=True)
class NanoGPTRun:
    """A nanoGPT training command in this project's terms."""

    config: RunConfig
    out: Path
    """Its out_dir: the run folder, and where a ckpt.pt to resume from lies."""
    init_from: str
    """'scratch', 'resume' or the name of a GPT-2."""
    eval_only: bool
    """Evaluate once and stop, whatever init_from says."""
    notes: list[str] = field(default_factory=list)
    """What differs from nanoGPT, one sentence each."""


@dataclass(frozen=True)
class NanoGPTSample:
    """A nanoGPT sampling command in this project's terms."""

    model: str
    """A run folder with a ckpt.pt, or the name of a GPT-2."""
    prompt: str
    num_samples: int
    max_new_tokens: int
    temperature: float
    top_k: int | None
    seed: int
    device: str
    precision: Literal["auto", "float32", "bfloat16", "float16"]
    compile: bool


def run_config_from_nanogpt(settings: Mapping[str, Any], world_size: int = 1, near: Sequence[Path] = ()) -> NanoGPTRun:
    """Translate the settings of nanoGPT's training program.

    Args:
        settings: the keys that were set; the others take nanoGPT's defaults, but for device, dtype and compile, which are
            'auto' then.
        world_size: processes of the run; `gradient_accumulation_steps` is the total over them and must divide.
        near: folders in whose `data/` the dataset is looked for besides the working directory (those of the config files and
            their parents).

    Raises:
        UserError: a value that does not fit, in nanoGPT's names.
    """
    values = {**TRAIN_DEFAULTS, **settings}
    notes: list[str] = []
    init_from: str = values["init_from"]
    if init_from not in ("scratch", "resume", *_GPT2_NAMES):
        raise UserError(f"init_from = {init_from!r}: choose scratch, resume or one of {', '.join(_GPT2_NAMES)}")
    accumulation, micro = values["gradient_accumulation_steps"], values["batch_size"]
    for key in ("gradient_accumulation_steps", "batch_size", "eval_iters", "eval_interval", "log_interval", "block_size"):
        if values[key] < 1:
            raise UserError(f"{key} = {values[key]}: must be at least 1")
    if accumulation % world_size:
        near_multiple = max(1, round(accumulation / world_size)) * world_size
        raise UserError(
            f"gradient_accumulation_steps = {accumulation} counts all processes and does not divide by {world_size} of them: "
            f"try --gradient_accumulation_steps={near_multiple}"
        )
    try:
        config = RunConfig(
            seed=1337,
            device=settings.get("device", "auto"),
            precision=_precision(settings, notes),
            compile=_compile(settings),
            data=_data(values["dataset"], near, notes),
            model=_model(values, init_from, notes),
            optim=_optim(values, notes),
            train=TrainConfig(
                steps=max(1, values["max_iters"]),
                batch_size=micro * accumulation,
                micro_batch=micro,
                grad_clip=values["grad_clip"],
                log_every=values["log_interval"],
            ),
            eval=EvalConfig(every=values["eval_interval"], windows=values["eval_iters"] * micro),
            checkpoint=CheckpointConfig(
                every=values["eval_interval"] if values["always_save_checkpoint"] else 0, save_best=True
            ),
            monitor=MonitorConfig(
                wandb="online" if values["wandb_log"] else "off",
                wandb_project=values["wandb_project"] if values["wandb_log"] else MonitorConfig.wandb_project,
                wandb_name=values["wandb_run_name"] if values["wandb_log"] else "",
            ),
        )
    except UserError as error:
        raise UserError(_in_nanogpt_words(str(error))) from None
    if "max_iters" in settings:
        notes.append("nanoGPT runs one update more than max_iters; here max_iters updates are run, and the last one is saved")
    if "backend" in settings:
        notes.append(f"backend = {values['backend']!r} is not needed: nccl is used on CUDA, gloo elsewhere")
    if not values["always_save_checkpoint"]:
        notes.append("besides the checkpoint with the best validation loss, the last step's is kept")
    return NanoGPTRun(config, Path(values["out_dir"]), init_from, values["eval_only"], notes)


def _model(values: Mapping[str, Any], init_from: str, notes: list[str]) -> ModelConfig:
    block_size, dropout = values["block_size"], values["dropout"]
    if init_from in _GPT2_NAMES:
        if block_size > _GPT2_CONTEXT:
            raise UserError(f"block_size = {block_size}: {init_from} knows {_GPT2_CONTEXT} positions; lower it to at most that")
        notes.append(f"{init_from} is run with the GELU it was trained with (tanh); nanoGPT runs it with the exact one")
        return replace(size(init_from), block_size=block_size, dropout=dropout, init=init_from)
    return ModelConfig(
        n_layer=values["n_layer"],
        n_head=values["n_head"],
        n_embd=values["n_embd"],
        block_size=block_size,
        dropout=dropout,
        bias=values["bias"],
        gelu="erf",
    )


def _optim(values: Mapping[str, Any], notes: list[str]) -> OptimConfig:
    common = OptimConfig(
        lr=values["learning_rate"],
        weight_decay=values["weight_decay"],
        betas=(values["beta1"], values["beta2"]),
        min_lr=0.0,
    )
    if not values["decay_lr"]:
        return replace(common, schedule="constant", warmup_steps=0, min_lr=None)
    warmup, end, low = values["warmup_iters"], values["lr_decay_iters"], values["min_lr"]
    if low > values["learning_rate"]:
        raise UserError(
            f"min_lr = {low} is above learning_rate = {values['learning_rate']}: lower min_lr, or set decay_lr = False for a "
            "constant learning rate"
        )
    if warmup >= end:
        raise UserError(f"warmup_iters = {warmup} leaves nothing to decay before lr_decay_iters = {end}: lower warmup_iters")
    if end > values["max_iters"]:
        notes.append(
            f"the learning rate is still falling when the run ends: lr_decay_iters = {end}, max_iters = {values['max_iters']}"
        )
    return replace(common, schedule="cosine", warmup_steps=warmup, decay_steps=end, min_lr=low)


def _data(dataset: str, near: Sequence[Path], notes: list[str]) -> DataConfig:
    """The dataset's folder where nanoGPT keeps it, or one of the datasets that are known by name."""
    for base in (Path(), *near):
        folder = base / "data" / dataset
        if dataset and (folder / "train.bin").is_file():
            return DataConfig(source=str(folder))
    if dataset in NAMED_DATASETS:
        source, tokenizer = NAMED_DATASETS[dataset]
        notes.append(f"there is no data/{dataset}/train.bin here, so the dataset {source!r} is made by name")
        return DataConfig(source=source, tokenizer=tokenizer)
    notes.append(f"there is no folder data/{dataset} with a train.bin here")
    return DataConfig(source=str(Path("data") / dataset))


def _precision(settings: Mapping[str, Any], notes: list[str]) -> Literal["auto", "float32", "bfloat16", "float16"]:
    """nanoGPT uses dtype on CUDA only and computes in float32 elsewhere, whatever dtype says."""
    if settings.get("dtype", "float32") not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype = {settings['dtype']!r}: choose float32, bfloat16 or float16")
    if "cuda" not in settings.get("device", "cuda"):
        if settings.get("dtype", "float32") != "float32":
            notes.append(f"dtype = {settings['dtype']!r} has no effect off CUDA in nanoGPT, so precision is float32 here too")
        return "float32"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = settings.get("dtype", "auto")
    return precision


def _compile(settings: Mapping[str, Any]) -> Literal["auto", "on", "off"]:
    if "compile" not in settings:
        return "auto"
    return "on" if settings["compile"] else "off"


def _in_nanogpt_words(message: str) -> str:
    """Replace our names of settings by nanoGPT's in an error: `--model.n_embd 96` becomes `--n_embd=96`."""
    for ours, theirs in PLACES.items():
        if "." in ours:
            message = re.sub(rf"--{re.escape(ours)} (\S+)", rf"--{theirs}=\1", message)
            message = re.sub(rf"(?<![\w.]){re.escape(ours)}(?![\w.])", theirs, message)
    return message


def sample_from_nanogpt(settings: Mapping[str, Any]) -> NanoGPTSample:
    """Translate the settings of nanoGPT's sampling program; `start = 'FILE:x'` takes its text from the file `x`.

    Raises:
        UserError: the prompt's file cannot be read, or a value does not fit.
    """
    values = {**SAMPLE_DEFAULTS, **settings}
    if values["init_from"] not in ("resume", *_GPT2_NAMES):
        raise UserError(f"init_from = {values['init_from']!r}: choose resume or one of {', '.join(_GPT2_NAMES)}")
    start: str = values["start"]
    return NanoGPTSample(
        model=values["out_dir"] if values["init_from"] == "resume" else values["init_from"],
        prompt=read_text_file(Path(start[5:])) if start.startswith("FILE:") else start,
        num_samples=values["num_samples"],
        max_new_tokens=values["max_new_tokens"],
        temperature=values["temperature"],
        top_k=values["top_k"],
        seed=values["seed"],
        device=settings.get("device", "auto"),
        precision=_precision(settings, []),
        compile=values["compile"],
    )


def recipe_toml(run: NanoGPTRun, origin: str) -> str:
    """The equivalent recipe as TOML: what differs from the defaults, each line with nanoGPT's name, and the notes on top.

    Args:
        run: a translated command.
        origin: what it was made from, for the first line.
    """
    import tomli_w  # here, because only `migrate` writes TOML

    def line(prefix: str, config: Any) -> list[str]:
        default, lines = type(config)(), []
        for item in fields(config):
            value = getattr(config, item.name)
            if item.name in _SECTIONS or value == getattr(default, item.name) or value is None:
                continue
            key = prefix + item.name
            text = tomli_w.dumps({item.name: list(value) if isinstance(value, tuple) else value}).strip()
            text = re.sub(r",?\n\]", "]", re.sub(r"\[\n\s*", "[", text)).replace(",\n    ", ", ")
            lines.append(f"{text}  # {PLACES[key]}" if key in PLACES and PLACES[key] != item.name else text)
        return lines

    head = [f"Made from {origin}.", f"Start it with: bardling train RECIPE --out {run.out}", *run.notes]
    if run.init_from == "resume":
        head.append(f"init_from was 'resume': `bardling resume {run.out / 'ckpt.pt'}` goes on with it")
    if run.eval_only:
        head.append("eval_only was set: `bardling eval` does that")
    text = ["# " + "".join(char if char.isprintable() else " " for char in sentence) for sentence in head] + [
        "",
        *line("", run.config),
    ]
    for name in _SECTIONS:
        lines = line(f"{name}.", getattr(run.config, name))
        text += ["", f"[{name}]", *lines] if lines else []
    return "\n".join(text) + "\n"


_SECTIONS = tuple(item.name for item in fields(RunConfig) if hasattr(getattr(RunConfig(), item.name), "__dataclass_fields__"))


def nanogpt_settings(config: RunConfig, out: Path, dataset: str) -> dict[str, Any]:
    """The reverse of `run_config_from_nanogpt`: all 33 training keys, as an exported checkpoint carries them.

    Args:
        config: a run's configuration, its vocabulary known.
        out: the folder nanoGPT would use as out_dir.
        dataset: the folder below nanoGPT's `data/` in which it looks for a meta.pkl.
    """
    model, optim, train = config.model, config.optim, config.train
    asked = train.micro_batch if isinstance(train.micro_batch, int) else train.batch_size
    micro = math.gcd(asked, train.batch_size)
    values = {
        "out_dir": os.fspath(out),
        "eval_interval": config.eval.every or train.steps,
        "log_interval": train.log_every,
        "eval_iters": max(1, config.eval.windows // micro),
        "always_save_checkpoint": config.checkpoint.every != 0,
        "dataset": dataset,
        "gradient_accumulation_steps": train.batch_size // micro,
        "batch_size": micro,
        **{key: getattr(model, key) for key in ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")},
        "learning_rate": optim.lr,
        "max_iters": train.steps,
        "weight_decay": optim.weight_decay,
        "beta1": optim.betas[0],
        "beta2": optim.betas[1],
        "grad_clip": train.grad_clip,
        "decay_lr": optim.schedule != "constant",
        "warmup_iters": optim.warmup_steps,
        "lr_decay_iters": optim.decay_steps or train.steps,
        "min_lr": optim.final_lr,
        "device": "cuda" if config.device == "auto" else config.device,
        "dtype": TRAIN_DEFAULTS["dtype"] if config.precision == "auto" else config.precision,
        "compile": config.compile == "on",
    }
    return {key: values.get(key, default) for key, default in TRAIN_DEFAULTS.items()}
