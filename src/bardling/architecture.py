"""What a model is made of, once every option has its value: families, their defaults, and what `transformers` can open.

A `ModelConfig` says what was asked; most options may be left unset, "as the family has it". An `Architecture` is the answer,
with every value there. Each option is independent of the others; a family is a set of defaults, nothing more. Whether
`transformers` opens a model is therefore read off the architecture (`opens_as`), never off the family's name.

Sources of the families: GPT-2, Radford et al. 2019. Llama, Touvron et al. 2023 (arXiv:2302.13971, 2307.09288). Qwen3, Yang et
al. 2025 (arXiv:2505.09388). Sources of each option stand where it is computed, in `model/`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from bardling.config import ModelConfig

Family = Literal["gpt2", "llama", "qwen3", "custom"]
Norm = Literal["layernorm", "rmsnorm"]
Positions = Literal["learned", "rotary"]
QKNorm = Literal["off", "plain", "weight"]
Feedforward = Literal["gelu", "swiglu", "relu2"]


@dataclass(frozen=True)
class FamilyDefaults:
    """What a family's models have unless an option says otherwise."""

    norm: Norm
    norm_eps: float
    positions: Positions
    qk_norm: QKNorm
    mlp: Feedforward
    biases: bool  # False: there are none, whatever model.bias says
    tied: bool
    rope_theta: float = 10_000.0


FAMILIES: dict[Family, FamilyDefaults] = {
    "gpt2": FamilyDefaults("layernorm", 1e-5, "learned", "off", "gelu", biases=True, tied=True),
    "llama": FamilyDefaults("rmsnorm", 1e-5, "rotary", "off", "swiglu", biases=False, tied=False),
    # Qwen3's models of up to 4 billion parameters are tied.
    "qwen3": FamilyDefaults("rmsnorm", 1e-6, "rotary", "weight", "swiglu", biases=False, tied=True, rope_theta=1_000_000.0),
    "custom": FamilyDefaults("layernorm", 1e-5, "learned", "off", "gelu", biases=True, tied=True),
}


@dataclass(frozen=True)
class Architecture:
    """Every choice that shapes a model, as values. Sizes in channels, heads, layers or tokens."""

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
    mlp: Feedforward
    mlp_hidden: int
    bias: bool
    tied: bool
    logit_softcap: float
    sliding_window: int | None
    global_every: int
    value_embeddings: int

    @classmethod
    def of(cls, config: "ModelConfig") -> "Architecture":
        """The options that `config` sets, and its family's for the rest."""
        family = FAMILIES[config.family]
        mlp = config.mlp or family.mlp
        # Shazeer 2020 (arXiv:2002.05202): two thirds of 4 n_embd, so that three matrices have the size of two.
        hidden = -(-8 * config.n_embd // (3 * 64)) * 64 if mlp == "swiglu" else 4 * config.n_embd
        return cls(
            n_layer=config.n_layer,
            n_embd=config.n_embd,
            norm=config.norm or family.norm,
            norm_eps=config.norm_eps or family.norm_eps,
            positions=config.positions or family.positions,
            rope_theta=config.rope_theta or family.rope_theta,
            qk_norm=config.qk_norm or family.qk_norm,
            n_head=config.n_head,
            n_kv_head=config.n_kv_head or config.n_head,
            head_dim=config.head_dim or config.n_embd // config.n_head,
            mlp=mlp,
            mlp_hidden=config.mlp_hidden or hidden,
            bias=config.bias and family.biases,
            tied=family.tied if config.tied is None else config.tied,
            logit_softcap=config.logit_softcap,
            sliding_window=config.sliding_window,
            global_every=config.global_every,
            value_embeddings=config.value_embeddings,
        )

    @property
    def query_width(self) -> int:
        """Channels of all query heads together."""
        return self.n_head * self.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of all key heads, or of all value heads, together."""
        return self.n_kv_head * self.head_dim

    @property
    def fc_width(self) -> int:
        """Outputs of the MLP's first matrix: SwiGLU's gate lies before what it gates."""
        return self.mlp_hidden * (2 if self.mlp == "swiglu" else 1)

    def window(self, layer: int) -> int | None:
        """Tokens that a token of this layer sees, itself included; None: all before it."""
        if self.sliding_window is None or (self.global_every and (layer + 1) % self.global_every == 0):
            return None
        return self.sliding_window

    def value_table(self, layer: int) -> int | None:
        """Which table of value embeddings a layer mixes in: table i serves layer i from the start and layer i from the end."""
        place = min(layer, self.n_layer - 1 - layer)
        return place if place < self.value_embeddings else None

    @property
    def value_layers(self) -> int:
        """Layers that mix in a value embedding."""
        return sum(self.value_table(layer) is not None for layer in range(self.n_layer))

    def beyond(self, family: Literal["gpt2", "llama", "qwen3"]) -> list[str]:
        """The options that `transformers`' implementation of `family` does not have, as 'model.mlp = relu2'."""
        wanted: dict[str, object] = {"logit_softcap": 0.0, "value_embeddings": 0}
        if family == "gpt2":
            wanted |= {"norm": "layernorm", "norm_eps": 1e-5, "positions": "learned", "qk_norm": "off", "mlp": "gelu"}
            wanted |= {"n_kv_head": self.n_head, "head_dim": self.n_embd // self.n_head, "mlp_hidden": 4 * self.n_embd}
            wanted |= {"tied": True, "sliding_window": None}
        else:
            wanted |= {"norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu", "bias": False}
            wanted |= {"qk_norm": "weight"} if family == "qwen3" else {"qk_norm": "off", "sliding_window": None}
        found = [f"model.{key} = {getattr(self, key)}" for key, value in wanted.items() if getattr(self, key) != value]
        if family == "llama" and self.n_embd % self.n_head:
            found.append(f"model.n_head = {self.n_head}, which does not divide model.n_embd = {self.n_embd}")
        return found

    @property
    def opens_as(self) -> Literal["gpt2", "llama", "qwen3"] | None:
        """The `transformers` model that computes the same function from the same weights; None where there is none."""
        families: tuple[Literal["gpt2", "llama", "qwen3"], ...] = ("gpt2", "llama", "qwen3")
        return next((family for family in families if not self.beyond(family)), None)

    @property
    def why_not(self) -> str:
        """What keeps `transformers` from opening the model, by its nearest family; empty where it opens."""
        families: tuple[Literal["gpt2", "llama", "qwen3"], ...] = ("gpt2", "llama", "qwen3")
        nearest = min(families, key=lambda family: len(self.beyond(family)))
        found = self.beyond(nearest)
        return f"{', '.join(found)}: not a part of {nearest} in transformers" if found else ""
