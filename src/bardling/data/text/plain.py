"""Text files: separators between documents, text in pieces, and files that are text only by chance."""

import codecs
import re
from collections.abc import Iterator

from bardling.data.text.compression import Stream
from bardling.errors import UserError
from bardling.files.decoding import MARK

_CONTROL = re.compile(r"[^\x00-\x07\x0e-\x1a\x1c-\x1f\x7f]+")  # removes everything except control characters


def separated(pieces: Iterator[str], separator: str) -> Iterator[str]:
    """The texts between separators. Line breaks next to one that stands on a line of its own belong to it."""
    before: str | None = None
    for text in _cut(pieces, separator):
        if before is not None:
            if (not before or before.endswith("\n")) and (not text or text.startswith(("\n", "\r\n"))):
                before, text = before.removesuffix("\n").removesuffix("\r"), text.removeprefix("\r").removeprefix("\n")
            yield before
        before = text
    if before is not None:
        yield before


def _cut(pieces: Iterator[str], separator: str) -> Iterator[str]:
    held, tail = list[str](), ""
    for piece in pieces:
        *texts, rest = (tail + piece).split(separator)
        for text in texts:
            yield "".join((*held, text))
            held = []
        end = len(rest) - len(separator) + 1  # the separator may begin there
        held.append(rest[: max(end, 0)])
        tail = rest[max(end, 0) :]
    yield "".join((*held, tail))


def text_pieces(stream: Stream, encoding: str, shown: str, size: int = 1 << 18) -> Iterator[str]:
    """The text of a file in pieces of `size` bytes, without its byte order mark."""
    decoder, start = codecs.getincrementaldecoder(encoding)(), 0
    while piece := stream.read(size):
        try:
            text = decoder.decode(piece)
        except UnicodeError as error:
            raise UserError(_not_text(shown, encoding, start + getattr(error, "start", 0))) from None
        yield text if start else text.lstrip(MARK)
        start += len(piece)
    try:
        yield decoder.decode(b"", True)
    except UnicodeError:
        raise UserError(_not_text(shown, encoding, start)) from None


def _not_text(shown: str, encoding: str, place: int) -> str:
    return f"{shown}: is not {encoding.upper()} text (near byte {place:,}): set --data.encoding, for example to cp1252"


def is_binary(text: str, legacy: bool) -> bool:
    """Whether a file is binary although it can be decoded, as any bytes can in most encodings (`legacy`)."""
    sample = text[:8192]
    return len(_CONTROL.sub("", sample)) > (0.02 if legacy else 0.3) * len(sample)


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
