"""A folder of checkpoints, each of which appears complete or not at all.

A checkpoint is written into a hidden folder. Every file is synced to disk, a manifest with checksums is added, and one rename
makes it visible. Nothing older is deleted before that is durable. A process may be killed between any two operations: what it
leaves is either complete or invisible, and the next save removes it. Names: `step-000500` is a checkpoint;
`.tmp-step-000500-PID` is being written or deleted; `.old-step-000500` is the previous checkpoint of a step that is being saved
again, and is read until the new one is complete.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from bardling.checkpoint.checksums import MANIFEST_NAME, build_manifest, find_problems, read_manifest
from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error, os_reason, other_process_alive, sync_folder
from bardling.monitor.format import size_bytes

_STEP = re.compile(r"(?:\.old-)?step-(\d{6,18})")
_TEMPORARY = re.compile(r"\.tmp-step-\d{6,18}-(\d{1,10})")


class CheckpointStore:
    """The checkpoints in one folder, which need not exist yet.

    Args:
        folder: usually `RUN/checkpoints`.
        keep_last: how many of the latest checkpoints `save` keeps.
        keep_best: also keep this many of the latest checkpoints that were the best when saved.
        keep_every: also keep, permanently, those whose step is divisible by this (0: none).
    """

    def __init__(self, folder: Path, keep_last: int, *, keep_best: int = 1, keep_every: int = 0) -> None:
        if keep_last < 1 or keep_best < 0 or keep_every < 0:
            raise ValueError(
                f"keep_last = {keep_last} must be at least 1; keep_best = {keep_best} and keep_every = {keep_every} at least 0"
            )
        self.folder = folder
        self.keep_last, self.keep_best, self.keep_every = keep_last, keep_best, keep_every

    def steps(self) -> list[int]:
        """Steps of all checkpoints in ascending order, including damaged ones."""
        names: list[str] = []
        with os_error_as_user_error(self.folder, "read"), contextlib.suppress(FileNotFoundError):
            names = [entry.name for entry in self.folder.iterdir() if entry.is_dir() and not entry.is_symlink()]
        return sorted({int(match[1]) for match in map(_STEP.fullmatch, names) if match})

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint, whether it exists or not."""
        path, old = self._visible(step), self._old(step)
        return old if not path.exists() and old.exists() else path

    def verify(self, path: Path, progress: Callable[[int], None] | None = None) -> list[str]:
        """Read every file of a checkpoint and list its problems; `progress` gets the number of bytes of each read."""
        try:
            return self._check(path, checksums=True, progress=progress)
        except OSError as error:
            return [f"{Path(error.filename or path).name} cannot be read ({os_reason(error)})"]

    def latest(self, report: Callable[[str], None]) -> Path | None:
        """The latest valid checkpoint, or None. Later, damaged ones are reported as by `valid_checkpoints`."""
        return next(self.valid_checkpoints(report), None)

    def valid_checkpoints(self, report: Callable[[str], None]) -> Iterator[Path]:
        """Yield the valid checkpoints, latest first, checking each one lazily; `report` gets a line for each damaged one."""
        for step in reversed(self.steps()):
            path = self.path(step)
            if problems := self.verify(path):
                more = f", and {len(problems) - 1} more problems" if len(problems) > 1 else ""
                report(f"{path}: is damaged and skipped: {problems[0]}{more}")
            else:
                yield path

    def best(self) -> Path | None:
        """The valid checkpoint with the best validation loss, or None."""
        for path in map(self.path, reversed(self.steps())):
            with contextlib.suppress(OSError):  # for a reader, an unreadable checkpoint is as good as damaged
                if self.is_best(path) and not self.verify(path):
                    return path
        return None

    def save(self, step: int, write: Callable[[Path], None], *, best: bool = False) -> Path:
        """Save a checkpoint, replacing one of the same step, then delete those that are no longer kept.

        `write` writes the files into the empty folder it receives; `best`: the validation loss is the lowest so far. If the
        disk is full or the folder cannot be written, a `UserError` says so, and all older checkpoints are unchanged.
        """
        path, old, temporary = self._visible(step), self._old(step), self._temporary(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.tidy()
            temporary.mkdir()
            write(temporary)
            self._seal(temporary, step, best)
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            sync_folder(self.folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if old.exists() and not path.exists():
                with contextlib.suppress(OSError):  # if this fails too, readers still find it under its other name
                    old.rename(path)
            if isinstance(error, OSError):
                raise UserError(self._save_error(error)) from error
            raise
        # The new checkpoint is durable. If deleting fails, the next save tries again.
        with contextlib.suppress(OSError, UserError):
            self._delete(old, step)
            self._delete_old_checkpoints(step)
        return path

    def _seal(self, folder: Path, step: int, best: bool) -> None:
        """Add the manifest to a folder, and sync its files to disk."""
        manifest = build_manifest(folder, step, best)
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        for name in [*manifest.files, MANIFEST_NAME]:
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
        for root, _, _ in os.walk(folder, topdown=False):
            sync_folder(Path(root))

    def _delete_old_checkpoints(self, saved: int) -> None:
        """Delete the checkpoints older than step `saved`, which was just saved, that are no longer kept.

        Only complete checkpoints (all files present with the right size) count toward the limits. Newer ones than `saved` stay:
        they are damaged ones that were skipped, or the user's own choice. If something cannot be read, nothing more is deleted.
        """
        if self._check(self.path(saved), checksums=False):
            return
        older = [step for step in reversed(self.steps()) if step < saved]
        complete = [step for step in older if not self._check(self.path(step), checksums=False)]
        best = [step for step in [saved, *complete] if self.is_best(self.path(step))]
        keep = {*complete[: self.keep_last - 1], *best[: self.keep_best]}
        keep.update(step for step in complete if self.keep_every and step % self.keep_every == 0)
        for step in older:
            if step not in keep:
                self._delete(self.path(step), step)

    def tidy(self, *, exclusive: bool = False) -> None:
        """Remove what killed processes left behind, and finish their replacements. If no other process saves here
        (`exclusive`), temporary folders whose process seems to be alive are removed too: process ids repeat in containers.
        """
        for entry in self.folder.glob(".tmp-*"):
            match = _TEMPORARY.fullmatch(entry.name)
            if match and (exclusive or not other_process_alive(int(match[1]))):
                shutil.rmtree(entry)
        for entry in self.folder.glob(".old-*"):
            if match := _STEP.fullmatch(entry.name):
                path = self._visible(int(match[1]))
                if path.exists() and not self.verify(path):
                    self._delete(entry, int(match[1]))
                else:
                    self._delete(path, int(match[1]))
                    entry.rename(path)

    def _delete(self, path: Path, step: int) -> None:
        """Delete the checkpoint of a step, if it exists. A rename hides it first, so that no part of it is ever visible."""
        if path.exists():
            shutil.rmtree(path.rename(self._temporary(step)))

    def _check(self, path: Path, *, checksums: bool, progress: Callable[[int], None] | None = None) -> list[str]:
        if path.is_symlink() or not path.is_dir():
            return ["it is not a folder"]
        try:
            manifest = read_manifest(path)
        except ValueError as error:
            return [str(error)]
        if (name := _STEP.fullmatch(path.name)) and int(name[1]) != manifest.step:
            return [f"it contains step {manifest.step}, unlike its name"]
        return find_problems(path, manifest, checksums=checksums, progress=progress)

    def is_best(self, path: Path) -> bool:
        """Whether the checkpoint was the best when it was saved; the latest such checkpoint is the best of all."""
        try:
            return read_manifest(path).best
        except ValueError:
            return False

    def _save_error(self, error: OSError) -> str:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            path = error.filename or self.folder
            return f"{path}: cannot write the checkpoint ({os_reason(error)}); older checkpoints are unchanged"
        details = ""
        with contextlib.suppress(OSError):
            details = f", {size_bytes(shutil.disk_usage(self.folder).free)} are free"
            if steps := self.steps():
                size = sum(file.lstat().st_size for file in self.path(steps[-1]).rglob("*"))
                details = f": a checkpoint takes about {size_bytes(size)}{details}"
        return f"{self.folder}: the disk is full{details}; older checkpoints are unchanged: free some space"

    def _visible(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _old(self, step: int) -> Path:
        return self.folder / f".old-step-{step:06d}"

    def _temporary(self, step: int) -> Path:
        return self.folder / f".tmp-step-{step:06d}-{os.getpid()}"
