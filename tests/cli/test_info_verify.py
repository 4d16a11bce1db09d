"""`bardling info RUN --verify`: reads every file, lists the state of each checkpoint, and reports all damage at once."""

import shutil

import pytest

from bardling.cli.info import run as info
from bardling.errors import UserError
from bardling.training.run import train


@pytest.fixture
def run(tiny, tmp_path):
    return train(tiny, tmp_path / "run", quiet=True).folder


def test_a_valid_run_is_listed_with_its_checkpoints(run, capsys):
    info([str(run), "--verify"])
    output = capsys.readouterr().out
    assert "all checksums match" in output
    for name in (
        "config.toml",
        "metrics.jsonl",
        "samples.jsonl",
        "tokenizer.json",
        "step-000010",
        "step-000020",
        "step-000030",
    ):
        (line,) = [line for line in output.splitlines() if line.startswith(name)]
        assert "valid" in line
        assert " kB " in line or " B " in line
    assert "lowest validation loss when saved" in output


def test_all_damage_is_listed_and_reported(run, capsys):
    damaged = run / "checkpoints" / "step-000020" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (run / "checkpoints" / "step-000010" / "training.json").unlink()
    metrics = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*metrics[:3], "{\n", *metrics[3:]]))
    (run / "dataset.json").write_text("[]")
    with pytest.raises(UserError) as error:
        info([str(run), "--verify"])
    output = capsys.readouterr().out
    assert "step-000030" in output
    assert [line for line in output.splitlines() if "step-000030" in line and "valid" in line]
    for problem in (
        "step-000020: optimizer.safetensors has",
        "step-000010: training.json is missing",
        "metrics.jsonl: line 4: is not valid JSON",
        "dataset.json: is not a JSON object",
    ):
        assert problem in str(error.value)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 4"):
        info([str(run)])


def test_long_work_shows_its_progress(run, capsys, monkeypatch):
    from bardling.monitor import progress

    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", -1.0)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *args: (100, 20))
    big = run / "checkpoints" / "step-000010" / "model.safetensors"
    big.write_bytes(b"\0" * 3_000_000)
    from bardling.checkpoint.checksums import build_manifest

    (big.parent / "manifest.json").write_text(build_manifest(big.parent, 10, False).to_json())
    info([str(run), "--verify"])
    assert "verifying: 1 of 3, " in capsys.readouterr().err
