"""Tokenising in several processes and after interruptions gives the same files, to the byte."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from bardling.data.tokens import journal, parallel
from bardling.data.tokens import prepare as prepare_module
from bardling.data.tokens.journal import Journal, Position, work_folder
from bardling.data.tokens.parallel import Encoders, PieceEncoder, default_workers, utf8
from bardling.data.tokens.prepare import prepare
from bardling.data.tokens.shards import ShardWriter, open_dataset
from bardling.data.tokens.tokenizer import Tokenizer, build_tokenizer
from bardling.errors import UserError

WORDS = ["king", "queen", "rose", "thorn", "night", "été", "日本", "🙂", "x" * 40, "\n\n", "  "]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """400 documents of about 300 characters."""
    draw = random.Random(5)
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [" ".join(draw.choices(WORDS, k=60)) for _ in range(400)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(prepare_module, "_BATCH", 2000)
    monkeypatch.setattr(prepare_module, "_BATCH_OF_WORKER", 3000)


def content(folder: Path) -> dict[str, str]:
    """Checksum of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("spec", ["bpe:400", "byte"])
def test_number_of_workers_does_not_show_in_the_dataset(text, tmp_path, small_batches, spec):
    for workers in (1, 2, 3):
        prepare(str(text), tmp_path / f"by{workers}", spec, val_fraction=0.2, workers=workers, shard_tokens=10_000)
    assert content(tmp_path / "by1") == content(tmp_path / "by2") == content(tmp_path / "by3")
    assert len(content(tmp_path / "by1")) > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["by1", "by2", "by3"]


def test_encode_sorts_by_split_and_ends_each_piece():
    tokenizer = build_tokenizer("byte", ())
    pieces = [("train", b"ab"), ("val", "é".encode()), ("train", b""), ("train", b"c")]
    train, val = PieceEncoder(tokenizer, [256]).encode(pieces)
    assert (train.ids.tolist(), train.lengths.tolist(), train.bytes) == ([97, 98, 256, 99, 256], [3, 2], 3)
    assert (val.ids.tolist(), val.lengths.tolist(), val.bytes) == ([0xC3, 0xA9, 256], [3], 2)


class Some:
    """A batch."""

    def __init__(self, *texts: str) -> None:
        self.pieces = [("train", utf8(text)) for text in texts]


def test_workers_answer_in_order_also_for_broken_text(tmp_path):
    tokenizer = build_tokenizer("bpe:300", ["some words to learn from " * 9])
    tokenizer.save(tmp_path)
    batches = [Some(*(f"{i} {j} \ud800 words" for j in range(i % 4))) for i in range(30)]
    with Encoders(tokenizer, tmp_path, [0], 2) as encoders:
        results = list(encoders.run(batches))
    assert [batch for batch, _ in results] == batches
    encoder = PieceEncoder(tokenizer, [0])
    for batch, parts in results:
        expected = encoder.encode(batch.pieces)
        for got, want in zip(parts, expected, strict=True):
            assert np.array_equal(got.ids, want.ids)
            assert (got.lengths.tolist(), got.bytes) == (want.lengths.tolist(), want.bytes)


def test_an_error_of_the_text_comes_through_from_a_worker(tmp_path):
    tokenizer = build_tokenizer("char", ["abc"])
    tokenizer.save(tmp_path)
    with pytest.raises(UserError, match="character 'z'"), Encoders(tokenizer, tmp_path, [], 2) as encoders:
        list(encoders.run([Some("abc"), Some("abz"), Some("abc")]))


def test_a_worker_that_dies_ends_the_work_with_one_message(tmp_path):
    tokenizer = build_tokenizer("byte", ())
    tokenizer.save(tmp_path)

    def batches():
        for number in range(100):
            if number == 10:
                for worker in encoders._workers:
                    worker._process.send_signal(signal.SIGKILL)
            yield Some("text " * 1000)

    begun = time.monotonic()
    with (
        pytest.raises(UserError, match=r"ended with signal 9.*fewer workers") as caught,
        Encoders(tokenizer, tmp_path, [], 2) as encoders,
    ):
        list(encoders.run(batches()))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 120  # no wait for answers that cannot come
    assert all(worker._process.poll() is not None for worker in encoders._workers)


def test_a_worker_that_cannot_start_is_one_message_too(tmp_path, capfd):
    with (
        pytest.raises(UserError, match="ended with status 1"),
        Encoders(build_tokenizer("byte", ()), tmp_path / "nothing", [], 2) as encoders,
    ):
        list(encoders.run([Some("text")]))
    capfd.readouterr()


def test_workers_end_with_their_owner(tmp_path):
    """Even when it is killed and can end nothing itself."""
    build_tokenizer("byte", ()).save(tmp_path)
    code = (
        "import sys, time; from pathlib import Path; from bardling.data.tokens.parallel import _Worker;"
        "w = _Worker(Path(sys.argv[1]), []); print(w._process.pid, flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    pid = int(owner.stdout.readline())
    os.kill(pid, 0)
    owner.kill()
    owner.communicate()
    for _ in range(1200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text()
        except OSError:  # it is gone, perhaps while its line was read
            return
        if state.rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its owner")


def test_default_workers(monkeypatch):
    monkeypatch.setattr(parallel, "cpu_quota", lambda: None)
    for cores, others, fast in ((1, 0, 0), (2, 2, 1), (4, 4, 3), (128, 16, 3)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert default_workers(0, "bpe") == default_workers(1 << 40, "other") == others
        assert default_workers(1 << 40, "bpe", fast=True) == fast  # more would wait for the process that reads
    monkeypatch.setattr(parallel, "cpu_quota", lambda: 2)
    assert (default_workers(0, "bpe"), default_workers(0, "bpe", fast=True)) == (2, 1)
    assert default_workers(1000, "bpe") == default_workers(1 << 40, "byte") == default_workers(1 << 40, "char") == 0


def test_writer_goes_on_where_it_was(tmp_path):
    ids = np.arange(1000) % 300
    for name, width in (("once", 1000), ("often", 7)):
        (tmp_path / name).mkdir()
        with ShardWriter(tmp_path / name, "train", 300, 128) as writer:
            for start in range(0, 1000, width):
                writer.add(ids[start : start + width], text_bytes=width)
            info = writer.finish()
        if name == "once":
            expected = info
    assert info.files == expected.files
    (tmp_path / "again").mkdir()
    for stop in (100, 128, 500, 1000):  # within a file, at its end, some files on
        state = locals().get("state")
        with ShardWriter(tmp_path / "again", "train", 300, 128) as writer:
            if state:
                writer.restore(state)
            start = sum(file["tokens"] for file in state["files"]) + state["begun"] if state else 0
            writer.add(ids[start:stop], text_bytes=stop - start)
            state = writer.sync()
            if stop < 1000:
                writer.add(ids[stop : stop + 200])  # written after the state: must leave no trace
            else:
                assert writer.finish().files == expected.files
    assert content(tmp_path / "again") == content(tmp_path / "once")


def test_writer_notices_a_cut_file(tmp_path):
    with ShardWriter(tmp_path, "train", 300, 128) as writer:
        writer.add(np.arange(200))
        state = writer.sync()
    os.truncate(tmp_path / "train-00001.bin", 10)
    with (
        ShardWriter(tmp_path, "train", 300, 128) as writer,
        pytest.raises(UserError, match=r"train-00001\.bin: is missing or truncated"),
    ):
        writer.restore(state)


def test_journal_of_something_else_or_damaged_is_not_taken(tmp_path):
    book = Journal(tmp_path)
    assert book.read("a") is None
    position = Position("a", 3, "x", 9, {"train": {}, "val": {}})
    book.write(position)
    assert Journal(tmp_path).read("a") == position
    assert Journal(tmp_path).read("b") is None
    (tmp_path / "journal.json").write_text("{")
    assert Journal(tmp_path).read("a") is None


PREPARE = """
import signal, sys, time
from bardling.data.tokens import journal, parallel
from bardling.data.tokens import prepare
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
journal.EVERY = 0.0
prepare._BATCH = prepare._BATCH_OF_WORKER = 2000
write = journal.Journal.write
def slower(*args):
    write(*args)
    time.sleep(0.15)  # long enough to be killed between two, on a busy machine too
journal.Journal.write = slower
prepare.prepare(sys.argv[1], sys.argv[2], "bpe:400", val_fraction=0.2, shard_tokens=10_000, workers=int(sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_killed_at_ten_random_moments_it_ends_with_the_same_bytes(text, tmp_path, small_batches, workers):
    pytest.importorskip("gigatoken")
    prepare(str(text), tmp_path / "whole", "bpe:400", val_fraction=0.2, shard_tokens=10_000, workers=1)
    out, draw, killed = tmp_path / "ds", random.Random(workers), 0
    for _ in range(10):
        child = subprocess.Popen([sys.executable, "-c", PREPARE, str(text), str(out), str(workers)], stderr=subprocess.DEVNULL)
        try:
            child.wait(draw.uniform(0.2, 3))  # anywhere from its first import to its last batch
            break
        except subprocess.TimeoutExpired:
            child.kill()
            killed += child.wait(120) == -signal.SIGKILL
            assert not out.exists()
    assert killed > 2
    if not out.exists():
        prepare(str(text), out, "bpe:400", val_fraction=0.2, shard_tokens=10_000, workers=workers)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize(("how", "workers"), [(signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGINT, 1), (signal.SIGINT, 2)])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(text, tmp_path, monkeypatch, small_batches, how, workers):
    prepare(str(text), tmp_path / "whole", "bpe:400", val_fraction=0.2, shard_tokens=10_000, workers=1)
    out = tmp_path / "ds"
    draw = random.Random(int(how) + workers)
    seen = []
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", PREPARE, str(text), str(out), str(workers)], stderr=subprocess.DEVNULL)
        at = documents_done(out)
        while child.poll() is None and documents_done(out) <= at:  # until it has made some progress of its own
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        child.send_signal(how)
        child.wait(120)
        seen.append(documents_done(out))
        assert not out.exists(), "it was done before it could be killed"
    assert 0 < seen[0] < seen[1] < 400  # the second went on from where the first was
    calls = []
    monkeypatch.setattr(prepare_module, "_tokenizer", lambda *_: calls.append(1))  # must not be trained again
    prepare(str(text), out, "bpe:400", val_fraction=0.2, shard_tokens=10_000, workers=1)
    assert not calls
    assert content(out) == content(tmp_path / "whole")
    assert not work_folder(out).exists()


def test_killed_while_the_journal_is_replaced_it_leaves_no_trace(text, tmp_path, monkeypatch, small_batches):
    prepare(str(text), tmp_path / "whole", "bpe:400", val_fraction=0.2, shard_tokens=10_000, workers=1)
    out = tmp_path / "ds"
    killing = """
import os, pathlib
entries = []
replace = pathlib.Path.replace
def kills(path, target):
    if target.name == "journal.json":
        entries.append(target)
    if len(entries) == 3:
        os.kill(os.getpid(), 9)
    return replace(path, target)
pathlib.Path.replace = kills
"""
    child = subprocess.run([sys.executable, "-c", killing + PREPARE, str(text), str(out), "1"], check=False)
    assert child.returncode == -signal.SIGKILL
    assert list(work_folder(out).glob(".journal.json.*.partial")), "it was to be killed while it wrote the journal"
    prepare(str(text), out, "bpe:400", val_fraction=0.2, shard_tokens=10_000, workers=1)
    assert content(out) == content(tmp_path / "whole")


def test_killed_just_before_the_folder_gets_its_name_it_costs_nothing(text, tmp_path, monkeypatch, small_batches):
    prepare(str(text), tmp_path / "whole", "bpe:400", val_fraction=0.2, shard_tokens=10_000, workers=1)
    out = tmp_path / "ds"
    killing = """
import os, pathlib
pathlib.Path.rename = lambda path, target: os.kill(os.getpid(), 9)
"""
    child = subprocess.run([sys.executable, "-c", killing + PREPARE, str(text), str(out), "1"], check=False)
    assert child.returncode == -signal.SIGKILL
    assert documents_done(out) == 400
    monkeypatch.setattr(prepare_module, "_tokenizer", None)  # must not be trained again
    prepare(str(text), out, "bpe:400", val_fraction=0.2, shard_tokens=10_000, workers=1)
    assert content(out) == content(tmp_path / "whole")


def test_a_process_that_comes_at_the_very_end_finds_the_dataset(text, tmp_path, monkeypatch):
    out, sync, found = tmp_path / "ds", journal.sync_folder, []

    def comes() -> None:
        with pytest.raises(UserError, match="already exists"):
            prepare(str(text), out, "byte", val_fraction=0.2)
        found.append(open_dataset(out).verify())

    other = threading.Thread(target=comes)

    def slowly(folder: Path) -> None:
        if folder == work_folder(out):
            other.start()
            time.sleep(0.3)
        sync(folder)

    monkeypatch.setattr(journal, "sync_folder", slowly)
    prepare(str(text), out, "byte", val_fraction=0.2)
    other.join(300)
    assert found == [[]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ds"]
    assert not (out / "lock").exists()
    assert not (out / "journal.json").exists()


def documents_done(out: Path) -> int:
    try:
        return json.loads((work_folder(out) / "journal.json").read_text())["documents"]
    except FileNotFoundError:
        return 0


def test_a_changed_source_begins_anew(text, tmp_path, monkeypatch, small_batches):
    source = tmp_path / "text.jsonl"
    source.write_bytes(text.read_bytes())
    monkeypatch.setattr(journal, "EVERY", 0.0)
    real = Tokenizer.encode_batch
    calls = []

    def fails_later(self, texts):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", fails_later)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(source), tmp_path / "ds", "byte", val_fraction=0.2)
    assert documents_done(tmp_path / "ds") > 0
    source.write_bytes(text.read_bytes() + b'{"text": "one more"}\n')
    changed = prepare(str(source), tmp_path / "ds", "byte", val_fraction=0.2)
    fresh = prepare(str(source), tmp_path / "fresh", "byte", val_fraction=0.2)
    assert changed.fingerprint == fresh.fingerprint
    assert changed.verify() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ds", "fresh", "text.jsonl"]


@pytest.mark.parametrize("workers", [0, 65])
def test_workers_are_limited(text, tmp_path, workers):
    with pytest.raises(UserError, match=f"workers = {workers}: must be at least 1 and at most 64"):
        prepare(str(text), tmp_path / "ds", "byte", workers=workers)
