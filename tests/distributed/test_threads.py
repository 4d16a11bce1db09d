"""Threads follow the control group's quota."""

from pathlib import Path

import pytest
import torch

from bardling.distributed.threads import limit_threads
from bardling.files.cpu_quota import cpu_quota


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000\n", None),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("10000 100000\n", 1),
        ("", None),
        ("5 0\n", None),
        ("a b c\n", None),
        ("-1 100000\n", None),
    ],
)
def test_quota_of_version_2(tmp_path: Path, text: str, cores: int | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", None), ("400000", 4), ("250001", 3)])
def test_quota_of_version_1(tmp_path: Path, quota: str, cores: int | None) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path) == cores


def test_no_control_group(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


def test_threads_are_lowered_never_raised_and_the_variable_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1] if chosen else 64)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert limit_threads(None) == 64
    assert limit_threads(128) == 64
    assert limit_threads(2) == 2
    assert chosen == [2]
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert limit_threads(1) == 2
