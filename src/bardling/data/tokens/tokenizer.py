"""Text to token ids and back.

Every tokenizer is a `tokenizer.json` of the `tokenizers` library, so that it loads in other software: bytes (a byte-level BPE
without merges), characters (one entry each), a byte-level BPE trained here with GPT-2's pre-tokenization, or any existing file.
Bytes and characters are encoded by table lookup, which gives the same ids as the library, only faster.

Text is data: `<|endoftext|>` written in a document is encoded as ordinary characters, never as the special token. The
fingerprint is a digest of the file's content, stored as it was read, so it does not change with the library's version.

Limits: files of up to 256 MiB and ids below 2^24. Lone surrogates, which UTF-8 cannot encode, become U+FFFD.
"""

import codecs
import json
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from bardling.config.architecture import GPT2_VOCAB_SIZE
from bardling.data.text.sources import valid_text
from bardling.data.tokens.bpe_files import pair_content
from bardling.data.tokens.gpt2_bpe import Encode, fast_encoder, gpt2_tokenizer_file
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


class Tokenizer:
    """A tokenizer from the `content` of a `tokenizer.json`, which errors call `name`.

    Attributes:
        kind: 'byte', 'char', 'bpe' (byte-level) or 'other'.
        vocab_size: the largest id plus 1.
        eot_id: id of the token that ends a document, named by `eot`, else a common one; None if there is none.
        fingerprint: 16 hexadecimal digits; equal for equal tokenizers.
    """

    def __init__(self, content: dict[str, Any], name: str, eot: str | None = None) -> None:
        from tokenizers import Tokenizer as Library

        # padding and truncation were set for someone else's batches; here texts are encoded in full
        self._content = {**content, "truncation": None, "padding": None}
        try:
            self._library = Library.from_str(json.dumps(self._content))
            self._library.encode_special_tokens = True  # special tokens in a text are text
            ids: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        except BaseException as error:  # the library's own panics do not derive from Exception
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise UserError(f"{name}: is not a readable tokenizer ({' '.join(str(error).split())[:200]})") from error
            raise
        if not ids:
            raise UserError(f"{name}: has an empty vocabulary")
        self.vocab_size: int = max(ids.values()) + 1
        if self.vocab_size > _MAX_VOCAB_SIZE:
            raise UserError(f"{name}: token id {self.vocab_size - 1} is over the limit of {_MAX_VOCAB_SIZE:,}")
        of_id = {index: token for token, index in ids.items()}
        self._tokens = [of_id.get(index) for index in range(self.vocab_size)]
        added = [entry for entry in content.get("added_tokens") or [] if isinstance(entry, dict)]
        self._added = {entry["id"]: entry["content"] for entry in added}
        self._special = {entry["id"] for entry in added if entry.get("special")}
        names = _EOT_NAMES if eot is None else (eot,)
        self.eot_id: int | None = next((ids[token] for token in names if token in ids), None)
        splitter = self._content.get("pre_tokenizer") or {}
        lossless = self._content.get("normalizer") is None and not splitter.get("add_prefix_space")
        self.kind: Kind = self._find_kind(splitter, lossless)
        # with exactly GPT-2's pre-tokenization, long texts can be encoded in pieces
        self._splits_like_gpt2 = lossless and splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
        self.fingerprint: str = json_sha256(self._content, sort_keys=True, separators=(",", ":"))[:16]

    def _find_kind(self, splitter: dict[str, Any], lossless: bool) -> Kind:
        model = self._content.get("model") or {}
        if _has_byte_level(splitter) and (self._content.get("decoder") or {}).get("type") == "ByteLevel":
            only_bytes = not model.get("merges") and self._tokens[:256] == list(BYTE_OF)
            return "byte" if only_bytes and lossless and len(self._special) == self.vocab_size - 256 else "bpe"
        single = all(token is not None and (len(token) == 1 or i in self._special) for i, token in enumerate(self._tokens))
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
            return self._fast(texts)
        split = [list(pieces(text)) if self._splits_like_gpt2 else [text] for text in texts]
        encoded = self._library.encode_batch_fast([piece for parts in split for piece in parts], add_special_tokens=False)
        rows = iter([np.asarray(encoding.ids, np.int64) for encoding in encoded])
        return [np.concatenate([next(rows) for _ in parts]) for parts in split]

    @cached_property
    def _fast(self) -> Encode | None:
        """A faster encoder with the same ids, if there is one."""
        return fast_encoder(self._content) if self.vocab_size == GPT2_VOCAB_SIZE and self._splits_like_gpt2 else None

    def encode(self, text: str, allow_special: bool = False) -> Ids:
        """Encode one text: int64 [tokens]. With `allow_special`, special tokens written in it become those tokens."""
        if not allow_special or not self._special:
            return self.encode_batch([text])[0]
        names = {self._added[index]: index for index in self._special}
        parts = re.split("(" + "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) + ")", text)
        ordinary = iter(self.encode_batch(parts[::2]))
        rows = [np.array([names[part]], np.int64) if i % 2 else next(ordinary) for i, part in enumerate(parts)]
        return np.concatenate(rows)

    @cached_property
    def _character_ids(self) -> Ids:
        """Id of each code point; -1 if it has none."""
        points = {ord(t): i for i, t in enumerate(self._tokens) if t is not None and len(t) == 1 and i not in self._special}
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
            return str(self._library.decode(list(map(self._checked, ids)), skip_special_tokens=False))
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

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
            return bytes(BYTE_OF[character] for character in token if character in BYTE_OF)
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):  # SentencePiece's byte fallback
            return bytes([int(token[3:5], 16)])
        prefix = (self._content.get("model") or {}).get("continuing_subword_prefix")
        if isinstance(prefix, str) and prefix and token.startswith(prefix):
            return token[len(prefix) :].encode()
        return token.replace("\u2581", " ").encode()  # SentencePiece's mark for a space

    def bytes_per_token(self) -> Ids:
        """UTF-8 bytes of each token: int64 [vocab_size], 0 for special tokens.

        They turn a loss per token into bits per byte, which is comparable between tokenizers. Exact for bytes, characters and
        byte-level BPE, approximate for others (WordPiece does not record where spaces were).
        """
        counts = [0 if index in self._special else len(self.token_bytes(index)) for index in range(self.vocab_size)]
        return np.array(counts, np.int64)

    def save(self, folder: Path | str) -> None:
        """Write `tokenizer.json` and a `tokenizer_config.json` for transformers' AutoTokenizer, each atomically."""
        folder = Path(folder)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.eot_id is not None:
            config |= {"bos_token": self._tokens[self.eot_id], "eos_token": self._tokens[self.eot_id]}
        write_atomically(folder / "tokenizer.json", (json.dumps(self._content, ensure_ascii=False) + "\n").encode())
        write_atomically(folder / "tokenizer_config.json", (json.dumps(config, indent=1) + "\n").encode())


class StreamDecoder:
    """Decodes ids one at a time, holding back the bytes of a character until it is complete.

    The results of `push` followed by that of `finish` equal `Tokenizer.decode` of all ids. For tokenizers of kind 'other',
    whose decoding depends on context, the most recent tokens are decoded again with each new one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # kind 'other': the tokens returned last, as context, then those held back
        self._returned = 0  # how many of them have been returned

    def push(self, token: int) -> str:
        """Text completed by this token; may be empty."""
        if self._tokenizer.kind != "other":
            return self._utf8.decode(self._tokenizer.token_bytes(token))
        self._ids.append(token)
        return self._new_text(final=False)

    def finish(self) -> str:
        """The text held back; an incomplete character becomes U+FFFD."""
        if self._tokenizer.kind != "other":
            return self._utf8.decode(b"", final=True)
        return self._new_text(final=True)

    def _new_text(self, *, final: bool) -> str:
        text, before = self._tokenizer.decode(self._ids), self._tokenizer.decode(self._ids[: self._returned])
        if not final and (len(text) <= len(before) or text.endswith("\ufffd")):
            return ""
        self._ids, self._returned = self._ids[self._returned :], len(self._ids) - self._returned
        return text[len(before) :]


def _has_byte_level(part: Any) -> bool:
    """Whether a pre-tokenizer is `ByteLevel`, or a sequence that contains it."""
    if not isinstance(part, dict):
        return False
    return part.get("type") == "ByteLevel" or any(map(_has_byte_level, part.get("pretokenizers") or ()))


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a `tokenizer.json`, or the one in a folder; the `tokenizer_config.json` beside it names the end-of-text token.

    A folder may have a `vocab.json` and a `merges.txt` instead.
    """
    path = Path(path)
    folder, path = path.is_dir(), path / "tokenizer.json" if path.is_dir() else path
    if not folder and not path.is_file():
        raise UserError(f"{path}: no such tokenizer file")
    content = read_json_object(path, limit=_MAX_FILE_BYTES) if path.is_file() else pair_content(path.parent)
    config = path.with_name("tokenizer_config.json")
    eot = read_json_object(config, limit=_MAX_FILE_BYTES).get("eos_token") if config.is_file() else None
    if isinstance(eot, dict):
        eot = eot.get("content")
    return Tokenizer(content, str(path), eot if isinstance(eot, str) else None)


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
