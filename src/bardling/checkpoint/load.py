"""Open what a user points at: a run, one of its checkpoints, or any folder that `transformers` would open."""

import sys
from pathlib import Path

from bardling.checkpoint.runfolder import RunFolder, open_run
from bardling.checkpoint.state import read_model
from bardling.data.tokenizer import Tokenizer, load_tokenizer
from bardling.errors import UserError
from bardling.model.gpt import GPT


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


def load_model(path: Path | str, *, best: bool = False) -> GPT:
    """The model of a run, a checkpoint or a GPT-2 folder, in host memory and evaluation mode.

    Args:
        best: of a run, the checkpoint with the best validation loss instead of the newest.
    """
    config, state = read_model(find_checkpoint(Path(path), best=best))
    model = GPT(config, seed=None)
    model.load_state_dict(state)
    return model.eval()


def load_tokenizer_of(path: Path | str) -> Tokenizer:
    """The tokenizer of a run or a checkpoint.

    Raises:
        UserError: it has none.
    """
    folder = Path(path)
    if not (folder / "tokenizer.json").is_file():
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
