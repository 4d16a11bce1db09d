"""`bardling export RUN --format hf|nanogpt --out PATH`: a model in the form that other software opens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from bardling.cli.parse import parse


@dataclass(frozen=True)
class ExportOptions:
    """Options of `bardling export`."""

    model: tyro.conf.Positional[str]
    """A run, a checkpoint, or another trainer's checkpoint file."""
    out: Path
    """What to write: a new folder (hf), or a new folder for its ckpt.pt (nanogpt)."""
    format: Literal["hf", "nanogpt"] = "hf"
    """'hf': config.json, model.safetensors and tokenizer, for transformers and vLLM. 'nanogpt': a ckpt.pt."""
    best: bool = False
    """Of a run, the checkpoint with the best validation loss instead of the newest."""
    dataset: str = "bardling"
    """For nanogpt: the folder below its data/ that holds the tokenizer's meta.pkl."""


def run(argv: Sequence[str]) -> None:
    """Parse, export, and say what was written."""
    options = parse(
        ExportOptions, argv, prog="bardling export", description="Write a model in the form that other software opens."
    )
    from bardling.checkpoint.export import export_hf, export_nanogpt

    if options.format == "hf":
        export_hf(options.model, options.out, best=options.best)
        print(f"{options.out}: open it with transformers' AutoModelForCausalLM.from_pretrained({str(options.out)!r})")
        return
    for note in export_nanogpt(options.model, options.out, best=options.best, dataset=options.dataset):
        print(f"note: {note}")
    print(f"{options.out / 'ckpt.pt'}: sample from it with nanoGPT's sample.py --out_dir={options.out}")
