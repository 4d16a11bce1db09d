"""Text generation, token by token: prefill the prompts, then decode with a KV cache.

`generate` advances a batch of prompts together and yields the tokens of each step as they are generated. Prompts may differ in
length: they are prefilled side by side, padded on the right, where a causal model cannot see the padding, and decoded at their
own positions. A row that has ended leaves the batch. Each row samples from its own generator, seeded by (seed, row), on the
CPU; except for rounding, a sample therefore depends neither on the other rows nor on the device.

Context longer than `block_size`: a full row discards all but its last block_size // 2 tokens, which are prefilled again at the
first positions (`will_slide` predicts this). Halving keeps the cost of sliding low: one prefill every block_size / 2 tokens.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from bardling.data.tokens.tokenizer import Tokenizer
from bardling.distributed.global_state import NEUTRAL
from bardling.errors import UserError
from bardling.model.cache import KVCache
from bardling.model.gpt import GPT, evaluation_mode
from bardling.model.init import named_generator

Autocast = Callable[[], AbstractContextManager[object]]
Ids = Sequence[int] | Tensor | NDArray[Any]

_PROMPTS = "prompts are token ids, as in [tokenizer.encode(text).tolist()]"


@dataclass
class _Row:
    """One text during generation."""

    index: int  # in the caller's list of prompts
    tokens: list[int]  # prompt and generated tokens
    random: torch.Generator


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
    eot_id: int | Collection[int] | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    autocast: Autocast = nullcontext,
    should_stop: Callable[[], bool] | None = None,
    agree: Callable[[list[int]], list[int]] = lambda tokens: tokens,
) -> Iterator[list[int | None]]:
    """Continue each prompt; yield, per step, the new token of each (None for those that have ended).

    Args:
        model: on any device; in evaluation mode during a step, in its previous mode between steps.
        prompts: token ids: a sequence, array or tensor for each prompt, or a single one. Of a prompt longer than `block_size`
            the model sees the end.
        max_new_tokens: largest number of tokens generated per prompt.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: sample from the k likeliest tokens only (all, if k is larger than the vocabulary).
        top_p: sample from the fewest likeliest tokens whose probabilities sum to at least p.
        eot_id: a row ends with this token, or any of these, which is yielded.
        vocab_size: the tokenizer's, if smaller than the model's: only ids below it are sampled.
        seed: together with the row's number, seeds the row's samples.
        autocast: creates the context in which the model runs. It converts the weights again at each step: for long texts, a
            model converted once (`model.to(torch.bfloat16)`) is faster.
        should_stop: called before each step; if it returns true, generation ends early.
        agree: called with each step's tokens; returns those to continue with. With several processes that must stay in step, it
            broadcasts those of one of them, since the same logits may round differently elsewhere.

    Raises:
        UserError: no prompt, an empty prompt, an id outside the vocabulary, a setting out of range, or non-finite logits.
    """
    _check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if isinstance(model, str | Path):
        raise UserError(f"model = {str(model)!r}: is a name, not a model; open it with bardling.load_model")
    ids = _token_lists(prompts)
    if not ids:
        raise UserError("no prompts: give at least one")
    for index, prompt in enumerate(ids):
        if len(prompt) == 0:
            raise UserError(f"prompt {index} is empty: start it with the end-of-text token or some text")
        if outside := [token for token in prompt if not 0 <= token < model.config.vocab_size]:
            raise UserError(
                f"prompt {index} holds the id {outside[0]}, outside the vocabulary of {model.config.vocab_size} tokens"
            )
    rows = [_Row(index, prompt, named_generator(seed, f"sample:{index}")) for index, prompt in enumerate(ids)]

    def pick(logits: Tensor) -> list[int]:  # a token for each row, from logits [B, V]
        draws = [float(torch.rand((), generator=row.random, dtype=torch.float64)) for row in rows] if temperature else None
        return agree(choose(logits[:, :vocab_size], draws, temperature=temperature, top_k=top_k, top_p=top_p))

    ends = frozenset(() if eot_id is None else (eot_id,) if isinstance(eot_id, int) else eot_id)
    return _steps(model, rows, max_new_tokens, pick, ends, autocast, should_stop or (lambda: False))


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


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature = {temperature}: must be at least 0 and finite (0: greedy)")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k = {top_k}: must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p = {top_p}: must be above 0, at most 1")


def _steps(
    model: GPT,
    rows: list[_Row],
    max_new_tokens: int,
    pick: Callable[[Tensor], list[int]],
    ends: Collection[int],
    autocast: Autocast,
    should_stop: Callable[[], bool],
) -> Iterator[list[int | None]]:
    prompts, longest = len(rows), max(len(row.tokens) for row in rows)
    cache = KVCache(model.config, prompts, capacity=min(longest + max_new_tokens, model.config.block_size))
    for number in range(max_new_tokens):
        if should_stop():
            return
        with NEUTRAL.applied():  # not while the caller has the tokens of a step
            with evaluation_mode(model), torch.no_grad(), autocast():
                logits = _prefill(model, cache, [row.tokens for row in rows]) if number == 0 else _decode(model, cache, rows)
            tokens = pick(logits)
        step: list[int | None] = [None] * prompts
        for row, token in zip(rows, tokens, strict=True):
            step[row.index] = token
            row.tokens.append(token)
        yield step
        for place in reversed(range(len(rows))):
            if rows[place].tokens[-1] in ends:  # the last row takes the place, as it does in the cache
                cache.drop(place)
                rows[place] = rows[-1]
                rows.pop()
        if not rows:
            return


def _prefill(model: GPT, cache: KVCache, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Fill an empty cache with the ends of `prompts` that fit; return the next-token logits of each [B, V]."""
    seen = [prompt[-model.config.block_size :] for prompt in prompts]
    lengths = [len(prompt) for prompt in seen]
    padded = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in seen]
    tokens = torch.tensor(padded, device=model.head_weight.device)  # [B, T]
    hidden = model(tokens, cache=cache, output="hidden")  # [B, T, C]
    cache.lengths = lengths
    last = hidden[torch.arange(len(lengths), device=hidden.device), torch.tensor(lengths, device=hidden.device) - 1]
    return model.head(last)


def _decode(model: GPT, cache: KVCache, rows: Sequence[_Row]) -> Tensor:
    """Decode each row's newest token, after making room in full rows; return the next-token logits [B, V]."""
    for place, row in enumerate(rows):
        if cache.lengths[place] == model.config.block_size:
            _slide(model, cache, place, row.tokens)
    newest = torch.tensor([[row.tokens[-1]] for row in rows], device=model.head_weight.device)  # [B, 1]
    logits: Tensor = model(newest, cache=cache)  # [B, 1, V]
    return logits[:, 0]


def _slide(model: GPT, cache: KVCache, place: int, tokens: Sequence[int]) -> None:
    """Refill a full row with its last block_size // 2 tokens, except the newest, which is decoded next."""
    kept = tokens[:-1][-(model.config.block_size // 2) :] if model.config.block_size > 1 else []
    view = cache.row(place)
    view.lengths = [0]
    if kept:
        model(torch.tensor([kept], device=model.head_weight.device), cache=view, output="hidden")
    cache.lengths[place] = len(kept)


def choose(
    logits: Tensor,
    draws: Sequence[float] | None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> list[int]:
    """Pick a token of each row of `logits` [B, V]; temperature, top_k (which applies first) and top_p as in `generate`.

    Args:
        draws: one number in [0, 1) per row, which selects by inverse transform sampling; None takes the likeliest token.

    Raises:
        UserError: the logits of a row are NaN or all infinite.
    """
    logits = logits.cpu()
    if not bool(torch.isfinite(logits.max(dim=-1).values).all()):  # the maximum propagates NaN
        raise UserError("the model's logits are NaN or infinite: its weights are corrupt, or its precision is too low")
    if draws is None or temperature == 0:
        return [int(token) for token in logits.argmax(dim=-1)]
    ids = None
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k, dim=-1)  # sorted, likeliest first
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    # Subtracting the largest logit first keeps a tiny temperature from computing infinity minus infinity.
    scaled = (logits.double() - logits.max(dim=-1, keepdim=True).values) / temperature
    probabilities = scaled.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities  # of the likelier tokens
        probabilities = probabilities * (before < top_p)
    sums = probabilities.cumsum(dim=-1)  # [B, V or top_k]
    totals = sums[:, -1:]
    points = torch.minimum(totals * torch.tensor(draws, dtype=torch.float64)[:, None], totals.nextafter(torch.zeros(())))
    found = torch.searchsorted(sums, points, right=True)  # the first whose sum exceeds the point, so never one of probability 0
    return [int(token) for token in (found if ids is None else ids.gather(1, found))[:, 0]]
