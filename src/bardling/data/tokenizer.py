"""Text to token ids and back.

Every tokenizer is a `tokenizer.json` of the `tokenizers` library, so that other software opens it: bytes (a byte-level BPE
without merges), characters (one entry each), a byte-level BPE trained here with GPT-2's splitting of words, or any file from
elsewhere. Bytes and characters are encoded by table look-up, which gives the same ids as the library, only faster.

Text is data: `<|endoftext|>` written in a document is encoded as ordinary characters, never as the control token. The
fingerprint is a digest of the file's content, kept as it was read, so it does not change with the library's version.

Limits: a file of up to 256 MiB and ids below 2^24. Lone surrogates, which UTF-8 cannot say, become U+FFFD.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bardling.data.gpt2bpe import GPT2_SIZE, Encode, fast_encoder
from bardling.data.hub import gpt2_tokenizer_file
from bardling.data.vocabulary import (
    ANY_CHARACTER,
    EOT,
    byte_alphabet,
    byte_content,
    char_content,
    pieces,
    train_bpe_content,
    valid_text,
)
from bardling.errors import UserError, closest
from bardling.files import told_plainly, write_whole

GPT2 = "gpt2"
"""Spec of GPT-2's tokenizer."""
Kind = Literal["byte", "char", "bpe", "other"]
Ids = npt.NDArray[np.int64]

_END_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")  # tried in this order when a file names none
_LARGEST_FILE = 256 << 20  # bytes
_MOST_IDS = 1 << 24
_MUCH = 100_000  # characters from which on it pays to set up the quicker way of encoding


class Tokenizer:
    """A tokenizer, whole in itself: what it was made or read from, and what it can do.

    Attributes:
        kind: 'byte', 'char', 'bpe' (byte-level) or 'other'.
        vocab_size: ids are below it.
        eot_id: id of the token that ends a document; None when there is none.
        fingerprint: 16 hexadecimal digits; equal for equal tokenizers.

    Args:
        content: a parsed `tokenizer.json`.
        name: what to call it in errors.
        end: the token that ends a document; None looks for a usual one.

    Raises:
        UserError: if the content is no tokenizer.
    """

    def __init__(self, content: dict[str, Any], name: str, end: str | None = None) -> None:
        from tokenizers import Tokenizer as Library

        # what a file says about padding and cutting is for batches of its old owner; here texts are encoded whole
        self._content = {**content, "truncation": None, "padding": None}
        self._name = name
        try:
            self._library = Library.from_str(json.dumps(self._content))
            self._library.encode_special_tokens = True  # special tokens in a text are text
            vocabulary: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        except BaseException as error:  # the library's own panics do not derive from Exception
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise UserError(f"{name}: is no tokenizer that can be read ({_one_line(error)})") from error
            raise
        if not vocabulary:
            raise UserError(f"{name}: has an empty vocabulary")
        if max(vocabulary.values()) >= _MOST_IDS:
            raise UserError(f"{name}: token id {max(vocabulary.values())} is over the limit of {_MOST_IDS:,}")
        self.vocab_size: int = max(vocabulary.values()) + 1
        self._tokens: list[str | None] = [None] * self.vocab_size
        for token, index in vocabulary.items():
            self._tokens[index] = token
        added = [entry for entry in content.get("added_tokens") or [] if isinstance(entry, dict)]
        self._added = {entry["id"]: entry["content"] for entry in added}
        self._special = {entry["id"] for entry in added if entry.get("special")}
        names = _END_NAMES if end is None else (end,)
        self.eot_id: int | None = next((vocabulary[token] for token in names if token in vocabulary), None)
        self.kind: Kind = self._find_kind()
        canonical = json.dumps(self._content, sort_keys=True, separators=(",", ":"))
        self.fingerprint: str = hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def _find_kind(self) -> Kind:
        model, before = self._content.get("model") or {}, self._content.get("pre_tokenizer") or {}
        plain = self._content.get("normalizer") is None and not before.get("add_prefix_space")
        if _has_step(before, "ByteLevel") and (self._content.get("decoder") or {}).get("type") == "ByteLevel":
            bare = not model.get("merges") and self._tokens[:256] == byte_alphabet()
            return "byte" if bare and plain and len(self._special) == self.vocab_size - 256 else "bpe"
        single = all(token is not None and (len(token) == 1 or i in self._special) for i, token in enumerate(self._tokens))
        alone = before.get("pattern") == {"Regex": ANY_CHARACTER} and model.get("type") == "WordLevel"
        return "char" if single and alone and plain and model.get("unk_token") not in self._tokens else "other"

    @property
    def _may_cut(self) -> bool:
        """Whether words are split exactly as in GPT-2, so that long texts may be encoded in pieces."""
        before = self._content.get("pre_tokenizer") or {}
        like_gpt2 = before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before.get("add_prefix_space")
        return bool(like_gpt2) and self._content.get("normalizer") is None

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Encode texts, special tokens in them as ordinary text and none added.

        Returns:
            For each text int64 [tokens].

        Raises:
            UserError: under 'char', for a character that is not in the vocabulary.
        """
        texts = [valid_text(text) for text in texts]
        if self.kind == "byte":
            return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]
        if self.kind == "char":
            return [self._encode_characters(text) for text in texts]
        if sum(map(len, texts)) >= _MUCH and self._fast is not None:
            return self._fast(texts)
        cut = [list(pieces(text)) if self._may_cut else [text] for text in texts]
        encoded = self._library.encode_batch_fast([piece for parts in cut for piece in parts], add_special_tokens=False)
        rows = iter([np.asarray(encoding.ids, np.int64) for encoding in encoded])
        return [np.concatenate([next(rows) for _ in parts]) for parts in cut]

    @cached_property
    def _fast(self) -> Encode | None:
        """A quicker way to the same ids, if there is one."""
        return fast_encoder(self._content) if self.vocab_size == GPT2_SIZE and self._may_cut else None

    def encode(self, text: str, allow_special: bool = False) -> Ids:
        """Encode one text: int64 [tokens]. With `allow_special`, names of special tokens in it become those tokens."""
        if not allow_special or not self._special:
            return self.encode_batch([text])[0]
        names = {self._added[index]: index for index in self._special}
        parts = re.split("(" + "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) + ")", text)
        ordinary = iter(self.encode_batch(parts[::2]))
        rows = [np.array([names[part]], np.int64) if i % 2 else next(ordinary) for i, part in enumerate(parts)]
        return np.concatenate(rows)

    @cached_property
    def _character_ids(self) -> Ids:
        """Id of each code point up to the largest in the vocabulary, -1 for those that have none."""
        points = {ord(t): i for i, t in enumerate(self._tokens) if t is not None and len(t) == 1 and i not in self._special}
        table = np.full(max(points, default=0) + 1, -1, np.int64)
        table[list(points)] = list(points.values())
        return table

    def _encode_characters(self, text: str) -> Ids:
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        table = self._character_ids
        ids = np.where(points < table.size, table[np.minimum(points, table.size - 1)], -1)
        if ids.size and ids.min() < 0:
            place = int(np.argmax(ids < 0))
            line, column = text.count("\n", 0, place) + 1, place - (text.rfind("\n", 0, place) + 1) + 1
            raise UserError(
                f"character {text[place]!r} (U+{ord(text[place]):04X}) at line {line}, column {column} is not in the "
                f"vocabulary of {self.vocab_size} characters: remove it, or train with the tokenizer 'byte', which knows "
                "every text"
            )
        return ids

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text of some ids, special tokens by their names; what is not UTF-8 becomes U+FFFD.

        Raises:
            ValueError: if an id is outside the vocabulary.
        """
        plain = [self._checked(index) for index in ids]
        if self.kind in ("byte", "bpe"):
            return b"".join(map(self.token_bytes, plain)).decode("utf-8", "replace")
        if self.kind == "char":
            return "".join(self._tokens[index] or "" for index in plain)
        return str(self._library.decode(plain, skip_special_tokens=False))

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"token id {index} is outside the vocabulary of {self.vocab_size}")
        return int(index)

    def token_bytes(self, index: int) -> bytes:
        """The UTF-8 bytes, perhaps an incomplete character, that a token stands for; its name for a special token."""
        token = self._tokens[index]
        if token is None:
            return b""
        if index in self._added or self.kind == "char":
            return token.encode()
        if self.kind in ("byte", "bpe"):
            return bytes(_BYTE_OF[character] for character in token if character in _BYTE_OF)
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):  # SentencePiece's fallback for bytes
            return bytes([int(token[3:5], 16)])
        prefix = (self._content.get("model") or {}).get("continuing_subword_prefix")
        if isinstance(prefix, str) and prefix and token.startswith(prefix):
            return token[len(prefix) :].encode()
        return token.replace("\u2581", " ").encode()  # SentencePiece's mark for a space

    def bytes_per_token(self) -> Ids:
        """UTF-8 bytes that each token stands for: int64 [vocab_size], 0 for special tokens.

        With it a loss per token becomes bits per byte, which can be compared between tokenizers. Exact for bytes, characters
        and byte-level BPE; for others as near as their notation allows (WordPiece does not say where spaces were).
        """
        counts = [0 if index in self._special else len(self.token_bytes(index)) for index in range(self.vocab_size)]
        return np.array(counts, np.int64)

    def save(self, folder: Path | str) -> None:
        """Write `tokenizer.json` and a `tokenizer_config.json` for transformers' AutoTokenizer, each whole or not at all."""
        folder = Path(folder)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.eot_id is not None:
            config |= {"bos_token": self._tokens[self.eot_id], "eos_token": self._tokens[self.eot_id]}
        write_whole(folder / "tokenizer.json", (json.dumps(self._content, ensure_ascii=False) + "\n").encode())
        write_whole(folder / "tokenizer_config.json", (json.dumps(config, indent=1) + "\n").encode())


class StreamDecoder:
    """Decodes ids one at a time, holding back the bytes of a character until it is whole.

    Tokenizers whose decoding looks at neighbours are given the tokens just before as well.

    What `push` gave, followed by `finish`, is what `Tokenizer.decode` gives for all the ids together.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # for tokenizers whose decoding looks at neighbours: what was given last, and what waits
        self._given = 0  # how many of them have been given

    def push(self, token: int) -> str:
        """Text that is complete with this token; may be empty."""
        if self._tokenizer.kind != "other":
            return self._utf8.decode(self._tokenizer.token_bytes(self._tokenizer._checked(token)))
        self._ids.append(token)
        return self._give(self._tokenizer.decode(self._ids), final=False)

    def finish(self) -> str:
        """What was held back; an incomplete character becomes U+FFFD."""
        if self._tokenizer.kind != "other":
            return self._utf8.decode(b"", final=True)
        return self._give(self._tokenizer.decode(self._ids), final=True)

    def _give(self, text: str, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._given])
        if not final and (len(text) <= len(before) or text.endswith("\ufffd")):
            return ""
        self._ids, self._given = self._ids[self._given :], len(self._ids) - self._given
        return text[len(before) :]


_BYTE_OF = {character: byte for byte, character in enumerate(byte_alphabet())}


def _has_step(part: Any, kind: str) -> bool:
    """Whether a normalizer, pre-tokenizer or decoder is of a kind, or a sequence that holds one."""
    if not isinstance(part, dict):
        return False
    steps = part.get("pretokenizers") or part.get("decoders") or []
    return part.get("type") == kind or any(_has_step(step, kind) for step in steps)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a `tokenizer.json`, or the one in a folder, with the end token that a `tokenizer_config.json` beside it names.

    Raises:
        UserError: if it is missing, too large or no tokenizer.
    """
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer file")
    content = _read_object(path)
    beside = path.with_name("tokenizer_config.json")
    end = _read_object(beside).get("eos_token") if beside.is_file() else None
    if isinstance(end, dict):
        end = end.get("content")
    return Tokenizer(content, str(path), end if isinstance(end, str) else None)


def _read_object(path: Path) -> dict[str, Any]:
    with told_plainly(path, "read"):
        size = path.stat().st_size
    if size > _LARGEST_FILE:
        raise UserError(f"{path}: is over {_LARGEST_FILE >> 20} MiB, the largest tokenizer file that is read")
    with told_plainly(path, "read"):
        data = path.read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({_one_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    return content


def check_tokenizer_spec(spec: str) -> int | None:
    """The SIZE of 'bpe:SIZE', or None for 'byte', 'char', 'gpt2' and paths that exist.

    Raises:
        UserError: if the spec is none of these.
    """
    if spec in ("byte", "char", GPT2):
        return None
    kind, colon, size = spec.partition(":")
    if kind == "bpe" and not Path(spec).exists():
        if not colon or not size.isascii() or not size.isdigit() or len(size) > 8:
            raise UserError(f"data.tokenizer = {spec!r}: SIZE must be a number, as in bpe:4096")
        if not 257 <= int(size) <= _MOST_IDS:
            raise UserError(f"data.tokenizer = {spec!r}: SIZE must be between 257 (every byte and {EOT}) and {_MOST_IDS}")
        return int(size)
    if not Path(spec).exists():
        hint = closest(kind, ["byte", "char", "bpe", GPT2])
        raise UserError(
            f"data.tokenizer = {spec!r}: is neither byte, char, gpt2, bpe:SIZE nor an existing file or folder{hint}"
        )
    return None


def build_tokenizer(spec: str, texts: Iterable[str]) -> Tokenizer:
    """Make the tokenizer that a spec asks for.

    Args:
        spec: 'byte' (ids 0 to 255 are the bytes, 256 is `<|endoftext|>`); 'char' (the characters of the texts, sorted, and
            `<|endoftext|>` after them only where there are several texts to keep apart); 'bpe:SIZE' (byte-level BPE trained
            on the texts, `<|endoftext|>` last; SIZE counts everything, and fewer come out where the texts give too few merges);
            'gpt2' (GPT-2's own, 50,257 entries, from the Hugging Face hub or its cache here); or the path of a
            `tokenizer.json`.
        texts: what 'char' and 'bpe' are made from; not looked at otherwise.

    Raises:
        UserError: if the spec is wrong or the texts are empty.
    """
    size = check_tokenizer_spec(spec)
    if spec == GPT2:
        return load_tokenizer(gpt2_tokenizer_file())
    if spec != "byte" and spec != "char" and size is None:
        return load_tokenizer(spec)
    if spec == "byte":
        return Tokenizer(byte_content(), spec)
    if spec == "char":
        return Tokenizer(char_content(texts), spec)
    assert size is not None
    return Tokenizer(train_bpe_content(texts, size), spec)
