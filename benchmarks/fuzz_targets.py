"""Fuzzing targets: for each kind of file a valid example, how to change it, and the loader that a command would use.

The examples are created here, by a training run of three steps and by the writers of each format. For most targets, the
checksum of a changed file may be recomputed, so that the checks behind the checksum are reached too.
"""

import contextlib
import io
import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import malformed_files
from bardling.checkpoint import checksums as checkpoint_manifest
from bardling.checkpoint.contents import read_checkpoint
from bardling.checkpoint.load import load
from bardling.checkpoint.rng import restore_rng, rng_state
from bardling.checkpoint.run_folder import open_run
from bardling.cli import info
from bardling.cli.resume import foreign_config
from bardling.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from bardling.config.recipes import config_to_toml, load_recipe
from bardling.data.tokens.dataset import open_data
from bardling.data.tokens.documents import Documents
from bardling.data.tokens.manifest import _digest as dataset_digest
from bardling.data.tokens.prepare import prepare
from bardling.data.tokens.shards import open_dataset
from bardling.data.tokens.token_files import open_token_folder
from bardling.data.tokens.tokenizer import load_tokenizer
from bardling.interop.nanogpt import nanogpt_settings, recipe_toml, run_config_from_nanogpt
from bardling.interop.nanogpt_checkpoint import write_meta, write_nanogpt_checkpoint
from bardling.interop.nanogpt_keys import TRAIN_DEFAULTS, TRAIN_KEYS
from bardling.interop.python_config import parse_flat_flags, read_nanogpt_arguments
from bardling.model.gpt import GPT
from bardling.monitor.jsonl import read_jsonl, truncate_after
from bardling.monitor.records import EventRecord
from bardling.optim.build import build_optimizer
from bardling.optim.serialization import load_optimizer_tensors
from bardling.training.recovery.rollback_log import Rollback, write_rollbacks
from bardling.training.run import resume, train

CHECKPOINT = "checkpoints/step-000002"
TEXT = "".join(f"The {a} and the {b} met {n} times.\n" for n in range(12) for a in ("king", "rose") for b in ("sea", "war"))


@dataclass(frozen=True)
class Target:
    """One kind of file."""

    name: str
    share: int  # of the cases, relative to the other targets
    make: Callable[[Path], None]  # writes valid files into an empty folder
    files: tuple[str, ...]  # the files to change
    load: Callable[[Path], object]  # must return, or raise UserError
    seal: Callable[[Path, str], None] | None = None  # recompute the checksums of the changed file
    writes: bool = False  # the loader may write into the folder


def change(folder: Path, target: Target, draw: random.Random, canary: Path) -> str:
    """Change one of the target's files; returns which and how."""
    name = draw.choice(target.files)
    path, kind = folder / name, draw.random()
    if kind < 0.03:
        return f"{name}: {malformed_files.put_special_file(path, draw)}"
    data = path.read_bytes()
    changed = None
    if kind > 0.35:
        with contextlib.suppress(
            RecursionError, ValueError, TypeError, OverflowError, RuntimeError, NotImplementedError, AttributeError
        ):
            changed = _by_structure(name, data, draw, canary)  # values that cannot be serialised: change bytes instead
    how = "bytes" if changed is None else "structure"
    path.write_bytes(malformed_files.mutate_bytes(data, draw) if changed is None else changed)
    if target.seal is not None and draw.random() < 0.8:
        with contextlib.suppress(ValueError, TypeError, RecursionError, AttributeError):  # too damaged to recompute checksums
            target.seal(folder, name)
            how += ", sealed"
    return f"{name}: {how}"


def _by_structure(name: str, data: bytes, draw: random.Random, canary: Path) -> bytes | None:
    suffix = Path(name).suffix
    if suffix in (".toml", ".json", ".jsonl") and draw.random() < 0.1:  # other people's editors
        return malformed_files.mutate_text(data, draw)
    simple = {
        ".json": malformed_files.mutate_json,
        ".jsonl": malformed_files.mutate_jsonl,
        ".toml": malformed_files.mutate_toml,
        ".safetensors": malformed_files.mutate_safetensors,
        ".txt": malformed_files.mutate_text,
    }
    if suffix in simple:
        return simple[suffix](data, draw)
    with_canary = {
        ".py": malformed_files.mutate_python,
        ".pkl": malformed_files.mutate_pickle,
        ".npy": malformed_files.mutate_npy,
        ".pt": malformed_files.mutate_torch,
    }
    if name.startswith("checkpoint_"):
        return malformed_files.mutate_torch(data, draw, canary)
    return with_canary[suffix](data, draw, canary) if suffix in with_canary else None


# ---- valid files ----


def tiny(folder: Path) -> RunConfig:
    """A one-second run on a text written into `folder`."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    return RunConfig(
        device="cpu", precision="float32", compile="off",
        model=ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_multiple=8),
        data=DataConfig(source=str(text), tokenizer="char", val_fraction=0.1),
        optim=OptimConfig(warmup_steps=1), train=TrainConfig(steps=3, batch_size=2, log_every=1), eval=EvalConfig(every=1,
        windows=2),
        sample=SampleConfig(every=2, max_new_tokens=2), checkpoint=CheckpointConfig(every=1, keep_last=3),
    )  # fmt: skip


def make_recipe(folder: Path) -> None:
    (folder / "recipe.toml").write_text(config_to_toml(tiny(folder)))


def make_python(folder: Path) -> None:
    values = nanogpt_settings(tiny(folder), Path("out"), "plays")
    (folder / "config.py").write_text(
        "# plays\nimport time\n" + "".join(f"{key} = {value!r}\n" for key, value in values.items())
    )


def make_dataset(folder: Path) -> None:
    (folder / "text.txt").write_text(TEXT)
    prepare(str(folder / "text.txt"), folder / "data", "bpe:270", val_fraction=0.2)


def make_run(folder: Path) -> None:
    os.environ["BARDLING_CACHE"] = str(folder / "cache")
    train(tiny(folder), folder / "run", quiet=True)
    document = {"begin": 0, "end": 9, "number": 0, "name": "text.txt"}
    window = {"sample": 9, "loss": float("nan"), "start": 0, "file": "train-00000.bin", "place": 0, "document": document}
    tensor = {"name": "wte", "grad_norm": 2.0, "nonfinite": 1, "weight_rms": 0.1}
    event = EventRecord(2, "rollback", "a spike", float("nan"), 1.0, [[9, 2]], [window], [tensor])
    write_rollbacks(open_run(folder / "run"), [Rollback(event, ((9, 2),))])


def make_tokenizer(folder: Path) -> None:
    make_dataset(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "data" / name).rename(folder / name)


def make_foreign(folder: Path) -> None:
    """nanoGPT checkpoints and a vocabulary, and a nano-gpt checkpoint."""
    make_run(folder)
    run = folder / "run"
    loaded = load(run, training=True)
    config = open_run(run).config()
    write_nanogpt_checkpoint(
        folder / "ckpt.pt", config=config, weights=loaded.state, optimizer=loaded.optimizer_tensors, step=3,
        best_val_loss=2.5, out=folder, dataset="plays"
    )  # fmt: skip
    assert loaded.tokenizer is not None
    write_meta(folder / "meta.pkl", loaded.tokenizer)
    ours = torch.load(folder / "ckpt.pt", weights_only=True)
    sizes = {key: ours["model_args"][key] for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    state = {**ours["model"]}
    for name, shape in {
        name: value.shape[0]
        for name, value in state.items()
        if not name.endswith(("wte.weight", "wpe.weight", "lm_head.weight"))
    }.items():
        state[name.replace(".weight", ".bias")] = torch.zeros(shape)
    theirs = {"model_state_dict": state, "config": sizes, "step": 3, "val_loss_accum": torch.tensor(2.5),
    "optimizer_state_dict": None,
              "train_config": {"max_lr": 6e-4, "max_steps": 9, "sequence_length": 16, "total_batch_size": 32},
              "name": "GPT"}  # fmt: skip
    torch.save(theirs, folder / "checkpoint_000003.bin")


def make_token_folders(folder: Path) -> None:
    """Token files in the formats of nanoGPT, nano-gpt and llm.c, each in a separate folder."""
    ids = np.arange(600, dtype="<u2") % 11
    for name in ("nanogpt", "nano-gpt", "llmc"):
        (folder / name).mkdir()
    for split in ("train", "val"):
        ids.tofile(folder / "nanogpt" / f"{split}.bin")
        np.save(folder / "nano-gpt" / f"edu_{split}.npy.000.npy", ids)
        header = struct.pack("<3i", 20240520, 1, ids.size).ljust(1024, b"\0")
        (folder / "llmc" / f"edu_{split}_000000.bin").write_bytes(header + ids.tobytes())
    chars = {chr(97 + n): n for n in range(11)}
    meta = {"vocab_size": 11, "stoi": chars, "itos": {n: c for c, n in chars.items()}}
    (folder / "nanogpt" / "meta.pkl").write_bytes(pickle.dumps(meta))


def make_hf(folder: Path) -> None:
    """A Llama in the format of `transformers`, in two shards with an index."""
    from safetensors.torch import save_file

    from bardling.interop.huggingface import hf_config, hf_state

    config = ModelConfig(
        family="llama", n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=33, mlp_hidden=32, n_kv_head=1
    ).resolved()
    tensors = hf_state(GPT(config, seed=0).state_dict(), config)
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


# ---- recomputed checksums ----


def seal_dataset(folder: Path, name: str) -> None:
    path = folder / "data/manifest.json"
    content = json.loads(path.read_bytes())
    content.pop("digest", None)
    path.write_text(json.dumps({**content, "digest": dataset_digest(content)}))


def seal_checkpoint(folder: Path, name: str) -> None:
    if name.startswith(f"run/{CHECKPOINT}/") and not name.endswith("/manifest.json"):
        place = folder / "run" / CHECKPOINT
        sealed = checkpoint_manifest.build_manifest(place, 2, True)
        (place / checkpoint_manifest.MANIFEST_NAME).write_text(sealed.to_json())


# ---- loaders ----


def load_python(folder: Path) -> None:
    path = folder / "config.py"
    recipe_toml(run_config_from_nanogpt(read_nanogpt_arguments([str(path)], TRAIN_KEYS, TRAIN_DEFAULTS)), "x")


def load_flags(folder: Path) -> None:
    """The lines of a file as command line flags."""
    path = folder / "config.py"
    with path.open("rb") if path.is_file() else io.BytesIO() as file:
        lines = file.read(1 << 20).decode("utf-8", "replace").split("\n")
    pairs = [line.partition(" = ") for line in lines if " = " in line]
    run_config_from_nanogpt(parse_flat_flags([f"--{key}={value}" for key, _, value in pairs], TRAIN_KEYS))


def load_dataset(folder: Path) -> None:
    os.environ["BARDLING_CACHE"] = str(folder / "cache")  # a folder without a manifest is treated as a folder of texts
    dataset = open_data(DataConfig(source=str(folder / "data")))
    for split in SPLITS:
        part = dataset.split(split)
        part.read(0, min(64, len(part)))
        Documents(dataset, split).at(0, min(64, len(part)))
    _ = dataset.tokenizer
    dataset.verify()
    open_dataset(folder / "data")


def use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    (ids,) = tokenizer.encode_batch(["The king met.\n"])
    tokenizer.decode(ids)
    tokenizer.bytes_per_token()
    (folder / "saved").mkdir(exist_ok=True)
    tokenizer.save(folder / "saved")


def load_checkpoint(folder: Path) -> None:
    """Everything that resuming and sampling do with the files of a checkpoint."""
    place = folder / "run" / CHECKPOINT
    before = rng_state()
    try:
        whole = read_checkpoint(place)
        model = GPT(whole.model_config, seed=None)
        model.load_state_dict(whole.model_state)
        config = OptimConfig()
        optimizer = build_optimizer(model.named_parameters(), config, torch.device("cpu"))
        load_optimizer_tensors(optimizer, dict(model.named_parameters()), whole.optimizer_tensors, whole.optimizer_meta)
        restore_rng(whole.rng)
    finally:
        restore_rng(before)
    load(place).build()


def show_run(folder: Path) -> None:
    """`bardling info --verify` on the run and on the checkpoint."""
    info.run([str(folder / "run"), "--verify"])
    info.run([str(folder / "run" / CHECKPOINT), "--verify"])


def show_step(folder: Path) -> None:
    """`bardling info --step`."""
    os.environ["BARDLING_CACHE"] = str(folder / "cache")
    info.run([str(folder / "run"), "--step", "2"])


def load_metrics(folder: Path) -> None:
    read_jsonl(folder / "run/metrics.jsonl")
    truncate_after(folder / "run/metrics.jsonl", 2)


def draw_metrics(folder: Path) -> None:
    """`bardling report` without the drawing."""
    from bardling.report.curve import curve, has_bits, smooth

    records = read_jsonl(folder / "run/metrics.jsonl")
    for kind in ("train", "val"):
        smooth(curve(records, kind, has_bits(records)).values)


def resume_run(folder: Path) -> None:
    os.environ["BARDLING_CACHE"] = str(folder / "cache")
    resume(folder / "run", quiet=True)


def load_foreign(name: str) -> Callable[[Path], None]:
    def use(folder: Path) -> None:
        load(folder / name, training=True).build()
        foreign_config(folder / name)

    return use


def load_meta(folder: Path) -> None:
    from bardling.data.tokens.token_files import read_meta

    _, tokenizer = read_meta(folder / "meta.pkl")
    if tokenizer is not None:
        tokenizer.bytes_per_token()


def open_tokens(name: str) -> Callable[[Path], None]:
    def use(folder: Path) -> None:
        dataset = open_token_folder(folder / name)
        part = dataset.split("train")
        part.read(0, min(64, len(part)))
        _ = dataset.tokenizer

    return use


SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")
SKIPS = "run/skips.json"
DATA_FILES = ("data/train-00000.bin", "data/tokenizer.json", "data/documents-train.bin", "data/documents-train.jsonl")
RUN_FILES = tuple(
    f"run/{name}"
    for name in ("config.toml", "dataset.json", "environment.json", "metrics.jsonl", "samples.jsonl", "tokenizer.json")
)
STATE_FILES = tuple(
    f"run/{CHECKPOINT}/{name}"
    for name in (
        "config.json", "training.json", "run_config.json", "model.safetensors", "optimizer.safetensors", "rng.safetensors",
        "tokenizer.json",
    )
)  # fmt: skip
MANIFEST = (f"run/{CHECKPOINT}/manifest.json",)

TARGETS = (
    Target("recipe (TOML)", 12, make_recipe, ("recipe.toml",), lambda folder: load_recipe(str(folder / "recipe.toml"))),
    Target("nanoGPT config (.py)", 10, make_python, ("config.py",), load_python),
    Target("nanoGPT flags", 5, make_python, ("config.py",), load_flags),
    Target("dataset", 10, make_dataset, ("data/manifest.json",) * 4 + DATA_FILES, load_dataset, seal_dataset,
           writes=True),
    Target("tokenizer.json", 8, make_tokenizer, ("tokenizer.json",) * 4 + ("tokenizer_config.json",), use_tokenizer,
    writes=True),
    Target("checkpoint", 16, make_run, STATE_FILES, load_checkpoint),
    Target("run and its manifests", 6, make_run, RUN_FILES + STATE_FILES + MANIFEST * 6, show_run, seal_checkpoint),
    Target("run, one step", 4, make_run, (*RUN_FILES[:4], SKIPS, SKIPS), show_step),
    Target("metrics.jsonl", 6, make_run, ("run/metrics.jsonl",), load_metrics, writes=True),
    Target("metrics.jsonl, drawn", 3, make_run, ("run/metrics.jsonl",), draw_metrics),
    Target("run, resumed", 4, make_run, (*RUN_FILES[1:], *STATE_FILES, *MANIFEST, SKIPS), resume_run, seal_checkpoint,
    writes=True),
    Target("transformers folder", 8, make_hf, ("config.json",) * 2 + ("model.safetensors.index.json",
    "model-00001-of-00002.safetensors"),
           lambda folder: load(folder).build()),
    Target("nanoGPT ckpt.pt", 8, make_foreign, ("ckpt.pt",), load_foreign("ckpt.pt")),
    Target("nano-gpt checkpoint", 5, make_foreign, ("checkpoint_000003.bin",), load_foreign("checkpoint_000003.bin")),
    Target("nanoGPT meta.pkl", 6, make_foreign, ("meta.pkl",), load_meta),
    Target("nanoGPT tokens", 3, make_token_folders, ("nanogpt/train.bin", "nanogpt/val.bin", "nanogpt/meta.pkl"),
    open_tokens("nanogpt")),
    Target("nano-gpt tokens (.npy)", 5, make_token_folders, ("nano-gpt/edu_train.npy.000.npy",), open_tokens("nano-gpt")),
    Target("llm.c tokens", 3, make_token_folders, ("llmc/edu_train_000000.bin",), open_tokens("llmc")),
)  # fmt: skip
