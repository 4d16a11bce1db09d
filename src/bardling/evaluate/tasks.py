"""Multiple-choice tasks: where their items come from, and how they become text.

A task is 'hellaswag' (Zellers et al. 2019, the 10,042 validation items, from the hub) or the path of a file in HellaSwag's
format: JSON Lines or a JSON array, plain or gzip, each line or element an object with `ctx` (or `ctx_a` and `ctx_b`), `endings`
and `label`, and optionally `ind`. An ending is scored as the text " " + ending after the context. Texts are used as they are,
including marks such as `[header]`: GPT-2 124M then reaches the 0.294 of completion-normalised accuracy that small GPTs are
compared with. The language model evaluation harness edits the texts, so its scores are not comparable.

Files are untrusted: every item is checked, and files are read within limits (1 MiB per line, 1 GiB and a million items in all;
256 MiB for an array, which is parsed as a whole).
"""

import codecs
import gzip
import hashlib
import json
import re
import reprlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from bardling.data.text.compression import EXTRA
from bardling.data.text.hub import hub_file
from bardling.errors import UserError
from bardling.extensions import TASKS
from bardling.files.atomic import os_error_as_user_error
from bardling.files.digests import file_sha256
from bardling.files.paths import similar

_MAX_LINE = 1 << 20  # bytes
_MAX_BYTES = 1 << 30
_MAX_ARRAY = 256 << 20
MAX_ITEMS = 1_000_000
MAX_ENDINGS = 64


@dataclass(frozen=True)
class ChoiceItem:
    """A context, several endings, and which of them is right."""

    context: str
    endings: tuple[str, ...]
    label: int  # index of the right ending
    id: str  # for messages: HellaSwag's own ids repeat


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset on the hub, pinned so that everyone measures on the same items."""

    repo: str
    revision: str
    path: str
    sha256: str


HUB_TASKS = {
    "hellaswag": HubFile(
        repo="Rowan/hellaswag",
        revision="218ec52e09a7e7462a5400043bb9a69a41d06b76",
        path="data/validation-00000-of-00001.parquet",
        sha256="899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd",
    )
}


def check_task(task: str) -> None:
    """Raise a `UserError`, without reading or downloading, if `task` is neither a known name nor a file."""
    if task not in HUB_TASKS and not Path(task).is_file():
        kinds = "".join(f", {kind}:NAME" for kind in TASKS.names())
        known = f"{', '.join(HUB_TASKS)}{kinds} or the path of a JSON Lines or JSON file in HellaSwag's format"
        raise UserError(f"task {task!r}: no such task or file{similar(Path(task), list(HUB_TASKS))}; use {known}")


def absolute_task(task: str) -> str:
    """The task, with an absolute path if it is a file, so that a run can be resumed from any folder."""
    return task if task in HUB_TASKS or not Path(task).exists() else str(Path.cwd() / task)


def task_name(task: str) -> str:
    """The name of a task in logs: 'hellaswag', or a file's name without its extensions."""
    return task if task in HUB_TASKS else re.sub(r"(\.jsonl?)?(\.gz)?$", "", Path(task).name) or task


def load_items(task: str) -> tuple[ChoiceItem, ...]:
    """All items of 'hellaswag' (downloaded once, then read from the hub client's cache) or of a file, in the order of the file;
    a `UserError` about an invalid line names line and field.
    """
    check_task(task)
    return read_hub_items(HUB_TASKS[task]) if task in HUB_TASKS else read_items(Path(task))


def read_items(path: Path) -> tuple[ChoiceItem, ...]:
    """Read the items of a local file, plain or gzip; errors as in `load_items`."""
    return _items(json_rows(path), path)


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The place and the content of every line of a JSON Lines file, or of every element of a JSON array, plain or gzip."""
    with os_error_as_user_error(path, "read"), path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            opened = gzip.GzipFile(fileobj=file) if packed else file
            is_array = opened.peek(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            yield from _elements(opened, path) if is_array else _lines(opened, path)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise UserError(f"{path}: the gzip data is corrupt or truncated: download the file again") from None


def _elements(file: IO[bytes] | gzip.GzipFile, path: Path) -> Iterator[tuple[str, Any]]:
    """The place and the content of every element of a JSON array."""
    data = file.read(_MAX_ARRAY + 1)
    if len(data) > _MAX_ARRAY:
        raise UserError(f"{path}: a JSON array may have at most {_MAX_ARRAY >> 20} MiB: write one object per line (JSON Lines)")
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8: is this a JSON file?") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: is not valid JSON ({error.msg}): correct the array") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is not valid JSON: write an array of objects") from None
    yield from ((f"{path}, item {number}", row) for number, row in enumerate(rows, 1))


def _lines(file: IO[bytes] | gzip.GzipFile, path: Path) -> Iterator[tuple[str, Any]]:
    """The place and the parsed content of every non-blank line."""
    total = number = 0
    while line := file.readline(_MAX_LINE + 1):
        number, total = number + 1, total + len(line)
        place = f"{path}, line {number}"
        if len(line) > _MAX_LINE:
            raise UserError(f"{place}: is longer than {_MAX_LINE >> 20} MiB: is this a JSON Lines file?")
        if total > _MAX_BYTES:
            raise UserError(f"{place}: the file exceeds the limit of {_MAX_BYTES >> 30} GiB")
        try:
            if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                yield place, json.loads(text)
        except UnicodeDecodeError:
            raise UserError(f"{place}: is not UTF-8: is this a JSON Lines file?") from None
        except (ValueError, RecursionError):
            raise UserError(f"{place}: is not valid JSON: write one object per line") from None


def _items(rows: Iterable[tuple[str, Any]], path: Path | str) -> tuple[ChoiceItem, ...]:
    items = tuple(_item(row, place) for place, row in islice(rows, MAX_ITEMS + 1))
    if len(items) > MAX_ITEMS:
        raise UserError(f"{path}: exceeds the limit of {MAX_ITEMS:,} items")
    if not items:
        raise UserError(f"{path}: contains no items: give a file with one JSON object per line, or an array of them")
    return items


def _item(row: Any, place: str) -> ChoiceItem:
    if not isinstance(row, dict):
        raise UserError(f"{place}: is not a JSON object with ctx, endings and label")
    endings = row.get("endings")
    if not isinstance(endings, list) or not 2 <= len(endings) <= MAX_ENDINGS:
        raise UserError(f"{place}: endings = {short(endings)}: must be a list of 2 to {MAX_ENDINGS} strings")
    for index, ending in enumerate(endings):
        if not isinstance(ending, str) or not ending.strip():
            raise UserError(f"{place}: endings[{index}] = {short(ending)}: must be a non-empty string")
    label = _label(row.get("label"), len(endings), place)
    name = row.get("ind")
    if not isinstance(name, str | int) or isinstance(name, bool) or len(str(name)) > 100:
        name = place.rpartition(", ")[2]
    return ChoiceItem(_context(row, place), tuple(endings), label, str(name))


def _label(value: Any, count: int, place: str) -> int:
    """An index, written as a number (as in the original files) or as digits (as in the hub's)."""
    if value == "":
        raise UserError(f"{place}: label is empty: test splits have no labels; use the validation split")
    label = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,4}", value) else value
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count:
        raise UserError(f"{place}: label = {short(value)}: must be the index of the right ending, 0 to {count - 1}")
    return label


def _context(row: dict[str, Any], place: str) -> str:
    fields = ["ctx"] if "ctx" in row or "ctx_a" not in row else ["ctx_a", "ctx_b"]
    for field in fields:
        if not isinstance(row.get(field), str):
            raise UserError(f"{place}: {field} = {short(row.get(field))}: must be a string")
    context = " ".join(row[field] for field in fields if row[field])
    if not context.strip():
        raise UserError(f"{place}: {fields[0]} is empty: an ending needs something to follow")
    return context


def short(value: Any) -> str:
    """A value from a file, for a message: also of a YAML file, where a few bytes may stand for a huge list or number."""
    if value is None:
        return "nothing"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, str | int | float) else reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_hub_items(source: HubFile) -> tuple[ChoiceItem, ...]:
    """Download and read the items of a parquet file on the hub, which must be the pinned one."""
    otherwise = "or give the path of a HellaSwag file (JSON Lines) instead of the name"
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise UserError(f"{source.repo} needs the package {error.name}: {EXTRA}, {otherwise}") from None
    try:
        path = hub_file(source.repo, source.path, source.revision, "dataset")
    except UserError as error:
        raise UserError(f"{error}, {otherwise}") from error
    if (digest := file_sha256(path)) != source.sha256:
        raise UserError(
            f"{path}: is corrupt (its SHA-256 is {digest[:12]}..., not {source.sha256[:12]}...): delete it and try again"
        )
    rows = parquet.read_table(path).to_pylist()
    return _items(((f"{source.repo}, row {number}", row) for number, row in enumerate(rows, 1)), source.repo)


def draw_items(items: Sequence[ChoiceItem], count: int | None, seed: int = 0) -> tuple[ChoiceItem, ...]:
    """Draw `count` of the items without replacement, in their given order; all of them for None or a larger count.

    Each item is ranked by a keyed hash of its content, so that a draw depends neither on the order of the items nor on the
    version of a random number generator, and a larger draw contains the smaller one.
    """
    if count is None or count >= len(items):
        return tuple(items)
    if count < 1:
        raise ValueError(f"count = {count}: at least one item must be drawn")
    key = str(seed).encode()[:64]

    def rank(index: int) -> tuple[bytes, int]:
        item = items[index]
        content = json.dumps([item.context, item.endings, item.label]).encode()
        return hashlib.blake2b(content, key=key, digest_size=16).digest(), index

    return tuple(items[index] for index in sorted(sorted(range(len(items)), key=rank)[:count]))
