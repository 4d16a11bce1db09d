from dataclasses import dataclass

from bardling.config.checks import require, require_at_least


@dataclass(frozen=True)
class SampleConfig:
    """Text generated during training."""

    every: int = 0
    """Steps between samples (0 disables this)."""
    prompt: str = ""
    """Text to continue; empty: start from the token that begins a text, or a newline if there is none."""
    num_samples: int = 1
    """Number of completions each time."""
    max_new_tokens: int = 128
    """Maximum length of a completion (tokens)."""
    temperature: float = 0.8
    """Sampling temperature; 0 is greedy."""
    top_k: int | None = None
    """Sample only from the k most likely tokens; unset: no limit."""
    top_p: float | None = None
    """Sample only from the most likely tokens whose total probability reaches this value; unset: no limit."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "sample", "every", "temperature")
        require_at_least(1, self, "sample", "num_samples", "max_new_tokens", "top_k")
        require(self.top_p is None or 0 < self.top_p <= 1, "sample.top_p", self.top_p, "must be above 0 and at most 1")
