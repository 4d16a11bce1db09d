"""The inference engine: continuous batching. Requests join and leave a running batch.

Each step computes the prompts of new requests (prefill), then one token of every running request in a single forward pass
(decode). A prompt whose beginning another text shares is not computed again: keys and values are copied. Long prompts are
computed in chunks, so that running requests continue meanwhile.

A request's completion does not depend on its neighbours. Each draws from its own generator, seeded by (seed, index), on the
CPU. What remains is rounding: a batch rounds logits differently than a single row. So where another token would be chosen if
the logits differed by `_TOLERANCE`, the row's text is computed again in a forward pass of its own, and those logits decide.
This holds in float32; in 16-bit precision rounding is too coarse for it.

Context longer than `block_size`: a full row discards all but its last block_size // 2 tokens, which are prefilled again at the
first positions. Halving keeps the cost of sliding low: one prefill every block_size / 2 tokens.

Limits: one thread drives an engine.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from bardling.data.tokens.tokenizer import Tokenizer
from bardling.distributed.global_state import NEUTRAL
from bardling.errors import UserError
from bardling.generation.requests import Output, Request, TokenLogprob
from bardling.generation.sampling import Choice, adjust, pick
from bardling.generation.text import TextStream
from bardling.model.cache import KVCache
from bardling.model.gpt import GPT, evaluation_mode
from bardling.model.init import named_generator

Autocast = Callable[[], AbstractContextManager[object]]

_TOLERANCE = 4e-6  # largest difference of float32 logits between batch sizes, relative to the largest logit
_PREFILL_TOKENS = (1 << 14, 512)  # of prompts per step, on an accelerator and on a CPU: about the time of a few decoded tokens
_LEAST_SHARED = 16  # tokens: copying keys and values of fewer does not pay
_SCORED_TOKENS = 64  # of a prompt, at a time: their logits over the vocabulary are held


@dataclass
class _Row:
    """A request in the engine."""

    id: int
    request: Request
    tokens: list[int]  # prompt and generated tokens
    start: int  # the first token that the model sees
    random: torch.Generator
    stream: TextStream | None
    cache: KVCache | None = None  # keys and values of a prompt that is not complete yet
    scores: list[TokenLogprob] = field(default_factory=list)  # of the prompt

    @property
    def seen(self) -> list[int]:
        """The tokens that the model sees."""
        return self.tokens[self.start :]

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def draw(self) -> float:
        """The number in [0, 1) that selects the next token; 0 where the likeliest one is taken."""
        if self.request.sampling.temperature == 0:
            return 0.0
        return float(torch.rand((), generator=self.random, dtype=torch.float64))


class Engine:
    """Generates text for many requests at once.

    Args:
        model: on any device; in evaluation mode during a step, in its previous mode between steps.
        tokenizer: for texts and stop strings; None for tokens alone.
        slots: requests that run at the same time; others wait.
        eot_ids: tokens that end a completion; None for the tokenizer's.
        vocab_size: only ids below it are sampled; None for the tokenizer's, or the model's.
        autocast: creates the context in which the model runs.
        prefill_tokens: most tokens of prompts computed in one step; None for a number that suits the device.
        retained: number of finished texts whose keys and values are kept, for prompts that continue them.
        agree: called with each step's tokens; returns those to continue with. With several processes that must stay in step, it
            broadcasts those of one of them, since the same logits may round differently elsewhere.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 16,
        eot_ids: Collection[int] | None = None,
        vocab_size: int | None = None,
        autocast: Autocast = nullcontext,
        prefill_tokens: int | None = None,
        retained: int = 0,
        agree: Callable[[list[int]], list[int]] | None = None,
    ) -> None:
        if eot_ids is None:
            eot_ids = () if tokenizer is None else tokenizer.interface.eos
        if vocab_size is None:
            vocab_size = model.config.vocab_size if tokenizer is None else tokenizer.vocab_size
        self._model, self._tokenizer, self._slots = model, tokenizer, slots
        self._ends, self._vocab_size = frozenset(eot_ids), min(vocab_size, model.config.vocab_size)
        self._autocast, self._agree = autocast, agree
        self._prefill_tokens = prefill_tokens or _PREFILL_TOKENS[model.device.type == "cpu"]
        self._count = 0
        self._waiting: deque[_Row] = deque()
        self._prefilling: deque[_Row] = deque()
        self._rows: list[_Row] = []  # in the order of the cache
        self._cache = KVCache(model.config, 0, capacity=1)
        self._finished: deque[tuple[list[int], KVCache]] = deque(maxlen=retained)

    @property
    def running(self) -> int:
        """Requests that occupy a slot."""
        return len(self._rows) + len(self._prefilling)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def submit(self, request: Request) -> int:
        """Queue a request; return its id.

        Raises:
            UserError: the prompt is empty or holds an id outside the vocabulary, the request asks for something that needs a
            tokenizer, or a prompt to score exceeds the context.
        """
        config, sampling = self._model.config, request.sampling
        if not request.prompt:
            raise UserError("the prompt is empty: start it with the end-of-text token or some text")
        for name, ids in (("the prompt holds", request.prompt), ("logit_bias holds", sampling.logit_bias)):
            if outside := [token for token in ids if not 0 <= token < config.vocab_size]:
                raise UserError(f"{name} the id {outside[0]}, outside the vocabulary of {config.vocab_size} tokens")
        if sampling.stop and self._tokenizer is None:
            raise UserError("stop: needs a tokenizer")
        if sampling.max_new_tokens < 1 and not request.prompt_logprobs:
            raise UserError(f"max_new_tokens = {sampling.max_new_tokens}: must be at least 1")
        if request.prompt_logprobs and len(request.prompt) > config.block_size:
            raise UserError(f"a prompt of {len(request.prompt)} tokens to score exceeds the context of {config.block_size}")
        prompt = list(request.prompt)
        stream = None if self._tokenizer is None else TextStream(self._tokenizer, prompt, sampling.stop)
        random = named_generator(sampling.seed, f"sample:{request.index}")
        row = _Row(self._count, request, prompt, max(0, len(prompt) - config.block_size), random, stream)
        self._count += 1
        self._waiting.append(row)
        return row.id

    def cancel(self, request: int) -> None:
        """Drop a request; its slot is free for the next step. Unknown ids are ignored."""
        for queue in (self._waiting, self._prefilling):
            for row in [row for row in queue if row.id == request]:
                queue.remove(row)
        for place in [place for place, row in enumerate(self._rows) if row.id == request]:
            with self._without_gradients():
                self._remove(place)

    def step(self) -> list[Output]:
        """Run one step; return what it produced, at most one output per request. Without requests, there is none.

        Raises:
            UserError: the model's logits are not finite.
        """
        with NEUTRAL.applied(), evaluation_mode(self._model), self._without_gradients(), self._autocast():
            outputs = self._prefill()
            logits = self._decode() if self._rows else None
        if logits is None:
            return outputs
        with NEUTRAL.applied(), self._without_gradients():
            return outputs + self._advance(logits)

    def _without_gradients(self) -> AbstractContextManager[object]:
        """Inference mode, in which operators cost less; parameters that are split among processes do not support it."""
        return torch.inference_mode() if self._agree is None else torch.no_grad()

    def _prefill(self) -> list[Output]:
        """Compute prompts up to their last tokens, at most a step's worth; return the outputs of those only to be scored."""
        while self._waiting and self.running < self._slots:
            self._prefilling.append(self._waiting.popleft())
        left = self._prefill_tokens
        outputs: list[Output] = []
        while self._prefilling and left > 0:
            group = self._group(left)
            if len(group) > 1:
                caches = self._compute_together(group)
                left -= len(group) * max(caches.lengths)
            else:
                left -= self._compute_chunk(group[0], left)
                assert group[0].cache is not None
                caches = group[0].cache
                if caches.lengths[0] < len(group[0].seen) - 1:
                    break
            for place, row in enumerate(group):
                self._prefilling.popleft()
                if row.request.sampling.max_new_tokens == 0:
                    outputs.append(Output(row.id, None, prompt=tuple(row.scores), finish="length"))
                else:
                    self._join(row, caches, place)
        return outputs

    def _group(self, most_tokens: int) -> list[_Row]:
        """The next rows to prefill: several that share nothing and fit into `most_tokens` when padded, or a single one."""
        group: list[_Row] = []
        longest = 0
        for row in self._prefilling:
            longest = max(longest, len(row.seen) - 1)
            fits = len(row.seen) > 1 and (len(group) + 1) * longest <= most_tokens
            if row.cache is not None or row.request.prompt_logprobs or not fits or self._donor(row, group)[0]:
                break
            group.append(row)
        return group or [self._prefilling[0]]

    def _donor(self, row: _Row, others: Sequence[_Row] = ()) -> tuple[int, KVCache, int]:
        """How many tokens a row's prompt has in common with another text, at least `_LEAST_SHARED` or 0; the cache that holds
        them, and the place there. For `others`, whose keys and values are not computed yet, only the number counts."""
        texts = [(other.seen[: self._cache.lengths[place]], self._cache, place) for place, other in enumerate(self._rows)]
        texts += [(tokens, cache, 0) for tokens, cache in self._finished]
        texts += [(other.seen[:-1], self._cache, 0) for other in others]
        found = [(_shared(row.seen[:-1], tokens), cache, place) for tokens, cache, place in texts]
        best = max(found, key=lambda item: item[0], default=(0, self._cache, 0))
        return best if best[0] >= _LEAST_SHARED else (0, self._cache, 0)

    def _compute_together(self, group: Sequence[_Row]) -> KVCache:
        """The keys and values of whole prompts without their last tokens, one row each."""
        prompts = [row.seen[:-1] for row in group]
        lengths = [len(prompt) for prompt in prompts]
        padded = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts]  # on the right, where no token looks
        caches = KVCache(self._model.config, len(group), capacity=max(lengths))
        self._model(self._ids(padded), cache=caches, output="hidden")
        caches.lengths = lengths
        return caches

    def _compute_chunk(self, row: _Row, most_tokens: int) -> int:
        """Add up to `most_tokens` tokens of a row's prompt, except its last, to its own cache; return how many."""
        end = len(row.seen) - 1
        if row.cache is None:
            shared, donor, place = (0, self._cache, 0) if row.request.prompt_logprobs else self._donor(row)
            capacity = max(1, end)
            row.cache = donor.copy(place, shared, capacity) if shared else KVCache(self._model.config, 1, capacity=capacity)
        done = row.cache.lengths[0]
        chunk = row.seen[done : min(end, done + most_tokens)]
        hidden = self._model(self._ids([chunk]), cache=row.cache, output="hidden") if chunk else None  # [1, T, C]
        if row.request.prompt_logprobs:
            most = row.request.sampling.logprobs or 0
            if done == 0:
                row.scores.append(TokenLogprob(row.tokens[0], None))
            for first in range(0, len(chunk), _SCORED_TOKENS):
                assert hidden is not None
                targets = row.tokens[done + first + 1 : done + min(first + _SCORED_TOKENS, len(chunk)) + 1]
                logits = self._model.head(hidden[0, first : first + _SCORED_TOKENS])  # [T, V]
                row.scores += score(logits.cpu(), targets, most)
        return len(chunk)

    def _join(self, row: _Row, caches: KVCache, place: int) -> None:
        """Let a row whose prompt is computed decode its last token in the next forward pass."""
        self._cache.reserve(len(row.seen) + row.request.sampling.max_new_tokens)
        self._cache.append(caches, place)
        row.cache = None
        self._rows.append(row)

    def _remove(self, place: int) -> None:
        """Free the slot of a row; the last row takes its place, as it does in the cache."""
        row, length = self._rows[place], self._cache.lengths[place]
        if self._finished.maxlen and length >= _LEAST_SHARED:
            self._finished.append((row.seen[:length], self._cache.copy(place, length, length)))
        self._cache.drop(place)
        self._rows[place] = self._rows[-1]
        self._rows.pop()
        if not self._rows:
            self._cache = KVCache(self._model.config, 0, capacity=1)  # frees the memory

    def _decode(self) -> Tensor:
        """Decode each row's newest token, after making room in full rows; return the next-token logits [B, V]."""
        for place, row in enumerate(self._rows):
            if self._cache.lengths[place] == self._model.config.block_size:
                self._slide(place, row)
        newest = self._ids([row.tokens[-1:] for row in self._rows])  # [B, 1]
        logits: Tensor = self._model(newest, cache=self._cache)  # [B, 1, V]
        return logits[:, 0].cpu()

    def _slide(self, place: int, row: _Row) -> None:
        """Refill a full row with its last block_size // 2 tokens, except the newest, which is decoded next."""
        config = self._model.config
        kept = row.tokens[:-1][-(config.block_size // 2) :] if config.block_size > 1 else []
        row.start = len(row.tokens) - 1 - len(kept)
        view = self._cache.row(place)
        view.lengths = [0]
        if kept:
            self._model(self._ids([kept]), cache=view, output="hidden")
        self._cache.lengths[place] = len(kept)

    def _advance(self, logits: Tensor) -> list[Output]:
        """Choose a token of each row from the logits [B, V]; end the rows that are complete."""
        tokens = self._choose(logits)
        if self._agree is not None:
            tokens = self._agree(tokens)
        outputs = [
            self._output(row, token, logits[place]) for place, (row, token) in enumerate(zip(self._rows, tokens, strict=True))
        ]
        for place in reversed(range(len(outputs))):
            if outputs[place].finish is not None:
                self._remove(place)
        return outputs

    def _choose(self, logits: Tensor) -> list[int]:
        """A token of each row, from the logits [B, V]. Rows with equal filters are sampled together."""
        rows, logits = self._rows, logits[:, : self._vocab_size]
        tolerance = _TOLERANCE * max(map(abs, torch.stack(logits.aminmax()).tolist())) if self._is_exact() else 0.0
        alike: dict[object, list[int]] = {}
        for place, row in enumerate(rows):
            alike.setdefault(row.request.sampling.filters, []).append(place)
        tokens = [0] * len(rows)
        for places in alike.values():
            adjusted = logits if len(places) == len(rows) else logits[places]
            if any(rows[place].request.sampling.changes_logits for place in places):
                adjusted = torch.stack([self._adjusted(logits[place], rows[place]) for place in places])
            draws = [rows[place].draw() for place in places]
            choice = _pick(adjusted, draws, rows[places[0]], tolerance)
            for place, draw, token, close in zip(places, draws, choice.tokens, choice.close, strict=True):
                if close:
                    alone = self._adjusted(self._alone(rows[place]), rows[place])
                    token = _pick(alone[None], [draw], rows[place], 0.0).tokens[0]
                tokens[place] = token
        return tokens

    def _is_exact(self) -> bool:
        """Whether rounding is fine enough for close choices to be rare, and this process may compute them by itself."""
        model = self._model
        is_float32 = model.head_weight.dtype == torch.float32 and model.int8_head is None
        with self._autocast():
            return self._agree is None and is_float32 and not torch.is_autocast_enabled(model.device.type)

    def _adjusted(self, logits: Tensor, row: _Row) -> Tensor:
        """The logits [V] from which a row's token is sampled."""
        logits, sampling = logits[: self._vocab_size], row.request.sampling
        return adjust(logits, sampling, row.tokens) if sampling.changes_logits else logits

    def _alone(self, row: _Row) -> Tensor:
        """The next-token logits [V] of a row, computed in a way that depends on its tokens only."""
        with evaluation_mode(self._model):
            hidden = self._model(self._ids([row.seen]), output="hidden")  # [1, T, C]
            logits: Tensor = self._model.head(hidden[:, -1])[0].cpu()
        return logits

    def _output(self, row: _Row, token: int, logits: Tensor) -> Output:
        """Add a token to a row; its logits [V] are those it was sampled from."""
        sampling, stream = row.request.sampling, row.stream
        scores = None if sampling.logprobs is None else score(logits[None], [token], sampling.logprobs)[0]
        prompt = tuple(row.scores) if row.generated == 0 else ()
        row.tokens.append(token)
        text = "" if stream is None or token in self._ends else stream.push(token)
        finish: Literal["stop", "length"] | None = None
        if token in self._ends or (stream is not None and stream.stopped):
            finish = "stop"
        elif row.generated == sampling.max_new_tokens:
            finish = "length"
        if finish is not None and stream is not None:
            text += stream.finish()
            finish = "stop" if stream.stopped else finish
        return Output(row.id, token, text, scores, prompt, finish)

    def _ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, device=self._model.device)


def score(logits: Tensor, tokens: Sequence[int], most: int) -> list[TokenLogprob]:
    """The log-probabilities of `tokens` [T] under `logits` [T, V], and of the `most` most likely tokens."""
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(most, logprobs.size(1)), dim=-1)
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(*entry) for entry in zip(tokens, own, tops, strict=True)]


def _pick(logits: Tensor, draws: Sequence[float], row: _Row, tolerance: float) -> Choice:
    sampling = row.request.sampling
    temperature, top_k, top_p, min_p = sampling.filters
    return pick(logits, draws, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, tolerance=tolerance)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning of two texts."""
    length = min(len(first), len(second))
    return next((place for place in range(length) if first[place] != second[place]), length)
