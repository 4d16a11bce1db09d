from dataclasses import dataclass, replace
from typing import Literal

from bardling.config.checks import INF, expand_paths, require


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture."""

    source: str
    """What data.source may name."""
    weight: float | tuple[float, ...] = 1.0
    """Share of the training samples, relative to the other sources; a list has one weight for each stage of data.stages."""
    name: str = ""
    """Name in reports, such as that of its validation loss; empty: from the source."""
    encoding: str = ""
    """Like data.encoding, for this source; empty: data.encoding. The same holds for field and separator."""
    field: str = ""
    separator: str = ""

    def __post_init__(self) -> None:
        expand_paths(self, "source")

    def weights(self, stages: int) -> tuple[float, ...]:
        """The weight in each of this number of stages."""
        return self.weight if isinstance(self.weight, tuple) else (self.weight,) * stages


@dataclass(frozen=True)
class DataConfig:
    """The training text and its tokenizer."""

    source: str = "stdlib"
    """'stdlib' (Python's standard library sources), 'shakespeare', 'openwebtext', 'fineweb-edu', a dataset on the Hugging Face
    Hub as hf:NAME[:CONFIG][:SPLIT][:FIELD], a file (text, JSON, CSV, Parquet, Arrow, tar or zip, compressed or not) or
    FILE:FIELD, a folder, a glob, a URL such as s3://BUCKET/FILE, a folder of prepared shards, or token files of nanoGPT,
    nano-gpt or llm.c."""
    tokenizer: str = "byte"
    """'byte', 'char', 'bpe:SIZE' (trained on the source, or the first one), 'gpt2', or the path of a tokenizer.json. With
    model.init, the default is that model's tokenizer."""
    val_fraction: float = 0.05
    """Fraction of the text held out for validation."""
    val_source: str = ""
    """Text for validation, named like data.source; then all of the training text is for training, and data.val_fraction does
    not apply. Empty: the part that is held out."""
    sources: tuple[SourceConfig, ...] = ()
    """A mixture, in place of data.source: tables [[data.sources]] with source and weight. On the command line, each is
    WEIGHT:SOURCE, with one weight or, separated by commas, those of all stages."""
    stages: tuple[int | float, ...] = ()
    """Where the later weights of a mixture begin: fractions of the training, or numbers of samples, in ascending order."""
    packing: Literal["concat", "documents"] = "concat"
    """How text becomes sequences: 'concat' cuts all documents, joined, wherever a sequence ends; 'documents' packs whole
    documents into sequences (best fit) and masks attention between them."""
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
        expand_paths(self, "source", "tokenizer", "cache", "val_source")
        if self.sources:
            self._check_mixture()
        require(bool(self.source or self.sources), "data.source", self.source, "must name a source")
        require(not self.stages or bool(self.sources), "data.stages", self.stages, "needs a mixture, data.sources")
        masked = self.document_mask or self.packing == "documents"
        rule = "the char tokenizer has no end-of-text token to separate documents; choose another data.tokenizer"
        setting = "data.document_mask" if self.document_mask else "data.packing"
        value = self.document_mask or self.packing
        require(not (masked and self.tokenizer == "char"), setting, value, rule)
        require(_is_encoding(self.encoding), "data.encoding", self.encoding, _ENCODING_RULE)
        require(0.0 < self.val_fraction < 1.0, "data.val_fraction", self.val_fraction, "must be between 0 and 1")

    def without_weights(self) -> "DataConfig":
        """The same text, whatever the shares of its sources: what datasets depend on."""
        return replace(self, stages=(), sources=tuple(replace(source, weight=1.0) for source in self.sources))

    def _check_mixture(self) -> None:
        both = "data.sources name the text too; leave out one of them (--data.source '' overrides a recipe's)"
        require(self.source in ("", DataConfig.source), "data.source", self.source, both)
        object.__setattr__(self, "source", "")  # the configuration is frozen
        rule = "its characters would be those of one source; choose byte, bpe:SIZE, gpt2 or a tokenizer.json for a mixture"
        require(self.tokenizer != "char", "data.tokenizer", self.tokenizer, rule)
        kinds = {isinstance(start, int) for start in self.stages}
        rule = "must be fractions between 0 and 1, or numbers of samples, in ascending order without repetition"
        good = len(kinds) < 2 and all(start >= 1 if isinstance(start, int) else 0 < start < 1 for start in self.stages)
        require(good and list(self.stages) == sorted(set(self.stages)), "data.stages", self.stages, rule)
        count = len(self.stages) + 1
        for source in self.sources:
            require(bool(source.source), "data.sources.source", source.source, "must name a source")
            require(_is_encoding(source.encoding), "data.sources.encoding", source.encoding, _ENCODING_RULE)
            weights = source.weights(1)
            rule = f"the weight of {source.source!r} must be above 0 and finite; in some of several stages it may be 0"
            require(all(0 <= weight < INF for weight in weights) and any(weights), "data.sources.weight", source.weight, rule)
            needed = f"{source.source!r} needs one weight, or {count} for the stages that data.stages = {self.stages} divides"
            require(len(source.weights(count)) == count, "data.sources.weight", source.weight, needed)
        for stage, weights in enumerate(zip(*(source.weights(count) for source in self.sources), strict=True), 1):
            require(any(weights), "data.sources.weight", list(weights), f"stage {stage} needs a source with a weight above 0")
        names = [source.name for source in self.sources if source.name]
        require(len(set(names)) == len(names), "data.sources.name", names, "two sources have the same name")


_ENCODING_RULE = "unknown encoding; use a name such as utf-8 or cp1252"


def _is_encoding(name: str) -> bool:
    """Whether Python knows an encoding of text of this name; an empty one is UTF-8."""
    try:
        return not name or isinstance(b" ".decode(name, "ignore"), str)
    except (LookupError, ValueError, UnicodeError):  # also for codecs that do not give text
        return False
