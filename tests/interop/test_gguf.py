"""GGUF files: llama.cpp computes what we compute from them, and they come back unchanged."""

import dataclasses
import json
import math
import random
import unicodedata

import numpy as np
import pytest
import torch

from bardling.checkpoint.contents import write_model
from bardling.checkpoint.export import export_gguf, export_hf
from bardling.checkpoint.load import load
from bardling.config import ModelConfig
from bardling.data.tokens.gguf_vocabulary import tokenizer_from_metadata
from bardling.data.tokens.tokenizer import build_tokenizer
from bardling.errors import UserError
from bardling.generation.generate import generate, prompt_ids
from bardling.interop.gguf_file import read_gguf_tensors, read_header
from bardling.model.gpt import GPT

gguf = pytest.importorskip("gguf")
TEXT = (
    "The king met 1234 queens; it's 5 o'clock. Größe, naïve café, 東京 🙂\n\n  two  spaces\tand a tab, I'LL go!! (x_1 == 22)\n"
)
FAMILIES = {
    "gpt2": {"family": "gpt2"},
    "gpt2-no-biases": {"family": "gpt2", "bias": False, "tied": False},
    "llama": {"family": "llama", "n_kv_head": 2},
    "llama-tied": {"family": "llama", "tied": True, "head_dim": 16, "rope_theta": 5000.0, "norm_eps": 1e-4},
    "qwen3": {"family": "qwen3", "n_kv_head": 1, "head_dim": 32},
    "qwen3-untied": {"family": "qwen3", "tied": False, "rope_theta": 1e4},
}


@pytest.fixture(scope="module")
def words():
    """A byte-level BPE of words."""
    rng = random.Random(1)
    return build_tokenizer("bpe:330", [" ".join(rng.choices(TEXT.split(" "), k=400))])


def model_folder(path, tokenizer, **options):
    """A model with large random weights, so that its most likely tokens are clear."""
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 96, "vocab_size": tokenizer.vocab_size + 2}
    config = ModelConfig(**{**sizes, "init_std": 0.2, "vocab_multiple": 64, **options}).resolved()
    model = GPT(config, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    path.mkdir()
    write_model(path, config, model.state_dict(), tokenizer)
    return path


def continued(loaded, prompt, count):
    ids = prompt_ids(loaded.tokenizer, prompt)
    steps = generate(loaded.build(), [ids], max_new_tokens=count, temperature=0, eot_id=loaded.tokenizer.interface.eos)
    return [token for (token,) in steps]


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_continues_a_text_with_our_tokens(name, words, tmp_path):
    from llama_cpp import LlamaCpp

    folder = model_folder(tmp_path / "model", words, **FAMILIES[name])
    assert export_gguf(str(folder), tmp_path / "model.gguf") == []
    prompt = "The king met 12"
    expected = continued(load(folder), prompt, 64)
    assert len(set(expected)) > 8
    assert LlamaCpp(tmp_path / "model.gguf").greedy(prompt, 64) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_comes_back_from_gguf_unchanged(name, words, tmp_path):
    folder = model_folder(tmp_path / "model", words, dropout=0.1, **FAMILIES[name])
    export_gguf(str(folder), tmp_path / "a.gguf")
    own, back = load(folder), load(tmp_path / "a.gguf")
    assert dataclasses.replace(back.config, family=own.config.family) == own.config
    assert back.state.keys() == own.state.keys()
    assert all(torch.equal(back.state[key], own.state[key]) for key in own.state)
    assert back.tokenizer.fingerprint == own.tokenizer.fingerprint
    assert back.tokenizer.interface.eos == own.tokenizer.interface.eos
    again = tmp_path / "again" / "a.gguf"
    export_gguf(str(tmp_path / "a.gguf"), again)
    assert again.read_bytes() == (tmp_path / "a.gguf").read_bytes()
    export_hf(str(again), tmp_path / "hf")
    assert all(torch.equal(load(tmp_path / "hf").state[key], own.state[key]) for key in own.state)


SPLITS = ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "default")


@pytest.fixture(scope="module")
def across_words():
    """Tokens and merges of a byte-level BPE that would merge across words, so that each way to split a text shows."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [TEXT[start : start + 24] for start in range(0, len(TEXT), 3)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator(pieces, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(library.to_str())["model"]
    return list(model["vocab"]), [" ".join(merge) for merge in model["merges"]]


def texts():
    rng = random.Random(5)
    letters = "aaabcdeé東🙂  \n\t\r1239'.,!?-_=<|>(sStT"
    return [TEXT, "  x", "12345678", "a\n\n \n", *("".join(rng.choices(letters, k=30)) for _ in range(60)), TEXT[::-1]]


def same_tokens(tokenizer, folder, tmp_path, samples, prefix=""):
    """llama.cpp and the tokenizer of the file itself give the ids of `tokenizer`, and the text comes back."""
    from llama_cpp import LlamaCpp

    export_gguf(str(folder), tmp_path / "model.gguf")
    server, back = LlamaCpp(tmp_path / "model.gguf"), load(tmp_path / "model.gguf").tokenizer
    for text in samples:
        ids = tokenizer.encode(text).tolist()
        assert server.tokens(text) == ids, text
        assert back.encode(text).tolist() == ids
        assert tokenizer.decode(ids) == back.decode(ids)
        assert server.text(ids) == prefix + tokenizer.decode(ids)
        assert server.tokens(text, special=True) == prompt_ids(tokenizer, text) == prompt_ids(back, text)
    return server


@pytest.mark.parametrize("split", SPLITS)
def test_llama_cpp_splits_texts_as_we_do(split, across_words, tmp_path):
    tokens, merges = across_words
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": [*tokens, "<|im_start|>", "<|im_end|>", "[PAD9]"],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3, 5],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
        "tokenizer.ggml.add_bos_token": split == "llama-bpe",
    }
    tokenizer = tokenizer_from_metadata(metadata, "x.gguf")
    assert tokenizer.vocab_size == len(tokens) + 2
    folder = model_folder(tmp_path / "model", tokenizer)
    samples = [text for text in texts() if split != "qwen2" or unicodedata.is_normalized("NFC", text)]
    same_tokens(tokenizer, folder, tmp_path, samples)
    assert read_header(tmp_path / "model.gguf").metadata["tokenizer.ggml.pre"] == split


@pytest.mark.parametrize("spec", ["byte", "char", "bpe:300"])
def test_llama_cpp_has_the_tokens_of_the_tokenizers_made_here(spec, tmp_path):
    tokenizer = build_tokenizer(spec, [TEXT + "\\\r"])
    folder = model_folder(tmp_path / "model", tokenizer, vocab_size=tokenizer.vocab_size)
    samples = [TEXT, "The king", " \n\t\\\r", "2'3", "🙂🙂"] if spec == "char" else texts()
    server = same_tokens(tokenizer, folder, tmp_path, samples)
    assert server.greedy("The", 64) == continued(load(tmp_path / "model"), "The", 64)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_goes_both_ways(prefix, tmp_path):
    rng = random.Random(3)
    words = sorted({"".join(rng.choices("\u2581abcd", k=rng.randint(1, 4))) + "a" for _ in range(150)})
    plain = [*"\u2581abcdeT'.1", *words, *("\u2581" * count for count in range(2, 14))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *plain]
    places = rng.sample(range(1, 900), len(words))
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(plain)],
        "tokenizer.ggml.scores": [0.0] * (len(tokens) - len(words) - 12) + [-float(place) for place in places] + [-1e9] * 12,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    tokenizer = tokenizer_from_metadata(metadata, "x.gguf")
    assert tokenizer.interface.start == (1,)
    samples = ["".join(rng.choices("  aaabbbcccd é東\n", k=30)) for _ in range(80)]
    samples += ["a" + " " * count + "b" + " " * (count % 13) for count in range(40)]
    folder = model_folder(tmp_path / "model", tokenizer, family="llama")
    server = same_tokens(tokenizer, folder, tmp_path, samples, " " if prefix else "")
    assert server.greedy(" ab cd", 12) == continued(load(tmp_path / "model"), " ab cd", 12)


def test_quantized_weights_keep_the_perplexity(words, tmp_path):
    from llama_cpp import LlamaCpp

    folder, text = model_folder(tmp_path / "model", words, init_std=0.05), TEXT[:41]
    ids = load(folder).tokenizer.encode(text)
    with torch.no_grad():
        found = load(folder).build()(torch.tensor(ids[None, :-1]), torch.tensor(ids[None, 1:]), reduction="none")
    expected = float(found.double().mean())
    for dtype, tolerance in (("f32", 1e-4), ("f16", 1e-3), ("bf16", 5e-3), ("q8_0", 1e-2)):
        out = tmp_path / f"{dtype}.gguf"
        notes = export_gguf(str(folder), out, dtype=dtype)
        assert notes == ([] if dtype == "f32" else [f"weights: {dtype}"])
        theirs = LlamaCpp(out).losses(ids.tolist(), words.vocab_size + 2)
        assert math.exp(np.mean(theirs)) == pytest.approx(math.exp(expected), rel=tolerance), dtype
        own = load(out).build()
        with torch.no_grad():
            again = own(torch.tensor(ids[None, :-1]), torch.tensor(ids[None, 1:]), reduction="none")
        assert float(again.double().mean()) == pytest.approx(expected, abs=tolerance), dtype


def test_a_chat_template_and_several_end_tokens_are_kept(words, tmp_path):
    from llama_cpp import LlamaCpp

    folder = model_folder(tmp_path / "model", words, family="llama")
    template = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [words.eot_id, 5]}))
    export_gguf(str(folder), tmp_path / "model.gguf")
    chat = [{"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Hi"}]
    assert LlamaCpp(tmp_path / "model.gguf").template(chat) == "<assistant>Yes?<user>Hi"
    about = load(tmp_path / "model.gguf").tokenizer.interface
    assert about.chat_template == template
    assert about.eos == (words.eot_id, 5)


@pytest.mark.parametrize("kind", [kind.name for kind in gguf.GGMLQuantizationType])
def test_every_type_that_gguf_dequantizes_is_read(kind, tmp_path):
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    data = np.random.default_rng(0).integers(0, 64, (3, 256 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("a", data, raw_dtype=number)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    header = read_header(tmp_path / "a.gguf")
    assert header.tensors["a"].shape == (3, 256)
    try:
        expected = gguf.quants.dequantize(data, number)
    except NotImplementedError:
        with pytest.raises(UserError, match=f"a has the type {kind}, which gguf cannot dequantize"):
            read_gguf_tensors(header)
    else:
        np.testing.assert_array_equal(read_gguf_tensors(header)["a"].numpy(), expected)


REFUSED = {
    "model.sliding_window = 8": {"family": "qwen3", "sliding_window": 8},
    "model.gelu = erf": {"gelu": "erf"},
    "model.mlp = relu2": {"family": "llama", "mlp": "relu2"},
    "model.logit_softcap = 9.0": {"family": "qwen3", "logit_softcap": 9.0},
    "model.value_embeddings = 1": {"family": "qwen3", "value_embeddings": 1},
    "model.positions = rotary": {"positions": "rotary"},
}


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_llama_cpp_lacks_is_refused_by_name(option, words, tmp_path):
    folder = model_folder(tmp_path / "model", words, **REFUSED[option])
    with pytest.raises(UserError, match=f"cannot be exported as GGUF: .*{option}.*not supported by .* in llama.cpp$"):
        export_gguf(str(folder), tmp_path / "out" / "model.gguf")
    assert not (tmp_path / "out").exists()
