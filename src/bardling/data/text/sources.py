"""Sources of text: a stream of documents from files, and a digest that changes when the files do.

A source is specified by one string: 'stdlib' (the source code of the Python standard library: about 10 MB of real text that
every machine has), a text file, a folder, a glob pattern, or FILE.jsonl[:FIELD]. Each file is one document; in a `.jsonl` file,
each line is one. Files are read in the sorted order of their paths, whatever order the system lists them in.

Text is UTF-8 and used unchanged: line endings are kept and only a byte order mark is dropped. Files named directly or by a glob
must be text; in a folder, files that are empty, hidden or not UTF-8 are skipped.

Limits: a file that is not JSON Lines is read into memory as a whole.
"""

import glob
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from bardling.errors import UserError, closest
from bardling.files.atomic import os_error_as_user_error

STDLIB = "stdlib"
_DEFAULT_FIELD = "text"
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
"""Folders of the standard library to skip: tests, installed packages, and generated tables."""


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
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
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
        yield number, text and valid_text(text)  # JSON can encode half a surrogate pair


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
    lenient: bool = False  # skip files that are not UTF-8 instead of refusing them
    release: str = ""  # version of the software that the files belong to, if any

    def documents(self) -> Iterator[Document]:
        """All non-empty documents; a `UserError` if there are none, or naming the file and line that is not text."""
        found = False
        for path in self.files:
            for document in self._lines(path) if path.suffix == ".jsonl" else self._whole(path):
                if document.text:
                    found = True
                    yield document
        if not found and len(self.files) == 1:
            raise UserError(f"{self.files[0]}: is empty: choose a source that contains text")
        if not found:
            raise UserError(f"{self.root}: none of its {len(self.files)} files contains UTF-8 text: choose a source that does")

    def _whole(self, path: Path) -> Iterator[Document]:
        with os_error_as_user_error(path, "read"):
            data = path.read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if self.lenient:
                return
            remedy = "convert it, for example with `iconv -f latin1 -t utf-8`, or select only text files"
            place = f"byte {error.start:,} is 0x{data[error.start]:02x}"
            raise UserError(f"{path}: is not UTF-8 text ({place}): {remedy}") from error
        if not (self.lenient and "\0" in text[:8192]):  # a binary file can be valid UTF-8
            yield Document(self._label(path), text)

    def _lines(self, path: Path) -> Iterator[Document]:
        remedy = f"name the field that contains the text, as in {path.name}:FIELD"
        with os_error_as_user_error(path, "read"), path.open("rb") as file:
            for number, text in json_lines(file, self.field, str(path), remedy):
                if text is None:
                    raise UserError(f"{path}: line {number}, field {self.field!r} is null, not text: {remedy}")
                yield Document(f"{self._label(path)}:{number}", text)

    def _label(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def identity(self) -> str:
        digest = hashlib.sha256(json.dumps([self.name, str(self.root), self.field, self.lenient, self.release]).encode())
        for path in self.files:
            with os_error_as_user_error(path, "read"):
                status = path.stat()
            digest.update(json.dumps([self._label(path), status.st_size, status.st_mtime_ns]).encode())
        return digest.hexdigest()

    def size(self) -> int:
        with os_error_as_user_error(self.root, "read"):
            return sum(path.stat().st_size for path in self.files)


def open_source(spec: str) -> Source:
    """Find the files that a spec names, without reading them; a `UserError` if there are none suggests a similar name."""
    if spec == STDLIB:
        return _stdlib()
    path, field = Path(spec).expanduser(), _DEFAULT_FIELD
    if not path.exists() and not _matches(spec):
        file, colon, name = spec.rpartition(":")
        if colon and name and os.sep not in name and (Path(file).expanduser().exists() or _matches(file)):
            spec, field, path = file, name, Path(file).expanduser()
    if path.is_file():
        source = FileSource(slug(path.stem), path.resolve().parent, (path.resolve(),), field)
    elif path.is_dir():
        if (path / "manifest.json").is_file() and any(path.glob("train-*.bin")):
            raise UserError(f"{path}: is a prepared dataset, not text: train on it directly with --data.source {path}")
        root = path.resolve()
        source = FileSource(slug(root.stem), root, tuple(_below(root)), field, lenient=True)
        if not source.files:
            raise UserError(f"{path}: this folder has no files: choose one that contains text files")
    elif path.exists():
        raise UserError(f"{path}: is neither a file nor a folder")
    elif glob.has_magic(spec):
        files = tuple(sorted({Path(match).resolve() for match in _matches(spec)}))
        if not files:
            raise UserError(f"data.source = {spec!r}: no file matches this pattern")
        root = Path(os.path.commonpath([file.parent for file in files]))
        source = FileSource(slug(files[0].parent.stem), root, files, field)
    else:
        hint = f"{STDLIB!r} is available on every machine"
        raise UserError(f"data.source = {spec!r}: no such file or folder{_similar(path)}; {hint}")
    if field != _DEFAULT_FIELD and not any(file.suffix == ".jsonl" for file in source.files):
        raise UserError(f"data.source = {spec + ':' + field!r}: only .jsonl files have fields, and none is selected")
    return source


def _stdlib() -> Source:
    root = Path(sysconfig.get_path("stdlib")).resolve()
    # _sysconfigdata contains the settings of the machine that built Python, not code that someone wrote
    found = _below(root, left_out=_LEFT_OUT)
    files = tuple(path for path in found if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"))
    if not files:
        remedy = "set data.source to a text file or folder"
        raise UserError(f"{root}: this Python has no source files of its standard library: {remedy}")
    release = f"{platform.python_implementation()} {platform.python_version()}"
    return FileSource(STDLIB, root, files, lenient=True, release=release)


def _below(root: Path, left_out: Collection[str] = ()) -> list[Path]:
    """Files in a folder tree that are not hidden, sorted by relative path; links to folders are not followed."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".") and Path(folder, name).is_file()]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _matches(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        return []
    return [match for match in glob.glob(os.path.expanduser(pattern), recursive=True) if Path(match).is_file()]  # noqa: PTH111, PTH207


def slug(name: str, default: str = "text") -> str:
    """A short version of a name that is usable as a folder name."""
    plain = "".join(character if character.isalnum() and character.isascii() else "-" for character in name)
    return plain.strip("-").lower()[:40] or default


def _similar(path: Path) -> str:
    """A suggestion: an entry of the same folder whose name is like the missing one's."""
    folder = path.parent
    if not folder.is_dir():
        return f": the folder {folder} does not exist"
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return ""
    return closest(path.name, [*names, STDLIB] if folder == Path() else names)
