"""Damaged and malicious GGUF files: each is refused in one line, before it costs memory, and nothing in it runs."""

import os
import random
import struct
import tracemalloc

import pytest
import torch

from bardling.checkpoint.contents import write_model
from bardling.checkpoint.export import export_gguf
from bardling.checkpoint.load import load
from bardling.config import ModelConfig
from bardling.data.tokens.tokenizer import build_tokenizer
from bardling.errors import UserError
from bardling.interop.gguf_file import read_gguf_tensors, read_header, write_gguf
from bardling.model.gpt import GPT

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The bytes of a small file."""
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = build_tokenizer("bpe:280", ["a few words of text, a few more words " * 9])
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": tokenizer.vocab_size}
    config = ModelConfig(family="llama", **sizes).resolved()
    (folder / "model").mkdir()
    write_model(folder / "model", config, GPT(config, seed=1).state_dict(), tokenizer)
    export_gguf(str(folder / "model"), folder / "model.gguf")
    return (folder / "model.gguf").read_bytes()


def refused(path, data):
    """The message with which a file is refused; it names the file and is one line."""
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        load(path).needed_tokenizer()
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))
    return str(caught.value)


def test_a_file_that_ends_anywhere_is_refused(valid, tmp_path):
    for end in [*range(0, 64), *range(64, len(valid), len(valid) // 100), len(valid) - 1]:
        refused(tmp_path / "a.gguf", valid[:end])


def test_changed_bytes_are_refused_or_still_a_model(valid, tmp_path):
    rng, path, outcomes = random.Random(2), tmp_path / "a.gguf", set()
    header = valid.index(b"output.weight")  # near the end of the header
    for _ in range(200):
        data = bytearray(valid)
        for _ in range(rng.choice([1, 1, 4])):
            data[rng.randrange(header)] = rng.choice([0, 1, 255, rng.randrange(256)])
        path.write_bytes(data)
        try:
            loaded = load(path)
            loaded.needed_tokenizer().encode("a few words")
            outcomes.add(bool(torch.isfinite(loaded.build()(torch.tensor([[1, 2]]))).all()))
        except UserError as error:
            outcomes.add(f"refused in {len(str(error).splitlines())} line")
    assert outcomes == {True, "refused in 1 line"}


def text(value):
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def file(entries=(), tensors=(), *, version=3, counts=None, data=bytes(256)):
    """A file with `entries` (key, type, packed value) and `tensors` (name, dimensions, type, offset)."""
    tensor_count, entry_count = counts or (len(tensors), len(entries))
    header = b"GGUF" + struct.pack("<IQQ", version, tensor_count, entry_count)
    header += b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in entries)
    for name, shape, kind, offset in tensors:
        header += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, offset)
    return header + bytes(-len(header) % 32) + data


HUGE = 1 << 62
LLAMA = ("general.architecture", 8, text("llama"))
CASES = {
    "no magic": (b"GGML" + bytes(60), "does not begin with GGUF"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(60), "version 50331648 is not supported"),
    "version 1": (file(version=1), "GGUF version 1 is not supported"),
    "many tensors": (file(counts=(HUGE, 0)), "4,611,686,018,427,387,904 tensors; the limit is"),
    "many entries": (file(counts=(0, HUGE)), "metadata entries; the limit is"),
    "long key": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", HUGE) + bytes(99),
        "427,387,904 bytes at",
    ),
    "long text": (file([("a", 8, struct.pack("<Q", HUGE))]), "427,387,904 bytes at"),
    "text that is no text": (file([("a", 8, text(b"\xff\xfe"))]), "not UTF-8"),
    "long array": (file([("a", 9, struct.pack("<IQ", 4, HUGE))]), "array items; the limit is"),
    "long array of texts": (file([("a", 9, struct.pack("<IQ", 8, 1 << 22))]), "bytes at"),
    "nested arrays": (file([("a", 9, struct.pack("<IQ", 9, 1) * 500)]), "arrays in an array"),
    "unknown type": (file([("a", 77, bytes(8))]), "unknown type 77"),
    "key twice": (file([("a", 4, bytes(4))] * 2), "'a' is given twice"),
    "no alignment": (file([("general.alignment", 4, bytes(4))]), "general.alignment = 0"),
    "alignment that is text": (file([("general.alignment", 8, text("x" * 900))]), "general.alignment = 'xxx"),
    "no dimensions": (file([], [("a", (), 0, 0)]), "0 dimensions"),
    "many dimensions": (file([], [("a", (1,) * 5, 0, 0)]), "5 dimensions"),
    "zero rows": (file([], [("a", (4, 0), 0, 0)]), "a wrong shape"),
    "overflowing shape": (file([], [("a", (1 << 33, 1 << 33), 0, 0)]), "bytes at"),
    "half a block": (file([], [("a", (33,), 8, 0)]), "a wrong shape"),
    "outside": (file([], [("a", (4,), 0, 1 << 40)]), "bytes at"),
    "wrapping offset": (file([], [("a", (4,), 0, (1 << 64) - 32)]), "bytes at"),
    "unknown tensor type": (file([], [("a", (4,), 99, 0)]), "unknown type 99"),
    "tensor twice": (file([], [("a", (4,), 0, 0)] * 2), "'a' is given twice"),
    "one place many times": (file([], [(f"a{n}", (64,), 0, 0) for n in range(99)]), "bytes at"),
    "no architecture": (file(), "general.architecture = None"),
    "architecture of another type": (file([("general.architecture", 9, struct.pack("<IQ", 4, 0))]), "only 'gpt2', 'llama' and"),
    "another architecture": (file([("general.architecture", 8, text("gemma"))]), "general.architecture = 'gemma'"),
    "no tensors": (file([LLAMA]), "token_embd.weight is missing"),
    "split model": (file([LLAMA, ("split.count", 2, struct.pack("<H", 5))]), "one of 5 files"),
    "no sizes": (file([LLAMA], [("token_embd.weight", (4, 4), 0, 0)]), "llama.attention.head_count is missing"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_crafted_file_is_refused(case, tmp_path):
    data, message = CASES[case]
    tracemalloc.start()
    found = refused(tmp_path / "a.gguf", data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in found
    assert peak < 50 << 20


ENTRIES = {
    "llama.rope.scaling.factor": 8.0,
    "llama.attention.sliding_window": 4096,
    "llama.expert_count": 8,
    "llama.attention.head_count": [2, 2],
    "llama.block_count": 1 << 31,
    "llama.attention.layer_norm_rms_epsilon": float("nan"),
    "llama.rope.dimension_count": 4,
    "llama.attention.key_length": True,
    "bardling.model": "[" * 5000,
    "tokenizer.ggml.model": "t5",
    "tokenizer.ggml.pre": "unheard-of",
    "tokenizer.ggml.tokens": ["a", "a"],
    "tokenizer.ggml.token_type": [1],
    "tokenizer.ggml.merges": ["x y"],
    "tokenizer.ggml.eos_token_id": "a",
    "tokenizer.chat_template": "x" * (2 << 20),
}


@pytest.mark.parametrize("key", ENTRIES)
def test_a_setting_that_is_not_implemented_or_wrong_is_refused_by_name(key, valid, tmp_path):
    (tmp_path / "valid.gguf").write_bytes(valid)
    header = read_header(tmp_path / "valid.gguf")
    metadata = {**header.metadata, key: ENTRIES[key]}
    del metadata["general.architecture"], metadata["general.file_type"], metadata["general.quantization_version"]
    write_gguf(tmp_path / "b.gguf", "llama", metadata, read_gguf_tensors(header), "f32")
    message = refused(tmp_path / "a.gguf", (tmp_path / "b.gguf").read_bytes())
    assert key.removeprefix("llama.") in message or key == "tokenizer.ggml.merges"


def test_a_tensor_that_is_not_implemented_is_refused_by_name(valid, tmp_path):
    (tmp_path / "valid.gguf").write_bytes(valid)
    header = read_header(tmp_path / "valid.gguf")
    tensors = read_gguf_tensors(header)
    metadata = {key: value for key, value in header.metadata.items() if not key.startswith("general.")}
    for name in ("rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate_exps.weight", "blk.7.attn_norm.weight", "x"):
        path = tmp_path / f"{name}.gguf"
        write_gguf(path, "llama", metadata, {**tensors, name: torch.ones(8)}, "f32")
        message = refused(tmp_path / "a.gguf", path.read_bytes())
        assert name in message or "layers" in message or "q_proj.bias" in message


def test_weights_that_are_not_finite_are_refused(valid, tmp_path):
    message = refused(tmp_path / "a.gguf", valid[:-4] + struct.pack("<f", float("inf")))
    assert "contains NaN or infinity" in message


def test_a_pipe_and_a_folder_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.gguf")
    with pytest.raises(UserError, match=r"a\.gguf: "):
        load(tmp_path / "a.gguf")
