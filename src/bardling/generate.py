"""Text, token by token: prefill the prompts, then decode with a cache of keys and values.

`generate` advances a batch of prompts together and yields each step's tokens as they are made. Prompts may differ in length:
they are prefilled side by side, padded on the right, where a causal model cannot see the padding, and decoded at positions of
their own. A row that has ended leaves the batch. Each row draws from a generator of its own, seeded by (seed, row), on the CPU;
a sample therefore depends neither on its neighbours nor on the device, but for rounding.

Context longer than `block_size`: when a row is full, it forgets all but its last block_size // 2 tokens, which are prefilled
again at the first positions (`will_slide` tells beforehand). Halving keeps the cost of sliding low: once every block_size / 2
tokens.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bardling.data.tokenizer import Tokenizer
from bardling.errors import UserError
from bardling.model.cache import KVCache
from bardling.model.gpt import GPT

Autocast = Callable[[], AbstractContextManager[object]]


@dataclass
class _Row:
    """One text in the making."""

    index: int  # in the caller's list of prompts
    tokens: list[int]  # prompt and what was made
    random: torch.Generator = field(repr=False)


def will_slide(prompt_length: int, max_new_tokens: int, block_size: int) -> bool:
    """Whether making `max_new_tokens` after such a prompt forgets its beginning. The last token made is never read, so it needs
    no room."""
    return prompt_length + max_new_tokens - 1 > block_size


def prompt_ids(tokenizer: Tokenizer, prompt: str, *, allow_special: bool = False) -> list[int]:
    """Tokens of a prompt; an empty one is an end-of-text token, after which a new document begins, or else a line break.

    With `allow_special`, names of special tokens in it, such as `<|endoftext|>`, mean these tokens.
    """
    if prompt:
        return [int(token) for token in tokenizer.encode(prompt, allow_special=allow_special)]
    return [tokenizer.eot_id] if tokenizer.eot_id is not None else [int(token) for token in tokenizer.encode("\n")]


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eot_id: int | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    autocast: Autocast = nullcontext,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[list[int | None]]:
    """Continue each prompt; yield, per step, the new token of each (None for those that have ended).

    Args:
        model: on any device; it is in evaluation mode while a step is made, and as it was between steps.
        prompts: token ids, at least one each. Of a prompt longer than `block_size` the model sees the end.
        max_new_tokens: most tokens made for a prompt.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: only the k likeliest tokens may be drawn (all, when k is larger than the vocabulary).
        top_p: only the fewest likeliest tokens whose probabilities together reach p may be drawn.
        eot_id: a row ends with this token, which is yielded.
        vocab_size: the tokenizer's, where it is smaller than the model's: only ids below it are drawn.
        seed: with a row's number, seeds that row's draws.
        autocast: makes the context in which the model runs. It converts the weights anew at each step: for long texts a model
            converted once (`model.to(torch.bfloat16)`) is faster.
        should_stop: asked before each step; when true, generation ends early.

    Raises:
        UserError: no prompt, an empty prompt, an id outside the vocabulary, a setting out of range, or logits that are not
            finite.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    return _steps(model, prompts, max_new_tokens, temperature, top_k, top_p, eot_id, vocab_size, seed, autocast, should_stop)


def _steps(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eot_id: int | None,
    vocab_size: int | None,
    seed: int,
    autocast: Autocast,
    should_stop: Callable[[], bool] | None,
) -> Iterator[list[int | None]]:
    rows = [_Row(index, list(prompt), row_generator(seed, index)) for index, prompt in enumerate(prompts)]
    longest = max(len(row.tokens) for row in rows)
    cache = KVCache(model.config, len(rows), capacity=min(longest + max_new_tokens, model.config.block_size))
    for made in range(max_new_tokens):
        if should_stop is not None and should_stop():
            return
        with _evaluating(model), torch.no_grad(), autocast():
            logits = prefill(model, cache, [row.tokens for row in rows]) if made == 0 else _decode_rows(model, cache, rows)
        draws = [float(torch.rand((), generator=row.random, dtype=torch.float64)) for row in rows] if temperature > 0 else None
        chosen = choose(logits[:, :vocab_size], draws, temperature=temperature, top_k=top_k, top_p=top_p)
        step: list[int | None] = [None] * len(prompts)
        for row, token in zip(rows, chosen, strict=True):
            step[row.index] = token
            row.tokens.append(token)
        yield step
        for place in reversed(range(len(rows))):
            if rows[place].tokens[-1] == eot_id:  # the last row takes the place, in the cache as here
                cache.drop(place)
                rows[place] = rows[-1]
                rows.pop()
        if not rows:
            return


def row_generator(seed: int, row: int) -> torch.Generator:
    """The random numbers of one row."""
    digest = hashlib.sha256(f"{seed}:sample:{row}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def prefill(model: GPT, cache: KVCache, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Fill an empty cache with `prompts`, the end of those that are too long; return each one's next-token logits [B, V]."""
    seen = [prompt[-model.config.block_size :] for prompt in prompts]
    lengths = [len(prompt) for prompt in seen]
    padded = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in seen]
    tokens = torch.tensor(padded, device=_device(model))  # [B, T]
    hidden = model.hidden(tokens, cache)  # [B, T, C]
    cache.lengths = list(lengths)
    last = hidden[torch.arange(len(lengths), device=hidden.device), torch.tensor(lengths, device=hidden.device) - 1]
    return model.head(last)


def decode(model: GPT, cache: KVCache, tokens: Sequence[int]) -> Tensor:
    """Take in one more token of each row; return the logits of the next [B, V]."""
    hidden = model.hidden(torch.tensor(tokens, device=_device(model))[:, None], cache)  # [B, 1, C]
    return model.head(hidden)[:, 0]


def _decode_rows(model: GPT, cache: KVCache, rows: Sequence[_Row]) -> Tensor:
    """Take in each row's newest token, after making room in the rows that are full."""
    for place, row in enumerate(rows):
        if cache.lengths[place] == model.config.block_size:
            _slide(model, cache, place, row.tokens)
    return decode(model, cache, [row.tokens[-1] for row in rows])


def _slide(model: GPT, cache: KVCache, place: int, tokens: Sequence[int]) -> None:
    """Refill a full row with its last block_size // 2 tokens, the newest, which decoding will take in, left out."""
    kept = tokens[:-1][-(model.config.block_size // 2) :] if model.config.block_size > 1 else []
    view = cache.row(place)
    view.lengths = [0]
    if kept:
        model.hidden(torch.tensor([kept], device=_device(model)), view)
    cache.lengths[place] = len(kept)


def choose(
    logits: Tensor,
    draws: Sequence[float] | None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> list[int]:
    """Pick a token of each row of `logits` [B, V].

    Args:
        draws: one number in [0, 1) for each row, which decides by inverting the cumulative distribution; None takes the
            likeliest token. temperature, top_k, top_p: as in `generate`; top_k applies before top_p.

    Raises:
        UserError: the logits of a row are NaN or all infinite.
    """
    logits = logits.cpu()
    if not bool(torch.isfinite(logits.max(dim=-1).values).all()):  # a NaN anywhere is the maximum
        raise UserError("the model's logits are NaN or infinite: its weights are damaged, or its precision is too low")
    if draws is None or temperature == 0:
        return [int(token) for token in logits.argmax(dim=-1)]
    ids = None
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k, dim=-1)  # sorted, likeliest first
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    # The largest logit is subtracted first, so that a tiny temperature gives certainty instead of infinity less infinity.
    scaled = (logits.double() - logits.max(dim=-1, keepdim=True).values) / temperature
    probabilities = scaled.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities  # of the likelier tokens
        probabilities = probabilities * (before < top_p)
    sums = probabilities.cumsum(dim=-1)  # [B, V or top_k]
    totals = sums[:, -1:]
    points = torch.minimum(totals * torch.tensor(draws, dtype=torch.float64)[:, None], totals.nextafter(torch.zeros(())))
    found = torch.searchsorted(sums, points, right=True)  # the first whose sum passes the point: never one of probability 0
    return [int(token) for token in (found if ids is None else ids.gather(1, found))[:, 0]]


class _evaluating:  # noqa: N801  a context manager, read as a verb
    """Switch a model to evaluation mode and back; walking all modules is saved when nothing changes."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.was_training = model.training

    def __enter__(self) -> None:
        if self.was_training:
            self.model.eval()

    def __exit__(self, *error: object) -> None:
        if self.was_training:
            self.model.train()


def _device(model: GPT) -> torch.device:
    return model.transformer.wte.weight.device


def _check(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if not prompts:
        raise UserError("there is no prompt to go on from")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {index} is empty: start it with the end-of-text token or some text")
        if min(prompt) < 0 or max(prompt) >= model.config.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < model.config.vocab_size)
            raise UserError(f"prompt {index} holds the id {wrong}, outside the vocabulary of {model.config.vocab_size} tokens")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature = {temperature}: must be at least 0 and finite (0: greedy)")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k = {top_k}: must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p = {top_p}: must be above 0, at most 1")
