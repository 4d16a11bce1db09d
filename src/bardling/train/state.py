"""What a run is made of at one moment: all that has to be saved so that it can go on as if nothing had happened."""

import math
from dataclasses import dataclass, field

import torch

from bardling.model.gpt import GPT
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
    recent: Recent = field(default_factory=Recent)  # what the guard against bad steps compares with
