"""Much text to ids, with `gigatoken` where it is installed (extra `fast`) and proves equal to `tokenizers`.

Measured on one core with 300 MB of Python code and its documentation, GPT-2's vocabulary: 125 to 155 MB/s, against 6 to 12 MB/s
with `tiktoken` and 2 MB/s with `tokenizers`, which is the reference. `gigatoken` is young, so nothing depends on it alone:

- It is used only for a byte-level BPE without dropout whose added tokens all control the model. They are removed before it
  loads the tokenizer, because it would parse them in a text, where they are ordinary characters.
- It first encodes a text of hostile parts: every 97th code point, scripts of many kinds, whitespace, long words, names of
  control tokens.
- Of each corpus, the first 64 KiB that an encoder gets and 1 KiB of each batch are encoded by both, and in every 16th batch,
  the bytes of all tokens must add up to those of the text. A difference raises `EncodersDiffer`: the preparation starts again
  without it.

Its memory grows with the words that it has seen, so it is loaded anew (0.2 s) when the process has grown by `MOST_GROWTH`.

Limits: other kinds of tokenizers (SentencePiece, WordPiece) are encoded by `tokenizers`, and small batches in a program's own
process by `Tokenizer.encode_batch`.
"""

import contextlib
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bardling.data.text.fields import valid_text
from bardling.data.tokens.library import is_control, library_errors
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError

Ids = npt.NDArray[Any]
MOST_GROWTH = 128 << 20  # bytes
_LEAST_BETWEEN_LOADS = 16 << 20  # bytes of text
_FIRST_SAMPLE, _SAMPLE = 64 << 10, 1 << 10  # bytes of a batch that are encoded by both
_EVERY = 16  # batches between two whose bytes are counted
_STATM = Path("/proc/self/statm")


class EncodersDiffer(Exception):  # noqa: N818  it is no error of the user, who never sees it
    """`gigatoken` gave other ids than `tokenizers`; str() is a part of the text where it did."""


class BulkEncoder:
    """Encodes UTF-8 texts, with `gigatoken` if that is allowed and there is one; `EncodersDiffer` if it gives other ids."""

    def __init__(self, tokenizer: Tokenizer, *, allow_fast: bool = True) -> None:
        self._tokenizer = tokenizer
        self._fast = _fast_encoder(tokenizer) if allow_fast and has_fast(tokenizer) else None

    def encode(self, texts: Sequence[bytes]) -> list[Ids]:
        """Ids of each text, [tokens]; see `Tokenizer.encode_batch`. After an `EncodersDiffer`, no ids of it may be kept."""
        if self._fast is None:
            return list(self._tokenizer.encode_batch([text.decode() for text in texts]))
        return self._fast.encode(texts)


def has_fast(tokenizer: Tokenizer) -> bool:
    """Whether `gigatoken` is installed and may be tried for this tokenizer."""
    content = tokenizer.text_content
    model, added = content.get("model") or {}, content.get("added_tokens") or ()
    supported = tokenizer.kind == "bpe" and model.get("type") == "BPE" and not model.get("dropout")
    return supported and all(map(is_control, added)) and importlib.util.find_spec("gigatoken") is not None


def _fast_encoder(tokenizer: Tokenizer) -> "_Gigatoken | None":
    """None if `gigatoken` does not load such a tokenizer."""
    encoder = None
    with contextlib.suppress(UserError), library_errors(""):
        encoder = _Gigatoken(tokenizer)
    if encoder is not None:
        encoder.compare(hostile_text(tokenizer))
    return encoder


class _Gigatoken:
    def __init__(self, tokenizer: Tokenizer) -> None:
        content = {**tokenizer.text_content, "added_tokens": [], "post_processor": None}
        self._tokenizer, self._content, self._sample = tokenizer, json.dumps(content), _FIRST_SAMPLE
        lossless = content.get("normalizer") is None and not (content.get("pre_tokenizer") or {}).get("add_prefix_space")
        sizes = [len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size)] if lossless else []
        self._sizes, self._count = np.array(sizes, np.uint32), 0
        self._load()

    def _load(self) -> None:
        import gigatoken  # type: ignore[import-untyped,unused-ignore]

        self._library = gigatoken.Tokenizer.from_json(self._content)
        self._size, self._text = _resident(), 0

    def encode(self, texts: Sequence[bytes]) -> list[Ids]:
        if self._text > _LEAST_BETWEEN_LOADS and _resident() - self._size > MOST_GROWTH:
            del self._library
            self._load()
        try:
            with library_errors("gigatoken"):
                rows: list[Ids] = [self._library.encode(text) for text in texts]
        except UserError as error:
            raise EncodersDiffer(str(error)) from error
        size = sum(map(len, texts))
        self._text += size
        if len(self._sizes) and self._count % _EVERY == 0 and sum(int(self._sizes[ids].sum()) for ids in rows) != size:
            raise EncodersDiffer("bytes are missing")
        self._count += 1
        self.compare(_part(texts, size, self._sample))
        self._sample = _SAMPLE
        return rows

    def compare(self, text: str) -> None:
        """Raise `EncodersDiffer` if a text has other ids than with `tokenizers`."""
        expected = self._tokenizer.encode_with_library([text])[0]
        try:
            with library_errors("gigatoken"):
                same = np.array_equal(self._library.encode(text.encode()), expected)
        except UserError:
            same = False
        if not same:
            raise EncodersDiffer(text[:200])


def _part(texts: Sequence[bytes], size: int, count: int) -> str:
    """About `count` bytes of the texts, from a place that depends only on their sizes."""
    place = (size * 2654435761) % max(1, size - count)  # a fixed place would see only beginnings
    for text in texts:
        if place < len(text):
            return text[place : place + count].decode("utf-8", "ignore")
        place -= len(text)
    return ""


def _resident() -> int:
    """Bytes of memory that this process occupies; 0 where the system does not tell."""
    try:
        return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def hostile_text(tokenizer: Tokenizer) -> str:
    """Text on which encoders have differed, or might."""
    code_points = "".join(chr(code) for code in range(0, 0x110000, 97) if not 0xD800 <= code < 0xE000)
    words = "it's I'LL we'Ve ''s 'S can't 1234567890 ½²٣४ x_y a.b,c;d!!! ---- ==>"
    spaces = " \t\ttab \r\n\r\n\n \n  x\u00a0\u2003\u3000y\x1c\x85z"
    scripts = (
        "漢字かな交じり文。한국어 สวัสดีครับ नमस्ते עברית \u202eالعربية\u202c ﷽ ǅ ŉ ﬁ e\u0301\u0323 \U0001d400 \ufeff\ufffd\0\x7f"
    )
    emoji = "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽🇩🇪🇯🇵 1️⃣ ❤️‍🔥"
    long = "ab" * 5_000 + " " * 3_000 + "=" * 3_000 + "\n" * 500 + "é" * 2_000 + "7" * 1_000
    names = valid_text(" ".join(tokenizer.control_names[:200]))
    parts = [words, spaces, scripts, emoji, names, names.replace(" ", ""), long, code_points, " ".join(code_points[:10_000])]
    return "\n".join([*parts, words])
