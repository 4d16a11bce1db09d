"""Export: a model as a folder that `transformers` opens, or as nanoGPT's `ckpt.pt`. Nothing that exists is overwritten."""

import dataclasses
import shutil
from pathlib import Path

from bardling.checkpoint.load import GPT2_VOCAB, load, run_of
from bardling.checkpoint.state import write_model
from bardling.config import RunConfig
from bardling.errors import UserError
from bardling.files import remove_abandoned, unfinished
from bardling.interop.huggingface import refuse_diverged
from bardling.interop.nanogpt_checkpoint import write_meta, write_nanogpt_checkpoint


def export_hf(spec: str, out: Path, *, best: bool = False) -> None:
    """Write `config.json`, `model.safetensors` and the tokenizer of the model `spec` into the new folder `out`.

    Raises:
        UserError: `out` exists, there is no such model, its weights are NaN or infinite, or `transformers` has none that
            computes the same.
    """
    if out.exists():
        raise UserError(f"{out}: exists already: remove it, or choose another --out")
    loaded = load(spec, best=best)
    if loaded.config.architecture.opens_as is None:
        raise UserError(f"{spec}: cannot be written for transformers: {loaded.config.architecture.why_not}")
    refuse_diverged(loaded.state, spec)
    remove_abandoned(out)
    beside = unfinished(out)
    try:
        beside.mkdir(parents=True)
        write_model(beside, loaded.config, loaded.state, loaded.tokenizer)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def export_nanogpt(spec: str, out: Path, *, best: bool = False, dataset: str = "bardling") -> list[str]:
    """Write the model `spec`, with its optimizer's state, as `out/ckpt.pt`; beside it `meta.pkl`, if its tokens are characters.

    Args:
        dataset: the folder below nanoGPT's `data/` where its programs look for data and `meta.pkl`.

    Returns:
        What nanoGPT will do differently or needs besides, a sentence each.

    Raises:
        UserError: there is no such model, its weights are NaN or infinite, one of the files exists, or the model is no GPT-2.
    """
    for file in (out / "ckpt.pt", out / "meta.pkl"):
        if file.exists():
            raise UserError(f"{file}: exists already: remove it, or choose another --out")
    loaded = load(spec, best=best, training=True)
    beyond = loaded.config.architecture.beyond("gpt2")
    if beyond:
        raise UserError(f"{spec}: cannot be written for nanoGPT, which has no {', '.join(beyond)}")
    refuse_diverged(loaded.state, spec)
    owner = run_of(Path(spec))
    config = dataclasses.replace(RunConfig() if owner is None else owner.config(), model=loaded.config)
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
        notes.append(
            f"copy {out / 'meta.pkl'} to data/{dataset}/ in nanoGPT's folder: its sample.py reads the characters there"
        )
    elif loaded.tokenizer is not None and loaded.tokenizer.vocab_size != GPT2_VOCAB:
        notes.append(
            f"nanoGPT's sample.py knows characters and GPT-2's tokens only, not this {loaded.tokenizer.kind!r} tokenizer: "
            "nanoGPT can go on training the model, but not write with it"
        )
    return notes
