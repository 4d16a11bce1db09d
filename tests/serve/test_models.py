"""Runs and their checkpoints as models: names, what the list says, loading within a memory limit."""

import dataclasses
import shutil

import pytest
from serve_help import CONFIG, running_server, write_folder

from bardling.checkpoint.export import export_nanogpt
from bardling.data.tokens.tokenizer import load_tokenizer
from bardling.errors import UserError


def test_every_checkpoint_is_a_model(run):
    with running_server(run) as served:
        listed = served.http.get("/v1/models").json()["data"]
        assert [each["id"] for each in listed] == ["first", "first@step-000030", "first@step-000020", "first@step-000010"]
        facts = [each["bardling"] for each in listed]
        assert [each["step"] for each in facts] == [30, 30, 20, 10]
        assert all(each["run"] == "first" and each["context"] == 64 and each["vocab_size"] == 257 for each in facts)
        losses = [each["validation_loss"] for each in facts[1:]]
        assert all(loss > 0 for loss in losses)
        assert sum(each["best"] for each in facts[1:]) == 1
        assert facts[1 + losses.index(min(losses))]["best"]
        assert listed[0]["created"] > 1_700_000_000
        assert [each["loaded"] for each in facts] == [True, True, False, False]

        def loss(model):
            answer = served.post("/v1/completions", model=model, prompt="The king", max_tokens=0, echo=True, logprobs=0)
            assert answer["model"] in (model, "first", "first@step-000030")
            return answer["choices"][0]["logprobs"]["token_logprobs"][1:]

        assert loss("first") == loss("first@step-000030") == loss(str(run)) == loss(f"{run}@step-000030")
        for step in (10, 20):
            assert loss(f"first@step-0000{step}") != loss("first")
        assert served.metric("models_loaded") == 3
        assert served.http.get("/v1/models/first@step-000020").json()["bardling"]["loaded"] is True
        error = served.post("/v1/completions", status=404, model="first@step-5", prompt="a")["error"]
        assert error["code"] == "model_not_found"


def test_a_damaged_checkpoint_is_refused_and_others_work(run, tmp_path):
    shutil.copytree(run, tmp_path / "first")
    with running_server(tmp_path / "first") as served:
        file = tmp_path / "first" / "checkpoints" / "step-000020" / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-50] ^= 1
        file.write_bytes(data)
        error = served.post("/v1/completions", status=500, model="first@step-000020", prompt="a")["error"]
        assert error["code"] == "model_unavailable"
        assert "Traceback" not in error["message"]
        served.post("/v1/completions", model="first@step-000010", prompt="a")
        shutil.rmtree(file.parent)
        assert len(served.http.get("/v1/models").json()["data"]) == 3
        served.post("/v1/completions", status=404, model="first@step-000020", prompt="a")


def test_a_run_means_its_latest_or_its_best_checkpoint(run, tmp_path):
    shutil.copytree(run, tmp_path / "first")
    with running_server(tmp_path / "first") as served:
        shutil.rmtree(tmp_path / "first" / "checkpoints" / "step-000030")
        assert served.http.get("/v1/models/first").json()["bardling"]["step"] == 20
        served.post("/v1/completions", model="first", prompt="a")
    (tmp_path / "first" / "checkpoints" / "step-000020" / "manifest.json").unlink()
    with running_server(tmp_path / "first", best=True) as served:
        assert served.http.get("/v1/models/first").json()["bardling"]["step"] == 10


def test_idle_models_make_room(tmp_path):
    folders = [write_folder(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two", "three"))]
    with running_server(folders[0], slots=2) as served:
        size = int(served.metric("models_bytes"))
    with running_server(*folders, slots=2, memory_gb=2 * size / 1e9 + 1e-9) as served:

        def loaded():
            return [each["id"] for each in served.http.get("/v1/models").json()["data"] if each["bardling"]["loaded"]]

        def use(name):
            return served.post("/v1/completions", model=name, prompt="a", max_tokens=4, temperature=0)["choices"][0]["text"]

        assert loaded() == ["one"]
        texts = {name: use(name) for name in ("one", "two")}
        assert loaded() == ["one", "two"]
        use("one")
        use("three")
        assert loaded() == ["one", "three"]  # two was used least recently
        assert use("two") == texts["two"]
        assert loaded() == ["two", "three"]
        assert served.metric("models_bytes") == 2 * size


def test_models_in_use_stay(tmp_path):
    config = dataclasses.replace(CONFIG, block_size=4_096)
    folders = [write_folder(tmp_path / name, config) for name in ("one", "two")]
    with running_server(folders[0]) as served:
        size = int(served.metric("models_bytes"))
    with running_server(*folders, memory_gb=size / 1e9 + 1e-9) as served:
        body = {"model": "one", "prompt": "a", "max_tokens": 4_000, "stream": True, "logit_bias": {"256": -100}}
        with served.http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            answer = served.http.post("/v1/completions", json={"model": "two", "prompt": "a"})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "out_of_memory"
        assert "retry-after" in answer.headers
        while served.completions():
            pass
        served.post("/v1/completions", model="two", prompt="a")


def test_a_model_that_never_fits(tmp_path):
    folder = write_folder(tmp_path / "one")
    with pytest.raises(UserError, match="raise --memory_gb"), running_server(folder, memory_gb=1e-5):
        pass


def test_equal_names_are_told_apart(tmp_path):
    folders = [write_folder(tmp_path / name / "same", seed=seed) for seed, name in enumerate(("a", "b"))]
    with running_server(*folders) as served:
        assert [each["id"] for each in served.http.get("/v1/models").json()["data"]] == [str(folder) for folder in folders]
        texts = {served.post("/v1/completions", model=str(f), prompt="a", temperature=0)["choices"][0]["text"] for f in folders}
        assert len(texts) == 2


def test_a_checkpoint_of_nanogpt(run, tmp_path):
    export_nanogpt(str(run), tmp_path / "out")
    load_tokenizer(run).save(tmp_path / "out")
    path = tmp_path / "out" / "ckpt.pt"
    with running_server(path) as served:
        (entry,) = served.http.get("/v1/models").json()["data"]
        assert entry["id"] == str(path)
        assert entry["bardling"]["context"] == 64
        served.post("/v1/completions", model=str(path), prompt="a")


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_smaller_weights(folder, weights):
    with running_server(folder) as served:
        size = served.metric("models_bytes")
    with running_server(folder, weights=weights) as served:
        assert served.metric("models_bytes") < size
        assert served.post("/v1/completions", prompt="a", max_tokens=4)["usage"]["completion_tokens"] > 0
