"""Architectures: families, their defaults, and which models `transformers` can load.

A `ModelConfig` holds the user's settings, most of which default to the family's. An `Architecture` has a value for every
option. The options are independent of each other and a family is only a set of defaults, so whether `transformers` can load a
model depends on the architecture (`transformers_family`), never on the name of the family.

Sources of the families: GPT-2, Radford et al. 2019. Llama, Touvron et al. 2023 (arXiv:2302.13971, 2307.09288). Qwen3, Yang et
al. 2025 (arXiv:2505.09388). The source of each option is cited where it is computed, in `model/`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Family = Literal["gpt2", "llama", "qwen3", "custom"]
TransformersFamily = Literal["gpt2", "llama", "qwen3"]
Implementation = Literal["gpt2", "llama", "qwen3", "nanogpt"]
Norm = Literal["layernorm", "rmsnorm"]
Positions = Literal["learned", "rotary"]
QKNorm = Literal["off", "plain", "weight"]

GPT2_VOCAB_SIZE = 50257  # of GPT-2's tokenizer, the end-of-text token included


@dataclass(frozen=True)
class FamilyDefaults:
    """Values of the options that are unset."""

    norm: Norm
    norm_eps: float
    positions: Positions
    qk_norm: QKNorm
    mlp: str
    biases: bool  # False: no biases, whatever model.bias is
    tied: bool
    rope_theta: float = 10_000.0


FAMILIES: dict[Family, FamilyDefaults] = {
    "gpt2": FamilyDefaults("layernorm", 1e-5, "learned", "off", "gelu", biases=True, tied=True),
    "llama": FamilyDefaults("rmsnorm", 1e-5, "rotary", "off", "swiglu", biases=False, tied=False),
    # Qwen3 models of up to 4B parameters tie the head.
    "qwen3": FamilyDefaults("rmsnorm", 1e-6, "rotary", "weight", "swiglu", biases=False, tied=True, rope_theta=1_000_000.0),
    "custom": FamilyDefaults("layernorm", 1e-5, "learned", "off", "gelu", biases=True, tied=True),
}


@dataclass(frozen=True)
class Architecture:
    """Everything that determines the function of a model. Sizes in channels, heads, layers or tokens."""

    n_layer: int
    n_embd: int
    norm: Norm
    norm_eps: float
    positions: Positions
    rope_theta: float
    qk_norm: QKNorm
    n_head: int
    n_kv_head: int
    head_dim: int
    mlp: str
    mlp_hidden: int
    bias: bool
    tied: bool
    logit_softcap: float
    sliding_window: int | None
    global_every: int
    value_embeddings: int

    @property
    def query_width(self) -> int:
        """Channels of all query heads together."""
        return self.n_head * self.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of all key heads together; the same for value heads."""
        return self.n_kv_head * self.head_dim

    @property
    def fc_width(self) -> int:
        """Outputs of the MLP's first matrix; for SwiGLU, the gate followed by the gated values."""
        return self.mlp_hidden * (2 if self.mlp == "swiglu" else 1)

    def window(self, layer: int) -> int | None:
        """Attention window of a layer (tokens), including the current token; None: full attention."""
        if self.sliding_window is None or (self.global_every and (layer + 1) % self.global_every == 0):
            return None
        return self.sliding_window

    def value_table(self, layer: int) -> int | None:
        """Index of the value embedding that a layer uses: layer i from the start and layer i from the end share table i."""
        table = min(layer, self.n_layer - 1 - layer)
        return table if table < self.value_embeddings else None

    @property
    def value_layers(self) -> int:
        """Number of layers that use a value embedding."""
        return sum(self.value_table(layer) is not None for layer in range(self.n_layer))

    def unsupported_options(self, family: Implementation) -> list[str]:
        """Options that nanoGPT, or `family` in `transformers`, does not support, such as 'model.mlp = relu2'."""
        expected: dict[str, object] = {"logit_softcap": 0.0, "value_embeddings": 0}
        if family in ("gpt2", "nanogpt"):
            expected |= {"norm": "layernorm", "positions": "learned", "qk_norm": "off", "mlp": "gelu"}
            expected |= {"n_kv_head": self.n_head, "head_dim": self.n_embd // self.n_head, "sliding_window": None}
            if family == "nanogpt":
                expected |= {"norm_eps": 1e-5, "mlp_hidden": 4 * self.n_embd, "tied": True}
        else:
            expected |= {"norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu", "bias": False}
            expected |= {"qk_norm": "weight"} if family == "qwen3" else {"qk_norm": "off", "sliding_window": None}
        found = [f"model.{key} = {getattr(self, key)}" for key, value in expected.items() if getattr(self, key) != value]
        if family == "llama" and self.n_embd % self.n_head:
            found.append(f"model.n_head = {self.n_head}, which does not divide model.n_embd = {self.n_embd}")
        return found

    @property
    def transformers_family(self) -> TransformersFamily | None:
        """The `transformers` model that computes the same function from the same weights; None if there is none."""
        return next((family for family in get_args(TransformersFamily) if not self.unsupported_options(family)), None)

    @property
    def transformers_mismatch(self) -> str:
        """Why `transformers` cannot load the model, in terms of the closest family; empty if it can."""
        options = {family: self.unsupported_options(family) for family in get_args(TransformersFamily)}
        closest = min(options, key=lambda family: len(options[family]))
        return f"{', '.join(options[closest])}: not supported by {closest} in transformers" if options[closest] else ""
