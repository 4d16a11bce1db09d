"""Opens what a source names as a stream of bytes: a local file or a URL, decompressed if its first bytes say so.

A URL is whatever fsspec has a protocol for: `s3://`, `gs://`, `https://`, `memory://`. Its credentials (`user:password@` and
the query, which may be a signature) are used to open it and shown nowhere: messages, identities and manifests have the rest of
it.

Compression is one layer of gzip, bzip2, xz or Zstandard, recognised by its first bytes under any name. Truncated or damaged
data is a `UserError`. So is data that expands as a decompression bomb does: to more than `MOST_EXPANSION` times its size, once
that is more than `EXPANSION_FREE` bytes.

Limits: a URL is opened anew for each pass over the documents, and read from its beginning after an interruption.
"""

import bz2
import gzip
import io
import lzma
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import urlsplit

from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error

EXTRA = "pip install 'bardling[datasets]'"
MOST_EXPANSION = 200
EXPANSION_FREE = 64 << 20
SPOOL_LIMIT = 64 << 30
"""Bytes of one stream that are copied to a temporary file, where a format has to be read from its end."""
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "az": "adlfs",
             "abfs": "adlfs", "hf": "huggingface_hub"}  # fmt: skip
_VERSIONS = ("ETag", "etag", "md5Hash", "sha256", "checksum", "mtime", "LastModified", "last_modified", "updated", "created")


class Damaged(UserError):  # noqa: N818  it describes the data
    """Data that cannot be read to its end; `kind` is a noun without its article."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class Stream(io.RawIOBase):
    """Bytes that can be looked at before they are read. It counts what has been read, and is closed with what it reads."""

    def __init__(self, raw: BinaryIO, *, from_any_place: bool = False) -> None:
        super().__init__()
        self.raw, self.count, self.from_any_place = raw, 0, from_any_place
        self._head = b""

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end, which are read again afterwards."""
        while len(self._head) < size and (piece := self.raw.read(max(size - len(self._head), 1 << 16))):
            self._head += piece
        return self._head[:size]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        if size is None or size < 0:
            data, self._head = self._head, b""
            rest = self.raw.read()
            data = data + rest if data else rest
        elif self._head:
            data, self._head = self._head[:size], self._head[size:]
        else:
            data = self.raw.read(size)
        self.count += len(data)
        return data

    def close(self) -> None:
        if not self.closed:
            self.raw.close()
        super().close()


@dataclass(frozen=True)
class Remote:
    """A file at a URL, with the same attributes as a `Path` that is read."""

    url: str = dataclass_field(repr=False)  # complete
    size: int = 0  # bytes; 0 if unknown
    version: str = ""  # changes with the content, if the server tells
    options: tuple[tuple[str, str], ...] = ()  # of the file system

    @property
    def name(self) -> str:
        return urlsplit(self.url).path.rpartition("/")[2] or "file"

    def __str__(self) -> str:
        return without_secrets(self.url)


class Codec(NamedTuple):
    """A way to compress data."""

    name: str
    offset: int  # of the bytes that identify it
    magic: bytes
    suffixes: tuple[str, ...]
    open: Callable[[BinaryIO], Any]


def _zstandard(raw: BinaryIO) -> BinaryIO:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"needs the package zstandard: {EXTRA}") from error
    return cast(BinaryIO, _Frames(raw, zstandard.ZstdDecompressor(max_window_size=1 << 31)))


class _Frames(io.RawIOBase):
    """The content of Zstandard frames. The package's own reader does not tell a truncated frame from a complete one."""

    def __init__(self, raw: BinaryIO, decompressor: Any) -> None:
        super().__init__()
        self._raw, self._decompressor = raw, decompressor
        self._frame: Any = None
        self._left, self._made = b"", io.BytesIO()

    def read(self, size: int = -1) -> bytes:
        while not (data := self._made.read(size)):
            piece = self._left or self._raw.read(2048)  # few, because 4 bytes can expand to 128 KiB
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


class Expanded(io.RawIOBase):
    """Decompressed bytes, which raise a `UserError` that names the data (`label`) if it is damaged or a bomb.

    `taken` tells how many compressed bytes have been read so far.
    """

    def __init__(self, inner: BinaryIO, label: str, kind: str, taken: Callable[[], int]) -> None:
        super().__init__()
        self._inner, self._label, self._kind, self._taken, self._made = inner, label, kind, taken, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read(1 << 20), b""))
        with damage(self._label, f"{self._kind} data"):
            data = self._inner.read(size)
        self._made += len(data)
        if self._made > EXPANSION_FREE and self._made > MOST_EXPANSION * max(1, self._taken()):
            fault = f"expands to more than {MOST_EXPANSION} times its size, as a decompression bomb does"
            raise Damaged(f"{self._label}: {fault}: if it is none, decompress it and name the result", "decompression bomb")
        return data

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()


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
        raise Damaged(f"{label}: is damaged {kind} ({_reason(error)}): {remedy}", f"damaged {kind}") from None
    except MemoryError:
        fault = f"needs more memory than this machine has ({kind})"
        raise Damaged(f"{label}: {fault}: decompress or split it", f"{kind} that needs too much memory") from None
    except Exception as error:  # noqa: BLE001  each library has exceptions of its own
        raise Damaged(f"{label}: is damaged {kind} ({_reason(error)}): {remedy}", f"damaged {kind}") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def decompressed(raw: Stream, label: str) -> tuple[Stream, str]:
    """The stream, or what it contains if it is compressed, and the name of the codec; empty if there is none."""
    head = raw.peek(16)
    codec = next((codec for codec in CODECS if head.startswith(codec.magic, codec.offset)), None)
    if codec is None:
        return raw, ""
    try:
        inner = codec.open(cast(BinaryIO, raw))
    except UserError as error:
        raise UserError(f"{label}: is {codec.name} data, which {error}") from error.__cause__
    return Stream(cast(BinaryIO, Expanded(inner, label, codec.name, lambda: raw.count))), codec.name


@contextmanager
def opened(place: Path | Remote) -> Iterator[tuple[Stream, str]]:
    """Open a file for reading: its decompressed content, and the name of the codec."""
    file = open_bytes(place)
    raw = Stream(file, from_any_place=file.seekable())
    try:
        with reading(place):
            yield decompressed(raw, str(place))
    finally:
        raw.close()


def open_bytes(place: Path | Remote) -> BinaryIO:
    with reading(place):
        if isinstance(place, Path):
            return place.open("rb", buffering=0)
        system, path = _system(place.url, dict(place.options))
        file = system.open(path, "rb", **({} if place.size else {"block_size": 0}))
        return cast(BinaryIO, _Guarded(file, place.url))


def reading(place: Path | Remote) -> AbstractContextManager[None]:
    """Converts errors of the system, or of a server, into a `UserError` without secrets."""
    return os_error_as_user_error(place, "read") if isinstance(place, Path) else url_errors(place.url)


class _Guarded(io.RawIOBase):
    """A file at a URL whose errors are raised where they occur, before a parser takes them for damaged data."""

    def __init__(self, file: Any, url: str) -> None:
        super().__init__()
        self._file, self._url = file, url

    def read(self, size: int = -1) -> bytes:
        with url_errors(self._url):
            return cast(bytes, self._file.read(size))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        with url_errors(self._url):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextmanager
def url_errors(url: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  each protocol has exceptions of its own
        kinds = ((FileNotFoundError, "not found"), (PermissionError, "access denied"), (TimeoutError, "no answer in time"))
        known = next((reason for kind, reason in kinds if isinstance(error, kind)), "")
        status = getattr(error, "status", None)
        reason = known or (f"the server answers {status}" if isinstance(status, int) else type(error).__name__)
        if not known and status is None and without_secrets(url) == url:
            reason = f"{reason}: {_reason(error)}"
        remedy = "check the address, the network and the credentials that fsspec finds"
        cause = error if isinstance(error, OSError) else OSError(reason)
        raise UserError(f"{without_secrets(url)}: cannot be read ({reason}): {remedy}") from cause


def is_url(spec: str) -> bool:
    """Whether a source is a URL that is not a local file."""
    return "://" in spec and not spec.startswith("file://")


def without_secrets(spec: str) -> str:
    """A source for messages and records: a URL without its user, password, query and fragment; anything else as it is."""
    if not is_url(spec):
        return spec
    scheme, _, rest = spec.partition("://")
    host, slash, path = rest.partition("#")[0].partition("?")[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _system(url: str, options: dict[str, str] | None = None) -> tuple[Any, str]:
    """The file system of a URL and the path in it."""
    scheme = url.partition("://")[0]
    if "::" in url:
        raise UserError(f"{without_secrets(url)}: chained URLs are not supported: name the file itself")
    try:
        import fsspec.core  # type: ignore[import-untyped]

        return cast(tuple[Any, str], fsspec.core.url_to_fs(url, **(options or {})))
    except ImportError as error:
        package = _PACKAGES.get(scheme, "of fsspec for it")
        raise UserError(f"{without_secrets(url)}: needs the package {package}: pip install {package}") from error
    except ValueError as error:
        raise UserError(
            f"{without_secrets(url)}: fsspec has no protocol {scheme!r}: use for example s3, gs or https"
        ) from error


def remote_files(url: str) -> tuple[list[Remote], bool]:
    """The files at a URL: one, those that match a pattern, or those below a folder (True), in the order of their paths."""
    with url_errors(url):
        system, path = _system(url)
        if "http" in system.protocol:
            return [_remote(url, system.info(path))], False
        pattern, folder = any(mark in path for mark in "*?["), False
        if pattern:
            found = system.glob(path, detail=True)
        elif folder := system.isdir(path):
            found = system.find(path, detail=True)
        else:
            return [_remote(url, system.info(path))], False
        infos = [info for _, info in sorted(found.items()) if info.get("type", "file") == "file"]
        scheme, _, rest = url.partition("://")
        user, at, _ = rest.partition("/")[0].rpartition("@")
        if not infos:
            what = "no file matches this pattern" if pattern else "has no files"
            raise UserError(f"{without_secrets(url)}: {what}: check the address")
        whole = [f"{scheme}://{user}{at}{system._strip_protocol(info['name']).lstrip('/')}" for info in infos]
        return [_remote(one, info) for one, info in zip(whole, infos, strict=True)], folder


def _remote(url: str, info: dict[str, Any]) -> Remote:
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    return Remote(url, int(info.get("size") or 0), version)


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
