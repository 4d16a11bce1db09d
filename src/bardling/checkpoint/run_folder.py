"""The run folder: its layout, creating one, opening it again, and its lock.

config.toml        the resolved configuration, itself a recipe
environment.json   every start of the run: versions, device, choices; whether the run has ever saved a checkpoint
dataset.json       the dataset it trains on, with its fingerprint
tokenizer.json     and tokenizer_config.json
metrics.jsonl      one record per line
samples.jsonl      one set of samples per line
checkpoints/       step-000500/ ...
base/              of a run with LoRA: the model that its adapters change, as a folder of `transformers`
"""

import contextlib
import glob
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bardling.checkpoint.store import CheckpointStore
from bardling.config import CheckpointConfig, RunConfig
from bardling.config.recipes import config_from_dict, parse_recipe
from bardling.distributed.context import Context
from bardling.errors import UserError
from bardling.files.atomic import check_place, remove_partial_files, write_atomically
from bardling.files.lock import locked
from bardling.files.paths import shell_path, similar
from bardling.files.reading import read_json_object, read_small_text

LOCK_TIMEOUT = 5.0  # seconds; a job that was just killed may take a moment to disappear
_LEFTOVERS = ("dataset.json", "environment.json", "tokenizer.json", "tokenizer_config.json")
"""Files written before config.toml makes the folder a run, in this order."""


class RunFolder:
    """The paths of one run, and access to its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.environment_file = path / "environment.json"
        self.dataset_file = path / "dataset.json"
        self.metrics_file = path / "metrics.jsonl"
        self.samples_file = path / "samples.jsonl"
        self.checkpoints = path / "checkpoints"
        self.base = path / "base"
        self.lock_file = path / ".lock"  # held by the process that trains the run

    def store(self, config: CheckpointConfig | None = None) -> CheckpointStore:
        """The run's checkpoints; `config` decides which ones saving keeps."""
        config = config or CheckpointConfig(keep_last=1)
        return CheckpointStore(self.checkpoints, config.keep_last, keep_best=config.keep_best, keep_every=config.keep_every)

    def config(self) -> RunConfig:
        return parse_recipe(read_small_text(self.config_file), str(self.config_file))

    def trained_config(self, step: int | None = None) -> RunConfig:
        """The configuration in the checkpoint of `step` (None: the latest), which nobody edits; without one, config.toml's."""
        store = self.store()
        for number in reversed(store.steps()) if step is None else [step]:
            path = store.path(number) / "run_config.json"
            with contextlib.suppress(UserError):  # of a damaged checkpoint
                return config_from_dict(RunConfig, read_json_object(path), str(path))
        return self.config()

    def write_config(self, recipe: str) -> None:
        """Write or replace the configuration, given as TOML."""
        write_atomically(self.config_file, recipe.encode())

    def dataset_record(self) -> dict[str, Any]:
        return read_json_object(self.dataset_file)

    def add_environment(self, facts: dict[str, Any]) -> None:
        """Append the facts of one more start of the run."""
        self._update_environment(starts=[*self.starts(), facts])

    def starts(self) -> list[Any]:
        """The facts of every start of the run."""
        starts = self._environment().get("starts", [])
        if not isinstance(starts, list):
            raise UserError(f"{self.environment_file}: starts = {str(starts)[:80]!r} must be a list: remove the file")
        return starts

    def has_saved(self) -> bool:
        """Whether the run has ever saved a checkpoint. If it has none now, they are lost."""
        return self._environment().get("saved") is True

    def record_saved(self) -> None:
        if not self.has_saved():
            self._update_environment(saved=True)

    def _environment(self) -> dict[str, Any]:
        return read_json_object(self.environment_file) if self.environment_file.exists() else {}

    def _update_environment(self, **values: Any) -> None:
        content = json.dumps({**self._environment(), **values}, indent=2) + "\n"
        write_atomically(self.environment_file, content.encode())


def open_run(path: Path) -> RunFolder:
    """Open an existing run; raises a `UserError` if `path` is not a run folder."""
    run = RunFolder(path)
    if run.config_file.is_file():
        return run
    if path.exists():
        raise UserError(f"{path}: is not a run folder (it has no config.toml); create a run with `bardling train`")
    found = list(path.parent.glob("*/config.toml")) or path.parent.parent.glob(f"*/{glob.escape(path.name)}/config.toml")
    others = sorted(str(other.parent) for other in found)
    listed = f"; existing runs: {', '.join(others[-3:])}" if others else ""
    raise UserError(f"{path}: no such folder{similar(path)}{listed}")


def refuse_existing(path: Path) -> None:
    """Raise a `UserError` early, before any work, if a new run's folder already contains a run or cannot be created."""
    check_place(path)
    if RunFolder(path).config_file.exists():
        raise UserError(
            f"{path}: already contains a run; continue it with `bardling resume {shell_path(path)}`, or choose another --out"
        )


def create_run(
    path: Path, recipe: str, *, share_folder: bool = False, write_files: Callable[[], None] = lambda: None
) -> RunFolder:
    """Create the folder of a new run, which must not contain a run. What a killed start left there is removed.

    With `share_folder`, it may hold other files, such as the checkpoint of another trainer that the run continues.
    `write_files` writes the run's other files. The configuration is written last: it makes the folder a run.
    """
    run = RunFolder(path)
    refuse_existing(path)
    if path.exists() and (not path.is_dir() or not (share_folder or all(_is_leftover(entry) for entry in path.iterdir()))):
        raise UserError(f"{path}: exists and is not an empty folder: choose another --out")
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    remove_partial_files(path)
    if not share_folder:
        shutil.rmtree(run.base, ignore_errors=True)
        for name in reversed(_LEFTOVERS):  # the first file marks the others as ours until they are gone
            (path / name).unlink(missing_ok=True)
    write_files()
    run.write_config(recipe)
    return run


def discard_run(run: RunFolder, *, share_folder: bool) -> None:
    """Undo `create_run` for a run that failed before its first step; in a shared folder, remove only what nobody else wrote."""
    run.config_file.unlink(missing_ok=True)  # first: a folder without it is not a run
    ours = [run.metrics_file, run.samples_file, run.environment_file, run.dataset_file]
    for entry in ours if share_folder else list(run.path.iterdir()):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty, or a mount point
        run.path.rmdir()


def _is_leftover(entry: Path) -> bool:
    """Whether a start that was killed before the folder became a run may have left this behind."""
    if entry.name == "checkpoints":
        return entry.is_dir() and not any(entry.iterdir())
    if entry.name in (*_LEFTOVERS, "base"):  # a tokenizer without dataset.json is the user's own
        return (entry.parent / _LEFTOVERS[0]).is_file()
    return entry.name == ".lock" or entry.name.startswith(tuple(f".{name}." for name in ("config.toml", "base", *_LEFTOVERS)))


@contextlib.contextmanager
def run_lock(folder: RunFolder, context: Context) -> Iterator[None]:
    """Hold the run's lock on behalf of all processes of this job; if another job holds it, all raise a `UserError`."""
    message = f"{folder.path}: another process is training this run: wait for it to finish, or stop it"
    with contextlib.ExitStack() as stack:
        context.on_primary(lambda: stack.enter_context(locked(folder.lock_file, timeout=LOCK_TIMEOUT, message=message)))
        try:
            yield
        finally:
            if context.is_primary:
                with contextlib.suppress(OSError):  # Windows keeps an open file; a leftover lock file blocks nobody
                    folder.lock_file.unlink(missing_ok=True)
