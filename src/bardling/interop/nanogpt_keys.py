"""All keys of nanoGPT's three programs, with their defaults and the settings they correspond to here.

Data only; `interop/nanogpt.py` does the translation. `type(default)` is a key's type, as in nanoGPT itself.
"""

from collections.abc import Mapping
from typing import Any

from bardling.interop.python_config import Kind

TRAIN_DEFAULTS: Mapping[str, Any] = {
    **{"out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "eval_only": False},
    **{"always_save_checkpoint": True, "init_from": "scratch"},
    **{"wandb_log": False, "wandb_project": "owt", "wandb_run_name": "gpt2"},
    **{"dataset": "openwebtext", "gradient_accumulation_steps": 40, "batch_size": 12, "block_size": 1024},
    **{"n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False},
    **{"learning_rate": 6e-4, "max_iters": 600_000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0},
    **{"decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600_000, "min_lr": 6e-5},
    **{"backend": "nccl", "device": "cuda", "dtype": "bfloat16", "compile": True},
}
"""All keys of nanoGPT's train.py, in its order. Its `dtype` defaults to float16 if the GPU does not support bfloat16."""

SAMPLE_DEFAULTS: Mapping[str, Any] = {
    **{"init_from": "resume", "out_dir": "out", "start": "\n", "num_samples": 10, "max_new_tokens": 500, "temperature": 0.8},
    **{"top_k": 200, "seed": 1337, "device": "cuda", "dtype": "bfloat16", "compile": False},
}
"""All keys of nanoGPT's sample.py."""

BENCH_DEFAULTS: Mapping[str, Any] = {
    **{key: TRAIN_DEFAULTS[key] for key in ("batch_size", "block_size", "bias", "device", "dtype", "compile")},
    **{"real_data": True, "seed": 1337, "profile": False},
}
"""All keys of nanoGPT's bench.py."""

TRAIN_KEYS: Mapping[str, Kind] = {key: type(value) for key, value in TRAIN_DEFAULTS.items()}
SAMPLE_KEYS: Mapping[str, Kind] = {key: type(value) for key, value in SAMPLE_DEFAULTS.items()} | {"top_k": int | None}
BENCH_KEYS: Mapping[str, Kind] = {key: type(value) for key, value in BENCH_DEFAULTS.items()}

PLACES: Mapping[str, str] = {
    **{f"model.{key}": key for key in ("n_layer", "n_head", "n_embd", "block_size", "dropout", "bias")},
    "data.source": "dataset",
    "optim.lr": "learning_rate",
    "optim.min_lr": "min_lr",
    "optim.warmup_steps": "warmup_iters",
    "optim.schedule": "decay_lr",
    "optim.decay_steps": "lr_decay_iters",
    "optim.weight_decay": "weight_decay",
    "optim.betas": "beta1, beta2",
    "train.steps": "max_iters",
    "train.batch_size": "batch_size * gradient_accumulation_steps",
    "train.micro_batch": "batch_size",
    "train.grad_clip": "grad_clip",
    "train.log_every": "log_interval",
    "eval.every": "eval_interval",
    "eval.windows": "eval_iters * batch_size",
    "checkpoint.every": "always_save_checkpoint, eval_interval",
    "precision": "dtype",
    "device": "device",
    "compile": "compile",
}
"""Our settings, and the nanoGPT keys they are computed from."""

NAMED_DATASETS: Mapping[str, tuple[str, str]] = {
    "shakespeare_char": ("shakespeare-char", "char"),
    "shakespeare": ("shakespeare", "gpt2"),
    "openwebtext": ("openwebtext", "gpt2"),
}
"""nanoGPT's dataset folders that can be prepared here by name: source and tokenizer."""
