"""Completions in OpenAI's format: whole responses, chunks of a stream, log-probabilities.

A token's string is its text, or `bytes:\\xe2\\x80` if it is not UTF-8 by itself, as in OpenAI's interface. OpenAI's objects map
strings to log-probabilities, so two tokens with the same text are one entry; our own lists beside them (`bardling`) hold ids.
`text_offset` is the place of a token's first character in the text that is returned.
"""

import math
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bardling.data.tokens.stream_decoder import StreamDecoder
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.generation.requests import Output, TokenLogprob
from bardling.serve.requests import Generation

_CONTEXT = 32  # tokens of the prompt that complete a character, or decide about a space
_LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's value


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The string of one token."""
    if token >= tokenizer.vocab_size:
        return ""  # a row of the model that its tokenizer does not use
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass(frozen=True)
class Entry:
    """A token in a list of log-probabilities."""

    score: TokenLogprob
    offset: int


@dataclass(frozen=True)
class Delta:
    """What is new in a choice."""

    text: str
    entries: Sequence[Entry]
    finish: str | None


@dataclass
class Choice:
    """One completion as it grows.

    Args:
        index: its number in the response.
        prompt: the prompt's tokens.
        hidden: how many of them have no text in an echo: what the tokenizer puts before a text.
        echo: whether the text begins with the prompt.
        scored: whether log-probabilities are returned.
        with_end: whether that of a token which ends the text is one of them, although it is no part of the text.
    """

    index: int
    tokenizer: Tokenizer
    prompt: Sequence[int]
    hidden: int = 0
    echo: bool = False
    scored: bool = False
    with_end: bool = False
    tokens: int = 0  # generated
    logprob: float = 0.0  # of all of them
    length: int = 0  # characters returned
    _waiting: list[Entry] = field(default_factory=list)  # tokens whose text has not been returned
    _started: bool = False
    _position: int = 0  # in the text returned, of the next token

    def __post_init__(self) -> None:
        self._decoder = StreamDecoder(self.tokenizer)

    def add(self, output: Output) -> Delta:
        """Take in one output of the engine."""
        text = output.text
        if not self._started:
            text = self._begin(output.prompt, last=output.token is None) + text
            self._started = True
        ends = output.finish == "stop" and output.token in self.tokenizer.interface.eos
        self.tokens += output.token is not None
        if output.logprob is not None:
            self.logprob += output.logprob.logprob or 0.0
            if not ends and self.scored:
                self._waiting.append(Entry(output.logprob, self._push(output.logprob.token)[1]))
        self.length += len(text)
        entries = [entry for entry in self._waiting if entry.offset < self.length or output.finish == "length"]
        self._waiting = self._waiting[len(entries) :]
        if ends and self.scored and self.with_end and output.logprob is not None:
            entries.append(Entry(output.logprob, self.length))
        return Delta(text, entries, output.finish)

    def _begin(self, scores: Sequence[TokenLogprob], *, last: bool) -> str:
        """The text that is returned before the first generated token."""
        if not self.echo:
            if self.scored:
                for token in self.prompt[-_CONTEXT:]:
                    self._decoder.push(token)
            return ""
        if self.scored:
            self._waiting = [Entry(score, 0) for score in scores[: self.hidden]]
        text = ""
        for place, token in enumerate(self.prompt[self.hidden :], self.hidden):
            piece, offset = self._push(token)
            text += piece
            if self.scored:
                self._waiting.append(Entry(scores[place], offset))
        return text + self._decoder.finish() if last else text

    def _push(self, token: int) -> tuple[str, int]:
        """The text that a token completes, and where its own text begins."""
        start, piece, own = self._position, self._decoder.push(token), token_text(self.tokenizer, token)
        self._position += len(piece)
        return piece, self._position - len(own) if piece.endswith(own) else start


def _number(value: float | None) -> float | None:
    return None if value is None else max(value, _LEAST_LOGPROB) if math.isfinite(value) else _LEAST_LOGPROB


def completion_logprobs(tokenizer: Tokenizer, entries: Iterable[Entry]) -> dict[str, Any]:
    """The `logprobs` object of /v1/completions."""
    result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    ids, tops = [], []
    for entry in entries:
        score = entry.score
        text = token_text(tokenizer, score.token)
        top = [(token, token_text(tokenizer, token), _number(value)) for token, value in score.top]
        alternatives: dict[str, float | None] = {}
        for _, name, value in [*top, (score.token, text, _number(score.logprob))]:
            alternatives.setdefault(name, value)  # the likeliest of several with the same text
        result["tokens"].append(text)
        result["token_logprobs"].append(_number(score.logprob))
        result["top_logprobs"].append(None if score.logprob is None else alternatives)
        result["text_offset"].append(entry.offset)
        ids.append(score.token)
        tops.append([{"id": token, "text": name, "logprob": value} for token, name, value in top])
    return {**result, "bardling": {"ids": ids, "top": tops}}


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[Entry]) -> dict[str, Any]:
    """The `logprobs` object of /v1/chat/completions."""

    def shown(token: int, logprob: float | None) -> dict[str, Any]:
        data = list(tokenizer.token_bytes(token)) if token < tokenizer.vocab_size else []
        return {"token": token_text(tokenizer, token), "logprob": _number(logprob), "bytes": data, "id": token}

    def listed(score: TokenLogprob) -> dict[str, Any]:
        return {**shown(score.token, score.logprob), "top_logprobs": [shown(*each) for each in score.top]}

    return {"content": [listed(entry.score) for entry in entries], "refusal": None}


class Shapes:
    """The objects of one response."""

    def __init__(self, generation: Generation, model: str, tokenizer: Tokenizer) -> None:
        self._chat, self._tokenizer = generation.is_chat, tokenizer
        self._scored = generation.sampling.logprobs is not None
        kind = "chat.completion" if self._chat else "text_completion"
        prefix = "chatcmpl" if self._chat else "cmpl"
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}
        self._chunk = {**self._head, "object": f"{kind}.chunk"} if self._chat else self._head

    def whole(self, choices: Iterable[tuple[int, Sequence[Delta]]], usage: dict[str, int]) -> dict[str, Any]:
        """A response that is not streamed: index and contents of each choice."""
        listed = [
            self._choice(
                index,
                Delta("".join(delta.text for delta in deltas), [e for d in deltas for e in d.entries], deltas[-1].finish),
                key="message",
            )
            for index, deltas in choices
        ]
        return {**self._head, "choices": listed, "usage": usage}

    def chunk(self, index: int, delta: Delta, *, first: bool) -> dict[str, Any]:
        """A part of a stream."""
        return {**self._chunk, "choices": [self._choice(index, delta, key="delta", role=first)]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last part of a stream, if usage was asked for."""
        return {**self._chunk, "choices": [], "usage": usage}

    def _choice(self, index: int, delta: Delta, *, key: str, role: bool = True) -> dict[str, Any]:
        logprobs = None
        if self._scored:
            logprobs = (chat_logprobs if self._chat else completion_logprobs)(self._tokenizer, delta.entries)
        if not self._chat:
            return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}
        message = {**({"role": "assistant"} if role else {}), "content": delta.text}
        return {"index": index, key: message, "logprobs": logprobs, "finish_reason": delta.finish}


def usage(prompts: Iterable[Sequence[int]], generated: int) -> dict[str, int]:
    """The number of tokens."""
    read = sum(map(len, prompts))
    return {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}
