"""Packs the documents of a prepared dataset into rows of equal length (`data.packing = "documents"`).

Each document becomes a piece: the token that begins documents (its own beginning token, or the end-of-text token, which is then
only an input), and its tokens. Pieces are packed by best fit (`conversations.Packer`), so a row holds whole documents, and its
marks keep them apart. A document longer than a row is cut into rows; each of the later pieces begins with the last token of the
piece before it, so that every token is a target exactly once. (H. Ding et al. 2024, "Fewer Truncations Improve Language
Modeling", arXiv:2404.10830.)

Tokens are read from the dataset and written once more, with two bytes of marks each: nothing is tokenized again. Limits: the
dataset needs a document index, and more than one document.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bardling.data.tokens.conversations import ANSWER, BEGIN, Ids, Marked, Packer, Rows, padding_id
from bardling.data.tokens.documents import Documents, DocumentWriter, begins_documents
from bardling.data.tokens.journal import working_on
from bardling.data.tokens.manifest import Manifest, SplitInfo, SplitName, write_manifest
from bardling.data.tokens.packed_rows import RowWriter
from bardling.data.tokens.shards import MARKS, SHARD_TOKENS, ShardWriter, TokenDataset, open_dataset
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error, sync_folder
from bardling.monitor.progress import ProgressBar

PACKING = "documents"
SPLITS: tuple[SplitName, ...] = ("train", "val")
_READ = 1 << 22  # tokens


def pack_documents(dataset: TokenDataset, out: Path, block_size: int) -> TokenDataset:
    """The documents of `dataset` in rows for a context of `block_size`, in the folder `out`, which is made if it is missing.

    Raises:
        UserError: the dataset has no separate documents, or `out` cannot be written.
    """
    tokenizer = dataset.tokenizer
    start = None if tokenizer is None else begins_documents(dataset, tokenizer)
    fault = ""
    if tokenizer is None or start is None:
        fault = "has no end-of-text token to separate documents"
    elif max(dataset.manifest.split(name).documents for name in SPLITS) < 2:
        fault = "has fewer than two documents in each split"
    elif not all(Documents(dataset, name).named for name in SPLITS):
        fault = "has no document index (prepare the text again)"
    if tokenizer is None or start is None or fault:
        raise UserError(f"data.packing = 'documents': {dataset.path} {fault}: use --data.packing concat")
    own = start in tokenizer.interface.start[:1]
    packer = _Packing(dataset, tokenizer, Rows(block_size + 1), None if own else start)
    try:
        with os_error_as_user_error(out, "pack the documents"):
            out.parent.mkdir(parents=True, exist_ok=True)
            with working_on(out) as work:
                try:
                    _empty(work)  # of what a killed attempt has left
                    manifest = packer.write(work)
                    tokenizer.save(work)
                    write_manifest(work, manifest)
                    sync_folder(work)
                    work.rename(out)
                except BaseException:
                    _empty(work)
                    raise
                (out / "lock").unlink(missing_ok=True)
    except UserError:
        if not (out / "manifest.json").is_file():  # else another process has just made it
            raise
    return open_dataset(out)


def _empty(work: Path) -> None:
    for path in work.iterdir():
        if path.name != "lock":
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Packing:
    dataset: TokenDataset
    tokenizer: Tokenizer
    rows: Rows
    start: int | None  # the token to put before each document; None if documents have one of their own

    def write(self, folder: Path) -> Manifest:
        """Write the rows of both splits."""
        facts, infos = dict[str, Any](), dict[str, SplitInfo]()
        with ProgressBar("packing documents", unit="tokens") as bar:
            for name in SPLITS:
                infos[name], facts[name] = self._write_split(name, folder, bar)
        manifest = self.dataset.manifest
        source = {**manifest.source, "packing": PACKING, "packed": facts}
        return replace(manifest, source=source, row=self.rows.length, train=infos["train"], val=infos["val"])

    def _write_split(self, name: SplitName, folder: Path, bar: ProgressBar) -> tuple[SplitInfo, dict[str, int]]:
        length, before = self.rows.length, self.dataset.manifest.split(name)
        shard_tokens = max(1, SHARD_TOKENS // length) * length
        vocab_size = self.dataset.manifest.vocab_size
        packer, targets, cut = Packer(self.rows, padding_id(self.tokenizer)), 0, 0
        with ExitStack() as stack:
            writer = RowWriter(
                stack.enter_context(ShardWriter(folder, name, vocab_size, shard_tokens)),
                stack.enter_context(ShardWriter(folder, f"marks-{name}", MARKS, shard_tokens)),
                stack.enter_context(DocumentWriter(folder, name)),
            )
            done = 0
            for document, ids in _documents(self.dataset, name):
                done += len(ids)
                pieces = self._pieces(document, ids)
                cut += len(pieces) > 1
                targets += sum(len(piece.ids) - 1 for piece in pieces)
                for piece in pieces:
                    for row in packer.add(piece):
                        writer.add(row)
                bar(done, before.tokens)
            for row in packer.finish():
                writer.add(row)
            info = replace(writer.finish(), documents=before.documents, bytes=before.bytes)
        return info, {"rows": info.tokens // length, "targets": targets, "cut": cut}

    def _pieces(self, name: str, ids: Ids) -> list[Marked]:
        """A document as pieces that fit into a row."""
        if self.start is not None:
            ids = np.concatenate([[self.start], ids])
        step = self.rows.length - 1
        parts = [ids[begin : begin + step + 1] for begin in range(0, max(1, len(ids) - 1), step)]
        return [Marked(name, part, np.array([BEGIN] + [ANSWER] * (len(part) - 1), np.int64)) for part in parts]


def _documents(dataset: TokenDataset, name: SplitName) -> Iterator[tuple[str, Ids]]:
    """The name and the tokens of each document of a split, in order."""
    split, index, begin = dataset.split(name), Documents(dataset, name), 0
    while begin < len(split):
        found = [document for document in index.at(begin, min(_READ, len(split) - begin)) if document.end > begin]
        ids = split.read(begin, found[-1].end - begin)
        for document in found:
            yield document.name, ids[document.begin - begin : document.end - begin]
        begin = found[-1].end


def describe_packing(manifest: Manifest) -> str:
    """How the training documents were packed, and what that wastes; empty for other datasets."""
    facts = manifest.source.get("packed")
    train = facts.get("train") if isinstance(facts, dict) else None
    if not isinstance(train, dict) or not train.get("rows") or not manifest.row:
        return ""
    rows, block_size = int(train["rows"]), manifest.row - 1
    waste = 1 - int(train["targets"]) / (rows * block_size)
    packed = f"{manifest.train.documents:,} documents packed into {rows:,} rows of {block_size:,} tokens"
    return f"{packed}, {int(train['cut']):,} of them cut because they are longer; {waste:.2%} of the positions are not learned"
