"""Mutated requests: whatever a client sends, it gets an answer in OpenAI's shape, and nothing hangs or leaks."""

import json
import random

import pytest
from serve_help import running_server

COMPLETION = {
    "model": "tiny",
    "prompt": "hello",
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "n": 1,
    "best_of": 1,
    "stream": False,
    "stream_options": None,
    "logprobs": 1,
    "echo": True,
    "stop": ["x"],
    "seed": 1,
    "logit_bias": {"5": 1},
}
CHAT = {
    "model": "tiny",
    "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}],
    "max_tokens": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "n": 2,
    "stop": "x",
}
BASES = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/tokenize": {"model": "tiny", "prompt": "hello", "add_special_tokens": True},
    "/detokenize": {"model": "tiny", "tokens": [1, 2, 256]},
}
RAW = "\x00raw:"  # begins a string that is written as it is, without quotes
NUMBERS = ["1e999", "-1e999", "NaN", "Infinity", "-0", "1e-999", "9" * 400, "9" * 5_000, "1e400", "0x10", "01", "1_000"]
VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 0.5, -0.5, 1e308, "", "5", "\ud800", "\x00", "x" * 20_000,
    "\N{GRINNING FACE}" * 100, [], {}, [[]], [None], [True], [[1], "a"], [1, "a"], [1.0], [-1], [256], [257], [2**40],
    [[1, 2], [3]], ["a", "b"], {"a": 1}, {"1": "x"}, {"-1": 1}, {"\ud800": 1}, [[[[[[1]]]]]], [{}] * 1_001, list(range(129)),
    ["a"] * 129, "tiny@step-1", "../../etc/passwd", "tiny\n", *(RAW + number for number in NUMBERS),
]  # fmt: skip


def mutate(draw: random.Random, value):
    """A copy of a JSON value with one place changed."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        changed = {**value, key: mutate(draw, value[key])}
        if draw.random() < 0.1:
            changed[draw.choice(["extra", "", "\ud800", "x" * 1_000, "suffix", "tools"])] = draw.choice(VALUES)
        if draw.random() < 0.1:
            del changed[key]
        return changed
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        return [*value[:place], mutate(draw, value[place]), *value[place + 1 :]]
    return draw.choice(VALUES)


def body(draw: random.Random, value) -> bytes:
    """The JSON of a value, sometimes damaged."""
    text = json.dumps(value)
    while (start := text.find('"\\u0000raw:')) >= 0:
        end = text.index('"', start + 1)
        text = text[:start] + text[start + len('"\\u0000raw:') : end] + text[end + 1 :]
    data = bytearray(text.encode())
    kind = draw.random()
    if kind < 0.05:
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif kind < 0.07:
        del data[draw.randrange(len(data)) :]
    elif kind < 0.1:
        depth = draw.choice([10, 1_000, 100_000])
        data = bytearray(b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}")
    elif kind < 0.13:
        data = bytearray(draw.choice([b"[" * 100_000, b'{"a":' * 50_000, b"\xff" * 100, b"", b"null", b"\xef\xbb\xbf{}"]))
    return bytes(data)


def send(served, seed: int) -> int:
    """Send one mutated request, check the answer, and return its status."""
    draw = random.Random(seed)
    path = draw.choice(list(BASES))
    value = BASES[path]
    for _ in range(draw.randrange(1, 3)):
        value = mutate(draw, value)
    data = body(draw, value)
    answer = served.http.post(path, content=data)
    context = f"seed {seed}: {path} {data[:300]!r} -> {answer.status_code} {answer.text[:300]}"
    assert answer.status_code in (200, 400, 404, 413), context
    if answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n"), context
        return answer.status_code
    content = json.loads(answer.text, parse_constant=lambda name: pytest.fail(context))
    if answer.status_code != 200:
        assert set(content) == {"error"}, context
        assert set(content["error"]) == {"message", "type", "param", "code"}, context
        assert isinstance(content["error"]["message"], str), context
        assert 0 < len(content["error"]["message"]) < 1_000, context
        assert "Traceback" not in answer.text, context
    return answer.status_code


def run(folder, seeds) -> None:
    with running_server(folder, slots=4, queue=200) as served:
        statuses = [send(served, seed) for seed in seeds]
        assert 200 in statuses, "some mutations leave a valid request"
        assert statuses.count(400) > len(statuses) // 2
        assert served.completions() == 0
        assert served.metric("models_loaded") == 1
        assert served.metric("model_loads_total") == 1, "the model has not failed"
        assert served.post("/v1/completions", **COMPLETION)["usage"]["completion_tokens"] <= 2


def test_mutated_requests(folder):
    run(folder, range(200))


@pytest.mark.slow
def test_a_thousand_mutated_requests(folder):
    run(folder, range(200, 1_200))
