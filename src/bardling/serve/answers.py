"""Turns a checked request into requests for the engine, and the engine's outputs into a response."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from bardling.data.tokens.chat_template import chat_prompt_ids
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError
from bardling.generation.generate import prompt_ids
from bardling.generation.requests import Output, Request
from bardling.serve.errors import ApiError, json_text
from bardling.serve.models import Loaded
from bardling.serve.requests import Generation, Prompt, refuse
from bardling.serve.responses import Choice, Delta, Shapes, usage
from bardling.serve.worker import Job

_SHORT = 10_000  # characters that are tokenized faster than a thread is started
_DEFAULT_TOKENS = 16  # of a completion, as in OpenAI's interface


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A prompt as tokens; the first `hidden` ones are what the tokenizer puts before a text."""

    ids: tuple[int, ...]
    hidden: int = 0


async def encode_prompts(generation: Generation, loaded: Loaded) -> list[Encoded]:
    """The tokens of all prompts, or of the chat."""
    if generation.is_chat:
        return [await asyncio.to_thread(_encode_chat, generation, loaded)]
    if sum(map(len, generation.prompts)) < _SHORT:
        return [encode_prompt(prompt, loaded.tokenizer) for prompt in generation.prompts]
    return [await asyncio.to_thread(encode_prompt, prompt, loaded.tokenizer) for prompt in generation.prompts]


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer, special: bool = True) -> Encoded:
    """The tokens of a text; ids stay. `special`: with what the tokenizer puts around a text."""
    if not isinstance(prompt, str):
        return Encoded(prompt)
    try:
        if not special:
            return Encoded(tuple(map(int, tokenizer.encode(prompt))))
        ids = tuple(prompt_ids(tokenizer, prompt))
    except UserError as error:
        raise ApiError(400, str(error), param="prompt") from None
    return Encoded(ids, len(tokenizer.interface.start) if prompt else len(ids))


def _encode_chat(generation: Generation, loaded: Loaded) -> Encoded:
    if loaded.template is None:
        raise ApiError(400, "the model has no chat template: use /v1/completions", param="model", code="no_chat_template")
    try:
        return Encoded(tuple(chat_prompt_ids(loaded.tokenizer, generation.messages, loaded.template)))
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from None


def engine_requests(
    generation: Generation, prompts: Sequence[Encoded], loaded: Loaded, max_tokens: int | None
) -> list[Request]:
    """A request for each completion: those of the first prompt, of the second one, and so on.

    Args:
        max_tokens: the server's limit.

    Raises:
        ApiError: 400, if an id is not in the vocabulary, or the text would not fit into the context.
    """
    config, found = loaded.config, []
    size = min(config.vocab_size, loaded.tokenizer.vocab_size)
    if outside := [token for token in generation.sampling.logit_bias if token >= size]:
        refuse("logit_bias", outside[0], f"the vocabulary has {size:,} tokens")
    for prompt in prompts:
        if outside := [token for token in prompt.ids if token >= size]:
            refuse("prompt", outside[0], f"the vocabulary has {size:,} tokens")
        room = config.block_size - len(prompt.ids)
        wanted = _length(generation, room, max_tokens)
        sampling = dataclasses.replace(generation.sampling, max_new_tokens=wanted)
        scored = sampling.logprobs is not None
        if generation.best_of > generation.n and not scored:
            sampling = dataclasses.replace(sampling, logprobs=0)  # to compare them
        score_prompt = wanted == 0 or (generation.echo and scored)
        found += [Request(prompt.ids, sampling, index, score_prompt) for index in range(generation.best_of)]
    return found


def _length(generation: Generation, room: int, limit: int | None) -> int:
    """How many tokens to generate, of which the context has room for `room`."""
    wanted = generation.max_tokens
    if wanted is None:
        wanted = max(1, min(room, limit or room, room if generation.is_chat else _DEFAULT_TOKENS))
    if limit is not None and wanted > limit:
        refuse("max_tokens", wanted, f"this server generates at most {limit:,} tokens")
    if wanted > room:
        name = "messages" if generation.is_chat else "prompt"
        message = f"the prompt and max_tokens = {wanted} exceed the model's context by {wanted - room:,} tokens: shorten one"
        raise ApiError(400, message, param=name, code="context_length_exceeded")
    return wanted


class Answer:
    """The response to one request for completions.

    Args:
        job: its completions, in the order of `engine_requests`.
        deadline: when it must be complete, in the event loop's time.
    """

    def __init__(self, generation: Generation, prompts: Sequence[Encoded], loaded: Loaded, job: Job, deadline: float) -> None:
        self._generation, self._prompts, self._job, self._deadline = generation, prompts, job, deadline
        self._shapes = Shapes(generation, loaded.name, loaded.tokenizer)
        scored = generation.sampling.logprobs is not None
        choice = partial(Choice, echo=generation.echo, scored=scored, with_end=not generation.is_chat)
        self._choices = [
            choice(place * generation.best_of + number, loaded.tokenizer, each.ids, each.hidden)
            for place, each in enumerate(prompts)
            for number in range(generation.best_of)
        ]

    async def whole(self) -> dict[str, Any]:
        """The response, once it is complete."""
        deltas: list[list[Delta]] = [[] for _ in self._choices]
        async for number, output in self._outputs():
            deltas[number].append(self._choices[number].add(output))
        best, n = self._generation.best_of, self._generation.n
        kept: list[tuple[int, list[Delta]]] = []
        for start in range(0, len(deltas), best):
            group = list(range(start, start + best))
            if best > n:
                group.sort(key=self._mean_logprob, reverse=True)  # as OpenAI does
            kept += [(len(kept) + place, deltas[number]) for place, number in enumerate(group[:n])]
        return self._shapes.whole(kept, self._usage())

    async def events(self) -> AsyncIterator[bytes]:
        """The response as server-sent events; an error becomes the last one."""
        started: set[int] = set()
        try:
            async for number, output in self._outputs():
                delta, first = self._choices[number].add(output), number not in started
                if first or delta.text or delta.entries or delta.finish:
                    started.add(number)
                    yield _event(self._shapes.chunk(number, delta, first=first))
        except ApiError as error:
            yield _event(error.body())
            return
        if self._generation.include_usage:
            yield _event(self._shapes.usage_chunk(self._usage()))
        yield b"data: [DONE]\n\n"

    async def _outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """Outputs until all completions have ended."""
        left = len(self._choices)
        while left:
            try:
                async with asyncio.timeout_at(self._deadline):
                    item = await self._job.outputs.get()
            except TimeoutError:
                raise ApiError(504, "the request took too long", code="timeout") from None
            if isinstance(item, ApiError):
                raise item
            left -= item[1].finish is not None
            yield item

    def _mean_logprob(self, number: int) -> float:
        """Log-probability per token of a completion."""
        return self._choices[number].logprob / max(1, self._choices[number].tokens)

    def _usage(self) -> dict[str, int]:
        return usage([prompt.ids for prompt in self._prompts], sum(choice.tokens for choice in self._choices))


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json_text(value).encode("utf-8", "replace") + b"\n\n"
