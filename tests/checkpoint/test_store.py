"""The store under kills, full disks and damage: there is always a sound checkpoint to go on from."""

import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bardling.checkpoint.store import CheckpointStore
from bardling.errors import UserError


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.bin").write_text(text)
        (folder / "part").mkdir()
        (folder / "part" / "more.bin").write_text(text * 3)

    return write


def names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def silent(message: str) -> None:
    raise AssertionError(f"unexpected report: {message}")


def latest(store: CheckpointStore) -> tuple[int | None, list[str]]:
    reports: list[str] = []
    path = store.latest(reports.append)
    return (None if path is None else int(path.name.rpartition("-")[2])), reports


# --- what is kept ---------------------------------------------------------------------------------------------------------


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=2)
    assert store.steps() == []
    assert store.latest(silent) is None
    assert store.best() is None
    for step in (10, 20, 30, 40, 50):
        path = store.save(step, writer(str(step)), best=step in (10, 20))
        assert path.name == f"step-{step:06d}"
    assert store.steps() == [20, 40, 50]
    assert store.latest(silent) == store.path(50)
    assert store.best() == store.path(20)
    assert (store.path(50) / "model.bin").read_text() == "50"
    assert store.verify(store.path(50)) == []


def test_keeps_several_best_and_some_for_good(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=2, keep_every=40)
    for step in range(10, 130, 10):
        store.save(step, writer(str(step)), best=step in (10, 20, 50, 60))
    assert store.steps() == [40, 50, 60, 80, 120]
    store.save(130, writer("130"), best=True)  # itself one of the two best
    assert store.steps() == [40, 60, 80, 120, 130]
    assert store.best() == store.path(130)


def test_none_need_be_kept_for_its_loss(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=0)
    for step in (10, 20):
        store.save(step, writer(str(step)), best=step == 10)
    assert store.steps() == [20]


def test_nothing_is_deleted_when_the_new_one_is_not_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that loses what it has taken: the last good checkpoint stays."""
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(10, writer("10"))
    retain = CheckpointStore._delete_old_checkpoints

    def lose(self: CheckpointStore, saved: int) -> None:
        os.truncate(self.path(saved) / "model.bin", 1)
        retain(self, saved)

    monkeypatch.setattr(CheckpointStore, "_delete_old_checkpoints", lose)
    store.save(20, writer("20"))
    assert latest(store)[0] == 10


def test_valid_checkpoints_are_yielded_lazily_latest_first(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=4)
    for step in (10, 20, 30, 40):
        store.save(step, writer(str(step)))
    flip(store.path(30))
    reports: list[str] = []
    assert [path.name for path in store.valid_checkpoints(reports.append)] == ["step-000040", "step-000020", "step-000010"]
    assert len(reports) == 1
    assert "step-000030: is damaged" in reports[0]


def test_verifying_tells_how_far_it_is(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(10, writer("x" * 1_500_000))
    read: list[int] = []
    assert store.verify(store.path(10), read.append) == []
    assert sum(read) == 4 * 1_500_000
    assert max(read) <= 1 << 20


def test_steps_of_more_than_six_digits_sort_by_number(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    for step in (999_999, 1_000_000, 12_345_678):
        store.save(step, writer("x"))
    assert store.steps() == [999_999, 1_000_000, 12_345_678]
    assert store.path(12_345_678).name == "step-12345678"


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(10, writer("one"))
    store.save(10, writer("two"))
    assert (store.path(10) / "model.bin").read_text() == "two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000010"]


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-nine").mkdir()
    (tmp_path / ".tmp-mine").mkdir()
    (tmp_path / "step-000001").write_text("a file")
    CheckpointStore(tmp_path, 1).save(5, writer("x"))
    assert {entry.name for entry in tmp_path.iterdir()} == {"notes.txt", "step-nine", ".tmp-mine", "step-000001", "step-000005"}


def test_remains_of_dead_processes_are_removed_and_of_living_ones_kept(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".tmp-step-000005-4194303999", tmp_path / f".tmp-step-000005-{os.getppid()}"
    dead.mkdir()
    alive.mkdir()
    CheckpointStore(tmp_path, 1).save(5, writer("x"))
    assert not dead.exists()
    assert alive.exists()


def test_keep_last_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last = 0"):
        CheckpointStore(tmp_path, 0)


# --- damage ---------------------------------------------------------------------------------------------------------------


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.bin").read_bytes())
    data[-1] ^= 1
    (folder / "model.bin").write_bytes(bytes(data))


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return apply


def rename_entry(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["files"].update({name: manifest["files"].pop("model.bin")})


def link(folder: Path) -> None:
    (folder / "model.bin").rename(folder.parent / "elsewhere")
    (folder / "model.bin").symlink_to(folder.parent / "elsewhere")


def pipe(folder: Path) -> None:
    (folder / "model.bin").unlink()
    os.mkfifo(folder / "model.bin")


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (flip, "model.bin has changed"),
    (lambda f: os.truncate(f / "part" / "more.bin", 3), "part/more.bin has 3 bytes instead of 6"),
    (lambda f: (f / "model.bin").unlink(), "model.bin is missing"),
    (lambda f: shutil.rmtree(f / "part"), "part/more.bin is missing"),
    (lambda f: (f / "extra").write_text(""), "extra is not part of the checkpoint"),
    (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: is not valid JSON"),
    (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json: is not valid JSON"),
    (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "manifest.json: is not valid JSON"),
    (lambda f: (f / "manifest.json").write_text(" " * (1 << 21)), "manifest.json is too large"),
    (edit(lambda m: m.update(format=99)), "unknown format"),
    (edit(lambda m: m.update(step=21)), "contains step 21"),
    (edit(lambda m: m.update(step=-1)), "malformed"),
    (edit(lambda m: m.update(files=[])), "malformed"),
    (edit(lambda m: m["files"]["model.bin"].update(size="2")), "malformed at 'model.bin'"),
    (edit(lambda m: m["files"].update({f"f{i}": {} for i in range(5000)})), "malformed"),
    (edit(rename_entry("../step-000010/model.bin")), "outside its folder"),
    (edit(rename_entry("/etc/passwd")), "outside its folder"),
    (edit(rename_entry("part/../../x")), "outside its folder"),
    (edit(rename_entry("")), "outside its folder"),
    (link, "model.bin is not a regular file"),
    (pipe, "model.bin is not a regular file"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_reported_and_skipped(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    store.save(10, writer("10"), best=True)
    store.save(20, writer("20"), best=True)
    damage(store.path(20))
    assert any(message in problem for problem in store.verify(store.path(20)))
    step, reports = latest(store)
    assert step == 10
    assert len(reports) == 1
    assert "step-000020: is damaged" in reports[0]
    assert message in reports[0]
    assert store.best() == store.path(10)
    store.save(20, writer("new"))  # and it is repaired by saving that step again
    assert latest(store) == (20, [])


def test_a_link_to_a_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "a", keep_last=1)
    store.save(10, writer("10"))
    (tmp_path / "a" / "step-000010").rename(tmp_path / "step-000010")
    (tmp_path / "a" / "step-000010").symlink_to(tmp_path / "step-000010")
    assert store.steps() == []
    assert store.verify(store.path(10)) == ["it is not a folder"]


def test_damaged_ones_take_no_place_among_the_kept(tmp_path: Path) -> None:
    """A run that fell back to step 10 because 20 was cut keeps 10 until it has two new ones."""
    store = CheckpointStore(tmp_path, keep_last=2)
    store.save(10, writer("10"))
    store.save(20, writer("20"))
    (store.path(20) / "model.bin").unlink()
    store.save(15, writer("15"))
    assert store.steps() == [10, 15, 20]
    assert latest(store)[0] == 15
    store.save(30, writer("30"))
    assert store.steps() == [15, 30]


# --- errors of the system -------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "model.bin").write_text("half")
        with Path("/dev/full").open("wb") as file:
            file.write(b"x")

    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(10, writer("x" * 100_000))
    with pytest.raises(UserError, match=r"the disk is full: a checkpoint takes about 40\d kB, [\d.]+ .B are free") as caught:
        store.save(20, write)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000010"]
    assert latest(store) == (10, [])


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"checkpoints: cannot write the checkpoint \("):
        CheckpointStore(tmp_path / "checkpoints", 1).save(10, writer("x"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match="Permission denied"):
        CheckpointStore(tmp_path, 1).save(10, writer("x"))


def test_errors_of_the_writer_itself_pass_through(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "a").write_text("a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CheckpointStore(tmp_path, 1).save(10, write)
    assert list(tmp_path.iterdir()) == []


# --- paths, reports and leftovers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(0, 1, 0), (1, -1, 0), (1, 0, -1)])
def test_counts_below_their_minimum_are_rejected(tmp_path: Path, counts: tuple[int, int, int]) -> None:
    last, best, every = counts
    with pytest.raises(ValueError, match=f"keep_last = {last} must be at least 1; keep_best = {best} and keep_every = {every}"):
        CheckpointStore(tmp_path, last, keep_best=best, keep_every=every)


def test_path_of_a_step_that_was_never_saved(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path, 1).path(99) == tmp_path / "step-000099"


def test_only_folders_count_as_steps(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    store.save(5, writer("x"))
    (tmp_path / "step-000006").write_text("a file")
    (tmp_path / "step-000007").symlink_to(tmp_path / "step-000005")
    (tmp_path / "step-8").mkdir()
    assert store.steps() == [5]


def move_aside(store: CheckpointStore, step: int) -> Path:
    """Put a checkpoint where a save that was killed leaves the one it replaces."""
    return store.path(step).rename(store.folder / f".old-step-{step:06d}")


def test_a_checkpoint_moved_aside_stands_in_until_its_replacement_exists(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(10, writer("old"))
    aside = move_aside(store, 10)
    assert store.steps() == [10]
    assert store.path(10) == aside
    assert store.verify(aside) == []
    assert store.latest(silent) == aside
    store.tidy()
    assert names(tmp_path) == ["step-000010"]
    assert latest(store) == (10, [])


def test_a_valid_replacement_wins_over_the_checkpoint_moved_aside(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(10, writer("old"))
    shutil.copytree(store.path(10), tmp_path / "copy")
    store.save(10, writer("new"))
    (tmp_path / "copy").rename(tmp_path / ".old-step-000010")
    assert store.path(10) == tmp_path / "step-000010"
    store.tidy()
    assert names(tmp_path) == ["step-000010"]
    assert (store.path(10) / "model.bin").read_text() == "new"


def test_a_damaged_replacement_gives_way_to_the_checkpoint_moved_aside(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(10, writer("old"))
    aside = move_aside(store, 10)
    shutil.copytree(aside, tmp_path / "step-000010")
    flip(tmp_path / "step-000010")
    store.tidy()
    assert names(tmp_path) == ["step-000010"]
    assert latest(store) == (10, [])
    assert (store.path(10) / "model.bin").read_text() == "old"


def test_tidy_leaves_other_names_alone(tmp_path: Path) -> None:
    others = {".old-mine", ".tmp-mine", ".old-step-1", ".tmp-step-000001"}
    for name in others:
        (tmp_path / name).mkdir()
    CheckpointStore(tmp_path, 1).tidy(exclusive=True)
    assert set(names(tmp_path)) == others


@pytest.mark.parametrize("exclusive", [False, True])
def test_who_saves_alone_also_removes_what_seems_to_belong_to_a_living_process(tmp_path: Path, exclusive: bool) -> None:
    (tmp_path / f".tmp-step-000005-{os.getppid()}").mkdir()
    CheckpointStore(tmp_path, 1).tidy(exclusive=exclusive)
    assert bool(names(tmp_path)) is not exclusive


def test_a_report_gives_the_first_problem_and_the_number_of_the_others(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(10, writer("10"))
    path = store.path(10)
    ends = []
    for damage in (flip, lambda f: (f / "a").touch(), lambda f: (f / "b").touch()):
        damage(path)
        _, (report,) = latest(store)
        assert report.startswith(f"{path}: ")
        assert store.verify(path)[0] in report
        ends.append(report.partition(store.verify(path)[0])[2])
    assert ends == ["", ", and 1 more problems", ", and 2 more problems"]


@pytest.mark.parametrize("named", [True, False])
def test_a_read_error_is_reported_with_the_file_if_known(tmp_path: Path, named: bool) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(10, writer("10"), best=True)
    model = store.path(10) / "model.bin"

    def fail(name: str, args: tuple[Any, ...]) -> None:
        if name == "io.open" and Path(args[0]) == model:
            raise OSError(errno.EIO, os.strerror(errno.EIO), *([str(model)] if named else []))

    with operations(fail):
        what = "model.bin" if named else "step-000010"
        assert store.verify(store.path(10)) == [f"{what} cannot be read ({os.strerror(errno.EIO)})"]
        assert store.latest(lambda message: None) is None
        assert store.best() is None
    assert store.best() == store.path(10)


def test_a_write_error_is_reported_with_the_file_if_known(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1)

    def failing(*filename: str) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), *filename)

        return write

    for filename, where in ((("/some/file",), "/some/file"), ((), str(store.folder))):
        with pytest.raises(UserError) as caught:
            store.save(10, failing(*filename))
        assert str(caught.value).startswith(f"{where}: ")
        assert os.strerror(errno.EIO) in str(caught.value)
        assert names(store.folder) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_reported_with_the_size_of_the_newest_checkpoint(tmp_path: Path, number: int) -> None:
    def write(folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    store = CheckpointStore(tmp_path, keep_last=2)
    store.save(10, writer("x" * 1_000_000))
    store.save(20, writer("x" * 100_000))
    with pytest.raises(UserError, match=r"the disk is full: a checkpoint takes about 40\d kB, [\d.]+ .B are free"):
        store.save(30, write)
    assert store.steps() == [10, 20]


def test_a_failed_replacement_puts_the_old_checkpoint_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(10, writer("old"))

    def fail(name: str, args: tuple[Any, ...]) -> None:
        if name == "rename" and ".tmp-" in str(args[0]):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(args[0]))

    with operations(fail), pytest.raises(UserError, match="unchanged"):
        store.save(10, writer("new"))
    assert names(tmp_path) == ["step-000010"]
    assert (tmp_path / "step-000010" / "model.bin").read_text() == "old"
    assert latest(store) == (10, [])


def test_files_are_complete_when_they_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: dict[int, int] = {}  # inode -> size when it was synced
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", fsync)
    path = CheckpointStore(tmp_path, keep_last=1).save(10, writer("text"))
    files = [file for file in path.rglob("*") if file.is_file()]
    assert {file.name for file in files} == {"model.bin", "more.bin", "manifest.json"}
    for file in files:
        assert synced.get(file.stat().st_ino) == file.stat().st_size, file


# --- kills and failures at every operation --------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is dead: no operation works any more, those that clean up included."""


OPERATIONS = ("rename", "replace", "mkdir", "fsync", "open", "unlink", "rmdir")


@contextmanager
def operations(before: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call `before` with the name and the arguments of every operation that changes the disk."""

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before(name, args)
            return real(*args, **kwargs)

        return call

    with contextmanager(_patched)(wrap):
        yield


def _patched(wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    patches = [mock.patch.object(os, name, wrap(name, getattr(os, name))) for name in OPERATIONS]
    patches.append(mock.patch.object(io, "open", wrap("io.open", io.open)))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def prepared(folder: Path) -> CheckpointStore:
    store = CheckpointStore(folder, keep_last=2)
    for step in (10, 20, 30):
        store.save(step, writer(f"old {step}"), best=step == 10)
    return store


def count_operations(folder: Path, step: int) -> int:
    seen: list[str] = []
    store = prepared(folder)
    with operations(lambda name, args: seen.append(name)):
        store.save(step, writer("new"))
    return len(seen)


@pytest.mark.parametrize("step", [30, 40])
def test_killed_at_any_operation(tmp_path: Path, step: int) -> None:
    total = count_operations(tmp_path / "count", step)
    assert total > 20
    outcomes = set()
    for at in range(total):
        store = prepared(tmp_path / str(at))
        done = 0

        def die(name: str, args: tuple[Any, ...], at: int = at) -> None:
            nonlocal done
            done += 1
            if done > at:
                raise Killed

        with operations(die), pytest.raises(Killed):
            store.save(step, writer("new"))
        reader = CheckpointStore(store.folder, keep_last=2)
        path = reader.latest(silent)
        assert path is not None
        text = (path / "model.bin").read_text()
        outcomes.add(text)
        assert text == "new" if reader.steps()[-1] == 40 else text in ("new", "old 30")
        assert store.path(10).exists()
        assert not any(reader.verify(reader.path(each)) for each in reader.steps())
        newest = reader.steps()[-1]
        best = reader.best()
        assert best is not None
        assert best.name == "step-000010"
        # The next save works, and leaves nothing of the dead one.
        reader.save(50, writer("next"))
        assert all(name.startswith("step-") for name in names(store.folder))
        assert reader.steps() == [10, newest, 50]
        assert not any(reader.verify(reader.path(each)) for each in reader.steps())
    assert outcomes == {"new", "old 30"}


@pytest.mark.parametrize("step", [30, 40])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS])
def test_one_failing_operation(tmp_path: Path, step: int, number: int) -> None:
    total = count_operations(tmp_path / "count", step)
    failures = 0
    for at in range(total):
        store = prepared(tmp_path / str(at))
        done = 0

        def fail(name: str, args: tuple[Any, ...], at: int = at) -> None:
            nonlocal done
            done += 1
            if done == at + 1:
                raise OSError(number, os.strerror(number), "somewhere")

        message = ""
        try:
            with operations(fail):
                store.save(step, writer("new"))
        except UserError as error:
            failures += 1
            message = str(error)
        if message:
            assert "unchanged" in message
            assert "\n" not in message
            assert {10, 20, 30} <= set(store.steps())
            assert not [name for name in names(store.folder) if name.startswith(".tmp")]
        assert store.latest(silent) is not None
        assert store.best() == store.path(10)
    assert failures > 15


def test_nothing_is_shown_or_deleted_before_it_is_durable(tmp_path: Path) -> None:
    store = prepared(tmp_path)
    seen: list[tuple[str, str]] = []

    def note(name: str, args: tuple[Any, ...]) -> None:
        what = str(Path(f"/proc/self/fd/{args[0]}").readlink()) if name == "fsync" else str(args[0])
        seen.append((name, what.replace(f"-{os.getpid()}", "")))

    with operations(note):
        store.save(40, writer("new"))
    hidden = f"{tmp_path}/.tmp-step-000040"
    shown = seen.index(("rename", hidden))
    synced = {what for name, what in seen[:shown] if name == "fsync"}
    assert synced == {hidden + part for part in ("", "/part", "/model.bin", "/part/more.bin", "/manifest.json")}
    durable = seen.index(("fsync", str(tmp_path)))
    first_deletion = next(i for i, (name, what) in enumerate(seen) if what.endswith("step-000020"))
    assert shown < durable < first_deletion


# --- any history ----------------------------------------------------------------------------------------------------------

actions = st.lists(st.tuples(st.sampled_from(["save", "best", "again", "fail", "flip", "cut"]), st.integers(0, 3)), max_size=14)


@settings(max_examples=100, deadline=None)
@given(history=actions, keep_last=st.integers(1, 3), keep_best=st.integers(0, 2), keep_every=st.sampled_from([0, 10, 20, 30]))
def test_any_history(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, int]], keep_last: int, keep_best: int, keep_every: int
) -> None:
    """After any saves, failed ones too, and damages: the newest sound checkpoint is found, there is one as soon as one save has
    succeeded, a failed save deletes nothing, and without damage exactly the right ones are kept."""
    store = CheckpointStore(tmp_path_factory.mktemp("store"), keep_last, keep_best=keep_best, keep_every=keep_every)
    saved: list[int] = []
    damaged: set[int] = set()
    best: list[int] = []
    ever_damaged = False
    for action, which in history:
        if action in ("save", "best", "again", "fail"):
            step = saved[-1] if action == "again" and saved else (saved[-1] if saved else 0) + 10
            is_best = action == "best" or (action == "again" and step in best)
            before = store.steps()
            if action == "fail":
                with pytest.raises(UserError, match="older checkpoints are unchanged"):
                    store.save(step, full_disk)
                assert store.steps() == before
                continue
            store.save(step, writer(str(step)), best=is_best)
            saved = [*[each for each in saved if each != step], step]
            damaged.discard(step)
            best = [*[each for each in best if each != step], *([step] if is_best else [])]
            assert store.latest(silent) == store.path(step)
        elif store.steps():
            step = store.steps()[which % len(store.steps())]
            if step not in damaged:
                flip(store.path(step)) if action == "flip" else (store.path(step) / "model.bin").unlink()
                damaged.add(step)
                ever_damaged = True
        sound = [each for each in store.steps() if each not in damaged]
        reports: list[str] = []
        found = store.latest(reports.append)
        assert found == (store.path(sound[-1]) if sound else None)
        assert len(reports) == len([each for each in store.steps() if not sound or each > sound[-1]])
        if not ever_damaged:
            for_good = [each for each in saved if keep_every and each % keep_every == 0]
            assert store.steps() == sorted({*saved[-keep_last:], *best[max(len(best) - keep_best, 0) :], *for_good})
    shutil.rmtree(store.folder)


def full_disk(folder: Path) -> None:
    (folder / "model.bin").write_text("half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "model.bin"))
