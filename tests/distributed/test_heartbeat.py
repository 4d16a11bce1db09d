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

    def read_after_a_beat(**how):
        starved.b._publish()
        read(**how)

    monkeypatch.setattr(starved.a, "_read", read_after_a_beat)
    assert starved.a.missing() == []


def test_without_the_store_the_last_known_state_decides(starved, monkeypatch):
    reads = []

    def gone(**how):
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


class CountingStore:
    """A store in memory that counts its operations, and fails instead of waiting for a key that does not exist."""

    def __init__(self):
        self.values, self.operations = {}, 0

    def set_timeout(self, timeout):
        pass

    def set(self, key, value):
        self.operations += 1
        self.values[key] = value if isinstance(value, bytes) else value.encode()

    def check(self, keys):
        self.operations += 1
        return all(key in self.values for key in keys)

    def multi_get(self, keys):
        self.operations += 1
        return [self.values[key] for key in keys]


class Cluster:
    """The heartbeats of a large job, without their threads; `beat(ranks)` is one interval of these ranks."""

    def __init__(self, size):
        self.store, self.size = CountingStore(), size
        self.watches = [Heartbeat(self.store, rank, size, TIMEOUT, interval=0.03) for rank in range(size)]

    def beat(self, ranks=None):
        """Returns the number of store operations."""
        before = self.store.operations
        for rank in range(self.size) if ranks is None else ranks:
            self.watches[rank]._publish()
            self.watches[rank]._read()
        return self.store.operations - before

    def silent(self, reader, ranks, beats=12):
        """The ranks that have not sent a pulse to `reader` in the last of several intervals of `ranks`."""
        for _ in range(beats):
            self.beat(ranks)
        for seen in self.watches[reader]._seen.values():
            seen.beat_at = 0.0
        self.beat(ranks)
        self.beat(ranks)
        return {rank for rank, seen in self.watches[reader]._seen.items() if not seen.beat_at}


@pytest.mark.parametrize(("size", "groups"), [(2, 0), (8, 0), (64, 8), (70, 9), (512, 24)])
def test_store_operations_grow_with_the_number_of_processes(size, groups):
    cluster = Cluster(size)
    for _ in range(3):  # until every key exists
        cluster.beat()
    assert cluster.beat() == 2 * size + groups
    assert all(watch._seen.keys() == set(range(size)) - {rank} for rank, watch in enumerate(cluster.watches))


def test_all_processes_see_each_other_in_large_jobs():
    cluster = Cluster(64)
    assert all(cluster.silent(reader, range(64)) == set() for reader in (0, 9, 63))


@pytest.mark.parametrize("dead", [{8}, {9}, {0}, {8, 9, 15}, set(range(16, 24))])
def test_only_the_dead_are_silent_even_if_they_lead_their_group(dead):
    cluster = Cluster(64)
    cluster.beat()
    cluster.beat()
    living = [rank for rank in range(64) if rank not in dead]
    for reader in (living[0], living[8], living[-1]):
        assert cluster.silent(reader, living) == dead


def test_a_process_that_never_starts_hides_no_other():
    cluster = Cluster(64)
    living = [rank for rank in range(64) if rank != 24]
    for _ in range(8):
        cluster.beat(living)
    assert cluster.watches[0]._seen.keys() == set(range(1, 64)) - {24}
    assert cluster.beat(living) < 5 * 64


def test_the_end_of_a_process_is_seen_directly():
    cluster = Cluster(64)
    for _ in range(3):
        cluster.beat()
    cluster.watches[20].close("OSError")
    cluster.watches[0]._read(directly=True)
    assert cluster.watches[0]._seen[20].pulse.ended == "OSError"
    cluster.watches[0]._read()  # the entry of its group is older
    assert cluster.watches[0]._seen[20].pulse.ended == "OSError"


def test_a_process_that_hangs_in_an_earlier_pass_is_behind(pair):
    for watch, passes in ((pair.a, 2), (pair.b, 1)):
        for number in range(passes):
            watch.activity(f"pass {number + 1} of 2 of step 8", shared=True)
    assert pair.ended.wait(LATE)
    said = pair.said()
    assert re.search(r"rank 1 .* has made no progress for \d+ s in: pass 1 of 2 of step 8", said), said
    assert "rank 0" not in said
