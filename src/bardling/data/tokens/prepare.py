"""Prepares a dataset from a source: split, tokenize, write.

Which text is for validation is decided by rule 2 (`SPLIT_RULE`), and the manifest records the rule:

- A single document is cut at character int(n * (1 - val_fraction)), as in nanoGPT.
- Of several, whole ones are held out, chosen by a hash of their content, so copies of a text are always in the same split.
- Of at least 100, those with a hash below val_fraction (or else the one with the lowest): adding files moves no document.
- Of fewer, in the order of their hashes, those that fit into val_fraction of all characters. If less than half of that is
  filled, the shortest of the others is added, if a third of the text remains for training or none was held out before. Of two
  documents, that is the shorter one.

Rule 1, which is kept for runs that started with it, differs for fewer than 100 documents: the last part of each is held out,
from a nearby line break before the cut, if any.

Rule 0 holds out everything, for a text that is only evaluated; rule -1 nothing, if validation has a text of its own.

Several documents are each followed by the end-of-text token; a single one has nothing to separate and gets none. What the
tokenizer's post-processor puts before a text (often a beginning token) begins each document in each split.
A BPE is trained on the training split only; the vocabulary of 'char' covers both, because missing characters cannot be encoded.

A dataset folder appears complete or not at all: everything is written to a folder beside it, which is then renamed. Long
preparations keep a journal there and resume after an interruption; otherwise nothing is left behind.
"""

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bardling.data.text.conversations import open_conversations
from bardling.data.text.findings import Findings
from bardling.data.text.named_datasets import documents_after, source_for
from bardling.data.text.opening import without_secrets
from bardling.data.text.parts import Shard, part_of
from bardling.data.text.sources import Document, Source
from bardling.data.tokens.conversations import Rows
from bardling.data.tokens.documents import DocumentWriter
from bardling.data.tokens.fast_encoding import EncodersDiffer, has_fast
from bardling.data.tokens.journal import Journal, Position, becoming, empty, refuse_existing, working_on
from bardling.data.tokens.manifest import Manifest, SplitName, token_dtype, write_manifest
from bardling.data.tokens.packed_rows import write_rows
from bardling.data.tokens.parallel import MOST_WORKERS, SPLITS, Encoders, Piece, TextBatch, default_workers, utf8
from bardling.data.tokens.shards import SHARD_TOKENS, ShardWriter, TokenDataset, open_dataset
from bardling.data.tokens.tokenizer import Tokenizer, build_tokenizer, check_tokenizer_spec, load_tokenizer
from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error
from bardling.files.digests import json_sha256
from bardling.files.streams import tell
from bardling.monitor.progress import ProgressBar

METHOD = 2  # raise it if the same source starts to give other tokens, so that cached datasets are prepared again
SPLIT_RULE = 2
EVALUATION_ONLY = 0
TRAINING_ONLY = -1
_MANY = 100  # number of documents from which whole documents are held out
_BATCH = 4 << 20  # characters tokenized at once
_BATCH_OF_WORKER = 1 << 20  # the same for one of several processes

Progress = Callable[[str, int, int], None]  # called with (current activity, characters done, approximate total)


def _number(text: str) -> int:
    """A uniform number below 2^64 that depends only on the text."""
    return _number_of(text.encode("utf-8", "surrogatepass"))


def _number_of(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def held_out(text: str, val_fraction: float) -> bool:
    """Whether a document among many belongs to the validation split; depends only on its content."""
    return _number(text) < val_fraction * 2.0**64


class _Splitter:
    """Divides the documents of a source into pieces of the two splits, deterministically."""

    def __init__(self, source: Source, val_fraction: float, rule: int, spec: str) -> None:
        self._val_fraction = val_fraction
        limit, low, high = val_fraction * 2.0**64, 1 << 64, -1
        count, characters = 0, dict[int, int]()  # of each distinct text, while there are few
        for count, document in enumerate(source.documents(), 1):
            if rule in (EVALUATION_ONLY, TRAINING_ONLY) and count > 1:
                break
            number = _number(document.text)
            low, high = min(low, number), max(high, number)
            if count < _MANY:
                characters[number] = characters.get(number, 0) + len(document.text)
            elif low < limit <= high:
                break
        self.several = count > 1
        self.description = "the last part of each document" if self.several else "the last part of the document"
        self._held_out: Callable[[int], bool] | None = None  # of several documents, by their numbers; None: cut each
        if rule == EVALUATION_ONLY:
            self._held_out, self.description = lambda number: True, "everything, for evaluation"
        elif rule == TRAINING_ONLY:
            self._held_out, self.description = lambda number: False, "nothing: validation uses another text"
        elif count >= _MANY and (low < limit <= high or (rule > 1 and low < high)):
            between = min(max(limit, low + 1), high)
            self._held_out, self.description = lambda number: number < between, "whole documents by hash"
        elif self.several and rule > 1:
            if low == high:
                fault = f"all {count} documents are the same text, so none can be held out for validation"
                raise UserError(f"data.source = {spec!r}: {fault}: use a single copy of it, or add other documents")
            self._held_out = _some(characters, val_fraction).__contains__
            self.description = f"whole documents, of {count}, by hash and size"

    def pieces(self, text: str) -> list[Piece]:
        """The pieces of `split` in UTF-8, with lone surrogates replaced by U+FFFD."""
        if self._held_out is None:
            return [(split, utf8(part)) for split, part in self.split(text)]
        data = utf8(text)
        same = len(data) == len(text) or b"\xef\xbf\xbd" not in data  # without a U+FFFD, no surrogate has been replaced
        return [("val" if self._held_out(_number_of(data) if same else _number(text)) else "train", data)]

    def split(self, text: str) -> list[tuple[SplitName, str]]:
        if self._held_out is not None:
            return [("val" if self._held_out(_number(text)) else "train", text)]
        cut = int(len(text) * (1 - self._val_fraction))
        if self.several:  # move back to the beginning of a line, if there is one within 1% of the text
            reach = max(200, len(text) // 100)
            cut = text.rfind("\n", max(0, cut - reach), cut) + 1 or cut
        return [("train", text[:cut]), ("val", text[cut:])]


def text_splitter(source: Source, val_fraction: float, spec: str) -> tuple[bool, Callable[[str], list[tuple[SplitName, str]]]]:
    """Whether a source has several documents, and the function that divides each into pieces of the splits, as `prepare`."""
    splitter = _Splitter(source, val_fraction, SPLIT_RULE, spec)
    return splitter.several, splitter.split


def _some(characters: Mapping[int, int], val_fraction: float) -> set[int]:
    """Which of a few texts to hold out, by rule 2: numbers of texts, given the characters of each."""
    total = sum(characters.values())
    chosen, size = set[int](), 0
    for number in sorted(characters):
        if size + characters[number] <= val_fraction * total:
            chosen.add(number)
            size += characters[number]
    if 2 * size < val_fraction * total:
        added, number = min((characters[number], number) for number in characters.keys() - chosen)
        if not chosen or 3 * (total - size - added) >= total:
            chosen.add(number)
    return chosen


def prepare(
    source_spec: str,
    out: Path | str,
    tokenizer_spec: str,
    *,
    val_fraction: float = 0.05,
    encoding: str = "",
    field: str = "",
    separator: str = "",
    stream: bool = False,
    split_rule: int = SPLIT_RULE,
    progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    rows: Rows | None = None,
    shard: Shard | None = None,
) -> TokenDataset:
    """Create the dataset folder `out`, which must not exist, resuming an earlier attempt that was interrupted.

    For the specs, see `named_datasets.source_for` and `tokenizer.build_tokenizer`. A fraction of the text, between 0 and 1, is
    for validation, chosen by `split_rule`. `encoding`, `field`, `separator` and `stream` are those of `source_for`. A file
    has at most `shard_tokens` tokens. Without `progress`, standard error shows it after a few seconds. The result does not
    depend on the number of processes that tokenize, `workers`; None chooses. With `rows`, the source holds conversations
    (`conversations.py`). With `shard`, only that part of the source is prepared, for `merge.py`.
    """
    out = Path(out)
    if not 0.0 < val_fraction < 1.0:
        raise UserError(f"data.val_fraction = {val_fraction!r}: must be between 0 and 1")
    if workers is not None and not 1 <= workers <= MOST_WORKERS:
        raise UserError(f"workers = {workers}: must be at least 1 and at most {MOST_WORKERS}")
    refuse_existing(out)
    check_tokenizer_spec(tokenizer_spec)
    if shard is not None and (tokenizer_spec == "char" or tokenizer_spec.startswith("bpe:")):
        fault = "each part would get a vocabulary of its own"
        remedy = "use byte, gpt2 or a tokenizer.json, such as that of a dataset that was prepared from some of the text"
        raise UserError(f"--shard {shard} --tokenizer {tokenizer_spec}: {fault}: {remedy}")
    if rows is None:
        source = source_for(source_spec, encoding, field, separator, stream=stream)
    else:
        source = open_conversations(source_spec, encoding)
    source_spec = without_secrets(source_spec)
    with ProgressBar(unit="bytes") as bar:
        told = progress or bar.update
        job = _Job(source, source_spec, tokenizer_spec, val_fraction, split_rule, shard_tokens, workers, told, bar, rows, shard)
        with os_error_as_user_error(out, "prepare the dataset"):
            out.parent.mkdir(parents=True, exist_ok=True)
            with working_on(out) as work:
                tokenizer = _build(job, out, work)
    dataset = open_dataset(out)
    dataset.tokenizer = tokenizer  # loading it again takes as long as tokenizing 50 MB
    return dataset


@dataclass(frozen=True)
class _Job:
    source: Source
    source_spec: str
    tokenizer_spec: str
    val_fraction: float
    split_rule: int
    shard_tokens: int
    workers: int | None
    progress: Progress
    bar: ProgressBar
    rows: Rows | None
    shard: Shard | None


def _build(job: _Job, out: Path, work: Path) -> Tokenizer:
    """Write the dataset into the work folder and rename it; returns its tokenizer."""
    journal = Journal(work)
    with becoming(out, work):
        splitter = _Splitter(job.source, job.val_fraction, job.split_rule, job.source_spec)
        method = (METHOD, "indexed")  # attempts of versions that wrote no index are not resumed
        settings = (job.tokenizer_spec, job.val_fraction, job.split_rule, job.shard_tokens, splitter.description)
        made_of = json_sha256([method, job.source.identity(), *settings, *((str(job.shard),) if job.shard else ())])
        if position := journal.read(made_of):
            tokenizer = load_tokenizer(work)
        else:
            empty(work)
            tokenizer = _tokenizer(job, splitter)
            tokenizer.save(work)
            position = Position(made_of, documents=0, last="", characters=0, splits={})
        if job.rows is not None:
            manifest = _write_conversations(job, job.rows, splitter, tokenizer, work)
        else:
            try:
                manifest = _write(job, splitter, tokenizer, work, journal, position)
            except EncodersDiffer as difference:  # what is written may be wrong
                tell(f"gigatoken gives other tokens than tokenizers at {str(difference)[:60]!r}: starting again without it")
                empty(work)
                tokenizer.save(work)
                position = Position(made_of, documents=0, last="", characters=0, splits={}, only_library=True)
                manifest = _write(job, splitter, tokenizer, work, journal, position)
        write_manifest(work, manifest)
    return tokenizer


def _tokenizer(job: _Job, splitter: _Splitter) -> Tokenizer:
    def training_texts() -> Iterator[str]:
        done, total = 0, job.source.size()
        for document in job.source.documents():
            for split, text in splitter.split(document.text):
                done += len(text)
                job.progress("training the tokenizer", done, total)
                if split == "train":
                    yield text

    both_splits = job.tokenizer_spec == "char"
    texts = (document.text for document in job.source.documents()) if both_splits else training_texts()
    return build_tokenizer(job.tokenizer_spec, texts)


def _write(job: _Job, splitter: _Splitter, tokenizer: Tokenizer, work: Path, journal: Journal, position: Position) -> Manifest:
    """Tokenize the documents after `position`."""
    end = [tokenizer.eot_id] if splitter.several and tokenizer.eot_id is not None else []
    origin: dict[str, Any] = {"spec": job.source_spec, "name": job.source.name, "identity": job.source.identity()}
    origin |= {"held_out": splitter.description, "split_rule": job.split_rule}
    if job.shard is not None and not splitter.several:
        raise UserError(f"data.source = {job.source_spec!r}: is a single document, which has no parts: omit --shard")
    source = job.source if job.shard is None else part_of(job.source, job.shard)
    total, vocab_size = source.size(), tokenizer.vocab_size
    fast = not position.only_library and has_fast(tokenizer)
    workers = default_workers(total, tokenizer.kind, fast=fast) if job.workers is None else job.workers
    processes = workers if workers > 1 or job.workers is None else 0  # 1 asks for no other process
    documents, done, started, names = position.documents, position.characters, time.monotonic(), Counter(position.names)
    with contextlib.ExitStack() as stack:
        shards = {name: stack.enter_context(ShardWriter(work, name, vocab_size, job.shard_tokens)) for name in SPLITS}
        indexes = {name: stack.enter_context(DocumentWriter(work, name)) for name in SPLITS}
        encoders = stack.enter_context(Encoders(tokenizer, work, end, processes, allow_fast=fast))
        for split, state in position.splits.items():
            shards[split].restore(state)
            indexes[split].restore(state["index"])
        rest = documents_after(source, documents, position.last) if documents else source.documents()
        for batch, encoded in encoders.run(_batches(splitter, rest, _BATCH_OF_WORKER if processes else _BATCH)):
            for split, part in zip(SPLITS, encoded, strict=True):
                shards[split].add(part.ids, documents=len(part.lengths), text_bytes=part.bytes)
                indexes[split].add(part.lengths, batch.names_of(split))
                names.update(part.names)
            documents, done = documents + batch.documents, done + batch.characters
            if journal.due:
                states = {split: {**shards[split].sync(), "index": indexes[split].sync()} for split in SPLITS}
                journal.write(
                    replace(
                        position, documents=documents, last=batch.names[-1], characters=done, splits=states, names=dict(names)
                    )
                )
            speed = (documents - position.documents) / max(time.monotonic() - started, 1e-9)
            job.bar.note = f"{speed:,.0f} documents/s"
            job.progress("tokenizing", done, total)
        origin |= getattr(source, "findings", Findings()).facts()
        if job.shard is not None:
            origin["part"] = {**asdict(job.shard), "shard_tokens": job.shard_tokens, "tokenizer": tokenizer.data_key}
        for message in _notes(tokenizer, names, separated=bool(end) or not splitter.several):
            tell(message)
        train, val = (replace(shards[split].finish(), index=indexes[split].finish()) for split in SPLITS)
    return Manifest(token_dtype(vocab_size), vocab_size, tokenizer.fingerprint, origin, job.val_fraction, train, val)


def _write_conversations(job: _Job, rows: Rows, splitter: _Splitter, tokenizer: Tokenizer, work: Path) -> Manifest:
    if not splitter.several:
        remedy = "add more, since whole conversations are held out for validation"
        raise UserError(f"data.source = {job.source_spec!r}: contains a single conversation: {remedy}")
    total, source = job.source.size(), job.source
    origin: dict[str, Any] = {"spec": job.source_spec, "name": source.name, "identity": source.identity()}
    origin |= {"held_out": splitter.description, "split_rule": job.split_rule, "too_long": rows.too_long}
    findings = getattr(source, "findings", Findings())
    train, val = write_rows(
        source.documents(),
        lambda text: splitter.split(text)[0][0],
        tokenizer,
        work,
        rows,
        shard_tokens=job.shard_tokens,
        findings=findings,
        progress=lambda done: job.progress("tokenizing", done, total),
    )
    origin |= findings.facts()
    size = tokenizer.vocab_size
    return Manifest(token_dtype(size), size, tokenizer.fingerprint, origin, job.val_fraction, train, val, row=rows.length)


def _notes(tokenizer: Tokenizer, names: Counter[str], *, separated: bool) -> Iterator[str]:
    """What the user should know about the text and its tokens, one sentence each."""
    if names:
        found = ", ".join(f"{name} ({count:,})" for name, count in names.most_common(5))
        kept = "stay ordinary text (data.separator divides text files at one)"
        yield f"the text contains names of control tokens, which {kept}: {found}"
    if not separated:
        fault = "has no end-of-text token, so documents follow each other without a separator"
        remedy = "to separate them, name one of its tokens as eos_token in a tokenizer_config.json beside it"
        yield f"{tokenizer.name}: {fault}: {remedy}"


def _batches(splitter: _Splitter, documents: Iterable[Document], batch_size: int) -> Iterator[TextBatch]:
    pieces: list[Piece] = []
    names: list[str] = []
    count = size = 0
    for name, text in documents:
        pieces += splitter.pieces(text)
        names += [name] * (len(pieces) - len(names))
        count, size = count + 1, size + len(text)
        if size >= batch_size:
            yield TextBatch(pieces, names, count, size)
            pieces, names, count, size = [], [], 0, 0
    if pieces:
        yield TextBatch(pieces, names, count, size)
