"""Writes conversations as a dataset of packed rows: tokens, marks and an index of conversations for each split."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bardling.data.text.findings import Findings
from bardling.data.text.sources import Document
from bardling.data.tokens.conversations import ConversationEncoder, Marked, Packer, Rows, messages_of, padding_id
from bardling.data.tokens.documents import DocumentWriter
from bardling.data.tokens.manifest import SplitInfo, SplitName
from bardling.data.tokens.shards import MARKS, ShardWriter
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError


@dataclass(frozen=True)
class RowWriter:
    """The files of one split in a folder."""

    tokens: ShardWriter
    marks: ShardWriter
    index: DocumentWriter

    def add(self, row: list[Marked]) -> None:
        """Append a full row of conversations."""
        self.tokens.add(np.concatenate([part.ids for part in row]), documents=len(row))
        self.marks.add(np.concatenate([part.marks for part in row]))
        self.index.add(np.array([len(part.ids) for part in row], np.int64), [part.name for part in row])

    def finish(self) -> SplitInfo:
        return replace(self.tokens.finish(), index=self.index.finish(), marks=self.marks.finish().files)


def write_rows(
    documents: Iterable[Document],
    split_of: Callable[[str], SplitName],
    tokenizer: Tokenizer,
    folder: Path,
    rows: Rows,
    *,
    shard_tokens: int,
    findings: Findings,
    progress: Callable[[int], None],
) -> tuple[SplitInfo, SplitInfo]:
    """Write the conversations of a source to `folder`; return the training and the validation split.

    Args:
        split_of: the split of a document, by its text.
        findings: where conversations that are cut or left out are counted.
        progress: called with the characters done.

    Raises:
        UserError: no conversation of a split has an answer that fits.
    """
    names: tuple[SplitName, SplitName] = ("train", "val")
    shard_tokens = max(1, shard_tokens // rows.length) * rows.length
    with ExitStack() as stack:
        encoder = stack.enter_context(ConversationEncoder(tokenizer))
        writers = {
            name: RowWriter(
                stack.enter_context(ShardWriter(folder, name, tokenizer.vocab_size, shard_tokens)),
                stack.enter_context(ShardWriter(folder, f"marks-{name}", MARKS, shard_tokens)),
                stack.enter_context(DocumentWriter(folder, name)),
            )
            for name in names
        }
        packers = {name: Packer(rows, padding_id(tokenizer)) for name in names}
        done, seen = 0, set[SplitName]()
        for name, text in documents:
            split = split_of(text)
            seen.add(split)
            for row in _packed(encoder, packers[split], name, text, findings):
                writers[split].add(row)
            done += len(text)
            progress(done)
        for split in names:
            for row in packers[split].finish():
                writers[split].add(row)
        train, val = (writers[name].finish() for name in names)
    for name, found in zip(names, (train, val), strict=True):
        if not found.tokens and name in seen:
            fault = f"no conversation of the {'training' if name == 'train' else 'validation'} split has an answer in a row"
            raise UserError(f"{fault} of {rows.length} tokens: raise model.block_size, or add conversations")
    return train, val


def _packed(encoder: ConversationEncoder, packer: Packer, name: str, text: str, findings: Findings) -> Iterator[list[Marked]]:
    """The rows that a conversation completes. A conversation that the template refuses is left out."""
    before, messages = (packer.cut, packer.dropped, packer.without_answer), messages_of(text)
    try:
        marked = encoder.encode(name, messages)
    except UserError as error:
        if "the chat template refuses the messages" not in str(error):
            raise
        findings.left_out("conversation that the chat template refuses", name)
        return
    findings.kept("control token written in a turn, which becomes that token", name, encoder.control_tokens_in(messages))
    yield from packer.add(marked)
    if packer.cut > before[0]:
        findings.kept("conversation cut at the model's context", name, 1)
    if packer.dropped > before[1]:
        findings.left_out("conversation longer than the model's context", name)
    if packer.without_answer > before[2]:
        findings.left_out("conversation without a visible answer", name)
