"""/v1/chat/completions, through OpenAI's own client."""

import openai
import pytest
from serve_help import running_server, write_folder

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
PROMPT = "<system>Be brief.\n<user>hello\n<assistant>"


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_continues_the_rendered_template(client, served):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, temperature=0)
    same = served.post("/v1/completions", prompt=PROMPT, max_tokens=20, temperature=0)
    assert answer.choices[0].message.content == same["choices"][0]["text"]
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(PROMPT)
    parts = [{"type": "text", "text": "hello"}]
    again = client.chat.completions.create(
        model="tiny", messages=[MESSAGES[0], {"role": "user", "content": parts}], max_completion_tokens=20, temperature=0
    )
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_streams_and_logprobs(client, scores):
    request = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**request).choices[0]
    parts = [part.choices[0] for part in client.chat.completions.create(**request, stream=True)]
    assert parts[0].delta.role == "assistant"
    assert "".join(part.delta.content for part in parts) == whole.message.content
    assert parts[-1].finish_reason == whole.finish_reason
    listed = [item for part in parts for item in part.logprobs.content]
    assert listed == whole.logprobs.content
    generated = [item.id for item in listed]
    expected = scores([*PROMPT.encode(), *generated])
    for place, item in enumerate(listed, len(PROMPT) - 1):
        assert item.logprob == pytest.approx(float(expected[place, item.id]), abs=2e-4)
        assert [top.id for top in item.top_logprobs] == expected[place].topk(2).indices.tolist()


def test_n_stop_and_seed(client):
    request = {"model": "tiny", "messages": MESSAGES, "max_tokens": 10, "seed": 4, "logit_bias": {"256": -100}}
    texts = [choice.message.content for choice in client.chat.completions.create(**request, n=2).choices]
    assert texts[0] != texts[1]
    assert [choice.message.content for choice in client.chat.completions.create(**request, n=2).choices] == texts
    stopped = client.chat.completions.create(**request, stop=texts[0][3:5]).choices[0]
    assert stopped.message.content == texts[0][: texts[0].index(texts[0][3:5])]
    assert stopped.finish_reason == "stop"


def test_by_default_a_chat_fills_the_context(served):
    answer = served.post("/v1/chat/completions", messages=MESSAGES, logit_bias={"256": -100})
    assert answer["usage"]["total_tokens"] == 128


@pytest.mark.parametrize(
    "messages",
    [None, [], "hello", [{"role": "user"}], [{"role": "king", "content": "x"}], [{"role": "user", "content": 5}], [7]],
)
def test_malformed_messages(served, messages):
    assert served.post("/v1/chat/completions", status=400, messages=messages)["error"]["param"] == "messages"


def test_a_model_without_a_template_has_no_chat(tmp_path):
    with running_server(write_folder(tmp_path / "base")) as served:
        error = served.post("/v1/chat/completions", status=400, messages=MESSAGES)["error"]
        assert error["code"] == "no_chat_template"
        assert served.http.get("/v1/models").json()["data"][0]["bardling"]["chat"] is False
