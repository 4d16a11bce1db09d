"""Export: a model as a folder that `transformers` opens, or as nanoGPT's `ckpt.pt`. Existing files are never overwritten.

A new format is one exporter function and one line in `EXPORT_FORMATS` (`extensions.py`).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from bardling.checkpoint.contents import write_model
from bardling.checkpoint.load import Loaded, load, run_of
from bardling.config import ModelConfig, RunConfig
from bardling.config.architecture import GPT2_VOCAB_SIZE
from bardling.errors import UserError
from bardling.files.atomic import atomic_folder, check_place
from bardling.interop.huggingface import refuse_nonfinite
from bardling.interop.nanogpt_checkpoint import write_meta, write_nanogpt_checkpoint


class Exporter(Protocol):
    """Writes the model `spec` (see `checkpoint.load.load`) to `out`, which must not exist, and returns notes for the user."""

    def __call__(self, spec: str, out: Path, *, best: bool, dataset: str) -> list[str]: ...


class ExportFormat(NamedTuple):
    """One format of `bardling export`."""

    write: Exporter
    usage: str  # what to do with the result; {out} is its path, and {quoted} the same for a shell
    refusal: Callable[[ModelConfig], str] = lambda _: ""  # why the format cannot hold such a model; empty if it can
    dtype: str = "float32"  # of the weights that are written


def _load(spec: str, out: Path, target: ExportFormat, *, best: bool, training: bool = False) -> Loaded:
    """The model to export, after checking that it can be exported to `out`."""
    check_place(out)
    if out.exists():
        raise UserError(f"{out}: already exists: remove it, or choose another --out")
    loaded = load(spec, best=best, training=training)
    if refusal := target.refusal(loaded.config):
        raise UserError(f"{spec}: {refusal}")
    refuse_nonfinite(loaded.state, spec)
    return loaded


def export_hf(spec: str, out: Path, *, best: bool = False, dataset: str = "") -> list[str]:
    """Write `config.json`, `model.safetensors` and the tokenizer of the model `spec` into the new folder `out`."""
    loaded = _load(spec, out, HF, best=best)
    tokenizer, notes = None, [loaded.note] if loaded.note else []
    try:
        tokenizer = loaded.needed_tokenizer()
    except UserError as reason:
        notes.append(f"written without a tokenizer: {reason}")
    with atomic_folder(out) as folder:
        write_model(folder, loaded.config, loaded.state, tokenizer)
    return notes


def export_nanogpt(spec: str, out: Path, *, best: bool = False, dataset: str = "bardling") -> list[str]:
    """Write the model `spec` and its optimizer state as `out/ckpt.pt`, and `meta.pkl` beside it for a character vocabulary.

    `dataset` is the folder below nanoGPT's `data/` where its programs look for data and `meta.pkl`. Returns what nanoGPT does
    differently or needs besides, one sentence each.
    """
    loaded = _load(spec, out, NANOGPT, best=best, training=True)
    run = run_of(spec)
    with atomic_folder(out) as folder:
        notes = write_nanogpt_checkpoint(
            folder / "ckpt.pt",
            config=dataclasses.replace(RunConfig() if run is None else run.trained_config(), model=loaded.config),
            weights=loaded.state,
            optimizer=loaded.optimizer_tensors,
            step=loaded.step,
            best_val_loss=loaded.best_val_loss,
            out=out,
            dataset=dataset,
        )
        if loaded.tokenizer is not None and loaded.tokenizer.kind == "char":
            write_meta(folder / "meta.pkl", loaded.tokenizer)
            notes.append(f"copy {out / 'meta.pkl'} to data/{dataset}/ in nanoGPT's folder, where its sample.py looks for it")
        elif loaded.tokenizer is not None and loaded.tokenizer.vocab_size != GPT2_VOCAB_SIZE:
            notes.append(
                f"nanoGPT's sample.py supports only character and GPT-2 tokenizers, not this {loaded.tokenizer.kind!r} "
                "tokenizer: nanoGPT can train the model further, but not sample from it"
            )
    return notes


def _hf_refusal(config: ModelConfig) -> str:
    mismatch = config.architecture.transformers_mismatch
    return f"cannot be exported for transformers: {mismatch}" if mismatch else ""


def _nanogpt_refusal(config: ModelConfig) -> str:
    options = config.architecture.unsupported_options("nanogpt")
    return f"cannot be exported for nanoGPT, which does not support {', '.join(options)}" if options else ""


HF = ExportFormat(export_hf, "{out}: load it with transformers: AutoModelForCausalLM.from_pretrained({out!r})", _hf_refusal)
NANOGPT = ExportFormat(
    export_nanogpt, "{out}/ckpt.pt: sample from it with nanoGPT: python sample.py --out_dir={quoted}", _nanogpt_refusal
)
