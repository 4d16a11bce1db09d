from dataclasses import dataclass, replace
from typing import Literal

from bardling.config.architecture import FAMILIES, Architecture, Family, Norm, Positions, QKNorm
from bardling.config.checks import expand_paths, require, require_at_least, require_positive
from bardling.errors import UserError
from bardling.extensions import ACTIVATIONS

MAX_LAYERS = 1000
"""As many as the deepest published transformers have (DeepNet, arXiv:2203.00555)."""


@dataclass(frozen=True)
class ModelConfig:
    """The network: GPT-2, another family, or a combination of their components."""

    n_layer: int = 6
    """Transformer blocks."""
    n_head: int = 6
    """Attention heads per block; must divide n_embd unless head_dim is set."""
    n_embd: int = 384
    """Width of the residual stream (channels)."""
    block_size: int = 256
    """Maximum context length (tokens); in training, the length of a sequence."""
    vocab_size: int = 0
    """Vocabulary size; 0: the tokenizer's."""
    dropout: float = 0.0
    """Dropout probability during training (0 disables this)."""
    bias: bool = True
    """Use biases in linear layers and LayerNorms, as GPT-2 does; llama and qwen3 never have biases."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """GELU variant: the tanh approximation (GPT-2) or the exact function (nanoGPT)."""
    vocab_multiple: int = 64
    """Pad the rows of the embedding to a multiple of this number, for speed; padding ids are never predicted."""
    init: str = ""
    """Initial weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, USER/REPO on the hub, a folder or a file; empty: random."""
    family: Family = "gpt2"
    """Architecture family that provides the values of unset options; 'custom' uses GPT-2's. transformers loads the others."""
    norm: Norm | None = None
    """Normalization layer; unset: the family's."""
    norm_eps: float | None = None
    """Epsilon of the normalization layers; unset: the family's."""
    positions: Positions | None = None
    """Position encoding: learned embeddings, or rotary embeddings (RoPE); unset: the family's."""
    rope_theta: float | None = None
    """Base frequency of RoPE; unset: the family's."""
    qk_norm: QKNorm | None = None
    """RMSNorm of queries and keys per head: off, plain (no learned weight) or weight; unset: the family's."""
    n_kv_head: int | None = None
    """Key and value heads (grouped-query attention); must divide n_head; unset: n_head."""
    head_dim: int | None = None
    """Channels per head; unset: n_embd / n_head."""
    mlp: str | None = None
    """MLP activation: gelu, swiglu, relu2, or the name of an installed extension; unset: the family's."""
    mlp_hidden: int | None = None
    """Hidden size of the MLP (channels); unset: 4 n_embd, or for swiglu 8/3 n_embd rounded up to a multiple of 64."""
    tied: bool | None = None
    """Tie the output head to the token embedding; unset: the family's."""
    zero_init: bool = False
    """Initialize the projections back into the residual stream to zero, so that every block starts as the identity."""
    init_std: float = 0.02
    """Standard deviation of the initial matrices and embeddings."""
    logit_softcap: float = 0.0
    """Soft-cap logits to the range from minus to plus this value, with tanh (0 disables this)."""
    sliding_window: int | None = None
    """Attention window of local layers (tokens), including the current token; unset: full attention in every layer."""
    global_every: int = 4
    """With a sliding window, every Nth layer keeps full attention; 0: none does."""
    value_embeddings: int = 0
    """Extra token embeddings mixed into the attention values of the first and last N layers (0 disables this)."""
    depth: int = 0
    """Derive a compute-optimal run (width, heads, learning rates, batch size, steps) from this many layers; 0: do not."""
    max_positions: int | None = None
    """Context of a rotary model that is trained further with a shorter block_size, kept in exports; unset: block_size."""

    def __post_init__(self) -> None:
        expand_paths(self, "init")
        if self.mlp is not None:
            ACTIVATIONS.check("model.mlp", self.mlp)
        require_at_least(1, self, "model", "n_layer", "n_head", "n_embd", "block_size", "vocab_multiple")
        require_at_least(1, self, "model", "n_kv_head", "head_dim", "mlp_hidden", "sliding_window", "max_positions")
        require_at_least(0, self, "model", "depth", "vocab_size", "global_every", "logit_softcap")
        require_positive(self, "model", "norm_eps", "rope_theta", "init_std")
        require(self.n_layer <= MAX_LAYERS, "model.n_layer", self.n_layer, f"must be at most {MAX_LAYERS}")
        require(self.vocab_multiple <= 4096, "model.vocab_multiple", self.vocab_multiple, "must be at most 4096")
        require(0.0 <= self.dropout < 1.0, "model.dropout", self.dropout, "must be at least 0 and below 1")
        tables = (self.n_layer + 1) // 2
        rule = f"must be between 0 and {tables}, half of model.n_layer = {self.n_layer}"
        require(0 <= self.value_embeddings <= tables, "model.value_embeddings", self.value_embeddings, rule)
        if self.n_kv_head is not None and self.n_head % self.n_kv_head:
            raise UserError(f"model.n_kv_head = {self.n_kv_head}: must divide model.n_head = {self.n_head}")
        if self.head_dim is None and self.n_embd % self.n_head:
            near = self.n_embd // self.n_head * self.n_head or self.n_head
            raise UserError(
                f"model.n_embd = {self.n_embd} is not divisible by model.n_head = {self.n_head}: "
                f"try --model.n_embd {near} or {near + self.n_head}"
            )
        arch = self.architecture
        if arch.positions == "rotary" and arch.head_dim % 2:
            raise UserError(f"model.head_dim = {arch.head_dim}: must be even for rotary embeddings; set --model.head_dim")
        if self.max_positions is not None:
            rule = f"must be at least model.block_size = {self.block_size}, in a model with rotary embeddings"
            valid = arch.positions == "rotary" and self.max_positions >= self.block_size
            require(valid, "model.max_positions", self.max_positions, rule)

    @property
    def architecture(self) -> Architecture:
        """The architecture with a value for every option: the options that are set, and the family's defaults for the rest."""
        family = FAMILIES[self.family]
        mlp = self.mlp or family.mlp
        # Shazeer 2020 (arXiv:2002.05202): 2/3 of 4 n_embd gives three matrices the parameters of two.
        hidden = -(-8 * self.n_embd // (3 * 64)) * 64 if mlp == "swiglu" else 4 * self.n_embd
        return Architecture(
            n_layer=self.n_layer,
            n_embd=self.n_embd,
            norm=self.norm or family.norm,
            norm_eps=self.norm_eps or family.norm_eps,
            positions=self.positions or family.positions,
            rope_theta=self.rope_theta or family.rope_theta,
            qk_norm=self.qk_norm or family.qk_norm,
            n_head=self.n_head,
            n_kv_head=self.n_kv_head or self.n_head,
            head_dim=self.head_dim or self.n_embd // self.n_head,
            mlp=mlp,
            mlp_hidden=self.mlp_hidden or hidden,
            bias=self.bias and family.biases,
            tied=family.tied if self.tied is None else self.tied,
            logit_softcap=self.logit_softcap,
            sliding_window=self.sliding_window,
            global_every=self.global_every,
            value_embeddings=self.value_embeddings,
        )

    @property
    def context(self) -> int:
        """The longest context that the model supports (tokens), which may exceed the length of its training sequences."""
        return self.max_positions or self.block_size

    def resolved(self) -> "ModelConfig":
        """The same model with the family's options filled in. Sizes that follow from others stay unset."""
        arch, options = self.architecture, ("norm", "norm_eps", "positions", "rope_theta", "qk_norm", "mlp", "bias", "tied")
        return replace(self, **{name: getattr(arch, name) for name in options})

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
