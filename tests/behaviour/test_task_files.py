"""Files of multiple-choice tasks: JSON Lines and JSON arrays, and what is wrong with one that cannot be read."""

import gzip
import json

import pytest

from bardling.errors import UserError
from bardling.evaluate import tasks
from bardling.evaluate.tasks import ChoiceItem, load_items

ROWS = [
    {"ctx": "A man sits. He", "endings": ["falls.", "läuft."], "label": 1, "ind": 24},
    {"ctx": "A [man] stands. {He", "endings": ["falls.", "runs."], "label": "0"},
]
ITEMS = (("A man sits. He", ("falls.", "läuft."), 1), ("A [man] stands. {He", ("falls.", "runs."), 0))


def fields(items):
    return tuple((item.context, item.endings, item.label) for item in items)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2, ensure_ascii=False),
        "\ufeff" + json.dumps(ROWS, ensure_ascii=False),
        "\n \t\r\n" + json.dumps(ROWS) + "\n\n",
        "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]",
        "".join(json.dumps(row) + "\n" for row in ROWS),
        "\ufeff\n" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    ],
    ids=["array", "indented", "marked", "spaced", "a line per item", "lines", "marked lines"],
)
@pytest.mark.parametrize("name", ["task.json", "task.jsonl", "task"])
def test_a_task_is_read_whether_it_is_an_array_or_lines(tmp_path, text, pack, name):
    (tmp_path / name).write_bytes(pack(text.encode()))
    assert fields(load_items(str(tmp_path / name))) == ITEMS


def test_items_of_an_array_have_the_names_of_their_places(tmp_path):
    (tmp_path / "task.json").write_text(json.dumps(ROWS))
    assert load_items(str(tmp_path / "task.json"))[1] == ChoiceItem(*ITEMS[1], "item 2")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[]", "contains no items"),
        (b"[" + json.dumps(ROWS[0]).encode(), r"line 1: is not valid JSON \(Expecting ',' delimiter\)"),
        (b'[\n{"ctx": 1},\n]', "line 3: is not valid JSON"),
        (json.dumps(ROWS).encode() * 2, r"is not valid JSON \(Extra data\)"),
        (json.dumps([ROWS[0], 7]).encode(), "item 2: is not a JSON object"),
        (json.dumps([[ROWS[0]]]).encode(), "item 1: is not a JSON object"),
        (json.dumps([ROWS[0], {**ROWS[1], "label": 5}]).encode(), "item 2: label = 5"),
        (b'["\xff"]', "is not UTF-8"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[" + b"1" * 5000 + b"]", "is not valid JSON|is not a JSON object"),
        (gzip.compress(json.dumps(ROWS).encode())[:-9], "gzip data is corrupt"),
    ],
)
def test_a_fault_in_an_array_is_one_line_with_its_place(tmp_path, content, says):
    (tmp_path / "task.json").write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        load_items(str(tmp_path / "task.json"))
    assert str(error.value).startswith(str(tmp_path / "task.json"))
    assert "\n" not in str(error.value)


def test_an_array_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_MAX_ARRAY", 100)
    (tmp_path / "task.json").write_text(json.dumps(ROWS))
    with pytest.raises(UserError, match=r"a JSON array may have at most 0 MiB: write one object per line \(JSON Lines\)"):
        load_items(str(tmp_path / "task.json"))
