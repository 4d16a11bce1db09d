from dataclasses import dataclass
from typing import Literal

from bardling.config.checks import expand_paths, require


@dataclass(frozen=True)
class DataConfig:
    """The training text and its tokenizer."""

    source: str = "stdlib"
    """'stdlib' (Python's standard library sources), 'shakespeare', 'openwebtext', 'fineweb-edu', a dataset on the Hugging Face
    Hub as hf:NAME[:CONFIG][:SPLIT][:FIELD], a file (text, JSON, CSV, Parquet, Arrow, tar or zip, compressed or not) or
    FILE:FIELD, a folder, a glob, a URL such as s3://BUCKET/FILE, a folder of prepared shards, or token files of nanoGPT,
    nano-gpt or llm.c."""
    tokenizer: str = "byte"
    """'byte', 'char', 'bpe:SIZE' (trained on the source), 'gpt2', or the path of a tokenizer.json. With model.init, the default
    is that model's tokenizer."""
    val_fraction: float = 0.05
    """Fraction of the text held out for validation."""
    document_mask: bool = False
    """Limit attention to the current document, in training and validation; documents end at the end-of-text token."""
    cache: str = ""
    """Folder for datasets prepared from a source; empty: $BARDLING_CACHE, or ~/.cache/bardling."""
    encoding: str = ""
    """Encoding of text files without a byte order mark, such as 'cp1252'; empty: UTF-8."""
    field: str = ""
    """Field of each row (JSON, CSV, Parquet, Arrow) that contains the text, or a template such as '{title}\\n\\n{body}'; empty:
    'text', or the FIELD of FILE:FIELD."""
    separator: str = ""
    """What separates the documents of a text file, such as '<|endoftext|>' or '\\n\\n'; empty: each file is one document."""
    stream: bool = False
    """Read a dataset on the Hugging Face Hub over the network each time, and keep no copy of its files on disk."""

    format: Literal["auto", "text", "chat"] = "auto"
    """What the source holds: text, or conversations, of which a model learns the answers; auto: conversations if it is a JSON
    file whose rows have messages, conversations, instruction and output, or prompt and completion, and no text."""
    chat_template: Literal["", "chatml"] = ""
    """Chat format of a model that has none: 'chatml' adds its tokens and template; empty: the model's own."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What happens to a conversation longer than model.block_size: cut at its end, or left out."""

    def __post_init__(self) -> None:
        expand_paths(self, "source", "tokenizer", "cache")
        require(bool(self.source), "data.source", self.source, "must name a source")
        rule = "the char tokenizer has no end-of-text token to separate documents; disable it or choose another data.tokenizer"
        require(not (self.document_mask and self.tokenizer == "char"), "data.document_mask", self.document_mask, rule)
        require(
            _is_encoding(self.encoding), "data.encoding", self.encoding, "unknown encoding; use a name such as utf-8 or cp1252"
        )
        require(0.0 < self.val_fraction < 1.0, "data.val_fraction", self.val_fraction, "must be between 0 and 1")


def _is_encoding(name: str) -> bool:
    """Whether Python knows an encoding of text of this name; an empty one is UTF-8."""
    try:
        return not name or isinstance(b" ".decode(name, "ignore"), str)
    except (LookupError, ValueError, UnicodeError):  # also for codecs that do not give text
        return False
