"""The text of a run: one source, or a mixture of several, and perhaps another source for validation.

Each source is a dataset of its own (`dataset.py`), prepared and cached as if it were alone. A `Corpus` joins them: its training
split is that of all sources end to end, so a position in it determines the source. All have the same tokenizer: the one that
`data.tokenizer` names, or, if that is trained on text or the first source is prepared already, the first source's.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bardling.config import DataConfig
from bardling.data.text.sources import slug
from bardling.data.tokens import dataset as single
from bardling.data.tokens.manifest import Manifest, SplitInfo, SplitName
from bardling.data.tokens.prepare import EVALUATION_ONLY, SPLIT_RULE, TRAINING_ONLY
from bardling.data.tokens.shards import TokenDataset, TokenSplit
from bardling.data.tokens.tokenizer import Tokenizer, is_tokenizer_path
from bardling.errors import UserError
from bardling.files.digests import json_sha256


@dataclass(frozen=True)
class Part:
    """A source of a corpus."""

    name: str  # in reports; empty if it is the only one
    dataset: TokenDataset


class Corpus(TokenDataset):
    """Several datasets as one; `train` and `val` are where its training and its validation split come from."""

    def __init__(self, train: Sequence[Part], val: Sequence[Part]) -> None:
        first, every = train[0].dataset, [*train, *val]
        for part in every[1:]:
            _require_same(first, part.dataset)
        manifest = replace(
            first.manifest,
            source={key: value for key, value in first.manifest.source.items() if key == "packing"},
            train=_total(part.dataset.manifest.train for part in train),
            val=_total(part.dataset.manifest.val for part in val),
        )
        super().__init__(first.path, manifest)
        self.train, self.val = tuple(train), tuple(val)
        prints = [[part.dataset.fingerprint for part in parts] for parts in (train, val)]
        self.fingerprint = json_sha256(prints)[:16]

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return self.train[0].dataset.tokenizer

    @property
    def title(self) -> str:
        names = ", ".join(part.name for part in self.train)
        return f"the mixture of {names}" if names else super().title

    @property
    def validation_title(self) -> str:
        return self.title if self.val == self.train else str(self.val[0].dataset.path)

    def split(self, name: SplitName) -> TokenSplit:
        return JoinedSplit([split for _, split in self.splits(name)])

    def splits(self, name: SplitName) -> list[tuple[str, TokenSplit]]:
        """The split of each source, with its name."""
        parts = self.train if name == "train" else self.val
        for part in parts:
            part.dataset.vocab_size = self.vocab_size  # a model may have limited it
        return [(part.name, part.dataset.split(name)) for part in parts]

    def verify(self) -> list[str]:
        datasets = {part.dataset.path: part.dataset for part in (*self.train, *self.val)}
        return [problem for dataset in datasets.values() for problem in dataset.verify()]


def parts_of(dataset: TokenDataset, name: SplitName) -> Sequence[Part]:
    """Where a split of a dataset comes from: the sources of a corpus, or the dataset itself."""
    if isinstance(dataset, Corpus):
        return dataset.train if name == "train" else dataset.val
    return (Part("", dataset),)


class JoinedSplit(TokenSplit):
    """Several splits end to end."""

    def __init__(self, parts: Sequence[TokenSplit]) -> None:
        self.name, self.vocab_size, self.row = parts[0].name, parts[0].vocab_size, parts[0].row
        marks = [part.marks for part in parts if part.marks is not None]
        self.marks = JoinedSplit(marks) if marks else None
        self._parts = parts
        self._bounds = list(itertools.accumulate(map(len, parts), initial=0))  # part i: [i] to [i + 1]

    def place(self, position: int) -> tuple[str, int]:
        number, local = locate(self._bounds, position)
        return self._parts[number].place(local)

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        if start < 0 or count < 0 or start + count > len(self):
            raise ValueError(f"tokens {start} to {start + count} are not within the split's {len(self)}")
        found = [np.empty(0, np.int64)]
        while count:
            number, local = locate(self._bounds, start)
            size = min(count, self._bounds[number + 1] - start)
            found.append(self._parts[number].read(local, size))
            start, count = start + size, count - size
        return np.concatenate(found)


def locate(bounds: Sequence[int], position: int) -> tuple[int, int]:
    """The part that holds a position, given where each begins and the last one ends; and the position in it."""
    number = bisect.bisect_right(bounds, position) - 1
    return number, position - bounds[number]


Opener = Callable[[DataConfig, int, Mapping[str, Any]], TokenDataset]
"""Opens a source, given its settings, split rule and record."""


def open_corpus(config: DataConfig, context: int = 0) -> TokenDataset:
    """Open everything that `config` names, preparing what is not; see `dataset.open_data`."""
    return _open(config, {}, lambda part, rule, record: single.open_data(part, rule, context))


def reopen_corpus(
    config: DataConfig, record: Mapping[str, Any], run: Path, remedy: str = "start a new run", context: int = 0
) -> TokenDataset:
    """What a run has recorded; see `dataset.open_recorded`."""
    return _open(config, record, lambda part, rule, known: single.open_recorded(part, known, run, remedy, context))


def recorded_corpus(config: DataConfig, record: Mapping[str, Any]) -> TokenDataset | None:
    """The same, unless something is gone; see `dataset.recorded_tokens`."""

    def opened(part: DataConfig, rule: int, known: Mapping[str, Any]) -> TokenDataset:
        if (found := single.recorded_tokens(part, known)) is None:
            raise LookupError(part.source)
        return found

    try:
        return _open(config, record, opened)
    except LookupError:
        return None


def _open(config: DataConfig, record: Mapping[str, Any], opened: Opener) -> TokenDataset:
    if not config.sources and not config.val_source:
        return opened(config, SPLIT_RULE, record)
    rule = SPLIT_RULE
    if config.val_source:
        rule, config = TRAINING_ONLY, replace(config, val_fraction=DataConfig.val_fraction)
    train = list[Part]()
    names = source_names(config)
    for part, name, known in zip(source_configs(config), names, _recorded(record, "sources", len(names)), strict=True):
        if train:
            part = replace(part, tokenizer=_shared_tokenizer(config, train[0].dataset))
        train.append(Part(name, opened(part, rule, known)))
    if not config.val_source:
        return Corpus(train, train)
    tokenizer = _shared_tokenizer(config, train[0].dataset)
    own = replace(_validation_config(config), tokenizer=tokenizer)
    (known,) = _recorded(record, "validation", 1)
    return Corpus(train, [Part("", opened(own, EVALUATION_ONLY, known))])


def source_configs(config: DataConfig) -> list[DataConfig]:
    """The settings of each source by itself."""
    if not config.sources:
        return [replace(config, val_source="")]
    alone = replace(config, source=DataConfig.source, sources=(), stages=(), val_source="")
    return [
        replace(
            alone,
            source=each.source,
            encoding=each.encoding or config.encoding,
            field=each.field or config.field,
            separator=each.separator or config.separator,
        )
        for each in config.sources
    ]


def _validation_config(config: DataConfig) -> DataConfig:
    """The settings of `data.val_source` by itself."""
    return replace(config, source=config.val_source, sources=(), stages=(), val_source="")


def texts_of(config: DataConfig, dataset: TokenDataset) -> list[tuple[DataConfig, TokenDataset]]:
    """The settings and the dataset of each text of a run: its sources, and `data.val_source` if there is one."""
    configs = source_configs(config) + ([_validation_config(config)] if config.val_source else [])
    parts = [*parts_of(dataset, "train"), *(parts_of(dataset, "val") if config.val_source else ())]
    return [(text, part.dataset) for text, part in zip(configs, parts, strict=True)]


def holds_conversations(config: DataConfig) -> bool:
    """Whether a source holds conversations."""
    return any(map(single.has_rows, source_configs(config)))


def source_names(config: DataConfig) -> list[str]:
    """A name for each source, all different; empty if there is no mixture."""
    names, taken = list[str](), {each.name for each in config.sources}
    for each in config.sources:
        path = Path(each.source)
        base = slug(path.stem, "") or slug(path.parent.name, "source")
        candidates = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
        names.append(each.name or next(name for name in candidates if name not in taken))
        taken.add(names[-1])
    return names or [""]


def _recorded(record: Mapping[str, Any], name: str, count: int) -> list[Mapping[str, Any]]:
    """The records of the parts of a corpus; an empty one for a part that is missing."""
    found = record.get(name)
    parts = found if isinstance(found, list) and len(found) == count else [None] * count
    return [part if isinstance(part, dict) else {} for part in parts]


def _shared_tokenizer(config: DataConfig, first: TokenDataset) -> str:
    """The tokenizer of the sources after the first one."""
    own = first.path / "tokenizer.json"
    spec = config.tokenizer
    trained = spec == "char" or spec.startswith("bpe:") or single.is_tokenized(source_configs(config)[0].source)
    return str(own) if trained and not is_tokenizer_path(spec) and own.is_file() else spec


def _require_same(first: TokenDataset, other: TokenDataset) -> None:
    """Raise a `UserError` unless two datasets can be mixed."""
    one, two = first.manifest, other.manifest
    if (one.tokenizer, one.vocab_size) != (two.tokenizer, two.vocab_size):
        fault = f"is made with {_tokenizer_of(one)}, but {other.path} with {_tokenizer_of(two)}"
        raise UserError(f"{first.path}: {fault}: prepare both with the same tokenizer (--tokenizer)")
    kinds = [
        f"{'conversations' if each.holds_conversations else 'documents'} in rows of {each.row} tokens" if each.row else "text"
        for each in (one, two)
    ]
    if kinds[0] != kinds[1]:
        raise UserError(f"{first.path}: holds {kinds[0]}, but {other.path} {kinds[1]}: these cannot be mixed")


def _tokenizer_of(manifest: Manifest) -> str:
    return f"tokenizer {manifest.tokenizer or 'unknown'} of {manifest.vocab_size:,} tokens"


def _total(splits: Iterable[SplitInfo]) -> SplitInfo:
    found = list(splits)
    tokens, documents = sum(split.tokens for split in found), sum(split.documents for split in found)
    return SplitInfo(tokens, documents, sum(split.bytes for split in found) if all(s.bytes for s in found) else 0, ())
