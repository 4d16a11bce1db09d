"""`info` describes model folders of other programs, in one file or in shards, and calls only damaged ones damaged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bardling.cli.main import main
from bardling.training.run import train

transformers = pytest.importorskip("transformers")


def third_party(folder, kind="gpt2", **options):
    """A model as transformers saves it; returns its number of parameters."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=16, **sizes)
        model = transformers.GPT2LMHeadModel(config)
    else:
        shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}
        config = transformers.LlamaConfig(**shape, intermediate_size=48, max_position_embeddings=16, **sizes)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder, **options)
    return model.num_parameters()


def info(capsys, *argv):
    main(["info", *map(str, argv)])
    return capsys.readouterr().out


def refused(capsys, *argv):
    capsys.readouterr()  # transformers' progress bars
    with pytest.raises(SystemExit) as stop:
        main(["info", *map(str, argv)])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1), error
    return error


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_a_folder_of_transformers_is_described_and_found_healthy(tmp_path, capsys, kind, options):
    parameters = third_party(tmp_path / "model", kind, **options)
    shards = list((tmp_path / "model").glob("*.safetensors"))
    assert (len(shards) > 2) == bool(options)
    for argv in ([tmp_path / "model"], [tmp_path / "model", "--verify"]):
        out = info(capsys, *argv)
        assert f"{parameters:,} (" in out
        assert "97 entries" in out
        assert "damaged" not in out
    assert "only checkpoints of runs have checksums" in out


@pytest.mark.parametrize("content", ["{}", "[]", '{"manifest_version": 3, "files": {}}', "not JSON"])
def test_a_manifest_of_another_program_is_not_ours(tmp_path, capsys, content):
    third_party(tmp_path / "model")
    (tmp_path / "model" / "manifest.json").write_text(content)
    assert "all weights are readable and finite" in info(capsys, tmp_path / "model", "--verify")


def test_what_is_damaged_is_named(tmp_path, capsys):
    third_party(tmp_path / "model", max_shard_size="20KB")
    last = sorted((tmp_path / "model").glob("*.safetensors"))[-1]
    tensors, data = load_file(last), last.read_bytes()
    last.write_bytes(data[:-4])
    assert last.name in refused(capsys, tmp_path / "model", "--verify")
    last.unlink()
    assert last.name in refused(capsys, tmp_path / "model", "--verify")
    save_file({name: tensor / 0 for name, tensor in tensors.items()}, last)
    assert "contains NaN or infinity: the model is damaged" in refused(capsys, tmp_path / "model", "--verify")


def test_a_checkpoint_and_an_export_of_a_run(tiny, change, tmp_path, capsys):
    config = change(tiny, optim={"warmup_steps": 0}, train={"steps": 1}, sample={"every": 0})
    run = train(config, tmp_path / "run", quiet=True).folder
    (checkpoint,) = (run / "checkpoints").iterdir()
    main(["export", str(run), "--out", str(tmp_path / "hf")])
    assert "all checksums match" in info(capsys, checkpoint, "--verify")
    assert "all weights are readable and finite" in info(capsys, tmp_path / "hf", "--verify")
    manifest = checkpoint / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.unlink()
    assert "manifest.json is missing" in refused(capsys, checkpoint, "--verify"), "this one should have checksums"
    manifest.write_text(json.dumps(values))
    (checkpoint / "training.json").unlink()
    assert "training.json is missing" in refused(capsys, checkpoint, "--verify")
