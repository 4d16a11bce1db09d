"""Exports: their dtype, their special ids and model card; and a killed export does not block the next one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bardling.checkpoint.export import export_gguf, export_hf, export_nanogpt
from bardling.checkpoint.load import load
from bardling.cli.main import main
from bardling.errors import UserError
from bardling.planning.costs import parameters
from bardling.training.run import train


@pytest.fixture
def run(tiny, change, tmp_path):
    train(change(tiny, optim={"warmup_steps": 0}, train={"steps": 2}, sample={"every": 0}), tmp_path / "run", quiet=True)
    return tmp_path / "run"


@pytest.fixture
def gone():
    """The number of a process that is no more."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_what_killed_exports_left_is_removed_by_the_next(run, tmp_path, gone):
    living = os.getppid()
    for number in (gone, os.getpid(), living):  # in a container a killed process's number may be ours
        for name, file in (("hf", "model.safetensors"), ("nano", "ckpt.pt")):
            (tmp_path / f".{name}.{number}.partial").mkdir()
            (tmp_path / f".{name}.{number}.partial" / file).write_bytes(b"half")
    export_hf(str(run), tmp_path / "hf")
    export_nanogpt(str(run), tmp_path / "nano")
    assert sorted(path.name for path in tmp_path.glob(".*")) == [f".hf.{living}.partial", f".nano.{living}.partial"]
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size > 4
    assert sorted(path.name for path in (tmp_path / "nano").iterdir()) == ["ckpt.pt", "meta.pkl"]


def test_weights_are_written_in_the_chosen_dtype_or_their_own(run, tmp_path):
    export_hf(str(run), tmp_path / "own")
    assert export_hf(str(run), tmp_path / "half", dtype="bfloat16") == ["weights: bfloat16"]
    assert export_hf(str(tmp_path / "half"), tmp_path / "again") == ["weights: bfloat16"]
    whole, half, again = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "half", "again"))
    for name, value in whole.items():
        assert torch.equal(half[name], value.bfloat16())
        assert torch.equal(again[name], half[name])
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    model = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.bfloat16


def test_weights_beyond_the_range_of_a_dtype_are_refused(run, tmp_path):
    export_hf(str(run), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["transformer.wte.weight"][0, 0] = 1e5
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    for export, out, dtype in ((export_hf, "half", "float16"), (export_gguf, "half.gguf", "f16")):
        with pytest.raises(UserError, match=r"transformer.wte.weight contains|token_embd.weight exceeds the range of float16"):
            export(str(tmp_path / "model"), tmp_path / out, dtype=dtype)
        assert not (tmp_path / out).exists()


def test_a_folder_without_a_tokenizer_keeps_its_special_ids(run, tmp_path):
    export_hf(str(run), tmp_path / "model")
    for path in (tmp_path / "model").glob("tokenizer*"):
        path.unlink()
    (tmp_path / "model" / "generation_config.json").unlink(missing_ok=True)
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**values, **ids}))
    export_hf(str(tmp_path / "model"), tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "out" / name).read_text())
        assert {key: found[key] for key in ids} == ids, name


def test_the_model_card_states_what_the_run_recorded(run, tmp_path):
    export_hf(str(run), tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    (record,) = [entry for entry in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if entry["kind"] == "val"]
    data, config = json.loads((run / "dataset.json").read_text()), load(run).config
    for part in (
        "license: unknown",
        f"GPT-2's architecture and {parameters(config):,} parameters",
        f"`corpus.txt`, {data['train_tokens']:,} tokens",
        f"{record['loss']:.4f} nats per token, {record['bits_per_byte']:.4f} bits per byte | 2 |",
        "2 steps of 4 sequences of 16 tokens",
        'data.tokenizer = "char"',
        "PyTorch",
    ):
        assert part in card
    export_hf(str(tmp_path / "hf"), tmp_path / "again")
    assert "Its training is not recorded here." in (tmp_path / "again" / "README.md").read_text()


def test_the_model_card_states_the_license(run, tmp_path, capsys):
    main(["export", str(run), "--license", "Apache-2.0", "--out", str(tmp_path / "hf")])
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "The license is `apache-2.0`." in card
    assert "No license" not in card
    for arguments, message in (
        (["--license", "apche-2.0"], "--license apche-2.0: unknown license: use an identifier of the hub"),
        (["--license", "mit\nx: y"], "--license mit x: y: unknown license"),
        (["--license", "mit", "--format", "gguf"], "--license: has no effect on the format gguf"),
    ):
        suffix = ".gguf" if "gguf" in arguments else ""
        with pytest.raises(SystemExit) as caught:
            main(["export", str(run), *arguments, "--out", str(tmp_path / f"other{suffix}")])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / f"other{suffix}").exists()


def test_the_python_in_a_model_card_runs(tiny, change, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    config = change(tiny, data={"tokenizer": "byte"}, optim={"warmup_steps": 0}, train={"steps": 1}, model={"block_size": 128})
    train(config, tmp_path / "run", quiet=True)
    monkeypatch.chdir(tmp_path)
    export_hf("run", Path("hf"))
    code = re.search(r"```python\n(.*?)```", Path("hf/README.md").read_text(), re.DOTALL)[1]
    exec(code, {})
    assert capsys.readouterr().out.startswith("Once upon a time")
