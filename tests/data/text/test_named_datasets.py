"""Named datasets and datasets from a hub, which is a local server with the hub's protocol."""

import gzip
import hashlib
import http.server
import io
import json
import re
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

from bardling.config import DataConfig
from bardling.data.text import named_datasets as datasets
from bardling.data.text.download import Remote
from bardling.data.text.named_datasets import DEFAULTS, HubSource, RemoteText, documents_after, source_for
from bardling.data.tokens import gpt2_bpe
from bardling.data.tokens import prepare as prepare_module
from bardling.data.tokens.dataset import open_data
from bardling.data.tokens.gpt2_bpe import vocabulary_digest
from bardling.data.tokens.prepare import prepare
from bardling.data.tokens.tokenizer import build_tokenizer
from bardling.errors import UserError
from http_handler import Handler

pyarrow = pytest.importorskip("pyarrow")
constants = pytest.importorskip("huggingface_hub.constants")

MAIN, CONVERTED = "a" * 40, "b" * 40


def parquet(texts, field="text", group=3, **columns) -> bytes:
    import pyarrow.parquet

    buffer = io.BytesIO()
    table = pyarrow.table({"number": list(range(len(texts))), field: texts, **columns})
    pyarrow.parquet.write_table(table, buffer, row_group_size=group)
    return buffer.getvalue()


class Hub(http.server.ThreadingHTTPServer):
    """Repositories in memory: {(kind, name): {"card": {}, "files": {revision: {path: bytes}}, "status": ...}}."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories, self.requests, self.damage = {}, [], {}
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def add(self, name, files, card=None, converted=None, kind="datasets"):
        revisions = {"main": files, **({"refs/convert/parquet": converted} if converted else {})}
        self.repositories[kind, name] = {"card": card or {}, "files": revisions, "error": None}


class HubHandler(Handler):
    def do_GET(self):  # noqa: N802 (the name that http.server calls)
        path = urllib.parse.urlparse(self.path).path
        self.server.requests.append((self.command, path))
        match = re.fullmatch(r"/api/datasets/([\w-]+/[\w-]+)(?:/(revision|tree)/([^/]+)(?:/.*)?)?", path)
        file = re.fullmatch(r"/(datasets/)?([\w-]+/[\w-]+)/resolve/([^/]+)/(.+)", path)
        kind, name = ("datasets", match[1]) if match else ("datasets" if file[1] else "models", file[2])
        repository = self.server.repositories.get((kind, name))
        if repository is None:
            return self.answer(b"{}", 401, X_Error_Code="RepoNotFound")
        if repository["error"]:
            return self.answer(b"{}", *repository["error"][:1], **repository["error"][1])
        asked = urllib.parse.unquote((match[3] if match else file[3]) or "main")
        revision = {MAIN: "main", CONVERTED: "refs/convert/parquet"}.get(asked, asked)
        if revision not in repository["files"]:
            return self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
        files, sha = repository["files"][revision], MAIN if revision == "main" else CONVERTED
        if match and match[2] != "tree":
            about = {"id": name, "sha": sha, "cardData": repository["card"], "siblings": [], "tags": [], "private": False}
            return self.answer(json.dumps(about).encode(), Content_Type="application/json")
        if match:
            entries = [{"type": "directory", "path": "data", "oid": "0"}]
            for path, data in files.items():
                digest = hashlib.sha256(data).hexdigest()
                large = {"lfs": {"oid": digest, "size": len(data), "pointerSize": 130}} if path.endswith("parquet") else {}
                entries.append({"type": "file", "path": path, "size": len(data), "oid": digest[:40], **large})
            return self.answer(json.dumps(entries).encode(), Content_Type="application/json")
        path = urllib.parse.unquote(file[4])
        if path not in files:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound")
        data = self.server.damage.get(path, files[path])
        about = {"X_Repo_Commit": sha, "ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"'}
        if bounds := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            return self.answer(data[int(bounds[1]) : int(bounds[2]) + 1], 206, **about)
        return self.answer(data, **about)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("BARDLING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    yield server
    server.shutdown()
    server.server_close()


def texts(source) -> list[str]:
    return [document.text for document in source.documents()]


TEN = [f"text number {i}" for i in range(10)]


def test_conventionally_named_files_in_order_without_empty_rows(fake_hub):
    files = {f"data/train-0000{i}-of-00002.parquet": parquet([*TEN[5 * i :][:5], "", None]) for i in range(2)}
    fake_hub.add("me/set", {**files, "data/test-00000.parquet": parquet(["no"]), "README.md": b"x"})
    source = source_for("hf:me/set")
    assert texts(source) == texts(source) == TEN
    assert source.name == "set"
    assert next(iter(source.documents())).name == "data/train-00000-of-00002.parquet:0"
    assert texts(source_for("hf:me/set::test")) == ["no"]
    assert source.size() > sum(map(len, TEN))  # an estimate, Parquet's own bytes included


def test_the_card_lists_configurations_splits_and_patterns(fake_hub):
    files = {
        "sample/10BT/000.parquet": parquet(["small"], field="body"),
        "sample/10BT/deep/000.parquet": parquet(["not meant"], field="body"),
        "data/CC/a/000.parquet": parquet(["whole"], field="body"),
        "one.parquet": parquet(["plain"], field="body"),
    }
    card = {
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*/*"}]},
            {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": ["sample/10BT/*"]}]},
            {"config_name": "deep", "data_files": [{"split": "held", "path": "sample/**/*.parquet"}]},
            {"config_name": "plain", "data_files": "one.parquet"},
        ]
    }
    fake_hub.add("me/set", files, card)
    assert texts(source_for("hf:me/set:::body")) == ["whole"]
    assert texts(source_for("hf:me/set:sample-10BT::body")) == ["small"]
    assert texts(source_for("hf:me/set:deep:held:body")) == ["small", "not meant"]
    assert texts(source_for("hf:me/set:plain:train:body")) == ["plain"]
    with pytest.raises(UserError, match=r"no configuration or split 'sample-10B:train'.*it has default, sample-10BT"):
        texts(source_for("hf:me/set:sample-10B"))


def test_other_formats_are_read_from_the_hubs_parquet_conversion(fake_hub):
    converted = {"plain_text/train/0000.parquet": parquet(TEN), "plain_text/test/0000.parquet": parquet(["t"])}
    fake_hub.add("me/script", {"script.py": b"raise SystemExit", "x.zip": b""}, converted=converted)
    assert texts(source_for("hf:me/script")) == TEN
    assert texts(source_for("hf:me/script:plain_text:test")) == ["t"]
    with pytest.raises(UserError, match=r"no split 'valid'.*it has test, train"):
        texts(source_for("hf:me/script::valid"))
    with pytest.raises(UserError, match=r"no configuration 'plain'.*did you mean 'plain_text'"):
        texts(source_for("hf:me/script:plain"))


def test_a_partial_conversion_is_used_only_by_name(fake_hub):
    fake_hub.add("me/big", {"x.warc": b""}, converted={"default/partial-train/0000.parquet": parquet(TEN)})
    with pytest.raises(UserError, match=r"only the first part.*hf:me/big:default:partial-train"):
        texts(source_for("hf:me/big"))
    assert texts(source_for("hf:me/big:default:partial-train")) == TEN


def test_json_lines_plain_and_gzipped(fake_hub):
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEN)
    card = {"configs": [{"config_name": "x", "data_files": ["a.jsonl", "b.jsonl.gz"]}]}
    fake_hub.add("me/lines", {"a.jsonl": lines, "b.jsonl.gz": gzip.compress(lines)}, card)
    source = source_for("hf:me/lines")
    assert texts(source) == TEN * 2
    assert [d.text for d in documents_after(source, 13, "b.jsonl.gz:2")] == TEN[3:]
    assert source.size() == 0
    with pytest.raises(UserError, match=r"a.jsonl: line 1 has no field 'txt' \(did you mean 'text'"):
        texts(source_for("hf:me/lines:::txt"))


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
def test_streaming_keeps_no_file_and_resumes_at_the_last_document(fake_hub, tmp_path, kind):
    rows = [TEN[:4], TEN[4:7], TEN[7:]]
    parts = {f"train-{i}.{kind}": packed_rows(texts, kind) for i, texts in enumerate(rows)}
    card = {"configs": [{"config_name": "x", "data_files": [f"*.{kind}"]}]}
    fake_hub.add("me/set", parts, card)
    source = source_for("hf:me/set", stream=True)
    every = list(source.documents())
    assert [document.text for document in every] == TEN
    assert every == list(source_for("hf:me/set", stream=True).documents())
    fetched = len([path for _, path in fake_hub.requests if path.endswith(f"train-0.{kind}")])
    assert [document.text for document in documents_after(source, 6, every[5].name)] == TEN[6:]
    assert len([path for _, path in fake_hub.requests if path.endswith(f"train-0.{kind}")]) == fetched, "it is done"
    streamed = prepare("hf:me/set", tmp_path / "a", "byte", stream=True)
    assert not list((tmp_path / "hf").rglob(f"*.{kind}")), "nothing may be kept on disk"
    assert source.identity() == source_for("hf:me/set").identity()
    assert prepare("hf:me/set", tmp_path / "b", "byte").fingerprint == streamed.fingerprint
    assert texts(source_for("hf:me/set", field="{number}: {text}", stream=True))[:2] == ["0: text number 0", "1: text number 1"]


def packed_rows(texts: list[str], kind: str) -> bytes:
    if kind == "parquet":
        return parquet(texts, group=2)
    lines = b"".join(json.dumps({"number": number, "text": text}).encode() + b"\n" for number, text in enumerate(texts))
    return gzip.compress(lines) if kind.endswith("gz") else lines


def test_a_hub_that_ends_while_it_is_read(fake_hub):
    fake_hub.add("me/set", {"train.parquet": parquet([text * 9000 for text in TEN])})
    source = source_for("hf:me/set", stream=True)
    documents = source.documents()
    assert next(documents).text.startswith("text number 0")
    fake_hub.damage["train.parquet"] = b""
    with pytest.raises(UserError, match=r"hf:me/set/train.parquet: is damaged|cannot be read"):
        list(source_for("hf:me/set", stream=True).documents())


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("stdlib", {"stream": True}, "is not a dataset on the hub"),
        ("shakespeare", {"field": "x"}, "has no fields"),
        ("hf:me/set", {"separator": "x"}, "has no text files to divide"),
        ("hf:me/set:::body", {"field": "text2"}, "names another field, 'body'"),
    ],
)
def test_settings_that_do_not_fit_a_source(spec, options, message):
    with pytest.raises(UserError, match=message):
        source_for(spec, **options)


def test_resuming_after_any_document_skips_the_earlier_ones(fake_hub):
    parts = {f"train-{i}.parquet": parquet(TEN[3 * i :][:3] + [None, ""] * i, group=2) for i in range(3)}
    fake_hub.add("me/set", parts)
    source = source_for("hf:me/set")
    every = list(source.documents())
    for count, document in enumerate(every, 1):
        assert list(documents_after(source, count, document.name)) == every[count:]


def test_a_resolved_dataset_stays_the_same_without_network(fake_hub):
    fake_hub.add("me/set", {"train.parquet": parquet(TEN)})
    identity = source_for("hf:me/set").identity()
    assert texts(source_for("hf:me/set")) == TEN
    fake_hub.requests.clear()
    fake_hub.add("me/set", {"train.parquet": parquet(["changed"])})
    assert source_for("hf:me/set").identity() == identity
    assert texts(source_for("hf:me/set")) == TEN
    assert fake_hub.requests == []
    assert source_for("hf:me/set:::number").identity() != identity


def test_prepared_in_parallel_and_after_an_interruption_alike(fake_hub, tmp_path, monkeypatch):
    many = [f"{i} words and words" for i in range(300)]
    fake_hub.add("me/set", {f"train-{i}.parquet": parquet(many[100 * i :][:100]) for i in range(3)})
    monkeypatch.setattr(prepare_module, "_BATCH", 400)
    monkeypatch.setattr(prepare_module, "_BATCH_OF_WORKER", 300)
    for workers in (1, 2):
        prepare("hf:me/set", tmp_path / f"by{workers}", "byte", val_fraction=0.1, workers=workers)
    monkeypatch.setattr("bardling.data.tokens.journal.EVERY", 0.0)
    real, calls = prepare_module.ProgressBar.update, []

    def stop(self, doing, done, total):
        calls.append(done)
        if len(calls) == 7:
            raise KeyboardInterrupt
        real(self, doing, done, total)

    monkeypatch.setattr(prepare_module.ProgressBar, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare("hf:me/set", tmp_path / "again", "byte", val_fraction=0.1)
    fingerprints = [prepare_module.open_dataset(tmp_path / f"by{n}").fingerprint for n in (1, 2)]
    assert [prepare("hf:me/set", tmp_path / "again", "byte", val_fraction=0.1).fingerprint, *fingerprints] == fingerprints[
        :1
    ] * 3
    assert calls[7] > calls[6]  # it resumed instead of starting over


def test_damaged_files_are_removed_and_fetched_again(fake_hub, tmp_path):
    good = parquet(TEN)
    fake_hub.add("me/set", {"train.parquet": good})
    fake_hub.damage["train.parquet"] = good[:50] + b"\0" + good[51:]
    with pytest.raises(UserError, match=r"train.parquet arrived damaged.*was removed: try again"):
        texts(source_for("hf:me/set"))
    fake_hub.damage.clear()
    assert texts(source_for("hf:me/set")) == TEN


def test_wrong_names_fields_and_kinds(fake_hub):
    fake_hub.add("me/set", {"train.parquet": parquet(TEN), "test.parquet": b"PAR1 no parquet PAR1"})
    with pytest.raises(UserError, match=r"hf:me/nothing: does not exist on the hub, or is private.*HF_TOKEN"):
        texts(source_for("hf:me/nothing"))
    with pytest.raises(UserError, match=r"has no field 'txt' \(did you mean 'text'\?\); it has 'number', 'text'"):
        texts(source_for("hf:me/set:::txt"))
    with pytest.raises(UserError, match=r"field 'number' contains int64, not text"):
        texts(source_for("hf:me/set:::number"))
    with pytest.raises(UserError, match="is damaged Parquet data"):
        texts(source_for("hf:me/set::test"))
    with pytest.raises(UserError, match="no configuration or split 'default:valid'"):
        texts(source_for("hf:me/set::valid"))
    for spec in ("hf:", "hf:a:b:c:d:e"):
        with pytest.raises(UserError, match=r"specified as hf:NAME\[:CONFIG\]\[:SPLIT\]\[:FIELD\]"):
            source_for(spec)
    with pytest.raises(UserError, match="is not a valid repository name"):
        texts(source_for("hf:../../etc"))
    fake_hub.repositories["datasets", "me/set"]["error"] = (403, {"X_Error_Code": "GatedRepo"})
    with pytest.raises(UserError, match="is gated"):
        texts(source_for("hf:me/set:other"))


def test_without_network_the_error_names_the_remedy(fake_hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)  # the hub's library tries again for 20 seconds
    with pytest.raises(UserError, match=r"hf:me/set: cannot be downloaded from http://127.0.0.1:9.*use local files") as caught:
        texts(source_for("hf:me/set"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"data.tokenizer = 'gpt2'.*--data.tokenizer PATH/tokenizer.json"):
        build_tokenizer("gpt2", ())


@pytest.mark.parametrize("package", ["huggingface_hub", "pyarrow"])
def test_without_the_extra_the_error_names_it(fake_hub, monkeypatch, package):
    fake_hub.add("me/set", {"train.parquet": parquet(TEN)})
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"needs the package.*pip install 'bardling\[datasets\]'"):
        texts(source_for("hf:me/set"))


@pytest.fixture
def shakespeare(fake_hub, monkeypatch):
    """The text of that name, in small, from the local server."""
    text = "To be, or not to be.\n" * 50
    fake_hub.add("karpathy/char-rnn", {"input.txt": text.encode()}, kind="models")
    url = f"http://127.0.0.1:{fake_hub.server_port}/karpathy/char-rnn/resolve/main/input.txt"
    remote = Remote((url,), len(text), hashlib.sha256(text.encode()).hexdigest())
    monkeypatch.setattr(datasets, "TINY_SHAKESPEARE", remote)
    return text


def test_shakespeare_is_fetched_once_and_split_as_in_nanogpt(shakespeare, fake_hub):
    tokenizer, fraction = DEFAULTS["shakespeare-char"]
    config = DataConfig(source="shakespeare-char", tokenizer=tokenizer, val_fraction=fraction)
    dataset = open_data(config)
    assert len(dataset.split("train")) == int(len(shakespeare) * 0.9)
    assert dataset.vocab_size == len(set(shakespeare))
    before = len(fake_hub.requests)
    assert open_data(config).path == dataset.path  # the prepared one, without a look at the text
    open_data(DataConfig(source="shakespeare", tokenizer="byte", val_fraction=0.1))
    assert len(fake_hub.requests) == before


def test_shakespeare_offline_names_the_remedy(fake_hub, monkeypatch):
    monkeypatch.setattr(datasets, "TINY_SHAKESPEARE", Remote(("http://127.0.0.1:9/x",), 5, "0" * 64))
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(UserError, match=r"use a local copy of the text with --data.source FILE"):
        texts(source_for("shakespeare"))


def test_names():
    assert source_for("openwebtext") == HubSource("openwebtext", "Skylion007/openwebtext")
    assert source_for("fineweb-edu") == HubSource("fineweb-edu", "HuggingFaceFW/fineweb-edu", "sample-10BT")
    for name, (tokenizer, fraction) in DEFAULTS.items():
        DataConfig(source=name, tokenizer=tokenizer, val_fraction=fraction)
        assert source_for(name).name == name
    assert isinstance(source_for("shakespeare"), RemoteText)
    assert source_for("shakespeare").size() == 1_115_394
    with pytest.raises(UserError, match="did you mean 'openwebtext'"):
        source_for("openwebtxt")


def test_a_file_of_that_name_is_reached_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shakespeare").write_text("mine")
    assert texts(source_for("./shakespeare")) == ["mine"]


def test_gpt2_tokenizer_comes_from_the_hub_once_and_no_other_is_taken(fake_hub, monkeypatch):
    content = json.dumps({**build_tokenizer("bpe:300", ["some text to learn from"])._content, "version": "1.0"}).encode()
    fake_hub.add("openai-community/gpt2", {"tokenizer.json": content}, kind="models")
    with pytest.raises(UserError, match=r"is not GPT-2's tokenizer.*--data.tokenizer PATH/tokenizer.json"):
        build_tokenizer("gpt2", ())
    monkeypatch.setattr(gpt2_bpe, "GPT2_DIGEST", vocabulary_digest(json.loads(content)))
    fake_hub.requests.clear()
    assert build_tokenizer("gpt2", ()).encode("some").size >= 1
    assert fake_hub.requests == []
