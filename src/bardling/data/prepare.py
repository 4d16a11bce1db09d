"""From a source to a dataset of tokens: split, tokenise, write.

The held-out split is chosen so that it stays put. Where there are many documents (at least 100, some of which it takes), whole
documents are held out by a hash of their content: copies of a text never stand on both sides, and adding files never moves
another. Otherwise the last part of each document is held out: of a single one from character int(n * (1 - val_fraction)) on, as
in nanoGPT; of one among several from the line break near that place, if there is one close by.

Where there are several documents, each is followed by the end-of-text token, in each split. A source of one document has
nothing to separate and gets none. A BPE is trained on the training split only; the characters of 'char' are those of both, for
one that is missing could not be encoded.

A dataset folder appears whole or not at all: everything is written into a folder beside it, which is then renamed. What takes
long keeps a journal there, and goes on after an interruption when the same is asked for again; otherwise nothing is left.
"""

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bardling.config import DataConfig
from bardling.data.datasets import documents_after, source_for
from bardling.data.documents import DocumentWriter
from bardling.data.journal import Journal, Position, digest, working_on
from bardling.data.manifest import FORMAT, Manifest, SplitName, write_manifest
from bardling.data.parallel import SPLITS, Encoders, default_workers
from bardling.data.progress import Bar
from bardling.data.shards import SHARD_TOKENS, ShardWriter, TokenDataset, open_dataset
from bardling.data.sources import Document, Source
from bardling.data.tokenizer import Tokenizer, build_tokenizer, check_tokenizer_spec, load_tokenizer
from bardling.errors import UserError
from bardling.files import sync_folder, told_plainly

MANY = 100
"""Documents from which on whole ones are held out."""
_BATCH = 4 << 20  # characters that are tokenised at a time
_BATCH_OF_WORKER = 1 << 20  # the same for one of several processes
_METHOD = 1  # raise it when the same source comes to give other tokens, so that cached datasets are made anew

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, characters done, about how many in all)."""
Piece = tuple[SplitName, str]


def held_out(text: str, val_fraction: float) -> bool:
    """Whether a document is for validation; depends on its content alone."""
    number = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return number < val_fraction * 2.0**64


class _Splitter:
    """The documents of a source as pieces of the two splits, the same ones each time."""

    def __init__(self, source: Source, val_fraction: float) -> None:
        self._source, self._val_fraction = source, val_fraction
        self.several = len(list(itertools.islice(source.documents(), 2))) > 1
        self.by_document = self._has_many()

    def _has_many(self) -> bool:
        """Whether there are many documents and both splits get some; stops reading as soon as that is known."""
        sides = set()
        for seen, document in enumerate(self._source.documents(), 1):
            sides.add(held_out(document.text, self._val_fraction))
            if seen >= MANY and len(sides) == 2:
                return True
        return False

    def pieces(self) -> Iterator[Piece]:
        for document in self._source.documents():
            yield from self.split(document.text)

    def split(self, text: str) -> list[Piece]:
        """The pieces of one document."""
        if self.by_document:
            return [("val" if held_out(text, self._val_fraction) else "train", text)]
        cut = _cut(text, self._val_fraction, at_line=self.several)
        return [("train", text[:cut]), ("val", text[cut:])]

    def describe(self) -> str:
        return "whole documents by hash" if self.by_document else "the last part of each document"


def _cut(text: str, val_fraction: float, *, at_line: bool) -> int:
    """Where the held-out part of a text begins.

    With `at_line` that is the beginning of a line, if there is one up to 1 % of the text (at least 200 characters) before.
    """
    cut = int(len(text) * (1 - val_fraction))
    if at_line:
        reach = max(200, len(text) // 100)
        line = text.rfind("\n", max(0, cut - reach), cut) + 1
        cut = line or cut
    return cut


def prepare(
    source_spec: str,
    out: Path | str,
    tokenizer_spec: str,
    *,
    val_fraction: float = 0.05,
    progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
) -> TokenDataset:
    """Make a dataset folder; one that was interrupted after some time goes on where it stopped.

    Args:
        source_spec: as in `bardling.data.datasets.source_for`.
        out: the folder to make; it must not exist.
        tokenizer_spec: as in `bardling.data.tokenizer.build_tokenizer`.
        val_fraction: part of the text that is held out, between 0 and 1.
        progress: told how far it is; unset shows a bar on a terminal when it takes more than two seconds.
        shard_tokens: tokens in one file at most.
        workers: processes that tokenise; unset takes as many as pay. The result is the same for every number.

    Raises:
        UserError: if the folder exists, the source or tokenizer cannot be used, or the disk refuses. Nothing is left at `out`.
    """
    out = Path(out)
    if not 0.0 < val_fraction < 1.0:
        raise UserError(f"data.val_fraction = {val_fraction!r}: must be between 0 and 1")
    if workers is not None and workers < 1:
        raise UserError(f"workers = {workers}: must be at least 1")
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already: choose another folder, or remove it first")
    check_tokenizer_spec(tokenizer_spec)
    source = source_for(source_spec)
    with Bar() as bar:
        order = _Order(source, source_spec, tokenizer_spec, val_fraction, shard_tokens, workers, progress or bar, bar)
        with told_plainly(out, "make the dataset"):
            out.parent.mkdir(parents=True, exist_ok=True)
            with working_on(out) as work:
                _make(order, out, work)
    return open_dataset(out)


@dataclass(frozen=True)
class _Order:
    """What is to be made, and how."""

    source: Source
    source_spec: str
    tokenizer_spec: str
    val_fraction: float
    shard_tokens: int
    workers: int | None
    progress: Progress
    bar: Bar


def _make(order: _Order, out: Path, work: Path) -> None:
    """Write the dataset into the work folder and rename it."""
    journal = Journal(work)
    try:
        splitter = _Splitter(order.source, order.val_fraction)
        made_of = digest(
            (_METHOD, "indexed"),  # an attempt that kept no index is not taken up
            order.source.identity(),
            order.tokenizer_spec,
            order.val_fraction,
            order.shard_tokens,
            splitter.describe(),
        )
        position = journal.read(made_of)
        if position is None:
            _empty(work)
            tokenizer = _tokenizer(order, splitter)
            tokenizer.save(work)
        else:
            tokenizer = load_tokenizer(work)
        manifest = _write(order, splitter, tokenizer, work, journal, position, made_of)
        write_manifest(work, manifest)
        sync_folder(work)
        work.rename(out)  # refused by the system if someone else has made a folder with files there meanwhile
    except BaseException:
        if not Journal(work).kept and work.exists():
            _empty(work)
            (work / "lock").unlink(missing_ok=True)  # last: from here on another process may begin
            with contextlib.suppress(OSError):
                work.rmdir()
        raise
    sync_folder(out.parent)
    Journal(out).remove()  # not before: until the folder has its name, a kill must not cost what was tokenised
    (out / "lock").unlink(missing_ok=True)  # held so far, so that whoever waits for it finds the dataset


def _empty(work: Path) -> None:
    """Remove all but the lock from a work folder."""
    for path in work.iterdir():
        if path.name != "lock":
            path.unlink(missing_ok=True)


def _tokenizer(order: _Order, splitter: _Splitter) -> Tokenizer:
    def texts() -> Iterator[str]:
        done, total = 0, order.source.size()
        for where, text in splitter.pieces():
            done += len(text)
            order.progress("training the tokenizer", done, total)
            if where == "train":
                yield text

    whole = order.tokenizer_spec == "char"
    return build_tokenizer(order.tokenizer_spec, (d.text for d in order.source.documents()) if whole else texts())


def _write(
    order: _Order,
    splitter: _Splitter,
    tokenizer: Tokenizer,
    folder: Path,
    journal: Journal,
    position: Position | None,
    made_of: str,
) -> Manifest:
    end = [tokenizer.eot_id] if splitter.several and tokenizer.eot_id is not None else []
    source, total = order.source, order.source.size()
    facts = {"spec": order.source_spec, "name": source.name, "identity": source.identity(), "held_out": splitter.describe()}
    workers = order.workers or default_workers(total, tokenizer.kind)
    documents, done, begun = 0, 0, time.monotonic()
    with (
        ShardWriter(folder, "train", tokenizer.vocab_size, order.shard_tokens) as train,
        ShardWriter(folder, "val", tokenizer.vocab_size, order.shard_tokens) as val,
        DocumentWriter(folder, "train") as train_index,
        DocumentWriter(folder, "val") as val_index,
        Encoders[_Batch](tokenizer, folder, end, workers) as encoders,
    ):
        writers: dict[SplitName, ShardWriter] = {"train": train, "val": val}
        indexes: dict[SplitName, DocumentWriter] = {"train": train_index, "val": val_index}
        if position is not None:
            documents, done = position.documents, position.characters
            for split, writer in writers.items():
                writer.restore(position.splits[split])
                indexes[split].restore(position.splits[split]["index"])
        before = documents
        rest = source.documents() if position is None else documents_after(source, position.documents, position.last)
        for batch, encoded in encoders.run(_batches(splitter, rest, _BATCH if workers == 1 else _BATCH_OF_WORKER)):
            for split, part in zip(SPLITS, encoded, strict=True):
                writers[split].add(part.ids, documents=part.documents, text_bytes=part.bytes)
                indexes[split].add(part.lengths, batch.names_of(split))
            documents, done = documents + batch.documents, done + batch.characters
            if journal.due:
                states = {str(split): {**writers[split].sync(), "index": indexes[split].sync()} for split in SPLITS}
                journal.write(Position(made_of, documents, batch.last, done, states))
            order.bar.note = f"{(documents - before) / max(time.monotonic() - begun, 1e-9):,.0f} documents/s"
            order.progress("tokenising", done, total)
        return Manifest(
            dtype=train.dtype,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.fingerprint,
            source=facts,
            val_fraction=order.val_fraction,
            train=replace(train.finish(), index=train_index.finish()),
            val=replace(val.finish(), index=val_index.finish()),
        )


@dataclass(frozen=True)
class _Batch:
    """Some documents one after the other, as pieces of the splits."""

    pieces: list[Piece]
    names: list[str]
    """Of the document of each piece."""
    documents: int
    characters: int
    last: str
    """Name of the last document."""

    def names_of(self, split: SplitName) -> list[str]:
        """Names of the documents that have some text in a split."""
        return [name for name, (where, text) in zip(self.names, self.pieces, strict=True) if where == split and text]


def _batches(splitter: _Splitter, documents: Iterable[Document], most: int) -> Iterator[_Batch]:
    pieces: list[Piece] = []
    names: list[str] = []
    count = size = 0
    name = ""
    for name, text in documents:
        pieces += splitter.split(text)
        names += [name] * (len(pieces) - len(names))
        count, size = count + 1, size + len(text)
        if size >= most:
            yield _Batch(pieces, names, count, size, name)
            pieces, names, count, size = [], [], 0, 0
    if pieces:
        yield _Batch(pieces, names, count, size, name)


def cache_folder(config: DataConfig) -> Path:
    """Where datasets made on the way are kept: data.cache, else $BARDLING_CACHE, else ~/.cache/bardling."""
    return Path(config.cache or os.environ.get("BARDLING_CACHE") or "~/.cache/bardling").expanduser()


def dataset_for(config: DataConfig, progress: Progress | None = None) -> TokenDataset:
    """The dataset that a configuration asks for: an existing one is opened, another is made once and kept in the cache.

    Raises:
        UserError: if it cannot be opened or made, or was made with another tokenizer than the one named by its path.
    """
    folder = Path(config.source).expanduser()
    if (folder / "manifest.json").is_file():
        dataset = open_dataset(folder)
        _check_tokenizer(dataset, config.tokenizer)
        return dataset
    check_tokenizer_spec(config.tokenizer)
    source = source_for(config.source)
    tokenizer = config.tokenizer
    if Path(tokenizer).exists() and tokenizer not in ("byte", "char"):
        tokenizer = build_tokenizer(tokenizer, ()).fingerprint
    key = json.dumps([FORMAT, _METHOD, source.identity(), tokenizer, config.val_fraction])
    label = (
        f"{source.name}-{config.tokenizer.replace(':', '')}" if tokenizer == config.tokenizer else f"{source.name}-{tokenizer}"
    )
    kept = cache_folder(config) / "datasets" / f"{label}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not kept.exists():
        try:
            return prepare(config.source, kept, config.tokenizer, val_fraction=config.val_fraction, progress=progress)
        except UserError as error:
            if not (kept / "manifest.json").is_file():  # else another process was quicker, and made the same
                if isinstance(error.__cause__, OSError) and str(cache_folder(config)) in str(error):
                    raise UserError(f"{error}; data.cache or $BARDLING_CACHE names another folder for datasets") from error
                raise
    try:
        return open_dataset(kept)
    except UserError as error:
        raise UserError(f"{error}: it was made from data.source, so remove {kept} and it is made again") from error


def _check_tokenizer(dataset: TokenDataset, spec: str) -> None:
    """Refuse a tokenizer that is named by its path and is not the one that made the dataset."""
    if spec in ("byte", "char") or not Path(spec).exists():
        return
    asked = build_tokenizer(spec, ())
    if asked.fingerprint != dataset.manifest.tokenizer:
        raise UserError(
            f"data.tokenizer = {spec!r}: has fingerprint {asked.fingerprint}, but {dataset.path} was made with "
            f"{dataset.manifest.tokenizer or 'none'}: leave data.tokenizer out, or prepare the source again with this tokenizer"
        )
