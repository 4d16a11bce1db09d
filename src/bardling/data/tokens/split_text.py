"""The text of a source or of a prepared dataset, divided into training and validation text: what `data check` reads.

A source is divided as `prepare` would divide it. The text of a dataset is decoded from its tokens; its documents are found by
the index, or by the end-of-text token.

Limits: tokens are read and decoded a million at a time, so that a tokenizer without bytes of its own (`other`) may join two
parts with another space, and in a dataset without an index, each part is a document; what a tokenizer does not keep
(spaces of a WordPiece) is missing in decoded text. Of conversations, only what was said is read, without the template.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bardling.config import DataConfig
from bardling.data.text.conversations import open_conversations
from bardling.data.text.findings import Findings
from bardling.data.text.named_datasets import source_for
from bardling.data.text.sources import FileSource, Source
from bardling.data.tokens.conversations import messages_of
from bardling.data.tokens.corpus import parts_of
from bardling.data.tokens.dataset import has_rows, is_tokenized, open_data, reading
from bardling.data.tokens.documents import Document, Documents
from bardling.data.tokens.manifest import SplitName
from bardling.data.tokens.parallel import SPLITS
from bardling.data.tokens.prepare import text_splitter
from bardling.data.tokens.shards import TokenDataset
from bardling.data.tokens.tokenizer import Ids, Tokenizer
from bardling.errors import UserError

_WINDOW = 1 << 20  # tokens looked up in the index at once
_LONG = 1 << 26  # bytes of a text file that is read in pieces


class SplitDocument(NamedTuple):
    """A document, or the part of it that belongs to a split; its pieces can be read once, before the next document."""

    name: str
    split: SplitName
    pieces: Iterable[str]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True)
class SplitText:
    """Documents that can be read again and again.

    Attributes:
        size: approximate bytes in all; 0 if unknown.
        cut: whether a single document is divided between the splits.
        dataset: the prepared tokens that the documents are decoded from; None for a source.
    """

    documents: Callable[[], Iterator[SplitDocument]]
    size: int
    cut: bool
    findings: Findings
    dataset: TokenDataset | None = None


def open_split_text(config: DataConfig) -> SplitText:
    """The documents of `data.source`, without reading all of them; a `UserError` if there are none."""
    if is_tokenized(config.source):
        return decoded_text(open_data(config))
    chat = has_rows(config)
    source: Source = (
        open_conversations(config.source, config.encoding) if chat else source_for(config.source, **reading(config))
    )
    if isinstance(source, FileSource) and source.size() > _LONG and source.is_one_text():
        return _long_text(source, config.val_fraction)
    several, split = text_splitter(source, config.val_fraction, config.source)

    def documents() -> Iterator[SplitDocument]:
        for name, text in source.documents():
            pieces: list[tuple[SplitName, str]] = (
                split(text) if several or not chat else [("train", text)]
            )  # a conversation is never cut
            yield from (SplitDocument(name, where, [_said(part) if chat else part]) for where, part in pieces if part)

    return SplitText(documents, source.size(), not several, getattr(source, "findings", Findings()))


def _long_text(source: FileSource, val_fraction: float) -> SplitText:
    """The two parts of a single document, which is never in memory as a whole."""
    length = sum(map(len, source.pieces()))
    cut = int(length * (1 - val_fraction))  # as `text_splitter` divides it
    bounds: tuple[tuple[SplitName, int, int], ...] = (("train", 0, cut), ("val", cut, length))

    def documents() -> Iterator[SplitDocument]:
        for split, begin, end in bounds:
            if begin < end:
                yield SplitDocument(source.label(source.files[0]), split, _between(source.pieces(), begin, end))

    return SplitText(documents, source.size(), True, source.findings)


def _between(pieces: Iterable[str], begin: int, end: int) -> Iterator[str]:
    """The characters from `begin` to `end`."""
    position = 0
    for piece in pieces:
        yield piece[max(0, begin - position) : max(0, end - position)]
        position += len(piece)


def _said(conversation: str) -> str:
    return "\n\n".join(message["content"] for message in messages_of(conversation))


def decoded_text(dataset: TokenDataset) -> SplitText:
    """The text of a dataset, which may be a mixture; a `UserError` if it has no tokenizer or no whole documents."""
    tokenizer, manifest = dataset.tokenizer, dataset.manifest
    if tokenizer is None:
        fault = "has token files without a tokenizer, so its text cannot be read"
        raise UserError(f"{dataset.path}: {fault}: use the text that it was made from")
    if manifest.source.get("packing"):
        texts = ", ".join(str(part.dataset.manifest.source.get("spec", "")) for part in parts_of(dataset, "train"))
        fault = "holds documents packed into rows, where long ones are in parts"
        raise UserError(f"{dataset.title}: {fault}: use the text that it was made from ({texts})")
    skipped = tokenizer.bytes_per_token() == 0

    def documents() -> Iterator[SplitDocument]:
        for name in SPLITS:
            for part in parts_of(dataset, name):
                split, index, position = part.dataset.split(name), Documents(part.dataset, name), 0
                while position < len(split):
                    for found in index.at(position, min(_WINDOW, len(split) - position)):
                        windows = range(position, found.end, _WINDOW)
                        parts = (split.read(begin, min(_WINDOW, found.end - begin)) for begin in windows)
                        position = found.end
                        pieces: Iterable[str] = decode_pieces(tokenizer, (ids[~skipped[ids]] for ids in parts))
                        if len(windows) == 1:
                            pieces = list(filter(None, pieces))
                        if pieces:
                            yield SplitDocument(_label(part.name, name, found), name, pieces)

    size = sum(manifest.split(name).bytes or 2 * manifest.split(name).tokens for name in SPLITS)
    return SplitText(documents, size, manifest.train.documents == 1, Findings(), dataset)


def _label(source: str, split: SplitName, found: Document) -> str:
    number = f"at token {found.begin:,}" if found.number is None else f"{found.number:,}"
    name = found.name or f"{split} document {number}"
    return f"{source}: {name}" if source else name


def decode_pieces(tokenizer: Tokenizer, parts: Iterable[Ids]) -> Iterator[str]:
    """`Tokenizer.decode` for the parts of a long text: 20 MB/s."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for ids in parts:
        if tokenizer.kind == "other":
            yield tokenizer.decode(ids)
            continue
        table = {index: tokenizer.token_bytes(index) for index in np.unique(ids).tolist()}
        yield decoder.decode(b"".join(map(table.__getitem__, ids.tolist())))
    yield decoder.decode(b"", True)
