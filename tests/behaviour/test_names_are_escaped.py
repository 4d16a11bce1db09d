"""Names of files, runs and datasets appear as they are wherever they are shown: no part of them is markup, a formula, a
terminal's control sequence or a shell's syntax."""

import ast
import contextlib
import io
import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import pytest
from rich.console import Console as Screen

import bardling
from bardling.cli.main import main
from bardling.cli.parse import note
from bardling.cli.tables import columns, print_rows, printable, show, show_table
from bardling.files.paths import shell_path
from bardling.monitor import console, progress
from bardling.report.curve import _drawable, distinct_names, draw_curves

NAMES = [
    "weird[/x]",
    "data[v2]",
    "[bold]x[/bold]",
    "[red]",
    "[link=https:x.org]y",
    "a]b[c",
    "back\\[slash]",
    ":smile: :warning:",
    "$x$ and $y",
    "_leading",
    "__init__",
    "two  spaces ",
    'it\'s "quoted"',
    "日本語",
    "ünïcödé",
    "{braces} %s %(x)d",
    "-dash",
    "x~tilde",
    "#1;&|<>*?!",
    "https:x.org/a@b",
]
CONTROL = ["esc\x1b[31mred", "bell\a", "new\nline", "back\bspace", "return\rover"]


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    from bardling.config import CheckpointConfig, DataConfig, EvalConfig, ModelConfig, RunConfig, SampleConfig, TrainConfig
    from bardling.config.optim import OptimConfig

    config = RunConfig(
        device="cpu",
        precision="float32",
        compile="off",
        model=ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_multiple=1),
        data=DataConfig(source=str(corpus), tokenizer="char"),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(steps=3, batch_size=2, log_every=1),
        eval=EvalConfig(every=2, windows=4),
        sample=SampleConfig(every=0),
        checkpoint=CheckpointConfig(every=0),
    )
    return bardling.train(config, tmp_path_factory.mktemp("runs") / "run", quiet=True).folder


def named(run, folder, name):
    return shutil.copytree(run, folder / name)


def unstyled(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("name", [*NAMES, *CONTROL])
def test_info_shows_the_folder_it_was_given(run, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    named(run, tmp_path, name)
    main(["info", f"./{name}"])
    shown = capsys.readouterr().out
    assert f"run {printable(name)}".rstrip() in shown
    assert not set(shown) & set("\x1b\a\b\r")
    assert "validation loss" in shown


@pytest.mark.parametrize("name", [*NAMES, *CONTROL])
def test_lines_and_cells_show_plain_text(capsys, name):
    show(name)
    print_rows([(name, "value"), ("key", name)], name)
    table = columns("a", "b")
    table.add_row(name, name)
    show_table(table)
    note(name)
    captured = capsys.readouterr()
    assert captured.out.count(printable(name).strip()) == 6
    assert "\x1b" not in captured.err + captured.out


@pytest.mark.parametrize("name", NAMES)
def test_errors_name_the_file(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["info", f"./{name}"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"bardling: {name}: no such file or folder")


@pytest.mark.parametrize("name", ["esc\x1b[31mred", "new\nline", "bell\a"])
def test_an_error_stays_one_line_without_control_characters(name, capsys):
    with pytest.raises(SystemExit):
        main(["info", name])
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.strip().isprintable()


@pytest.mark.parametrize("name", ["a[v2].toml", "[bold]b.toml", ":smile:.toml", "日本.toml"])
def test_plan_shows_the_recipe_it_was_given(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("[model]\nn_layer = 1\nn_embd = 12\nvocab_size = 64\n")
    main(["plan", name, "--gpu", "My [GPU] :smile:", "--peak_tflops", "3"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"{name}: ")
    assert "My [GPU] :smile:" in shown


@pytest.mark.parametrize("name", NAMES)
def test_the_display_of_a_run_and_progress_bars(name, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    terminal = console.Console(steps=9, first_step=0, stream=stream, width=200)
    terminal._clock = iter(range(0, 1000, 5)).__next__
    terminal.note(name)
    terminal.log({"kind": "task", "task": name, "step": 3, "accuracy": 0.5})
    for done in range(3):
        terminal.progress(name, done, 9)
    terminal.close()
    assert unstyled(stream.getvalue()).count(name.strip()) >= 3
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setattr(progress, "Console", lambda **_: Screen(file=stream, width=200, force_terminal=True))
    stream.truncate(0)
    with progress.ProgressBar(name, unit="items") as bar:
        bar(1, 3)
    assert name.strip() in unstyled(stream.getvalue())


def legend(runs, tmp_path, monkeypatch):
    """The texts of the legend, and whether each is read as a formula."""
    from matplotlib.figure import Figure

    found = []
    save = Figure.savefig

    def saved(figure, *args, **options):
        found.extend((text.get_text(), text.get_parse_math()) for text in figure.axes[0].get_legend().get_texts())
        return save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves(runs, tmp_path / "figure.svg")
    return found


def test_the_legend_of_a_report_names_every_run(run, tmp_path, monkeypatch):
    names = ["$x$ and $y", "_leading", "a$b", "data[v2]", "ünïcödé", "日本語", "{x}"]
    runs = [named(run, tmp_path, name) for name in names]
    expected = [text for name in names for text in (f"{_drawable(name)}: training", f"{_drawable(name)}: validation")]
    assert legend(runs, tmp_path, monkeypatch) == [(text, False) for text in expected]
    assert _drawable("ünïcödé $_") == "ünïcödé $_"
    assert _drawable("日本") == "\\u65e5\\u672c"  # missing in matplotlib's font


def test_runs_of_the_same_name_are_told_apart(run, tmp_path, monkeypatch):
    runs = [named(run, tmp_path / parent, "run") for parent in ("small", "large")]
    texts = [text for text, _ in legend(runs, tmp_path, monkeypatch)]
    assert texts == ["small/run: training", "small/run: validation", "large/run: training", "large/run: validation"]
    monkeypatch.chdir(tmp_path / "small")
    assert distinct_names([Path("run"), Path("../large/run/.")]) == ["small/run", "large/run"]
    assert distinct_names([Path(), Path("run")]) == ["small", "run"]
    assert distinct_names([Path("run"), Path("run")]) == ["run", "run"]


@pytest.mark.parametrize("name", [*NAMES, "new\nline", "$(touch x)", "`id`"])
def test_a_command_to_copy_is_quoted(name, run, tmp_path, monkeypatch):
    from bardling.checkpoint.run_folder import refuse_existing

    monkeypatch.chdir(tmp_path)
    named(run, tmp_path, name)
    with pytest.raises(bardling.UserError) as error:
        refuse_existing(Path(name))
    command = re.search(r"`(bardling resume .*)`, or", str(error.value), re.S).group(1)
    *_, path = words = shlex.split(command)
    assert len(words) == 3
    assert Path(path) == Path(name)
    assert not shell_path(name).startswith("-")


def test_no_module_renders_markup():
    """`rich` reads markup and emoji codes by default: every console and text column of the package turns that off."""
    package = Path(bardling.__file__).parent
    for path in package.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "rich.markup" not in source, path
        for call in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]:
            name = ast.unparse(call.func).rpartition(".")[2]
            given = {keyword.arg for keyword in call.keywords}
            if "rich" in source and name == "TextColumn":
                assert "markup" in given, f"{path}:{call.lineno}"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        show("[bold]a[/bold]", " :smile:")
    assert out.getvalue() == "[bold]a[/bold] :smile:\n"
