"""Sources of text: a stream of documents from files, and a digest that changes when the files do.

A source is specified by one string: 'stdlib' (the source code of the Python standard library: about 10 MB of real text that
every machine has), a text file, a folder, a glob pattern, or FILE.jsonl[:FIELD]. Each file is one document; in JSON Lines, each
line is one. Files are read in the sorted order of their paths, whatever order the system lists them in.

Text is UTF-8, or what a byte order mark or `data.encoding` says, and used unchanged: line endings and NUL characters are kept,
and only a byte order mark is dropped (`files/decoding.py`). JSON Lines may have any name and be gzipped (`formats.py`).

What cannot be read is refused if it is named directly or by a glob. In a folder it is left out, counted and named: other
formats, text in another encoding, JSON Lines whose first row has no text in the field, and what `folders.py` lists. Everywhere,
empty files and rows whose text is null or empty are skipped and counted, and a later row without the field is an error.

Limits: a file that is not JSON Lines is read into memory as a whole.
"""

import glob
import hashlib
import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol

from bardling.data.text.findings import Findings, describe_findings
from bardling.data.text.folders import Left, files_below, refuse_made_folder, without_made_folders
from bardling.data.text.formats import Contents, examine, row_lines
from bardling.errors import UserError, closest
from bardling.files.atomic import os_error_as_user_error
from bardling.files.decoding import MARK, byte_order_mark, decode_text
from bardling.files.paths import similar

STDLIB = "stdlib"
_DEFAULT_FIELD = "text"
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
"""Folders of the standard library to skip: tests, installed packages, and generated tables."""
_CONTROL = re.compile(r"[^\x00-\x07\x0e-\x1a\x1c-\x1f\x7f]+")  # removes everything except control characters


class Document(NamedTuple):
    """One text and its name in messages."""

    name: str
    text: str


def valid_text(text: str) -> str:
    """The text, with lone surrogates, which UTF-8 cannot encode, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def json_lines(
    lines: Iterable[bytes], field: str, label: str, remedy: str, *, skip: int = 0
) -> Iterator[tuple[int, str | None]]:
    """Line number (counted from 1) and text of each row of JSON Lines; the text is None if the field is null.

    Blank lines are skipped, and so are the first `skip`, unparsed. A `UserError` names the file (`label`), the line that is not
    a JSON object with text in the field, and how to name another field (`remedy`).
    """
    for number, line in enumerate(lines, 1):
        if number <= skip or not line.strip():
            continue
        try:
            record = json.loads(line.decode().lstrip(MARK))  # files joined into one have marks inside
        except UnicodeDecodeError as error:
            fault = f"line {number} is not JSON in UTF-8 (byte {error.start} of it is 0x{line[error.start]:02x})"
            raise UserError(f"{label}: {fault}: set --data.encoding, for example to cp1252, or convert the file") from error
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{label}: line {number} is not JSON ({reason}): each line must be one JSON object") from error
        if not isinstance(record, dict):
            raise UserError(f"{label}: line {number} is not a JSON object: each line must be one with a field {field!r}")
        if field not in record:
            fields = ", ".join(map(repr, list(record)[:8])) or "none"
            near = closest(field, list(record))
            raise UserError(f"{label}: line {number} has no field {field!r}{near}; it has {fields}: {remedy}")
        text = record[field]
        if not isinstance(text, str | None):
            kind = type(text).__name__
            raise UserError(f"{label}: line {number}, field {field!r} contains {kind}, not text: {remedy}")
        yield number, text and valid_text(text).lstrip(MARK)  # JSON can encode half a surrogate pair


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
    root: Path  # document names are relative to it
    files: tuple[Path, ...]
    field: str = _DEFAULT_FIELD  # field of JSON Lines that contains the text
    lenient: bool = False  # leave out files that cannot be read instead of refusing them
    release: str = ""  # version of the software that the files belong to, if any
    encoding: str = ""  # of files without a byte order mark; empty: UTF-8
    unread: tuple[Left, ...] = ()  # what was found besides the files
    is_part: bool = False  # of a source with more files, so that there may be no text in these
    findings: Findings = dataclass_field(default_factory=Findings, compare=False)  # of the last pass over the documents

    def documents(self) -> Iterator[Document]:
        """All non-empty documents; a `UserError` if there are none, or naming the file and line that is not text."""
        found = False
        self.findings.clear()
        for reason, path in self.unread:
            self.findings.left_out(reason, os.path.relpath(path, self.root))
        for path in self.files:
            for document in self._read(path):
                if not document.text:
                    if not self.release:  # software has empty files on purpose
                        self.findings.left_out("empty file or row", document.name)
                    continue
                found = True
                self.findings.kept("NUL character", document.name, document.text.count("\0"))
                self.findings.kept("U+FEFF inside a text", document.name, document.text.count(MARK))
                yield document
        if self.is_part:
            return
        if not found and len(self.files) == 1 and not self.lenient:
            raise UserError(f"{self.files[0]}: is empty: choose a source that contains text")
        if not found:
            why = "; ".join(describe_findings(self.findings.facts())) or "empty"
            fault = f"none of its {len(self.files)} files contains UTF-8 text"
            raise UserError(f"{self.root}: {fault} ({why}): choose a source that does")

    def contents(self, path: Path) -> Contents:
        return examine(path, self.field, self.encoding, named_field=self.field != _DEFAULT_FIELD)

    def _read(self, path: Path) -> Iterator[Document]:
        """The documents of a file, which are perhaps empty."""
        contents = self.contents(path)
        try:
            if contents.fault:
                raise UserError(f"{path}: is {contents.fault}: {contents.remedy}")
            documents = self._rows(path, contents) if contents.rows else self._whole(path)
            first = next(documents, None)
        except UserError as error:
            if not self.lenient or isinstance(error.__cause__, OSError):
                raise
            rows, text = f"JSON Lines without text in the field {self.field!r}", f"file that is not {self.encoding or 'UTF-8'}"
            reason = re.sub("^an? ", "", contents.fault) or (rows if contents.rows else text)
            self.findings.left_out(reason, self._label(path))
            return
        if first is not None:
            yield from chain([first], documents)
        elif contents.rows:
            yield Document(self._label(path), "")

    def _whole(self, path: Path) -> Iterator[Document]:
        with os_error_as_user_error(path, "read"):
            data = path.read_bytes()
        text = decode_text(data, str(path), self.encoding, setting="--data.encoding")
        legacy = self.encoding and not byte_order_mark(data)[0]
        if self.lenient and text:
            sample = text[:8192]  # a binary file can be valid UTF-8, and any bytes are valid in most other encodings
            if len(_CONTROL.sub("", sample)) > (0.02 if legacy else 0.3) * len(sample):
                self.findings.left_out("binary file", self._label(path))
                return
        if legacy and not data.isascii() and _is_utf8(data):
            self.findings.kept(f"file that is also valid UTF-8, read as {self.encoding}", self._label(path), 1)
        yield Document(self._label(path), text)

    def _rows(self, path: Path, contents: Contents) -> Iterator[Document]:
        remedy = f"name the field that contains the text, as in {path.name}:FIELD"
        for number, text in json_lines(row_lines(path, contents.gzipped, contents.encoding), self.field, str(path), remedy):
            yield Document(f"{self._label(path)}:{number}", text or "")

    def _label(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def identity(self) -> str:
        settings = [self.name, str(self.root), self.field, self.lenient, self.release, self.encoding]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for path in self.files:
            with os_error_as_user_error(path, "read"):
                status = path.stat()
            digest.update(json.dumps([self._label(path), status.st_size, status.st_mtime_ns]).encode())
        return digest.hexdigest()

    def size(self) -> int:
        with os_error_as_user_error(self.root, "read"):
            return sum(path.stat().st_size for path in self.files)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def open_source(spec: str, encoding: str = "") -> Source:
    """Find the files that a spec names, without reading them; a `UserError` if there are none suggests a similar name.

    `encoding` is that of files without a byte order mark; empty: UTF-8.
    """
    if spec == STDLIB:
        return _stdlib()
    path, field = Path(spec).expanduser(), _DEFAULT_FIELD
    if not path.exists() and not _matches(spec):
        file, colon, name = spec.rpartition(":")
        if colon and name and os.sep not in name and (Path(file).expanduser().exists() or _matches(file)):
            spec, field, path = file, name, Path(file).expanduser()
    if path.is_file():
        source = FileSource(slug(path.stem), path.resolve().parent, (path.resolve(),), field, encoding=encoding)
    elif path.is_dir():
        refuse_made_folder(path)
        root = path.resolve()
        files, left = files_below(root)
        source = FileSource(slug(root.stem), root, tuple(files), field, True, encoding=encoding, unread=tuple(left))
        if not source.files:
            raise UserError(f"{path}: this folder has no files: choose one that contains text files")
    elif path.exists():
        raise UserError(f"{path}: is neither a file nor a folder")
    elif glob.has_magic(spec):
        files, left = without_made_folders(sorted({Path(match).resolve() for match in _matches(spec)}), _base(spec))
        if not files:
            raise UserError(f"data.source = {spec!r}: no file matches this pattern")
        root = Path(os.path.commonpath([file.parent for file in files]))
        source = FileSource(slug(files[0].parent.stem), root, tuple(files), field, encoding=encoding, unread=tuple(left))
    else:
        hint = f"{STDLIB!r} is available on every machine"
        raise UserError(f"data.source = {spec!r}: no such file or folder{similar(path, [STDLIB])}; {hint}")
    if field != _DEFAULT_FIELD and not any(source.contents(file).rows or source.contents(file).fault for file in source.files):
        raise UserError(
            f"data.source = {spec + ':' + field!r}: only .jsonl files have fields (JSON Lines), and none is selected"
        )
    return source


def _stdlib() -> Source:
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
