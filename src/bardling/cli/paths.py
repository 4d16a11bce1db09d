"""Options that are paths: `~` is the home directory, and built-in names take precedence over files of the same name."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from bardling.config import RunConfig
from bardling.errors import UserError
from bardling.files.atomic import check_place
from bardling.files.paths import expand_home

T = TypeVar("T")

_SPECS = ("model", "models", "data", "source", "tokenizer", "tasks")
"""Options of type text that may be paths; those of a `RunConfig` are expanded there."""


def expand_paths(options: T) -> T:
    """The dataclass `options` with a leading `~` replaced in every path."""
    changed = {
        item.name: _expanded(getattr(options, item.name), item.name)
        for item in dataclasses.fields(options)  # type: ignore[arg-type]
    }
    return dataclasses.replace(options, **changed)  # type: ignore[type-var]


def _expanded(value: Any, name: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_expanded(item, name) for item in value)
    if isinstance(value, Path):
        return Path(expand_home(str(value)))
    return expand_home(value) if isinstance(value, str) and name in _SPECS else value


def shadow_notes(options: object) -> Iterator[str]:
    """A line for each built-in name in the options or their `config` that a file or folder here also has."""
    config = getattr(options, "config", None)
    specs = [("dataset", getattr(options, name, None)) for name in ("data", "source")]
    specs += [("tokenizer", getattr(options, "tokenizer", None)), ("model", getattr(options, "model", None))]
    specs += [("model", model) for model in getattr(options, "models", ())]
    if isinstance(config, RunConfig):
        specs += [
            ("dataset", config.data.source),
            ("dataset", config.data.val_source),
            ("tokenizer", config.data.tokenizer),
            ("model", config.model.init),
        ]
        specs += [("dataset", source) for source in (config.data.val_source, *(each.source for each in config.data.sources))]
    for kind, spec in specs:
        if isinstance(spec, str) and os.path.lexists(spec) and spec in _names(kind):
            what = "folder" if Path(spec).is_dir() else "file"
            yield f"{spec!r} is the built-in {kind}, not the {what} of this name: write ./{spec} to use the {what}"


def _names(kind: str) -> tuple[str, ...]:
    if kind == "dataset":
        from bardling.data.text.named_datasets import NAMES

        return NAMES
    if kind == "tokenizer":
        from bardling.data.tokens.tokenizer import NAMES as TOKENIZER_NAMES

        return TOKENIZER_NAMES
    from bardling.interop.pretrained import GPT2_NAMES

    return tuple(GPT2_NAMES)


def refuse_existing_file(path: Path | None) -> None:
    """Raise a `UserError` if a file cannot be created, before anything slow."""
    if path is None:
        return
    check_place(path)
    if path.exists():
        raise UserError(f"{path}: already exists: remove it, or choose another file")
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist: create it, or choose another file")
