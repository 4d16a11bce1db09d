from dataclasses import dataclass
from typing import Literal

from bardling.config.checks import require, require_at_least, require_positive
from bardling.extensions import OPTIMIZERS


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: str = "adamw"
    """'adamw'; 'muon' (Muon for the matrices inside blocks, AdamW for the rest); or the name of an installed extension."""
    lr: float = 6e-4
    """Peak learning rate; with Muon, of the parameters that AdamW updates."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon; follows the same schedule, and the same value works for models of any width."""
    embed_lr: float | None = None
    """With Muon, peak learning rate of embeddings; unset: lr."""
    head_lr: float | None = None
    """With Muon, peak learning rate of an untied LM head; unset: lr."""
    min_lr: float | None = None
    """Learning rate at the end of the decay; unset: lr / 10."""
    warmup_steps: int = 100
    """Steps of linear warmup to lr."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Schedule after the warmup; 'wsd' (warmup-stable-decay) stays at lr and decays linearly over the last decay_fraction."""
    decay_steps: int | None = None
    """Step at which the decay ends; unset: train.steps."""
    decay_fraction: float = 0.2
    """Fraction of the steps over which 'wsd' decays."""
    weight_decay: float = 0.1
    """Decoupled weight decay, applied to tensors of two or more dimensions."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = 0.95
    """Muon's momentum (Nesterov)."""
    muon_steps: int = 5
    """Newton-Schulz steps with which Muon orthogonalizes an update; fewer are cheaper and less accurate."""
    muon_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the Newton-Schulz steps; auto: bfloat16 if the run uses bfloat16, else float32."""
    cautious_decay: bool = False
    """With Muon, apply weight decay only to matrix entries that the update also moves towards zero."""
    ema_decay: float = 0.0
    """Decay rate of an EMA of the weights, which validation and samples then use (0 disables this)."""

    def __post_init__(self) -> None:
        OPTIMIZERS.check("optim.name", self.name)
        require_positive(self, "optim", "lr", "muon_lr", "embed_lr", "head_lr", "eps")
        require_at_least(0, self, "optim", "warmup_steps", "weight_decay")
        require_at_least(1, self, "optim", "decay_steps")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "must be at least 0 and below 1")
        require(1 <= self.muon_steps <= 20, "optim.muon_steps", self.muon_steps, "must be between 1 and 20")
        require(0 <= self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "must be at least 0 and below 1")
        valid = self.min_lr is None or 0 <= self.min_lr <= self.lr
        require(valid, "optim.min_lr", self.min_lr, f"must be between 0 and optim.lr = {self.lr}")
        require(0 < self.decay_fraction <= 1, "optim.decay_fraction", self.decay_fraction, "must be above 0 and at most 1")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "must each be at least 0 and below 1")

    @property
    def final_lr(self) -> float:
        """Learning rate at the end of the decay."""
        return self.lr / 10 if self.min_lr is None else self.min_lr
