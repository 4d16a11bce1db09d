"""The parts of saving in the background: copies in host memory, and space on the disk."""

from collections import namedtuple
from pathlib import Path

import pytest
import torch

from bardling.checkpoint import disk_space as space
from bardling.checkpoint.disk_space import check_space
from bardling.checkpoint.host_copy import HostCopy
from bardling.config import CheckpointConfig
from bardling.errors import UserError

# --- copies ---------------------------------------------------------------------------------------------------------------


def tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0)
    return {
        "matrix": base.reshape(4, 6).clone(),
        "turned": base.reshape(4, 6).t(),
        "part": base[1::3],
        "scalar": torch.tensor(3.0),
        "none": torch.empty(0, 3),
        "flags": torch.tensor([True, False, True]),
        "count": torch.tensor([7], dtype=torch.int64),
        "half": torch.randn(5, dtype=torch.bfloat16),
        "learned": torch.nn.Parameter(torch.randn(3, 3)),
    }


def test_copies_are_equal_and_stay_when_the_originals_change() -> None:
    originals = tensors()
    expected = {name: tensor.detach().clone() for name, tensor in originals.items()}
    copies = HostCopy().take(originals)
    with torch.no_grad():
        for tensor in originals.values():
            tensor.fill_(1)
    assert list(copies) == list(expected)
    for name, tensor in expected.items():
        assert copies[name].dtype == tensor.dtype
        assert copies[name].shape == tensor.shape
        assert torch.equal(copies[name], tensor), name
        assert not copies[name].requires_grad


def test_memory_is_used_again_and_made_anew_only_for_other_shapes() -> None:
    memory, originals = HostCopy(), tensors()
    memory.prepare(originals)
    places = [{name: copy.data_ptr() for name, copy in memory.take(originals).items()} for _ in range(3)]
    assert places[0] == places[1] == places[2]
    grown = originals | {"matrix": torch.ones(9, 9)}
    assert torch.equal(memory.take(grown)["matrix"], torch.ones(9, 9))
    assert torch.equal(memory.take(originals)["matrix"], originals["matrix"])


def test_preparing_again_leaves_copies_as_they_are() -> None:
    memory, originals = HostCopy(), tensors()
    copies = memory.take(originals)
    memory.prepare(originals)
    assert torch.equal(copies["matrix"], originals["matrix"])


# --- space ----------------------------------------------------------------------------------------------------------------

MB = 1_000_000


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch):
    def of(free: int, total: int = 10_000 * MB) -> None:
        usage = namedtuple("usage", "total used free")(total, total - free, free)
        monkeypatch.setattr(space.shutil, "disk_usage", lambda place: usage)

    return of


def ask(folder: Path, steps: int = 1000, best_steps: int = 4, **config: object) -> str | None:
    checkpoint = CheckpointConfig(**{"every": 100, "keep_last": 2, **config})  # type: ignore[arg-type]
    return check_space(folder / "run" / "checkpoints", 10 * MB, checkpoint, steps=steps, best_steps=best_steps)


def test_room_for_all_is_silent(tmp_path: Path, disk) -> None:
    disk(40 * MB)  # two newest, the best, the one being written
    assert ask(tmp_path) is None


def test_too_little_for_what_is_kept_is_a_warning(tmp_path: Path, disk) -> None:
    disk(39 * MB)
    warning = ask(tmp_path)
    assert warning is not None
    assert f"{tmp_path}: up to 40.0 MB of checkpoints will be kept, but 39.0 MB are free" in warning
    disk(100 * MB)
    assert ask(tmp_path, keep_every=500) is None
    assert "up to 140 MB" in (ask(tmp_path, keep_every=100) or "")


@pytest.mark.parametrize("every", [100, "15m"])
def test_too_little_for_two_is_refused(tmp_path: Path, disk, every: int | str) -> None:
    disk(19 * MB)
    with pytest.raises(
        UserError, match=r"19.0 MB are free, but .* takes 10.0 MB and two are needed .*\(20.0 MB\): free some space"
    ) as e:
        ask(tmp_path, every=every)
    assert "\n" not in str(e.value)


def test_a_run_that_saves_once_needs_one(tmp_path: Path, disk) -> None:
    disk(11 * MB)
    assert ask(tmp_path, every=0, save_best=False) is None
    assert ask(tmp_path, steps=1) is None
    disk(9 * MB)
    with pytest.raises(UserError, match=r"takes 10.0 MB and one is needed"):
        ask(tmp_path, every=0, save_best=False)


def test_a_resumed_run_counts_what_is_there(tmp_path: Path, disk) -> None:
    there = tmp_path / "run" / "checkpoints" / "step-000100"
    there.mkdir(parents=True)
    with (there / "model").open("wb") as file:
        file.truncate(10 * MB)
    disk(11 * MB)  # one stays while the next is written
    assert "up to 40.0 MB" in (ask(tmp_path) or "")
    disk(30 * MB)
    assert ask(tmp_path) is None


def test_a_disk_that_does_not_say_is_believed(tmp_path: Path, disk) -> None:
    disk(0, total=0)
    assert ask(tmp_path) is None
