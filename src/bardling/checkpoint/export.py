"""Export: a model as a folder that `transformers` opens, or as nanoGPT's `ckpt.pt`. Existing files are never overwritten.

A new format is one exporter function and one line in `EXPORT_FORMATS` (`extensions.py`).
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple, Protocol

from bardling.checkpoint.contents import write_model
from bardling.checkpoint.load import load, run_of
from bardling.config import RunConfig
from bardling.config.architecture import GPT2_VOCAB_SIZE
from bardling.errors import UserError
from bardling.files.atomic import atomic_folder
from bardling.interop.huggingface import refuse_nonfinite
from bardling.interop.nanogpt_checkpoint import write_meta, write_nanogpt_checkpoint


class Exporter(Protocol):
    """Writes the model `spec` (see `checkpoint.load.load`) to `out`, which must not exist, and returns notes for the user."""

    def __call__(self, spec: str, out: Path, *, best: bool, dataset: str) -> list[str]: ...


def export_hf(spec: str, out: Path, *, best: bool = False, dataset: str = "") -> list[str]:
    """Write `config.json`, `model.safetensors` and the tokenizer of the model `spec` into the new folder `out`."""
    if out.exists():
        raise UserError(f"{out}: already exists: remove it, or choose another --out")
    loaded = load(spec, best=best)
    if loaded.config.architecture.transformers_family is None:
        raise UserError(f"{spec}: cannot be exported for transformers: {loaded.config.architecture.transformers_mismatch}")
    refuse_nonfinite(loaded.state, spec)
    with atomic_folder(out) as folder:
        write_model(folder, loaded.config, loaded.state, loaded.tokenizer)
    return []


def export_nanogpt(spec: str, out: Path, *, best: bool = False, dataset: str = "bardling") -> list[str]:
    """Write the model `spec` and its optimizer state as `out/ckpt.pt`, and `meta.pkl` beside it for a character vocabulary.

    Args:
        dataset: the folder below nanoGPT's `data/` where its programs look for data and `meta.pkl`.

    Returns:
        What nanoGPT does differently or needs besides, one sentence each.
    """
    for file in (out / "ckpt.pt", out / "meta.pkl"):
        if file.exists():
            raise UserError(f"{file}: already exists: remove it, or choose another --out")
    loaded = load(spec, best=best, training=True)
    unsupported = loaded.config.architecture.unsupported_options("gpt2")
    if unsupported:
        raise UserError(f"{spec}: cannot be exported for nanoGPT, which does not support {', '.join(unsupported)}")
    refuse_nonfinite(loaded.state, spec)
    run = run_of(Path(spec))
    config = dataclasses.replace(RunConfig() if run is None else run.config(), model=loaded.config)
    notes = write_nanogpt_checkpoint(
        out / "ckpt.pt",
        config=config,
        weights=loaded.state,
        optimizer=loaded.optimizer_tensors,
        step=loaded.step,
        best_val_loss=loaded.best_val_loss,
        dataset=dataset,
    )
    if loaded.tokenizer is not None and loaded.tokenizer.kind == "char":
        write_meta(out / "meta.pkl", loaded.tokenizer)
        notes.append(f"copy {out / 'meta.pkl'} to data/{dataset}/ in nanoGPT's folder, where its sample.py looks for it")
    elif loaded.tokenizer is not None and loaded.tokenizer.vocab_size != GPT2_VOCAB_SIZE:
        notes.append(
            f"nanoGPT's sample.py supports only character and GPT-2 tokenizers, not this {loaded.tokenizer.kind!r} tokenizer: "
            "nanoGPT can train the model further, but not sample from it"
        )
    return notes


class ExportFormat(NamedTuple):
    """One format of `bardling export`."""

    write: Exporter
    usage: str  # what to do with the result; {out} is its path


HF = ExportFormat(export_hf, "{out}: load it with transformers: AutoModelForCausalLM.from_pretrained({out!r})")
NANOGPT = ExportFormat(export_nanogpt, "{out}/ckpt.pt: sample from it with nanoGPT: python sample.py --out_dir={out}")
