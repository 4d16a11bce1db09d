"""A run goes to another trainer's format and comes back equal to the bit; the command line refuses hostile files by name."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from bardling.checkpoint.contents import read_checkpoint
from bardling.checkpoint.export import export_hf, export_nanogpt
from bardling.checkpoint.load import load
from bardling.checkpoint.run_folder import RunFolder
from bardling.cli.main import main
from bardling.config import RunConfig
from bardling.errors import UserError
from bardling.files.safe_pickle import load_plain_pickle
from bardling.training.run import resume, train


@pytest.fixture
def tiny(tiny, change) -> RunConfig:
    """Without a warm-up, so that a run may have a single step, without samples, and padded as imported models are."""
    return change(tiny, model={"vocab_multiple": 64}, optim={"warmup_steps": 0}, sample={"every": 0})


def newest(run: Path) -> Path:
    return RunFolder(run).store().latest(print)


def same_tensors(one, other) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def refused(capsys, *argv: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("bardling: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.parametrize(("bias", "gelu"), [(True, "erf"), (False, "erf"), (True, "tanh")])
def test_to_nanogpt_and_back(tiny, change, tmp_path, bias, gelu):
    first = change(tiny, model={"bias": bias, "gelu": gelu}, train={"steps": 12, "batch_size": 4, "log_every": 1})
    train(first, tmp_path / "first", quiet=True)
    notes = export_nanogpt(str(tmp_path / "first"), tmp_path / "out", dataset="plays")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ckpt.pt", "meta.pkl"]
    assert [any("tanh" in note for note in notes), any("data/plays/" in note for note in notes)] == [gelu == "tanh", True]

    checkpoint = read_checkpoint(newest(tmp_path / "first"))
    came = load(tmp_path / "out", training=True)
    same_tensors(came.state, checkpoint.model_state)
    assert (came.step, came.config.bias) == (12, bias)
    assert came.best_val_loss == pytest.approx(checkpoint.training["best_val_loss"], rel=1e-7)  # float32 in nanoGPT's file
    assert came.tokenizer.fingerprint == load(tmp_path / "first").tokenizer.fingerprint
    same_tensors(came.optimizer_tensors, checkpoint.optimizer_tensors)
    if gelu == "tanh":
        return  # nanoGPT has no such model, so what comes back is another function of the same weights

    # Going on from the file is going on from the run: weights, Adam's state, step and data all continue.
    longer = change(first, train={"steps": 20}, optim={"decay_steps": 12}, checkpoint={"every": 4})
    train(longer, tmp_path / "second", continue_from=str(tmp_path / "out" / "ckpt.pt"), quiet=True)
    resume(tmp_path / "first", change(longer, model={"vocab_size": came.config.vocab_size}), quiet=True)
    one, two = (read_checkpoint(newest(tmp_path / name)) for name in ("first", "second"))
    assert (one.training["step"], one.training["samples"]) == (two.training["step"], two.training["samples"]) == (20, 80)
    same_tensors(one.model_state, two.model_state)
    same_tensors(one.optimizer_tensors, two.optimizer_tensors)


def test_the_exported_meta_is_plain_and_writes_nanogpts_way(tiny, change, tmp_path):
    train(change(tiny, train={"steps": 1}), tmp_path / "run", quiet=True)
    export_nanogpt(str(tmp_path / "run"), tmp_path / "out")
    meta = load_plain_pickle(tmp_path / "out" / "meta.pkl")
    assert meta == pickle.loads((tmp_path / "out" / "meta.pkl").read_bytes())
    assert list(meta) == ["vocab_size", "itos", "stoi"]
    tokenizer = load(tmp_path / "run").tokenizer
    text = "The king and the rose"
    assert [meta["stoi"][char] for char in text] == tokenizer.encode(text).tolist()
    assert "".join(meta["itos"][number] for number in tokenizer.encode(text)) == text
    assert meta["vocab_size"] == tokenizer.vocab_size == len(meta["itos"])


def test_a_vocabulary_with_an_end_token_comes_back_too(tiny, change, corpus, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(corpus.read_text()[: 8000 + number])
    config = change(tiny, train={"steps": 1}, data={"source": str(folder)})
    train(config, tmp_path / "run", quiet=True)
    own = load(tmp_path / "run").tokenizer
    assert own.eot_id is not None
    export_nanogpt(str(tmp_path / "run"), tmp_path / "out")
    assert load(tmp_path / "out").tokenizer.fingerprint == own.fingerprint
    main(["sample", str(tmp_path / "out" / "ckpt.pt"), "--max_new_tokens", "4", "--seed", "1"])


def test_another_tokenizer_gets_no_meta_but_a_note(tiny, change, tmp_path):
    train(change(tiny, train={"steps": 1}, data={"tokenizer": "byte"}), tmp_path / "run", quiet=True)
    notes = export_nanogpt(str(tmp_path / "run"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ckpt.pt"]
    assert any("not sample from it" in note for note in notes)


@pytest.mark.parametrize(("bias", "block_size"), [(True, 24), (False, 40)])
def test_to_hugging_face_and_back(tiny, change, tmp_path, bias, block_size):
    transformers = pytest.importorskip("transformers")
    config = change(tiny, model={"bias": bias, "block_size": block_size}, train={"steps": 6})
    train(config, tmp_path / "run", quiet=True)
    export_hf(str(tmp_path / "run"), tmp_path / "hf")
    own = load(tmp_path / "run")
    same_tensors(load(tmp_path / "hf").state, own.state)

    # The exported folder and the checkpoint as it lies both open, context length and logits included.
    tokens = torch.arange(2 * block_size).reshape(2, block_size) * 7 % own.config.vocab_size
    with torch.no_grad():
        expected = own.build()(tokens)
    text = "The rose and the storm met 3 times."
    for folder in (tmp_path / "hf", newest(tmp_path / "run")):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        assert model.config.n_positions == block_size
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer(text)["input_ids"] == own.tokenizer.encode(text).tolist()
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    # What transformers saves comes back as well, and a run that starts from it starts from those weights.
    model.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    same_tensors(load(tmp_path / "theirs").state, own.state)
    started = change(config, model={"init": str(tmp_path / "hf")}, train={"steps": 1}, optim={"lr": 1e-30})
    train(started, tmp_path / "again", quiet=True)
    same_tensors(load(tmp_path / "again").state, own.state)


def test_exports_overwrite_nothing(tiny, change, tmp_path, capsys):
    run = tmp_path / "run"
    train(change(tiny, train={"steps": 1}), run, quiet=True)
    for kind in ("hf", "nanogpt"):
        out = tmp_path / kind
        main(["export", str(run), "--format", kind, "--out", str(out)])
        before = {path: path.read_bytes() for path in out.iterdir()}
        assert "already exists" in refused(capsys, "export", run, "--format", kind, "--out", out)
        assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_format_that_cannot_hold_the_model_is_refused_before_training(tiny, change, tmp_path):
    for name, model, message in (
        (
            "nanogpt",
            {"family": "llama"},
            "cannot be exported for nanoGPT, which does not support model.norm = rmsnorm",
        ),
        ("hf", {"logit_softcap": 15.0}, "cannot be exported for transformers: model.logit_softcap = 15.0"),
    ):
        config = change(tiny, model=model, checkpoint={"export": (name,)})
        with pytest.raises(UserError, match=f"checkpoint.export = '{name}': the model {message}"):
            train(config, tmp_path / name, quiet=True)
        assert not (tmp_path / name / "metrics.jsonl").exists()


def test_an_export_tells_nothing_of_this_machine(tiny, change, tmp_path):
    train(change(tiny, train={"steps": 1}), tmp_path / "run", quiet=True)
    export_hf(str(tmp_path / "run"), tmp_path / "hf")
    for path in (tmp_path / "hf").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


# ---- hostile files, as a user would meet them -----------------------------------------------------------------------


class Creates:
    """Pickles into a program that makes the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_programs_in_checkpoints_are_refused_by_every_command(tiny, tmp_path, capsys):
    victim, evil = tmp_path / "made", tmp_path / "evil"
    evil.mkdir()
    for name in ("ckpt.pt", "checkpoint_005000.bin"):
        path = evil / name
        torch.save({"model": {}, "model_args": {}, "model_state_dict": {}, "config": {}, "extra": Creates(victim)}, path)
        (tmp_path / "text.txt").write_text("some text\n" * 100)
        for argv in (
            ("sample", path),
            ("eval", path, "--data", tmp_path / "text.txt"),
            ("export", path, "--out", tmp_path / "out"),
            ("train", "quickstart", "--model.init", path, "--data.source", tmp_path / "text.txt", "--out", tmp_path / "run"),
        ):
            message = refused(capsys, *argv)
            assert str(path) in message
            assert "refused" in message
            assert "mkdir" in message
        refused(capsys, "info", path)
    for argv in (
        ("sample", f"--out_dir={evil}"),
        ("train", f"--out_dir={evil}", "--init_from=resume", "--device=cpu", f"--dataset={tmp_path}"),
        ("train", f"--out_dir={evil}", "--init_from=resume", "--eval_only=True", "--device=cpu"),
    ):
        refused(capsys, *argv)
    assert not victim.exists()
    assert sorted(path.name for path in evil.iterdir()) == ["checkpoint_005000.bin", "ckpt.pt"]
    torch.load(evil / "ckpt.pt", weights_only=False)
    assert victim.exists(), "it would have run: the test can fail"


def test_programs_in_data_folders_are_refused_by_every_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    victim = tmp_path / "made"
    program = pickle.dumps({"vocab_size": 3, "itos": {}, "stoi": {}, "extra": Creates(victim)})
    plays, shards, llmc = (tmp_path / "data" / name for name in ("plays", "shards", "llmc"))
    for folder in (plays, shards, llmc):
        folder.mkdir(parents=True)
    for split in ("train", "val"):
        np.arange(3000, dtype=np.uint16).tofile(plays / f"{split}.bin")
        (llmc / f"x_{split}_000000.bin").write_bytes(program.ljust(2048, b"\0"))
    (plays / "meta.pkl").write_bytes(program)
    for split in ("train", "validation"):
        np.save(shards / f"x_{split}.npy.000.npy", np.array([Creates(victim)], dtype=object), allow_pickle=True)
    flags = ["--device=cpu", "--compile=False", "--out_dir=out"]
    assert "data/plays/meta.pkl" in refused(capsys, "train", "--dataset=plays", *flags)
    assert "x_train" in refused(capsys, "train", "quickstart", "--data.source", shards, "--out", "out")
    assert "x_train" in refused(capsys, "train", "quickstart", "--data.source", llmc, "--out", "out")
    for folder in (plays, shards, llmc):
        refused(capsys, "info", folder)
    assert not (tmp_path / "out").exists()
    assert not victim.exists()
    pickle.loads(program)
    assert victim.exists(), "it would have run: the test can fail"


def test_resume_goes_on_with_other_trainers_checkpoints(tiny, change, corpus, tmp_path, capsys):
    train(change(tiny, model={"gelu": "erf"}, train={"steps": 6}), tmp_path / "run", quiet=True)
    export_nanogpt(str(tmp_path / "run"), tmp_path / "out")
    content = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    content["config"] |= {"device": "cuda", "dtype": "float16", "init_from": "gpt2", "learning_rate": "high"}
    torch.save(content, tmp_path / "out" / "ckpt.pt")
    sizes = {key: content["model_args"][key] for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
    plan = {"total_batch_size": 64, "micro_batch_size": 2, "sequence_length": 16, "max_lr": 1e-3, "max_steps": 9}
    other = {
        **{"model_state_dict": content["model"], "config": sizes, "step": 6, "optimizer_state_dict": content["optimizer"]},
        **{
            "train_config": {**plan, "warmup_steps": 2},
            "dataset_config": {"dataset_dir": "d", "dataset_name": "n"},
            "name": None,
        },
    }
    torch.save(other, tmp_path / "out" / "checkpoint_000006.bin")
    data = ["--data.source", str(corpus), "--data.tokenizer", "char", "--data.val_fraction", "0.1"]
    for number, name in enumerate(("out", "out/ckpt.pt", "out/checkpoint_000006.bin")):
        run = tmp_path / f"on{number}"
        main(["resume", str(tmp_path / name), "--out", str(run), *data, "--train.steps", "9"])
        checkpoint = read_checkpoint(newest(run))
        assert (checkpoint.training["step"], checkpoint.training["samples"]) == (9, 36)
        assert checkpoint.optimizer_tensors["transformer.ln_f.weight.step"] == 9
        assert checkpoint.model_config.gelu == ("tanh" if number == 2 else "erf")
    capsys.readouterr()
    assert "--out" in refused(capsys, "resume", tmp_path / "run", "--out", tmp_path / "x")
    assert "d/n" in refused(capsys, "resume", tmp_path / "out" / "checkpoint_000006.bin", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_info_says_what_other_trainers_files_are(tiny, change, tmp_path, capsys):
    train(change(tiny, train={"steps": 2}), tmp_path / "run", quiet=True)
    export_nanogpt(str(tmp_path / "run"), tmp_path / "out")
    for path in (tmp_path / "out", tmp_path / "out" / "ckpt.pt"):
        capsys.readouterr()
        main(["info", str(path)])
        shown = capsys.readouterr().out
        assert "nanoGPT" in shown
        assert "2 layers" in shown


def test_a_default_run_config_is_exportable_without_a_run(tmp_path, tiny, change):
    """A checkpoint that was moved out of its run can still be exported."""
    train(change(tiny, train={"steps": 1}), tmp_path / "run", quiet=True)
    newest(tmp_path / "run").rename(tmp_path / "moved")
    export_nanogpt(str(tmp_path / "moved"), tmp_path / "out")
    same_tensors(load(tmp_path / "out").state, load(tmp_path / "moved").state)
    assert RunConfig().model.gelu == "tanh"
