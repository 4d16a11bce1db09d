"""Joins the parts of a source, prepared with `--shard`, into the dataset of a single preparation, equal to the byte.

The parts must belong together: the same text, tokenizer and settings, each number from 1 to N once. All their files are
compared with their checksums before anything is written. As in `prepare.py`, the dataset appears complete or not at all.

Limits: memory for a few million tokens, and for the positions of all documents of the largest part (16 bytes each).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bardling.data.text.findings import joined_findings
from bardling.data.text.parts import MOST
from bardling.data.tokens.documents import DocumentWriter
from bardling.data.tokens.journal import becoming, empty, refuse_existing, working_on
from bardling.data.tokens.manifest import Manifest, SplitInfo, SplitName, write_manifest
from bardling.data.tokens.shards import ShardWriter, TokenDataset, open_dataset
from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error

_TOKENS = 1 << 21  # copied at once
_NAMES = 1 << 16
Progress = Callable[[str, int, int], None]  # as in prepare.py, in tokens


def merge(folders: Sequence[Path | str], out: Path | str, progress: Progress | None = None) -> TokenDataset:
    """Create the dataset folder `out`, which must not exist, from all parts, in any order; a `UserError` if they do not fit."""
    out, told = Path(out), progress or (lambda *_: None)
    refuse_existing(out)
    parts = _ordered([open_dataset(folder) for folder in folders])
    for part in parts:
        told(f"checking {part.path}", 0, 0)
        if problems := part.verify():
            raise UserError(f"{problems[0]}: prepare this part again")
    tokenizer = parts[0].tokenizer
    if tokenizer is None:
        raise UserError(f"{parts[0].path}: has no tokenizer: prepare this part again")
    with os_error_as_user_error(out, "merge the parts"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with working_on(out) as work, becoming(out, work):
            empty(work)
            tokenizer.save(work)
            train, val = (_joined(parts, name, work, told) for name in ("train", "val"))
            write_manifest(work, replace(parts[0].manifest, source=_source(parts), train=train, val=val))
    return open_dataset(out)


def _ordered(parts: Sequence[TokenDataset]) -> list[TokenDataset]:
    """All parts by their numbers; a `UserError` if they are not the parts of one source."""
    places, first = dict[int, TokenDataset](), None
    for part in parts:
        number, _ = _place(part)
        first = first or part
        if fault := _difference(first.manifest, part.manifest):
            raise UserError(f"{part.path}: does not belong to {first.path}: it has another {fault}")
        if number in places:
            raise UserError(f"{part.path}: is part {number}, and so is {places[number].path}: name each part once")
        places[number] = part
    if first is None:
        raise UserError("no parts to merge: name the folders that `bardling prepare --shard I/N` has made")
    _, count = _place(first)
    if missing := [number for number in range(1, count + 1) if number not in places]:
        listed = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise UserError(f"parts are missing: {listed} of {count}: prepare them with --shard {missing[0]}/{count} and so on")
    return [places[number] for number in range(1, count + 1)]


def _place(part: TokenDataset) -> tuple[int, int]:
    """Number and count of a part, whose manifest may come from anywhere."""
    facts = part.manifest.source.get("part")
    names = ("number", "count", "shard_tokens")
    number, count, limit = (facts.get(name, 0) for name in names) if isinstance(facts, dict) else (0, 0, 0)
    if not all(type(value) is int for value in (number, count, limit)) or not (1 <= number <= count <= MOST and limit > 0):
        raise UserError(f"{part.path}: is not a part: only what `bardling prepare --shard I/N` has made can be merged")
    if part.manifest.row or not all(split.index for split in (part.manifest.train, part.manifest.val)):
        raise UserError(f"{part.path}: is a part without an index of its documents: prepare it again")
    return number, count


def _difference(first: Manifest, other: Manifest) -> str:
    """In what two parts differ although those of one source do not; empty if in nothing."""
    mine, yours = first.source, other.source
    names = {"identity": "text", "spec": "source", "held_out": "split", "split_rule": "split rule"}
    differences = [what for key, what in names.items() if mine.get(key) != yours.get(key)]
    settings = {"count": "number of parts", "shard_tokens": "number of tokens per file", "tokenizer": "tokenizer"}
    differences += [what for key, what in settings.items() if mine["part"].get(key) != yours["part"].get(key)]
    if (first.tokenizer, first.dtype, first.vocab_size) != (other.tokenizer, other.dtype, other.vocab_size):
        differences.append("tokenizer")
    if first.val_fraction != other.val_fraction:
        differences.append("val_fraction")
    return next(iter(differences), "")


def _source(parts: Sequence[TokenDataset]) -> dict[str, Any]:
    """Where the text of all parts came from, as a single preparation records it."""
    tables = ("left_out", "kept", "part")
    facts = {key: value for key, value in parts[0].manifest.source.items() if key not in tables}
    try:
        return facts | joined_findings(part.manifest.source for part in parts)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{parts[0].path}: the manifests of these parts are not of `bardling prepare`: prepare them again"
        ) from error


def _joined(parts: Sequence[TokenDataset], name: SplitName, work: Path, told: Progress) -> SplitInfo:
    """Write one split of the dataset."""
    total, done = sum(part.manifest.split(name).tokens for part in parts), 0
    limit = parts[0].manifest.source["part"]["shard_tokens"]
    with ExitStack() as stack:
        shards = stack.enter_context(ShardWriter(work, name, parts[0].vocab_size, limit))
        index = stack.enter_context(DocumentWriter(work, name))
        for part in parts:
            split, info = part.split(name), part.manifest.split(name)
            shards.add(np.empty(0, np.int64), documents=info.documents, text_bytes=info.bytes)
            for start in range(0, len(split), _TOKENS):
                shards.add(split.read(start, min(_TOKENS, len(split) - start)), documents=0)
                done = min(total, done + _TOKENS)
                told(f"merging {name}", done, total)
            for lengths, names in _documents(part, name):
                index.add(lengths, names)
        return replace(shards.finish(), index=index.finish())


def _documents(part: TokenDataset, name: SplitName) -> Iterator[tuple[Any, list[str]]]:
    """Lengths and names of the documents of a split, some at a time."""
    rows, lines = (part.path / file.name for file in part.manifest.split(name).index)
    if rows.stat().st_size % 16:
        raise UserError(f"{rows}: is damaged, because it has half a row: prepare this part again")
    begins = np.fromfile(rows, "<u8").reshape(-1, 2)[:, 0].astype(np.int64)
    lengths = np.diff(begins, append=len(part.split(name)))
    if begins.size and (begins[0] != 0 or (lengths < 0).any()):
        raise UserError(f"{rows}: is damaged, because its documents are out of order: prepare this part again")
    with lines.open("rb") as file:
        for start in range(0, len(lengths), _NAMES):
            some = lengths[start : start + _NAMES]
            try:
                names = [str(json.loads(line)) for line in islice(file, len(some))]
            except (ValueError, RecursionError):
                names = []
            if len(names) != len(some):
                raise UserError(f"{lines}: is damaged: prepare this part again")
            yield some, names
