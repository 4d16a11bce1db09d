"""From a source to a dataset of tokens: split, tokenise, write.

The held-out split is chosen so that it stays put. Where there are many documents (at least 100, some of which it takes), whole
documents are held out by a hash of their content: copies of a text never stand on both sides, and adding files never moves
another. Otherwise the last part of each document is held out: of a single one from character int(n * (1 - val_fraction)) on, as
in nanoGPT; of one among several from the line break near that place, if there is one close by.

Where there are several documents, each is followed by the end-of-text token, in each split. A source of one document has
nothing to separate and gets none. A BPE is trained on the training split only; the characters of 'char' are those of both, for
one that is missing could not be encoded.

A dataset folder appears whole or not at all: everything is written into a folder beside it, which is then renamed.
"""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bardling.config import DataConfig
from bardling.data.files import sync_folder, told_plainly
from bardling.data.manifest import FORMAT, Manifest, SplitName, write_manifest
from bardling.data.shards import SHARD_TOKENS, ShardWriter, TokenDataset, open_dataset
from bardling.data.sources import Source, open_source
from bardling.data.tokenizer import Tokenizer, build_tokenizer, check_tokenizer_spec
from bardling.errors import UserError

MANY = 100
"""Documents from which on whole ones are held out."""
_BATCH = 4 << 20  # characters that are tokenised at a time
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
            if self.by_document:
                yield ("val" if held_out(document.text, self._val_fraction) else "train"), document.text
                continue
            cut = _cut(document.text, self._val_fraction, at_line=self.several)
            yield "train", document.text[:cut]
            yield "val", document.text[cut:]

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
) -> TokenDataset:
    """Make a dataset folder.

    Args:
        source_spec: as in `bardling.data.sources.open_source`.
        out: the folder to make; it must not exist.
        tokenizer_spec: as in `bardling.data.tokenizer.build_tokenizer`.
        val_fraction: part of the text that is held out, between 0 and 1.
        progress: told how far it is; unset shows a bar on a terminal when it takes more than two seconds.
        shard_tokens: tokens in one file at most.

    Raises:
        UserError: if the folder exists, the source or tokenizer cannot be used, or the disk refuses. Nothing is left at `out`.
    """
    out = Path(out)
    if not 0.0 < val_fraction < 1.0:
        raise UserError(f"data.val_fraction = {val_fraction!r}: must be between 0 and 1")
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already: choose another folder, or remove it first")
    check_tokenizer_spec(tokenizer_spec)
    source = open_source(source_spec)
    if progress is not None:
        _make(source, source_spec, out, tokenizer_spec, val_fraction, progress, shard_tokens)
    else:
        from bardling.data.progress import Bar

        with Bar() as bar:
            _make(source, source_spec, out, tokenizer_spec, val_fraction, bar, shard_tokens)
    return open_dataset(out)


def _make(
    source: Source, source_spec: str, out: Path, tokenizer_spec: str, val_fraction: float, progress: Progress, shard_tokens: int
) -> None:
    """Write the dataset beside `out` and rename it there."""
    with told_plainly(out, "make the dataset"):
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        try:
            beside.chmod(0o755)  # mkdtemp's is for the owner alone
            splitter = _Splitter(source, val_fraction)
            total = source.size()

            def texts(split: SplitName | None, doing: str) -> Iterator[str]:
                done = 0
                for where, text in splitter.pieces():
                    done += len(text)
                    progress(doing, done, total)
                    if split is None or where == split:
                        yield text

            if tokenizer_spec == "char":
                documents = (document.text for document in source.documents())
                tokenizer = build_tokenizer(tokenizer_spec, documents)
            else:
                tokenizer = build_tokenizer(tokenizer_spec, texts("train", "training the tokenizer"))
            manifest = _write(splitter, source, source_spec, tokenizer, beside, val_fraction, progress, shard_tokens)
            tokenizer.save(beside)
            write_manifest(beside, manifest)
            sync_folder(beside)
            beside.rename(out)  # refused by the system if someone else has made a folder with files there meanwhile
            sync_folder(out.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _write(
    splitter: _Splitter,
    source: Source,
    source_spec: str,
    tokenizer: Tokenizer,
    folder: Path,
    val_fraction: float,
    progress: Progress,
    shard_tokens: int,
) -> Manifest:
    end = [tokenizer.eot_id] if splitter.several and tokenizer.eot_id is not None else []
    facts = {"spec": source_spec, "name": source.name, "identity": source.identity(), "held_out": splitter.describe()}
    total, done = source.size(), 0
    with (
        ShardWriter(folder, "train", tokenizer.vocab_size, shard_tokens) as train,
        ShardWriter(folder, "val", tokenizer.vocab_size, shard_tokens) as val,
    ):
        for batch in _batches(splitter.pieces()):
            for (split, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
                if text:
                    writer = train if split == "train" else val
                    writer.add(np.concatenate([ids, np.array(end, np.int64)]), text_bytes=len(text.encode("utf-8", "replace")))
                done += len(text)
            progress("tokenising", done, total)
        return Manifest(
            dtype=train.dtype,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.fingerprint,
            source=facts,
            val_fraction=val_fraction,
            train=train.finish(),
            val=val.finish(),
        )


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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
    source = open_source(config.source)
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
