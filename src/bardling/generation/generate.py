"""`generate`: continue a batch of prompts together; each step yields a token of every prompt.

The engine does the work: see `engine.py`. Prompts may differ in length, and each is sampled as if it were alone.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError
from bardling.generation.engine import Autocast, Engine
from bardling.generation.requests import Request
from bardling.generation.sampling import Sampling
from bardling.model.gpt import GPT

Ids = Sequence[int] | Tensor | NDArray[Any]

_PROMPTS = "prompts are token ids, as in [tokenizer.encode(text).tolist()]"


def will_slide(prompt_length: int, max_new_tokens: int, block_size: int) -> bool:
    """Whether generating `max_new_tokens` after a prompt of this length discards the beginning of the text. The last token is
    never read by the model, so it needs no room."""
    return prompt_length + max_new_tokens - 1 > block_size


def prompt_ids(tokenizer: Tokenizer, prompt: str, *, allow_special: bool = False) -> list[int]:
    """Tokens of a prompt, with what the tokenizer's post-processor adds.

    If that leaves an empty prompt empty, it becomes the token that begins a text, or else a line break. With `allow_special`,
    names of added tokens in the prompt, such as `<|endoftext|>`, encode to these tokens.
    """
    first = tokenizer.interface.first
    if not prompt and not tokenizer.interface.start:
        return tokenizer.encode_prompt("\n") if first is None else [first]
    return tokenizer.encode_prompt(prompt, allow_special)


def generate(
    model: GPT,
    prompts: Ids | Sequence[Ids],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    logit_bias: Mapping[int, float] | None = None,
    eot_id: int | Collection[int] | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    autocast: Autocast = nullcontext,
    should_stop: Callable[[], bool] | None = None,
    agree: Callable[[list[int]], list[int]] | None = None,
) -> Iterator[list[int | None]]:
    """Continue each prompt; yield, per step, the new token of each (None for those that have ended).

    Args:
        model: on any device; in evaluation mode during a step, in its previous mode between steps.
        prompts: token ids: a sequence, array or tensor for each prompt, or a single one. Of a prompt longer than `block_size`
            the model sees the end.
        max_new_tokens: largest number of tokens generated per prompt.
        temperature, top_k, top_p, min_p, repetition_penalty, logit_bias: as in `Sampling`.
        eot_id: a row ends with this token, or any of these, which is yielded.
        vocab_size: the tokenizer's, if smaller than the model's: only ids below it are sampled.
        seed: together with the row's number, seeds the row's samples.
        autocast: creates the context in which the model runs. It converts the weights again at each step: for long texts, a
            model converted once (`model.to(torch.bfloat16)`) is faster.
        should_stop: called before each step; if it returns true, generation ends early.
        agree: called with each step's tokens; returns those to continue with (see `Engine`).

    Raises:
        UserError: no prompt, an empty prompt, an id outside the vocabulary, a setting out of range, or non-finite logits.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if isinstance(model, str | Path):
        raise UserError(f"model = {str(model)!r}: is a name, not a model; open it with bardling.load_model")
    bias = {} if logit_bias is None else logit_bias
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, logit_bias=bias)
    ids = _token_lists(prompts)
    if not ids:
        raise UserError("no prompts: give at least one")
    ends = () if eot_id is None else (eot_id,) if isinstance(eot_id, int) else eot_id
    size = model.config.vocab_size if vocab_size is None else vocab_size
    settings: dict[str, Any] = {"eot_ids": ends, "vocab_size": size, "autocast": autocast, "agree": agree}
    engine = Engine(model, slots=len(ids), prefill_tokens=sum(map(len, ids)) * len(ids), **settings)
    for index, prompt in enumerate(ids):
        try:
            engine.submit(Request(tuple(prompt), sampling, index))
        except UserError as error:
            raise UserError(str(error).replace("the prompt", f"prompt {index}", 1)) from None
    return _steps(engine, len(ids), should_stop or (lambda: False))


def _steps(engine: Engine, prompts: int, should_stop: Callable[[], bool]) -> Iterator[list[int | None]]:
    while engine.running or engine.waiting:
        if should_stop():
            return
        step: list[int | None] = [None] * prompts
        for output in engine.step():
            step[output.request] = output.token
        yield step


def _token_lists(prompts: Any) -> list[list[int]]:
    """The prompts as lists of ids; a single prompt becomes a list of one."""
    plain = _plain(prompts)
    rows = [_plain(row) for row in plain] if plain and _has_items(plain[0]) else [plain] if plain else []
    for index, row in enumerate(rows):
        if wrong := [token for token in row if not isinstance(token, int) or isinstance(token, bool)]:
            raise UserError(f"prompt {index} holds {wrong[0]!r:.80}, a {type(wrong[0]).__name__}: {_PROMPTS}")
    return rows


def _plain(values: Any) -> list[Any]:
    """Ids or prompts, also those of an array or a tensor, as a list of Python's own objects."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, Iterator) or _has_items(values):
        return [item.tolist() if hasattr(item, "tolist") else item for item in values]
    raise UserError(f"prompts: found {values!r:.80}, a {type(values).__name__}: {_PROMPTS}")


def _has_items(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
