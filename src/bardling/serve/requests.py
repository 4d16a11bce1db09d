"""Bodies of requests: JSON to checked values. Every member has a type and bounds; what is not supported is refused by name.

`null` stands for a missing member, as in OpenAI's interface. Parameters of OpenAI's that have no effect here are accepted at
the value that asks for nothing (`presence_penalty: 0`).

Limits: what depends on the model (vocabulary, context) is checked in `app.py`.
"""

import json
import reprlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from bardling.data.text.fields import valid_text
from bardling.data.tokens.chat_template import checked_messages
from bardling.errors import UserError, closest
from bardling.generation.sampling import Sampling
from bardling.serve.errors import ApiError

MAX_LOGPROBS = 20
_MAX_COMPLETIONS = 128  # of one request
_MAX_TOKENS = 1 << 24  # a context is shorter
_MAX_STOPS, _MAX_STOP_CHARACTERS = 16, 1_000
_MAX_BIASES = 1_024
_MAX_NAME = 4_096  # characters
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "best_of": (1,),
    "echo": (False,),
    "top_logprobs": (0,),
}
"""Parameters that a request may lack, and values that ask for nothing."""

Prompt = str | tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """What a request for completions asks for; `sampling.max_new_tokens` is decided later, by the room in the context."""

    model: str | None
    sampling: Sampling
    prompts: tuple[Prompt, ...] = ()  # one at least, unless there are messages
    messages: tuple[Mapping[str, str], ...] = ()
    n: int = 1  # completions per prompt
    best_of: int = 1  # generated per prompt, of which the best n are returned
    max_tokens: int | None = None
    stream: bool = False
    include_usage: bool = False
    echo: bool = False

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)


def parse_json(data: bytes) -> dict[str, Any]:
    """The JSON object in a body; anything else is an `ApiError`."""

    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON value")

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError: also bad UTF-8, and integers of thousands of digits
        raise ApiError(400, f"the body is not valid JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {_kind(value)}", code="invalid_json")
    return value


class Fields:
    """Takes the members of a JSON object one by one; `refuse_rest` then names those that nothing has asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in values.items() if value is not None}
        self._taken: list[str] = []

    def take(self, name: str) -> Any:
        self._taken.append(name)
        return self._left.pop(name, None)

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        if value is None or (type(value) is int and low <= value <= high):
            return value
        refuse(name, value, f"must be an integer from {low} to {high}")

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        if type(value) in (int, float) and low <= value <= high:
            return float(value)
        refuse(name, value, f"must be a number from {low:g} to {high:g}")

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.take(name)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        refuse(name, value, "must be true or false")

    def text(self, name: str, most: int) -> str | None:
        value = self.take(name)
        if value is None or (isinstance(value, str) and len(value) <= most):
            return value
        refuse(name, value, f"must be a string of at most {most:,} characters")

    def refuse_rest(self) -> None:
        for name, value in self._left.items():
            if value in _NEUTRAL.get(name, ()):
                continue
            if name in _NEUTRAL:
                raise ApiError(400, f"{name}: is not supported", param=name, code="unsupported_parameter")
            hint = closest(name[:100], self._taken)
            raise ApiError(400, f"unknown parameter {name[:100]!r}{hint}", param=name[:100], code="unknown_parameter")


def parse_completion(values: Mapping[str, Any]) -> Generation:
    """A body of /v1/completions."""
    fields = Fields(values)
    prompts = _prompts(fields.take("prompt"))
    echo, logprobs = fields.boolean("echo"), fields.integer("logprobs", 0, MAX_LOGPROBS)
    max_tokens = fields.integer("max_tokens", 0 if echo else 1, _MAX_TOKENS)
    best_of = fields.integer("best_of", 1, _MAX_COMPLETIONS)
    return _generation(fields, logprobs, prompts=prompts, echo=echo, best_of=best_of, max_tokens=max_tokens)


def parse_chat(values: Mapping[str, Any]) -> Generation:
    """A body of /v1/chat/completions."""
    fields = Fields(values)
    try:
        messages = tuple(checked_messages(fields.take("messages")))
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from None
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    wanted = fields.boolean("logprobs")
    if top and not wanted:
        refuse("top_logprobs", top, "needs logprobs: true")
    lengths = [fields.integer(name, 1, _MAX_TOKENS) for name in ("max_completion_tokens", "max_tokens")]
    max_tokens = next((length for length in lengths if length is not None), None)
    return _generation(fields, (top or 0) if wanted else None, messages=messages, max_tokens=max_tokens)


def _generation(
    fields: Fields,
    logprobs: int | None,
    *,
    max_tokens: int | None,
    prompts: tuple[Prompt, ...] = (),
    messages: tuple[Mapping[str, str], ...] = (),
    echo: bool = False,
    best_of: int | None = None,
) -> Generation:
    """What completions and chat have in common."""
    model, stream = fields.text("model", _MAX_NAME), fields.boolean("stream")
    options = fields.take("stream_options")
    if options is not None and not (isinstance(options, dict) and stream):
        refuse("stream_options", options, "must be an object, with stream: true")
    streaming = Fields(options or {})
    include_usage = streaming.boolean("include_usage")
    streaming.boolean("include_obfuscation")  # OpenAI's clients may ask for padding against eavesdroppers
    streaming.refuse_rest()
    n = fields.integer("n", 1, _MAX_COMPLETIONS) or 1
    best_of = n if best_of is None else best_of
    if best_of < n or (best_of > n and stream):
        refuse("best_of", best_of, f"must be at least n = {n}" if best_of < n else "cannot be combined with stream")
    count = best_of * max(1, len(prompts))
    if count > _MAX_COMPLETIONS:
        refuse("n", n, f"{count} completions of one request are too many; the limit is {_MAX_COMPLETIONS}")
    sampling = _sampling(fields, logprobs)
    for ignored in ("user", "metadata", "safety_identifier", "prompt_cache_key"):
        fields.take(ignored)
    fields.refuse_rest()
    return Generation(model, sampling, prompts, messages, n, best_of, max_tokens, stream, include_usage, echo)


def _sampling(fields: Fields, logprobs: int | None) -> Sampling:
    temperature, top_p = fields.number("temperature", 0, 100), fields.number("top_p", 0, 1)
    penalty, seed = fields.number("repetition_penalty", 0.01, 100), fields.integer("seed", -(2**63), 2**63 - 1)
    try:
        return Sampling(
            temperature=1.0 if temperature is None else temperature,
            top_k=fields.integer("top_k", 1, _MAX_TOKENS),
            top_p=top_p,
            min_p=fields.number("min_p", 0, 1),
            repetition_penalty=1.0 if penalty is None else penalty,
            seed=secrets.randbelow(2**63) if seed is None else seed,
            stop=_stops(fields.take("stop")),
            logit_bias=_biases(fields.take("logit_bias")),
            logprobs=logprobs,
        )
    except UserError as error:
        raise ApiError(400, str(error), param=str(error).partition(" ")[0]) from None


def _prompts(value: Any) -> tuple[Prompt, ...]:
    rule = "must be a string, a list of strings, a list of token ids, or a list of such lists"
    if isinstance(value, str):
        return (valid_text(value),)
    if not isinstance(value, list) or not value:
        refuse("prompt", value, rule)
    if all(isinstance(item, str) for item in value):
        return tuple(map(valid_text, value))
    rows = value if isinstance(value[0], list) else [value]
    for row in rows:
        if not isinstance(row, list) or not row or any(type(token) is not int or not 0 <= token < 2**31 for token in row):
            refuse("prompt", value, rule)
    return tuple(map(tuple, rows))


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    valid = isinstance(stops, list) and len(stops) <= _MAX_STOPS
    if not valid or not all(isinstance(stop, str) and 0 < len(stop) <= _MAX_STOP_CHARACTERS for stop in stops):
        refuse("stop", value, f"must be a string, or up to {_MAX_STOPS} strings of 1 to {_MAX_STOP_CHARACTERS:,} characters")
    return tuple(stops)


def _biases(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _MAX_BIASES:
        refuse("logit_bias", value, f"must be an object of up to {_MAX_BIASES:,} token ids")
    for name, bias in value.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 9):
            refuse("logit_bias", name, "must be a token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            refuse(f"logit_bias[{name}]", bias, "must be a number from -100 (never) to 100")
    return {int(name): float(bias) for name, bias in value.items()}


def refuse(name: str, value: Any, rule: str) -> NoReturn:
    """Raise the error of a member with a wrong value."""
    found = "is missing" if value is None else f"= {reprlib.repr(value)}"
    raise ApiError(400, f"{name} {found}: {rule}", param=name)


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
