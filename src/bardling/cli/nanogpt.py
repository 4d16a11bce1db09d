"""nanoGPT command lines for Bardling's commands: `bardling train config/x.py --device=cpu`, `bardling sample --out_dir=out`.

A command line is recognised as nanoGPT's if one of its arguments is a `.py` file, or if it consists of nanoGPT's flat
`--key=value` flags. The value of an option, as in `--data.source code.py`, is not an argument. The files are parsed, never
executed.
"""

import dataclasses
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from bardling.cli.parse import note
from bardling.cli.paths import shadow_notes
from bardling.config import RunConfig
from bardling.errors import UserError
from bardling.interop.nanogpt import NanoGPTRun, run_config_from_nanogpt
from bardling.interop.nanogpt_keys import TRAIN_DEFAULTS, TRAIN_KEYS
from bardling.interop.python_config import read_nanogpt_arguments


def is_nanogpt(argv: Sequence[str], keys: Collection[str]) -> bool:
    """Whether `argv` is a nanoGPT command line: an argument is a `.py` file, or all are flat flags, at least one in `keys`."""
    if any(word.endswith(".py") and not Path(word).is_dir() for word in _positional(argv)):
        return True
    flags = [word for word in argv if word.startswith("--") and "=" in word]
    return bool(argv) and len(flags) == len(argv) and any(word[2:].split("=", 1)[0] in keys for word in flags)


def _positional(argv: Sequence[str]) -> Iterator[str]:
    """The words that are neither options nor values of `--name VALUE`; only dotted options may have several values."""
    option, values = "", 0
    for word in argv:
        if word.startswith("-"):
            option, values = "" if "=" in word else word, 0
            continue
        if not option or (values and "." not in option):
            yield word
        values += 1


def read_run(argv: Sequence[str]) -> NanoGPTRun:
    """Translate a nanoGPT training command."""
    settings = read_nanogpt_arguments(argv, TRAIN_KEYS, TRAIN_DEFAULTS)
    files = [Path(word) for word in argv if not word.startswith("-")]
    near = [folder for file in files for folder in (file.absolute().parent, file.absolute().parent.parent)]
    return run_config_from_nanogpt(settings, int(os.environ.get("WORLD_SIZE", "1")), near)


def train(argv: Sequence[str]) -> None:
    """Do what nanoGPT's train.py would: train, resume, start from GPT-2, or only evaluate."""
    run = read_run(argv)
    if os.environ.get("RANK", "0") == "0":
        for text in (*run.notes, *shadow_notes(run)):
            note(text)
    if run.eval_only:
        _evaluate(run)
        return
    from bardling.training.run import resume, train

    if run.init_from != "resume":
        train(run.config, run.out)
    elif (run.out / "config.toml").is_file():
        resume(run.out, _with_shape_of_run(run))
    elif (run.out / "ckpt.pt").is_file():
        train(run.config, run.out, continue_from=str(run.out / "ckpt.pt"))
    else:
        raise UserError(f"{run.out}: contains neither a run nor a ckpt.pt to resume from; check --out_dir")


def _with_shape_of_run(run: NanoGPTRun) -> RunConfig:
    """The configuration for resuming a Bardling run. As in nanoGPT, it keeps the model's shape but not its dropout."""
    from bardling.checkpoint.run_folder import open_run

    model, requested = open_run(run.out).trained_config().model, run.config.model
    if requested.block_size < model.block_size:
        raise UserError(
            f"block_size = {requested.block_size}: {run.out} keeps its block_size of {model.block_size}; for a shorter context "
            f"start a new run from its weights: bardling train RECIPE --model.init {run.out} "
            f"--model.block_size {requested.block_size}"
        )
    keys = ("n_layer", "n_head", "n_embd", "block_size", "bias")
    kept = [f"{key} = {getattr(model, key)}" for key in keys if getattr(model, key) != getattr(requested, key)]
    if kept and os.environ.get("RANK", "0") == "0":
        note(f"the run keeps {', '.join(kept)}")
    return dataclasses.replace(run.config, model=dataclasses.replace(model, dropout=requested.dropout))


def _evaluate(run: NanoGPTRun) -> None:
    """Print the losses of both splits without changing any file, for every `init_from`."""
    from bardling.checkpoint.load import load
    from bardling.data.batches.loader import EvalSequences
    from bardling.data.tokens.dataset import open_data
    from bardling.distributed.context import distributed
    from bardling.distributed.device import choose_precision
    from bardling.evaluate.loss import evaluate_loss
    from bardling.planning.batching import make_plan

    if run.init_from == "scratch":
        raise UserError("eval_only with init_from = 'scratch' would measure random weights: set --init_from=resume or gpt2")
    config = run.config
    model = load(config.model.init or run.out).cropped(config.model.block_size).build()
    block_size = model.config.block_size
    with distributed(config.device) as context:
        dataset = open_data(config.data)
        precision = choose_precision(config.precision, context.device)
        model.to(context.device)
        sequences = [EvalSequences(dataset.split(split), block_size, config.eval.windows) for split in ("train", "val")]
        batch_size = make_plan(config.train, block_size, context.world_size).micro_batch
        losses = [evaluate_loss(model, s, batch_size=batch_size, precision=precision, context=context).loss for s in sequences]
        if context.is_primary:
            print(f"train loss {losses[0]:.4f}, val loss {losses[1]:.4f} (nats per token)")
