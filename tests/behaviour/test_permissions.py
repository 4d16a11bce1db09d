"""Permissions follow the umask, and a place that cannot be written is named as the user gave it, with the real reason."""

import os
import stat

import pytest

from bardling.cli.main import main
from bardling.files.atomic import os_error_as_user_error, write_atomically
from bardling.training.run import train


@pytest.fixture(scope="module")
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027])
def test_every_file_of_a_run_has_the_permissions_that_the_umask_leaves(tiny, change, tmp_path, umask, mask):
    umask(mask)
    short = change(tiny, optim={"warmup_steps": 0}, train={"steps": 2})
    train(short, tmp_path / "run", quiet=True)
    for path in (tmp_path / "run").rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The king and the queen met.\n" * 200)
    (tmp_path / "dangling").symlink_to("nowhere/at-all")
    return tmp_path


LONG = "x" * 256
PLACES = {
    "dangling": "dangling: is a link to nowhere/at-all, which does not exist",
    "dangling/run": "dangling: is a link to nowhere/at-all, which does not exist",
    LONG: f"{LONG}: the name is too long",
    f"a/{LONG}/b": "the name is too long",
    "text.txt/run": "text.txt/run: text.txt is a file, not a folder",
}


@pytest.mark.parametrize(("out", "reason"), PLACES.items(), ids=["link", "below a link", "long", "long parent", "file"])
@pytest.mark.parametrize(
    "command", ["train quickstart --data.source text.txt --optim.warmup_steps 1 --train.steps 2", "prepare text.txt"]
)
def test_a_place_that_cannot_be_written_is_named_with_the_reason(place, capsys, command, out, reason):
    before = sorted(place.iterdir())
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--out", out])
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    assert reason in said
    assert ".partial" not in said
    assert len(said.splitlines()) == 1
    assert sorted(place.iterdir()) == before


def test_a_name_whose_temporary_name_is_too_long_is_named_itself(tmp_path):
    from bardling.errors import UserError

    path = tmp_path / ("y" * 250)
    with pytest.raises(UserError) as error:
        write_atomically(path, b"x")
    assert str(error.value) == f"{path}: cannot write: file name too long"


def test_another_file_at_fault_is_named(tmp_path):
    from bardling.errors import UserError

    with pytest.raises(UserError, match="other: cannot read"), os_error_as_user_error(tmp_path, "read"):
        (tmp_path / "other").read_bytes()


def test_a_deleted_working_directory_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit) as end:
        main(["plan", "quickstart"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "bardling: the working directory has been deleted: change to one that exists with cd\n"
