"""Ablation: remove each component of a recipe in turn and compare the loss after equal training time.

    python benchmarks/ablation.py quickstart
    python benchmarks/ablation.py RECIPE --seconds 60 --seeds 5 --only muon qk-norm -- --data.source input.txt
    python benchmarks/ablation.py quickstart --list                  # list what would be removed, and exit

Method. Removing a component sets a few settings to those of GPT-2 and its usual training; removals that change nothing in
this recipe are omitted. First, the step time of every case is measured: all models are in memory and alternate blocks of steps,
so that other load on the machine affects all of them; the median block counts. Each case then trains for as many steps as fit
into --seconds, with its schedule rescaled to end with them (the warm-up is unchanged). Training is that of `bardling train`,
repeated with --seeds seeds (different weights and data order), and validated once, after the last step, on all validation
sequences.

The table shows mean and standard deviation of the final losses over the seeds, and the difference from the complete recipe.
Differences within two standard errors are not significant. Learning rates are those of the recipe, which were tuned with all
components present; AdamW in place of Muon needs different ones and is therefore tried with several.

Time for set-up, compilation and validation is not counted.
"""

import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from bardling.cli.parse import parse
from bardling.cli.recipe import parse_recipe_command
from bardling.cli.train import TrainOptions
from bardling.config import RunConfig
from bardling.data.batches.loader import Prefetcher, TrainSequences
from bardling.data.batches.order import SequenceOrder
from bardling.data.tokens.dataset import open_data
from bardling.data.tokens.shards import TokenDataset
from bardling.distributed.context import Context
from bardling.distributed.device import choose_device, choose_precision, synchronize
from bardling.errors import UserError
from bardling.optim.build import resolve_muon_precision
from bardling.planning.batching import Horizon, make_plan
from bardling.planning.costs import parameters
from bardling.training.build import Execution, build
from bardling.training.loop import fit
from bardling.training.objective import NextToken
from bardling.training.run import train
from bardling.training.step import StepSettings
from tables import Table, publish, rounded, say, script

WHOLE = "complete recipe"
ADAMW_RATES = (1e-3, 2e-3, 4e-3)


@dataclass(frozen=True)
class Options:
    """Options of this benchmark."""

    recipe: tyro.conf.Positional[str]
    """Name of a shipped recipe, or a TOML file. Put options of `bardling train` after --."""
    seconds: float = 60.0
    """Training time of each run (seconds), from which the number of steps follows."""
    seeds: int = 3
    """Runs per case."""
    only: tuple[str, ...] = ()
    """Removals to measure; default: all that change something."""
    compile: Literal["on", "off"] = "off"
    """torch.compile, the same for all cases."""
    rounds: int = 5
    """Blocks of steps for measuring the step time of a case."""
    block: int = 5
    """Steps per block."""
    list: bool = False
    """List what would be removed, and exit."""
    results: Path | None = None
    """Folder of the results file to append to; default: benchmarks/results."""


def removals(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Settings, by dotted key, that remove each component. A new component of recipes gets a line here."""
    low = config.optim.min_lr
    adamw = {
        f"muon (adamw, lr {rate:g})": {
            "optim.name": "adamw",
            "optim.lr": rate,
            "optim.min_lr": low if low is None else min(low, rate / 10),
        }
        for rate in ADAMW_RATES
    }
    return {
        **adamw,
        "cautious-decay": {"optim.cautious_decay": False},
        "rmsnorm": {"model.norm": "layernorm"},
        "rotary": {"model.positions": "learned"},
        "qk-norm": {"model.qk_norm": "off"},
        "mlp": {"model.mlp": "gelu", "model.mlp_hidden": None},
        "zero-init": {"model.zero_init": False},
        "untied-head": {"model.tied": True},
        "grouped-queries": {"model.n_kv_head": None},
        "softcap": {"model.logit_softcap": 0.0},
        "window": {"model.sliding_window": None},
        "value-embeddings": {"model.value_embeddings": 0},
        "schedule": {"optim.schedule": "cosine"},
        "warm-up": {"optim.warmup_steps": 0},
        "weight-decay": {"optim.weight_decay": 0.0},
        "ema": {"optim.ema_decay": 0.0},
        "bf16": {"precision": "float32"},
    }


def changed(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """The configuration with some settings, given by dotted key, changed."""
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        if section:
            part = dataclasses.replace(getattr(config, section), **{name: value})
            config = dataclasses.replace(config, **{section: part})
        else:
            config = dataclasses.replace(config, **{name: value})
    return config


def _effect(config: RunConfig) -> object:
    """Everything that training depends on: configurations for which this is equal are the same recipe."""
    rest = dataclasses.replace(config.model.resolved(), family="custom", n_kv_head=None, mlp_hidden=None)
    optim = config.optim
    if optim.name == "adamw":  # only Muon uses these
        optim = dataclasses.replace(optim, muon_lr=1.0, embed_lr=None, head_lr=None, momentum=0.0, cautious_decay=False)
    return config.model.architecture, rest, optim, config.precision


def cases_of(config: RunConfig, only: Sequence[str] = ()) -> dict[str, RunConfig]:
    """The complete recipe, and each removal that changes something.

    Raises:
        UserError: `only` contains an unknown removal, or one that changes nothing in this recipe.
    """
    found = {WHOLE: config}
    for name, settings in removals(config).items():
        if name.startswith("muon") and config.optim.name != "muon":
            continue
        case = changed(config, settings)
        if _effect(case) != _effect(config):
            found[f"without {name}"] = case
    known = [name.removeprefix("without ") for name in found][1:]
    wanted = [name for name in known if not only or name in only or name.partition(" ")[0] in only]
    for name in only:
        if not any(name in (other, other.partition(" ")[0]) for other in known):
            raise UserError(f"--only {name}: this recipe has no such component; choose from {', '.join(known) or 'none'}")
    return {WHOLE: config} | {f"without {name}": found[f"without {name}"] for name in wanted}


def main(argv: Sequence[str]) -> None:
    """Measure step times, train, and write the table."""
    own, more = (argv[: list(argv).index("--")], argv[list(argv).index("--") + 1 :]) if "--" in argv else (argv, ())
    options = parse(
        Options, own, prog="ablation.py", description="Loss after equal training time without each component of a recipe."
    )
    for name in ("seconds", "seeds", "rounds", "block"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name} {getattr(options, name)}: must be greater than 0")
    _, _, train_options = parse_recipe_command("train", TrainOptions, [options.recipe, *more], "")
    device = choose_device(train_options.config.device)
    precision = choose_precision(train_options.config.precision, device)
    config = changed(train_options.config, {"precision": precision.name, "compile": options.compile, "model.init": ""})
    cases = cases_of(config, options.only)
    if options.list:
        for name, case in cases.items():
            print(f"{name}: {', '.join(_differences(config, case)) or 'unchanged'}")
        return
    say(f"{len(cases)} cases, {options.seeds} runs of {options.seconds:g} s each: about {_estimate(len(cases), options)}")
    dataset = open_data(config.data)
    vocab_size = config.model.vocab_size or dataset.vocab_size
    cases = {name: changed(case, {"model.vocab_size": vocab_size}) for name, case in cases.items()}
    seconds = step_times(cases, dataset, device, options)
    steps = {name: max(int(options.seconds / seconds[name]), cases[name].optim.warmup_steps + 2) for name in cases}
    losses: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory(prefix="ablation-") as folder:
        for turn in range(options.seeds):
            for number, (name, case) in enumerate(cases.items()):
                loss = final_loss(case, steps[name], config.seed + turn, Path(folder) / f"{turn}-{number}", dataset)
                losses[name].append(loss)
                say(f"seed {turn + 1} of {options.seeds}: {name}: {loss:.4f} after {steps[name]} steps")
    rows = [_row(name, cases[name], seconds[name], steps[name], losses[name], losses[WHOLE], config) for name in cases]
    notes = (
        f"recipe {options.recipe}{' ' + ' '.join(more) if more else ''}, {options.seconds:g} s of training per run, "
        f"{options.seeds} seeds, starting at {config.seed}; {precision.name} unless removed, compile {options.compile}",
        "validation loss (nats per token) after the last step, mean and standard deviation over the seeds; "
        "difference: from the complete recipe; above 0 is worse",
    )
    columns = ("case", "settings", "parameters", "ms/step", "steps", "loss", "sd", "difference")
    publish("ablation", [Table("Ablation", columns, rows, notes)], device=device, command=argv, folder=options.results)


def _estimate(cases: int, options: Options) -> str:
    return f"{cases * options.seeds * options.seconds / 60:.0f} minutes plus set-up"


def step_times(cases: dict[str, RunConfig], dataset: TokenDataset, device: torch.device, options: Options) -> dict[str, float]:
    """Seconds per step of each case, measured in alternation."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(64, 4 * len(cases))  # every case recompiles the same functions
    blocks: dict[str, list[float]] = {name: [] for name in cases}
    with ExitStack() as stack:
        trainers = {name: _trainer(case, dataset, device, options.block, stack) for name, case in cases.items()}
        for name, trainer in trainers.items():
            next(trainer)  # includes set-up
            say(f"{name}: set up")
        for _ in range(options.rounds):
            for name, trainer in trainers.items():
                blocks[name].append(next(trainer))
    return {name: statistics.median(times) for name, times in blocks.items()}


def _trainer(config: RunConfig, dataset: TokenDataset, device: torch.device, block: int, stack: ExitStack) -> Iterator[float]:
    """Train indefinitely; yield the seconds per step of each block."""
    context = Context(rank=0, world_size=1, device=device)
    precision = choose_precision(config.precision, device)
    optim = resolve_muon_precision(config.optim, precision.name)
    recompute = config.train.recompute == "blocks"
    execution = Execution(precision, config.compile == "on", config.cuda_graphs, config.fp8, recompute)
    assembly = build(config.model, optim, execution, context, seed=config.seed)
    settings = StepSettings(NextToken(), precision, context, config.train.grad_clip, keep_gradients=config.cuda_graphs)
    plan = make_plan(config.train, config.model.block_size, 1)
    split = dataset.split("train")
    source = TrainSequences(split, SequenceOrder(config.seed, len(split), config.model.block_size))
    batches = stack.enter_context(Prefetcher(source, plan.requests(0, sys.maxsize, 0), device))
    for number in itertools.count(1):
        begun = time.perf_counter()
        block_plan = dataclasses.replace(plan, horizon=Horizon(number * block))
        fit(assembly, batches, block_plan, settings, lr_at=lambda step: optim.lr)
        synchronize(device)
        yield (time.perf_counter() - begun) / block


def final_loss(config: RunConfig, steps: int, seed: int, out: Path, dataset: TokenDataset) -> float:
    """Train like `bardling train`, and return the validation loss after the last step."""
    settings = {
        "seed": seed,
        "data.source": str(dataset.path),
        "train.steps": steps,
        "train.deadline": None,
        "optim.decay_steps": None,
        "eval.every": 0,
        "eval.windows": 10**9,
        "eval.tasks": (),
        "sample.every": 0,
        "checkpoint.every": 0,
        "checkpoint.save_best": False,
    }
    return train(changed(config, settings), out, quiet=True).best_val_loss  # of the only validation


def _differences(config: RunConfig, case: RunConfig) -> list[str]:
    """The settings in which a case differs, as `key value`."""
    found = []
    for section in ("model", "optim"):
        before, after = getattr(config, section), getattr(case, section)
        for item in dataclasses.fields(before):
            if getattr(before, item.name) != getattr(after, item.name):
                found.append(f"{section}.{item.name} {getattr(after, item.name)}")
    return found + ([f"precision {case.precision}"] if case.precision != config.precision else [])


def _row(
    name: str, case: RunConfig, seconds: float, steps: int, losses: list[float], whole: list[float], config: RunConfig
) -> tuple[str, ...]:
    def deviation(values: list[float]) -> str:
        return f"{statistics.stdev(values):.4f}" if len(values) > 1 else "n/a"

    base = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=case.model.vocab_size))
    mean = statistics.mean(losses)
    return (
        name,
        ", ".join(_differences(base, case)),
        f"{parameters(case.model) / 1e6:.2f} M",
        rounded(seconds * 1e3),
        f"{steps:,}",
        f"{mean:.4f}",
        deviation(losses),
        "" if name == WHOLE else f"{mean - statistics.mean(whole):+.4f}",
    )


if __name__ == "__main__":
    script(main)
