"""Is everything in a run's folder what it was when it was written? Each file is read; checkpoints are compared with checksums.

The files beside the checkpoints change while a run goes on and have no checksum: of these it can only be said that they are
whole and make sense.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bardling.checkpoint.manifest import read_manifest
from bardling.checkpoint.runfolder import RunFolder, read_json
from bardling.data.tokenizer import load_tokenizer
from bardling.errors import UserError
from bardling.monitor.jsonl import read_jsonl


@dataclass(frozen=True)
class Verdict:
    """What was found out about a checkpoint or a file."""

    name: str
    size: int  # bytes
    best: bool  # a checkpoint with the best validation loss when it was saved
    problems: tuple[str, ...]  # none: it is sound


def verify_run(run: RunFolder, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Verdict]:
    """Check every file of a run: first the run's own files, then the checkpoints, oldest first.

    Args:
        progress: called now and then with the bytes read of the checkpoints, and all there are.
    """
    store = run.store()
    folders = [store.path(step) for step in store.steps()]
    sizes = [sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file()) for folder in folders]
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        progress(done, sum(sizes))

    verdicts = _own_files(run)
    for folder, size in zip(folders, sizes, strict=True):
        problems = store.verify(folder, advance)
        verdicts.append(Verdict(folder.name, size, not problems and read_manifest(folder).best, tuple(problems)))
    return verdicts


def _own_files(run: RunFolder) -> list[Verdict]:
    """The files beside the checkpoints; those that a run of this kind need not have may be missing."""
    checks: dict[str, Callable[[], object]] = {
        "config.toml": run.config,
        "dataset.json": lambda: read_json(run.dataset_file),
        "environment.json": lambda: read_json(run.environment_file),
        "tokenizer.json": lambda: load_tokenizer(run.path),
        "metrics.jsonl": lambda: read_jsonl(run.metrics_file),
        "samples.jsonl": lambda: read_jsonl(run.samples_file),
    }
    verdicts = []
    for name, check in checks.items():
        path = run.path / name
        if not path.exists():
            continue
        problems: tuple[str, ...] = ()
        try:
            check()
        except UserError as error:
            problems = (str(error).removeprefix(f"{path}: ").removeprefix(f"{path}, "),)
        verdicts.append(Verdict(name, path.lstat().st_size, False, problems))
    return verdicts
