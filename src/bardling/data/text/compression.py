"""Streams of bytes, decompressed if their first bytes say so, and bounded.

Compression is one layer of gzip, bzip2, xz or Zstandard, recognised under any name. Truncated or damaged data is a `UserError`.
So is data that expands as a decompression bomb does: to more than `MOST_EXPANSION` times its size, once that is more than
`EXPANSION_FREE` bytes.
"""

import bz2
import gzip
import io
import lzma
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple, cast

from bardling.errors import UserError

EXTRA = "pip install 'bardling[datasets]'"
MOST_EXPANSION = 200
EXPANSION_FREE = 256 << 20
SPOOL_LIMIT = 64 << 30
"""Bytes of one stream that are copied to a temporary file, where a format has to be read from its end."""


class Damaged(UserError):  # noqa: N818  it describes the data
    """Data that cannot be read to its end; `kind` is a noun without its article."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class Reader(io.RawIOBase):
    """Bytes that `read` of a subclass makes from those of `raw`, which is closed with it."""

    def __init__(self, raw: Any) -> None:
        super().__init__()
        self.raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer)) or b""
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.raw.close()
        super().close()


class Stream(Reader):
    """Bytes that can be looked at before they are read, and are counted as they are.

    `from_any_place` tells that `raw` is a file in which formats may seek.
    """

    def __init__(self, raw: Any, *, from_any_place: bool = False) -> None:
        super().__init__(raw)
        self.count, self.from_any_place = 0, from_any_place
        self._head, self._at = bytearray(), 0  # what has been looked at, and how much of it has been read

    def peek(self, size: int) -> bytes:
        """The first `size` bytes, fewer only at the end, which are read again afterwards. Not to be called after `read`."""
        while len(self._head) < size and (piece := self.raw.read(max(size - len(self._head), 1 << 16))):
            self._head += piece
        return bytes(self._head[:size])

    def read(self, size: int = -1) -> bytes:
        everything = size is None or size < 0
        data = bytes(self._head[self._at :] if everything else self._head[self._at : self._at + size])
        self._at += len(data)
        if not data or everything:
            self._head, self._at = bytearray(), 0
            rest = self.raw.read(size)
            data = data + rest if data else rest
        self.count += len(data)
        return data


class Codec(NamedTuple):
    """A way to compress data."""

    name: str
    offset: int  # of the bytes that identify it
    magic: bytes
    suffixes: tuple[str, ...]
    open: Callable[[Any], Any]


def _zstandard(raw: Any) -> Reader:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"needs the package zstandard: {EXTRA}") from error
    return _Frames(raw, zstandard.ZstdDecompressor(max_window_size=1 << 31))


class _Frames(Reader):
    """The content of Zstandard frames. The package's own reader does not tell a truncated frame from a complete one."""

    def __init__(self, raw: Any, decompressor: Any) -> None:
        super().__init__(raw)
        self._decompressor = decompressor
        self._frame: Any = None
        self._left, self._made = b"", io.BytesIO()

    def read(self, size: int = -1) -> bytes:
        while not (data := self._made.read(size)):
            piece = self._left or self.raw.read(2048)  # few, because 4 bytes can expand to 128 KiB
            self._left = b""
            if not piece:
                if self._frame is not None:
                    raise EOFError("a frame is truncated")
                return b""
            self._frame = self._frame or self._decompressor.decompressobj()
            self._made = io.BytesIO(self._frame.decompress(piece))
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        return data


CODECS = (
    Codec("gzip", 0, b"\x1f\x8b\x08", (".gz", ".tgz"), lambda raw: gzip.GzipFile(fileobj=raw)),
    Codec("bzip2", 4, b"1AY&SY", (".bz2", ".tbz2"), bz2.BZ2File),
    Codec("xz", 0, b"\xfd7zXZ\0", (".xz", ".txz"), lzma.LZMAFile),
    Codec("Zstandard", 0, b"\x28\xb5\x2f\xfd", (".zst", ".zstd", ".tzst"), _zstandard),
)
COMPRESSED = tuple(suffix for codec in CODECS for suffix in codec.suffixes)


class Expanded(Reader):
    """Decompressed bytes, which raise a `UserError` that names the data (`label`) if it is damaged or a bomb.

    `taken` tells how many compressed bytes have been read so far.
    """

    def __init__(self, raw: Any, label: str, kind: str, taken: Callable[[], int]) -> None:
        super().__init__(raw)
        self._label, self._kind, self._taken, self._made = label, kind, taken, 0

    def read(self, size: int = -1) -> bytes:
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read(1 << 20), b""))
        with damage(self._label, f"{self._kind} data"):
            data: bytes = self.raw.read(size)
        self._made += len(data)
        if self._made > EXPANSION_FREE and self._made > MOST_EXPANSION * max(1, self._taken()):
            fault = f"expands to more than {MOST_EXPANSION} times its size, as a decompression bomb does"
            raise Damaged(f"{self._label}: {fault}: if it is none, decompress it and name the result", "decompression bomb")
        return data


@contextmanager
def damage(label: str, kind: str, remedy: str = "fetch it again") -> Iterator[None]:
    """Convert what decompressors and parsers raise for damaged data into a `UserError` that names the data."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno is not None:  # of the file itself
            raise
        raise Damaged(f"{label}: is damaged {kind} ({short_reason(error)}): {remedy}", f"damaged {kind}") from None
    except MemoryError:
        fault = f"needs more memory than this machine has ({kind})"
        raise Damaged(f"{label}: {fault}: decompress or split it", f"{kind} that needs too much memory") from None
    except Exception as error:  # noqa: BLE001  each library has exceptions of its own
        raise Damaged(f"{label}: is damaged {kind} ({short_reason(error)}): {remedy}", f"damaged {kind}") from None


def short_reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def decompressed(raw: Stream, label: str) -> tuple[Stream, str]:
    """The stream, or what it contains if it is compressed, and the name of the codec; empty if there is none."""
    head = raw.peek(16)
    codec = next((codec for codec in CODECS if head.startswith(codec.magic, codec.offset)), None)
    if codec is None:
        return raw, ""
    try:
        inner = codec.open(raw)
    except UserError as error:
        raise UserError(f"{label}: is {codec.name} data, which {error}") from error.__cause__
    return Stream(Expanded(inner, label, codec.name, lambda: raw.count)), codec.name


@contextmanager
def seekable(stream: Stream, label: str) -> Iterator[BinaryIO]:
    """The stream itself if it can be read from any place, else a temporary copy on disk without a name."""
    if stream.from_any_place:
        stream.raw.seek(0)
        yield stream.raw
        return
    with tempfile.TemporaryFile(prefix="bardling-") as copy:
        while piece := stream.read(1 << 20):
            copy.write(piece)
            if copy.tell() > SPOOL_LIMIT:
                raise UserError(f"{label}: is larger than {SPOOL_LIMIT >> 30} GiB: unpack it and name the result")
        copy.seek(0)
        yield cast(BinaryIO, copy)
