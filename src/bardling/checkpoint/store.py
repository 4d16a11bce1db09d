"""A folder of checkpoints, each of which appears whole or not at all.

A checkpoint is written into a hidden folder beside the others, every file is flushed to the disk, a manifest with checksums
is added, and one rename makes it visible. Nothing older is deleted before that rename is durable. A process may be killed
between any two operations: what it leaves is either invisible (and removed by the next save) or whole. The store knows
files, not tensors.

Names: `step-000500` is a checkpoint; `.tmp-step-000500-PID` is being written or deleted; `.old-step-000500` is a checkpoint
that makes room for a new one of the same step, and stands in for it until that is there.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from bardling.checkpoint import manifest as manifests
from bardling.errors import UserError
from bardling.files import another_lives, sync_folder
from bardling.monitor.format import size_bytes

_STEP = re.compile(r"(?:\.old-)?step-(\d{6,18})")
_TEMPORARY = re.compile(r"\.tmp-step-\d{6,18}-(\d{1,10})")


class CheckpointStore:
    """The checkpoints in one folder, which need not exist yet.

    Args:
        folder: usually `RUN/checkpoints`.
        keep_last: newest checkpoints that `save` keeps; besides these
        keep_best: the newest of those that were the best when they were saved;
        keep_every: those whose step is divisible by this, for good (0: none).
    """

    def __init__(self, folder: Path, keep_last: int, *, keep_best: int = 1, keep_every: int = 0) -> None:
        if keep_last < 1 or keep_best < 0 or keep_every < 0:
            raise ValueError(
                f"keep_last = {keep_last} must be at least 1, keep_best = {keep_best}, keep_every = {keep_every} 0"
            )
        self.folder = folder
        self.keep_last, self.keep_best, self.keep_every = keep_last, keep_best, keep_every

    def steps(self) -> list[int]:
        """Steps of all checkpoints, rising; damaged ones too."""
        try:
            entries = [entry for entry in self.folder.iterdir() if entry.is_dir() and not entry.is_symlink()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be read ({_reason(error)})") from None
        return sorted({int(match[1]) for match in (_STEP.fullmatch(entry.name) for entry in entries) if match})

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint, whether it exists or not."""
        path, old = self._place(step), self._old(step)
        return old if not path.exists() and old.exists() else path

    def verify(self, path: Path, progress: Callable[[int], None] | None = None) -> list[str]:
        """Read a whole checkpoint and return what is wrong with it: empty when it is sound.

        Args:
            progress: called now and then with the bytes read since the last call.
        """
        try:
            return self._check(path, checksums=True, progress=progress)
        except OSError as error:
            return [f"{Path(error.filename or path).name} cannot be read ({_reason(error)})"]

    def latest(self, report: Callable[[str], None]) -> Path | None:
        """The newest sound checkpoint, or None. Each damaged one before it is named, with the reason, through `report`."""
        return next(self.sound(report), None)

    def sound(self, report: Callable[[str], None]) -> Iterator[Path]:
        """The sound checkpoints, newest first, each verified when its turn comes; damaged ones are named as by `latest`."""
        for step in reversed(self.steps()):
            path = self.path(step)
            found = self.verify(path)
            if not found:
                yield path
                continue
            more = f", and {len(found) - 1} more problems" if len(found) > 1 else ""
            report(f"{path}: is damaged and passed over: {found[0]}{more}")

    def best(self) -> Path | None:
        """The sound checkpoint with the best validation loss, or None."""
        for path in map(self.path, reversed(self.steps())):
            try:
                if self._is_best(path) and not self.verify(path):
                    return path
            except OSError:
                continue  # as good as damaged, for who only reads
        return None

    def save(self, step: int, write: Callable[[Path], None], *, best: bool = False) -> Path:
        """Save a checkpoint, then delete those that are no longer kept.

        A checkpoint of the same step is replaced.

        Args:
            write: puts the files into the empty folder that it is given.
            best: the validation loss at this step is the lowest so far.

        Raises:
            UserError: the disk is full or the folder cannot be written; every older checkpoint is still there.
        """
        place, old = self._place(step), self._old(step)
        temporary = self._temporary(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.tidy()
            temporary.mkdir()
            write(temporary)
            self._seal(temporary, step, best)
            if place.exists():
                place.rename(old)
            temporary.rename(place)
            sync_folder(self.folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if old.exists() and not place.exists():
                with contextlib.suppress(OSError):  # if this fails too, readers still find the old one under its other name
                    old.rename(place)
            if isinstance(error, OSError):
                raise UserError(self._explain(error)) from error
            raise
        # The new one is durable. Should deleting fail, the next save tries again.
        with contextlib.suppress(OSError, UserError):
            self._discard(old)
            self._retain(step)
        return place

    def _seal(self, folder: Path, step: int, best: bool) -> None:
        """Make a folder's files durable and add the manifest."""
        manifest = manifests.describe(folder, step, best)
        for name in manifest.files:
            _sync_file(folder / name)
        with (folder / manifests.NAME).open("w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        for root, _, _ in os.walk(folder, topdown=False):
            sync_folder(Path(root))

    def _retain(self, saved: int) -> None:
        """Delete what is older than the checkpoint just saved and no longer kept.

        Only checkpoints whose files are all there in full size count, the one just saved included; what is newer than `saved`
        stays, since it can only be a damaged one that was passed over or someone's own choice.

        Raises:
            OSError: something cannot be read just now; then nothing more is deleted.
        """
        if self._check(self.path(saved), checksums=False):
            return
        older = [step for step in reversed(self.steps()) if step < saved]
        whole = [step for step in older if not self._check(self.path(step), checksums=False)]
        best = [step for step in [saved, *whole] if self._is_best(self.path(step))]
        keep = {*whole[: self.keep_last - 1], *best[: self.keep_best]}
        keep.update(step for step in whole if self.keep_every and step % self.keep_every == 0)
        for step in older:
            if step not in keep:
                self._discard(self.path(step))

    def tidy(self, *, alone: bool = False) -> None:
        """Remove what killed processes left, and finish what they began.

        Args:
            alone: no other process saves here, whatever the numbers of processes say; they come again in containers.
        """
        for entry in self.folder.glob(".tmp-*"):
            match = _TEMPORARY.fullmatch(entry.name)
            if match and (alone or not another_lives(int(match[1]))):
                shutil.rmtree(entry)
        for entry in self.folder.glob(".old-*"):
            match = _STEP.fullmatch(entry.name)
            if match is None:
                continue
            place = self._place(int(match[1]))
            if place.exists() and not self.verify(place):
                self._discard(entry)
            else:
                self._discard(place)
                entry.rename(place)

    def _discard(self, path: Path) -> None:
        """Delete a checkpoint; it vanishes at once, so that no part of it is ever seen."""
        match = _STEP.fullmatch(path.name)
        if match is None or not path.exists():
            return
        temporary = self._temporary(int(match[1]))
        path.rename(temporary)
        shutil.rmtree(temporary)

    def _check(self, path: Path, *, checksums: bool, progress: Callable[[int], None] | None = None) -> list[str]:
        if path.is_symlink() or not path.is_dir():
            return ["it is no folder"]
        try:
            manifest = manifests.read_manifest(path)
        except ValueError as error:
            return [str(error)]
        name = _STEP.fullmatch(path.name)
        if name and int(name[1]) != manifest.step:
            return [f"it holds step {manifest.step}, not what its name says"]
        return manifests.problems(path, manifest, checksums=checksums, progress=progress)

    def _is_best(self, path: Path) -> bool:
        """Whether the checkpoint was the best when it was saved; the newest such one is the best of all."""
        try:
            return manifests.read_manifest(path).best
        except ValueError:
            return False

    def _explain(self, error: OSError) -> str:
        """One line for a checkpoint that could not be saved."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            where = error.filename or self.folder
            return f"{where}: the checkpoint cannot be written ({_reason(error)}); older ones are untouched"
        room = ""
        with contextlib.suppress(OSError):
            room = f", {size_bytes(shutil.disk_usage(self.folder).free)} are free"
            if steps := self.steps():
                size = sum(file.lstat().st_size for file in self.path(steps[-1]).rglob("*"))
                room = f": a checkpoint takes about {size_bytes(size)}{room}"
        return f"{self.folder}: the disk is full{room}; older checkpoints are untouched: make room"

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _old(self, step: int) -> Path:
        return self.folder / f".old-step-{step:06d}"

    def _temporary(self, step: int) -> Path:
        return self.folder / f".tmp-step-{step:06d}-{os.getpid()}"


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
