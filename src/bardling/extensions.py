"""Components that a recipe selects by name, and how to add your own.

Each table below maps names to implementations ("module:attribute"), which are imported on first use. To add a built-in
component, write its file and add its line here. A separate package adds one with an entry point in the table's group
(`[project.entry-points."bardling.optimizers"]`), and a script with `OPTIMIZERS.register("name", component)`.
"""

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from bardling.errors import UserError, closest


class Extensions:
    """Components of one kind by name.

    Args:
        kind: the kind, for messages; the entry point group is `bardling.<kind>s`.
        built_in: name -> "module:attribute".
    """

    def __init__(self, kind: str, built_in: Mapping[str, str]) -> None:
        self.kind, self.group = kind, f"bardling.{kind.replace(' ', '_')}s"
        self._built_in = dict(built_in)
        self._registered: dict[str, Any] = {}

    def register(self, name: str, component: Any) -> None:
        """Add a component in this process; a `ValueError` if the name is already in use."""
        if name in self:
            raise ValueError(f"there is already a {self.kind} named {name!r}")
        self._registered[name] = component

    def names(self) -> list[str]:
        return [*self._built_in, *self._registered, *sorted(point.name for point in entry_points(group=self.group))]

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self._registered or bool(entry_points(group=self.group, name=str(name)))

    def check(self, key: str, name: str) -> None:
        if name not in self:
            names = self.names()
            advice = (
                f"choose one of {', '.join(names)}{closest(name, names)}"
                if names
                else "no package that brings one is installed"
            )
            raise UserError(f"{key} = {name!r}: unknown {self.kind}; {advice}")

    def get(self, key: str, name: str) -> Any:
        """The component `name`; a `UserError` that names `key` if there is none, or its package cannot be imported."""
        self.check(key, name)
        if name in self._registered:
            return self._registered[name]
        if name in self._built_in:
            module, attribute = self._built_in[name].split(":")
            return getattr(importlib.import_module(module), attribute)
        (point, *_) = entry_points(group=self.group, name=name)
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            raise UserError(f"{key} = {name!r}: {point.value} cannot be loaded ({error}): reinstall its package") from error


SOURCES = Extensions("source", {})
"""(rest of the spec after "NAME:") -> `data.text.sources.Source`; file formats, folders and the Hugging Face Hub are built
in."""

TOKENIZERS = Extensions("tokenizer", {})
"""(texts) -> `data.tokens.tokenizer.Tokenizer`, in addition to 'byte', 'char', 'bpe:SIZE', 'gpt2' and paths."""

ACTIVATIONS = Extensions(
    "activation",
    {
        "gelu": "torch.nn.functional:gelu",
        "swiglu": "bardling.model.kernels.elementwise:swiglu",
        "relu2": "bardling.model.kernels.elementwise:squared_relu",
    },
)
"""Elementwise function between the MLP's layers, [..., mlp_hidden] -> the same shape; SwiGLU halves the last dimension."""

OPTIMIZERS = Extensions("optimizer", {"adamw": "bardling.optim.build:build_adamw", "muon": "bardling.optim.build:build_muon"})
"""(named parameters, `OptimConfig`, `optim.build.OptimizerOptions`) -> `torch.optim.Optimizer`."""

OBJECTIVES = Extensions("objective", {"next_token": "bardling.training.objective:next_token"})
"""(tokenizer or None, device) -> `training.objective.Objective`."""

HOOKS = Extensions("hook", {})
"""(`training.hooks.base.HookContext`) -> a hook, called after the built-in hooks that log, validate and sample."""

SINKS = Extensions("sink", {})
"""(`monitor.RunInfo`) -> `monitor.Sink`, besides the services that settings of their own enable."""

EXPORT_FORMATS = Extensions(
    "export format",
    {
        "hf": "bardling.checkpoint.export:HF",
        "peft": "bardling.checkpoint.export:PEFT",
        "gguf": "bardling.checkpoint.export:GGUF",
        "onnx": "bardling.checkpoint.export:ONNX",
        "nanogpt": "bardling.checkpoint.export:NANOGPT",
    },
)
"""`checkpoint.export.ExportFormat`: how to write a model, and how to use the result."""

TASKS = Extensions("task", {"lm-eval": "bardling.evaluate.harness_tasks:LM_EVAL", "core": "bardling.evaluate.core:CORE"})
"""`evaluate.benchmarks.TaskKind`: how to open the tasks that `--tasks` and `eval.tasks` name as KIND:REST."""
