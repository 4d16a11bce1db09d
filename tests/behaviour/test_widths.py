"""Help and output of every command on a terminal of 20 to 200 columns, and in a pipe: nothing is lost, nothing is cut."""

import contextlib
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial

import pytest

import bardling
from bardling.cli import verify
from bardling.cli.main import COMMANDS, main
from bardling.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from bardling.config.recipes import config_to_toml
from bardling.tools.verify import Check, VerifyResult

WIDTHS = [20, 40, 60, 100, 200]

ALL_IN_ORDER = """
import fcntl, json, struct, sys, termios
from bardling.cli.main import main
for width, argv in json.load(sys.stdin):
    if width is not None:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    try:
        main(argv)
    except SystemExit as stop:
        assert not stop.code, (width, argv, stop.code)
    print("\\f", flush=True)
"""


def outputs(commands, folder):
    """What commands print, by width and name, for {name: function(width) -> argv}. A width of None is a pipe, with a process of
    its own; another process prints all the others on one pseudo-terminal, which is resized between them."""
    found = {}
    for widths in ([None], WIDTHS):
        tasks = [(width, name, list(map(str, argv(width)))) for width in widths for name, argv in commands.items()]
        text = _all_output([(width, argv) for width, _, argv in tasks], folder, terminal=widths == WIDTHS)
        *texts, rest = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "").split("\f\n")
        assert not rest.strip()
        found |= {(width, name): printed for (width, name, _), printed in zip(tasks, texts, strict=True)}
    return found


def _all_output(tasks, folder, *, terminal):
    reader, writer = pty.openpty() if terminal else os.pipe()
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", ALL_IN_ORDER],
            stdin=subprocess.PIPE,
            stdout=writer,
            stderr=errors,
            env={**environment, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"},
            cwd=folder,
        )
        os.close(writer)
        process.stdin.write(json.dumps(tasks).encode())
        process.stdin.close()
        raw = b""
        with contextlib.suppress(OSError):  # how a pseudo-terminal ends
            while piece := os.read(reader, 65536):
                raw += piece
        os.close(reader)
        status = process.wait(timeout=60)
        errors.seek(0)
        assert status == 0, errors.read().decode()[-2000:]
    return raw.decode()


def words(text):
    """The words of a text; of those that a narrow column folds, the beginning."""
    return {word if len(word) <= 20 else word[:16] for word in re.findall(r"[^\s│─╭╮╰╯|]+", text)}


def numbers(text):
    return set(re.findall(r"(?<=\s)[\d,.]+%?(?=\s)", f" {text} "))


HELP = {command: partial(lambda command, width: [command, "--help"], command) for command in COMMANDS}
HELP |= {"": lambda width: ["--help"], "recipe": lambda width: ["train", "quickstart", "--help"]}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return outputs(HELP, tmp_path_factory.mktemp("help"))


@pytest.mark.parametrize("width", [20, 40, 60, 100, None])
def test_the_help_of_every_command_is_complete(pages, width):
    for command in HELP:
        reference = pages[200, command]
        assert len(reference) > 150, command
        assert words(reference) <= words(pages[width, command]), (command, width)
        assert "…" not in pages[width, command]


@pytest.mark.parametrize("columns", ["1", "5", "0", "-3", "x", "1000"])
def test_help_ends_with_any_value_of_columns(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as stop:
        main(["sample", "--help"])
    assert stop.value.code == 0
    assert "--max_new_tokens" in capsys.readouterr().out
    assert os.environ["COLUMNS"] == columns


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    """A run, a dataset and a recipe, in a folder with a long name."""
    place = tmp_path_factory.mktemp("main") / "a folder with a long name that no narrow terminal shows on one line"
    place.mkdir()
    shutil.copy(corpus, place / "text.txt")
    config = RunConfig(
        device="cpu",
        precision="float32",
        compile="off",
        model=ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_multiple=1),
        data=DataConfig(source=str(place / "text.txt"), tokenizer="char"),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(steps=3, batch_size=2, log_every=1),
        eval=EvalConfig(every=2, windows=4),
        sample=SampleConfig(every=0),
        checkpoint=CheckpointConfig(every=0),
    )
    (place / "recipe.toml").write_text(config_to_toml(config))
    (place / "config.py").write_text("batch_size = 2\nblock_size = 8\nn_layer = 1\n")
    bardling.train(config, place / "run", quiet=True)
    for width in [*WIDTHS, None]:
        shutil.copytree(place / "run", place / f"run {width}")
    bardling.prepare(str(place / "text.txt"), place / "data", "char")
    return place


@pytest.fixture(scope="module")
def shown(folder):
    run = folder / "run"
    commands = {
        "plan": lambda width: ["plan", "recipe.toml", "--gpu", "H100-SXM", "--model.vocab_size", "50257", "--sweep"],
        "info": lambda width: ["info", run],
        "verified": lambda width: ["info", run, "--verify"],
        "step": lambda width: ["info", run, "--step", "1"],
        "dataset": lambda width: ["info", folder / "data"],
        "recipe": lambda width: ["info", folder / "recipe.toml"],
        "eval": lambda width: ["eval", run, "--windows", "4", "--precision", "float32"],
        "sample": lambda width: ["sample", run, "--prompt", "The king", "--seed", "1", "--max_new_tokens", "200"],
        "report": lambda width: ["report", run, "--out", folder / "a figure with a long name.svg"],
        "migrate": lambda width: ["migrate", folder / "config.py"],
        "train": lambda width: ["train", "recipe.toml", "--out", f"new {width}"],
        "resume": lambda width: ["resume", f"run {width}", "--train.steps", "5"],
        "prepare": lambda width: ["prepare", "text.txt", "--out", f"data {width}", "--tokenizer", "char"],
        "export": lambda width: ["export", run, "--out", f"export {width}", "--format", "nanogpt"],
        "bench": lambda width: ["bench", "recipe.toml", "--steps", "1", "--warmup", "1"],
    }
    return outputs(commands, folder)


# These print other numbers in every run; all others print the same on a terminal of any width and in a pipe.
PARTS = {
    "train": ["parameters", "epochs of", "precision float32", "validation", "loss", "bits/byte", "perplexity", "best so far"],
    "resume": ["resuming run", "at step 3 of 5", "changed: train.steps", "validation"],
    "prepare": ["train", "tokens", "vocabulary", "tokenizer", "fingerprint", "rule 2", "dataset data"],
    "export": ["ckpt.pt", "--out_dir='export", "weights:"],
    "bench": ["tokens per step", "accumulation x micro-batch:", "MFU (measured peak)", "peak of the whole process", "clipping"],
}


@pytest.mark.parametrize("width", WIDTHS)
def test_the_output_of_the_commands_is_complete(shown, width):
    for command in {command for _, command in shown} - PARTS.keys():
        text, reference = shown[width, command], shown[None, command]
        assert "…" not in text
        assert not {word for word in words(reference) if word not in text}, command
        assert numbers(reference) <= numbers(text), command


@pytest.mark.parametrize("width", [*WIDTHS, None])
@pytest.mark.parametrize("command", PARTS)
def test_the_output_of_commands_that_measure_time_has_all_its_parts(shown, command, width):
    text = "".join(shown[width, command].split())
    assert "…" not in text
    for part in PARTS[command]:
        assert all(word in text for word in part.split()), (part, shown[width, command])


def test_a_pipe_gets_whole_values_on_one_line(shown, folder):
    assert re.search(rf"^data +{re.escape(str(folder / 'text.txt'))}, tokenizer char *$", shown[None, "info"], re.M)
    assert re.search(r"^measured on +[\d,]+ tokens of /\S+ *$", shown[None, "eval"], re.M)
    work = r"^tokens per step +16 +processes x accumulation x micro-batch: 1 x 1 x 2 sequences of 8 *$"
    assert re.search(work, shown[None, "plan"], re.M)


@pytest.mark.parametrize("width", [*WIDTHS, None])
def test_the_table_of_verify(width, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: width is not None
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(width or 80))
    checks = [
        Check("resumed after a kill", True, "identical", "0", 1.5),
        Check("two processes", False, "1.5e-3 " * 9, "1e-5", 2.0),
    ]
    verify.show_result(VerifyResult(checks, ["layers 12 to 2"], "A CPU [with a long name]", "float32"))
    text = re.sub(r"\x1b\[[0-9;?]*m", "", stream.getvalue())
    for part in ("A CPU [with a long name]", "resumed after a kill", "two processes", "identical", "FAIL", "1.5 s", "1e-5"):
        assert part in text
    assert text.count("1.5e-3") == 9
