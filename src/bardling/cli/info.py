"""`bardling info PATH`: describe a run, checkpoint or dataset (also of nanoGPT, nano-gpt or llm.c) on one screen."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from bardling.cli.parse import parse
from bardling.cli.tables import print_rows, shape
from bardling.config import DataConfig, ModelConfig
from bardling.errors import UserError
from bardling.files.paths import similar
from bardling.files.streams import escape_unprintable
from bardling.monitor.format import count, duration, size_bytes
from bardling.monitor.jsonl import metrics, read_jsonl
from bardling.monitor.progress import ProgressBar
from bardling.planning.costs import parameters

if TYPE_CHECKING:
    from bardling.checkpoint.run_folder import RunFolder
    from bardling.data.tokens.shards import TokenDataset

Records = list[dict[str, Any]]

_EXCERPT = 80  # characters (and tokens to decode) shown from the start of a sequence


@dataclass(frozen=True)
class InfoOptions:
    path: tyro.conf.Positional[Path]
    """A run, checkpoint or dataset; also a checkpoint file or token folder of nanoGPT, nano-gpt or llm.c."""
    verify: bool = False
    """Also verify the checksum of every file."""
    step: int | None = None
    """For a run: list the sequences, files and documents that this step trained on."""


def run(argv: Sequence[str]) -> None:
    options = parse(InfoOptions, argv, prog="bardling info", description="Describe a run, checkpoint or dataset.")
    path = options.path
    if not path.exists():
        raise UserError(f"{path}: no such file or folder{similar(path)}")
    if options.step is not None:
        _show_step(path, options.step)
    elif (path / "config.toml").is_file():
        _show_run(path, options.verify)
    elif any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        _show_checkpoint(path, options.verify)
    elif (path / "manifest.json").is_file():
        from bardling.data.tokens.shards import open_dataset

        dataset = open_dataset(path)
        show_dataset(dataset)
        if options.verify:
            _report_damage(dataset.verify())
    elif path.suffix == ".toml":
        from bardling.config.recipes import config_to_toml, load_recipe

        print(config_to_toml(load_recipe(str(path))), end="")
    elif not _show_foreign(path):
        raise UserError(f"{path}: not a run (config.toml), checkpoint (config.json), dataset (manifest.json) or recipe (.toml)")


def _model_rows(config: ModelConfig, extra: str = "") -> list[tuple[str, str]]:
    family, size = config.architecture.transformers_family or "custom architecture", parameters(config)
    return [
        ("model", f"{family}, {shape(config)}{extra}"),
        ("parameters", f"{size:,} ({count(size)})"),
        ("context", f"{config.block_size:,} tokens"),
        ("vocabulary", f"{config.vocab_size:,} entries"),
    ]


def _report_damage(problems: list[str]) -> None:
    if problems:
        raise UserError(f"damaged: {'; '.join(problems)}")
    print("all checksums match")


def show_dataset(dataset: "TokenDataset") -> None:
    from bardling.data.text.findings import describe_findings
    from bardling.data.tokens.pack_documents import describe_packing

    tokenizer = dataset.tokenizer
    sizes = {split: len(dataset.split(split)) for split in ("train", "val")}
    rows = [(split, f"{tokens:,} tokens ({count(tokens)})") for split, tokens in sizes.items()]
    rows.append(("vocabulary", f"{dataset.vocab_size:,} entries"))
    if tokenizer is not None:
        rows.append(("tokenizer", f"{tokenizer.kind}, fingerprint {tokenizer.fingerprint}"))
    rows.append(("fingerprint", dataset.fingerprint))
    if held_out := dataset.manifest.source.get("held_out"):
        rows.append(("validation", f"{held_out} (rule {dataset.manifest.source.get('split_rule', 1)})"))
    rows += [
        (line.partition(":")[0], escape_unprintable(line.partition(": ")[2]))
        for line in describe_findings(dataset.manifest.source)
    ]
    if packing := describe_packing(dataset.manifest):
        rows.append(("packing", packing))
    rows.append(("size", size_bytes(sum(file.stat().st_size for file in Path(dataset.path).iterdir() if file.is_file()))))
    print_rows(rows, f"dataset {dataset.path}")


def _show_checkpoint(path: Path, verify: bool) -> None:
    from bardling.checkpoint.checksums import read_manifest
    from bardling.checkpoint.contents import read_training
    from bardling.checkpoint.load import base_of, load
    from bardling.checkpoint.store import CheckpointStore

    loaded, ours = load(path), (path / "training.json").is_file()
    rows = _model_rows(loaded.config)
    if loaded.adapter is not None:
        rows.append(("adapter", f"LoRA of rank {loaded.adapter.config.get('r', 8)}, for {escape_unprintable(base_of(path))}"))
    if ours:
        values = read_training(path / "training.json")
        rows.append(("step", f"{values['step']:,}"))
        if math.isfinite(values["best_val_loss"]):
            rows.append(("best validation loss", f"{values['best_val_loss']:.4f} nats per token"))
    print_rows(rows, f"checkpoint {path}" if ours else f"model {path}")
    if not verify:
        return
    with contextlib.suppress(ValueError):  # another program's folder has no manifest of ours
        ours = ours or bool(read_manifest(path))
    if ours:
        _report_damage(CheckpointStore(path.parent, 1).verify(path))
    else:
        print("all weights are readable and finite; only checkpoints of runs have checksums")


def _show_foreign(path: Path) -> bool:
    """Print a summary of another trainer's checkpoint or token files; False if it is neither."""
    if path.is_file() or (path / "ckpt.pt").is_file():
        from bardling.checkpoint.load import load

        loaded = load(path)
        config = loaded.config
        rows = [
            ("written by", loaded.imported.origin if loaded.imported is not None else "unknown"),
            *_model_rows(config, f", GELU {config.gelu}"),
            ("tokenizer", "unknown" if loaded.tokenizer is None else loaded.tokenizer.kind),
            ("step", f"{loaded.step:,}"),
            ("optimizer state", "AdamW" if loaded.optimizer_tensors else "none"),
        ]
        if loaded.best_val_loss is not None:
            rows.append(("best validation loss", f"{loaded.best_val_loss:.4f} nats per token"))
        print_rows(rows, f"checkpoint {path}")
        return True
    from bardling.data.tokens.token_files import detect_token_folder, open_token_folder

    kind = detect_token_folder(path)
    if kind is None:
        return False
    print(f"token files in the format of {kind}")
    show_dataset(open_token_folder(path))
    return True


def _show_run(path: Path, verify: bool) -> None:
    from bardling.checkpoint.run_folder import open_run

    run_folder = open_run(path)
    config, used = run_folder.config(), run_folder.trained_config()
    try:
        records = read_jsonl(run_folder.metrics_file) if run_folder.metrics_file.exists() else []
    except UserError:
        if not verify:
            raise
        records = []  # reported below with all other damage
    trained, validated = metrics(records, "train"), metrics(records, "val")
    rows = [
        ("model", f"{shape(used.model)}, context {used.model.block_size}"),
        *_data_rows(used.data, trained, validated),
        ("precision", f"{used.precision}{', float8 blocks' if used.fp8 else ''}, compile {used.compile}"),
    ]
    if trained:
        last = trained[-1]
        left = last.get("seconds_left", math.nan)
        if config.train.deadline is None:
            finished, of = last["step"] >= config.train.steps, f" of {config.train.steps:,}"
        else:  # the number of steps is planned while it runs
            finished, of = left == 0, ""
        state = "finished" if finished else f"{duration(left)} left at the last measured speed"
        rows.append(("progress", f"step {last['step']:,}{of}, {state}"))
        rows.append(("training loss", f"{last['loss']:.4f} nats per token"))
    if validated:
        best = min(validated, key=lambda record: record["loss"])
        rows.append(("validation loss", f"{validated[-1]['loss']:.4f} (best {best['loss']:.4f} at step {best['step']:,})"))
        if "bits_per_byte" in best and "bits_per_byte" in validated[-1]:
            rows.append(("bits per byte", f"{validated[-1]['bits_per_byte']:.4f} (best {best['bits_per_byte']:.4f})"))
        elif any(record.get("kind") == "val" and "bits_per_byte" in record for record in records):
            advice = "not shown: some are of an earlier version, which counted end-of-text tokens; measure with `bardling eval`"
            rows.append(("bits per byte", advice))
    steps = run_folder.store().steps()
    rows.append(("checkpoints", ", ".join(f"step {step:,}" for step in steps) or "none yet"))
    print_rows(rows, f"run {path}")
    if verify:
        _verify_run(run_folder)


def _data_rows(data: DataConfig, trained: Records, validated: Records) -> list[tuple[str, str]]:
    """The data of a run; of a mixture, each source with its weights, its epochs so far and its validation loss."""
    if not data.sources:
        rows = [("data", f"{data.source}, tokenizer {data.tokenizer}")]
    else:
        from bardling.data.tokens.corpus import source_names

        stages = f", weights change at sample {', '.join(map(str, data.stages))}" if data.stages else ""
        rows = [("data", f"mixture of {len(data.sources)} sources, tokenizer {data.tokenizer}{stages}")]
        for source, name in zip(data.sources, source_names(data), strict=True):
            facts = [f"weight {' -> '.join(f'{weight:g}' for weight in source.weights(1))}"]
            if (epochs := (trained[-1] if trained else {}).get(f"epoch/{name}")) is not None:
                facts.append(f"{epochs:.2f} epochs")
            if (loss := (validated[-1] if validated else {}).get(f"loss/{name}")) is not None:
                facts.append(f"validation loss {loss:.4f}")
            rows.append((f"  {escape_unprintable(name)}", f"{escape_unprintable(source.source)}, {', '.join(facts)}"))
    return [*rows, ("validation text", data.val_source)] if data.val_source else rows


def _verify_run(run: "RunFolder") -> None:
    """Read every file, list the results, and fail if anything is damaged."""
    from bardling.checkpoint.integrity import check_run

    with ProgressBar("verifying", unit="MB") as progress:
        verdicts = check_run(run, lambda done, total: progress(done // 1_000_000, total // 1_000_000))
    valid = {False: "valid", True: "valid, lowest validation loss when saved"}
    rows = [(each.name, f"{size_bytes(each.size):>8}  {'; '.join(each.problems) or valid[each.best]}") for each in verdicts]
    print_rows(rows, "files and checkpoints")
    _report_damage([f"{verdict.name}: {problem}" for verdict in verdicts for problem in verdict.problems])


def _show_step(path: Path, step: int) -> None:
    from bardling.checkpoint.run_folder import open_run
    from bardling.training.recovery.guard import describe_event
    from bardling.training.recovery.trace import trace_step

    folder = open_run(path)
    seen = trace_step(folder, step)
    records = read_jsonl(folder.metrics_file) if folder.metrics_file.exists() else []
    logged = [record for record in metrics(records, "train") if record["step"] == step]
    loss = f", loss {logged[-1]['loss']:.4f} nats per token" if logged else ""
    length = seen.sequences[0].length - 1 if seen.sequences else 0
    print(f"run {path}, step {step:,}: {len(seen.sequences)} sequences of {length:,} tokens from {seen.dataset.title}{loss}")
    for rollback in seen.rollbacks:
        try:
            description = describe_event(rollback.event)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            damage = f"{type(error).__name__}: {error}"
            raise UserError(f"{folder.path / 'skips.json'}: contains a damaged event ({damage})") from None
        print(f"  rolled back before this step: {escape_unprintable(description)}")
    for record in records:
        if record.get("kind") == "event" and record.get("step") == step and record.get("action") != "rollback":
            print(f"  {escape_unprintable(str(record.get('action')))}: {escape_unprintable(str(record.get('reason')))}")
    for sequence in seen.sequences:
        end = sequence.start + sequence.length - 1
        source = f"{sequence.source}, " if sequence.source else ""
        place = f"{source}{sequence.file} from token {sequence.offset:,}"
        print(f"sample {sequence.sample:,}: tokens {sequence.start:,} to {end:,}; {place}")
        for document in sequence.documents:
            print(f"  {escape_unprintable(str(document))}")
        text = seen.text(sequence, _EXCERPT)
        if text is not None:
            print(f"  begins {escape_unprintable(text)[:_EXCERPT]!r}")
    if not seen.named:
        print("documents are not named: the dataset has no document index; prepare the text again to add one")
