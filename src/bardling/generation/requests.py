"""What the engine takes and what it returns."""

from dataclasses import dataclass, field
from typing import Literal

from bardling.generation.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    sampling: Sampling = field(default_factory=Sampling)
    index: int = 0
    """Number of the completion among several of one prompt; seeds its draws together with `sampling.seed`."""
    prompt_logprobs: bool = False
    """Also score the prompt's own tokens."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability in the model's own distribution, before temperature, penalties and filters."""

    token: int
    logprob: float | None  # natural logarithm; None for the first token of a prompt
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens, likeliest first


@dataclass(frozen=True)
class Output:
    """What a step produced for one request."""

    request: int
    """The id that `submit` returned."""
    token: int | None
    """The generated token; None if none was to be generated."""
    text: str = ""
    """New text of whole characters. Text that may turn out to begin a stop string is held back; stop strings and end-of-text
    tokens have no text."""
    logprob: TokenLogprob | None = None
    prompt: tuple[TokenLogprob, ...] = ()
    """The scores of the prompt's tokens, once, with the first output."""
    finish: Literal["stop", "length"] | None = None
    """Why the completion ended: a stop string or an end-of-text token, or its maximum length. None while it goes on."""
