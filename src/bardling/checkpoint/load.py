"""Open what a user points at, whoever wrote it: a run, one of its checkpoints, a `transformers` folder, a model on the hub, a
checkpoint of nanoGPT (`ckpt.pt`, or the folder it lies in) or of nano-gpt (`checkpoint_005000.bin`).
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bardling.checkpoint.runfolder import RunFolder, open_run
from bardling.checkpoint.state import read_checkpoint, read_model
from bardling.config import ModelConfig
from bardling.data.tokenizer import Tokenizer, load_tokenizer
from bardling.errors import UserError
from bardling.interop.hub import fetch_model, is_hub_name
from bardling.interop.huggingface import load_hf_folder
from bardling.interop.imported import ImportedCheckpoint
from bardling.interop.nano_gpt import read_nano_gpt_checkpoint
from bardling.interop.nanogpt_checkpoint import read_nanogpt_checkpoint
from bardling.interop.tokenfiles import gpt2_tokenizer, read_meta
from bardling.model.gpt import GPT
from bardling.model.init import POSITIONS, crop_block_size, crop_positions

GPT2_VOCAB = 50257


@dataclass(frozen=True)
class Loaded:
    """A model with what is known of it; the state of its training is there only when it was asked for and exists."""

    config: ModelConfig
    state: dict[str, Tensor]  # as GPT.state_dict()
    tokenizer: Tokenizer | None = None
    optimizer_tensors: dict[str, Tensor] = field(default_factory=dict)
    optimizer_meta: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    best_val_loss: float | None = None
    foreign: ImportedCheckpoint | None = None  # what another trainer's file said

    def cropped(self, block_size: int) -> "Loaded":
        """The same with at most `block_size` positions, in the weights and in the optimizer's state."""
        if block_size >= self.config.block_size:
            return self
        tensors = {
            name: crop_positions(tensor, block_size) if name.startswith(POSITIONS) and tensor.ndim else tensor
            for name, tensor in self.optimizer_tensors.items()
        }
        config = dataclasses.replace(self.config, block_size=block_size)
        return dataclasses.replace(
            self, config=config, state=crop_block_size(self.state, block_size), optimizer_tensors=tensors
        )

    def build(self) -> GPT:
        """The model, in host memory and evaluation mode."""
        model = GPT(self.config, seed=None)
        model.load_state_dict(self.state)
        return model.eval()


def load(spec: str | Path, *, best: bool = False, training: bool = False) -> Loaded:
    """Open a model.

    Args:
        spec: a run, a checkpoint, a folder or file of another trainer, or a name on the hub.
        best: of a run, the checkpoint with the best validation loss instead of the newest.
        training: also read the optimizer's state, where there is one.

    Raises:
        UserError: there is nothing of the kind, or it is damaged or unsafe.
    """
    path = Path(spec)
    if path.is_file():
        return _foreign(path)
    if not path.exists() and is_hub_name(str(spec)):
        return _folder(fetch_model(str(spec)))
    if path.is_dir() and not (path / "config.toml").is_file() and (path / "ckpt.pt").is_file():
        return _foreign(path / "ckpt.pt")
    folder = find_checkpoint(path, best=best)
    if not (folder / "training.json").is_file():
        return _folder(folder)
    if not training:
        config, state = read_model(folder)
        return Loaded(config, state, _tokenizer(folder))
    whole = read_checkpoint(folder)
    return Loaded(
        whole.model_config,
        whole.model_state,
        _tokenizer(folder),
        whole.optimizer_tensors,
        whole.optimizer_meta,
        whole.training["step"],
        whole.training["best_val_loss"],
    )


def load_model(spec: Path | str, *, best: bool = False) -> GPT:
    """The model that `spec` means (see `load`), in host memory and evaluation mode."""
    return load(spec, best=best).build()


def _folder(folder: Path) -> Loaded:
    model = load_hf_folder(folder)
    return Loaded(model.config, model.state_dict(), _tokenizer(folder))


def _foreign(path: Path) -> Loaded:
    """A checkpoint file of nanoGPT or nano-gpt, told apart by their names' endings."""
    found = read_nano_gpt_checkpoint(path) if path.suffix == ".bin" else read_nanogpt_checkpoint(path)
    meta = found.optimizer_meta if found.optimizer else {}
    return Loaded(
        found.config,
        found.weights,
        _tokenizer(path.parent) or _foreign_tokenizer(path, found),
        found.optimizer or {},
        meta,
        found.step,
        found.best_val_loss,
        found,
    )


def _foreign_tokenizer(path: Path, found: ImportedCheckpoint) -> Tokenizer | None:
    """The tokenizer of a nanoGPT checkpoint: of a meta.pkl beside it or in its dataset's folder, or else GPT-2's."""
    if (path.parent / "meta.pkl").is_file():
        return read_meta(path.parent / "meta.pkl")[1]
    dataset = found.settings.get("dataset")
    if isinstance(dataset, str):
        for base in (Path(), path.parent, path.parent.parent):
            meta = base / "data" / dataset / "meta.pkl"
            if meta.is_file():
                return read_meta(meta)[1]
    return gpt2_tokenizer() if found.config.vocab_size >= GPT2_VOCAB else None


def _tokenizer(folder: Path) -> Tokenizer | None:
    return load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None


def find_checkpoint(path: Path, *, best: bool = False) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest sound one (or the best one) of a run.

    Raises:
        UserError: there is none.
    """
    if (path / "config.json").is_file():
        return path
    run = open_run(path)
    found = run.store().best() if best else run.store().latest(lambda message: print(f"bardling: {message}", file=sys.stderr))
    if found is None:
        raise UserError(
            f"{path}: has no {'best ' if best else ''}checkpoint yet; `bardling resume {path}` goes on with the run"
        )
    return found


def load_tokenizer_of(spec: Path | str) -> Tokenizer:
    """The tokenizer of a run, a checkpoint or a model's folder.

    Raises:
        UserError: it has none.
    """
    folder = fetch_model(str(spec)) if is_hub_name(str(spec)) else Path(spec)
    if not (folder / "tokenizer.json").is_file() and not (folder / "ckpt.pt").is_file() and folder.is_dir():
        folder = find_checkpoint(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: has no tokenizer.json: copy the model's tokenizer there")
    return load_tokenizer(folder)


def run_of(path: Path) -> RunFolder | None:
    """The run that `path` is, or that it is a checkpoint of."""
    for folder in (path, path.absolute().parent.parent):
        if (folder / "config.toml").is_file():
            return RunFolder(folder)
    return None
