"""From the hub come one set of weights, the configurations and the tokenizer in the form that exists, and nothing else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from bardling.checkpoint.export import export_hf
from bardling.checkpoint.load import load, load_tokenizer_of
from bardling.config import ModelConfig
from bardling.data.tokens.tokenizer import build_tokenizer
from bardling.errors import UserError
from bardling.interop.tensor_file import METADATA
from bardling.model.gpt import GPT
from model_hub import serve

constants = pytest.importorskip("huggingface_hub.constants")
UNNEEDED = (
    "README.md",
    "onnx/model.safetensors",
    "onnx/model.onnx",
    "original/consolidated.00.pth",
    "consolidated.safetensors",
    "consolidated-00001-of-00002.safetensors",
    "model.fp16.safetensors",
    "model-00001-of-00009.safetensors",
    "training_args.bin",
    "pytorch_model.bin",
    "modeling_custom.py",
    "flax_model.msgpack",
    "sub/config.json",
    "sub/tokenizer.json",
)
SMALL = ("generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serve(tmp_path, monkeypatch, constants) as server:
        yield server


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small model with a byte tokenizer: its files by name, and its weights."""
    from bardling.checkpoint.contents import write_model

    folder = tmp_path_factory.mktemp("exported")
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=257)
    model = GPT(config, seed=1)
    write_model(folder, config, model.state_dict(), build_tokenizer("byte", ()))
    return {path.name: path.read_bytes() for path in folder.iterdir()}, model.state_dict()


def sharded(files, tmp_path):
    """The same model in two shards and an index."""
    (tmp_path / "whole.safetensors").write_bytes(files["model.safetensors"])
    state = load_file(tmp_path / "whole.safetensors")
    names, result = sorted(state), {name: data for name, data in files.items() if name != "model.safetensors"}
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, tmp_path / file, metadata=METADATA)
        result[file] = (tmp_path / file).read_bytes()
        weight_map |= dict.fromkeys(part, file)
    return {**result, "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}


def test_one_file_of_weights_and_every_small_file_that_says_something(hub, exported):
    files, state = exported
    extra = dict.fromkeys((*SMALL, *UNNEEDED), b"{}")
    hub.models["some/model"] = {**extra, **files, "vocab.json": b"{}", "tokenizer.model": b"x"}
    loaded = load("some/model")
    assert all(torch.equal(loaded.state[name], value) for name, value in state.items())
    assert sorted(set(hub.fetched)) == sorted([*SMALL, *files])


def test_an_index_and_exactly_its_shards(hub, exported, tmp_path):
    files, state = exported
    parts = sharded(files, tmp_path)
    hub.models["some/model"] = {**dict.fromkeys(UNNEEDED, b"{}"), **parts}
    loaded = load("some/model")
    assert all(torch.equal(loaded.state[name], value) for name, value in state.items())
    assert sorted(set(hub.fetched)) == sorted(parts)


def test_of_both_forms_of_weights_only_the_single_file(hub, exported, tmp_path):
    files, _ = exported
    hub.models["some/model"] = {**sharded(files, tmp_path), **files}
    load("some/model")
    assert not [name for name in hub.fetched if "-of-" in name]


def test_a_vocabulary_and_merges_instead_of_a_tokenizer_json(hub, exported, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(["the king and the queen"] * 9, vocab_size=257, show_progress=False)
    trained.save_model(str(tmp_path))
    files, _ = exported
    pair = {name: (tmp_path / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    rest = {name: data for name, data in files.items() if not name.startswith("tokenizer")}
    hub.models["some/model"] = {**rest, **pair}
    assert load("some/model").tokenizer.encode("the king").tolist() == trained.encode("the king").ids
    assert {"vocab.json", "merges.txt"} <= set(hub.fetched)


def test_only_the_tokenizer_is_fetched_where_only_it_is_needed(hub, exported):
    files, _ = exported
    hub.models["some/model"] = files
    assert load_tokenizer_of("some/model").kind == "byte"
    assert "model.safetensors" not in hub.fetched


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "vocab.txt", "tekken.json"])
def test_a_tokenizer_in_another_format_is_named(hub, exported, name):
    files, _ = exported
    hub.models["some/model"] = {**{key: data for key, data in files.items() if not key.startswith("tokenizer")}, name: b"x"}
    loaded = load("some/model")
    assert loaded.tokenizer is None
    with pytest.raises(UserError, match=rf"{name}: .*AutoTokenizer\.from_pretrained"):
        loaded.needed_tokenizer()


def test_an_adapter_on_the_hub_is_merged_into_its_base_model(hub, exported):
    files, _ = exported
    hub.models["org/base"] = files
    state = load("org/base").state
    width, rows = state["transformer.h.0.attn.c_proj.weight"].shape
    name = "base_model.model.transformer.h.0.attn.c_proj"
    pair = {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(rows, 2)}
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 2, "lora_alpha": 3}
    hub.models["some/adapter"] = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(pair, metadata={"format": "pt"}),
    }
    merged = load("some/adapter")
    assert merged.tokenizer is not None
    changed = merged.state["transformer.h.0.attn.c_proj.weight"]
    torch.testing.assert_close(changed, state["transformer.h.0.attn.c_proj.weight"] + 3)


def test_an_index_that_points_elsewhere_fetches_nothing(hub, exported):
    files, _ = exported
    bad = json.dumps({"weight_map": {"x": "../../outside.safetensors"}}).encode()
    rest = {name: data for name, data in files.items() if name != "model.safetensors"}
    hub.models["some/model"] = {**rest, "model.safetensors.index.json": bad}
    with pytest.raises(UserError, match="is not the name of"):
        load("some/model")


def test_a_copy_in_the_cache_is_enough_without_a_connection(hub, exported, monkeypatch, tmp_path):
    files, state = exported
    hub.models["some/model"] = sharded(files, tmp_path)
    load("some/model")
    hub.models["some/other"] = {**files, "generation_config.json": b"{}"}
    load("some/other")
    snapshot = next((tmp_path / "hf").glob("models--some--other/snapshots/*"))
    (snapshot / "generation_config.json").unlink()  # a small file that an earlier version did not fetch
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)
    for name in ("some/model", "some/other"):
        assert all(torch.equal(load(name).state[key], value) for key, value in state.items())


def test_what_was_fetched_can_be_exported(hub, exported, tmp_path):
    files, _ = exported
    hub.models["some/model"] = files
    assert export_hf("some/model", tmp_path / "out") == []
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert Path(tmp_path / "out" / "model.safetensors").read_bytes() == files["model.safetensors"]
