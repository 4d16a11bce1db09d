"""The heartbeat: processes that have died, hang, or are only slow."""

import re
import threading
import time

import pytest
import torch.distributed as dist

from bardling.distributed import heartbeat
from bardling.distributed.heartbeat import LONG_PATIENCE, Heartbeat, lost_connection
from bardling.errors import JobLost

TIMEOUT = 3.0
LATE = 30  # seconds that a busy machine may take to react


@pytest.fixture
def pair(capfd):
    """The heartbeats of two processes in one process; `pair.ended` is set when rank 0 ends the job."""
    store = dist.HashStore()

    class Pair:
        ended = threading.Event()
        a = Heartbeat(store, 0, 2, TIMEOUT, interval=0.03, leave=lambda status: Pair.ended.set())
        b = Heartbeat(store, 1, 2, TIMEOUT, interval=0.03, leave=lambda status: None)

        @staticmethod
        def said():
            return capfd.readouterr().err

    for watch in (Pair.a, Pair.b):
        watch.warmed_up()
        watch.activity("pass 1 of 2 of step 7", LONG_PATIENCE)
        watch.start()
    end = time.monotonic() + LATE
    while not (Pair.a._seen and Pair.b._seen):
        assert time.monotonic() < end, "they have not seen each other"
        time.sleep(0.01)
    for watch in (Pair.a, Pair.b):
        watch.activity("pass 1 of 2 of step 7")  # the timeout starts here
    yield Pair
    Pair.a.close("done")
    Pair.b.close("done")


def test_a_silent_process_is_named_with_its_last_activity(pair):
    pair.b._stop.set()  # as if it had been killed or stopped
    assert pair.ended.wait(LATE)
    said = pair.said()
    assert re.search(r"^bardling: rank 1 \(.*, process \d+\) has not answered for \d+ s; .*pass 1 of 2 of step 7", said), said
    assert said.count("\n") == 1


def test_a_hanging_process_is_named_and_those_waiting_for_it_are_not(pair):
    pair.a.enter_collective()
    pair.b.activity("reading a batch")
    assert pair.ended.wait(LATE)
    said = pair.said()
    assert re.search(r"rank 1 .* has made no progress for \d+ s in: reading a batch", said), said
    assert "rank 0" not in said


def test_long_activities_are_waited_for(pair):
    pair.a.enter_collective()
    pair.b.activity("saving step 7", LONG_PATIENCE)
    assert not pair.ended.wait(1.5 * TIMEOUT)


def test_progress_is_not_a_fault(pair):
    pair.a.enter_collective()
    end = time.monotonic() + 1.5 * TIMEOUT
    while time.monotonic() < end:
        pair.b.progressed()
        time.sleep(0.05)
    assert not pair.ended.is_set()


def test_a_process_that_ended_normally_is_not_missing(pair):
    pair.b.close("done")
    end = time.monotonic() + 1.5 * TIMEOUT
    while time.monotonic() < end:
        pair.a.progressed()
        time.sleep(0.05)
    assert not pair.ended.is_set()


def test_a_failed_collective_names_the_process_that_is_gone(pair):
    pair.b.close("OSError")
    with pytest.raises(JobLost, match=r"rank 1 .* has ended \(OSError\); it was last in: pass 1 of 2 of step 7"):
        pair.a.explain(RuntimeError("gloo: Connection closed by peer"))


def test_a_user_error_is_not_reported_twice(pair):
    pair.b.close("UserError")
    with pytest.raises(SystemExit) as left:
        pair.a.explain(RuntimeError("gloo: Connection closed by peer"))
    assert left.value.code == 2


@pytest.fixture
def starved(pair):
    """The pair, where the thread of `a` was starved: it last saw `b` long ago."""
    pair.a._stop.set()
    pair.a._thread.join()
    pair.a._seen[1].beat_at -= 100.0
    return pair


def test_a_starved_process_does_not_mistake_an_orderly_end_for_a_death(starved):
    starved.b.close("UserError")
    with pytest.raises(SystemExit) as left:
        starved.a.explain(RuntimeError("gloo: Connection closed by peer"))
    assert left.value.code == 2


def test_a_starved_process_does_not_report_a_living_process(starved, monkeypatch):
    read = starved.a._read

    def read_after_a_beat():
        starved.b._beat += 1
        starved.b._publish()
        read()

    monkeypatch.setattr(starved.a, "_read", read_after_a_beat)
    assert starved.a.missing() == []


def test_without_the_store_the_last_known_state_decides(starved, monkeypatch):
    reads = []

    def gone():
        reads.append(1)
        raise RuntimeError("Broken pipe")

    monkeypatch.setattr(starved.a, "_read", gone)
    assert [pulse.rank for pulse in starved.a.missing()] == [1]
    starved.a._seen[1].beat_at += 200.0
    reads.clear()
    assert starved.a.missing() == []
    assert len(reads) == 1, "each read may wait as long as the timeout"


def test_only_failed_collectives_count_as_lost_connections():
    assert lost_connection(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3127"))
    assert not lost_connection(RuntimeError("shape '[2, 3]' is invalid for input of size 4"))
    assert not lost_connection(ValueError("gloo"))


def test_before_the_first_step_a_process_tells_whom_it_waits_for(monkeypatch, capfd):
    monkeypatch.setattr(heartbeat, "FIRST_NOTICE", 0.2)
    store = dist.HashStore()
    watches = [Heartbeat(store, rank, 3, TIMEOUT, interval=0.03, leave=lambda status: None) for rank in range(3)]
    for watch in watches:
        watch.activity("setting up")
        watch.start()
    watches[1].activity("preparing the data")
    for rank in (0, 2):
        watches[rank].enter_collective()
    end, said = time.monotonic() + LATE, ""
    while said.count("\n") < 2:  # the second, later line shows that only rank 0 tells it
        assert time.monotonic() < end, said
        time.sleep(0.05)
        said += capfd.readouterr().err
    for watch in watches:
        watch.close("done")
    pattern = r"(bardling: waiting for rank 1 \(.*, process \d+\): preparing the data \(\d\.\ds\)\n){2}"
    assert re.fullmatch(pattern, said), said
