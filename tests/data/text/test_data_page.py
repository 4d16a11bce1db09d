"""Every command of docs/data.md runs, on small data made for it; addresses of the page are those of local servers."""

import bz2
import gzip
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from test_formats import lines, packed, table, tar, zstd
from test_named_datasets import fake_hub, parquet
from test_streams_of_text import server

from bardling.cli.main import main
from bardling.data.tokens.shards import open_dataset

PAGE = Path(__file__).parents[3] / "docs" / "data.md"
BLOCK = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
COMMANDS = [line for line in BLOCK.splitlines() if not line.startswith("#")]
PREPARED = [command for command in COMMANDS if "bardling prepare" in command]
ARTICLES = [
    {"title": f"T{n}", "body": f"body {n} " * 9, "text": f"text {n} " * 9, "meta": {"summary": f"sum {n}"}} for n in range(6)
]

__all__ = ["fake_hub", "server"]  # fixtures


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the page names, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BARDLING_CACHE", str(tmp_path / "cache"))
    text, stories = "A line of text.\n" * 50, [f"Story {n}.\nThe end." for n in range(5)]
    files = {
        "book.txt": text,
        "notes/a.md": "# Note\n" * 9,
        "notes/b.txt": "text\n" * 9,
        "project/main.py": "print('hello')\n" * 9,
        "project/deep/more.py": "import sys\n" * 9,
        "project/logo.png": b"\x89PNG\r\n\x1a\n",
        "stories.txt": "\n<|endoftext|>\n".join(stories),
        "poems.txt": "\n\n".join(stories),
        "articles.jsonl": lines(ARTICLES),
        "posts.json": json.dumps(ARTICLES, indent=1),
        "reviews.csv": 'stars,review\n5,"good, very"\n1,bad\n',
        "wiki/a.parquet": parquet(["one", "two"]),
        "wiki/b.parquet": parquet(["three"]),
        "saved/data-00000-of-00001.arrow": table("stream"),
        "saved/dataset_info.json": '{"builder_name": "json"}',
        "saved/state.json": '{"_data_files": []}',
        "corpus.jsonl.zst": zstd(lines()),
        "texts.zip": packed({"a.txt": b"text a" * 9, "b.txt": b"text b" * 9}),
        "shards/0.tar": tar({"0.txt": b"caption 0", "0.jpg": b"\xff\xd8\xff", "1.txt": b"caption 1"}),
        "captions/0.tar": tar({f"{n}.json": json.dumps({"caption": f"caption {n}"}).encode() for n in range(3)}),
        "corpus.txt.gz": gzip.compress(text.encode()),
        "old.txt": "déjà vu, œuvre\n".encode("cp1252") * 9,
        "mixed/a.txt": text,
        "mixed/b.jsonl.bz2": bz2.compress(lines()),
        "mixed/c.parquet": table("parquet"),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return tmp_path


EXPECTED = {
    "book": (1, "A line of text."), "notes": (2, "# Note"), "code": (2, "print('hello')"), "python": (2, "import sys"),
    "stories": (5, "Story 0.\nThe end."), "poems": (5, "Story 4."), "articles": (6, "text 0"), "bodies": (6, "body 0"),
    "titled": (6, "T0\n\nbody 0"), "summaries": (6, "sum 0"), "posts": (6, "text 0"), "reviews": (2, "good, very"),
    "wiki": (3, "three"), "saved": (2, "one é\nline"), "corpus": (2, "one é\nline"), "texts": (2, "text a"),
    "shards": (2, "caption 0"), "captions": (3, "caption 2"), "piped": (1, "A line of text."), "hub": (3, "Once"),
    "streamed": (3, "Once"), "web": (2, "one é\nline"), "bucket": (2, "one é\nline"), "old": (1, "déjà vu, œuvre"),
    "mixed": (5, "A line of text."),
}  # documents, and text in one of them  # fmt: skip


def test_the_page_answers_for_many_kinds_of_data() -> None:
    assert [re.search(r"--out data/(\S+)", command)[1] for command in PREPARED] == list(EXPECTED)
    assert len(EXPECTED) >= 15


@pytest.mark.parametrize("command", PREPARED)
def test_a_command_of_the_page_prepares_its_text(command: str, data: Path, request: pytest.FixtureRequest) -> None:
    fsspec = pytest.importorskip("fsspec")
    monkeypatch = request.getfixturevalue("monkeypatch")
    left, pipe, right = command.rpartition(" | ")
    if pipe:
        assert left.startswith("zcat ")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.decompress(Path(left.split()[1]).read_bytes()))))
    if "hf:" in command:
        hub = request.getfixturevalue("fake_hub")
        hub.add("roneneldan/TinyStories", {"data/train-00000.parquet": parquet(["Once upon", "Once more", "Once"])})
    if "https://example.com" in command:
        web = request.getfixturevalue("server")
        web.files["corpus.jsonl.gz"] = gzip.compress(lines())
        right = right.replace("https://example.com", web.url)
    if "s3://" in command:
        fsspec.filesystem("memory").pipe("/bucket/corpus/a.jsonl", lines())
        right = right.replace("s3://", "memory://")
    arguments = shlex.split(right)[1:]
    assert main(arguments) in (0, None)
    name = re.search(r"--out data/(\S+)", command)[1]
    dataset = open_dataset(data / "data" / name)
    documents, text = EXPECTED[name]
    manifest = dataset.manifest
    assert manifest.train.documents + manifest.val.documents == (documents if documents > 1 else 2), "or its two parts"
    splits = [dataset.split(name) for name in ("train", "val")]
    found = b"".join(split.read(0, len(split)).astype("u1").tobytes() for split in splits)
    assert text.encode() in found


@pytest.mark.slow
def test_training_on_the_result(data: Path, bardling) -> None:
    (command,) = [command for command in COMMANDS if "bardling train" in command]
    main(["prepare", "book.txt", "--out", "data/book"])
    small = ["--train.steps", "2", "--model.n_layer", "1", "--train.batch_size", "2", "--out", "runs/x"]
    bardling(*shlex.split(command)[1:], *small, cwd=data)
