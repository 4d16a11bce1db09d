"""Opens what a source names as a stream of bytes: a local file or a URL, decompressed.

A URL is whatever fsspec has a protocol for: `s3://`, `gs://`, `https://`, `memory://`. Its credentials (`user:password@` and
the query, which may be a signature) are used to open it and shown nowhere: messages, identities and manifests have the rest of
it.

Limits: a URL is opened anew for each pass over the documents, and read from its beginning after an interruption.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from bardling.data.text.compression import Reader, Stream, decompressed, short_reason
from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "az": "adlfs",
             "abfs": "adlfs", "hf": "huggingface_hub"}  # fmt: skip
_VERSIONS = ("ETag", "etag", "md5Hash", "sha256", "checksum", "mtime", "LastModified", "last_modified", "updated", "created")


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


class _Guarded(Reader):
    """A file at a URL whose errors are raised where they occur, before a parser takes them for damaged data."""

    def __init__(self, file: Any, url: str) -> None:
        super().__init__(file)
        self._url = url

    def read(self, size: int = -1) -> bytes:
        with url_errors(self._url):
            return cast(bytes, self.raw.read(size))

    def seekable(self) -> bool:
        return bool(self.raw.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        with url_errors(self._url):
            return int(self.raw.seek(offset, whence))

    def tell(self) -> int:
        return int(self.raw.tell())


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
            reason = f"{reason}: {short_reason(error)}"
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
