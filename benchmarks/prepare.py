"""Preparing a dataset: whole commands against two widely used methods, with GPT-2's vocabulary.

    pip install datasets
    python benchmarks/prepare.py --tokenizer PATH/tokenizer.json    # text of this machine; also: --text PATH.jsonl
    python benchmarks/prepare.py --tiny                             # seconds: to try the script, with a small vocabulary

Text. Without --text, files of Python's standard library, of installed packages and of /usr/share/doc are collected until there
are 300 MB: source code, headers and documentation in UTF-8, each file once. The table says how much was found. The sides read
it as JSON Lines with one document per row.

Method. Each side is a whole command in a process of its own, from reading the rows to the last token on disk: `bardling
prepare`, the same without `gigatoken` (as if it were not installed), nanoGPT's method (`datasets.map` with `tiktoken`, 2
processes) and nano-gpt's (`Pool.imap` with `tiktoken`, 2 processes); see `prepare_sides.py`. They take turns, in rotating
order; a ratio compares two commands of one round. CPU time is that of all processes of a command. Memory is the largest sum of
the resident memory of its processes (pages that they share count several times), sampled ten times a second.

`raw` is `gigatoken` alone, in one or two processes, with all documents in memory and the ids thrown away.

Equality. All ids of the dataset, of all documents in order, are compared with those of the `tokenizers` library, which gets the
documents directly; then the same for a hostile set: every code point, scripts from right to left, CJK, emoji sequences, words
of a megabyte, names of control tokens.
"""

import contextlib
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bardling.cli.parse import parse
from bardling.data.tokens.shards import open_dataset
from bardling.data.tokens.tokenizer import build_tokenizer
from bardling.errors import UserError
from bardling.files.decoding import MARK
from tables import Table, megabytes, publish, rounded, say, script, spread

SIDES_PROGRAM = Path(__file__).resolve().with_name("prepare_sides.py")
ENDINGS = {".py", ".pyi", ".h", ".c", ".md", ".rst", ".txt", ".html"}
VAL_FRACTION = 0.0005
WITHOUT = "import sys; sys.modules['gigatoken'] = None; from bardling.cli.main import main; main(sys.argv[1:])"
OURS = ("bardling", "bardling without gigatoken")
BASELINES = {"nanoGPT: datasets.map": "datasets_map", "nano-gpt: Pool.imap": "pool_imap"}


@dataclass(frozen=True)
class Options:
    """Options of this benchmark."""

    tokenizer: Path | None = None
    """GPT-2's tokenizer.json; default: 'gpt2' from the hub or its cache."""
    text: Path | None = None
    """JSON Lines to prepare instead of this machine's text; not compared in bytes with what --megabytes says."""
    megabytes: int = 300
    """Text to collect."""
    rounds: int = 2
    """Rounds."""
    check: bool = True
    """Compare all ids with those of tokenizers, which takes minutes."""
    results: Path | None = None
    """Folder of the results file to append to; default: benchmarks/results."""
    tiny: bool = False
    """Use a little text and a vocabulary trained on it, and leave out the baselines."""


@dataclass
class Side:
    """What was measured of one command, a number per round."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # bytes


def main(argv: Sequence[str]) -> None:
    """Measure all sides and write one table."""
    options = parse(Options, argv, prog="prepare.py", description="Preparing a dataset against other methods.")
    if options.rounds < 1 or options.megabytes < 1:
        raise UserError(f"--rounds {options.rounds} --megabytes {options.megabytes}: must be at least 1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, found = options.text, "that of --text"
        if text is None:
            text = folder / "text.jsonl"
            found = collect(text, (3 if options.tiny else options.megabytes) * 10**6)
        tokenizer = vocabulary(options, text, folder)
        size = sum(len(document.encode()) for document in documents(text))
        say(f"text: {megabytes(size)} MB, {found}")
        sides = measure(options, text, tokenizer, folder)
        raw = {} if options.tiny else {count: raw_seconds(text, tokenizer, count) for count in (1, 2)}
        notes = [f"text: {megabytes(size)} MB in UTF-8, {found}", *_notes(sides, raw, size)]
        if options.check:
            notes.append(check(text, folder / "last", tokenizer, folder, step=100 if options.tiny else 1))
        table = Table(
            "Whole commands", ("side", "seconds", "MB/s", "CPU s", "memory MB", "speed of ours"), _rows(sides, size), notes
        )
    publish("prepare", [table], device=torch.device("cpu"), command=argv, folder=options.results)


def collect(path: Path, size: int) -> str:
    """Write files of this machine as JSON Lines until they have `size` bytes; describes what was found."""
    roots = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib")), Path("/usr/share/doc")]
    seen, total, counts = set[bytes](), 0, dict[str, int]()
    with path.open("w", encoding="utf-8") as out:
        for file in (file for root in roots for file in _files(root)):
            try:
                text = file.read_text(encoding="utf-8").lstrip(MARK)  # which the library drops
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.sha256(text.encode()).digest()
            if not text or digest in seen:
                continue
            seen.add(digest)
            total += len(text.encode())
            counts[file.suffix] = counts.get(file.suffix, 0) + 1
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if total >= size:
                break
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(counts.items(), key=lambda pair: -pair[1]))
    return f"{len(seen):,} files of this machine ({kinds})"


def _files(root: Path) -> Iterator[Path]:
    for folder, inner, names in os.walk(root):
        inner.sort()
        yield from (Path(folder, name) for name in sorted(names) if Path(name).suffix in ENDINGS)


def documents(text: Path) -> Iterator[str]:
    """The documents of a file of JSON Lines."""
    with text.open("rb") as lines:
        for line in lines:
            if found := json.loads(line)["text"]:
                yield found


def vocabulary(options: Options, text: Path, folder: Path) -> Path:
    """The tokenizer.json of all sides."""
    if options.tokenizer is not None:
        return options.tokenizer.resolve()
    tokenizer = build_tokenizer("bpe:400" if options.tiny else "gpt2", documents(text) if options.tiny else ())
    tokenizer.save(folder)
    return folder / "tokenizer.json"


def measure(options: Options, text: Path, tokenizer: Path, folder: Path) -> dict[str, Side]:
    """Run all sides in turn; the dataset of the last `bardling` stays in `folder`/last."""
    sides = {name: Side() for name in (*OURS, *(() if options.tiny else BASELINES))}
    order, digests = list(sides), set[str]()
    for turn in range(options.rounds):
        for name in order:
            out = folder / f"{turn}-{order.index(name)}"
            run_side(sides[name], command(name, text, out, tokenizer))
            if name in OURS:
                digests.add(open_dataset(out).fingerprint)
            say(f"round {turn + 1}: {name}: {sides[name].seconds[-1]:.1f} s, CPU {sides[name].cpu[-1]:.1f} s")
            if name == OURS[0] and turn == options.rounds - 1:
                out.rename(folder / "last")
            else:
                subprocess.run(["rm", "-r", str(out)], check=True)
        order = [*order[1:], order[0]]
    if len(digests) != 1:
        raise UserError(f"the datasets of {' and '.join(OURS)} differ: {digests}")
    return sides


def command(name: str, text: Path, out: Path, tokenizer: Path) -> list[str]:
    """The command line of a side."""
    if name in BASELINES:
        return [sys.executable, str(SIDES_PROGRAM), BASELINES[name], str(text), str(out), str(tokenizer)]
    start = ["-m", "bardling"] if name == OURS[0] else ["-c", WITHOUT]
    settings = ["--out", str(out), "--tokenizer", str(tokenizer), "--val-fraction", str(VAL_FRACTION)]
    return [sys.executable, *start, "prepare", str(text), *settings]


def run_side(side: Side, arguments: list[str]) -> None:
    """Run a command to its end and record what it took; a `UserError` if it fails."""
    with tempfile.TemporaryFile() as log:
        begun = time.monotonic()
        process = subprocess.Popen(arguments, stdout=log, stderr=log)
        most, status = 0, None
        while status is None:
            most = max(most, resident(process.pid))
            time.sleep(0.1)
            ended, code, usage = os.wait4(process.pid, os.WNOHANG)
            status = code if ended else None
        seconds = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise UserError(f"{' '.join(arguments)}: ended with {process.returncode}: {log.read()[-2000:].decode()}")
    side.seconds.append(seconds)
    side.cpu.append(usage.ru_utime + usage.ru_stime)
    side.memory.append(most)


def resident(root: int) -> int:
    """Bytes of resident memory of a process and all its descendants."""
    parents, sizes = dict[int, int](), dict[int, int]()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, IndexError):  # it has ended
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)], sizes[int(folder.name)] = int(fields[1]), int(fields[21])
    inside, before = {root}, 0
    while len(inside) > before:
        before = len(inside)
        inside |= {process for process, parent in parents.items() if parent in inside}
    return sum(sizes.get(process, 0) for process in inside) * os.sysconf("SC_PAGE_SIZE")


def raw_seconds(text: Path, tokenizer: Path, processes: int) -> float:
    """Median seconds of three runs of `gigatoken` alone."""
    arguments = [sys.executable, str(SIDES_PROGRAM), "raw", str(text), str(processes), str(tokenizer)]
    runs = [float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout) for _ in range(3)]
    return statistics.median(runs)


def _rows(sides: dict[str, Side], size: int) -> list[tuple[str, ...]]:
    rows = []
    for name, side in sides.items():
        ratios = [other / ours for other, ours in zip(side.seconds, sides[OURS[0]].seconds, strict=True)]
        speeds = [size / 1e6 / seconds for seconds in side.seconds]
        memory, cpu = megabytes(max(side.memory)), spread(side.cpu, "{:.1f}")
        rows.append((name, spread(side.seconds, "{:.1f}"), spread(speeds, "{:.1f}"), cpu, memory, spread(ratios) + " x"))
    return rows


def _notes(sides: dict[str, Side], raw: dict[int, float], size: int) -> list[str]:
    notes = []
    for ours in OURS:
        for other in (name for name in sides if name in BASELINES):
            pairs = list(zip(sides[other].seconds, sides[ours].seconds, strict=True))
            work = list(zip(sides[other].cpu, sides[ours].cpu, strict=True))
            ratio, cpu = spread([a / b for a, b in pairs], "{:.1f}"), spread([a / b for a, b in work], "{:.1f}")
            notes.append(f"{ours} against {other}: {ratio} times the speed, {cpu} times less CPU time")
    best = min(sides[OURS[0]].seconds)
    for count, seconds in raw.items():
        speed = size / 1e6 / seconds
        notes.append(
            f"raw in {count} process(es): {rounded(speed)} MB/s; the fastest whole command keeps {seconds / best:.2f} of it"
        )
    return notes


def check(text: Path, dataset: Path, tokenizer: Path, folder: Path, *, step: int) -> str:
    """Compare all ids with the library's, of the text and of the hostile set; a `UserError` at the first difference.

    The hostile set has every `step`-th code point.
    """
    say("comparing all ids with those of tokenizers")
    count = compare(text, dataset, tokenizer)
    hostile = folder / "hostile.jsonl"
    hostile.write_text(
        "".join(json.dumps({"text": part.lstrip(MARK)}) + "\n" for part in hostile_documents(step)), encoding="utf-8"
    )
    run_side(Side(), command(OURS[0], hostile, folder / "hostile", tokenizer))
    others = compare(hostile, folder / "hostile", tokenizer)
    return f"equal to tokenizers: all {count:,} ids of the text and all {others:,} of the hostile set"


def number(document: str) -> int:
    """Decides the split of a document (docs/data.md)."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big")


def compare(text: Path, dataset: Path, tokenizer: Path) -> int:
    """The number of ids compared."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(tokenizer))
    library.encode_special_tokens = True
    end = next(token["id"] for token in json.loads(tokenizer.read_text(encoding="utf-8"))["added_tokens"])
    opened = open_dataset(dataset)
    splits, places = {name: opened.split(name) for name in ("train", "val")}, {"train": 0, "val": 0}
    limit = max(int(VAL_FRACTION * 2.0**64), min(map(number, documents(text))) + 1)  # the split's rule for many documents
    batch: list[str] = []

    def flush() -> None:
        for document, encoding in zip(batch, library.encode_batch_fast(batch, add_special_tokens=False), strict=True):
            name = "val" if number(document) < limit else "train"
            expected = np.array([*encoding.ids, end])
            if not np.array_equal(splits[name].read(places[name], len(expected)), expected):
                raise UserError(f"{name}, from token {places[name]:,}: other ids than those of tokenizers: {document[:80]!r}")
            places[name] += len(expected)
        batch.clear()

    for document in documents(text):
        batch.append(document)
        if sum(map(len, batch)) > 1 << 20:
            flush()
    flush()
    if any(places[name] != len(split) for name, split in splits.items()):
        raise UserError("the dataset has more tokens than the text")
    return sum(places.values())


def hostile_documents(step: int) -> Iterator[str]:
    """More than 100 documents, so that whole ones are held out by hash; words are as long as `step` leaves of a megabyte."""
    draw = random.Random(0)
    points = [chr(code) for code in range(0, 0x110000, step) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(points), 8192):
        part = points[start : start + 8192]
        yield "".join(part)
        yield " ".join(part)
        draw.shuffle(part)
        yield "".join(part) + "a".join(part[:2000])
    for word in ("a", "ab", "=-", "é", "漢", "7", "x1", "🙂", "\u0301", " ", "\n", "\t ", "\u00a0"):
        yield word * (1_000_000 // step // len(word))
    yield "".join(draw.choice("abcdefghijklmnopqrstuvwxyzABCDEFGH0123456789+/") for _ in range(1_000_000 // step))
    scripts = [
        "漢字かな交じり文",
        "한국어",
        "สวัสดี",
        "नमस्ते",
        "עברית",
        "العربية",
        "\u202e",
        "ﷺ",
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "👍🏽",
        "🇩🇪",
        "1️⃣",
    ]
    words = [
        *scripts,
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u3000",
        "'s",
        "'LL",
        "don't",
        "<|endoftext|>",
        "<|endof",
        "text|>",
        "\0",
        "\x85",
    ]
    for _ in range(200):
        yield "".join(draw.choices(words, k=500))


if __name__ == "__main__":
    script(main)
