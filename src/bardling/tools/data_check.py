"""Checks training data: describes it, and finds what should not be in it.

One pass over the validation text and one over everything: statistics, secrets, copies of documents, and validation text and
task items in the training text. Languages and tokens are those of a sample, spread evenly over the text.
Long documents are looked at in parts that end with a line, in bounded memory; a private key across two parts is not found.
What is found is a list of findings, the most serious first, each with examples that name documents.

The result is a dictionary of plain values (`check_data`), which the command prints, stores and draws. Writing a clean copy is
`data_dedup.py`.
"""

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from bardling.data.text.duplicates import EXTRA, MOST_DOCUMENTS, SHINGLE, THRESHOLD, Duplicates, Group
from bardling.data.text.findings import describe_findings
from bardling.data.text.overlaps import MANY_DOCUMENTS, RUN, SHORTEST, Overlaps, Passage
from bardling.data.text.secrets import find_secrets, hide_secrets
from bardling.data.text.statistics import Histogram, TextStatistics
from bardling.data.text.words import Hashes, code_points, find_words
from bardling.data.tokens.corpus import locate, parts_of
from bardling.data.tokens.documents import Documents
from bardling.data.tokens.manifest import SplitName
from bardling.data.tokens.parallel import SPLITS
from bardling.data.tokens.shards import TokenDataset
from bardling.data.tokens.split_text import SplitText
from bardling.data.tokens.token_report import count_report, shown, token_report
from bardling.data.tokens.tokenizer import Tokenizer, build_tokenizer
from bardling.errors import UserError
from bardling.evaluate.tasks import load_items
from bardling.files.streams import escape_unprintable

_EXAMPLES = 20  # kept of each finding
_EXCERPT, _EXCERPTS = 2000, 2000  # characters of an excerpt of the sample, and the most excerpts
_SEQUENCES, _SEQUENCE = 8, 96  # random decoded sequences, and tokens of each
_COUNTED = 1 << 24  # tokens of a dataset whose frequencies are counted
_WINDOW = 1 << 14  # of them, read at once
_PART = 1 << 23  # characters of a document that are looked at at once
_LEAK = 0.5  # of the word runs of a validation document
_LONG = 50  # words of a passage that counts as copied
_LANGUAGES, _RARE = 12, 0.005  # the most languages that are listed, and the fraction of the rarest

Progress = Callable[[str, int, int], None]
Report = dict[str, Any]


@dataclass
class _Sample:
    """Excerpts at equal distances in the text."""

    every: int = 2 * _EXCERPT  # characters
    position: int = 0
    excerpts: dict[int, tuple[str, str]] = field(default_factory=dict)  # position -> document and excerpt

    def add(self, name: str, text: str) -> None:
        first = -(-self.position // self.every) * self.every
        for place in range(first, self.position + len(text), self.every):
            begin = place - self.position
            self.excerpts[place] = (name, text[begin : begin + _EXCERPT])
        self.position += len(text)
        while len(self.excerpts) > _EXCERPTS:
            self.every *= 2
            self.excerpts = {place: part for place, part in self.excerpts.items() if place % self.every == 0}


class DataCheck:
    """A check under way; `groups` and `names` are for writing a clean copy."""

    def __init__(self, text: SplitText, tasks: Sequence[str], progress: Progress) -> None:
        self.text, self._progress = text, progress
        self.statistics = TextStatistics()
        self.duplicates = Duplicates()
        self.names: list[str] = []
        self.splits: list[SplitName] = []
        self.sample = _Sample()
        self.secrets: Counter[str] = Counter()
        self.secret_examples: list[Report] = []
        self._items = [(task, item) for task in tasks for item in load_items(task)]
        self._val_names: list[str] = []
        self.held_out = Overlaps(self._validation_words())
        item_texts = (f"{item.context} {item.endings[item.label]}" for _, item in self._items)
        self.tasks = Overlaps(find_words(code_points(text)).hashes for text in item_texts)
        self.groups: list[Group] = []

    def _validation_words(self) -> Iterator[Hashes]:
        done = 0
        for name, split, pieces in self.text.documents():
            hashes = []
            for part in _parts(pieces):
                done += len(part)
                self._progress("reading the validation text", done, self.text.size)
                if split == "val":
                    hashes.append(find_words(code_points(part)).hashes)
            if hashes:
                self._val_names.append(name)
                yield np.concatenate(hashes)

    def run(self) -> None:
        done = 0
        for name, split, pieces in self.text.documents():
            self.names.append(name)
            self.splits.append(split)
            line = length = 0
            before: Hashes | None = None
            for part in _parts(pieces):
                before = self._look(name, split, line, part, before)
                self.sample.add(name, part)
                line, length = line + part.count("\n"), length + len(part)
                self._progress("checking", done + length, self.text.size)
            self.statistics.end(split, length)
            done += length
        if not self.names:
            raise UserError("data check: the source has no text")
        self.groups = self.duplicates.groups()

    def _look(self, name: str, split: SplitName, line: int, text: str, before: Hashes | None) -> Hashes:
        """Look at a part of a document that begins after `line` lines and the words `before`; returns the last words.

        The words are hashes; for the first part of a document, `before` is None.
        """
        points = code_points(text)
        words = find_words(points)
        self.statistics.add(split, text, points, len(words.hashes))
        if split == "train":
            self.held_out.look(name, text, words, before)
            if self._items:
                self.tasks.look(name, text, words, before)
        (self.duplicates.add if before is None else self.duplicates.extend)(text, words.hashes)
        for secret in find_secrets(text):
            self.secrets[secret.kind] += 1
            if len(self.secret_examples) < _EXAMPLES:
                shown = f"{secret.kind} {secret.masked}"
                self.secret_examples.append({"document": name, "line": line + secret.line, "text": shown})
        return (words.hashes if before is None else np.concatenate([before, words.hashes]))[-RUN:]

    def findings(self) -> list[Report]:
        """All findings, the most serious first."""
        found = [self._leaks(), self._task_items(), self._secrets(), *self._copies(), self._invalid(), self._lines()]
        order = ("serious", "check", "note")
        return sorted((one for one in found if one), key=lambda one: order.index(one["severity"]))

    def _leaks(self) -> Report:
        shares = self.held_out.shares(boilerplate=False)
        passages = [found for found in self.held_out.passages() if not found.boilerplate]
        copied = {found.owner for found in passages if found.words >= _LONG}
        leaked = set(np.flatnonzero(np.nan_to_num(shares) >= _LEAK).tolist())
        if not leaked and not copied:
            return {}
        longest: dict[int, Passage] = {}
        for passage in passages:
            longest.setdefault(passage.owner, passage)
        chosen = sorted(leaked | copied, key=lambda owner: (-shares[owner], owner))
        examples = []
        for owner in chosen[:_EXAMPLES]:
            text, best = f"{100 * shares[owner]:.0f}% of it", longest.get(owner)
            if best is not None:  # else another validation document has the same passages
                text += f"; the longest passage has {best.words:,} words: {best.excerpt}"
            twin = {"twin": best.document} if best is not None else {}
            examples.append({"document": self._val_names[owner], "text": text, **twin})
        return _finding(
            "serious",
            f"validation documents that are also in the training text: {len(chosen):,} of {len(self._val_names):,}",
            f"at least {_LEAK:.0%} of their {RUN}-word runs, or a passage of {_LONG} words or more, not counting what more "
            f"than {MANY_DOCUMENTS} training documents contain. The validation loss will be too low.",
            len(chosen),
            examples,
        )

    def _task_items(self) -> Report:
        if not self._items:
            return {}
        shares = np.nan_to_num(self.tasks.shares(boilerplate=True))
        found = np.flatnonzero(shares > 0).tolist()
        first: dict[int, Passage] = {}
        for passage in self.tasks.passages():
            first.setdefault(passage.owner, passage)
        examples = []
        for owner in sorted(found, key=lambda owner: (-shares[owner], owner))[:_EXAMPLES]:
            task, item = self._items[owner]
            seen = first.get(owner)  # None if another item has the same text
            text = f"{100 * shares[owner]:.0f}% of item {item.id} of {task}: {seen.excerpt if seen else item.context[:200]}"
            examples.append({"document": seen.document if seen else "", "text": text})
        short = f" {self.tasks.skipped:,} items have fewer than {SHORTEST} words and are not looked for." * bool(
            self.tasks.skipped
        )
        title = f"task items that are also in the training text: {len(found):,} of {len(self._items):,}"
        advice = f"items that share {RUN} words in a row with it (shorter items: all words).{short}"
        advice += " A score on them says little." * bool(found)
        return _finding("serious" if found else "note", title, advice, len(found), examples)

    def _secrets(self) -> Report:
        if not self.secrets:
            return {}
        kinds = ", ".join(f"{kind} ({count:,})" for kind, count in self.secrets.most_common())
        title = f"strings that look like secrets: {kinds}"
        advice = "a model can repeat what it was trained on: remove them, and revoke real ones."
        return _finding("serious", title, advice, self.secrets.total(), self.secret_examples)

    def _copies(self) -> list[Report]:
        equal, alike, across = list[Report](), list[Report](), 0
        for number, twin in (pair for group in self.groups for pair in zip(group.members, group.twins, strict=True)):
            if number == twin:
                continue
            similarity, same = self.duplicates.compare(twin, number)
            text = "equal" if same else f"similarity {similarity:.2f}"
            text += " (linked through other copies)" * (similarity < THRESHOLD)
            if self.splits[number] != self.splits[twin]:
                across, text = across + 1, f"{text}, one in training and one in validation"
            (equal if same else alike).append({"document": self.names[number], "twin": self.names[twin], "text": text})
        alike.sort(key=lambda one: "validation" not in one["text"])
        pairs = f"Pairs with one in each split: {across:,}. " * bool(across)
        checked = f"only the first {MOST_DOCUMENTS:,} documents are compared. " * (self.duplicates.count > MOST_DOCUMENTS)
        near = f"estimated Jaccard similarity of at least {THRESHOLD} over runs of {SHINGLE} words. {pairs}{checked}"
        remedy = "`--dedup OUT` writes a clean copy of the data."
        rows = (("exact copies", remedy, equal), ("near-duplicates", near + remedy, alike))
        return [
            _finding("check", f"{name} of other documents: {len(found):,} of {len(self.names):,}", advice, len(found), found)
            for name, advice, found in rows
        ]

    def _invalid(self) -> Report:
        bad = {kind: self.statistics.characters_of(kind) for kind in ("U+FFFD", "control characters")}
        share = sum(bad.values()) / max(1, self.statistics.characters)
        told = ", ".join(f"{count:,} {kind}" for kind, count in bad.items() if count)
        advice = f"{100 * share:.2g}% of all characters: text in another encoding, or binary data."
        title = f"characters that are hardly text: {told}"
        return _finding("check" if share > 1e-4 else "note", title, advice, sum(bad.values()), []) if told else {}

    def _lines(self) -> Report:
        lines = self.statistics.lines.repeated()
        if not lines:
            return {}
        share = sum(len(line) * (count - 1) for line, count in lines) / max(1, self.statistics.characters)
        examples = [{"text": f"{count:,} x {line.strip()}"} for line, count in lines[:_EXAMPLES]]
        title = f"repeated lines are {'' if self.statistics.lines.exact else 'at least '}{share:.1%} of the text"
        return _finding("note", title, "all but the first of lines of 20 to 16,384 characters.", len(lines), examples)


def _parts(pieces: Iterable[str]) -> Iterator[str]:
    """A text in parts, which end with a line where lines are short; at least one."""
    rest = ""
    for piece in pieces:
        rest, begin = rest + piece, 0
        while len(rest) - begin > _PART:
            end = rest.rfind("\n", begin, begin + _PART) + 1 or begin + _PART
            yield rest[begin:end]
            begin = end
        rest = rest[begin:]
    yield rest


def _finding(severity: str, title: str, advice: str, count: int, examples: list[Report]) -> Report:
    if not count and severity != "note":
        return {}
    kept = [{key: _printable(value) for key, value in one.items()} for one in examples[:_EXAMPLES]]
    return {"severity": severity, "title": title, "advice": advice, "count": count, "examples": kept}


def _printable(value: Any) -> Any:
    return escape_unprintable(hide_secrets(value)) if isinstance(value, str) else value


def start_check(text: SplitText, tasks: Sequence[str], progress: Progress) -> DataCheck:
    """Read a source or a dataset, and find what there is to find."""
    check = DataCheck(text, tasks, progress)
    check.run()
    return check


def describe(check: DataCheck, tokenizer_spec: str, seed: int) -> Report:
    """The report of a finished check, as plain values that can be written as JSON.

    Args:
        tokenizer_spec: for the tokens of a sample of a text; empty: none. A dataset has its own.
        seed: chooses the decoded sequences.
    """
    statistics, excerpts = check.statistics, list(check.sample.excerpts.values())
    found = check.findings()
    if notes := describe_findings(check.text.findings.facts()):
        found.append(_finding("note", "the source left something out, or kept it", "; ".join(notes), 1, []))
    report: Report = {
        "sizes": {split: asdict(sizes) for split, sizes in statistics.sizes.items()},
        "lengths": statistics.lengths.facts("characters"),
        "kinds": [
            {"name": name, "share": count / max(1, statistics.characters)} for name, count in statistics.characters_by_kind()
        ],
        "languages": _languages([text for _, text in excerpts]),
        "findings": found,
    }
    if check.text.dataset is not None:
        return report | dataset_tokens(check.text.dataset, seed)
    return report | _sample_tokens(tokenizer_spec, excerpts, seed)


def _languages(texts: list[str]) -> Report:
    """The languages of excerpts, as fractions."""
    try:
        from py3langid import classify
    except ImportError:
        return {"missing": f"telling languages apart needs the package py3langid: {EXTRA}"}
    counts = Counter(str(classify(text)[0]) for text in texts)
    shares = [[name, count / len(texts)] for name, count in counts.most_common(_LANGUAGES) if count >= _RARE * len(texts)]
    return {"excerpts": len(texts), "characters": sum(map(len, texts)), "shares": shares}


def _sample_tokens(spec: str, excerpts: list[tuple[str, str]], seed: int) -> Report:
    if not spec:
        return {}
    texts = [text for _, text in excerpts]
    tokenizer = build_tokenizer(spec, texts)
    chosen = random.Random(seed).sample(excerpts, min(_SEQUENCES, len(excerpts)))
    sequences = []
    for name, text in chosen:
        with contextlib.suppress(UserError):  # characters outside the vocabulary are counted by the report
            ids = tokenizer.encode(text[:_EXCERPT])[:_SEQUENCE].tolist()
            sequences.append(_sequence(tokenizer, name, ids))
    return {"tokens": token_report(tokenizer, texts) | {"sample": True}, "sequences": sequences}


def _sequence(tokenizer: Tokenizer, place: str, ids: list[int]) -> Report:
    """A sequence token by token; one that contains a secret is a single masked text."""
    tokens = [shown(tokenizer, index) for index in ids]
    masked = hide_secrets("".join(tokens))
    return {"place": place, "tokens": tokens if masked == "".join(tokens) else [masked]}


def dataset_tokens(dataset: TokenDataset, seed: int) -> Report:
    """Sizes in tokens, most frequent tokens and random decoded sequences of a dataset: cheap, whatever its size."""
    tokenizer = dataset.tokenizer
    counts, read, sequences = np.zeros(dataset.vocab_size, np.int64), 0, list[Report]()
    chooser = random.Random(seed)
    for name in SPLITS:
        split = dataset.split(name)
        windows = -(-len(split) // _WINDOW)
        for window in range(0, windows, max(1, -(-windows * _WINDOW // _COUNTED))):
            ids = split.read(window * _WINDOW, min(_WINDOW, len(split) - window * _WINDOW))
            counts += np.bincount(ids, minlength=len(counts))
            read += len(ids)
    report: Report = {"token_sizes": {name: len(dataset.split(name)) for name in SPLITS}}
    if tokenizer is None:
        return report
    split = dataset.split("train")
    parts = parts_of(dataset, "train")
    bounds = list(accumulate((len(part.dataset.split("train")) for part in parts), initial=0))
    for _ in range(_SEQUENCES if len(split) else 0):
        start = chooser.randrange(max(1, len(split) - _SEQUENCE))
        ids = split.read(start, min(_SEQUENCE, len(split) - start))
        number, local = locate(bounds, start)
        found = Documents(parts[number].dataset, "train").at(local, 1)[0]
        place = f"training split{' of ' * bool(parts[number].name)}{parts[number].name}, token {local:,}: {found}"
        sequences.append(_sequence(tokenizer, place, ids.tolist()))
    facts = count_report(tokenizer, counts[: tokenizer.vocab_size])
    manifest = dataset.manifest
    size, tokens = manifest.train.bytes + manifest.val.bytes, manifest.train.tokens + manifest.val.tokens
    facts |= {
        "bytes_per_token": size / tokens if size and tokens else 0.0,
        "sample": read < sum(report["token_sizes"].values()),
    }
    return report | {"tokens": facts, "sequences": sequences}


def dataset_report(dataset: TokenDataset, seed: int) -> Report:
    """`dataset_tokens`, with the lengths of the documents where the dataset has an index, and they are whole."""
    lengths = Histogram()
    for name in SPLITS if not dataset.manifest.source.get("packing") else ():
        for part in parts_of(dataset, name):
            lengths.add(Documents(part.dataset, name).lengths())
    found = {"lengths": lengths.facts("tokens")} if lengths.total else {}
    return {"source": dataset.title, **found, **dataset_tokens(dataset, seed)}
