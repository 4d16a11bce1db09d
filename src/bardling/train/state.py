"""What a run is made of at one moment: all that has to be saved so that it can go on as if nothing had happened."""

import contextlib
import math
from dataclasses import dataclass, field

import torch

from bardling.model.gpt import GPT
from bardling.optim.ema import Ema
from bardling.train.spikes import Recent


@dataclass
class TrainState:
    """The model, its optimizer, and where the run stands. Everything else is a function of these and the configuration."""

    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None  # float16 only
    step: int = 0  # optimizer steps done
    samples: int = 0  # sequences seen: the data loader's whole state
    best_val_loss: float = math.inf
    best_step: int = -1  # step of best_val_loss
    hooks_done: dict[str, int] = field(default_factory=dict)  # hook -> last step at which it finished its work
    ema: Ema | None = None  # the running mean of the weights, where one is kept
    seconds: float = 0.0  # that the run has taken, over all its starts, where a deadline counts them
    planned: int = 0  # its last step by the deadline's plan; 0: no deadline
    recent: Recent = field(default_factory=Recent)  # what the guard against bad steps compares with

    def measured(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the model has the weights that users get: the running mean, if one is kept."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()
