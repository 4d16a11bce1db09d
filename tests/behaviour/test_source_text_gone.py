"""A run that is resumed or evaluated needs its tokens; what has happened to the text since is at most a note."""

import os
import shutil
from pathlib import Path

import pytest

from bardling.cli.main import main
from bardling.errors import UserError
from bardling.training.run import resume, train


@pytest.fixture
def place(tmp_path, monkeypatch, corpus):
    """A working folder with a text, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BARDLING_CACHE", str(tmp_path / "cache"))
    shutil.copy(corpus, tmp_path / "text.txt")
    return tmp_path


@pytest.fixture
def config(tiny, change, place):
    quiet = {"sample": {"every": 0}, "eval": {"every": 0}, "checkpoint": {"every": 4}}
    return change(tiny, data={"source": "text.txt"}, train={"steps": 8}, optim={"warmup_steps": 2}, **quiet)


@pytest.fixture
def halves(config, place):
    """The weights of an undisturbed run, and the same run at half its steps."""
    train(config, "run", quiet=True)
    weights = Path("run/checkpoints/step-000008/model.safetensors").read_bytes()
    shutil.rmtree("run/checkpoints/step-000008")
    return weights


def edit():
    with Path("text.txt").open("a") as file:
        file.write("more")


def edit_with_the_same_size_and_time():
    status = Path("text.txt").stat()
    Path("text.txt").write_bytes(b"x" * status.st_size)
    os.utime("text.txt", ns=(status.st_atime_ns, status.st_mtime_ns))


def move():
    Path("text.txt").rename("elsewhere.txt")


def delete():
    Path("text.txt").unlink()


def replace_by_a_folder():
    delete()
    Path("text.txt").mkdir()
    Path("text.txt/other.txt").write_text("other text\n")


NOTES = {
    edit: "text.txt: has changed since it was prepared; its tokens in",
    edit_with_the_same_size_and_time: None,
    move: "text.txt: cannot be read any more; its tokens in",
    delete: "text.txt: cannot be read any more; its tokens in",
    replace_by_a_folder: "text.txt: has changed since it was prepared; its tokens in",
}


@pytest.mark.parametrize("disturb", NOTES)
def test_the_run_ends_as_if_undisturbed(halves, place, disturb, capsys):
    disturb()
    capsys.readouterr()
    assert resume("run").step == 8
    assert Path("run/checkpoints/step-000008/model.safetensors").read_bytes() == halves
    out = capsys.readouterr().out.replace("\n", " ")
    assert NOTES[disturb] in out if NOTES[disturb] else "its tokens in" not in out


@pytest.mark.parametrize("given", ["text.txt", "absolute"])
def test_the_same_settings_resume_a_run_whose_text_is_gone(halves, config, change, place, given):
    """As a script that passes its configuration again does."""
    delete()
    source = given if given == "text.txt" else str(place / "text.txt")
    resume("run", change(config, data={"source": source}), quiet=True)
    assert Path("run/checkpoints/step-000008/model.safetensors").read_bytes() == halves


def test_another_setting_of_the_data_needs_no_text(place, config, change):
    Path("text.txt").write_text("".join(f'{{"text": "{"word " * (n % 9 + 9)}"}}\n' for n in range(200)))
    Path("text.txt").rename("text.jsonl")
    config = change(config, data={"source": "text.jsonl", "tokenizer": "byte"})
    train(config, "run", quiet=True)
    Path("text.jsonl").unlink()
    assert resume("run", change(config, data={"document_mask": True}, train={"steps": 9}), quiet=True).step == 9


@pytest.mark.parametrize("disturb", [edit, delete])
def test_evaluation_measures_the_runs_own_split(halves, place, disturb, capsys):
    main(["eval", "run", "--precision", "float32"])
    expected = capsys.readouterr().out
    disturb()
    main(["eval", "run", "--precision", "float32"])
    assert capsys.readouterr().out == expected


def test_moved_tokens_are_found_or_named(halves, place):
    """In another cache, or where --data.source says."""
    delete()
    tokens = next(Path("cache/datasets").iterdir())
    digest = tokens.name
    Path("new/datasets").mkdir(parents=True)
    tokens.rename(f"new/datasets/{digest}")
    with pytest.raises(UserError) as error:
        resume("run", quiet=True)
    assert str(error.value).startswith(f"run: has no tokens any more ({place}/cache/datasets/{digest}), and they cannot be")
    assert str(error.value).endswith("restore them or their text, or start a new run")
    weights = Path("run/checkpoints")
    shutil.copytree("run", "copy")
    main(["resume", "run", "--data.cache", "new"])
    assert (weights / "step-000008/model.safetensors").read_bytes() == halves
    Path(f"new/datasets/{digest}").rename("tokens")
    main(["resume", "copy", "--data.source", "tokens"])
    assert Path("copy/checkpoints/step-000008/model.safetensors").read_bytes() == halves
    main(["resume", "copy", "--train.steps", "9"])  # from where the tokens are now


def test_moved_text_prepares_lost_tokens_again(halves, place):
    move()
    shutil.rmtree("cache")
    main(["resume", "run", "--data.source", "elsewhere.txt"])
    assert Path("run/checkpoints/step-000008/model.safetensors").read_bytes() == halves


def test_other_text_is_refused(halves, config, change, place, capsys):
    Path("other.txt").write_text("The day and the night met 3 times.\n" * 50)
    with pytest.raises(SystemExit):
        main(["resume", "run", "--data.source", "other.txt"])
    assert f"data.source = '{place}/other.txt': a run that has started keeps '{place}/text.txt'" in capsys.readouterr().err
    shutil.rmtree("cache")
    with pytest.raises(UserError, match="is not the dataset that run started with"):
        resume("run", change(config, data={"source": "other.txt"}), quiet=True)
