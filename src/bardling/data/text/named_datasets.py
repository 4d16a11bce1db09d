"""Named datasets, and any dataset on the Hugging Face hub, as sources of documents.

`shakespeare` and `shakespeare-char` are the same text, the tiny Shakespeare of char-rnn, with different default tokenizers.
`openwebtext`, `fineweb-edu` (its sample of ten billion GPT-2 tokens) and `hf:NAME[:CONFIG][:SPLIT][:FIELD]` come from the hub
and are read file by file, so memory stays bounded; on disk the hub's cache holds every file (about 24 GB for openwebtext, 28 GB
for fineweb-edu), unless they are streamed: then nothing is kept, and each pass over the text reads it over the network, without
checking its SHA-256. Each row of a hub dataset is one document; rows without text are skipped and counted (after an
interruption, only those of the resumed part).

These names take precedence over files and folders: `./shakespeare` is a local one.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from typing import cast

from bardling.data.text import hub
from bardling.data.text.download import Remote, cache_root, download
from bardling.data.text.fields import DEFAULT_FIELD, RowText
from bardling.data.text.findings import Findings
from bardling.data.text.opening import opened, without_secrets
from bardling.data.text.rows import Row, Table, TooLong, json_lines, parquet_rows, parquet_text_bytes
from bardling.data.text.sources import STDLIB, Document, Source, open_source, slug
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
    field: str = DEFAULT_FIELD  # the column that contains the text, or a template
    stream: bool = False  # read the files over the network each time instead of downloading them
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
        wanted = RowText(self.field)
        for file in found.files[number : self.last]:
            for index, content in self._rows(found, file, wanted, row):
                name = f"{file.path}:{index}"
                place = f"row {index}" if file.path.endswith(".parquet") else f"line {index + 1}"
                text, nulls = wanted.text(content, f"hf:{self.repository}/{file.path}: {place}", _FIELD_REMEDY)
                self.findings.kept("null field of a template", name, nulls)
                if text := (text or "").lstrip(MARK):
                    yield Document(name, text)
                else:
                    self.findings.left_out("row without text", name)
            row = 0

    def _rows(self, found: hub.Listing, file: hub.HubFile, wanted: RowText, first: int) -> Iterator[Row]:
        """The rows of a file from number `first` on; in JSON Lines, the number of a row is that of its line minus 1."""
        label = f"hf:{self.repository}/{file.path}"
        place = hub.remote(found, file) if self.stream else hub.fetch(found, file)
        with opened(place) as (stream, _):
            table = Table(stream, label, wanted, _FIELD_REMEDY, skip=first)
            if file.path.endswith(".parquet"):
                yield from parquet_rows(table)
                return
            for line, content in json_lines(table):
                if isinstance(content, TooLong):
                    self.findings.left_out(content.reason, f"{file.path}:{line - 1}")
                else:
                    yield line - 1, content

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
        place = hub.remote(found, first) if self.stream else hub.fetch(found, first)
        label = f"hf:{self.repository}/{first.path}"
        with opened(place) as (stream, _):
            text = parquet_text_bytes(Table(stream, label, RowText(self.field), _FIELD_REMEDY))
        return int(text / max(1, first.size) * sum(file.size for file in files))


def is_source_name(spec: str) -> bool:
    """Whether a spec is a name, of a dataset here, on the hub or from an extension, and not a path."""
    return spec in NAMES or spec.startswith("hf:") or spec.partition(":")[0] in SOURCES


def source_for(spec: str, encoding: str = "", field: str = "", separator: str = "", *, stream: bool = False) -> Source:
    """The source that a spec names: a named dataset, one on the hub, or files (`open_source`); a `UserError` if none.

    `encoding`, `field` and `separator` are for files (see `open_source`), `field` also for the hub, and `stream` only for it.
    """
    source = _named_source(spec)
    if stream and not isinstance(source, HubSource):
        raise UserError(f"data.stream: {without_secrets(spec)} is not a dataset on the hub: omit this setting")
    if source is None:
        try:
            return open_source(spec, encoding, field, separator)
        except UserError as error:
            if near := closest(spec, list(DEFAULTS)):
                raise UserError(f"{error}{near}") from error
            raise
    if encoding:
        raise UserError(f"data.encoding = {encoding!r}: {spec} has a known encoding: omit this setting, which is for files")
    if separator:
        raise UserError(f"data.separator = {separator!r}: {spec} has no text files to divide: omit this setting")
    if isinstance(source, HubSource):
        if field and source.field not in (field, DEFAULT_FIELD):
            raise UserError(f"data.field = {field!r}: {spec} names another field, {source.field!r}: omit one of them")
        return replace(source, field=field or source.field, stream=stream)
    if field:
        raise UserError(f"data.field = {field!r}: {spec} has no fields: omit this setting")
    return source


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
    return HubSource(name, repository, config, split or "train", field or DEFAULT_FIELD)
