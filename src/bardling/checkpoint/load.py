"""Open any model a user points at: a run, one of its checkpoints, a `transformers` folder, a model on the hub, a checkpoint of
nanoGPT (`ckpt.pt` or its folder) or of nano-gpt (`checkpoint_005000.bin`); and what a resumed run continues from.
"""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bardling.checkpoint.contents import Checkpoint, read_checkpoint, read_model
from bardling.checkpoint.run_folder import RunFolder, open_run
from bardling.config import ModelConfig
from bardling.config.architecture import GPT2_VOCAB_SIZE
from bardling.data.tokens.token_files import gpt2_tokenizer, read_meta
from bardling.data.tokens.tokenizer import Tokenizer, load_tokenizer
from bardling.distributed.context import Context
from bardling.errors import UserError
from bardling.files.paths import expand_home
from bardling.interop.huggingface import read_hf_folder
from bardling.interop.imported import ImportedCheckpoint
from bardling.interop.nano_gpt import read_nano_gpt_checkpoint
from bardling.interop.nanogpt_checkpoint import read_nanogpt_checkpoint
from bardling.interop.pretrained import fetch_model, is_hub_name
from bardling.model.gpt import GPT
from bardling.model.init import crop_block_size


@dataclass(frozen=True)
class Loaded:
    """A model and what is known about it; its training state is present only if requested and available."""

    config: ModelConfig
    state: dict[str, Tensor]  # GPT.state_dict()
    tokenizer: Tokenizer | None = None
    optimizer_tensors: dict[str, Tensor] = field(default_factory=dict)
    optimizer_meta: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    best_val_loss: float | None = None
    imported: ImportedCheckpoint | None = None  # the content of another trainer's file

    def cropped(self, block_size: int) -> "Loaded":
        """A copy with at most `block_size` positions, in the weights and in the optimizer state."""
        if block_size >= self.config.block_size:
            return self
        return dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, block_size=block_size),
            state=crop_block_size(self.state, block_size),
            optimizer_tensors=crop_block_size(self.optimizer_tensors, block_size),
        )

    def build(self) -> GPT:
        """Build the model in host memory and evaluation mode."""
        model = GPT(self.config, seed=None)
        model.load_state_dict(self.state)
        return model.eval()


def load(spec: str | Path, *, best: bool = False, training: bool = False) -> Loaded:
    """Open a model: a run, a checkpoint, a folder or file of another trainer, or a name on the hub.

    `best`: of a run, the checkpoint with the best validation loss instead of the latest. `training`: also read the optimizer
    state, if there is one. Raises a `UserError` if there is no such model, or it is damaged or unsafe.
    """
    spec = expand_home(spec) if isinstance(spec, str) else spec
    path, from_hub = Path(spec), is_hub_name(spec)
    if not from_hub and path.is_file():
        return _load_imported(path)
    if not from_hub and not (path / "config.toml").is_file() and (path / "ckpt.pt").is_file():
        return _load_imported(path / "ckpt.pt")
    folder = fetch_model(str(spec)) if from_hub else find_checkpoint(path, best=best)
    if not training or not (folder / "training.json").is_file():
        read = read_model if (folder / "training.json").is_file() else read_hf_folder
        return Loaded(*read(folder), _tokenizer(folder))
    found = read_checkpoint(folder)
    tokenizer, step, loss = _tokenizer(folder), found.training["step"], found.training["best_val_loss"]
    return Loaded(found.model_config, found.model_state, tokenizer, found.optimizer_tensors, found.optimizer_meta, step, loss)


def load_model(spec: Path | str, *, best: bool = False) -> GPT:
    """Load the model `spec` (see `load`) in host memory and evaluation mode."""
    return load(spec, best=best).build()


def _load_imported(path: Path) -> Loaded:
    """Load a checkpoint file of nano-gpt (`.bin`) or nanoGPT (any other name)."""
    found = read_nano_gpt_checkpoint(path) if path.suffix == ".bin" else read_nanogpt_checkpoint(path)
    tokenizer, optimizer = _tokenizer(path.parent) or _imported_tokenizer(path, found), found.optimizer or {}
    meta = found.optimizer_meta if optimizer else {}
    return Loaded(found.config, found.weights, tokenizer, optimizer, meta, found.step, found.best_val_loss, found)


def _imported_tokenizer(path: Path, found: ImportedCheckpoint) -> Tokenizer | None:
    """The tokenizer of a nanoGPT checkpoint: from a meta.pkl beside it or in its dataset's folder, else GPT-2's."""
    folders, dataset = [path.parent], found.settings.get("dataset")
    if isinstance(dataset, str):
        folders += [base / "data" / dataset for base in (Path(), path.parent, path.parent.parent)]
    for folder in folders:
        if (folder / "meta.pkl").is_file():
            return read_meta(folder / "meta.pkl")[1]
    return gpt2_tokenizer() if found.config.vocab_size >= GPT2_VOCAB_SIZE else None


def _tokenizer(folder: Path) -> Tokenizer | None:
    return load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None


def find_checkpoint(path: Path, *, best: bool = False) -> Path:
    """The checkpoint folder for `path`: itself, or the latest valid (or the best) checkpoint of a run."""
    if (path / "config.json").is_file():
        return path
    run = open_run(path)
    found = run.store().best() if best else run.store().latest(_report)
    if found is None:
        kind = "best checkpoint" if best else "checkpoint"
        raise UserError(f"{path}: has no {kind} yet; continue the run with `bardling resume {path}`")
    return found


def load_tokenizer_of(spec: Path | str) -> Tokenizer:
    """Load the tokenizer of a run, a checkpoint or a model folder."""
    folder = fetch_model(str(spec)) if is_hub_name(spec) else Path(spec)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer.json", "ckpt.pt")):
        folder = find_checkpoint(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: has no tokenizer.json: copy the model's tokenizer there")
    return load_tokenizer(folder)


def run_of(spec: Path | str) -> RunFolder | None:
    """The run at `spec`, or the run that the checkpoint `spec` belongs to; None if it names a model on the hub."""
    if is_hub_name(spec):
        return None
    path = Path(spec)
    runs = map(RunFolder, (path, path.absolute().parent.parent))
    return next((run for run in runs if run.config_file.is_file()), None)


def latest_checkpoint(folder: RunFolder, context: Context) -> Checkpoint | None:
    """The latest valid checkpoint of a run; None if there are none, a `UserError` if all are damaged."""
    checkpoint: Checkpoint | None = None

    def find() -> int | None:
        nonlocal checkpoint
        checkpoint = _latest(folder)
        return None if checkpoint is None else checkpoint.training["step"]

    step = context.on_primary(find)  # for all: processes must not start with different checkpoints
    return checkpoint if context.is_primary or step is None else read_checkpoint(folder.store().path(step))


def _latest(folder: RunFolder) -> Checkpoint | None:
    store = folder.store()
    for path in store.valid_checkpoints(_report):
        try:
            return read_checkpoint(path)
        except UserError as unreadable:  # all checksums match, and yet the content is not usable
            _report(f"{path}: cannot be used and is skipped: {unreadable}")
    if store.steps():
        raise UserError(
            f"{store.path(store.steps()[-1])}: every checkpoint of this run is damaged (see above): restore one from a copy, "
            "or start a new run"
        )
    return None


def _report(message: str) -> None:
    print(f"bardling: {message}", file=sys.stderr)
