"""The image of training curves: written atomically; redrawing replaces it, and no other file is overwritten."""

import importlib.util
import json

import pytest

from bardling.cli.main import main
from bardling.config.recipes import config_to_toml
from bardling.errors import UserError
from bardling.report.curve import check_image_path, draw_curves

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the plot extra")


@pytest.fixture
def run(tiny, tmp_path):
    """A run folder with a few metrics."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text(config_to_toml(tiny))
    lines = [
        f'{{"kind": "{kind}", "step": {step}, "loss": {4 - step / 10}, "tokens": {64 * step}}}\n'
        for kind in ("train", "val")
        for step in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(["report", *map(str, argv)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@needs_matplotlib
@pytest.mark.parametrize(("kind", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF-"), ("PNG", b"\x89PNG")])
def test_redrawing_replaces_the_image(run, tmp_path, capsys, kind, begin):
    out = tmp_path / f"curve.{kind}"
    main(["report", str(run), "--out", str(out)])
    first = out.stat().st_ino
    (run / "metrics.jsonl").open("a").write('{"kind": "val", "step": 9, "loss": 2.0}\n')
    main(["report", str(run), "--out", str(out)])
    assert out.read_bytes().startswith(begin)
    assert out.stat().st_ino != first, "replaced, not written into"
    assert capsys.readouterr().out.splitlines() == [str(out)] * 2
    assert {path.name for path in tmp_path.iterdir()} == {"run", out.name}


@needs_matplotlib
def test_the_first_and_the_last_sample_of_each_prompt_are_shown(run, capsys):
    rows = [{"kind": "sample", "step": step, "prompt": "Hi", "texts": [f"answer\x1b{step}"]} for step in (1, 2, 3)]
    (run / "samples.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    main(["report", str(run)])
    shown = capsys.readouterr().out.splitlines()
    assert shown[:-1] == [f"{run}: 'Hi'", r"  step 1: 'answer\x1b1'", r"  step 3: 'answer\x1b3'"]
    assert shown[-1] == str(run / "curve.png")


@needs_matplotlib
def test_a_failed_write_leaves_the_old_image(run, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    out = tmp_path / "curve.png"
    draw_curves([run], out)
    before = out.read_bytes()

    def partial_write(self, file, **_):
        (file.write if hasattr(file, "write") else file.write_bytes)(b"\x89PNG half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", partial_write)
    with pytest.raises(UserError, match="cannot write: no space left on device"):
        draw_curves([run], out)
    assert out.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "curve.png"}


@pytest.mark.parametrize("content", [b"", b"steps = 3\n", b"\x89PNG\r\n\x1a\n of a holiday", b"notes on bardling report\n"])
def test_a_file_from_elsewhere_is_not_overwritten(run, tmp_path, capsys, content):
    out = tmp_path / "mine.png"
    out.write_bytes(content)
    assert "remove it, or choose another --out" in refused(capsys, run, "--out", out)
    assert out.read_bytes() == content


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "config", "new.txt"])
def test_only_image_names_are_accepted(run, capsys, name):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert "use a name that ends in .png, .svg, .pdf" in refused(capsys, run, "--out", run / name)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_folder_is_not_overwritten(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UserError, match="already exists"):
        check_image_path(tmp_path / "a.png")
