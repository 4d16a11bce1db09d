"""What the tests of the server share: a server in a thread of the test process, and models with random weights."""

import contextlib
import dataclasses
import json
import threading
from pathlib import Path

import httpx

from bardling.checkpoint.contents import write_model
from bardling.config import ModelConfig
from bardling.data.tokens.tokenizer import build_tokenizer
from bardling.model.gpt import GPT
from bardling.serve.server import Running, serve
from bardling.serve.settings import Settings

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=128, vocab_size=257, init_std=0.2)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclasses.dataclass
class Served:
    """A running server, and a client for it."""

    running: Running
    http: httpx.Client
    notes: list[str]

    @property
    def url(self) -> str:
        return self.running.url

    def post(self, path: str, status: int = 200, **body) -> dict:
        answer = self.http.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def metric(self, name: str) -> float:
        """The sum of a metric's values over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == f"bardling_{name}")

    def completions(self) -> float:
        """Completions that run or wait."""
        return self.metric("completions_running") + self.metric("completions_waiting")


@contextlib.contextmanager
def running_server(*specs, key="", **settings):
    """Serve `specs` in a thread."""
    settings = Settings(**{"port": 0, "device": "cpu", "weights": "float32", "api_key": key, **settings})
    started, notes, failed = threading.Event(), [], []
    found: list[Running] = []

    def ready(running: Running) -> None:
        found.append(running)
        started.set()

    def run() -> None:
        try:
            serve([str(spec) for spec in specs], settings, ready=ready, note=notes.append)
        except BaseException as error:
            failed.append(error)
            if found:
                raise
        finally:
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    if not found:
        thread.join()
        raise failed[0]
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=found[0].url, headers=headers, timeout=60) as http:
            yield Served(found[0], http, notes)
    finally:
        with contextlib.suppress(RuntimeError):  # it has stopped
            found[0].stop()
        thread.join()


def write_folder(folder: Path, config: ModelConfig = CONFIG, seed: int = 0, template: str = "") -> Path:
    """A model folder with random weights and a tokenizer of bytes."""
    folder.mkdir(parents=True)
    write_model(folder, config, GPT(config, seed=seed).state_dict(), build_tokenizer("byte", []))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def sse(text: str) -> list[dict]:
    """The JSON values of a stream."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
