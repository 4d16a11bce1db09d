"""Multiple-choice tasks: where their items come from, and what a model is shown of them.

A task is 'hellaswag' (Zellers et al. 2019, the 10,042 validation items, from the hub) or the path of a file in HellaSwag's
form: JSON Lines, plain or gzip, each line an object with `ctx` (or `ctx_a` and `ctx_b`), `endings` and `label`, and perhaps
`ind` and `activity_label`. An ending is scored as the text " " + ending after the context; what the context is depends on the
style:

- 'plain' (the default) takes the texts as they are written, `[header]` and the like included. This is how GPT-2 124M gets the
  0.294 of completion-normalised accuracy that small GPTs are compared with.
- 'harness' prepares them as the language model evaluation harness does: the activity's name before the context, the second
  part of the context capitalised, bracketed marks taken out. Figures in the two styles are not to be compared.

A file is somebody else's: every line is checked, and read within limits (1 MiB a line, 1 GiB and a million items in all).
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from bardling.errors import UserError, closest

Style = Literal["plain", "harness"]

_MAX_LINE = 1 << 20  # bytes
_MAX_BYTES = 1 << 30
_MAX_ITEMS = 1_000_000
_MAX_ENDINGS = 64


@dataclass(frozen=True)
class ChoiceItem:
    """A context, several ways to go on from it, and which of them is right."""

    context: str
    endings: tuple[str, ...]
    label: int  # index of the right ending
    id: str  # for people: HellaSwag's own ids repeat


@dataclass(frozen=True)
class HubFile:
    """A file of a data set on the hub, pinned so that everybody measures on the same items."""

    repo: str
    revision: str
    path: str
    sha256: str


HELLASWAG = HubFile(
    repo="Rowan/hellaswag",
    revision="218ec52e09a7e7462a5400043bb9a69a41d06b76",
    path="data/validation-00000-of-00001.parquet",
    sha256="899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd",
)
HUB_TASKS = {"hellaswag": HELLASWAG}


def check_task(task: str) -> None:
    """Find out at once, without reading or downloading, whether `task` can be one.

    Raises:
        UserError: it is neither a known name nor a file.
    """
    if task in HUB_TASKS or Path(task).is_file():
        return
    hint = closest(task, list(HUB_TASKS))
    raise UserError(f"task {task!r}{hint}: is neither {', '.join(HUB_TASKS)} nor a file of JSON Lines in HellaSwag's form")


def task_name(task: str) -> str:
    """What to call a task in logs: 'hellaswag' as it is, a file without its folder and endings."""
    return task if task in HUB_TASKS else re.sub(r"(\.jsonl?)?(\.gz)?$", "", Path(task).name) or task


def load_items(task: str, *, style: Style = "plain") -> tuple[ChoiceItem, ...]:
    """All items of a task, in the order of its file.

    Args:
        task: 'hellaswag' (downloaded once, then taken from the hub's own cache) or the path of a file in its form.
        style: how contexts and endings are prepared; see the module.

    Raises:
        UserError: the task is unknown, cannot be downloaded, or a line of it is faulty; the message names line and field.
    """
    check_task(task)
    return read_hub_items(HUB_TASKS[task], style=style) if task in HUB_TASKS else read_items(task, style=style)


def read_items(path: Path | str, *, style: Style = "plain") -> tuple[ChoiceItem, ...]:
    """The items of a local file, plain or gzip.

    Raises:
        UserError: as `load_items`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if packed:
                with gzip.open(file) as unpacked:
                    return _items(_lines(unpacked, path), path, style)
            return _items(_lines(file, path), path, style)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: the gzip data is damaged or cut off: fetch the file again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read: {(error.strerror or str(error)).lower()}") from error


def _lines(file: IO[bytes] | gzip.GzipFile, path: Path) -> Iterator[tuple[str, Any]]:
    """The place and the parsed content of every line that is not blank."""
    total = number = 0
    while line := file.readline(_MAX_LINE + 1):
        number, total = number + 1, total + len(line)
        place = f"{path}, line {number}"
        if len(line) > _MAX_LINE:
            raise UserError(f"{place}: is longer than {_MAX_LINE >> 20} MiB: is this a file of JSON Lines?")
        if total > _MAX_BYTES:
            raise UserError(f"{place}: the file is over {_MAX_BYTES >> 30} GiB, the most that is read")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield place, json.loads(text)
        except UnicodeDecodeError:
            raise UserError(f"{place}: is not UTF-8: is this a file of JSON Lines?") from None
        except (ValueError, RecursionError):
            raise UserError(f"{place}: is not JSON, or cut off: give one object a line, as HellaSwag's files do") from None


def _items(rows: Iterable[tuple[str, Any]], path: Path | str, style: Style) -> tuple[ChoiceItem, ...]:
    items = tuple(_item(row, place, style) for place, row in islice(rows, _MAX_ITEMS + 1))
    if len(items) > _MAX_ITEMS:
        raise UserError(f"{path}: has more than {_MAX_ITEMS:,} items, the most that is read")
    if not items:
        raise UserError(f"{path}: holds no items: give a file with one JSON object a line")
    return items


def _item(row: Any, place: str, style: Style) -> ChoiceItem:
    if not isinstance(row, dict):
        raise UserError(f"{place}: is not a JSON object with ctx, endings and label")
    endings = row.get("endings")
    if not isinstance(endings, list) or not 2 <= len(endings) <= _MAX_ENDINGS:
        raise UserError(f"{place}: endings = {_short(endings)}: must be a list of 2 to {_MAX_ENDINGS} texts")
    for index, ending in enumerate(endings):
        if not isinstance(ending, str) or not ending.strip():
            raise UserError(f"{place}: endings[{index}] = {_short(ending)}: must be a text that is not empty")
    label = _label(row.get("label"), len(endings), place)
    context = _harness_context(row, place) if style == "harness" else _plain_context(row, place)
    if style == "harness":
        endings = [_without_marks(ending) for ending in endings]
    name = row.get("ind")
    named = isinstance(name, str | int) and not isinstance(name, bool) and len(str(name)) <= 100
    return ChoiceItem(context, tuple(endings), label, str(name) if named else place.rpartition(", ")[2])


def _label(value: Any, count: int, place: str) -> int:
    """An index, written as a number (as the first files have it) or as digits (as the hub's do)."""
    if value == "":
        raise UserError(f"{place}: label is empty: test splits come without answers; use the validation split")
    label = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,4}", value) else value
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count:
        raise UserError(f"{place}: label = {_short(value)}: must be the right ending's index, 0 to {count - 1}")
    return label


def _text(row: dict[str, Any], field: str, place: str, *, why: str = "") -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise UserError(f"{place}: {field} = {_short(value)}: must be a text{why}")
    return value


def _plain_context(row: dict[str, Any], place: str) -> str:
    if "ctx" in row or "ctx_a" not in row:
        field, context = "ctx", _text(row, "ctx", place)
    else:
        parts = _text(row, "ctx_a", place), _text(row, "ctx_b", place)
        field, context = "ctx_a", " ".join(part for part in parts if part)
    if not context.strip():
        raise UserError(f"{place}: {field} is empty: an ending needs something to follow")
    return context


def _harness_context(row: dict[str, Any], place: str) -> str:
    why = " (style 'harness' needs activity_label, ctx_a and ctx_b; style 'plain' only ctx)"
    label, first, second = (_text(row, field, place, why=why) for field in ("activity_label", "ctx_a", "ctx_b"))
    return _without_marks(f"{label}: {first} {second.capitalize()}")


def _without_marks(text: str) -> str:
    """WikiHow's marks taken out as the evaluation harness does it: a title ends a sentence, other brackets vanish."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    return text if len(text := repr(value)) <= 60 else text[:57] + "..."


def read_hub_items(source: HubFile, *, style: Style = "plain", endpoint: str | None = None) -> tuple[ChoiceItem, ...]:
    """The items of a parquet file on the hub.

    The download goes through `huggingface_hub` and its cache, so HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they always
    mean; the file's checksum is compared with the pinned one.

    Args:
        endpoint: the hub's address, unset for the usual one.

    Raises:
        UserError: a package is missing, the download failed, or the file is not the pinned one.
    """
    otherwise = "or give the path of a HellaSwag file (JSON Lines) in place of the name"
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UserError(
            f"{source.repo} needs the package {error.name}: pip install 'bardling[datasets]', {otherwise}"
        ) from None
    try:
        path = Path(hf_hub_download(source.repo, source.path, repo_type="dataset", revision=source.revision, endpoint=endpoint))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except Exception as error:  # the hub's client and its transport fail in many ways that have no common base
        first = error.__cause__ or error  # the hub's client wraps what happened into advice
        reason = " ".join(str(first).split())[:200] or type(first).__name__
        raise UserError(f"{source.repo}: cannot download ({reason}): check the network and try again, {otherwise}") from error
    if digest != source.sha256:
        raise UserError(
            f"{path}: is damaged (its SHA-256 is {digest[:12]}..., not {source.sha256[:12]}...): delete it and try again"
        )
    rows = parquet.read_table(path).to_pylist()
    return _items(((f"{source.repo}, row {number}", row) for number, row in enumerate(rows, 1)), source.repo, style)


def draw_items(items: Sequence[ChoiceItem], count: int | None, seed: int = 0) -> tuple[ChoiceItem, ...]:
    """`count` of the items, drawn at random without replacement; the same ones every time.

    Each item is ranked by a keyed hash of its content, so that a draw depends neither on the order of the items nor on a random
    number generator's version, and a larger draw contains the smaller one.

    Args:
        count: how many; None, or more than there are, takes all.
        seed: another seed gives another draw.

    Returns:
        The drawn items in their given order.
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
