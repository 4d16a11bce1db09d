"""Folders of tokens that other trainers made, opened as they lie: nothing is copied or converted.

Three kinds are known by their files' names:

- nanoGPT: `train.bin` and `val.bin`, bare little-endian uint16, and perhaps a `meta.pkl` with a vocabulary of characters.
- nano-gpt: `NAME_train.npy.000.npy` and so on, `NAME_validation.npy.000.npy` and so on: NumPy arrays of uint16.
- llm.c and modded-nanogpt: `NAME_train_000001.bin`, `NAME_val_000000.bin` (or without a number), each with a header of 256
  little-endian int32: a magic number, a version, the number of tokens. 20240520, version 1, is GPT-2 in uint16; 20240801,
  version 7, is Llama 3 in uint32.

Every file's size is compared with what it says of itself before anything is read, and every id with the vocabulary when it is
read, so a cut or foreign file is named. Numbered files are taken in the order of their numbers, whatever their width.

Limits: these folders carry no checksums, so their fingerprint is made of names, sizes and the first and last 4 KiB of each
file. Documents cannot be told apart. A GPT-2 tokenizer is taken from the folder's `tokenizer.json` or from what
`huggingface_hub` has cached; without one the loss is known in nats per token only.
"""

import hashlib
import re
import struct
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from bardling.data.manifest import Manifest, ShardFile, SplitInfo
from bardling.data.shards import TokenDataset
from bardling.data.tokenizer import Tokenizer, load_tokenizer
from bardling.data.vocabulary import EOT, char_content
from bardling.errors import UserError
from bardling.files import told_plainly
from bardling.interop.safepickle import load_plain_pickle

Kind = Literal["nanogpt", "nano-gpt", "llm.c"]
Width = Literal["uint16", "uint32"]

GPT2_VOCAB = 50257
NANOGPT_VOCAB = 50304
"""nanoGPT's vocabulary when a folder names none: GPT-2's, rounded up to a multiple of 64."""
_HEADER_BYTES = 256 * 4
_HEADERS: Mapping[tuple[int, int], tuple[Width, int]] = {
    (20240520, 1): ("uint16", GPT2_VOCAB),
    (20240801, 7): ("uint32", 128256),
}  # (magic number, version) -> width, vocabulary
_BYTES: Mapping[str, int] = {"uint16": 2, "uint32": 4}
_PATTERNS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("nano-gpt", re.compile(r"(?P<name>.+)_(?P<split>train|validation|val)\.npy\.(?P<number>\d{1,18})(?:\.npy)?")),
    ("llm.c", re.compile(r"(?P<name>.+)_(?P<split>train|val)(?:_(?P<number>\d{1,18}))?\.bin")),
    ("nanogpt", re.compile(r"(?P<name>)(?P<split>train|val)\.bin")),
)
_SAMPLED = 4096  # bytes at either end of a file that go into its fingerprint


@dataclass
class _Found:
    """The files of one dataset in a folder, by split and number."""

    kind: Kind
    name: str
    files: dict[str, list[tuple[int, Path]]] = field(default_factory=lambda: {"train": [], "val": []})


class ForeignDataset(TokenDataset):
    """A folder of another trainer with the face of a `TokenDataset`; `open_token_folder` makes one.

    Attributes:
        kind: whose format it is.
    """

    def __init__(self, path: Path, manifest: Manifest, kind: Kind, tokenizer: Tokenizer | None) -> None:
        super().__init__(path, manifest)
        self.kind = kind
        self.tokenizer = tokenizer
        # Of the files alone: which tokenizer this machine happens to have cached does not make it other data.
        sampled = hashlib.sha256(manifest.dtype.encode())
        for file in (*manifest.train.files, *manifest.val.files):
            sampled.update(f"{file.name}:{file.size}:{file.offset};".encode() + _ends(path / file.name))
        self.fingerprint = sampled.hexdigest()[:16]


def detect_token_folder(path: Path | str) -> Kind | None:
    """Whose token files lie at `path` (a folder, or FOLDER/NAME for one of several datasets in it); None for no one's.

    Only names are looked at; `open_token_folder` checks the files.
    """
    found = _find(Path(path))
    return found[0].kind if found else None


def open_token_folder(path: Path | str) -> ForeignDataset:
    """Open the token files at `path`: a folder, or FOLDER/NAME where a folder holds several datasets.

    Raises:
        UserError: naming the file, if there are no such files, a split is missing, or a file is cut, malformed or holds ids
            outside the vocabulary at its beginning or end.
    """
    path = Path(path)
    datasets = _find(path)
    if not datasets:
        raise UserError(
            f"{path}: holds no token files of nanoGPT (train.bin, val.bin), nano-gpt (*.npy.000.npy) or llm.c (*.bin)"
        )
    if len(datasets) > 1:
        names = ", ".join(str(path / found.name) for found in datasets[:5])
        raise UserError(f"{path}: holds {len(datasets)} datasets: name one of {names}")
    found = datasets[0]
    folder = next(file.parent for files in found.files.values() for _, file in files)
    for split, files in found.files.items():
        if not files:
            raise UserError(f"{folder}: has no files of the {split} split: training and validation need both")
    shards = {split: [_shard(found.kind, file) for _, file in sorted(files)] for split, files in found.files.items()}
    kinds = {(width, vocab) for parts in shards.values() for _, width, vocab in parts}
    if len(kinds) > 1:
        raise UserError(f"{folder}: its files are of different widths or vocabularies: keep those of one tokenizer in a folder")
    ((width, vocab_size),) = kinds
    tokenizer = None
    if found.kind == "nanogpt" and (folder / "meta.pkl").exists():
        vocab_size, tokenizer = read_meta(folder / "meta.pkl")
    elif (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
    elif width == "uint16":
        tokenizer = gpt2_tokenizer()
    train, val = (_split([file for file, _, _ in shards[split]]) for split in ("train", "val"))
    dataset = ForeignDataset(
        folder,
        Manifest(
            dtype=width,
            vocab_size=tokenizer.vocab_size if tokenizer is not None else vocab_size,
            tokenizer=tokenizer.fingerprint if tokenizer is not None else "",
            source={"spec": str(path), "format": found.kind},
            val_fraction=val.tokens / (train.tokens + val.tokens),
            train=train,
            val=val,
        ),
        found.kind,
        tokenizer,
    )
    for part in (dataset.split("train"), dataset.split("val")):
        for start in (0, max(0, len(part) - _SAMPLED)):
            part.read(start, min(_SAMPLED, len(part)))  # a wrong vocabulary shows now and not after an hour
    return dataset


def read_meta(path: Path) -> tuple[int, Tokenizer | None]:
    """nanoGPT's `meta.pkl`: the vocabulary's size and, where it lists the characters, their tokenizer.

    Raises:
        UserError: naming the file, if it holds anything but plain data or its tables do not agree.
    """
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
    # Besides characters there may be, as the last, the token that ends a document: `write_meta` puts it there.
    if not isinstance(stoi, dict) or not all(
        (isinstance(char, str) and len(char) == 1 and not 0xD800 <= ord(char) < 0xE000)
        or (char == EOT and index == size - 1 > 0)
        for char, index in stoi.items()
    ):
        raise UserError(f"{path}: its stoi is not a table of single characters")
    if not all(type(index) is int for index in stoi.values()) or sorted(stoi.values()) != list(range(size)):
        raise UserError(f"{path}: its characters are not numbered from 0 to vocab_size - 1 = {size - 1}")
    if itos is not None and itos != {index: char for char, index in stoi.items()}:
        raise UserError(f"{path}: its stoi and itos do not agree")
    characters = {char: index for char, index in sorted(stoi.items(), key=lambda item: item[1]) if char != EOT}
    content = char_content(["".join(characters)] + [""] * (EOT in stoi))
    content["model"] = {**content["model"], "vocab": characters}
    return size, Tokenizer(content, str(path))


def gpt2_tokenizer() -> Tokenizer | None:
    """GPT-2's tokenizer as `huggingface_hub` keeps it on this machine; None when it has none. Nothing is downloaded."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    for repository in ("openai-community/gpt2", "gpt2"):
        cached = try_to_load_from_cache(repository, "tokenizer.json")
        if isinstance(cached, str):
            tokenizer = load_tokenizer(Path(cached))
            if tokenizer.vocab_size == GPT2_VOCAB:
                return tokenizer
    return None


def _find(path: Path) -> list[_Found]:
    """The datasets at `path`, sorted by name; bare nanoGPT files win over the others beside them."""
    folder, wanted = (path, None) if path.is_dir() else (path.parent, path.name)
    if not folder.is_dir() or (wanted is None and (folder / "manifest.json").is_file()):
        return []
    found: dict[tuple[Kind, str], _Found] = {}
    with told_plainly(folder, "list"):
        files = [file for file in folder.iterdir() if file.is_file()]
    for file in files:
        for kind, pattern in _PATTERNS:
            match = pattern.fullmatch(file.name)
            if match and wanted in (None, match["name"]):
                dataset = found.setdefault((kind, match["name"]), _Found(kind, match["name"]))
                split = "train" if match["split"] == "train" else "val"
                number = match.groupdict().get("number")
                dataset.files[split].append((int(number) if number else 0, file))
                break
    bare = found.get(("nanogpt", ""))
    return [bare] if bare else [found[key] for key in sorted(found)]


def _shard(kind: Kind, file: Path) -> tuple[ShardFile, Width, int]:
    """One file, its width and its vocabulary."""
    with told_plainly(file, "read"):
        size = file.stat().st_size
    if kind == "nano-gpt":
        width, offset, tokens = _npy_header(file)
        vocab_size = GPT2_VOCAB
    elif kind == "llm.c":
        width, vocab_size, tokens = _llmc_header(file)
        offset = _HEADER_BYTES
    else:
        width, vocab_size, offset, tokens = "uint16", NANOGPT_VOCAB, 0, size // 2
        if size % 2:
            raise UserError(
                f"{file}: {size:,} bytes are an odd number, but each token has two: the file was cut; make it again"
            )
    if tokens < 1:
        raise UserError(f"{file}: holds no tokens")
    expected = offset + tokens * _BYTES[width]
    if size != expected:
        raise UserError(
            f"{file}: has {size:,} bytes, but its header's {tokens:,} tokens need {expected:,}: it is damaged; make it again"
        )
    return ShardFile(file.name, tokens, size, "", offset), width, vocab_size


def _npy_header(file: Path) -> tuple[Width, int, int]:
    """Width, bytes before the first token, and tokens of a NumPy array; the header is parsed as a literal, never unpickled."""
    try:
        with told_plainly(file, "read"), file.open("rb") as opened:
            version = np.lib.format.read_magic(opened)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(opened)
            offset = opened.tell()
    except UserError:
        raise
    except (ValueError, SyntaxError, TypeError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise UserError(f"{file}: is not a NumPy array ({' '.join(str(error).split())[:120]})") from None
    if dtype.hasobject:
        raise UserError(f"{file}: refused: it holds pickled objects, not numbers")
    if dtype not in (np.dtype("<u2"), np.dtype("<u4")) or len(shape) != 1:
        raise UserError(f"{file}: is {dtype}{list(shape)}, not one row of little-endian uint16 or uint32 tokens")
    return ("uint16" if dtype.itemsize == 2 else "uint32"), offset, int(shape[0])


def _llmc_header(file: Path) -> tuple[Width, int, int]:
    """Width, vocabulary and tokens that an llm.c header states."""
    with told_plainly(file, "read"), file.open("rb") as opened:
        data = opened.read(_HEADER_BYTES)
    if len(data) < _HEADER_BYTES:
        raise UserError(f"{file}: is shorter than llm.c's header of {_HEADER_BYTES} bytes")
    magic, version, tokens = struct.unpack_from("<3i", data)
    if (magic, version) not in _HEADERS:
        raise UserError(f"{file}: begins with {magic}, version {version}, which is none of llm.c's token formats")
    width, vocab_size = _HEADERS[magic, version]
    return width, vocab_size, tokens


def _split(files: list[ShardFile]) -> SplitInfo:
    return SplitInfo(sum(file.tokens for file in files), documents=0, bytes=0, files=tuple(files))


def _ends(path: Path) -> bytes:
    """The first and last bytes of a file."""
    with told_plainly(path, "read"), path.open("rb") as opened:
        first = opened.read(_SAMPLED)
        opened.seek(max(0, path.stat().st_size - _SAMPLED))
        return first + opened.read(_SAMPLED)
