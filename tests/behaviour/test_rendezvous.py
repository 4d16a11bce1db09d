"""Environment variables that cannot bring processes together: one line with the variable, its value and a remedy."""

import socket

import pytest

from bardling.cli.main import main
from bardling.config.recipes import config_to_toml
from bardling.distributed import context


@pytest.fixture
def refusal(tiny, tmp_path, monkeypatch, capsys):
    """The line that ends `bardling train` with these variables."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(config_to_toml(tiny))

    def run(**variables):
        good = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        for name, value in (good | variables).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            main(["train", str(recipe), "--device", "cpu", "--out", str(tmp_path / "run")])
        assert end.value.code == 2
        assert not (tmp_path / "run").exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("RANK", "2", "0 to 1 (WORLD_SIZE - 1)"),
        ("RANK", "-1", "0 to 1"),
        ("RANK", "first", "0 to 1"),
        ("RANK", "", "0 to 1"),
        ("LOCAL_RANK", "-1", "from 0"),
        ("WORLD_SIZE", "0", "from 1"),
        ("WORLD_SIZE", "2.0", "from 1"),
        ("WORLD_SIZE", "9" * 5000, "from 1"),
        ("MASTER_PORT", "0", "1 to 65535"),
        ("MASTER_PORT", "65536", "1 to 65535"),
        ("MASTER_PORT", "-5", "1 to 65535"),
        ("MASTER_PORT", "http", "1 to 65535"),
    ],
)
def test_numbers_outside_their_range(refusal, name, value, limits):
    line = refusal(**{name: value})
    assert f"bardling: {name} = {value!r}: must be an integer from" in line
    assert limits in line
    assert "start with torchrun, or correct or unset it" in line


def test_a_rank_without_the_number_of_processes(refusal):
    assert "RANK = '3': must be an integer from 0 to 0 (WORLD_SIZE - 1)" in refusal(RANK="3", WORLD_SIZE=None)


@pytest.mark.parametrize("address", ["no.such.host.invalid", "a" * 300, "a..b", "", "300.1.1.1", "[::1", None])
def test_an_address_that_cannot_be_resolved(refusal, address):
    line = refusal(MASTER_ADDR=address)
    assert f"bardling: MASTER_ADDR = {address or ''!r}: cannot be resolved (" in line
    assert "set it to the host name or IP address of rank 0" in line


def test_a_port_that_another_program_uses(refusal):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        line = refusal(MASTER_PORT=str(port))
    assert line.startswith(f"bardling: MASTER_PORT = {port}: rank 0 cannot listen (address already in use): set another port")


def test_processes_that_do_not_come_together_in_time(refusal, monkeypatch):
    def store(*arguments, **options):
        raise context.dist.DistStoreError("Timed out after 1801 seconds waiting for clients. 1/2 clients joined.")

    monkeypatch.setattr(context, "TCPStore", store)
    line = refusal()
    assert "MASTER_ADDR = '127.0.0.1', MASTER_PORT = 29500: the processes cannot meet there (Timed out after 1801" in line
