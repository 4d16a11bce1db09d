"""Datasets by name, and any dataset of the Hugging Face hub, as sources of documents.

`shakespeare` and `shakespeare-char` are one text, the tiny Shakespeare of char-rnn; they differ in the tokenizer that is usual
for them. `openwebtext`, `fineweb-edu` (its sample of ten billion GPT-2 tokens) and `hf:NAME[:CONFIG][:SPLIT][:FIELD]` come from
the hub, read file by file, so that memory stays bounded; on disk the hub's cache holds every file (openwebtext about 24 GB,
fineweb-edu about 28 GB). A document of the hub is one row; those without text are left out.

A local file or folder that has one of these names is meant by writing `./shakespeare`.
"""

import gzip
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bardling.data import hub
from bardling.data.download import Remote, cache_root, download
from bardling.data.sources import STDLIB, Document, Source, open_source
from bardling.data.vocabulary import valid_text
from bardling.errors import UserError, closest
from bardling.files import told_plainly

TINY_SHAKESPEARE = Remote(
    (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt",
    ),
    size=1_115_394,
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    text=True,
)
DEFAULTS: dict[str, tuple[str, float]] = {
    "shakespeare": ("gpt2", 0.1),
    "shakespeare-char": ("char", 0.1),
    "openwebtext": ("gpt2", 0.0005),
    "fineweb-edu": ("gpt2", 0.0005),
}
"""For each name the tokenizer and the held-out fraction that are usual for it."""
_HUB_NAMES = {
    "openwebtext": ("Skylion007/openwebtext", ""),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
}
_ROWS = 1024  # of a Parquet file that are turned into text at a time


@dataclass(frozen=True)
class RemoteText:
    """One text file from elsewhere, as one document. Nothing is fetched before its text is asked for."""

    name: str
    remote: Remote

    def documents(self) -> Iterator[Document]:
        """The document.

        Raises:
            UserError: if the file cannot be had.
        """
        path = cache_root() / "downloads" / f"{self.remote.sha256[:16]}.txt"
        remedy = "check the connection and try again, or name a local copy of the text with --data.source FILE"
        download(self.remote, path, remedy=remedy)
        with told_plainly(path, "read"):
            data = path.read_bytes()
        yield Document(self.name, data.decode())

    def identity(self) -> str:
        """Digest of the content, which is known beforehand."""
        return self.remote.sha256

    def size(self) -> int:
        """Bytes of the file."""
        return self.remote.size or 0


@dataclass(frozen=True)
class HubSource:
    """A split of a dataset of the Hugging Face hub.

    Attributes:
        name: a short name, fit for a folder.
        repository: NAME or OWNER/NAME.
        config: the configuration; empty for the default one.
        split: such as 'train'.
        field: the column that holds the text.
    """

    name: str
    repository: str
    config: str = ""
    split: str = "train"
    field: str = "text"

    def documents(self) -> Iterator[Document]:
        """All rows that have text, named FILE:ROW, rows counted from 0.

        Raises:
            UserError: if the dataset or the field is not there, or a file cannot be had or read.
        """
        return self._from(0, 0)

    def after(self, name: str) -> Iterator[Document]:
        """The documents that follow the one of this name; files before it are not looked at."""
        path, _, row = name.rpartition(":")
        number = next(index for index, file in enumerate(self._listing().files) if file.path == path)
        return self._from(number, int(row) + 1)

    def _listing(self) -> hub.Listing:
        return hub.listing(self.repository, self.config, self.split)

    def _from(self, number: int, row: int) -> Iterator[Document]:
        found = self._listing()
        for file in found.files[number:]:
            path = hub.fetch(found, file)
            label = f"hf:{self.repository}/{file.path}"
            rows = _parquet_rows if file.path.endswith(".parquet") else _json_rows
            for index, text in rows(path, self.field, row, label):
                if text:
                    yield Document(f"{file.path}:{index}", valid_text(text))
            row = 0

    def identity(self) -> str:
        """Digest of the commit, the files and the field."""
        found = self._listing()
        files = [[file.path, file.size, file.sha256] for file in found.files]
        return hashlib.sha256(json.dumps([found.repository, found.revision, files, self.field]).encode()).hexdigest()

    def size(self) -> int:
        """About how many bytes of text there are, judged by the first file; 0 when unknown."""
        found = self._listing()
        if not found.files or not found.files[0].path.endswith(".parquet"):
            return 0
        first = found.files[0]
        text = _text_bytes(hub.fetch(found, first), self.field, f"hf:{self.repository}/{first.path}")
        return int(text / max(1, first.size) * sum(file.size for file in found.files))


def _parquet(path: Path, field: str, label: str) -> Any:
    """An opened Parquet file that has the field as text."""
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(f"{label}: reading Parquet needs the package pyarrow: {hub.EXTRA}") from error
    try:
        opened = pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{label}: cannot be read as Parquet ({' '.join(str(error).split())[:120]})") from error
    names = opened.schema_arrow.names
    if field not in names:
        opened.close()
        raise UserError(
            f"{label}: has no field {field!r}{closest(field, names)}; it has {', '.join(names[:12])}: "
            "name one as hf:NAME:CONFIG:SPLIT:FIELD"
        )
    kind = opened.schema_arrow.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
        opened.close()
        raise UserError(f"{label}: field {field!r} holds {kind}, not text: name another as hf:NAME:CONFIG:SPLIT:FIELD")
    return opened


def _parquet_rows(path: Path, field: str, first: int, label: str) -> Iterator[tuple[int, str | None]]:
    """Number and text of each row from number `first` on."""
    with _parquet(path, field, label) as opened:
        sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
        begins = list(itertools.accumulate(sizes, initial=0))
        groups = [group for group in range(len(sizes)) if begins[group + 1] > first]
        if not groups:
            return
        row = begins[groups[0]]
        try:
            for batch in opened.iter_batches(_ROWS, row_groups=groups, columns=[field]):
                texts = batch.column(0).to_pylist() if row + batch.num_rows > first else []
                yield from ((row + place, text) for place, text in enumerate(texts) if row + place >= first)
                row += batch.num_rows
        except (OSError, ValueError) as error:  # the library's errors are of these kinds
            raise UserError(f"{label}: is damaged at about row {row:,} ({' '.join(str(error).split())[:120]})") from error


def _text_bytes(path: Path, field: str, label: str) -> int:
    """Bytes of one column, uncompressed."""
    with _parquet(path, field, label) as opened:
        about = opened.metadata
        column = about.schema.names.index(field) if field in about.schema.names else 0
        return sum(about.row_group(group).column(column).total_uncompressed_size for group in range(about.num_row_groups))


def _json_rows(path: Path, field: str, first: int, label: str) -> Iterator[tuple[int, str | None]]:
    """The same for a file with one JSON object a line."""
    try:
        with gzip.open(path) if label.endswith(".gz") else path.open("rb") as file:
            for row, line in enumerate(file):
                if row < first or not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict) or field not in record:
                    names = list(record) if isinstance(record, dict) else []
                    raise UserError(
                        f"{label}: line {row + 1} has no field {field!r}{closest(field, names)}: "
                        "name the one with the text as hf:NAME:CONFIG:SPLIT:FIELD"
                    )
                if not isinstance(record[field], str | None):
                    raise UserError(f"{label}: line {row + 1}, field {field!r} holds {type(record[field]).__name__}, not text")
                yield row, record[field]
    except UserError:
        raise
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise UserError(f"{label}: cannot be read as JSON Lines ({' '.join(str(error).split())[:120]})") from error


def source_for(spec: str) -> Source:
    """The source that a spec names: a dataset by name, one of the hub, or what `bardling.data.sources.open_source` finds.

    Raises:
        UserError: if the spec names nothing.
    """
    if spec in ("shakespeare", "shakespeare-char"):
        return RemoteText(spec, TINY_SHAKESPEARE)
    if spec in _HUB_NAMES:
        repository, config = _HUB_NAMES[spec]
        return HubSource(spec, repository, config)
    if spec.startswith("hf:"):
        return _hub_source(spec)
    try:
        return open_source(spec)
    except UserError as error:
        if near := closest(spec, list(DEFAULTS)):
            raise UserError(f"{error}{near}") from error
        raise


def documents_after(source: Source, count: int, name: str) -> Iterator[Document]:
    """The documents after the first `count`, the last of which is called `name`.

    Files are read again up to there; a dataset of the hub begins at the right row.
    """
    if isinstance(source, HubSource):
        return source.after(name)
    return itertools.islice(source.documents(), count, None)


def names() -> list[str]:
    """Every source that has a name of its own."""
    return [STDLIB, *DEFAULTS]


def _hub_source(spec: str) -> HubSource:
    repository, *rest = spec.removeprefix("hf:").split(":")
    if not repository or len(rest) > 3:
        raise UserError(f"data.source = {spec!r}: a dataset of the hub is named as hf:NAME[:CONFIG][:SPLIT][:FIELD]")
    config, split, field = (*rest, "", "", "")[:3]
    slug = "".join(c if c.isalnum() and c.isascii() else "-" for c in f"{repository.rpartition('/')[2]}-{config}")
    return HubSource(slug.strip("-").lower()[:40] or "hub", repository, config, split or "train", field or "text")
