"""Token files of other trainers, opened in place: nothing is copied or converted.

Three formats are recognized by their file names:

- nanoGPT: `train.bin` and `val.bin`, bare little-endian uint16, and perhaps a `meta.pkl` with a vocabulary of characters or
  words.
- nano-gpt: `NAME_train.npy.000.npy` and so on, `NAME_validation.npy.000.npy` and so on: NumPy arrays of uint16.
- llm.c and modded-nanogpt: `NAME_train_000001.bin`, `NAME_val_000000.bin` (or without a number), each with a header of 256
  little-endian int32: a magic number, a version, the number of tokens. 20240520, version 1, is GPT-2 in uint16; 20240801,
  version 7, is Llama 3 in uint32.

The size of each file is compared with its header before anything is read, and each id with the vocabulary when it is read, so
errors name the file that is truncated or wrong. Numbered files are read in the order of their numbers.

Limits: these folders have no checksums, so the fingerprint covers names, sizes and the first and last 4 KiB of each file.
Document bounds are unknown. Without a `tokenizer.json` or GPT-2's in the hub's cache, the loss is in nats per token only.
"""

import hashlib
import re
import struct
import tokenize
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from bardling.config.architecture import GPT2_VOCAB_SIZE
from bardling.data.tokens.gpt2_bpe import cached_gpt2_files
from bardling.data.tokens.manifest import Dtype, Manifest, ShardFile, SplitInfo
from bardling.data.tokens.shards import TokenDataset
from bardling.data.tokens.tokenizer import Tokenizer, load_tokenizer
from bardling.data.tokens.vocabulary import EOT, char_content, word_content
from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error
from bardling.files.safe_pickle import load_plain_pickle

Kind = Literal["nanogpt", "nano-gpt", "llm.c"]
_Found = dict[tuple[Kind, str], dict[str, list[tuple[int, Path]]]]
"""(format, name of the dataset) -> split -> numbers and paths of its files."""

NANOGPT_VOCAB = 50304  # nanoGPT's vocabulary if a folder specifies none: GPT-2's, rounded up to a multiple of 64
_HEADER_BYTES = 256 * 4
_HEADERS: Mapping[tuple[int, int], tuple[Dtype, int]] = {
    (20240520, 1): ("uint16", GPT2_VOCAB_SIZE),
    (20240801, 7): ("uint32", 128256),
}  # (magic number, version) -> width, vocabulary
_PATTERNS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("nano-gpt", re.compile(r"(?P<name>.+)_(?P<split>train|validation|val)\.npy\.(?P<number>\d{1,18})(?:\.npy)?")),
    ("llm.c", re.compile(r"(?P<name>.+)_(?P<split>train|val)(?:_(?P<number>\d{1,18}))?\.bin")),
    ("nanogpt", re.compile(r"(?P<name>)(?P<split>train|val)\.bin")),
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_SAMPLED = 4096  # bytes at each end of a file that enter its fingerprint; tokens at each end that are checked on opening


def detect_token_folder(path: Path | str) -> Kind | None:
    """The format of the token files at `path`, which is as for `open_token_folder`, by their names; None if unknown."""
    return next((kind for kind, _ in _find(Path(path))), None)


def open_token_folder(path: Path | str) -> TokenDataset:
    """Open the token files at `path`: a folder, or FOLDER/NAME if the folder contains several datasets."""
    path = Path(path)
    datasets = _find(path)
    if not datasets:
        known = "nanoGPT (train.bin, val.bin), nano-gpt (*.npy.000.npy) or llm.c (*.bin)"
        raise UserError(f"{path}: contains no token files of {known}")
    if len(datasets) > 1:
        names = ", ".join(str(path / name) for _, name in list(datasets)[:5])
        raise UserError(f"{path}: contains {len(datasets)} datasets: choose one of {names}")
    (((kind, _), files_of),) = datasets.items()
    folder = next(file.parent for files in files_of.values() for _, file in files)
    for split, files in files_of.items():
        if not files:
            raise UserError(f"{folder}: has no files for the {split} split: both train and val are required")
    shards = {split: [_shard(kind, file) for _, file in sorted(files)] for split, files in files_of.items()}
    kinds = {(width, vocab) for parts in shards.values() for _, width, vocab in parts}
    if len(kinds) > 1:
        raise UserError(f"{folder}: its files have different widths or vocabularies: use one folder per tokenizer")
    ((width, vocab_size),) = kinds
    tokenizer = None
    if kind == "nanogpt" and (folder / "meta.pkl").exists():
        vocab_size, tokenizer = read_meta(folder / "meta.pkl")
    elif (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
    elif width == "uint16":
        tokenizer = gpt2_tokenizer()
    both = (tuple(file for file, _, _ in shards[split]) for split in ("train", "val"))
    train, val = (SplitInfo(sum(file.tokens for file in parts), documents=0, bytes=0, files=parts) for parts in both)
    vocab_size, fingerprint = (tokenizer.vocab_size, tokenizer.fingerprint) if tokenizer is not None else (vocab_size, "")
    origin, val_fraction = {"spec": str(path), "format": kind}, val.tokens / (train.tokens + val.tokens)
    dataset = TokenDataset(folder, Manifest(width, vocab_size, fingerprint, origin, val_fraction, train, val))
    dataset.tokenizer = tokenizer
    # of the files alone: the data is the same whether or not this machine has the tokenizer in its cache
    digest = hashlib.sha256(width.encode())
    for file in (*train.files, *val.files):
        with os_error_as_user_error(folder / file.name, "read"), (folder / file.name).open("rb") as opened:
            digest.update(f"{file.name}:{file.size}:{file.offset};".encode() + opened.read(_SAMPLED))
            opened.seek(max(0, file.size - _SAMPLED))
            digest.update(opened.read(_SAMPLED))
    dataset.fingerprint = digest.hexdigest()[:16]
    for part in (dataset.split("train"), dataset.split("val")):
        for start in (0, max(0, len(part) - _SAMPLED)):
            part.read(start, min(_SAMPLED, len(part)))  # a wrong vocabulary fails now, not after an hour of training
    return dataset


def read_meta(path: Path) -> tuple[int, Tokenizer | None]:
    """nanoGPT's `meta.pkl`: the vocabulary size and, if it lists characters or words, their tokenizer."""
    meta = load_plain_pickle(path)
    size = meta.get("vocab_size") if isinstance(meta, dict) else None
    if type(size) is not int or not 1 <= size <= 1 << 16:
        raise UserError(f"{path}: has no vocab_size between 1 and 65,536")
    stoi, itos = meta.get("stoi"), meta.get("itos")
    if stoi is None and itos is None:
        return size, None
    if isinstance(itos, list):
        itos = dict(enumerate(itos))
    if stoi is None and isinstance(itos, dict):
        stoi = {char: index for index, char in itos.items() if isinstance(char, str)}
    if not isinstance(stoi, dict) or not all(isinstance(t, str) and t and not _SURROGATE.search(t) for t in stoi):
        raise UserError(f"{path}: its stoi does not map characters or words")
    if not all(type(index) is int for index in stoi.values()) or sorted(stoi.values()) != list(range(size)):
        raise UserError(f"{path}: its entries are not numbered from 0 to vocab_size - 1 = {size - 1}")
    if itos is not None and itos != {index: token for token, index in stoi.items()}:
        raise UserError(f"{path}: its stoi and itos disagree")
    characters = {char: index for char, index in sorted(stoi.items(), key=lambda item: item[1]) if char != EOT}
    # besides characters, the last entry may be the end-of-text token, as written by `write_meta`
    if not characters or not all(len(char) == 1 for char in characters) or stoi.get(EOT, size - 1) != size - 1:
        words = word_content(dict(stoi))
        return size, None if words is None else Tokenizer(words, str(path))
    content = char_content(["".join(characters)] + [""] * (EOT in stoi))
    content["model"] = {**content["model"], "vocab": characters}
    return size, Tokenizer(content, str(path))


def gpt2_tokenizer() -> Tokenizer | None:
    """GPT-2's tokenizer from the hub's cache on this machine; None if it is not there. Nothing is downloaded."""
    tokenizers = map(load_tokenizer, cached_gpt2_files())
    return next((found for found in tokenizers if found.vocab_size == GPT2_VOCAB_SIZE), None)


def _find(path: Path) -> _Found:
    """The datasets at `path`, sorted by name; bare nanoGPT files take precedence over others in the same folder."""
    folder, wanted = (path, None) if path.is_dir() else (path.parent, path.name)
    if not folder.is_dir() or (wanted is None and (folder / "manifest.json").is_file()):
        return {}
    found: _Found = {}
    with os_error_as_user_error(folder, "list"):
        files = [file for file in folder.iterdir() if file.is_file()]
    for file in files:
        for kind, pattern in _PATTERNS:
            match = pattern.fullmatch(file.name)
            if match and wanted in (None, match["name"]):
                dataset = found.setdefault((kind, match["name"]), {"train": [], "val": []})
                split = "train" if match["split"] == "train" else "val"
                dataset[split].append((int(match.groupdict().get("number") or 0), file))
                break
    bare: tuple[Kind, str] = ("nanogpt", "")
    return {bare: found[bare]} if bare in found else dict(sorted(found.items()))


def _shard(kind: Kind, file: Path) -> tuple[ShardFile, Dtype, int]:
    """One file, its integer type and its vocabulary size."""
    with os_error_as_user_error(file, "read"):
        size = file.stat().st_size
    if kind == "nano-gpt":
        width, offset, tokens = _npy_header(file)
        vocab_size = GPT2_VOCAB_SIZE
    elif kind == "llm.c":
        width, vocab_size, tokens = _llmc_header(file)
        offset = _HEADER_BYTES
    else:
        width, vocab_size, offset, tokens = "uint16", NANOGPT_VOCAB, 0, size // 2
        if size % 2:
            fault = f"has an odd number of bytes ({size:,}), but each token takes two"
            raise UserError(f"{file}: {fault}: it is truncated; recreate it")
    if tokens < 1:
        raise UserError(f"{file}: contains no tokens")
    expected = offset + tokens * np.dtype(width).itemsize
    if size != expected:
        fault = f"has {size:,} bytes, but the {tokens:,} tokens in its header need {expected:,}"
        raise UserError(f"{file}: {fault}: it is damaged; recreate it")
    return ShardFile(file.name, tokens, size, "", offset), width, vocab_size


def _npy_header(file: Path) -> tuple[Dtype, int, int]:
    """Integer type, bytes before the first token, and tokens of a NumPy array; the header is parsed, never unpickled."""
    with os_error_as_user_error(file, "read"), file.open("rb") as opened:
        try:
            version = np.lib.format.read_magic(opened)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(opened)
            offset = opened.tell()
        except (ValueError, SyntaxError, TypeError, tokenize.TokenError, RecursionError, MemoryError) as error:
            raise UserError(f"{file}: is not a NumPy array ({' '.join(str(error).split())[:120]})") from None
    if dtype.hasobject:
        raise UserError(f"{file}: refused because it contains pickled objects, not numbers")
    if dtype not in (np.dtype("<u2"), np.dtype("<u4")) or len(shape) != 1:
        wanted = "a one-dimensional array of little-endian uint16 or uint32 tokens"
        raise UserError(f"{file}: is {dtype}{list(shape)}, not {wanted}")
    return ("uint16" if dtype.itemsize == 2 else "uint32"), offset, int(shape[0])


def _llmc_header(file: Path) -> tuple[Dtype, int, int]:
    """Integer type, vocabulary size and number of tokens in an llm.c header."""
    with os_error_as_user_error(file, "read"), file.open("rb") as opened:
        data = opened.read(_HEADER_BYTES)
    if len(data) < _HEADER_BYTES:
        raise UserError(f"{file}: is shorter than llm.c's header of {_HEADER_BYTES:,} bytes")
    magic, version, tokens = struct.unpack_from("<3i", data)
    if (magic, version) not in _HEADERS:
        raise UserError(f"{file}: begins with {magic}, version {version}, which is not one of llm.c's token formats")
    return *_HEADERS[magic, version], tokens
