"""`bardling export RUN --format hf|nanogpt --out PATH`: write a model in a format that other software loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bardling.cli.parse import Model, parse
from bardling.extensions import EXPORT_FORMATS
from bardling.files.paths import shell_path


@dataclass(frozen=True)
class ExportOptions:
    model: Model
    """A run, a checkpoint, or a nanoGPT or nano-gpt checkpoint file."""
    out: Path
    """Folder to create."""
    format: str = "hf"
    """'hf': config.json, model.safetensors and the tokenizer, for transformers and vLLM. 'nanogpt': a ckpt.pt.
    Installed extensions may add others."""
    best: bool = False
    """For a run: use the checkpoint with the lowest validation loss instead of the latest."""
    dataset: str = "bardling"
    """For nanogpt: the folder under its data/ in which sample.py finds the tokenizer's meta.pkl."""


def run(argv: Sequence[str]) -> None:
    description = "Write a model in a format that other software loads."
    options = parse(ExportOptions, argv, prog="bardling export", description=description)
    target = EXPORT_FORMATS.get("--format", options.format)
    for note in target.write(options.model, options.out, best=options.best, dataset=options.dataset):
        print(f"note: {note}")
    print(f"weights: {target.dtype}")
    print(target.usage.format(out=str(options.out), quoted=shell_path(options.out)))
