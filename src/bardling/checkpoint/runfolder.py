"""A run is a folder: where everything of a run lies, and how it is opened again.

config.toml        the resolved configuration, itself a recipe
environment.json   each start of the run: versions, device, choices
dataset.json       which dataset it trains on, with its fingerprint
tokenizer.json     and tokenizer_config.json
metrics.jsonl      a line a figure
samples.jsonl      a line a set of samples
checkpoints/       step-000500/ ...
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bardling.checkpoint.store import CheckpointStore
from bardling.config import CheckpointConfig, RunConfig
from bardling.configfile import config_to_toml, parse_recipe, read_text_file
from bardling.errors import UserError
from bardling.files import remove_unfinished, write_whole

_REMAINS = ("dataset.json", "environment.json", "tokenizer.json", "tokenizer_config.json")
"""Files that a start writes before the folder is a run, in this order."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def environment_file(self) -> Path:
        return self.path / "environment.json"

    @property
    def dataset_file(self) -> Path:
        return self.path / "dataset.json"

    @property
    def lock_file(self) -> Path:
        """Held by the process that trains the run."""
        return self.path / ".lock"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def store(self, config: CheckpointConfig | None = None) -> CheckpointStore:
        """The run's checkpoints; what is kept matters only to who saves."""
        config = config or CheckpointConfig(keep_last=1)
        return CheckpointStore(self.checkpoints, config.keep_last, keep_best=config.keep_best, keep_every=config.keep_every)

    def config(self) -> RunConfig:
        """The resolved configuration."""
        return parse_recipe(read_text_file(self.config_file), str(self.config_file))

    def write_config(self, config: RunConfig) -> None:
        """Write (or replace) the configuration."""
        write_whole(self.config_file, config_to_toml(config).encode())

    def dataset_record(self) -> dict[str, Any]:
        """The facts of the dataset that the run trains on."""
        return read_json(self.dataset_file)

    def add_environment(self, facts: dict[str, Any]) -> None:
        """Add the facts of one more start of the run."""
        starts = read_json(self.environment_file).get("starts", []) if self.environment_file.exists() else []
        if not isinstance(starts, list):
            raise UserError(f"{self.environment_file}: starts = {str(starts)[:80]!r} must be a list: remove the file")
        write_whole(self.environment_file, (json.dumps({"starts": [*starts, facts]}, indent=2) + "\n").encode())


def open_run(path: Path) -> RunFolder:
    """Open an existing run.

    Raises:
        UserError: `path` is no run folder.
    """
    run = RunFolder(path)
    if not run.config_file.is_file():
        if not path.exists():
            near = sorted(str(other.parent) for other in path.parent.glob("*/config.toml"))[-3:] if path.parent.is_dir() else []
            raise UserError(f"{path}: no such run{'; there are ' + ', '.join(near) if near else ''}")
        raise UserError(f"{path}: is no run folder (it has no config.toml); a run is made by `bardling train`")
    return run


def refuse_existing(path: Path) -> None:
    """Fail early, before any work, when a new run's folder is taken.

    Raises:
        UserError: there is a run already.
    """
    if RunFolder(path).config_file.exists():
        raise UserError(f"{path}: a run is there already: go on with `bardling resume {path}`, or choose another --out")


def create_run(path: Path, config: RunConfig, *, beside: bool = False, also: Callable[[], None] = lambda: None) -> RunFolder:
    """Make the folder of a new run. What a start that was killed here has left is no obstacle to the next one, and removed.

    Args:
        beside: the folder may hold other files: a run that goes on from another trainer's checkpoint may live beside it.
        also: writes what else belongs to the run. The configuration comes last: it is what makes the folder a run.

    Raises:
        UserError: there is something already.
    """
    run = RunFolder(path)
    refuse_existing(path)
    if path.exists() and (not path.is_dir() or not (beside or all(_is_remains(entry) for entry in path.iterdir()))):
        raise UserError(f"{path}: is in the way (not an empty folder): choose another --out")
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path)
    for name in () if beside else reversed(_REMAINS):  # the first one marks the others as ours until they are gone
        (path / name).unlink(missing_ok=True)
    also()
    run.write_config(config)
    return run


def _is_remains(entry: Path) -> bool:
    """Whether a start that was killed before the folder became a run may have left this."""
    if entry.name == "checkpoints":
        return entry.is_dir() and not any(entry.iterdir())
    if entry.name in _REMAINS:  # a tokenizer by itself is somebody's own
        return (entry.parent / _REMAINS[0]).is_file()
    return entry.name == ".lock" or entry.name.startswith(tuple(f".{name}." for name in ("config.toml", *_REMAINS)))


def read_json(path: Path) -> dict[str, Any]:
    """Read a small JSON object, with errors that name the file."""
    text = read_text_file(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also for numbers of thousands of digits
        raise UserError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object")
    return value
