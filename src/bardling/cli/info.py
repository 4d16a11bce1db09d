"""`bardling info PATH`: what is this? A run, a checkpoint or a dataset, ours or another trainer's, its facts on one screen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from bardling.cli.parse import parse
from bardling.errors import UserError

if TYPE_CHECKING:
    from bardling.checkpoint.runfolder import RunFolder
    from bardling.config import ModelConfig
    from bardling.data.shards import TokenDataset

_EXCERPT = 80  # characters, and tokens, of a window's beginning


@dataclass(frozen=True)
class InfoOptions:
    """Options of `bardling info`."""

    path: tyro.conf.Positional[Path]
    """A run, a checkpoint, or a dataset; also a checkpoint file or a token folder of nanoGPT, nano-gpt or llm.c."""
    verify: bool = False
    """Also compare every file with its checksum."""
    step: int | None = None
    """Of a run: say which windows, files and documents this step saw."""


def run(argv: Sequence[str]) -> None:
    """Parse, recognise, print."""
    options = parse(InfoOptions, argv, prog="bardling info", description="Say what a run, a checkpoint or a dataset is.")
    path = options.path
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if options.step is not None:
        _show_step(path, options.step)
    elif (path / "config.toml").is_file():
        _show_run(path, options.verify)
    elif (path / "config.json").is_file():
        _show_checkpoint(path, options.verify)
    elif (path / "manifest.json").is_file():
        from bardling.data.shards import open_dataset

        dataset = open_dataset(path)
        show_dataset(dataset)
        if options.verify:
            _report(dataset.verify())
    elif path.suffix == ".toml":
        from bardling.configfile import config_to_toml, load_recipe

        print(config_to_toml(load_recipe(str(path))), end="")
    elif not _show_foreign(path):
        raise UserError(f"{path}: is no run (config.toml), checkpoint (config.json), dataset (manifest.json) or recipe (.toml)")


def _print(title: str, rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, title=title, title_justify="left")
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


def described(config: "ModelConfig") -> str:
    """A model in a few words, by the name under which `transformers` opens it."""
    kind = config.architecture.opens_as or "of its own kind"
    return f"{kind}, {config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide"


def _report(problems: list[str]) -> None:
    if problems:
        raise UserError(f"damaged: {'; '.join(problems)}")
    print("every file is as its checksum says")


def show_dataset(dataset: "TokenDataset") -> None:
    """Print the facts of a dataset."""
    from bardling.monitor.format import count, size_bytes

    tokenizer = dataset.tokenizer
    rows = []
    for split in ("train", "val"):
        tokens = len(dataset.split(split))
        rows.append((split, f"{tokens:,} tokens ({count(tokens)})"))
    rows.append(("vocabulary", f"{dataset.vocab_size:,} entries"))
    if tokenizer is not None:
        rows.append(("tokenizer", f"{tokenizer.kind}, fingerprint {tokenizer.fingerprint}"))
    rows.append(("fingerprint", dataset.fingerprint))
    rows.append(("size", size_bytes(sum(file.stat().st_size for file in Path(dataset.path).iterdir() if file.is_file()))))
    _print(f"dataset {dataset.path}", rows)


def _show_checkpoint(path: Path, verify: bool) -> None:
    from bardling.checkpoint.state import read_model, read_training
    from bardling.checkpoint.store import CheckpointStore
    from bardling.monitor.format import count

    config, state = read_model(path)
    parameters = sum(tensor.numel() for name, tensor in state.items())
    rows = [
        (
            "model",
            described(config),
        ),
        ("parameters", f"{parameters:,} ({count(parameters)})"),
        ("context", f"{config.block_size:,} tokens"),
        ("vocabulary", f"{config.vocab_size:,} entries"),
    ]
    training = path / "training.json"
    if training.is_file():
        facts = read_training(training)
        rows.append(("step", f"{facts['step']:,}"))
        if math.isfinite(facts["best_val_loss"]):
            rows.append(("best validation loss", f"{facts['best_val_loss']:.4f} nats a token"))
    _print(f"checkpoint {path}", rows)
    if verify:
        _report(CheckpointStore(path.parent, 1).verify(path))


def _show_foreign(path: Path) -> bool:
    """Print the facts of another trainer's checkpoint or tokens; False if it is neither."""
    if path.is_file() or (path / "ckpt.pt").is_file():
        from bardling.checkpoint.load import load
        from bardling.monitor.format import count

        loaded = load(path)
        config, state = loaded.config, loaded.state
        # Parameters as its owner counts them, without the rows that pad the vocabulary here.
        parameters = sum(tensor.numel() for tensor in state.values())
        parameters -= (config.padded_vocab_size - config.vocab_size) * config.n_embd
        rows = [
            ("made by", loaded.foreign.origin if loaded.foreign is not None else "unknown"),
            (
                "model",
                f"{described(config)}, GELU {config.gelu}",
            ),
            ("parameters", f"{parameters:,} ({count(parameters)})"),
            ("context", f"{config.block_size:,} tokens"),
            ("vocabulary", f"{config.vocab_size:,} entries"),
            ("tokenizer", "unknown" if loaded.tokenizer is None else loaded.tokenizer.kind),
            ("step", f"{loaded.step:,}"),
            ("optimizer state", "AdamW's" if loaded.optimizer_tensors else "none"),
        ]
        if loaded.best_val_loss is not None:
            rows.append(("best validation loss", f"{loaded.best_val_loss:.4f} nats a token"))
        _print(f"checkpoint {path}", rows)
        return True
    from bardling.interop.tokenfiles import detect_token_folder, open_token_folder

    kind = detect_token_folder(path)
    if kind is None:
        return False
    print(f"token files as {kind} writes them")
    show_dataset(open_token_folder(path))
    return True


def _show_run(path: Path, verify: bool) -> None:
    from bardling.checkpoint.runfolder import open_run
    from bardling.monitor.format import duration
    from bardling.monitor.jsonl import figures, read_jsonl

    run_folder = open_run(path)
    config = run_folder.config()
    store = run_folder.store()
    try:
        records = read_jsonl(run_folder.metrics_file) if run_folder.metrics_file.exists() else []
    except UserError:
        if not verify:
            raise
        records = []  # it will be named below, with what else is damaged
    trained, validated = figures(records, "train"), figures(records, "val")
    model = config.model
    rows = [
        ("model", f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, context {model.block_size}"),
        ("data", f"{config.data.source}, tokenizer {config.data.tokenizer}"),
        ("precision", f"{config.precision}{', blocks in float8' if config.fp8 else ''}, compile {config.compile}"),
    ]
    if trained:
        last = trained[-1]
        left = last.get("seconds_left", math.nan)
        if config.train.deadline is None:
            finished, of = last["step"] >= config.train.steps, f" of {config.train.steps:,}"
        else:  # how many steps there will be is planned while it runs; what is left, then too
            finished, of = left == 0, ""
        state = "finished" if finished else f"{duration(left)} left at its last speed"
        rows.append(("progress", f"step {last['step']:,}{of}, {state}"))
        rows.append(("training loss", f"{last['loss']:.4f} nats a token"))
    if validated:
        best = min(validated, key=lambda record: record["loss"])
        rows.append(("validation loss", f"{validated[-1]['loss']:.4f} (best {best['loss']:.4f} at step {best['step']:,})"))
        if "bits_per_byte" in best and "bits_per_byte" in validated[-1]:
            rows.append(("bits per byte", f"{validated[-1]['bits_per_byte']:.4f} (best {best['bits_per_byte']:.4f})"))
    steps = store.steps()
    rows.append(("checkpoints", ", ".join(f"step {step:,}" for step in steps) or "none yet"))
    _print(f"run {path}", rows)
    if verify:
        _verify_run(run_folder)


def _verify_run(run: "RunFolder") -> None:
    """Read every file, list what was found, and fail if anything is damaged."""
    from bardling.checkpoint.verify import verify_run
    from bardling.cli.progress import Progress
    from bardling.monitor.format import size_bytes

    with Progress("verifying", unit="MB") as progress:
        verdicts = verify_run(run, lambda done, total: progress(done // 1_000_000, total // 1_000_000))
    rows = []
    for verdict in verdicts:
        state = "sound, the best when it was saved" if verdict.best else "sound"
        rows.append((verdict.name, f"{size_bytes(verdict.size):>8}  {'; '.join(verdict.problems) or state}"))
    _print("files and checkpoints", rows)
    _report([f"{verdict.name}: {problem}" for verdict in verdicts for problem in verdict.problems])


def _show_step(path: Path, step: int) -> None:
    """Print what a step saw, and what came of it."""
    from bardling.checkpoint.runfolder import open_run
    from bardling.monitor.console import harmless
    from bardling.monitor.jsonl import figures, read_jsonl
    from bardling.train.guard import in_words
    from bardling.train.trace import seen_in_step

    folder = open_run(path)
    seen = seen_in_step(folder, step)
    records = read_jsonl(folder.metrics_file) if folder.metrics_file.exists() else []
    logged = [record for record in figures(records, "train") if record["step"] == step]
    loss = f", loss {logged[-1]['loss']:.4f} nats a token" if logged else ""
    length = seen.windows[0].length - 1 if seen.windows else 0
    print(f"run {path}, step {step:,}: {len(seen.windows)} windows of {length:,} tokens from {seen.dataset.path}{loss}")
    for rollback in seen.rollbacks:
        try:
            told = in_words(rollback.event)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{folder.path / 'skips.json'}: an event in it is damaged ({type(error).__name__}: {error})"
            ) from None
        print(f"  went back before this step could be done: {harmless(told)}")
    for record in records:
        if record.get("kind") == "event" and record.get("step") == step and record.get("action") != "rollback":
            print(f"  {harmless(str(record.get('action')))}: {harmless(str(record.get('reason')))}")
    for window in seen.windows:
        end = window.start + window.length - 1
        print(f"sample {window.sample:,}: tokens {window.start:,} to {end:,}; {window.file} from token {window.place:,}")
        for document in window.documents:
            print(f"  {harmless(str(document))}")
        text = seen.text(window, _EXCERPT)
        if text is not None:
            print(f"  begins {harmless(text)[:_EXCERPT]!r}")
    if not seen.named:
        print("documents have no names: the dataset was made without an index; prepare the text again to get one")
