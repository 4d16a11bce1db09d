"""The model that a run with LoRA adapts: a copy in the run folder, so that the run needs nothing outside it.

Checkpoints name this copy as their base model, in PEFT's format, so it has the tokens that a chat template adds.
"""

import torch

from bardling.checkpoint.contents import write_model
from bardling.checkpoint.load import Loaded, load
from bardling.checkpoint.run_folder import RunFolder
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError
from bardling.files.atomic import atomic_folder


def write_base(run: RunFolder, model: Loaded, tokenizer: Tokenizer | None) -> None:
    """Write the weights in the dtype of the files that they come from."""
    with atomic_folder(run.base) as folder:
        write_model(folder, model.config, model.state, tokenizer, dtype=getattr(torch, model.dtype))


def load_base(run: RunFolder) -> Loaded:
    """Load the copy.

    Raises:
        UserError: it is missing or damaged.
    """
    if not run.base.is_dir():
        raise UserError(f"{run.base}: is missing: it holds the weights that this run adapts: restore it from a copy")
    return load(run.base, adapters=False)
