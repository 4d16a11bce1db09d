"""What a tokenizer makes of text: bytes per token, coverage, frequent and long tokens, and how it divides numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bardling.data.tokens.gpt2_bpe import cached_gpt2_files
from bardling.data.tokens.tokenizer import GPT2, Tokenizer, load_tokenizer
from bardling.errors import UserError

NUMBERS = ("7", "42", "365", "1984", "31536000")
_FREQUENT, _LONGEST = 20, 10


def token_report(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Any]:
    """Statistics of the tokens of some texts, as plain values.

    `bytes_per_token` is of the texts that could be encoded; `refused` counts the others, which have characters that the
    vocabulary lacks, and `reason` is about the first of them.
    """
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    done = refused = 0
    reason = ""
    for text in texts:
        try:
            counts += np.bincount(tokenizer.encode_batch([text])[0], minlength=tokenizer.vocab_size)
            done += len(text.encode("utf-8", "replace"))
        except UserError as error:
            refused, reason = refused + 1, reason or str(error)
    report = count_report(tokenizer, counts)
    report |= {"bytes_per_token": done / max(1, int(counts.sum())), "text_bytes": done, "refused": refused, "reason": reason}
    return report


def count_report(tokenizer: Tokenizer, counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    """What the counts of the tokens, int64 [vocab_size], say by themselves."""
    total = max(1, int(counts.sum()))
    sizes = tokenizer.bytes_per_token()
    unknown = _unknown(tokenizer)
    names = list(map(tokenizer.token_bytes, range(tokenizer.vocab_size)))
    bytes_only = np.array([len(name) == 1 and name >= b"\x80" for name in names])
    longest = sorted((index for index in range(len(names)) if sizes[index]), key=lambda index: (-sizes[index], index))
    return {
        "tokenizer": tokenizer.name,
        "kind": tokenizer.kind,
        "vocabulary": tokenizer.vocab_size,
        "tokens": int(counts.sum()),
        "used": int(np.count_nonzero(counts)),
        "unknown": 0.0 if unknown is None else float(counts[unknown] / total),
        "byte_tokens": float(counts[bytes_only].sum() / total) if tokenizer.kind != "byte" else 0.0,
        "frequent": [
            {"id": int(index), "text": shown(tokenizer, int(index)), "count": int(counts[index])}
            for index in np.argsort(-counts, kind="stable")[:_FREQUENT]
            if counts[index]
        ],
        "longest": [{"id": index, "text": shown(tokenizer, index), "bytes": int(sizes[index])} for index in longest[:_LONGEST]],
        "numbers": {number: _parts(tokenizer, number) for number in NUMBERS},
    }


def _unknown(tokenizer: Tokenizer) -> int | None:
    """The token for text that the vocabulary lacks."""
    model = tokenizer.content.get("model") or {}
    vocab, name = model.get("vocab"), model.get("unk_token")
    found = vocab.get(name) if isinstance(vocab, dict) and isinstance(name, str) else model.get("unk_id")
    found = tokenizer.interface.unk if found is None else found
    return found if isinstance(found, int) and found < tokenizer.vocab_size else None


def shown(tokenizer: Tokenizer, index: int) -> str:
    """A token for people: invalid UTF-8 as escapes."""
    return tokenizer.token_bytes(index).decode("utf-8", "backslashreplace")


def _parts(tokenizer: Tokenizer, text: str) -> list[str]:
    try:
        return [shown(tokenizer, int(index)) for index in tokenizer.encode(text)]
    except UserError:
        return []


def local_gpt2() -> Tokenizer | None:
    """GPT-2's tokenizer, if this machine has it: never downloaded."""
    for path in cached_gpt2_files():
        try:
            found = load_tokenizer(path)
        except UserError:
            continue
        found.name = GPT2
        return found
    return None
