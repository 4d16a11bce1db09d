"""Members of tar and zip archives, one after another as streams of bytes; nothing is extracted.

The rules of folders apply: hidden members, links, devices and directories are not read, and neither are members with a path
outside the archive (`../x`, `/x`), encrypted ones, and sparse ones, which can claim terabytes. Members come in the order of the
archive, which in a webdataset keeps the files of a sample together.

Limits: an archive inside an archive is left out. A zip archive that is compressed, or that a server sends only from its start,
is copied to a temporary file.
"""

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from bardling.data.text import compression
from bardling.data.text.compression import Expanded, Reader, Stream, damage, seekable

_LONGEST_HEADER = 32 << 10  # bytes of an extended header; tarfile takes quadratic time for it


class Member(NamedTuple):
    """A file in an archive, or why it is left out."""

    name: str
    stream: Stream | None
    reason: str = ""


def tar_members(stream: Stream, label: str, kept: Callable[[str], None]) -> Iterator[Member]:
    """The members of a tar archive. `kept` is called with what the user should know about it."""
    ended = False

    class Info(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Info":
            nonlocal ended
            ended = ended or (len(buf) == tarfile.BLOCKSIZE and not any(buf))
            made = super().frombuf(buf, encoding, errors)
            if made.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE) and made.size > _LONGEST_HEADER:
                raise tarfile.ReadError(f"an extended header of {made.size:,} bytes")
            if made.size < 0:
                raise tarfile.ReadError("a negative size")
            return made

    with damage(label, "tar data"), tarfile.open(fileobj=_Ending(stream), mode="r|", tarinfo=Info) as archive:
        for info in archive:
            archive.members = []  # type: ignore[attr-defined]  # else it keeps all of them
            if info.isdir():
                continue
            reason = "not a regular file" if not info.isreg() or info.issparse() else _name_fault(info.name)
            file = None if reason else archive.extractfile(info)
            yield Member(info.name, None if file is None else _guarded(file, f"{label}!{info.name}", "tar", 1 << 62), reason)
    if not ended:
        kept("tar archive without the mark of its end, perhaps truncated")


class _Ending(Reader):
    """Bytes that cannot be read on and on after their end, which `tarfile` does as far as the size in a header reaches."""

    _after_end = 0

    def read(self, size: int = -1) -> bytes:
        data: bytes = self.raw.read(size)
        self._after_end = 0 if data else self._after_end + 1
        if self._after_end > 2:
            raise tarfile.ReadError("unexpected end of data")
        return data


def zip_members(stream: Stream, label: str, kept: Callable[[str], None]) -> Iterator[Member]:
    """The same for a zip archive."""
    with seekable(stream, label) as file, damage(label, "zip data"), zipfile.ZipFile(file) as archive:
        size = file.seek(0, io.SEEK_END)
        for info in archive.infolist():
            if info.is_dir():
                continue
            packed = min(size, info.compress_size)
            reason = "encrypted member" if info.flag_bits & 1 else _name_fault(info.filename)
            if info.file_size > max(compression.EXPANSION_FREE, compression.MOST_EXPANSION * packed):  # zipfile reads no more
                reason = "decompression bomb"
            inner = None if reason else archive.open(info)
            opened = None if inner is None else _guarded(inner, f"{label}!{info.filename}", "zip", packed)
            yield Member(info.filename, opened, reason)
            if opened is not None:
                opened.close()


def _guarded(file: Any, label: str, kind: str, size: int) -> Stream:
    """A member whose damage is reported with its name; `size` is that of the archive, or as large as no archive is."""
    return Stream(Expanded(file, label, kind, lambda: size))


def _name_fault(name: str) -> str:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if ".." in parts or name.startswith(("/", "\\")) or name[1:2] == ":":
        return "member with a path outside the archive"
    return "hidden" if any(part.startswith(".") for part in parts) else ""


ARCHIVES: dict[str, Callable[[Stream, str, Callable[[str], None]], Iterator[Member]]] = {"tar": tar_members, "zip": zip_members}
