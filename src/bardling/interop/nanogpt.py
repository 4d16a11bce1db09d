"""Translates nanoGPT's settings, so that its configuration files and flags start the same run here, and back for exports.

Whatever has no exact equivalent is reported in notes, which the command line prints and a migrated recipe contains. Limits:
nanoGPT samples sequences at random with replacement and evaluates on random batches; here the order is a permutation and the
validation sequences are fixed. Runs therefore agree in distribution, not number by number.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from bardling.config.recipes import config_to_dict
from bardling.errors import UserError
from bardling.files.atomic import os_reason
from bardling.files.paths import expand_home, shell_path
from bardling.files.prompt import read_prompt_file
from bardling.interop.nanogpt_keys import NAMED_DATASETS, PLACES, SAMPLE_DEFAULTS, TRAIN_DEFAULTS
from bardling.interop.pretrained import GPT2_NAMES
from bardling.planning.presets import size

Precision = Literal["auto", "float32", "bfloat16", "float16"]

_SAME_IN_MODEL = ("n_layer", "n_head", "n_embd", "block_size", "dropout", "bias")
_COMPILE: dict[bool | None, Literal["auto", "on", "off"]] = {None: "auto", True: "on", False: "off"}


@dataclass(frozen=True)
class NanoGPTRun:
    """A nanoGPT training command, translated."""

    config: RunConfig
    out: Path  # its out_dir: the run folder, which also holds the ckpt.pt to resume from
    init_from: str  # 'scratch', 'resume' or the name of a GPT-2 model
    eval_only: bool  # evaluate once and stop, regardless of init_from
    notes: list[str]  # differences from nanoGPT, one sentence each


def run_config_from_nanogpt(settings: Mapping[str, Any], world_size: int = 1, data_parents: Sequence[Path] = ()) -> NanoGPTRun:
    """Translate the settings of nanoGPT's training program; errors use nanoGPT's names.

    Args:
        settings: the keys that were set; the others take nanoGPT's defaults, but device, dtype and compile become 'auto'.
        world_size: number of processes; `gradient_accumulation_steps` is the total over them and must be divisible by it.
        data_parents: folders besides the working directory in whose `data/` the dataset is searched.
    """
    values = {**TRAIN_DEFAULTS, **settings}
    notes: list[str] = []
    init_from: str = values["init_from"]
    if init_from not in ("scratch", "resume", *GPT2_NAMES):
        raise UserError(f"init_from = {init_from!r}: choose scratch, resume or one of {', '.join(GPT2_NAMES)}")
    _check_counts(values, world_size)
    micro = values["batch_size"]
    wandb = MonitorConfig(wandb="online", wandb_project=values["wandb_project"], wandb_name=values["wandb_run_name"])
    try:
        config = RunConfig(
            seed=1337,
            device=settings.get("device", "auto"),
            precision=_precision(settings, notes),
            compile=_COMPILE[settings.get("compile")],
            data=_data(values["dataset"], data_parents, notes),
            model=_model(values, init_from, notes),
            optim=_optim(values, notes),
            train=TrainConfig(
                steps=max(1, values["max_iters"]),
                batch_size=micro * values["gradient_accumulation_steps"],
                micro_batch=micro,
                grad_clip=values["grad_clip"],
                log_every=values["log_interval"],
            ),
            eval=EvalConfig(every=values["eval_interval"], windows=values["eval_iters"] * micro),
            checkpoint=CheckpointConfig(
                every=values["eval_interval"] if values["always_save_checkpoint"] else 0, save_best=True
            ),
            monitor=wandb if values["wandb_log"] else MonitorConfig(),
        )
    except UserError as error:
        raise UserError(_with_nanogpt_names(str(error))) from None
    if "max_iters" in settings:
        notes.append("nanoGPT does one step more than max_iters; here max_iters steps are done, and the last one is saved")
    if "backend" in settings:
        notes.append(f"backend = {values['backend']!r} is ignored: nccl is used on CUDA, gloo elsewhere")
    if not values["always_save_checkpoint"]:
        notes.append("the last step's checkpoint is kept besides the one with the best validation loss")
    return NanoGPTRun(config, Path(expand_home(values["out_dir"])), init_from, values["eval_only"], notes)


def _check_counts(values: Mapping[str, Any], world_size: int) -> None:
    for key in ("gradient_accumulation_steps", "batch_size", "eval_iters", "eval_interval", "log_interval", "block_size"):
        if values[key] < 1:
            raise UserError(f"{key} = {values[key]}: must be at least 1")
    accumulation = values["gradient_accumulation_steps"]
    if accumulation % world_size:
        nearest = max(1, round(accumulation / world_size)) * world_size
        raise UserError(
            f"gradient_accumulation_steps = {accumulation} is the total over all processes and not divisible by {world_size}: "
            f"try --gradient_accumulation_steps={nearest}"
        )


def _model(values: Mapping[str, Any], init_from: str, notes: list[str]) -> ModelConfig:
    block_size, dropout = values["block_size"], values["dropout"]
    if init_from in GPT2_NAMES:
        model = size(init_from)
        if block_size > model.block_size:
            raise UserError(f"block_size = {block_size}: {init_from} has {model.block_size} positions; use at most that many")
        notes.append(f"{init_from} uses the tanh GELU that it was trained with; nanoGPT uses the exact GELU")
        return replace(model, block_size=block_size, dropout=dropout, init=init_from)
    return ModelConfig(**{key: values[key] for key in _SAME_IN_MODEL}, gelu="erf")


def _optim(values: Mapping[str, Any], notes: list[str]) -> OptimConfig:
    lr = values["learning_rate"]
    common = OptimConfig(lr=lr, weight_decay=values["weight_decay"], betas=(values["beta1"], values["beta2"]), min_lr=0.0)
    if not values["decay_lr"]:
        return replace(common, schedule="constant", warmup_steps=0, min_lr=None)
    warmup, end, low = values["warmup_iters"], values["lr_decay_iters"], values["min_lr"]
    if low > lr:
        raise UserError(
            f"min_lr = {low} is above learning_rate = {lr}: lower min_lr, or set decay_lr = False for a constant learning rate"
        )
    if warmup >= end:
        raise UserError(
            f"warmup_iters = {warmup} leaves no steps for the decay, which ends at lr_decay_iters = {end}: lower warmup_iters"
        )
    if end > values["max_iters"]:
        notes.append(
            f"the learning rate is still decaying when the run ends: lr_decay_iters = {end}, max_iters = {values['max_iters']}"
        )
    return replace(common, schedule="cosine", warmup_steps=warmup, decay_steps=end, min_lr=low)


def _data(dataset: str, parents: Sequence[Path], notes: list[str]) -> DataConfig:
    """The dataset's folder where nanoGPT keeps it, or one of the datasets available by name."""
    for base in (Path(), *parents):
        folder = base / "data" / dataset
        try:
            if dataset and (folder / "train.bin").is_file():
                return DataConfig(source=str(folder))
        except OSError as error:  # the name is too long, for example
            raise UserError(f"dataset = {dataset[:60]!r}: cannot be opened ({os_reason(error).lower()})") from error
    if dataset in NAMED_DATASETS:
        source, tokenizer = NAMED_DATASETS[dataset]
        notes.append(f"there is no data/{dataset}/train.bin, so the dataset {source!r} is prepared instead")
        return DataConfig(source=source, tokenizer=tokenizer)
    notes.append(f"there is no data/{dataset}/train.bin")
    return DataConfig(source=str(Path("data") / dataset))


def _precision(settings: Mapping[str, Any], notes: list[str]) -> Precision:
    """nanoGPT uses dtype only on CUDA, and float32 everywhere else."""
    dtype = settings.get("dtype")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"dtype = {dtype!r}: choose float32, bfloat16 or float16")
    if "cuda" in settings.get("device", "cuda"):
        return dtype or "auto"
    if dtype not in (None, "float32"):
        notes.append(f"dtype = {dtype!r} only takes effect on CUDA in nanoGPT, so precision is float32 here")
    return "float32"


def _with_nanogpt_names(message: str) -> str:
    """Replace our setting names in an error by nanoGPT's: `--model.n_embd 96` becomes `--n_embd=96`."""
    for ours, theirs in PLACES.items():
        if "." in ours:
            message = re.sub(rf"--{re.escape(ours)} (\S+)", rf"--{theirs}=\1", message)
            message = re.sub(rf"(?<![\w.]){re.escape(ours)}(?![\w.])", theirs, message)
    return message


def sample_from_nanogpt(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the settings of nanoGPT's sampling program to the options of `bardling sample`, and nanoGPT's `compile`.

    `start = 'FILE:x'` reads the prompt from the file `x`.
    """
    values = {**SAMPLE_DEFAULTS, **settings}
    if values["init_from"] not in ("resume", *GPT2_NAMES):
        raise UserError(f"init_from = {values['init_from']!r}: choose resume or one of {', '.join(GPT2_NAMES)}")
    start: str = values["start"]
    return {
        "model": expand_home(values["out_dir"]) if values["init_from"] == "resume" else values["init_from"],
        "prompt": read_prompt_file(start[5:]) if start.startswith("FILE:") else start,
        **{key: values[key] for key in ("num_samples", "max_new_tokens", "temperature", "top_k", "seed", "compile")},
        "device": settings.get("device", "auto"),
        "precision": _precision(settings, []),
    }


def recipe_toml(run: NanoGPTRun, origin: str) -> str:
    """The equivalent recipe as TOML, with nanoGPT's names and the notes as comments; the first line names its `origin`."""
    header = [f"Made from {origin}.", f"Start it with: bardling train RECIPE --out {run.out}", *run.notes]
    if run.init_from == "resume":
        header.append(f"init_from was 'resume': `bardling resume {shell_path(run.out / 'ckpt.pt')}` continues that run")
    if run.eval_only:
        header.append("eval_only was set: use `bardling eval`")
    text = ["# " + "".join(char if char.isprintable() else " " for char in sentence) for sentence in header]
    values, defaults = config_to_dict(run.config), config_to_dict(RunConfig())
    tables = {"": (values, defaults)} | {key: (table, defaults[key]) for key, table in values.items() if type(table) is dict}
    for section, (table, default) in tables.items():
        changed = {key: value for key, value in table.items() if type(value) is not dict and value != default.get(key)}
        lines = [_toml_line(f"{section}.{key}".lstrip("."), value) for key, value in changed.items()]
        if lines:
            text += ["", *([f"[{section}]"] if section else []), *lines]
    return "\n".join(text) + "\n"


def _toml_line(place: str, value: Any) -> str:
    import tomli_w  # imported here because only `migrate` writes TOML

    key = place.rpartition(".")[2]
    text = tomli_w.dumps({key: value}).strip()
    text = re.sub(r",?\n\]", "]", re.sub(r"\[\n\s*", "[", text)).replace(",\n    ", ", ")
    return f"{text}  # {PLACES[place]}" if PLACES.get(place, key) != key else text


def nanogpt_settings(config: RunConfig, out: Path, dataset: str) -> dict[str, Any]:
    """The reverse of `run_config_from_nanogpt`: all 33 training keys, as an exported checkpoint contains them. `out` is the
    folder that nanoGPT would use as out_dir, `dataset` the one below its `data/` where it looks for meta.pkl.
    """
    model, optim, train = config.model, config.optim, config.train
    micro = math.gcd(train.micro_batch if isinstance(train.micro_batch, int) else train.batch_size, train.batch_size)
    values = {
        "out_dir": os.fspath(out),
        "eval_interval": config.eval.every or train.steps,
        "log_interval": train.log_every,
        "eval_iters": max(1, config.eval.windows // micro),
        "always_save_checkpoint": config.checkpoint.every != 0,
        "dataset": dataset,
        "gradient_accumulation_steps": train.batch_size // micro,
        "batch_size": micro,
        **{key: getattr(model, key) for key in _SAME_IN_MODEL},
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
