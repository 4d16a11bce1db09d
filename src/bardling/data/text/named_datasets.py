"""Named datasets, and any dataset on the Hugging Face hub, as sources of documents.

`shakespeare` and `shakespeare-char` are the same text, the tiny Shakespeare of char-rnn, with different default tokenizers.
`openwebtext`, `fineweb-edu` (its sample of ten billion GPT-2 tokens) and `hf:NAME[:CONFIG][:SPLIT][:FIELD]` come from the hub
and are read file by file, so memory stays bounded; on disk the hub's cache holds every file (about 24 GB for openwebtext, 28 GB
for fineweb-edu). Each row of a hub dataset is one document; rows without text are skipped and counted (after an interruption,
only those of the resumed part).

These names take precedence over files and folders: `./shakespeare` is a local one.
"""

import gzip
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any, cast

from bardling.data.text import hub
from bardling.data.text.download import Remote, cache_root, download
from bardling.data.text.findings import Findings
from bardling.data.text.sources import STDLIB, Document, Source, json_lines, open_source, slug
from bardling.errors import UserError, closest
from bardling.extensions import SOURCES
from bardling.files.atomic import os_error_as_user_error
from bardling.files.decoding import MARK
from bardling.files.digests import json_sha256

TINY_SHAKESPEARE = Remote(
    (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt",
    ),
    size=1_115_394,
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
DEFAULTS: dict[str, tuple[str, float]] = {
    "shakespeare": ("gpt2", 0.1),
    "shakespeare-char": ("char", 0.1),
    "openwebtext": ("gpt2", 0.0005),
    "fineweb-edu": ("gpt2", 0.0005),
}  # default tokenizer and validation fraction of each name
NAMES = (STDLIB, *DEFAULTS)
_HUB_NAMES = {
    "openwebtext": ("Skylion007/openwebtext", ""),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
}
_FIELD_REMEDY = "specify the field that contains the text as hf:NAME:CONFIG:SPLIT:FIELD"
_TEXT_TYPES = ("string", "large_string", "string_view")  # of Arrow
_ROWS = 1024  # rows of a Parquet file converted to text at once


@dataclass(frozen=True)
class RemoteText:
    """A text file on a server, as one document; it is downloaded when its text is first requested."""

    name: str
    remote: Remote

    def documents(self) -> Iterator[Document]:
        path = download(self.remote, cache_root() / "downloads" / f"{self.remote.sha256[:16]}.txt")
        with os_error_as_user_error(path, "read"):
            data = path.read_bytes()
        yield Document(self.name, data.decode())

    def identity(self) -> str:
        return self.remote.sha256

    def size(self) -> int:
        return self.remote.size


@dataclass(frozen=True)
class HubSource:
    """A split of a dataset on the Hugging Face hub; see `hub.listing`."""

    name: str
    repository: str
    config: str = ""
    split: str = "train"
    field: str = "text"  # the column that contains the text
    first: int = 0  # file to begin with
    last: int | None = None  # file before which to end; None: to the end
    findings: Findings = dataclass_field(default_factory=Findings, compare=False)  # of the last pass over the documents

    def documents(self) -> Iterator[Document]:
        """All rows with text, named FILE:ROW with rows counted from 0; a `UserError` if one cannot be downloaded or read."""
        return self._from(self.first, 0)

    def after(self, name: str) -> Iterator[Document]:
        """The documents after the one with this name; earlier files are not opened."""
        path, _, row = name.rpartition(":")
        number = next(index for index, file in enumerate(self._listing().files) if file.path == path)
        return self._from(number, int(row) + 1)

    def _listing(self) -> hub.Listing:
        return hub.listing(self.repository, self.config, self.split)

    def _from(self, number: int, row: int) -> Iterator[Document]:
        found = self._listing()
        self.findings.clear()
        for file in found.files[number : self.last]:
            path = hub.fetch(found, file)
            label = f"hf:{self.repository}/{file.path}"
            rows = _parquet_rows if file.path.endswith(".parquet") else _json_rows
            for index, text in rows(path, self.field, row, label):
                document = Document(f"{file.path}:{index}", (text or "").lstrip(MARK))
                if document.text:
                    yield document
                else:
                    self.findings.left_out("row without text", document.name)
            row = 0

    def identity(self) -> str:
        found = self._listing()
        files = [[file.path, file.size, file.sha256] for file in found.files]
        return json_sha256([found.repository, found.revision, files, self.field])

    def size(self) -> int:
        """Approximate bytes of text, extrapolated from the first file; 0 if unknown."""
        found = self._listing()
        files = found.files[self.first : self.last]
        if not files:
            return 0
        first = files[0]
        if not first.path.endswith(".parquet"):
            return 0
        with _parquet(hub.fetch(found, first), self.field, f"hf:{self.repository}/{first.path}") as opened:
            column = opened.metadata.schema.names.index(self.field)
            groups = map(opened.metadata.row_group, range(opened.metadata.num_row_groups))
            text = sum(group.column(column).total_uncompressed_size for group in groups)
        return int(text / max(1, first.size) * sum(file.size for file in files))


def _parquet(path: Path, field: str, label: str) -> Any:
    """An open Parquet file, after checking that it has the field and that the field is text."""
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(f"{label}: reading Parquet needs the package pyarrow: {hub.EXTRA}") from error
    try:
        opened = pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{label}: cannot be read as Parquet ({_short(error)})") from error
    names, fault = opened.schema_arrow.names, ""
    if field not in names:
        fault = f"has no field {field!r}{closest(field, names)}; it has {', '.join(names[:12])}"
    elif (kind := opened.schema_arrow.field(field).type) not in [getattr(pyarrow, name)() for name in _TEXT_TYPES]:
        fault = f"field {field!r} contains {kind}, not text"
    if fault:
        opened.close()
        raise UserError(f"{label}: {fault}: {_FIELD_REMEDY}")
    return opened


def _parquet_rows(path: Path, field: str, first: int, label: str) -> Iterator[tuple[int, str | None]]:
    """Number and text of each row from row `first` on."""
    with _parquet(path, field, label) as opened:
        sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
        bounds = list(itertools.accumulate(sizes, initial=0))
        groups = [group for group in range(len(sizes)) if bounds[group + 1] > first]
        if not groups:
            return
        row = bounds[groups[0]]
        try:
            for batch in opened.iter_batches(_ROWS, row_groups=groups, columns=[field]):
                texts = batch.column(0).to_pylist() if row + batch.num_rows > first else []
                yield from ((number, text) for number, text in enumerate(texts, row) if number >= first)
                row += batch.num_rows
        except (OSError, ValueError) as error:  # pyarrow's exceptions derive from these
            raise UserError(f"{label}: is damaged near row {row:,} ({_short(error)})") from error


def _json_rows(path: Path, field: str, first: int, label: str) -> Iterator[tuple[int, str | None]]:
    """The same for JSON Lines, perhaps gzipped: a row is a line."""
    try:
        with gzip.open(path) if label.endswith(".gz") else path.open("rb") as file:
            for number, text in json_lines(file, field, label, _FIELD_REMEDY, skip=first):
                yield number - 1, text
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{label}: cannot be read as JSON Lines ({_short(error)})") from error


def is_source_name(spec: str) -> bool:
    """Whether a spec is a name, of a dataset here, on the hub or from an extension, and not a path."""
    return spec in NAMES or spec.startswith("hf:") or spec.partition(":")[0] in SOURCES


def source_for(spec: str, encoding: str = "") -> Source:
    """The source that a spec names: a named dataset, one on the hub, or files (`open_source`); a `UserError` if none.

    `encoding` is that of files without a byte order mark; other sources know theirs.
    """
    source = _named_source(spec)
    if source is not None and encoding:
        raise UserError(f"data.encoding = {encoding!r}: {spec} has a known encoding: omit this setting, which is for files")
    if source is not None:
        return source
    try:
        return open_source(spec, encoding)
    except UserError as error:
        if near := closest(spec, list(DEFAULTS)):
            raise UserError(f"{error}{near}") from error
        raise


def _named_source(spec: str) -> Source | None:
    """A source that is not a path; None if there is none of this name."""
    if spec in ("shakespeare", "shakespeare-char"):
        return RemoteText(spec, TINY_SHAKESPEARE)
    if spec in _HUB_NAMES:
        return HubSource(spec, *_HUB_NAMES[spec])
    if spec.startswith("hf:"):
        return _hub_source(spec)
    name, _, rest = spec.partition(":")
    if name in SOURCES:
        return cast(Source, SOURCES.get("data.source", name)(rest))
    return None


def documents_after(source: Source, count: int, name: str) -> Iterator[Document]:
    """The documents after the first `count`, the last of which is `name`; a source with `after` avoids reading the others."""
    if after := getattr(source, "after", None):
        return cast(Iterator[Document], after(name))
    return itertools.islice(source.documents(), count, None)


def _hub_source(spec: str) -> HubSource:
    repository, *rest = spec.removeprefix("hf:").split(":")
    if not repository or len(rest) > 3:
        raise UserError(f"data.source = {spec!r}: a hub dataset is specified as hf:NAME[:CONFIG][:SPLIT][:FIELD]")
    config, split, field = (*rest, "", "", "")[:3]
    name = slug(f"{repository.rpartition('/')[2]}-{config}", default="hub")
    return HubSource(name, repository, config, split or "train", field or "text")


def _short(error: Exception) -> str:
    """The start of an error's message, on one line."""
    return " ".join(str(error).split())[:120]
