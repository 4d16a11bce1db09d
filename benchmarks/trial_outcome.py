"""How a trial of `chaos.py` ended: what its run folder tells, also while it changes, and the table of all trials."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bardling.checkpoint.run_folder import RunFolder
from bardling.monitor.records import TIMING_FIELDS

INTERVAL = 10
"""Steps between two checkpoints."""


@dataclass
class Outcome:
    """How one trial ended."""

    fault: str
    what: str = ""
    starts: int = 1
    survived: bool = False
    model_equal: bool = False
    metrics_equal: bool = False
    lost: int = 0
    unsaved: int = 0  # failed saves that the run reported
    asked_to_stop: bool = False  # by a signal, which must leave a checkpoint
    timed: bool = False  # whether it must end within the limit
    layout: str = ""  # that resumes the run, if another one
    seconds: float = 0.0  # from that signal to the end of the process
    ended_well: bool = True
    limit: float = 5.0  # for these seconds
    resumed: bool = True  # whether the run is resumed and compared
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return self.model_equal and self.metrics_equal

    @property
    def in_time(self) -> bool:
        return not self.timed or self.seconds <= self.limit

    @property
    def good(self) -> bool:
        return (self.equal or not self.resumed) and self.ended_well and self.in_time and self.lost <= self.most_lost

    @property
    def most_lost(self) -> int:
        """Upper bound on the steps that may be lost, whatever the load of the machine."""
        return (2 + self.unsaved) * INTERVAL


def records(run: Path, name: str) -> list[dict[str, object]]:
    """The records of a run without timings; an incomplete last line is ignored."""
    path = run / name
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in TIMING_FIELDS} for line in lines]


def steps_logged(run: Path) -> int:
    """The last logged step, determined cheaply: every step has a line."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        return int(json.loads((run / "metrics.jsonl").read_bytes().rpartition(b"\n")[0].rpartition(b"\n")[2])["step"])
    return 0


def being_saved(run: Path) -> bool:
    """Whether a checkpoint is being written and already has files."""
    try:
        return any(run.glob("checkpoints/.tmp-*/*"))
    except FileNotFoundError:  # it has just been completed
        return False


def newest(run: Path) -> Path | None:
    found = sorted((run / "checkpoints").glob("step-*"))
    return found[-1] if found else None


def ended_well(run: Path, *, saved: bool) -> bool:
    """Whether the latest checkpoint of a run is valid; without one, whether none had to be `saved`, or there is no folder."""
    store = RunFolder(run).store()
    steps = store.steps() if run.is_dir() else []
    return not store.verify(store.path(steps[-1])) if steps else not saved or not run.exists()


def table(outcomes: Sequence[Outcome], faults: Sequence[str], equal: str = "bitwise equal") -> str:
    """A Markdown table: a row per fault, and a total."""
    columns = f"trials | ended well | end after (s, max) | survived | without a restart | {equal} | steps lost (max)"
    rows = [f"| fault | {columns} |", "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for fault in (*faults, "all"):
        some = [outcome for outcome in outcomes if fault in (outcome.fault, "all")]
        if some:
            well, seconds = sum(o.ended_well and o.in_time for o in some), max(o.seconds * o.timed for o in some)
            alone, same = sum(o.survived and o.starts == 1 for o in some), sum(o.equal for o in some)
            survived, lost = sum(o.survived for o in some), max(o.lost for o in some)
            later = f" {survived} | {alone} | {same} | {lost} |" if some[0].resumed else " | | | |"
            rows.append(f"| {fault} | {len(some)} | {well} | {seconds:.1f} |{later}")
    return "\n".join(rows)


def describe(number: int, outcome: Outcome) -> str:
    """A line about a trial."""
    good = "equal" if outcome.equal else "DIFFERENT" if outcome.survived else "LOST" if outcome.resumed else "not resumed"
    good += "" if outcome.lost <= outcome.most_lost else ", TOO MUCH REPEATED"
    good += "" if outcome.ended_well else ", ENDED BADLY"
    good += "" if outcome.in_time else ", TOO SLOW"
    ended = f", ended in {outcome.seconds:.1f} s" if outcome.timed else ""
    notes = ", ".join(outcome.notes)
    return f"{number:3d} {outcome.fault:21s} {outcome.what:40s} {good}{ended}, {outcome.lost} steps lost, {notes}"
