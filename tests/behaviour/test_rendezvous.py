"""Processes that cannot meet: one line with the variable and a remedy, or with the missing ranks; a signal ends the wait."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from bardling.cli.main import main
from bardling.config.recipes import config_to_toml
from bardling.distributed import refusals, rendezvous
from bardling.errors import JobLost, UserError


@pytest.fixture
def refusal(tiny, tmp_path, monkeypatch, capsys):
    """The line that ends `bardling train` with these variables."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(config_to_toml(tiny))
    monkeypatch.setattr(refusals, "PATIENCE", 0.1)

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
        ("MASTER_PORT", "", "1 to 65535"),
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


def test_a_port_that_is_not_set(refusal):
    line = refusal(MASTER_PORT=None)
    assert line.startswith("bardling: MASTER_PORT is not set: must be an integer from 1 to 65535: start with torchrun")


@pytest.mark.parametrize("address", ["no.such.host.invalid", "a" * 300, "a..b", "300.1.1.1", "[::1"])
def test_an_address_that_cannot_be_resolved(refusal, address):
    line = refusal(MASTER_ADDR=address)
    assert f"bardling: MASTER_ADDR = {address!r}: cannot be resolved (" in line
    assert "set it to the host name or IP address of rank 0" in line


@pytest.mark.parametrize("address", ["", None])
def test_an_address_that_is_not_set(refusal, address):
    line = refusal(MASTER_ADDR=address)
    assert line.startswith("bardling: MASTER_ADDR is not set: set it to the host name or IP address of rank 0")


def test_a_port_that_another_program_uses(refusal):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        line = refusal(MASTER_PORT=str(port))
    assert line.startswith(f"bardling: MASTER_PORT = {port}: rank 0 cannot listen (address already in use): set another port")


@pytest.fixture
def place(monkeypatch):
    """Two processes are to meet at a free port, with short intervals between reminders; the value is the address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(rendezvous, "REMINDERS", (0.2,))
    return f"127.0.0.1:{port}"


class Alarm(Exception):  # noqa: N818  not an error
    pass


@pytest.fixture
def alarm(monkeypatch):
    """`alarm("2 of 5")`: once a line with this text has been told, a signal arrives whose handler raises `Alarm`."""
    told = []

    def ring(*_):
        raise Alarm

    def after(text):
        def tell(line):
            told.append(line)
            if text in line:
                threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGALRM)).start()

        monkeypatch.setattr(rendezvous, "tell", tell)
        return told

    before = signal.signal(signal.SIGALRM, ring)
    yield after
    signal.signal(signal.SIGALRM, before)


def wait_as(rank, world_size=2):
    return rendezvous.form_group(rank, world_size, torch.device("cpu"))


def test_a_missing_rank_is_named_and_a_signal_ends_the_wait(place, alarm):
    told = alarm("of 5")
    with pytest.raises(Alarm):
        wait_as(0, world_size=5)
    assert told[-1].startswith(f"rank 0 is waiting for ranks 1-4 of 5 at {place} (")


def test_without_a_listener_rank_0_is_missing(place, alarm):
    told = alarm("does not listen")
    with pytest.raises(Alarm):
        wait_as(1)
    assert told[-1].startswith(
        f"rank 1 is waiting for rank 0, which does not listen at {place} (MASTER_ADDR:MASTER_PORT) yet ("
    )


def test_a_listener_that_does_not_answer_is_doubted(place, alarm):
    host, _, port = place.partition(":")
    told = alarm("is another program listening there?")
    with socket.create_server((host, int(port))), pytest.raises(Alarm):
        wait_as(1)
    assert told[-1].startswith(f"rank 1 is waiting for an answer at {place} (MASTER_ADDR:MASTER_PORT); is another")


def test_a_wait_has_a_limit(place, monkeypatch):
    monkeypatch.setattr(rendezvous, "TIMEOUT", rendezvous.timedelta(seconds=0.5))
    with pytest.raises(UserError, match=rf"MASTER_PORT = \d+: rank 0 has waited 0\.5s for rank 1 of 2 at {place}: start all"):
        wait_as(0)


def test_processes_that_meet_but_cannot_connect(place, monkeypatch):
    def init_process_group(*arguments, **options):
        raise dist.DistBackendError("Connect timeout [127.0.0.1]:1234")

    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.setattr(rendezvous._Meeting, "_until", lambda self, condition, explain=None: None)
    with pytest.raises(JobLost, match=r"have met at 127\.0\.0\.1:\d+ but cannot connect to each other \(Connect timeout"):
        wait_as(0)


def test_a_store_that_goes_during_the_wait(place, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    port = int(place.partition(":")[2])
    store = [dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)]
    monkeypatch.setattr(rendezvous._Meeting, "_missing", lambda self, joined: store.clear())  # its end
    with pytest.raises(JobLost, match=rf"the store at {place} has gone \(.*\): a process has ended"):
        wait_as(1)


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")])
def test_ranks_as_text(numbers, text):
    assert rendezvous.ranges(numbers) == text


@pytest.fixture
def processes(tiny, tmp_path, place):
    """`processes(ranks, world_size, *options)`: `bardling train` as these ranks, without a launcher, and their output."""
    recipe, output, running = tmp_path / "recipe.toml", tmp_path / "output.txt", []
    recipe.write_text(config_to_toml(tiny))
    code = "from bardling.distributed import refusals, rendezvous; rendezvous.REMINDERS, refusals.PATIENCE = (0.5,), 60.0\n"
    code += "from bardling.cli.main import main; main()"
    command = [sys.executable, "-c", code, "train", str(recipe), "--device", "cpu", "--out", str(tmp_path / "run")]

    def start(ranks, world_size, *options):
        with output.open("a") as file:
            for rank in ranks:
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(world_size)}
                running.append(subprocess.Popen([*command, *options], env=environment, stdout=file, stderr=file))
        return running, output

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_one_process_tells_whom_all_wait_for_and_a_signal_leaves_nothing(processes, place, tmp_path):
    (first, second), output = processes((0, 2), 4)
    end = time.monotonic() + 120
    while "of 4 at" not in output.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    first.send_signal(signal.SIGHUP)
    second.send_signal(signal.SIGTERM)
    assert (first.wait(60), second.wait(60)) == (129, 143)
    lines = output.read_text().splitlines()
    told = [line for line in lines if f" of 4 at {place}" in line]
    assert len({line.partition(" is waiting for rank")[0] for line in told}) == 1
    others = {line for line in lines if line not in told and "does not listen" not in line and "resolved" not in line}
    assert others == {"bardling: interrupted"}
    assert not (tmp_path / "run").exists()


def test_a_refusal_is_printed_once(processes):
    both, output = processes((0, 1), 2, "--data.source", "/no/such/text.txt")
    assert [process.wait(120) for process in both] == [2, 2]
    lines = output.read_text().splitlines()  # a slow start may also tell whom it waits for
    assert sum("bardling: data.source = '/no/such/text.txt'" in line for line in lines) == 1, lines


def test_torchrun_prints_a_refusal_once(torchrun, tiny, tmp_path):
    (tmp_path / "recipe.toml").write_text(config_to_toml(tiny))
    done = torchrun(2, "train", tmp_path / "recipe.toml", "--train.stepz", "3")
    assert done.stderr.count("bardling: unknown option --train.stepz") == 1, done.stderr
    assert done.stderr.count("exitcode  : 2") == 2, done.stderr


def test_a_refusal_that_cannot_be_shared_is_printed(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(refusals, "PATIENCE", 0.1)
    with refusals.one_voice("no such file") as first:
        assert first
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN


def test_only_the_first_of_equal_refusals_is_printed(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(refusals, "PATIENCE", 0.1)
    variables = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in (variables | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    voices = []
    for rank, message in enumerate(("a", "a", "b")):
        monkeypatch.setenv("RANK", str(rank))
        with refusals.one_voice(message) as first:
            voices.append(first)
    assert voices == [True, False, True]


@pytest.fixture
def split_folders(tmp_path):
    """Working directories of two processes where `shared` is the same folder, and `own` is one of each."""
    (tmp_path / "shared").mkdir()
    for rank in range(2):
        (tmp_path / f"node{rank}" / "own").mkdir(parents=True)
        (tmp_path / f"node{rank}" / "shared").symlink_to(tmp_path / "shared")
    return [tmp_path / f"node{rank}" for rank in range(2)]


@pytest.fixture
def nodes(split_folders, tiny, change, place, tmp_path):
    """`nodes(*argv)`: `bardling ARGV` in two processes, each in its own working directory; their statuses and output."""
    (tmp_path / "recipe.toml").write_text(config_to_toml(change(tiny, train={"steps": 2}, optim={"warmup_steps": 1})))
    code = (
        "from bardling.training import shared_folder; shared_folder.PATIENCE = 0.5\nfrom bardling.cli.main import main; main()"
    )

    def run(*argv, cache=None):
        running = []
        for rank, folder in enumerate(split_folders):
            with (tmp_path / f"output{rank}.txt").open("w") as file:
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2"}
                environment |= {} if cache is None else {"BARDLING_CACHE": str(folder / cache)}
                command = [sys.executable, "-c", code, *map(str, argv)]
                running.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file))
        try:
            statuses = [process.wait(120) for process in running]
        finally:
            for process in running:
                process.kill()
        return statuses, [(tmp_path / f"output{rank}.txt").read_text() for rank in range(2)]

    return run


def test_a_node_that_does_not_see_the_run_folder_is_named(nodes, split_folders, tmp_path):
    statuses, outputs = nodes("train", tmp_path / "recipe.toml", "--out", "own/run")
    assert statuses == [2, 2]
    lines = "".join(outputs).splitlines()
    (line,) = [line for line in lines if "is waiting for" not in line and "have joined" not in line]
    host = socket.gethostname()
    assert line == (
        f"bardling: {split_folders[0] / 'own' / 'run'}: is not the same folder on {host} (rank 1) as for rank 0 on {host}: "
        "put the run into a folder that all nodes share, under the same path"
    )
    assert [list((folder / "own").iterdir()) for folder in split_folders] == [[], []]


def test_processes_with_one_run_folder_train_and_a_node_that_has_lost_it_is_named(nodes, split_folders, tmp_path):
    statuses, outputs = nodes("train", tmp_path / "recipe.toml", "--out", "shared/run")
    assert statuses == [0, 0], outputs
    assert list(tmp_path.glob("shared/.*")) + list(tmp_path.glob("shared/run/.*")) == []
    (split_folders[1] / "shared").unlink()
    statuses, outputs = nodes("resume", "shared/run", "--train.steps", "3")
    assert statuses == [2, 2], outputs
    assert "is not the same folder on" in "".join(outputs)
    assert "(rank 1)" in "".join(outputs)


def test_nodes_with_different_tokens_are_named(nodes, split_folders, corpus, tmp_path):
    for rank, folder in enumerate(split_folders):
        (folder / "text.txt").write_text(corpus.read_text() + f"Node {rank}.\n")
    argv = ["train", tmp_path / "recipe.toml", "--out", "shared/run", "--data.source", "text.txt"]
    statuses, outputs = nodes(*argv, cache="own")
    assert statuses == [2, 2], outputs
    assert f"the tokens on {socket.gethostname()} (rank 1) differ from those of rank 0: prepare them once" in "".join(outputs)
    assert not (tmp_path / "shared" / "run").exists()
