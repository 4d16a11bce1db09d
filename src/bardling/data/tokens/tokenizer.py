"""Text to token ids and back.

Every tokenizer is a `tokenizer.json` of the `tokenizers` library, so that it loads in other software: bytes (a byte-level BPE
without merges), characters (one entry each), a byte-level BPE trained here with GPT-2's pre-tokenization, or any existing file.
Bytes and characters are encoded by table lookup, which gives the same ids as the library, only faster.

Text is data: `<|endoftext|>` written in a document is encoded as ordinary characters, never as that token. The same holds for
every control token, that is, an added token that is special or looks like markup (`<think>`, `[INST]`); added words and runs of
spaces are vocabulary. Prompts may ask for control tokens to be parsed, which then gives exactly the library's ids. What belongs
around a text (post-processor, beginning and end tokens, chat template) is in `Tokenizer.interface`.

The fingerprint is a digest of the file's content, stored as it was read, so it does not change with the library's version.

Limits: files of up to 256 MiB and ids below 2^24. Lone surrogates, which UTF-8 cannot encode, become U+FFFD.
"""

import contextlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from bardling.config.architecture import GPT2_VOCAB_SIZE
from bardling.data.text.fields import valid_text
from bardling.data.tokens.bpe_files import pair_content, refuse_other_format
from bardling.data.tokens.gpt2_bpe import Encode, fast_encoder, gpt2_tokenizer_file
from bardling.data.tokens.library import (
    is_control,
    library_errors,
    load_library,
    text_reaches_control_tokens,
    with_unwritable_names,
)
from bardling.data.tokens.sentencepiece_files import sentencepiece_content
from bardling.data.tokens.text_interface import TextFiles, TextInterface, read_text_files, text_interface
from bardling.data.tokens.vocabulary import ANY_CHARACTER, BYTE_OF, EOT, byte_content, char_content, pieces, train_bpe_content
from bardling.errors import UserError, closest
from bardling.extensions import TOKENIZERS
from bardling.files.atomic import write_atomically
from bardling.files.digests import json_sha256
from bardling.files.reading import read_json_object

GPT2 = "gpt2"  # spec of GPT-2's tokenizer
NAMES = ("byte", "char", GPT2)
Kind = Literal["byte", "char", "bpe", "other"]
Ids = npt.NDArray[np.int64]

_EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")  # tried in this order if a file names none
_MAX_FILE_BYTES = 256 << 20
_MAX_VOCAB_SIZE = 1 << 24
_FAST_MIN_CHARACTERS = 100_000  # fewer are not worth setting up the faster encoder
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")  # SentencePiece's byte fallback


class Tokenizer:
    """A tokenizer from the `content` of a `tokenizer.json`, which errors call `name`.

    Attributes:
        kind: 'byte', 'char', 'bpe' (byte-level) or 'other'.
        vocab_size: the largest id plus 1.
        eot_id: id of the token that ends a document: `eot`, else the one that `files` name, else a common one; None if there
            is none.
        fingerprint: 16 hexadecimal digits; equal for equal tokenizers.
        interface: what the model expects around its text.
    """

    def __init__(self, content: dict[str, Any], name: str, eot: str | None = None, files: TextFiles | None = None) -> None:
        # padding and truncation were set for someone else's batches; here texts are encoded in full
        self._content, self._stored = {**content, "truncation": None, "padding": None}, content
        self.name, files = name, files or TextFiles()
        library = load_library(self._content, name)
        ids: dict[str, int] = library.get_vocab(with_added_tokens=True)
        if not ids:
            raise UserError(f"{name}: has an empty vocabulary")
        self.vocab_size: int = max(ids.values()) + 1
        if self.vocab_size > _MAX_VOCAB_SIZE:
            raise UserError(f"{name}: token id {self.vocab_size - 1} is over the limit of {_MAX_VOCAB_SIZE:,}")
        of_id = {index: token for token, index in ids.items()}
        self._tokens = [of_id.get(index) for index in range(self.vocab_size)]
        added = [entry for entry in content.get("added_tokens") or [] if entry["content"] in ids]  # empty ones are dropped
        self._added = {ids[entry["content"]]: entry["content"] for entry in added}
        self._control = {ids[entry["content"]]: entry["content"] for entry in added if is_control(entry)}
        self.eot_id: int | None = _end_of_text(ids, self.vocab_size, eot, files)
        splitter = self._content.get("pre_tokenizer") or {}
        lossless = self._content.get("normalizer") is None and not splitter.get("add_prefix_space")
        self.kind: Kind = self._find_kind(splitter, lossless)
        # with exactly GPT-2's pre-tokenization, long texts can be encoded in pieces
        self._splits_like_gpt2 = lossless and splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
        self.fingerprint: str = json_sha256(self._content, sort_keys=True, separators=(",", ":"))[:16]
        self._decoding = self._library = library
        if text_reaches_control_tokens(self._content):
            self._library = load_library(with_unwritable_names(self._content), name)
        self._library.encode_special_tokens = True  # special tokens in a text are text
        self.interface: TextInterface = text_interface(files, ids, self.eot_id, *self._added_around_text())

    def _added_around_text(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the post-processor puts before and after a text, found by encoding one."""
        if not self._content.get("post_processor"):
            return (), ()
        tokens = [token for index, token in enumerate(self._tokens) if token and index not in self._control]
        for probe in ("a", "0", ".", *tokens[:64]):
            with contextlib.suppress(UserError), library_errors(""):  # a word may be unknown
                bare = len(self._library.encode(probe, add_special_tokens=False).ids)
                whole = self._library.encode(probe, add_special_tokens=True)
                if bare:
                    before = next((place for place, mark in enumerate(whole.special_tokens_mask) if not mark), 0)
                    return tuple(whole.ids[:before]), tuple(whole.ids[before + bare :])
        return (), ()

    @property
    def content(self) -> Mapping[str, Any]:
        """The content of its `tokenizer.json`."""
        return self._stored

    @property
    def text_content(self) -> Mapping[str, Any]:
        """The content of the tokenizer that encodes text: no text becomes its control tokens."""
        return self._content if self._library is self._decoding else with_unwritable_names(self._content)

    def extends(self, other: "Tokenizer") -> bool:
        """Whether all ids of another tokenizer are the same tokens here."""
        return self._tokens[: other.vocab_size] == other._tokens

    @property
    def data_key(self) -> str:
        """Names all that determines the tokens of documents: the fingerprint, and what differs from a plain tokenizer."""
        guessed = next((self._tokens.index(token) for token in _EOT_NAMES if token in self._tokens), None)
        around = [list(self.interface.start), self.eot_id, self._library is not self._decoding]
        return self.fingerprint if around == [[], guessed, False] else f"{self.fingerprint}-{json_sha256(around)[:8]}"

    def _find_kind(self, splitter: dict[str, Any], lossless: bool) -> Kind:
        model = self._content.get("model") or {}
        if _has_byte_level(splitter) and (self._content.get("decoder") or {}).get("type") == "ByteLevel":
            only_bytes = not model.get("merges") and self._tokens[:256] == list(BYTE_OF)
            return "byte" if only_bytes and lossless and len(self._control) == self.vocab_size - 256 else "bpe"
        single = all(token is not None and (len(token) == 1 or i in self._control) for i, token in enumerate(self._tokens))
        by_character = splitter.get("pattern") == {"Regex": ANY_CHARACTER} and model.get("type") == "WordLevel"
        return "char" if single and by_character and lossless and model.get("unk_token") not in self._tokens else "other"

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Encode texts, int64 [tokens] each; special tokens written in them are ordinary text, and none are added.

        With 'char', a character that is not in the vocabulary is a `UserError`.
        """
        texts = [valid_text(text) for text in texts]
        if self.kind == "byte":
            return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]
        if self.kind == "char":
            return [self._encode_characters(text) for text in texts]
        if sum(map(len, texts)) >= _FAST_MIN_CHARACTERS and self._fast is not None:
            with contextlib.suppress(ValueError):  # its regular expressions give up on a run of a million spaces
                return self._fast(texts)
        return self.encode_with_library(texts)

    def encode_with_library(self, texts: Sequence[str]) -> list[Ids]:
        """The same by the `tokenizers` library, which defines the ids; the texts have no lone surrogates."""
        split = [list(pieces(text)) if self._splits_like_gpt2 else [text] for text in texts]
        with library_errors(f"{self.name}: cannot encode the text"):
            encoded = self._library.encode_batch_fast([piece for parts in split for piece in parts], add_special_tokens=False)
        rows = iter([np.asarray(encoding.ids, np.int64) for encoding in encoded])
        return [np.concatenate([next(rows) for _ in parts]) for parts in split]

    @cached_property
    def _fast(self) -> Encode | None:
        """A faster encoder with the same ids, if there is one."""
        return fast_encoder(self._content) if self.vocab_size == GPT2_VOCAB_SIZE and self._splits_like_gpt2 else None

    def encode(self, text: str, allow_special: bool = False) -> Ids:
        """Encode one text: int64 [tokens]. With `allow_special`, added tokens written in it become those tokens."""
        if not allow_special or not self._added:
            return self.encode_batch([text])[0]
        if self.kind != "char":
            with library_errors(f"{self.name}: cannot encode the text"):
                return np.asarray(self._parsing.encode(valid_text(text), add_special_tokens=False).ids, np.int64)
        names = {name: index for index, name in self._added.items()}
        parts = re.split("(" + "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) + ")", text)
        ordinary = iter(self.encode_batch(parts[::2]))
        rows = [np.array([names[part]], np.int64) if i % 2 else next(ordinary) for i, part in enumerate(parts)]
        return np.concatenate(rows)

    def encode_with_offsets(self, text: str) -> tuple[Ids, Ids]:
        """Encode one text, parsing added tokens: int64 [tokens], and where each begins and ends, in characters, [tokens, 2]."""
        with library_errors(f"{self.name}: cannot encode the text"):
            encoding = self._parsing.encode(valid_text(text), add_special_tokens=False)
        return np.asarray(encoding.ids, np.int64), np.asarray(encoding.offsets, np.int64).reshape(-1, 2)

    @cached_property
    def _parsing(self) -> Any:
        """The library's tokenizer as `transformers` uses it, which parses added tokens in a text."""
        return load_library(self._content, self.name)

    def encode_prompt(self, text: str, allow_special: bool = False) -> list[int]:
        """Encode a text that goes on: with what the post-processor puts around it, except for a token that would end it."""
        ids = [int(token) for token in self.encode(text, allow_special)]
        return [*self.interface.start, *ids, *self.interface.prompt_end]

    def control_tokens_in(self, text: str) -> Counter[str]:
        """How often each control token is written in a text, where it is encoded as ordinary characters."""
        return Counter(self._control_names.findall(text))

    @property
    def control_names(self) -> list[str]:
        """Control tokens, as a text could contain them; the longest first."""
        return sorted(self._control.values(), key=len, reverse=True)

    @cached_property
    def _control_names(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.control_names)) if self._control else "(?!)")

    @cached_property
    def _character_ids(self) -> Ids:
        """Id of each code point; -1 if it has none."""
        points = {ord(t): i for i, t in enumerate(self._tokens) if t is not None and len(t) == 1 and i not in self._control}
        table = np.full(sys.maxunicode + 1, -1, np.int64)
        table[list(points)] = list(points.values())
        return table

    def _encode_characters(self, text: str) -> Ids:
        ids: Ids = self._character_ids[np.frombuffer(text.encode("utf-32-le"), "<u4")]
        if ids.size and ids.min() < 0:
            place = int(np.argmax(ids < 0))
            line, column = text.count("\n", 0, place) + 1, place - (text.rfind("\n", 0, place) + 1) + 1
            what = f"character {text[place]!r} (U+{ord(text[place]):04X}) at line {line}, column {column}"
            remedy = "remove it, or use the tokenizer 'byte', which can encode any text"
            raise UserError(f"{what} is not in the vocabulary of {self.vocab_size} characters: {remedy}")
        return ids

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text of some ids, with special tokens as their names and invalid UTF-8 as U+FFFD; a bad id is a `ValueError`."""
        if self.kind == "other":
            checked = list(map(self._checked, ids))
            with library_errors(f"{self.name}: cannot decode tokens"):
                return str(self._decoding.decode(checked, skip_special_tokens=False))
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add to that of `before`: a space between the two is part of it."""
        return self.decode([*before, *ids])[len(self.decode(before)) :]

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"token id {index} is outside the vocabulary of {self.vocab_size}")
        return int(index)

    def token_bytes(self, index: int) -> bytes:
        """UTF-8 bytes of a token, perhaps an incomplete character; of a special token, its name."""
        index = self._checked(index)
        token = self._tokens[index]
        if token is None:
            return b""
        if index in self._added or self.kind == "char":
            return token.encode()
        if self.kind in ("byte", "bpe"):
            known = all(character in BYTE_OF for character in token)
            return bytes(map(BYTE_OF.__getitem__, token)) if known else token.encode()
        if _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        prefix = (self._content.get("model") or {}).get("continuing_subword_prefix")
        if isinstance(prefix, str) and prefix and token.startswith(prefix):
            return token[len(prefix) :].encode()
        return token.replace("\u2581", " ").encode()  # SentencePiece's mark for a space

    def is_byte(self, index: int) -> bool:
        """Whether a token is a byte of SentencePiece's byte fallback."""
        return _BYTE_TOKEN.fullmatch(self._tokens[self._checked(index)] or "") is not None

    def bytes_per_token(self) -> Ids:
        """UTF-8 bytes of each token: int64 [vocab_size], 0 for control tokens and those that the tokenizer puts around a text.

        They turn a loss per token into bits per byte, which is comparable between tokenizers. Exact for bytes, characters and
        byte-level BPE, approximate for others (WordPiece does not record where spaces were). The token for unknown words stands
        for text, and has the bytes of its name, as in the decoded text.
        """
        about, model = self.interface, self._content.get("model") or {}
        unknown = (model.get("unk_token"), model.get("unk_id"))
        control = {index for index, name in self._control.items() if name != unknown[0] and index != unknown[1]}
        without = {self.eot_id, *about.start, *about.end, *control}
        counts = [0 if index in without else len(self.token_bytes(index)) for index in range(self.vocab_size)]
        return np.array(counts, np.int64)

    def save(self, folder: Path | str) -> None:
        """Write `tokenizer.json` and the files for transformers' AutoTokenizer, each atomically."""
        folder, about = Path(folder), self.interface
        named = {"bos_token": about.bos, "eos_token": self.eot_id, "pad_token": about.pad, "unk_token": about.unk}
        names = {
            key: None if index is None or index >= self.vocab_size else self._tokens[index] for key, index in named.items()
        }
        try:
            text = (json.dumps(self._stored, ensure_ascii=False) + "\n").encode()
        except UnicodeEncodeError:  # a lone surrogate is not valid UTF-8; escaped, as it was read, it is valid JSON
            text = (json.dumps(self._stored) + "\n").encode()
        write_atomically(folder / "tokenizer.json", text)
        about.write(folder, names)


def _has_byte_level(part: Any) -> bool:
    """Whether a pre-tokenizer is `ByteLevel`, or a sequence that contains it."""
    if not isinstance(part, dict):
        return False
    return part.get("type") == "ByteLevel" or any(map(_has_byte_level, part.get("pretokenizers") or ()))


def _end_of_text(ids: Mapping[str, int], vocab_size: int, eot: str | None, files: TextFiles) -> int | None:
    """The token that ends a document: as named, as numbered by the model's files, or else a common one."""
    named = eot if eot is not None else files.token("eos_token")
    if named is not None and named in ids:
        return ids[named]
    numbered = next((index for index in files.ids("eos_token_id") if index < vocab_size), None)
    guesses = () if named is not None else _EOT_NAMES
    return numbered if numbered is not None else next((ids[token] for token in guesses if token in ids), None)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a `tokenizer.json`, or the one in a folder, with the files beside it that describe the model's text.

    A folder may have a `vocab.json` and a `merges.txt` instead; a file may also be a SentencePiece model.
    """
    path = Path(path)
    if path.suffix == ".model" and path.is_file():
        return Tokenizer(*sentencepiece_content(path))
    folder, path = path.is_dir(), path / "tokenizer.json" if path.is_dir() else path
    if not folder and not path.is_file():
        raise UserError(f"{path}: no such tokenizer file")
    if not folder:
        refuse_other_format(path)
    try:
        content = read_json_object(path, limit=_MAX_FILE_BYTES) if path.is_file() else pair_content(path.parent)
    except UserError as error:
        if not str(error).startswith(f"{path}: is not valid JSON"):
            raise
        raise UserError(f"{error}: use a complete tokenizer.json, or the folder of one") from None
    return Tokenizer(content, str(path), files=read_text_files(path.parent))


def check_tokenizer_spec(spec: str) -> int | None:
    """The SIZE of 'bpe:SIZE', or None for any other valid spec (see `build_tokenizer`); a `UserError` if it is invalid."""
    if spec in NAMES or spec in TOKENIZERS or is_tokenizer_path(spec):
        return None
    kind, _, size = spec.partition(":")
    if kind == "bpe":
        if not re.fullmatch("[0-9]{1,8}", size):
            raise UserError(f"data.tokenizer = {spec!r}: SIZE must be a number, as in bpe:4096")
        if not 257 <= int(size) <= _MAX_VOCAB_SIZE:
            raise UserError(f"data.tokenizer = {spec!r}: SIZE must be between 257 (all bytes and {EOT}) and {_MAX_VOCAB_SIZE}")
        return int(size)
    hint = closest(kind, ["byte", "char", "bpe", GPT2])
    raise UserError(f"data.tokenizer = {spec!r}: must be byte, char, gpt2, bpe:SIZE, or an existing file or folder{hint}")


def is_tokenizer_path(spec: str) -> bool:
    """Whether a spec (see `build_tokenizer`) is a path. Names of tokenizers take precedence over files: `./gpt2` is a path."""
    named = spec in NAMES or spec in TOKENIZERS or re.fullmatch("bpe:[0-9]+", spec)
    return not named and Path(spec).exists()


def build_tokenizer(spec: str, texts: Iterable[str]) -> Tokenizer:
    """Build the tokenizer that a spec names from `texts`, which only 'char', 'bpe' and extensions use, or load it.

    A spec is 'byte' (ids 0 to 255 are the bytes, 256 is `<|endoftext|>`); 'char' (the characters of the texts, sorted, followed
    by `<|endoftext|>` only if there are several texts to separate); 'bpe:SIZE' (byte-level BPE trained on the texts,
    `<|endoftext|>` last; SIZE counts all entries, and the vocabulary is smaller if the texts yield too few merges); 'gpt2'
    (GPT-2's own, 50,257 entries, from the Hugging Face hub or its local cache); or a `tokenizer.json` or its folder.
    """
    if (size := check_tokenizer_spec(spec)) is not None:
        return Tokenizer(train_bpe_content(texts, size), spec)
    if spec in TOKENIZERS:
        return cast(Tokenizer, TOKENIZERS.get("data.tokenizer", spec)(texts))
    if spec == "byte":
        return Tokenizer(byte_content(), spec)
    if spec == "char":
        return Tokenizer(char_content(texts), spec)
    return load_tokenizer(gpt2_tokenizer_file() if spec == GPT2 else spec)
