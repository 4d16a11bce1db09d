"""Export: a model as a folder that `transformers` opens, or as nanoGPT's `ckpt.pt`. Nothing that exists is overwritten."""

import dataclasses
import os
import shutil
from pathlib import Path

from bardling.checkpoint.load import load, run_of
from bardling.checkpoint.state import write_model
from bardling.config import RunConfig
from bardling.errors import UserError
from bardling.interop.nanogpt_checkpoint import write_nanogpt_checkpoint


def export_hf(spec: str, out: Path, *, best: bool = False) -> None:
    """Write `config.json`, `model.safetensors` and the tokenizer of the model `spec` into the new folder `out`.

    Raises:
        UserError: `out` exists, or there is no such model.
    """
    if out.exists():
        raise UserError(f"{out}: exists already: remove it, or choose another --out")
    loaded = load(spec, best=best)
    beside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        beside.mkdir(parents=True)
        write_model(beside, loaded.config, loaded.state, loaded.tokenizer)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def export_nanogpt(spec: str, out: Path, *, best: bool = False, dataset: str = "bardling") -> list[str]:
    """Write the model `spec`, with its optimizer's state, as `out/ckpt.pt`.

    Args:
        dataset: the folder below nanoGPT's `data/` where its programs look for data and `meta.pkl`.

    Returns:
        What nanoGPT will do differently, a sentence each.
    """
    loaded = load(spec, best=best, training=True)
    owner = run_of(Path(spec))
    config = dataclasses.replace(RunConfig() if owner is None else owner.config(), model=loaded.config)
    return write_nanogpt_checkpoint(
        out / "ckpt.pt",
        config=config,
        weights=loaded.state,
        optimizer=loaded.optimizer_tensors,
        step=loaded.step,
        best_val_loss=loaded.best_val_loss,
        dataset=dataset,
    )
