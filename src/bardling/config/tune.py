from dataclasses import dataclass
from typing import Literal

from bardling.config.checks import require, require_at_least, require_positive

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block, by Llama's names; only SwiGLU has a gate."""


@dataclass(frozen=True)
class TuneConfig:
    """Finetuning with LoRA: the weights of `model.init` stay as they are, and small adapters beside them are trained."""

    lora_rank: int = 0
    """Rank of the adapters; 0: train all weights instead."""
    lora_alpha: float | None = None
    """An adapter's product is scaled by lora_alpha / lora_rank; unset: twice the rank."""
    lora_targets: tuple[str, ...] = ("all",)
    """Layers with adapters: 'all', or some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj."""
    new_tokens: tuple[int, int] = (0, 0)
    """With adapters, also train the embeddings of the tokens from the first of these ids to below the second; set if a chat
    template adds tokens."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which the fixed matrices of the blocks are kept; bfloat16 halves their memory and rounds them."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "tune", "lora_rank")
        require(self.lora_rank <= 65_536, "tune.lora_rank", self.lora_rank, "must be at most 65536")
        require_positive(self, "tune", "lora_alpha")
        known = {"all", *LORA_TARGETS}
        rule = f"must be 'all', or some of {', '.join(LORA_TARGETS)}"
        require(bool(self.lora_targets) and known.issuperset(self.lora_targets), "tune.lora_targets", self.lora_targets, rule)
        ordered = 0 <= self.new_tokens[0] <= self.new_tokens[1]
        require(ordered, "tune.new_tokens", self.new_tokens, "must be two ids, in ascending order")
        base = self.base_dtype == "float32" or self.lora_rank > 0
        require(base, "tune.base_dtype", self.base_dtype, "needs tune.lora_rank: weights that are trained are float32")

    @property
    def scale(self) -> float:
        """The factor of an adapter's product."""
        return 2.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank

    @property
    def alpha(self) -> float:
        return self.scale * self.lora_rank
