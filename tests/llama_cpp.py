"""llama.cpp on a GGUF file, in this process: its tokens of a text, what it generates, and its probabilities."""

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

xllamacpp = pytest.importorskip("xllamacpp")


class LlamaCpp:
    """A server for one file, which ends with the object."""

    def __init__(self, path: Path, context: int = 96) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(params)

    def post(self, route: str, **values):
        data = json.dumps(values).encode()
        request = urllib.request.Request(self._server.listening_address + route, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read()) from None

    def tokens(self, text: str, special: bool = False) -> list[int]:
        return self.post("/tokenize", content=text, add_special=special, parse_special=False)["tokens"]

    def greedy(self, prompt: str | list[int], count: int) -> list[int]:
        options = {"n_predict": count, "temperature": 0, "top_k": 1, "return_tokens": True, "cache_prompt": False}
        return self.post("/completion", prompt=prompt, **options)["tokens"]

    def text(self, ids: list[int]) -> str:
        return self.post("/detokenize", tokens=ids)["content"]

    def template(self, messages) -> str:
        return self.post("/apply-template", messages=messages)["prompt"]

    def losses(self, ids: list[int], vocabulary: int) -> list[float]:
        """The loss of each token after the first (nats), given those before it."""
        result = []
        for end in range(1, len(ids)):
            # The bias chooses the token, so that none ends the text; the probabilities listed are those before it.
            options = {"n_predict": 1, "n_probs": vocabulary, "logit_bias": [[ids[end], 1000.0]]}
            listed = self.post("/completion", prompt=ids[:end], **options)["completion_probabilities"][0]["top_logprobs"]
            result.append(-next(entry["logprob"] for entry in listed if entry["id"] == ids[end]))
        return result
