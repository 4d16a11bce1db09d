"""ONNX files: onnxruntime computes our logits for any batch and length, and what it cannot compute is refused."""

import sys

import numpy as np
import pytest
import torch

from bardling.checkpoint.contents import write_model
from bardling.checkpoint.export import export_onnx
from bardling.checkpoint.load import load, load_model
from bardling.cli.main import main
from bardling.config import ModelConfig
from bardling.data.tokens.tokenizer import build_tokenizer, load_tokenizer
from bardling.errors import UserError
from bardling.interop import onnx_file
from bardling.model.gpt import GPT

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
CONTEXT = 48
FAMILIES = {
    "gpt2": {"n_layer": 2},
    "gpt2 erf, no biases, untied": {"gelu": "erf", "bias": False, "tied": False},
    "llama with shared heads": {"family": "llama", "n_kv_head": 2},
    "qwen3": {"family": "qwen3", "n_kv_head": 2, "head_dim": 16},
    "what no other software has": {
        **{"family": "custom", "mlp": "relu2", "positions": "rotary", "qk_norm": "plain"},
        **{"logit_softcap": 20.0, "value_embeddings": 1},
    },
}


@pytest.fixture
def folder(tmp_path, corpus):
    """`folder(**options)`: a model with large random weights, so that its logits differ."""

    def write(**options) -> str:
        tokenizer = build_tokenizer("bpe:300", [corpus.read_text()])
        sizes = {"n_layer": 1, "n_head": 4, "n_embd": 64, "block_size": CONTEXT, "vocab_size": tokenizer.vocab_size + 5}
        config = ModelConfig(**{**sizes, "init_std": 0.2, "dropout": 0.1, **options}).resolved()
        (tmp_path / "model").mkdir()
        write_model(tmp_path / "model", config, GPT(config, seed=2).state_dict(), tokenizer)
        return str(tmp_path / "model")

    return write


def logits(path, tokens):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input_ids": tokens.numpy()})[0]


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in ("gpt2", "qwen3") else pytest.mark.slow) for name in FAMILIES]
)
def test_onnxruntime_computes_our_logits(folder, tmp_path, family):
    spec = folder(**FAMILIES[family])
    assert export_onnx(spec, tmp_path / "out") == []
    model, generator = load_model(spec), torch.Generator().manual_seed(1)
    for shape in ((1, 1), (1, CONTEXT), (4, 7), (4, CONTEXT)):
        tokens = torch.randint(model.config.vocab_size, shape, generator=generator)
        with torch.no_grad():
            expected = model(tokens).numpy()
        found = logits(tmp_path / "out" / "model.onnx", tokens)
        assert found.dtype == np.float32
        assert expected.std() > 0.5
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_the_folder_has_the_tokenizer_and_nothing_of_this_machine(folder, tmp_path):
    spec = folder()
    export_onnx(spec, tmp_path / "out", chat=True)
    names = {"model.onnx", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "chat_template.jinja"}
    extended = load_tokenizer(tmp_path / "out")
    assert extended.extends(load(spec).tokenizer)
    assert logits(tmp_path / "out" / "model.onnx", torch.tensor([[extended.vocab_size - 1]])).shape == (1, 1, 305)
    content = (tmp_path / "out" / "model.onnx").read_bytes()
    assert b".py" not in content
    assert str(tmp_path).encode() not in content
    if (transformers := sys.modules.get("transformers")) is not None:
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"
    with pytest.raises(UserError, match=r"model\.onnx: ONNX files are not read: use the model from which"):
        load(tmp_path / "out")
    with pytest.raises(UserError, match="already exists"):
        export_onnx(spec, tmp_path / "out")


@pytest.mark.slow  # as all that export a further model
def test_weights_of_more_than_a_file_holds_are_beside_it(folder, tmp_path, monkeypatch):
    spec, tokens = folder(), torch.arange(12).view(2, 6)
    monkeypatch.setattr(onnx_file, "_MAX_FILE_BYTES", 100_000)
    export_onnx(spec, tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > 100_000
    with torch.no_grad():
        expected = load_model(spec)(tokens).numpy()
    np.testing.assert_allclose(logits(tmp_path / "out" / "model.onnx", tokens), expected, rtol=0, atol=1e-4)


def test_a_graph_that_computes_something_else_is_never_delivered(tmp_path):
    """Tracing fixes the branch of a sliding window that was taken for the traced length."""
    config = ModelConfig(
        n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=90, family="llama", sliding_window=16, init_std=0.2
    )
    with pytest.raises(UserError, match="computes other logits than the model: use --format hf"):
        onnx_file.write_onnx(tmp_path, GPT(config, seed=1).eval())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "llama", "sliding_window": 16}, "model.sliding_window = 16: only full attention is supported"),
        ({"block_size": 4}, "model.block_size = 4: must be at least 8"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_setting(folder, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as caught:
        main(["export", folder(**options), "--format", "onnx", "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"ONNX files need the packages onnx, .*: pip install 'bardling\[onnx\]'"):
        export_onnx(folder(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
