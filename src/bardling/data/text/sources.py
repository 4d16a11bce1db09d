"""Sources of text: a stream of documents from files, and a digest that changes when the files do.

A source is specified by one string: 'stdlib' (the source code of the Python standard library: about 10 MB of real text that
every machine has), a file, a folder, a glob pattern, a URL (`opening.py`), or FILE:FIELD. Each text file is one document, or
several if `data.separator` divides it; in files with rows (`rows.py`), each row is one; archives (`archives.py`) are read like
folders. Files are read in the sorted order of their paths, whatever order the system lists them in.

Text is UTF-8, or what a byte order mark or `data.encoding` says, and used unchanged: line endings and NUL characters are kept,
and only a byte order mark is dropped (`files/decoding.py`). Any file may be compressed, and have any name (`formats.py`).

What cannot be read is refused if it is named directly or by a glob. In a folder or an archive it is left out, counted and
named: other formats, damaged files, text in another encoding, files whose first row has no text in the field, and what
`folders.py` lists. Everywhere, empty files and rows whose text is null or empty are skipped and counted, and a later row
without the field is an error.

Limits: a text file without separators is read into memory as a whole, except by `pieces`.
"""

import glob
import hashlib
import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from itertools import chain
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple, Protocol

from bardling.data.text.archives import ARCHIVES
from bardling.data.text.compression import Damaged, Stream, decompressed
from bardling.data.text.fields import DEFAULT_FIELD, RowText, unescaped
from bardling.data.text.findings import Findings, describe_findings
from bardling.data.text.folders import Left, files_below, refuse_made_folder, without_made_folders
from bardling.data.text.formats import NOT_ALWAYS_READ, Contents, examine, expected_bytes
from bardling.data.text.opening import Remote, is_url, opened, remote_files, without_secrets
from bardling.data.text.plain import is_binary, is_utf8, separated, text_pieces
from bardling.data.text.rows import READERS, Table, TooLong
from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error
from bardling.files.decoding import HEAD, MARK, byte_order_mark, decode_text, wide_encoding
from bardling.files.paths import similar

STDLIB = "stdlib"
STANDARD_INPUT = "-"
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
"""Folders of the standard library to skip: tests, installed packages, and generated tables."""
_PLACES = {"JSON Lines": "line", "CSV": "line", "JSON": "element"}  # what messages call a row; else row
_PIECE = 1 << 22  # bytes of a long text that are read at once


class Document(NamedTuple):
    """One text and its name in messages."""

    name: str
    text: str


class Source(Protocol):
    """A stream of documents that can be restarted; if it has a method `after(name)`, also after the document of that name."""

    @property
    def name(self) -> str:
        """A short name, usable as a folder name."""

    def documents(self) -> Iterator[Document]:
        """All non-empty documents, in the same order each time."""

    def identity(self) -> str:
        """Hexadecimal digest of the spec and of each file's path, size and modification time."""

    def size(self) -> int:
        """Total bytes of the files, for progress; 0 if unknown."""


@dataclass(frozen=True)
class FileSource:
    """Documents from files, in the given order."""

    name: str
    root: Path | str  # document names are relative to it
    files: tuple[Path | Remote, ...]
    field: str = DEFAULT_FIELD  # field of rows that contains the text, or a template
    lenient: bool = False  # leave out files that cannot be read instead of refusing them
    release: str = ""  # version of the software that the files belong to, if any
    encoding: str = ""  # of files without a byte order mark; empty: UTF-8
    unread: tuple[Left, ...] = ()  # what was found besides the files
    separator: str = ""  # between the documents of a text file; empty: it is one
    is_part: bool = False  # of a source with more files, so that there may be no text in these
    findings: Findings = dataclass_field(default_factory=Findings, compare=False)  # of the last pass over the documents

    def documents(self) -> Iterator[Document]:
        """All non-empty documents; a `UserError` if there are none, or naming the file and line that is not text."""
        found = False
        self.findings.clear()
        for reason, path in self.unread:
            self.findings.left_out(reason, os.path.relpath(path, self.root))
        for file in self.files:
            for document in self._read(file):
                if not document.text:
                    if not self.release:  # software has empty files on purpose
                        self.findings.left_out("empty file or row", document.name)
                    continue
                found = True
                self._notice(*document)
                yield document
        if self.is_part:
            return
        if not found:
            why = "; ".join(describe_findings(self.findings.facts())) or "empty"
            if len(self.files) == 1 and not self.lenient:
                fault = "is empty" if self.findings.total < 2 and "empty file" in f"{why} file" else f"has no text ({why})"
                raise UserError(f"{self.files[0]}: {fault}: choose a source that contains text")
            fault = f"none of its {len(self.files)} files contains UTF-8 text"
            raise UserError(f"{self.root}: {fault} ({why}): choose a source that does")

    def _notice(self, name: str, text: str) -> None:
        if "\0" in text:  # finds it faster than it counts
            self.findings.kept("NUL character", name, text.count("\0"))
        self.findings.kept("U+FEFF inside a text", name, text.count(MARK))

    def is_one_text(self) -> bool:
        """Whether this is a text file that is one document, so that `pieces` can read it."""
        if len(self.files) > 1 or self.lenient or self.separator or self.has_rows(self.files[0]):
            return False
        with opened(self.files[0]) as (stream, _):
            head = stream.peek(HEAD)
        return bool(byte_order_mark(head)[0] or self.encoding or not wide_encoding(head))

    def pieces(self) -> Iterator[str]:
        """The text of the only document, in pieces."""
        file = self.files[0]
        self.findings.clear()
        with opened(file) as (stream, _):
            encoding = byte_order_mark(stream.peek(HEAD))[0] or self.encoding or "utf-8"
            for piece in text_pieces(stream, encoding, str(file), _PIECE):
                self._notice(self.label(file), piece)
                yield piece

    def contents(self, file: Path | Remote) -> Contents:
        """What a file contains; a `UserError` if it is damaged."""
        with opened(file) as (stream, _):
            return self._examine(stream, file.name, str(file))

    def _examine(self, stream: Stream, name: str, shown: str) -> Contents:
        return examine(stream, name, shown, RowText(self.field), self.encoding, named=self.field != DEFAULT_FIELD)

    def _read(self, file: Path | Remote) -> Iterator[Document]:
        """The documents of a file, which are perhaps empty."""
        with opened(file) as (stream, _):
            yield from self._parts(stream, file.name, self.label(file), str(file), self.lenient)

    def _parts(
        self, stream: Stream, name: str, label: str, shown: str, lenient: bool, inside: bool = False
    ) -> Iterator[Document]:
        """The documents of a file with this `name`, which documents call `label` and messages `shown`."""
        contents, known = Contents(), self.findings.total
        try:
            if inside:
                stream, _ = decompressed(stream, shown)
            contents = self._examine(stream, name, shown)
            if contents.kind in ARCHIVES and inside:
                contents = contents._replace(fault="an archive inside an archive", remedy="extract it and name the folder")
            if contents.fault:
                raise UserError(f"{shown}: is {contents.fault}: {contents.remedy}")
            if contents.kind in ARCHIVES:
                documents = self._members(stream, contents.kind, label, shown)
            elif contents.kind in READERS:
                documents = self._rows(stream, contents, name, label, shown)
            elif self.separator:
                documents = self._separated(stream, label, shown, lenient)
            else:
                documents = self._whole(stream, label, shown, lenient)
            first = next(documents, None)
        except UserError as error:
            if not lenient or isinstance(error.__cause__, OSError | ImportError):
                raise
            without = f"{contents.kind} without text in the field {self.field!r}"
            reason = without if contents.kind in READERS else f"file that is not {self.encoding or 'UTF-8'}"
            damaged = error.kind if isinstance(error, Damaged) else ""
            self.findings.left_out(damaged or re.sub("^an? ", "", contents.fault) or reason, label)
            return
        if first is not None:
            yield from chain([first], documents)
        elif contents.kind in READERS and self.findings.total == known:
            yield Document(label, "")

    def _members(self, stream: Stream, kind: str, label: str, shown: str) -> Iterator[Document]:
        """The documents in an archive."""
        for name, member, reason in ARCHIVES[kind](stream, shown, lambda what: self.findings.kept(what, label, 1)):
            printable = "".join(c if c.isprintable() else "?" for c in name[:200])
            inner = f"{label}!{printable}"
            if member is None:
                self.findings.left_out(reason, inner)
            else:
                yield from self._parts(member, name, inner, f"{shown}!{printable}", True, inside=True)

    def _whole(self, stream: Stream, label: str, shown: str, lenient: bool) -> Iterator[Document]:
        data = stream.read()
        text = decode_text(data, shown, self.encoding, setting="--data.encoding")
        legacy = bool(self.encoding) and not byte_order_mark(data)[0]
        if lenient and is_binary(text, legacy):
            self.findings.left_out("binary file", label)
            return
        if legacy and not data.isascii() and is_utf8(data):
            self.findings.kept(f"file that is also valid UTF-8, read as {self.encoding}", label, 1)
        yield Document(label, text)

    def _separated(self, stream: Stream, label: str, shown: str, lenient: bool) -> Iterator[Document]:
        """The documents of a text file with separators, numbered from 1."""
        head = stream.peek(HEAD)
        marked = byte_order_mark(head)[0]
        if not marked and not self.encoding and wide_encoding(head):
            yield from self._whole(stream, label, shown, lenient)  # which refuses it
        legacy, encoding = bool(self.encoding) and not marked, marked or self.encoding or "utf-8"
        if lenient and is_binary(head.decode(encoding, "ignore"), legacy):
            self.findings.left_out("binary file", label)
            return
        number = 0
        for number, text in enumerate(separated(text_pieces(stream, encoding, shown), unescaped(self.separator)), 1):
            if text.strip():
                yield Document(f"{label}:{number}", text)
            else:
                self.findings.left_out("empty document between separators", f"{label}:{number}")
        if number == 1:
            self.findings.kept(f"text file without the separator {self.separator!r}", label, 1)

    def _rows(self, stream: Stream, contents: Contents, name: str, label: str, shown: str) -> Iterator[Document]:
        remedy = f"name the field that contains the text, as in {PurePath(name).name[-60:]}:FIELD"
        if self.separator:
            self.findings.kept("file with rows, which data.separator does not divide", label, 1)
        wanted, place = contents.wanted, _PLACES.get(contents.kind, "row")
        table = Table(stream, shown, wanted, remedy, contents.encoding or "utf-8", contents.delimiter)
        for number, row in READERS[contents.kind](table):
            document = f"{label}:{number}"
            if isinstance(row, TooLong):
                self.findings.left_out(row.reason, document)
                continue
            text, nulls = wanted.text(row, f"{shown}: {place} {number}", remedy)
            self.findings.kept("null field of a template", document, nulls)
            yield Document(document, text or "")

    def has_rows(self, file: Path | Remote) -> bool:
        """Whether a file is one with fields, or may contain some, or is refused when it is read."""
        contents = self.contents(file)
        return contents.kind != "text" or bool(contents.fault)

    def label(self, file: Path | Remote) -> str:
        """The name of a file in documents."""
        if isinstance(file, Path):
            return file.relative_to(self.root).as_posix()
        return str(file).removeprefix(f"{self.root}/")

    def identity(self) -> str:
        settings = [self.name, str(self.root), self.field, self.lenient, self.release, self.encoding]
        digest = hashlib.sha256(json.dumps([*settings, self.separator] if self.separator else settings).encode())
        for file in self.files:
            entry: list[str | int] = [self.label(file)]
            if isinstance(file, Path):
                with os_error_as_user_error(file, "read"):
                    status = file.stat()
                entry += [status.st_size, status.st_mtime_ns]
                if self.lenient and self._newly_read(file):
                    entry.append("read")
            else:
                entry += [file.size, file.version]
            digest.update(json.dumps(entry).encode())
        return digest.hexdigest()

    def _newly_read(self, file: Path) -> bool:
        """Whether earlier versions left a file of a folder out, so that a dataset that they prepared lacks its text."""
        if not file.name.lower().endswith(NOT_ALWAYS_READ):
            return False
        try:
            with opened(file) as (stream, codec):
                kind = self._examine(stream, file.name, str(file)).kind
        except UserError:
            return False
        if (kind == "JSON Lines" and codec in ("", "gzip")) or (kind == "text" and not codec):
            return False
        return any(document.text for document in replace(self, findings=Findings())._read(file))

    def size(self) -> int:
        with os_error_as_user_error(Path(self.root), "read"):
            return sum(
                expected_bytes(file.name, file.stat().st_size if isinstance(file, Path) else file.size) for file in self.files
            )


def open_source(spec: str, encoding: str = "", field: str = "", separator: str = "") -> FileSource:
    """Find the files that a spec names, without reading them; a `UserError` if there are none suggests a similar name.

    Args:
        encoding: of files without a byte order mark; empty: UTF-8.
        field: of rows, or a template; empty: 'text', or the FIELD of the spec.
        separator: of the documents in a text file; empty: each file is one document.
    """
    if spec == STANDARD_INPUT:
        remedy = "run `bardling prepare - --out DIR`, then name DIR"
        raise UserError(f"data.source = '-': standard input can be read only once: {remedy}")
    if spec == STDLIB:
        if field or separator:
            raise UserError(f"data.source = {spec!r}: its files are documents: omit data.field and data.separator")
        return _stdlib()
    shown = without_secrets(spec)
    source, named = _open(spec.removeprefix("file://"))
    if field and named and field != named:
        raise UserError(f"data.field = {field!r}: the source names another field, {named!r}: omit one of them")
    source = replace(source, encoding=encoding, field=field or named or DEFAULT_FIELD, separator=separator)
    RowText(source.field).fields  # noqa: B018  raises an error for a template with a single brace
    if source.field != DEFAULT_FIELD and not source.lenient and not any(map(source.has_rows, source.files)):
        kinds = "JSON, CSV, Parquet, Arrow and archives of them"
        raise UserError(
            f"data.source = {shown!r}, field {source.field!r}: only rows have fields ({kinds}), and none is selected"
        )
    return source


def _open(spec: str) -> tuple[FileSource, str]:
    """The files of a spec, and the field that it names."""
    if is_url(spec):
        return _open_url(spec)
    path, field = Path(spec).expanduser(), ""
    if not path.exists() and not _matches(spec):
        file, colon, name = spec.rpartition(":")
        if colon and name and os.sep not in name and (Path(file).expanduser().exists() or _matches(file)):
            spec, field, path = file, name, Path(file).expanduser()
    if path.is_file():
        return FileSource(slug(path.stem), path.resolve().parent, (path.resolve(),)), field
    if path.is_dir():
        refuse_made_folder(path)
        root = path.resolve()
        files, left = files_below(root)
        if not files:
            raise UserError(f"{path}: this folder has no files: choose one that contains text files")
        return FileSource(slug(root.stem), root, tuple(files), lenient=True, unread=tuple(left)), field
    if path.exists():
        raise UserError(f"{path}: is neither a file nor a folder: pipe its text into `bardling prepare - --out DIR`")
    if glob.has_magic(spec):
        files, left = without_made_folders(sorted({Path(match).resolve() for match in _matches(spec)}), _base(spec))
        if not files:
            raise UserError(f"data.source = {spec!r}: no file matches this pattern")
        root = Path(os.path.commonpath([file.parent for file in files]))
        return FileSource(slug(files[0].parent.stem), root, tuple(files), unread=tuple(left)), field
    hint = f"{STDLIB!r} is available on every machine"
    raise UserError(f"data.source = {spec!r}: no such file or folder{similar(path, [STDLIB])}; {hint}")


def _open_url(spec: str) -> tuple[FileSource, str]:
    field, last = "", spec.rpartition("/")[2]
    if ":" in last and "?" not in spec:
        spec, _, field = spec.rpartition(":")
    files, folder = remote_files(spec)
    shown = without_secrets(spec)
    root = shown.rstrip("/") if folder else re.split(r"[*?\[]", shown)[0].rpartition("/")[0]
    name = slug(PurePosixPath(shown).stem)
    return FileSource(name, root, tuple(files), lenient=folder), field


def _stdlib() -> FileSource:
    root = Path(sysconfig.get_path("stdlib")).resolve()
    # _sysconfigdata contains the settings of the machine that built Python, not code that someone wrote
    found, _ = files_below(root, _LEFT_OUT, follow=False)
    files = tuple(path for path in found if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"))
    if not files:
        remedy = "set data.source to a text file or folder"
        raise UserError(f"{root}: this Python has no source files of its standard library: {remedy}")
    release = f"{platform.python_implementation()} {platform.python_version()}"
    return FileSource(STDLIB, root, files, lenient=True, release=release)


def _base(pattern: str) -> Path:
    """The folder in which a pattern begins to vary."""
    parts = Path(pattern).expanduser().parts
    fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed]).resolve()


def _matches(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        return []
    return [match for match in glob.glob(os.path.expanduser(pattern), recursive=True) if Path(match).is_file()]  # noqa: PTH111, PTH207


def slug(name: str, default: str = "text") -> str:
    """A short version of a name that is usable as a folder name."""
    plain = "".join(character if character.isalnum() and character.isascii() else "-" for character in name)
    return plain.strip("-").lower()[:40] or default
