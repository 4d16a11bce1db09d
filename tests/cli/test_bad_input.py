"""User errors, in one table: each prints one line with the remedy, exits with status 2, and leaves all files unchanged."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from bardling.cli.main import main
from bardling.config.recipes import config_to_toml
from bardling.monitor.jsonl import read_jsonl
from bardling.training.run import train


@pytest.fixture
def place(tiny, tmp_path, change):
    """A folder with a recipe, in which a dataset and a finished run can be made."""

    class Place:
        path = tmp_path

        def __init__(self):
            (tmp_path / "tiny.toml").write_text(config_to_toml(change(tiny, train={"steps": 8})))

        def prepare(self):
            main(["prepare", tiny.data.source, "--out", str(tmp_path / "data"), "--tokenizer", "char"])
            return tmp_path / "data"

        def run(self):
            return train(change(tiny, train={"steps": 8}), tmp_path / "run", quiet=True).folder

    return Place()


def fail(capsys, *argv):
    """Run a command that must fail; returns its one-line message."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.count("\n") == 1, error
    assert error.startswith("bardling: ")
    assert "Traceback" not in error
    return error


def missing_source(place):
    return ["--data.source", place.path / "nowhere.txt"], "nowhere.txt"


def empty_source(place):
    (place.path / "empty.txt").write_text("")
    return ["--data.source", place.path / "empty.txt"], "empty.txt"


def empty_folder(place):
    (place.path / "hollow").mkdir()
    return ["--data.source", place.path / "hollow"], "hollow"


def not_text(place):
    (place.path / "noise.txt").write_bytes(bytes(range(128, 256)) * 10)
    return ["--data.source", place.path / "noise.txt"], "UTF-8"


def missing_field(place):
    (place.path / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n')
    return ["--data.source", f"{place.path / 'a.jsonl'}:text"], "text"


def broken_json(place):
    (place.path / "b.jsonl").write_text('{"text": "x"}\n{"text": \n')
    return ["--data.source", place.path / "b.jsonl"], "line 2"


def too_short(place):
    (place.path / "short.txt").write_text("to be or not to be")
    return ["--data.source", place.path / "short.txt"], "block_size"


def unknown_tokenizer(place):
    return ["--data.tokenizer", "bytes"], "byte"


def missing_tokenizer(place):
    return ["--data.tokenizer", place.path / "tokenizer.json"], "tokenizer.json"


def heads_do_not_divide(place):
    return ["--model.n_embd", "15"], "model.n_embd = 15 is not divisible by model.n_head = 2: try --model.n_embd 14 or 16"


def batch_does_not_divide(place):
    return ["--train.micro_batch", "3"], "use --train.micro_batch 2"


def vocabulary_too_small(place):
    return ["--model.vocab_size", "5"], "model.vocab_size = 5"


def unknown_device(place):
    return ["--device", "tpu"], "tpu"


def no_such_gpu(place):
    return ["--device", "cuda:99"], "cuda"


def float16_on_cpu(place):
    return ["--precision", "float16"], "float32 or bfloat16"


def warmup_as_long_as_the_decay(place):
    return ["--optim.warmup_steps", "8", "--optim.decay_steps", "8"], "warmup_steps = 8"


def out_is_a_file(place):
    (place.path / "taken").write_text("precious")
    return ["--out", place.path / "taken"], "taken"


def out_holds_something(place):
    (place.path / "full").mkdir()
    (place.path / "full" / "thesis.tex").write_text("precious")
    return ["--out", place.path / "full"], "not an empty folder"


def out_on_a_system_that_takes_no_files(place):
    return ["--out", "/proc/bardling-run"], "/proc/bardling-run"


def run_exists(place):
    place.run()
    return ["--out", place.path / "run"], "bardling resume"


def cut_dataset(place):
    data = place.prepare()
    file = data / "train-00000.bin"
    file.write_bytes(file.read_bytes()[:-10])
    return ["--data.source", data], "train-00000.bin"


def ids_outside_the_vocabulary(place):
    data = place.prepare()
    file = data / "train-00000.bin"
    tokens = np.fromfile(file, dtype="<u2")
    tokens[:] = 60000
    tokens.tofile(file)
    return ["--data.source", data], "train-00000.bin"


def missing_shard(place):
    data = place.prepare()
    (data / "val-00000.bin").unlink()
    return ["--data.source", data], "val-00000.bin"


def broken_manifest(place):
    data = place.prepare()
    (data / "manifest.json").write_text("{")
    return ["--data.source", data], "manifest.json"


def dataset_of_another_tokenizer(place):
    data = place.prepare()
    other = json.loads((data / "tokenizer.json").read_text())
    folder = place.path / "other"
    folder.mkdir()
    main(["prepare", str(place.path / "tiny.toml"), "--out", str(place.path / "other" / "d"), "--tokenizer", "byte"])
    assert other
    return ["--data.source", data, "--data.tokenizer", folder / "d" / "tokenizer.json"], "tokenizer"


CASES = [
    missing_source,
    empty_source,
    empty_folder,
    not_text,
    missing_field,
    broken_json,
    too_short,
    unknown_tokenizer,
    missing_tokenizer,
    heads_do_not_divide,
    batch_does_not_divide,
    vocabulary_too_small,
    unknown_device,
    no_such_gpu,
    float16_on_cpu,
    warmup_as_long_as_the_decay,
    out_is_a_file,
    out_holds_something,
    out_on_a_system_that_takes_no_files,
    run_exists,
    cut_dataset,
    ids_outside_the_vocabulary,
    missing_shard,
    broken_manifest,
    dataset_of_another_tokenizer,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_train_refuses(case, place, capsys):
    options, says = case(place)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in place.path.rglob("*") if path.is_file()}
    out = [] if "--out" in options else ["--out", place.path / "new"]
    assert says in fail(capsys, "train", place.path / "tiny.toml", *options, *out)
    after = {path: path.read_bytes() for path in place.path.rglob("*") if path.is_file() and "new" not in path.parts}
    assert after == before, "nothing that was there is changed"
    assert not list(place.path.glob(".*partial*")), "nothing half-made is left"


def resume_of_nothing(place, run):
    return ["resume", place.path / "nosuch"], "no such folder"


def resume_of_no_run(place, run):
    (place.path / "stuff").mkdir()
    return ["resume", place.path / "stuff"], "is not a run folder"


def resume_with_another_architecture(place, run):
    return ["resume", run, "--model.n_layer", "3"], "model.n_layer = 3: a run that has started keeps 2"


def resume_with_another_seed(place, run):
    return ["resume", run, "--seed", "2"], "seed = 2"


def resume_with_fewer_steps_than_are_done(place, run):
    return [
        "resume",
        run,
        "--train.steps",
        "7",
    ], f"train.steps = 7: {run} has already completed 8 steps; set it to at least that"


def resume_with_another_optimizer(place, run):
    return ["resume", run, "--optim.name", "muon"], "optim.name = 'muon': a run that has started keeps 'adamw'; start a new run"


def resume_of_a_text(place, run):
    (place.path / "notes.txt").write_text("not a checkpoint")
    return ["resume", place.path / "notes.txt"], "is not a checkpoint: give a run folder, a checkpoint folder, or a file"


def resume_with_other_data(place, run):
    record = json.loads((run / "dataset.json").read_text())
    (run / "dataset.json").write_text(json.dumps({**record, "fingerprint": "0" * 16}))
    return ["resume", run], "is not the dataset"


def resume_with_a_broken_config(place, run):
    (run / "config.toml").write_text("[model]\nn_laye = 3\n")
    return ["resume", run], "did you mean 'n_layer'"


def sample_of_another_architecture(place, run):
    path = next((run / "checkpoints").iterdir())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    return ["sample", path], "bert"


def sample_of_unknown_characters(place, run):
    says = "character 'ß' (U+00DF) at line 1, column 5 is not in the vocabulary of"
    return ["sample", run, "--prompt", "kingß"], says


def sample_with_two_prompts(place, run):
    return ["sample", run, "--prompt", "a", "--prompt_file", "b"], "one of them"


def sample_colder_than_allowed(place, run):
    return ["sample", run, "--temperature", "-1"], "bardling: temperature = -1.0: must be at least 0"


def sample_hotter_than_allowed(place, run):
    return ["sample", run, "--temperature", "inf"], "bardling: temperature = inf: must be at least 0 and finite"


def sample_of_a_text(place, run):
    (place.path / "notes.txt").write_text("not a checkpoint")
    return ["sample", place.path / "notes.txt"], "is not a checkpoint: give a run folder, a checkpoint folder, or a file"


def eval_on_foreign_tokens(place, run):
    main(["prepare", str(place.path / "tiny.toml"), "--out", str(place.path / "bytes"), "--tokenizer", "byte"])
    return ["eval", run, "--data", place.path / "bytes"], "another tokenizer"


def eval_of_unknown_characters(place, run):
    (place.path / "foreign.txt").write_text("größer " * 1000)
    says = "characters: remove it, or use the tokenizer 'byte', which can encode any text"
    return ["eval", run, "--data", place.path / "foreign.txt"], says


def export_of_a_diverged_model(place, run):
    return ["export", diverged(run), "--out", place.path / "out"], "contains NaN or infinity: the model is damaged"


def export_of_a_diverged_model_for_nanogpt(place, run):
    argv = ["export", diverged(run), "--format", "nanogpt", "--out", place.path / "out"]
    return argv, "contains NaN or infinity: the model is damaged"


def diverged(run):
    """A checkpoint of `run` with a NaN weight."""
    path = next((run / "checkpoints").iterdir())
    tensors = load_file(path / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = math.nan
    save_file(tensors, path / "model.safetensors")
    return path


def info_of_a_text(place, run):
    (place.path / "notes.txt").write_text("not a checkpoint")
    return ["info", place.path / "notes.txt"], "is not a checkpoint: give a run folder, a checkpoint folder, or a file"


def info_of_nothing(place, run):
    return ["info", place.path / "nosuch"], "no such file"


def prepare_over_something(place, run):
    return ["prepare", place.path / "tiny.toml", "--out", run], "run"


def export_over_something(place, run):
    return ["export", run, "--out", run], "already exists"


@pytest.mark.parametrize(
    "case",
    [
        resume_of_nothing,
        resume_of_no_run,
        resume_with_another_architecture,
        resume_with_another_seed,
        resume_with_fewer_steps_than_are_done,
        resume_with_another_optimizer,
        resume_of_a_text,
        resume_with_other_data,
        resume_with_a_broken_config,
        sample_of_another_architecture,
        sample_of_unknown_characters,
        sample_with_two_prompts,
        sample_colder_than_allowed,
        sample_hotter_than_allowed,
        sample_of_a_text,
        eval_on_foreign_tokens,
        eval_of_unknown_characters,
        info_of_a_text,
        info_of_nothing,
        prepare_over_something,
        export_over_something,
        export_of_a_diverged_model,
        export_of_a_diverged_model_for_nanogpt,
    ],
    ids=lambda case: case.__name__,
)
def test_other_commands_refuse(case, place, capsys):
    run = place.run()
    argv, says = case(place, run)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert says in fail(capsys, *argv)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(tiny, tmp_path, capsys):
    run = train(tiny, tmp_path / "run", quiet=True).folder
    newest = run / "checkpoints" / "step-000030" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(bytes(data))
    main(["sample", str(run), "--max_new_tokens", "3", "--seed", "1"])
    error = capsys.readouterr().err
    assert "step-000030" in error
    assert "model.safetensors" in error
    with pytest.raises(SystemExit) as stop:
        main(["info", str(run), "--verify"])
    assert stop.value.code == 2
    assert "step-000030: model.safetensors" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1.2 MB, room for two checkpoints of the run below and no more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(disk)]
    if not shutil.which("mount") or os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=False)


def checkpoints_and_steps(run):
    steps = [record["step"] for record in read_jsonl(run / "metrics.jsonl") if record["kind"] == "train"]
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), steps


def test_a_full_disk_does_not_stop_training_and_only_an_unsaved_end_is_an_error(tiny, change, tmp_path, bardling, small_disk):
    config = change(tiny, model={"n_embd": 32}, train={"steps": 60}, checkpoint={"every": 5, "keep_last": 20})
    (tmp_path / "tiny.toml").write_text(config_to_toml(config))
    run = small_disk / "run"
    done = bardling("train", tmp_path / "tiny.toml", "--out", run, check=None)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "checkpoints will be kept, but" in done.stdout, "the disk was too small from the start, and that was said"
    assert "was NOT saved" in done.stderr
    assert "WARNING: the checkpoint of step" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert re.search(
        r"the state at step 60 could not be saved \(.*(the disk is full|No space left).*(make room|free some space)\)", last
    )
    assert f"bardling resume {run}" in last
    saved, steps = checkpoints_and_steps(run)
    assert steps == list(range(1, 61)), "training went on to its end"
    assert saved
    assert max(saved) < 60
    checked = bardling("info", run, "--verify")
    assert "all checksums match" in checked.stdout
    shutil.copytree(run, tmp_path / "moved")  # to where there is room
    assert bardling("resume", tmp_path / "moved").returncode == 0
    assert checkpoints_and_steps(tmp_path / "moved")[0][-1] == 60


def test_a_disk_with_space_again_is_used_at_the_next_interval(tiny, change, tmp_path, monkeypatch, small_disk, capsys):
    from bardling.checkpoint import saver
    from bardling.training.run import train

    config = change(
        tiny, model={"n_embd": 32}, train={"steps": 60}, checkpoint={"every": 10, "keep_last": 1, "save_best": False}
    )
    real = saver.Saver.save
    ballast = small_disk / "ballast"

    def save(self, state, *, last=False):
        self.wait()
        if state.step == 20:
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(b"x" * 4096):
                    pass
        real(self, state, last=last)
        self.wait()
        ballast.unlink(missing_ok=True)

    monkeypatch.setattr(saver.Saver, "save", save)
    train(config, small_disk / "run", quiet=True)
    assert "the checkpoint of step 20 was NOT saved" in capsys.readouterr().err
    saved, steps = checkpoints_and_steps(small_disk / "run")
    assert (saved, steps) == ([60], list(range(1, 61)))


def test_a_disk_too_small_for_two_checkpoints_is_an_error_before_anything_is_written(
    tiny, change, tmp_path, bardling, small_disk
):
    config = change(tiny, model={"n_embd": 64}, checkpoint={"every": 10, "keep_last": 1})
    (tmp_path / "tiny.toml").write_text(config_to_toml(config))
    done = bardling("train", tmp_path / "tiny.toml", "--out", small_disk / "run", check=2)
    message = (
        r"1\.\d\d MB are free, but a checkpoint of this model takes 1\.\d\d MB "
        r"and two are needed .*\(2\.\d\d MB\): free some space"
    )
    assert re.search(message, done.stderr)
    assert list(small_disk.iterdir()) == []
