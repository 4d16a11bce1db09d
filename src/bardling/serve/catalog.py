"""The models that a server offers, and what is known about them without loading their weights.

A model is named by the last part of its path: `runs/first` is `first`. Every checkpoint of a run is a model of its own,
`first@step-000400`; the run's name means its latest valid checkpoint, or the best. Folders are read again for each request,
because checkpoints come and go while a run trains.

Limits: the functions read files, so they run outside the event loop.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bardling.checkpoint.load import base_of, find_checkpoint, run_of
from bardling.checkpoint.run_folder import RunFolder
from bardling.config import ModelConfig
from bardling.data.tokens.bpe_files import has_tokenizer
from bardling.data.tokens.tokenizer import Tokenizer, load_tokenizer
from bardling.errors import UserError, closest
from bardling.files.reading import read_json_object
from bardling.interop.huggingface import model_config_from_hf
from bardling.interop.peft import is_adapter
from bardling.interop.pretrained import fetch_model, is_hub_name
from bardling.monitor.jsonl import metrics, read_jsonl
from bardling.planning.costs import parameters
from bardling.serve.errors import ApiError
from bardling.serve.requests import MAX_LOGPROBS

_MOST_METRICS = 256 << 20  # bytes of a metrics file that is read


@dataclass(frozen=True)
class Model:
    """A name that a request may use."""

    id: str
    path: Path  # what `load` opens
    source: "Source"
    step: int | None = None


class Source:
    """A model as given on the command line: a run with all its checkpoints, or one set of weights.

    Attributes:
        run: the run whose checkpoints are models; None for other models.
        config, tokenizer: None for files that must be loaded to know.
    """

    def __init__(self, spec: str, name: str, best: bool) -> None:
        self.spec, self.name, self._best = spec, name, best
        path = Path(spec)
        hub, file = is_hub_name(spec), path if path.is_file() else path / "ckpt.pt"
        self.run = RunFolder(path) if not hub and (path / "config.toml").is_file() else None
        self._home = run_of(spec)  # also of a single checkpoint
        if hub:
            self._current = fetch_model(spec)
        elif self.run is None and file.is_file():
            self._current = file
        else:
            self._current = find_checkpoint(path, best=best and self.run is not None)
        self._steps = None if self.run is None else self.run.store().steps()
        self._validated: tuple[object, Mapping[int, Mapping[str, Any]]] = (None, {})
        self.config: ModelConfig | None = None
        self.tokenizer: Tokenizer | None = None
        if self._current.is_dir():
            described = (Path(base_of(self._current)) if is_adapter(self._current) else self._current) / "config.json"
            if described.is_file():  # the base model of an adapter may be elsewhere
                self.config = model_config_from_hf(read_json_object(described), str(described))
            self.tokenizer = load_tokenizer(self._current) if has_tokenizer(self._current) else None

    def models(self) -> list[Model]:
        """The model of this name, and those of the run's checkpoints, latest first."""
        if self.run is None:
            return [Model(self.name, self._current, self, _step(self._current))]
        store = self.run.store()
        steps = store.steps()
        if steps != self._steps:  # finding the run's checkpoint reads all of it, so only a change leads to that
            with contextlib.suppress(UserError):  # without a valid one, the previous one may still be loaded
                self._current = find_checkpoint(self.run.path, best=self._best)
            self._steps = steps
        found = [Model(self.name, self._current, self, _step(self._current))]
        folders = [(step, store.path(step)) for step in reversed(steps)]
        return found + [Model(f"{self.name}@{folder.name}", folder, self, step) for step, folder in folders]

    def facts(self, model: Model) -> dict[str, Any]:
        """What is known of one of these models, for its entry in the list."""
        config, tokenizer = self.config, self.tokenizer
        validated = self._validation().get(-1 if model.step is None else model.step, {})
        return {
            "run": None if self._home is None else self._home.path.absolute().name,
            "step": model.step,
            "best": self._home is not None and model.step is not None and model.step == self._best_step(),
            "validation_loss": validated.get("loss"),
            "bits_per_byte": validated.get("bits_per_byte"),
            "context": None if config is None else config.block_size,
            "vocab_size": None if config is None else config.vocab_size,
            "parameters": None if config is None else parameters(config),
            "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
            "chat": tokenizer is not None and tokenizer.interface.chat_template is not None,
            "document_start": self._document_start(),
            "max_logprobs": MAX_LOGPROBS,
        }

    def _best_step(self) -> int | None:
        store = self._home.store() if self._home is not None else None
        return next((step for step in reversed(store.steps()) if store.is_best(store.path(step))), None) if store else None

    def _validation(self) -> Mapping[int, Mapping[str, Any]]:
        """Validation metrics of the run by step, read again when the file has changed."""
        if self._home is None:
            return {}
        file = self._home.metrics_file
        with contextlib.suppress(OSError, UserError):  # a run may have no metrics, or damaged ones
            status = file.stat()
            version = status.st_mtime_ns, status.st_size
            if version != self._validated[0] and status.st_size <= _MOST_METRICS:
                self._validated = version, {record["step"]: record for record in metrics(read_jsonl(file), "val")}
        return self._validated[1]

    def _document_start(self) -> list[int]:
        """What a text begins with, if the model has seen that: a model of a single document has not."""
        about = None if self.tokenizer is None else self.tokenizer.interface
        if about is None or about.start or about.first is None:
            return [] if about is None else list(about.start)
        single = False
        with contextlib.suppress(UserError):
            single = self._home is not None and self._home.dataset_record().get("train_documents") == 1
        return [] if single else [about.first]


class Catalog:
    """All models of a server, in the order in which they were given."""

    def __init__(self, specs: Sequence[str], *, best: bool) -> None:
        names = [_name(spec) for spec in specs]
        clear = len(set(names)) == len(names)
        self.sources = [Source(spec, name if clear else spec, best) for spec, name in zip(specs, names, strict=True)]

    def models(self) -> list[Model]:
        return [model for source in self.sources for model in source.models()]

    def find(self, name: str | None) -> Model:
        """The model of a name, a path as given, or a path with a step; None: the first. An `ApiError` if there is none."""
        models = self.models()
        for model in models:
            spec = model.source.spec + model.id.removeprefix(model.source.name)
            if name in (None, model.id, spec):
                return model
        hint = closest((name or "")[:100], [model.id for model in models[:100]])
        message = f"unknown model {(name or '')[:200]!r}{hint}; GET /v1/models lists them"
        raise ApiError(404, message, param="model", code="model_not_found")

    def describe(self, model: Model, *, loaded: bool) -> dict[str, Any]:
        """The entry of a model in /v1/models."""
        created = 0
        with contextlib.suppress(OSError):
            created = int(model.path.stat().st_mtime)
        facts = {**model.source.facts(model), "loaded": loaded}
        return {"id": model.id, "object": "model", "created": created, "owned_by": "bardling", "bardling": facts}


def _name(spec: str) -> str:
    """`first` for runs/first, `first@step-000400` for its checkpoint's folder; names on the hub and files stay."""
    path = Path(spec)
    if is_hub_name(spec) or path.is_file():
        return spec
    full = path.absolute()
    return f"{full.parents[1].name}@{full.name}" if full.parent.name == "checkpoints" else full.name


def _step(path: Path) -> int | None:
    """The step of a checkpoint's folder."""
    match = re.fullmatch(r"step-(\d{1,18})", path.name)
    return int(match[1]) if match else None
