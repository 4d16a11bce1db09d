"""`bardling info RUN --verify`: every file is read, each checkpoint's state is listed, and all damage is named at once."""

import shutil

import pytest

from bardling.cli.info import run as info
from bardling.errors import UserError
from bardling.train.run import train


@pytest.fixture
def run(tiny, tmp_path):
    return train(tiny, tmp_path / "run", quiet=True).folder


def test_a_sound_run_is_listed_with_its_checkpoints(run, capsys):
    info([str(run), "--verify"])
    said = capsys.readouterr().out
    assert "every file is as its checksum says" in said
    for name in (
        "config.toml",
        "metrics.jsonl",
        "samples.jsonl",
        "tokenizer.json",
        "step-000010",
        "step-000020",
        "step-000030",
    ):
        (line,) = [line for line in said.splitlines() if line.startswith(name)]
        assert "sound" in line
        assert " kB " in line or " B " in line
    assert "the best when it was saved" in said


def test_all_damage_is_listed_and_named(run, capsys):
    damaged = run / "checkpoints" / "step-000020" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (run / "checkpoints" / "step-000010" / "training.json").unlink()
    metrics = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*metrics[:3], "{\n", *metrics[3:]]))
    (run / "dataset.json").write_text("[]")
    with pytest.raises(UserError) as error:
        info([str(run), "--verify"])
    said = capsys.readouterr().out
    assert "step-000030" in said
    assert [line for line in said.splitlines() if "step-000030" in line and "sound" in line]
    for problem in (
        "step-000020: optimizer.safetensors has",
        "step-000010: training.json is missing",
        "metrics.jsonl: line 4: is not valid JSON",
        "dataset.json: holds no JSON object",
    ):
        assert problem in str(error.value)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 4"):
        info([str(run)])


def test_long_work_shows_how_far_it_is(run, capsys, monkeypatch):
    from bardling.cli import progress

    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", -1.0)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *args: (100, 20))
    big = run / "checkpoints" / "step-000010" / "model.safetensors"
    big.write_bytes(b"\0" * 3_000_000)
    from bardling.checkpoint.manifest import describe

    (big.parent / "manifest.json").write_text(describe(big.parent, 10, False).to_json())
    info([str(run), "--verify"])
    assert "verifying: 1 of 3, " in capsys.readouterr().err
