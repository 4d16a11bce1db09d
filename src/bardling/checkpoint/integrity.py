"""Checks every file in a run folder: checkpoints against their checksums, the other files for being complete and well-formed.

The files beside the checkpoints change during training and have no checksums.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bardling.checkpoint.run_folder import RunFolder
from bardling.data.tokens.tokenizer import load_tokenizer
from bardling.errors import UserError
from bardling.files.reading import read_json_object
from bardling.monitor.jsonl import read_jsonl


@dataclass(frozen=True)
class CheckResult:
    """The result for one checkpoint or file."""

    name: str
    size: int  # bytes
    best: bool  # a checkpoint whose validation loss was the best when it was saved
    problems: list[str]  # empty if it is valid


def check_run(run: RunFolder, progress: Callable[[int, int], None]) -> list[CheckResult]:
    """Check a run's own files, then its checkpoints, oldest first; `progress` gets their bytes read so far, and in total."""
    store = run.store()
    folders = [store.path(step) for step in store.steps()]
    sizes = [sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file()) for folder in folders]
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        progress(done, sum(sizes))

    results = _check_own_files(run)
    for folder, size in zip(folders, sizes, strict=True):
        problems = store.verify(folder, advance)
        results.append(CheckResult(folder.name, size, not problems and store.is_best(folder), problems))
    return results


def _check_own_files(run: RunFolder) -> list[CheckResult]:
    """Check the files beside the checkpoints that exist: not every kind of run has all of them."""
    readers: dict[str, Callable[[], object]] = {
        "config.toml": run.config,
        "dataset.json": run.dataset_record,
        "environment.json": lambda: read_json_object(run.environment_file),
        "tokenizer.json": lambda: load_tokenizer(run.path),
        "metrics.jsonl": lambda: read_jsonl(run.metrics_file),
        "samples.jsonl": lambda: read_jsonl(run.samples_file),
    }
    results = []
    for name, read in readers.items():
        path = run.path / name
        if not path.exists():
            continue
        problems = []
        try:
            read()
        except UserError as error:
            problems = [str(error).removeprefix(f"{path}: ").removeprefix(f"{path}, ")]
        results.append(CheckResult(name, path.lstat().st_size, False, problems))
    return results
