"""Items of multiple-choice tasks: files good and bad, the hub, and draws without bias."""

import gzip
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bardling.errors import UserError
from bardling.evaluate.tasks import (
    ChoiceItem,
    HubFile,
    check_task,
    draw_items,
    load_items,
    read_hub_items,
    read_items,
    task_name,
)

ROW = {
    "ind": 24,
    "activity_label": "Roofing",
    "ctx": "A man sits. he",
    "endings": ["falls.", "smiles.", "runs.", "eats."],
    "label": "3",
}
PARTS = {
    **ROW,
    "ctx_a": "[header] How to sit [title] Sit down.",
    "ctx_b": "the Man",
    "endings": ["[step] x [title] y", "b"],
    "label": 1,
}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_file_is_read_whatever_its_name(tmp_path, pack):
    path = tmp_path / "own.jsonl"
    number = {**ROW, "label": 2}
    del number["ind"]
    path.write_bytes(pack(b"\xef\xbb\xbf" + lines(ROW) + b"\n" + lines(number)))
    first, second = load_items(str(path))
    assert first == ChoiceItem("A man sits. he", ("falls.", "smiles.", "runs.", "eats."), 3, "24")
    assert (second.label, second.id) == (2, "line 3")


def test_a_context_in_two_parts(tmp_path):
    path = tmp_path / "parts.jsonl"
    row = {key: value for key, value in PARTS.items() if key != "ctx"}
    path.write_bytes(lines(row, {**row, "ctx_b": ""}))
    first, second = read_items(path)
    assert first.context == "[header] How to sit [title] Sit down. the Man"
    assert second.context == "[header] How to sit [title] Sit down."


BAD = {
    "empty": (b"", "contains no items"),
    "blank": (b"\n  \n", "contains no items"),
    "cut": (lines(ROW) + lines(ROW)[:40], "line 2: is not valid JSON"),
    "array": (b"[1, 2]\n", "item 1: is not a JSON object"),
    "nested": (b"[" * 100_000 + b"\n", "bad.jsonl: is not valid JSON"),
    "binary": (b"PK\x03\x04\xff\xfe\x00", "line 1: is not UTF-8"),
    "digits": (b'{"label": ' + b"9" * 10_000 + b"}", "line 1: is not valid JSON"),
    "one line": (b"x" * ((1 << 20) + 1), "line 1: is longer than 1 MiB"),
    "gzip cut": (gzip.compress(lines(*[ROW] * 50))[:-20], "gzip data is corrupt or truncated"),
    "gzip damaged": (gzip.compress(lines(ROW))[:12] + b"\xff" * 40, "gzip data is corrupt or truncated"),
    "gzip bomb": (gzip.compress(b" " * (1 << 24)), "line 1: is longer than 1 MiB"),
    "no context": (lines({k: v for k, v in ROW.items() if k != "ctx"}), "line 1: ctx = nothing: must be a string"),
    "context of spaces": (lines({**ROW, "ctx": "  "}), "line 1: ctx is empty"),
    "context a number": (lines({**ROW, "ctx": 3}), "line 1: ctx = 3: must be a string"),
    "no endings": (lines(ROW, {**ROW, "endings": None}), "line 2: endings = nothing: must be a list"),
    "one ending": (lines({**ROW, "endings": ["a"]}), "line 1: endings = .*2 to 64 strings"),
    "many endings": (lines({**ROW, "endings": ["a"] * 65}), "line 1: endings = .*2 to 64 strings"),
    "empty ending": (lines({**ROW, "endings": ["a", " "]}), r"line 1: endings\[1\] = ' ': must be a non-empty string"),
    "ending a list": (lines({**ROW, "endings": ["a", ["b"]]}), r"line 1: endings\[1\] = \['b'\]"),
    "no answer": (lines({**ROW, "label": ""}), "line 1: label is empty: .*use the validation split"),
    "label too large": (lines({**ROW, "label": "4"}), "line 1: label = '4': must be the index of the right ending, 0 to 3"),
    "label negative": (lines({**ROW, "label": -1}), "line 1: label = -1"),
    "label a boolean": (lines({**ROW, "label": True}), "line 1: label = True"),
    "label a fraction": (lines({**ROW, "label": 1.0}), "line 1: label = 1.0"),
    "label in other digits": (lines({**ROW, "label": "٢"}), "line 1: label = '٢'"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_errors_name_the_file_line_and_field(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_items(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda s: st.lists(s) | st.dictionaries(st.text(), s),
    )
)
def test_any_json_gives_items_or_a_user_error(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("any") / "any.jsonl"
    for row in (value, {**ROW, "ctx": value}, {**ROW, "endings": value}, {**ROW, "label": value}, {**ROW, "ind": value}):
        path.write_bytes(lines(row))
        try:
            items = read_items(path)
        except UserError:
            continue
        assert all(0 <= item.label < len(item.endings) for item in items)


def test_names_of_tasks(tmp_path):
    path = tmp_path / "my.quiz.jsonl.gz"
    path.write_bytes(gzip.compress(lines(ROW)))
    check_task("hellaswag")
    check_task(str(path))
    assert [task_name(name) for name in ("hellaswag", str(path), "quiz.json", ".jsonl")] == [
        "hellaswag",
        "my.quiz",
        "quiz",
        ".jsonl",
    ]
    with pytest.raises(UserError, match="did you mean 'hellaswag'"):
        load_items("helaswag")
    with pytest.raises(UserError, match="cannot read: is a directory"):
        read_items(tmp_path)


def numbered(count):
    return [ChoiceItem(f"context {index}", ("a", "b"), index % 2, str(index)) for index in range(count)]


def test_a_draw_is_the_same_every_time_and_in_every_order():
    items = numbered(100)
    drawn = draw_items(items, 20, seed=1)
    assert drawn == draw_items(items, 20, seed=1)
    assert set(drawn) == set(draw_items(items[::-1], 20, seed=1))
    assert set(drawn) < set(draw_items(items, 40, seed=1)), "a larger draw contains the smaller"
    assert len(set(drawn)) == 20
    assert [items.index(item) for item in drawn] == sorted(items.index(item) for item in drawn)
    assert drawn != draw_items(items, 20, seed=2)
    assert draw_items(items, None) == draw_items(items, 100) == draw_items(items, 1000) == tuple(items)
    assert len(draw_items(items * 2, 150)) == 150, "repeated items are items"


def test_a_draw_is_without_bias():
    items, times = numbered(40), 2000
    counts = [0] * 40
    for seed in range(times):
        for item in draw_items(items, 10, seed):
            counts[int(item.id)] += 1
    # Chi-squared of 40 counts drawn without replacement: mean 39, standard deviation about 9.
    expected = times * 10 / 40
    spread = sum((count - expected) ** 2 / (expected * (1 - 10 / 40)) for count in counts)
    assert 39 - 4 * 9 < spread < 39 + 4 * 9


# The hub, played by a server of our own.

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        content, status, cut = self.server.content, self.server.status, self.server.cut
        self.server.paths.append(self.path)
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"' + hashlib.sha256(content).hexdigest() + '"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) - cut])

    def log_message(self, *arguments):
        """Silence."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow
    from huggingface_hub import constants

    parquet.write_table(
        pyarrow.Table.from_pylist([{**PARTS, "label": "1"}, {**PARTS, "ind": 25, "label": "0"}]), tmp_path / "x"
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.content, server.status, server.cut, server.paths = (tmp_path / "x").read_bytes(), 200, 0, []
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    server.file = HubFile("some/quiz", REVISION, "data/validation.parquet", hashlib.sha256(server.content).hexdigest())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_items_come_from_the_hub_once(hub):
    items = read_hub_items(hub.file)
    assert [(item.id, item.label, len(item.endings)) for item in items] == [("24", 1, 2), ("25", 0, 2)]
    assert hub.paths[0] == f"/datasets/some/quiz/resolve/{REVISION}/data/validation.parquet"
    hub.shutdown()
    hub.server_close()
    assert read_hub_items(hub.file) == items, "the second time it is there already"


def test_another_file_than_the_pinned_one_is_refused(hub):
    hub.content += b"more"
    with pytest.raises(UserError, match=r"is corrupt \(its SHA-256 is"):
        read_hub_items(hub.file)


def test_a_download_that_fails_says_what_to_do(hub):
    hub.status = 404
    with pytest.raises(UserError, match=r"cannot be downloaded .*404.*or give the path of a HellaSwag file") as caught:
        read_hub_items(hub.file)
    assert "\n" not in str(caught.value)


def test_a_download_that_is_cut_off_gives_no_items(hub):
    hub.cut = 100
    with pytest.raises(UserError, match="cannot be downloaded"):
        read_hub_items(hub.file)


@pytest.mark.parametrize("package", ["huggingface_hub", "pyarrow.parquet"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package {package}.*pip install .*or give the path of a HellaSwag file"):
        load_items("hellaswag")
