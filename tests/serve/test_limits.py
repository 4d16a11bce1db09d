"""Bounds: waiting requests, time, tokens, disconnected clients, shutting down."""

import dataclasses
import json
import threading

import pytest
from serve_help import CONFIG, running_server, write_folder

LONG = {"prompt": "a", "max_tokens": 4_000, "logit_bias": {"256": -100}, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with so long a context that no test waits for the end of `LONG`."""
    config = dataclasses.replace(CONFIG, block_size=4_096)
    return write_folder(tmp_path_factory.mktemp("models") / "long", config)


def wait_until(condition):
    while not condition():
        threading.Event().wait(0.01)


class Stream:
    """A stream that has begun."""

    def __init__(self, served, **body):
        self._open = served.http.stream("POST", "/v1/completions", json={**LONG, "stream": True, **body})
        self.response = self._open.__enter__()
        assert self.response.status_code == 200
        self.lines = self.response.iter_lines()
        next(self.lines)

    def close(self):
        self._open.__exit__(None, None, None)

    def rest(self) -> list[str]:
        found = [line.removeprefix("data: ") for line in self.lines if line.startswith("data: ")]
        self.close()
        return found


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnected_client_frees_its_slot(folder, stream):
    with running_server(folder, slots=1, queue=1) as served:
        if stream:
            Stream(served, n=2).close()
        else:
            with pytest.raises(Exception, match="timed out"):
                served.http.post("/v1/completions", json={**LONG, "n": 2}, timeout=0.5)
        wait_until(lambda: served.completions() == 0)
        assert served.metric("cancelled_completions_total") == 2
        assert served.post("/v1/completions", prompt="a", max_tokens=3)["usage"]["completion_tokens"] <= 3


def test_a_full_queue_is_answered_with_429(folder):
    with running_server(folder, slots=1, queue=1) as served:
        running = Stream(served)
        waiting = threading.Thread(target=served.post, args=("/v1/completions",), kwargs={"prompt": "b"})
        waiting.start()
        wait_until(lambda: served.metric("completions_waiting") == 1)
        answer = served.http.post("/v1/completions", json=LONG)
        assert answer.status_code == 429
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        running.close()
        waiting.join()
        served.post("/v1/completions", prompt="a", max_tokens=1)
        assert served.post("/v1/completions", status=400, prompt="a", n=3)["error"]["param"] == "n"


def test_a_request_has_a_limited_time(folder):
    with running_server(folder, timeout=0.3) as served:
        assert served.post("/v1/completions", status=504, **LONG)["error"]["code"] == "timeout"
        last = json.loads(Stream(served).rest()[-1])
        assert last["error"]["code"] == "timeout"
        wait_until(lambda: served.completions() == 0)


def test_tokens_are_limited(folder):
    with running_server(folder, max_tokens=20) as served:
        assert served.post("/v1/completions", status=400, **LONG)["error"]["param"] == "max_tokens"
        assert served.post("/v1/completions", **{**LONG, "max_tokens": 20})["usage"]["completion_tokens"] == 20


def test_running_requests_finish_while_new_ones_are_refused(folder):
    with running_server(folder) as served:
        stream = Stream(served, max_tokens=200)
        served.running.stop()
        wait_until(lambda: served.http.get("/healthz").status_code == 503)
        answer = served.http.post("/v1/completions", json=LONG)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "shutting_down"
        assert "retry-after" in answer.headers
        lines = stream.rest()
        assert lines[-1] == "[DONE]"
        assert len(lines) > 100
    assert "finishing 1 running request" in served.notes[0]


def test_shutting_down_does_not_wait_for_ever(folder):
    with running_server(folder, drain=0.2) as served:
        stream = Stream(served)
        served.running.stop()
        assert json.loads(stream.rest()[-1])["error"]["code"] == "shutting_down"
    assert "ending 1 running request:" in served.notes[1]


def test_greedy_text_is_the_same_under_load(folder):
    with running_server(folder, slots=4, queue=100) as served:
        prompts = [f"{number} times " for number in range(6)]
        request = {"max_tokens": 15, "temperature": 0}
        alone = [served.post("/v1/completions", prompt=prompt, **request)["choices"][0]["text"] for prompt in prompts]
        background, texts = Stream(served), [""] * len(prompts)

        def ask(number):
            texts[number] = served.post("/v1/completions", prompt=prompts[number], **request)["choices"][0]["text"]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        background.close()
        assert texts == alone
