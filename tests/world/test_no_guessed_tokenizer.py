"""A model without its tokenizer is refused for evaluation, training and sampling on text; no other tokenizer is used."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import bardling.checkpoint.load as loading
from bardling.checkpoint.contents import write_model
from bardling.checkpoint.export import export_hf, export_nanogpt
from bardling.checkpoint.load import load, load_tokenizer_of
from bardling.cli.main import main
from bardling.config import ModelConfig, RunConfig
from bardling.data.tokens.tokenizer import Tokenizer, build_tokenizer
from bardling.data.tokens.vocabulary import byte_content
from bardling.errors import UserError
from bardling.interop.nanogpt_checkpoint import write_meta, write_nanogpt_checkpoint
from bardling.model.gpt import GPT
from bardling.training.run import train


@pytest.fixture
def refused(capsys):
    def call(*argv) -> str:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in argv])
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.count("\n") == 1
        return error

    return call


def model_folder(folder: Path, **files: bytes) -> Path:
    folder.mkdir()
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=300)
    write_model(folder, config, GPT(config, seed=1).state_dict(), None)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def nanogpt(folder: Path, vocab_size: int) -> Path:
    folder.mkdir(parents=True)
    model = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=16, vocab_size=vocab_size, gelu="erf")
    write_nanogpt_checkpoint(
        folder / "ckpt.pt",
        config=dataclasses.replace(RunConfig(), model=model),
        weights=GPT(model, seed=1).state_dict(),
        optimizer={},
        step=3,
        best_val_loss=None,
        out=folder,
        dataset="plays",
    )
    return folder


CASES = {
    "nothing": ({}, "has no tokenizer: copy the model's tokenizer.json there"),
    "sentencepiece": ({"tokenizer.model": b"x"}, "tokenizer.model: a tokenizer in this format is not read"),
    "unigram": ({"spiece.model": b"x", "tokenizer_config.json": b"{}"}, "spiece.model: a tokenizer in this format"),
    "wordpiece": ({"vocab.txt": b"x"}, "vocab.txt: a tokenizer in this format"),
    "tekken": ({"tekken.json": b"{}"}, "tekken.json: a tokenizer in this format"),
    "vocabulary alone": ({"vocab.json": b"{}"}, "vocab.json: a tokenizer in this format"),
    "merges alone": ({"merges.txt": b""}, "merges.txt: a tokenizer in this format"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_tokenizer_that_is_not_read_is_named_with_a_remedy(case, tmp_path):
    files, message = CASES[case]
    folder = model_folder(tmp_path / "model", **files)
    assert load(folder).tokenizer is None
    for call in (lambda: load_tokenizer_of(folder), load(folder).needed_tokenizer):
        with pytest.raises(UserError) as caught:
            call()
        assert message in str(caught.value)
        assert files == {} or f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')" in str(caught.value)
    (note,) = export_hf(str(folder), tmp_path / "out")
    assert message in note


def test_no_command_guesses(refused, corpus, tmp_path):
    folder = model_folder(tmp_path / "model", **{"tokenizer.model": b"x"})
    for argv in (
        ("eval", folder, "--data", corpus, "--device", "cpu"),
        ("sample", folder, "--prompt", "The", "--device", "cpu"),
        ("train", "quickstart", "--model.init", folder, "--data.source", corpus, "--device", "cpu", "--out", tmp_path / "run"),
    ):
        assert "tokenizer.model: a tokenizer in this format is not read" in refused(*argv), argv
    asked = dataclasses.replace(RunConfig(), device="cpu", model=ModelConfig(init=str(folder)))
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        train(asked, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_tokens_need_no_tokenizer(tmp_path, capsys):
    folder, data = model_folder(tmp_path / "model"), tmp_path / "data"
    data.mkdir()
    for split in ("train", "val"):
        (np.arange(400, dtype=np.uint16) % 300).tofile(data / f"{split}.bin")
    main(["eval", str(folder), "--data", str(data), "--device", "cpu"])
    assert "nats per token" in capsys.readouterr().out


def test_a_user_may_state_the_tokenizer_of_a_model_without_one(tiny, change, tmp_path, capsys):
    folder = model_folder(tmp_path / "model")
    asked = change(
        tiny, optim={"warmup_steps": 0}, model={"init": str(folder)}, data={"tokenizer": "bpe:280"}, train={"steps": 1}
    )
    train(asked, tmp_path / "run")
    shown = " ".join(capsys.readouterr().out.split())
    assert f"WARNING: {folder}: has no tokenizer, and 300 tokens" in shown


# ---- nanoGPT ----


@pytest.mark.parametrize("size", [50257, 50304, 50432, 51200])
def test_a_nanogpt_checkpoint_with_gpt2s_vocabulary_fetches_its_tokenizer(size, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "gpt2_tokenizer", lambda: None)  # as on a machine that has never fetched GPT-2
    stand_in = tmp_path / "fetched"
    stand_in.mkdir()
    Tokenizer(byte_content(), "test").save(stand_in)
    monkeypatch.setattr(loading, "gpt2_tokenizer_file", lambda: stand_in / "tokenizer.json")
    folder = nanogpt(tmp_path / "out", size)
    assert load(folder).needed_tokenizer().kind == "byte"
    assert load_tokenizer_of(folder).kind == "byte"


def test_without_gpt2s_tokenizer_the_checkpoint_is_refused_for_text(tmp_path, monkeypatch, refused, corpus):
    def unreachable() -> Path:
        raise UserError("data.tokenizer = 'gpt2': cannot be downloaded; or use a copy of GPT-2's tokenizer.json")

    monkeypatch.setattr(loading, "gpt2_tokenizer", lambda: None)
    monkeypatch.setattr(loading, "gpt2_tokenizer_file", unreachable)
    folder = nanogpt(tmp_path / "out", 50304)
    for argv in (
        ("eval", folder / "ckpt.pt", "--data", corpus, "--device", "cpu"),
        ("sample", folder, "--prompt", "The", "--device", "cpu"),
    ):
        assert "has GPT-2's vocabulary, but its tokenizer is not available: data.tokenizer = 'gpt2'" in refused(*argv)
    # A copy beside it, in either form, is the remedy.
    Tokenizer(byte_content(), "test").save(folder)
    assert load(folder).needed_tokenizer().kind == "byte"


@pytest.mark.parametrize("size", [65, 32000, 50256, 51201, 128256])
def test_other_vocabularies_are_not_taken_for_gpt2s(size, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "gpt2_tokenizer", lambda: build_tokenizer("byte", ()))
    loaded = load(nanogpt(tmp_path / "out", size))
    assert loaded.tokenizer is None
    with pytest.raises(UserError, match=rf"ckpt\.pt: no tokenizer of its vocabulary of {size:,} tokens was found: copy"):
        loaded.needed_tokenizer()


def test_a_meta_pkl_of_another_vocabulary_is_not_used(tmp_path):
    folder = nanogpt(tmp_path / "out", 4)
    write_meta(folder / "meta.pkl", build_tokenizer("char", ["abcd"]))
    assert load(folder).needed_tokenizer().encode("abcd").tolist() == [0, 1, 2, 3]
    write_meta(folder / "meta.pkl", build_tokenizer("char", ["abcdef"]))
    with pytest.raises(UserError, match=r"meta\.pkl: has a vocabulary of 6 tokens, but .*ckpt\.pt only 4"):
        load(folder).needed_tokenizer()


def test_a_pair_of_files_serves_a_model_folder_and_a_nanogpt_checkpoint(tmp_path, corpus, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train([str(corpus)], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    folder = model_folder(tmp_path / "model")
    out = nanogpt(tmp_path / "out", trained.get_vocab_size())
    for where in (folder, out):
        trained.save_model(str(where))
        assert load(where).needed_tokenizer().encode("The queen").tolist() == trained.encode("The queen").ids
    (folder / "config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), "bos_token_id": 0, "eos_token_id": 0})
    )
    main(["eval", str(folder), "--data", str(corpus), "--device", "cpu", "--windows", "4"])
    assert "bits per byte" in capsys.readouterr().out


def test_an_export_to_nanogpt_and_back_keeps_its_tokenizer(tiny, change, tmp_path):
    train(change(tiny, optim={"warmup_steps": 0}, train={"steps": 1}, sample={"every": 0}), tmp_path / "run", quiet=True)
    export_nanogpt(str(tmp_path / "run"), tmp_path / "out")
    assert load(tmp_path / "out").needed_tokenizer().kind == "char"
