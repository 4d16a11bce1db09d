"""/v1/completions, through OpenAI's own client: text, streams, log-probabilities, echo, n, stop and seed."""

import openai
import pytest
from serve_help import CONFIG, running_server, sse, write_folder

PROMPT = "The king and the"


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def decode(ids):
    return bytes(token for token in ids if token < 256).decode("utf-8", "replace")


def test_greedy_text_is_that_of_generate(client, greedy):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, temperature=0)
    assert answer.choices[0].text == decode(greedy(PROMPT, 40))
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.model == "tiny"
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens <= 40
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("logprobs", [None, 3])
def test_a_stream_adds_up_to_the_whole_response(client, logprobs):
    request = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "temperature": 0, "logprobs": logprobs, "echo": True}
    whole = client.completions.create(**request)
    parts = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert parts[-1].usage == whole.usage
    choices = [part.choices[0] for part in parts[:-1]]
    assert "".join(choice.text for choice in choices) == whole.choices[0].text
    assert len(choices) > 10
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + [whole.choices[0].finish_reason]
    if logprobs is not None:
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [item for choice in choices for item in getattr(choice.logprobs, name)]
            assert joined == getattr(whole.choices[0].logprobs, name), name


def test_logprobs_are_those_of_the_model(served, greedy, scores):
    ids = [*PROMPT.encode(), *greedy(PROMPT, 20)]
    answer = served.post("/v1/completions", prompt=PROMPT, max_tokens=20, temperature=0, logprobs=5, echo=True)
    found = answer["choices"][0]["logprobs"]
    listed = found["bardling"]["ids"]
    assert listed == ids[: len(listed)]
    assert len(listed) in (len(ids), len(ids) - 1)  # an end-of-text token is not listed
    expected = scores(ids)
    assert found["token_logprobs"][0] is None
    assert found["bardling"]["top"][0] == []
    for place in range(1, len(listed)):
        assert found["token_logprobs"][place] == pytest.approx(float(expected[place - 1, ids[place]]), abs=2e-4)
        top = expected[place - 1].topk(5)
        assert [each["id"] for each in found["bardling"]["top"][place]] == top.indices.tolist()
        values = [each["logprob"] for each in found["bardling"]["top"][place]]
        assert values == pytest.approx(top.values.tolist(), abs=2e-4)
        assert found["tokens"][place] in found["top_logprobs"][place]


def test_text_offsets_point_at_the_tokens(served):
    answer = served.post("/v1/completions", prompt="naïve €5 ", max_tokens=60, temperature=1.5, seed=3, logprobs=0, echo=True)
    choice = answer["choices"][0]
    found = choice["logprobs"]
    assert found["text_offset"] == sorted(found["text_offset"])
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset : offset + len(token)] == token
    euro = found["tokens"].index("bytes:\\xe2")
    assert found["text_offset"][euro : euro + 3] == [6, 6, 6]


def test_the_loss_of_a_given_text(served, scores):
    ids = list(b"a text that is only scored")
    answer = served.post("/v1/completions", prompt=ids, max_tokens=0, echo=True, logprobs=0)
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["choices"][0]["text"] == "a text that is only scored"
    values = answer["choices"][0]["logprobs"]["token_logprobs"]
    expected = scores(ids)[:-1].gather(1, torch_ids(ids[1:]))[:, 0].tolist()
    assert values[0] is None
    assert values[1:] == pytest.approx(expected, abs=2e-4)
    assert served.post("/v1/completions", prompt=ids, max_tokens=0, echo=True)["choices"][0]["logprobs"] is None


def torch_ids(ids):
    import torch

    return torch.tensor(ids)[:, None]


def test_several_prompts_and_completions(served):
    request = {"max_tokens": 12, "temperature": 1.0, "seed": 5, "n": 3, "logit_bias": {"256": -100}}
    together = served.post("/v1/completions", prompt=["one ", "two "], **request)["choices"]
    assert [choice["index"] for choice in together] == list(range(6))
    assert len({choice["text"] for choice in together}) == 6
    ids = served.post("/v1/completions", prompt=[list(b"one "), list(b"two ")], **request)["choices"]
    assert [choice["text"] for choice in ids] == [choice["text"] for choice in together]
    alone = served.post("/v1/completions", prompt="two ", **request)["choices"]
    assert [choice["text"] for choice in alone] == [choice["text"] for choice in together[3:]]
    streamed = ["", "", ""]
    for part in sse(served.http.post("/v1/completions", json={"prompt": "two ", "stream": True, **request}).text):
        streamed[part["choices"][0]["index"]] += part["choices"][0]["text"]
    assert streamed == [choice["text"] for choice in alone]


def test_seeds(client):
    def text(seed):
        request = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "logit_bias": {"256": -100}}
        return client.completions.create(**request, **({} if seed is None else {"seed": seed})).choices[0].text

    assert text(1) == text(1) != text(2)
    assert text(None) != text(None)


def test_best_of_returns_the_likeliest(served):
    request = {"prompt": PROMPT, "max_tokens": 6, "seed": 9, "logprobs": 0, "logit_bias": {"256": -100}}
    everything = served.post("/v1/completions", n=6, **request)["choices"]
    means = [sum(choice["logprobs"]["token_logprobs"]) for choice in everything]
    best = served.post("/v1/completions", n=2, best_of=6, **request)["choices"]
    order = sorted(range(6), key=lambda index: -means[index])
    assert [choice["text"] for choice in best] == [everything[index]["text"] for index in order[:2]]
    assert [choice["index"] for choice in best] == [0, 1]


def test_stop(client, greedy):
    text = decode(greedy(PROMPT, 30))
    stop = text[10:12]
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, temperature=0, stop=[stop, "never"])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    scored = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, temperature=0, stop=stop, logprobs=0)
    assert scored.choices[0].text == answer.choices[0].text
    assert max(scored.choices[0].logprobs.text_offset) < len(answer.choices[0].text)


def test_logit_bias_top_k_and_min_p(served, greedy):
    answer = served.post("/v1/completions", prompt=PROMPT, max_tokens=5, temperature=1, logit_bias={"65": 100})
    assert answer["choices"][0]["text"] == "AAAAA"
    expected = decode(greedy(PROMPT, 8))
    for setting in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert served.post("/v1/completions", prompt=PROMPT, max_tokens=8, **setting)["choices"][0]["text"] == expected
    repeated = served.post("/v1/completions", prompt=PROMPT, max_tokens=30, temperature=0, repetition_penalty=100, logprobs=0)
    ids = repeated["choices"][0]["logprobs"]["bardling"]["ids"]
    assert len(set(ids)) == len(ids)


def test_an_empty_prompt_begins_a_document(served):
    answer = served.post("/v1/completions", prompt="", max_tokens=4, temperature=0, logprobs=0, echo=True)["choices"][0]
    assert answer["logprobs"]["bardling"]["ids"][0] == 256
    assert "endoftext" not in answer["text"]


def test_the_token_that_ends_a_text_has_a_log_probability(served, scores):
    """lm-eval takes the last entry for the generated token, and those before it for the prompt's."""
    ends = {"logit_bias": {"256": 100}, "logprobs": 1}
    (choice,) = served.post("/v1/completions", prompt="The king", max_tokens=1, echo=True, **ends)["choices"]
    found = choice["logprobs"]
    assert (choice["text"], choice["finish_reason"]) == ("The king", "stop")
    assert found["bardling"]["ids"] == [*b"The king", 256]
    assert found["text_offset"] == list(range(9))
    expected = scores(list(b"The king"))
    assert found["token_logprobs"][-2:] == pytest.approx([float(expected[6, ord("g")]), float(expected[7, 256])], abs=2e-4)
    (choice,) = served.post("/v1/completions", prompt="The king", max_tokens=4, **ends)["choices"]
    assert (choice["text"], choice["logprobs"]["bardling"]["ids"]) == ("", [256])
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4, "logit_bias": {"256": 100}, "logprobs": True}
    assert served.post("/v1/chat/completions", **chat)["choices"][0]["logprobs"]["content"] == []


def test_a_full_context(served):
    room = CONFIG.block_size - 100
    request = {"prompt": "x" * 100, "logit_bias": {"256": -100}}
    assert served.post("/v1/completions", max_tokens=room, **request)["choices"][0]["finish_reason"] == "length"
    error = served.post("/v1/completions", status=400, max_tokens=room + 1, **request)["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"


def test_tokens_and_text(served):
    answer = served.post("/tokenize", prompt="a€")
    assert answer == {
        "tokens": [97, 226, 130, 172],
        "texts": ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"],
        "count": 4,
        "context": CONFIG.block_size,
    }
    assert served.post("/detokenize", tokens=answer["tokens"])["prompt"] == "a€"
    assert served.post("/tokenize", prompt="")["tokens"] == [256]
    assert served.post("/tokenize", prompt="", add_special_tokens=False)["tokens"] == []
    assert served.post("/detokenize", status=400, tokens=[300])["error"]["param"] == "tokens"


def test_what_is_not_supported_is_refused_by_name(served):
    wrong = {
        "suffix": "end",
        "presence_penalty": 0.5,
        "tempreature": 1,
        "logprobs": 21,
        "n": 0,
        "max_tokens": 0,
        "stop": [""],
        "logit_bias": {"257": 1},
        "top_p": 0,
    }
    for name, value in wrong.items():
        error = served.post("/v1/completions", status=400, prompt="a", **{name: value})["error"]
        assert error["param"] == name, name
        assert name in error["message"]
        assert error["type"] == "invalid_request_error"
    neutral = {"suffix": None, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me", "best_of": 1}
    served.post("/v1/completions", prompt="a", max_tokens=1, **neutral)
    error = served.post("/v1/completions", status=400, prompt="a", n=2, best_of=3, stream=True)["error"]
    assert error["param"] == "best_of"


def test_a_model_that_fails_answers_and_is_loaded_again(tmp_path, monkeypatch):
    from bardling.generation.engine import Engine

    step, failures = Engine.step, [RuntimeError("a bug")]

    def fail_once(self):
        if failures:
            raise failures.pop()
        return step(self)

    monkeypatch.setattr(Engine, "step", fail_once)
    with running_server(write_folder(tmp_path / "other")) as served:
        error = served.post("/v1/completions", status=500, prompt="a", max_tokens=1)["error"]
        assert error["code"] == "model_failed"
        assert "a bug" not in error["message"]
        assert served.post("/v1/completions", prompt="a", max_tokens=1)["usage"]["completion_tokens"] == 1
        assert served.metric("model_loads_total") == 2
