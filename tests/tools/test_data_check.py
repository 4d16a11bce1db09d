"""`bardling data check` finds what is planted in real text, with its files, and nothing in clean text."""

import json
import random
import re
import sysconfig
from pathlib import Path

import pytest

from bardling.cli.main import main
from bardling.config import DataConfig
from bardling.data.text import sources
from bardling.data.text.sources import open_source
from bardling.data.tokens import split_text
from bardling.data.tokens.prepare import held_out, prepare
from bardling.data.tokens.shards import open_dataset
from bardling.data.tokens.split_text import open_split_text
from bardling.tools import data_check
from bardling.tools.data_check import dataset_report, describe, start_check

PARTS, CHARACTERS = 160, 3000
ITEM = "The quick researcher opened the heavy door of the old laboratory and carefully looked at the"
ENDING = "strange machine that hummed in the dark corner of the room."
KEY = "AKIA" + "QWERTZUIOPASDFG2"


def parts():
    """Real text, each part from another module of the standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py"))]
    long = [text[-CHARACTERS:] for text in texts if len(text) > 2 * CHARACTERS]
    assert len(long) >= 100
    return long[:PARTS]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The folder, and the names of what is planted."""
    folder, draw = tmp_path_factory.mktemp("planted"), random.Random(0)
    texts = {f"part-{number:03}.txt": text for number, text in enumerate(parts())}
    train = [name for name, text in texts.items() if not held_out(text, 0.05)]
    val = [name for name in texts if name not in train]
    names = {"copied": train[10], "similar": train[20], "leaked": val[0]}
    texts["copy.txt"] = texts[train[10]]
    words = texts[train[20]].split(" ")
    for place in draw.sample([place for place, word in enumerate(words) if word], 6):
        words[place] = "changed"
    texts["similar.txt"] = " ".join(words)
    leak = " ".join(texts[val[0]].split()[100:200])
    plants = {"leak": leak, "item": f"\n{ITEM} {ENDING}\n", "secret": f"\nkey {KEY}\n"}
    for what, text in plants.items():
        # the first part that is still for training with the text inside
        name = next(
            name for name in train[30:] if name not in names.values() and not held_out(with_text(texts[name], text), 0.05)
        )
        names[what], texts[name] = name, with_text(texts[name], text)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    items = folder.parent / "items.jsonl"
    rows = [{"ind": 7, "ctx": ITEM, "endings": [ENDING, "sun."], "label": 0}]
    rows.append({"ind": 8, "ctx": ITEM.replace("researcher", "dog"), "endings": ["barked.", "sun."], "label": 0})
    rows[1]["ctx"] = "Nobody has ever written this sentence into a module because it speaks of a"
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, items, names


def with_text(text, inside):
    return f"{text[:1000]} {inside} {text[1000:]}"


def finding(report, start):
    (found,) = [found for found in report["findings"] if found["title"].startswith(start)]
    return found


@pytest.fixture(scope="module")
def report(planted, tmp_path_factory):
    folder, items, _ = planted
    out = tmp_path_factory.mktemp("out")
    command = ["data", "check", str(folder), "--tasks", str(items), "--tokenizer", "bpe:500"]
    main([*command, "--json", str(out / "r.json"), "--page", str(out / "r.html"), "--dedup", str(out / "clean")])
    return json.loads((out / "r.json").read_text()), out


def test_planted_copies_are_found_with_their_files(planted, report):
    names = planted[2]
    exact = finding(report[0], "exact copies")
    assert exact["count"] == 1
    assert {exact["examples"][0]["document"], exact["examples"][0]["twin"]} == {"copy.txt", names["copied"]}
    near = finding(report[0], "near-duplicates")
    pairs = [{example["document"], example["twin"]} for example in near["examples"]]
    assert {"similar.txt", names["similar"]} in pairs


def test_a_planted_leak_is_found_with_its_files(planted, report):
    found = finding(report[0], "validation documents")
    assert found["severity"] == "serious"
    (leak,) = [example for example in found["examples"] if example["document"] == planted[2]["leaked"]]
    assert leak["twin"] == planted[2]["leak"]
    assert int(re.search(r"longest passage has ([\d,]+) words", leak["text"])[1]) >= 100


def test_a_planted_task_item_is_found_with_its_file(planted, report):
    found = finding(report[0], "task items")
    assert (found["severity"], found["count"]) == ("serious", 1)
    assert found["title"].endswith("1 of 2")
    assert found["examples"][0]["document"] == planted[2]["item"]
    assert "100% of item 7" in found["examples"][0]["text"]


def test_a_planted_secret_is_found_and_masked(planted, report):
    found = finding(report[0], "strings that look like secrets: AWS access key (1)")
    (example,) = found["examples"]
    text = (planted[0] / example["document"]).read_text()
    assert example["document"] == planted[2]["secret"]
    assert KEY in text.splitlines()[example["line"] - 1]
    written = [path.read_text() for path in report[1].glob("r.*")]
    assert len(written) == 2
    assert all(KEY not in text for text in written)


def test_sizes_add_up(planted, report):
    texts = [path.read_text() for path in planted[0].iterdir()]
    sizes = report[0]["sizes"].values()
    assert sum(size["documents"] for size in sizes) == len(texts)
    assert sum(size["characters"] for size in sizes) == sum(map(len, texts))
    assert sum(count for _, count in report[0]["lengths"]["bars"]) == len(texts)
    assert report[0]["kinds"][0]["name"] == "Latin"
    assert report[0]["languages"]["shares"][0][0] == "en"
    assert report[0]["tokens"]["vocabulary"] == 500
    assert report[0]["sequences"]


def test_the_page_needs_nothing_else(report):
    page = (report[1] / "r.html").read_text()
    assert "<script" not in page
    assert not re.search(r"(src|href)=", page)
    assert "default-src 'none'" in page
    assert page.count("<svg") >= 2


def test_the_clean_copy_is_a_source_without_copies(planted, report):
    folder, _, names = planted
    clean = report[1] / "clean"
    removed = [json.loads(line) for line in (clean / "removed.jsonl").read_text().splitlines()]
    reasons = {(row["name"], row["kept"]): row for row in removed}
    exact = reasons.get(("copy.txt", names["copied"])) or reasons[names["copied"], "copy.txt"]
    assert (exact["reason"], exact["similarity"]) == ("exact copy", 1.0)
    near = reasons.get(("similar.txt", names["similar"])) or reasons[names["similar"], "similar.txt"]
    assert near["reason"].startswith("near-duplicate")
    assert 0.8 <= near["similarity"] < 1
    documents = list(open_source(str(clean / "documents.jsonl")).documents())
    assert len(documents) == len(list(folder.iterdir())) - len(removed)
    check = start_check(open_split_text(DataConfig(source=str(clean / "documents.jsonl"))), (), lambda *_: None)
    assert not check.groups
    kept = {text for _, text in documents}
    for path in folder.iterdir():  # what is held out stays, where it has no copy that is held out
        if held_out(path.read_text(), 0.05) and path.name not in {row["name"] for row in removed}:
            assert path.read_text() in kept


def test_nothing_is_overwritten(planted, report, tmp_path, capsys):
    out = report[1]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for option, path in (("--json", "r.json"), ("--page", "r.html"), ("--dedup", "clean")):
        with pytest.raises(SystemExit) as stop:
            main(["data", "check", str(planted[0]), option, str(out / path)])
        assert stop.value.code == 2
        assert f"{path}: already exists" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_the_next_step_reads_the_text_in_the_same_way(tmp_path, capsys):
    rows = [{"title": f"t{number}", "body": f"body of number {number * number}"} for number in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["data", "check", str(tmp_path / "rows.jsonl"), "--field", "{title}: {body}"])
    assert capsys.readouterr().out.endswith("rows.jsonl --field '{title}: {body}' --out DATASET\n")


def test_a_prepared_dataset_gives_the_same_findings(planted, tmp_path):
    folder, items, names = planted
    dataset = prepare(str(folder), tmp_path / "set", "byte")
    check = start_check(open_split_text(DataConfig(source=str(dataset.path))), (str(items),), lambda *_: None)
    report = describe(check, "", 0)
    assert finding(report, "exact copies")["count"] == 1
    leaks = {example["document"]: example["twin"] for example in finding(report, "validation documents")["examples"]}
    assert leaks[names["leaked"]] == names["leak"]
    assert finding(report, "task items")["examples"][0]["document"] == names["item"]
    assert report["token_sizes"] == {"train": dataset.manifest.train.tokens, "val": dataset.manifest.val.tokens}
    short = dataset_report(open_dataset(dataset.path), 0)
    assert sum(count for _, count in short["lengths"]["bars"]) == len(list(folder.iterdir()))


def test_long_documents_are_looked_at_in_parts(planted, report, monkeypatch):
    monkeypatch.setattr(data_check, "_PART", 700)
    folder, items, _ = planted
    check = start_check(open_split_text(DataConfig(source=str(folder))), (str(items),), lambda *_: None)
    found = json.loads(json.dumps(describe(check, "", 0)))
    for start in ("exact copies", "validation documents", "task items", "strings that look"):
        assert {example["document"] for example in finding(found, start)["examples"]} == {
            example["document"] for example in finding(report[0], start)["examples"]
        }
    assert finding(found, "strings that look")["examples"] == finding(report[0], "strings that look")["examples"]
    assert found["sizes"] == report[0]["sizes"]
    assert found["lengths"] == report[0]["lengths"]


def test_a_long_text_file_is_read_in_pieces(tmp_path, monkeypatch):
    draw, path = random.Random(1), tmp_path / "long.txt"
    words = [f"w{draw.randrange(10**5)}\u00e9\U0001f600"[: draw.randrange(3, 9)] for _ in range(60_000)]
    words[-300:] = words[1000:1300]
    words[5000] = "\ufeff" + words[5000]
    lines = [" ".join(words[begin : begin + 12]) for begin in range(0, len(words), 12)]
    path.write_text("\n".join([*lines[:2000], f"key {KEY}", *lines[2000:]]), encoding="utf-8")
    whole = start_check(open_split_text(DataConfig(source=str(path))), (), lambda *_: None)
    monkeypatch.setattr(split_text, "_LONG", 1000)
    monkeypatch.setattr(data_check, "_PART", 5000)
    monkeypatch.setattr(sources, "_PIECE", 1001)
    text = open_split_text(DataConfig(source=str(path)))
    assert len(list(next(text.documents()).pieces)) > 100
    check = start_check(text, (), lambda *_: None)
    (report, expected) = (describe(each, "", 0) for each in (check, whole))
    for found in (report, expected):
        found["languages"] = {}  # its excerpts end where a part ends
    assert report == expected
    assert finding(report, "validation documents")
    assert check.duplicates.compare(0, 1) == whole.duplicates.compare(0, 1)


@pytest.mark.parametrize("several", [False, True])
def test_long_documents_of_a_dataset_are_decoded_in_pieces(several, tmp_path, monkeypatch):
    for number in range(1 + several):
        (tmp_path / f"{number}.txt").write_text(f"\u00e9\U0001f600 {number}\n" * 700, encoding="utf-8")
    source = tmp_path if several else tmp_path / "0.txt"
    config = DataConfig(source=str(prepare(str(source), tmp_path.parent / f"{tmp_path.name}-set", "byte").path))
    whole = [document.text for document in open_split_text(config).documents()]
    monkeypatch.setattr(split_text, "_WINDOW", 101)
    assert max(len(list(document.pieces)) for document in open_split_text(config).documents()) > 50
    assert [document.text for document in open_split_text(config).documents()] == whole


def test_a_training_document_that_is_much_like_a_validation_document_is_removed(tmp_path):
    texts = {f"part-{number:03}.txt": text for number, text in enumerate(parts())}
    val = next(name for name, text in texts.items() if held_out(text, 0.05))
    near = (texts[val].replace(" ", f" changed{number} ", 1) for number in range(100))
    texts["near.txt"] = next(text for text in near if not held_out(text, 0.05))
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    main(["data", "check", str(tmp_path), "--dedup", str(tmp_path / "clean")])
    rows = [json.loads(line) for line in (tmp_path / "clean" / "removed.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["name"] == "near.txt"]
    assert (row["kept"], row["split"]) == (val, "train")
    assert row["reason"].startswith("near-duplicate")
    kept = [text for _, text in open_source(str(tmp_path / "clean" / "documents.jsonl")).documents()]
    assert texts[val] in kept
    assert texts["near.txt"] not in kept


def test_random_text_has_no_findings(tmp_path):
    draw = random.Random(5)
    for number in range(120):
        words = [f"w{draw.randrange(10**5)}" for _ in range(200)]
        (tmp_path / f"{number}.txt").write_text(" ".join(words))
    check = start_check(open_split_text(DataConfig(source=str(tmp_path))), (), lambda *_: None)
    assert describe(check, "", 0)["findings"] == []


def test_a_single_text_is_checked_against_its_own_end(tmp_path):
    draw = random.Random(6)
    words = [f"w{draw.randrange(10**5)}" for _ in range(4000)]
    words[-100:] = words[1000:1100]
    (tmp_path / "one.txt").write_text(" ".join(words))
    check = start_check(open_split_text(DataConfig(source=str(tmp_path / "one.txt"))), (), lambda *_: None)
    found = finding(describe(check, "", 0), "validation documents")
    assert "passage has 100 words" in found["examples"][0]["text"]


@pytest.mark.parametrize("count", [1, 3])
def test_conversations_are_read_without_their_template(count, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": "Yes."}]}
        for n in range(count)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = open_split_text(DataConfig(source=str(tmp_path / "chat.jsonl")))
    assert sorted(document.text for document in text.documents()) == [f"Question {n}?\n\nYes." for n in range(count)]
