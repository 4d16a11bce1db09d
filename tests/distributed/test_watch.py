"""The heartbeat: who has died, who is stuck, and who is only slow."""

import re
import threading
import time

import pytest
import torch.distributed as dist

from bardling.distributed.watch import LONG, Watch, lost_connection
from bardling.errors import JobLost

TIMEOUT = 3.0
LATE = 30  # seconds that a busy machine may take to come to what happens by itself


@pytest.fixture
def pair(capfd):
    """Two processes' heartbeats in one; `pair.ended` is set when rank 0 ends the job."""
    store = dist.HashStore()

    class Pair:
        ended = threading.Event()
        a = Watch(store, 0, 2, TIMEOUT, interval=0.03, leave=lambda status: Pair.ended.set())
        b = Watch(store, 1, 2, TIMEOUT, interval=0.03, leave=lambda status: None)

        @staticmethod
        def said():
            return capfd.readouterr().err

    for watch in (Pair.a, Pair.b):
        watch.steady()
        watch.doing("pass 1 of 2 of step 7", LONG)
        watch.start()
    end = time.monotonic() + LATE
    while not (Pair.a._seen and Pair.b._seen):
        assert time.monotonic() < end, "they do not see each other"
        time.sleep(0.01)
    for watch in (Pair.a, Pair.b):
        watch.doing("pass 1 of 2 of step 7")  # the time runs from here
    yield Pair
    Pair.a.close("done")
    Pair.b.close("done")


def test_a_process_that_falls_silent_is_named_with_what_it_did(pair):
    pair.b._stop.set()  # as if it had been killed or stopped: its thread beats no more
    assert pair.ended.wait(LATE)
    said = pair.said()
    assert re.search(r"^bardling: rank 1 \(.*, process \d+\) has not answered for \d+ s; .*pass 1 of 2 of step 7", said), said
    assert said.count("\n") == 1


def test_a_process_that_beats_but_makes_no_progress_is_named_and_who_waits_for_it_is_not(pair):
    pair.a.enter()
    pair.b.doing("reading a batch")
    assert pair.ended.wait(LATE)
    said = pair.said()
    assert re.search(r"rank 1 .* has made no progress for \d+ s in: reading a batch", said), said
    assert "rank 0" not in said


def test_work_that_is_long_by_nature_is_waited_for(pair):
    pair.a.enter()
    pair.b.doing("saving step 7", LONG)
    assert not pair.ended.wait(1.5 * TIMEOUT)


def test_work_that_goes_on_is_no_fault(pair):
    pair.a.enter()
    end = time.monotonic() + 1.5 * TIMEOUT
    while time.monotonic() < end:
        pair.b.moved()
        time.sleep(0.05)
    assert not pair.ended.is_set()


def test_a_process_that_has_left_in_order_is_not_missed(pair):
    pair.b.close("done")
    end = time.monotonic() + 1.5 * TIMEOUT
    while time.monotonic() < end:
        pair.a.moved()
        time.sleep(0.05)
    assert not pair.ended.is_set()


def test_a_failed_operation_is_explained_by_who_has_gone(pair):
    pair.b.close("OSError")
    with pytest.raises(JobLost, match=r"rank 1 .* has ended \(OSError\); it was last in: pass 1 of 2 of step 7"):
        pair.a.explain(RuntimeError("gloo: Connection closed by peer"))


def test_what_a_process_has_said_to_the_user_is_not_said_again(pair):
    pair.b.close("UserError")
    with pytest.raises(SystemExit) as left:
        pair.a.explain(RuntimeError("gloo: Connection closed by peer"))
    assert left.value.code == 2


@pytest.fixture
def starved(pair):
    """The pair, when the thread of `a` gets no time: what it has seen of `b` is long ago."""
    pair.a._stop.set()
    pair.a._thread.join()
    pair.a._seen[1].beat_at -= 100.0
    return pair


def test_who_was_held_up_itself_takes_an_orderly_end_for_no_death(starved):
    starved.b.close("UserError")
    with pytest.raises(SystemExit) as left:
        starved.a.explain(RuntimeError("gloo: Connection closed by peer"))
    assert left.value.code == 2


def test_who_was_held_up_itself_takes_who_lives_for_alive(starved, monkeypatch):
    read = starved.a._read

    def read_after_a_beat():
        starved.b._beat += 1
        starved.b._publish()
        read()

    monkeypatch.setattr(starved.a, "_read", read_after_a_beat)
    assert starved.a.missing() == []


def test_where_the_store_has_gone_too_what_was_seen_last_must_do(starved, monkeypatch):
    reads = []

    def gone():
        reads.append(1)
        raise RuntimeError("Broken pipe")

    monkeypatch.setattr(starved.a, "_read", gone)
    assert [pulse.rank for pulse in starved.a.missing()] == [1]
    starved.a._seen[1].beat_at += 200.0
    reads.clear()
    assert starved.a.missing() == []
    assert len(reads) == 1, "each may wait for as long as the timeout"


def test_only_failures_between_processes_are_explained_so():
    assert lost_connection(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3127"))
    assert not lost_connection(RuntimeError("shape '[2, 3]' is invalid for input of size 4"))
    assert not lost_connection(ValueError("gloo"))
