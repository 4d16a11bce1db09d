"""Small untrusted files: every refusal is one line that names the file."""

from pathlib import Path

import pytest

from bardling.errors import UserError
from bardling.files.reading import read_json_object, read_small_bytes, read_small_text


def test_text_json_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a":\r\n [1, 2]}')
    assert read_small_text(path) == '{"a":\n [1, 2]}'
    assert read_small_bytes(path, limit=16) == path.read_bytes()
    assert read_json_object(path, limit=16) == {"a": [1, 2]}
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert read_json_object(path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read: no such file"),
        (b"x" * 101, r"is too large \(101 bytes; the limit is 100\)"),
        (b"\xff", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"[" * 100, "is not valid JSON"),
        (b"1" * 100, "is not a JSON object \\(found int\\)"),
        (b"[]", "is not a JSON object \\(found list\\)"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json: {message}") as caught:
        read_json_object(path, limit=100)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(UserError, match="a: is not UTF-8 text"):
        read_small_text(tmp_path / "a")
    with pytest.raises(UserError, match="is not a file"):
        read_small_text(tmp_path)
