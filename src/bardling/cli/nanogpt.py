"""nanoGPT's command lines behind our verbs: `bardling train config/x.py --device=cpu`, `bardling sample --out_dir=out`.

A command is taken for one of these when it names a `.py` file, or when its options are nanoGPT's flat `--key=value` flags. The
files are parsed, never executed.
"""

import dataclasses
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bardling.config import RunConfig
from bardling.errors import UserError
from bardling.interop.nanogpt import NanoGPTRun, recipe_toml, run_config_from_nanogpt, sample_from_nanogpt
from bardling.interop.nanogpt_keys import BENCH_DEFAULTS, BENCH_KEYS, SAMPLE_KEYS, TRAIN_DEFAULTS, TRAIN_KEYS
from bardling.interop.pyconfig import read_nanogpt_arguments

if TYPE_CHECKING:
    from bardling.cli.bench import BenchOptions
    from bardling.cli.sample import SampleOptions


def is_nanogpt(argv: Sequence[str], keys: Collection[str]) -> bool:
    """Whether `argv` is in nanoGPT's form: it names a `.py` file, or holds nothing but flat flags of which `keys` has one."""
    if any(word.endswith(".py") and not word.startswith("-") for word in argv):
        return True
    flags = [word for word in argv if word.startswith("--") and "=" in word]
    return bool(argv) and len(flags) == len(argv) and any(word[2:].split("=", 1)[0] in keys for word in flags)


def read_run(argv: Sequence[str]) -> NanoGPTRun:
    """Translate a nanoGPT training command."""
    settings = read_nanogpt_arguments(argv, TRAIN_KEYS, TRAIN_DEFAULTS)
    files = [Path(word) for word in argv if not word.startswith("-")]
    near = [folder for file in files for folder in (file.absolute().parent, file.absolute().parent.parent)]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return run_config_from_nanogpt(settings, processes, near)


def train(argv: Sequence[str]) -> None:
    """Do what nanoGPT's train.py would: train, go on, start from GPT-2, or only evaluate."""
    run = read_run(argv)
    if os.environ.get("RANK", "0") == "0":
        for note in run.notes:
            print(f"bardling: {note}", file=sys.stderr)
    if run.eval_only:
        _evaluate(run)
        return
    from bardling.train.run import resume, train

    if run.init_from == "resume":
        if (run.out / "config.toml").is_file():
            result = resume(run.out, _with_the_runs_shape(run))
        else:
            if not (run.out / "ckpt.pt").is_file():
                raise UserError(f"{run.out}: holds neither a run nor a ckpt.pt to resume from; check --out_dir")
            result = train(run.config, run.out, continue_from=str(run.out / "ckpt.pt"))
    else:
        result = train(run.config, run.out)
    if result.exit_status:
        sys.exit(result.exit_status)


def _with_the_runs_shape(run: NanoGPTRun) -> RunConfig:
    """What to resume one of our runs with: as in nanoGPT the model's shape is the checkpoint's, its dropout is not."""
    from bardling.checkpoint.runfolder import open_run

    own, asked = open_run(run.out).config().model, run.config.model
    if asked.block_size < own.block_size:
        raise UserError(
            f"block_size = {asked.block_size}: {run.out} goes on with its {own.block_size}; for a shorter context start a new "
            f"run from its weights: bardling train RECIPE --model.init {run.out} --model.block_size {asked.block_size}"
        )
    keys = ("n_layer", "n_head", "n_embd", "block_size", "bias")
    kept = [f"{key} = {getattr(own, key)}" for key in keys if getattr(own, key) != getattr(asked, key)]
    if kept and os.environ.get("RANK", "0") == "0":
        print(f"bardling: the run keeps its own {', '.join(kept)}", file=sys.stderr)
    return dataclasses.replace(run.config, model=dataclasses.replace(own, dropout=asked.dropout))


def _evaluate(run: NanoGPTRun) -> None:
    """Measure the loss on windows of both splits, and change nothing, whatever init_from says."""
    from bardling.checkpoint.load import load
    from bardling.data.loader import EvalWindows
    from bardling.distributed.context import distributed
    from bardling.distributed.device import choose_precision
    from bardling.evaluate.loss import evaluate_loss
    from bardling.interop.dataset import open_data
    from bardling.train.plan import make_plan

    if run.init_from == "scratch":
        raise UserError("eval_only with init_from = 'scratch' would measure random weights: set --init_from=resume or gpt2")
    model = load(run.config.model.init or run.out).cropped(run.config.model.block_size).build()
    with distributed(run.config.device) as context:
        dataset = open_data(run.config.data)
        precision = choose_precision(run.config.precision, context.device)
        model.to(context.device)
        losses = [
            evaluate_loss(
                model,
                EvalWindows(dataset.split(split), model.config.block_size, run.config.eval.windows),
                batch_size=make_plan(run.config.train, model.config.block_size, context.world_size).micro_batch,
                precision=precision,
                context=context,
            ).loss
            for split in ("train", "val")
        ]
        if context.is_primary:
            print(f"train loss {losses[0]:.4f}, val loss {losses[1]:.4f} (nats a token)")


def sample_options(argv: Sequence[str]) -> "SampleOptions":
    """Translate a nanoGPT sampling command."""
    from bardling.cli.sample import SampleOptions

    asked = sample_from_nanogpt(read_nanogpt_arguments(argv, SAMPLE_KEYS))
    if asked.compile:
        print(
            "bardling: compile = True: sampling is not compiled here (nor is it in nanoGPT, whatever this says)",
            file=sys.stderr,
        )
    return SampleOptions(
        model=asked.model,
        prompt=asked.prompt,
        special=True,  # nanoGPT takes <|endoftext|> in a prompt for the token
        num_samples=asked.num_samples,
        max_new_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
        top_k=asked.top_k,
        seed=asked.seed,
        device=asked.device,
        precision=asked.precision,
    )


def bench_options(argv: Sequence[str]) -> "BenchOptions":
    """Translate a nanoGPT benchmark command: GPT-2 124M, 10 steps before the 20 that are timed."""
    from bardling.cli.bench import BenchOptions
    from bardling.interop.tokenfiles import NANOGPT_VOCAB

    settings = read_nanogpt_arguments(argv, BENCH_KEYS, BENCH_DEFAULTS)
    values = {**BENCH_DEFAULTS, **settings}
    shared: dict[str, object] = {
        key: settings[key] for key in ("batch_size", "block_size", "bias", "device", "dtype", "compile") if key in settings
    }
    run = run_config_from_nanogpt({**shared, "gradient_accumulation_steps": 1, "dataset": "openwebtext", "learning_rate": 1e-4})
    real = values["real_data"] and Path(run.config.data.source).is_dir()
    if values["real_data"] and not real:
        print(
            "bardling: real_data = True, but there is no data/openwebtext/train.bin here: random tokens instead",
            file=sys.stderr,
        )
    config = dataclasses.replace(
        run.config,
        seed=values["seed"],
        model=dataclasses.replace(run.config.model, vocab_size=NANOGPT_VOCAB),
        optim=dataclasses.replace(run.config.optim, weight_decay=1e-2),
    )
    folder = Path("bench_log") if values["profile"] else None
    return BenchOptions(steps=20, warmup=10, data="real" if real else "random", profile=folder, config=config)


def migrated(argv: Sequence[str]) -> str:
    """The recipe, as TOML, that a nanoGPT training command amounts to."""
    run = read_run(argv)
    return recipe_toml(run, " ".join(argv))
