"""Prompts from files, pipes and standard input: read unchanged, up to a limit, with errors that speak of the prompt."""

import io
import os
import subprocess
import sys
import threading

import pytest

from bardling.cli.nanogpt import is_nanogpt
from bardling.cli.sample import SampleOptions, _prompt, nanogpt_options
from bardling.errors import UserError
from bardling.files.prompt import MAX_PROMPT_BYTES, read_prompt_file
from bardling.interop.nanogpt_keys import SAMPLE_KEYS

TEXTS = [
    "hi",
    "",
    "two\nlines\n",
    "windows\r\nlines\r\n",
    "old mac\rlines",
    "tab\tand nul \0",
    "naïve café 北京 🙂",
    " spaces ",
    "\n",
    "a\x85b\u2028c",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_file_is_read_unchanged(tmp_path, text):
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    assert read_prompt_file(tmp_path / "prompt.txt") == text
    assert _prompt(SampleOptions("run", prompt_file=tmp_path / "prompt.txt")) == text


@pytest.mark.parametrize("text", TEXTS)
def test_standard_input_is_read_unchanged(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii"))
    assert _prompt(SampleOptions("run", prompt="-")) == text


@pytest.mark.parametrize("size", [10, 70_000, 3_000_000])
def test_a_pipe_is_read_to_its_end(tmp_path, size):
    text = "pipe\n" * (size // 5)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(text))
    writer.start()
    assert read_prompt_file(tmp_path / "pipe") == text
    writer.join()


def test_process_substitution():
    code = "import sys; from bardling.files.prompt import read_prompt_file; print(repr(read_prompt_file(sys.argv[1])))"
    command = ["bash", "-c", f'"{sys.executable}" -c "{code}" <(echo hi)']
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "'hi\\n'\n"


def test_a_mark_of_utf8_is_not_text(tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_prompt_file(tmp_path / "prompt.txt") == "hello"


def test_large_files_up_to_the_limit(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"x" * MAX_PROMPT_BYTES)
    assert len(read_prompt_file(path)) == MAX_PROMPT_BYTES == 16 << 20
    path.write_bytes(b"x" * (MAX_PROMPT_BYTES + 1))
    with pytest.raises(UserError, match=r"prompt.txt: is too large \(the limit of a prompt is 16 MiB"):
        read_prompt_file(path)
    with pytest.raises(UserError, match="prompt file /dev/zero: is too large"):
        read_prompt_file("/dev/zero")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "prompt file .*prompt.txt: no such file: name a text file that contains the prompt"),
        (lambda path: path.mkdir(), "prompt file .*prompt.txt: is a folder: name a text file"),
        (lambda path: path.symlink_to(path), "prompt file .*prompt.txt: cannot be read"),
        (lambda path: path.write_bytes(b"caf\xe9 "), "prompt file .*prompt.txt: is not UTF-8 text .byte 3 is 0xe9.*prompt"),
        (lambda path: path.write_bytes(b"\x80"), "prompt file .*prompt.txt: is not UTF-8 text"),
    ],
)
def test_errors_name_the_prompt_file(tmp_path, make, says):
    make(tmp_path / "prompt.txt")
    with pytest.raises(UserError, match=says) as error:
        read_prompt_file(tmp_path / "prompt.txt")
    assert "config" not in str(error.value)
    assert "\n" not in str(error.value)


def test_nanogpts_start_reads_the_same_way(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompt.txt").write_bytes(b"one\r\ntwo")
    for name in (tmp_path / "prompt.txt", "~/prompt.txt"):
        argv = ["--out_dir=out", f"--start=FILE:{name}"]
        assert is_nanogpt(argv, SAMPLE_KEYS)
        assert nanogpt_options(argv).prompt == "one\r\ntwo"
    with pytest.raises(UserError, match=r"prompt file nowhere\.txt: no such file"):
        nanogpt_options(["--out_dir=out", "--start=FILE:nowhere.txt"])


def test_a_prompt_that_cannot_be_encoded_is_named(tmp_path, tiny, change, bardling):
    from bardling.training.run import train

    train(change(tiny, optim={"warmup_steps": 0}, train={"steps": 1}), tmp_path / "run", quiet=True)
    (tmp_path / "p.txt").write_text("Müll")
    failed = bardling("sample", tmp_path / "run", "--prompt_file", tmp_path / "p.txt", check=2).stderr
    assert f"prompt file {tmp_path / 'p.txt'}: character 'M'" in failed
    piped = bardling("sample", tmp_path / "run", "--prompt", "-", "--max_new_tokens", "3", "--seed", "1", input="The king")
    assert piped.stdout.startswith("The king")
