"""Every layout of the processes trains as one process does, from the same initial weights."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from layout_program import alone

PROGRAM = Path(__file__).with_name("layout_program.py")

DDP, FSDP, HSDP, FSDP4 = (2, 1, 1, 1), (1, 2, 1, 1), (2, 2, 1, 1), (1, 4, 1, 1)
FEW = [
    {"layout": FSDP, "optim": "muon", "family": "llama"},
    {"layout": FSDP, "precision": "float16", "steps": 5},
    {"layout": FSDP, "recompute": True, "reshard": False, "steps": 5, "width": 44},  # rows that do not divide evenly
    {"layout": HSDP, "family": "qwen3", "tied": False, "whole_gradients": True},
    {"layout": FSDP4, "width": 96, "vocab_multiple": 4, "optim": "adamw"},
]
ALL = [
    {"layout": layout, "family": family, "optim": optim, "tied": tied}
    for layout, family, optim, tied in itertools.product(
        (DDP, FSDP, HSDP, FSDP4), ("gpt2", "llama", "qwen3"), ("adamw", "muon"), (True, False)
    )
]


def processes(case):
    size = 1
    for axis in case["layout"]:
        size *= axis
    return size


def name(case):
    return ", ".join(f"{key} {'x'.join(map(str, value)) if key == 'layout' else value}" for key, value in case.items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function that returns the results of a case on all ranks; the cases of a list run in few jobs."""
    found: dict[str, list[dict]] = {}

    def results(case, cases):
        if name(case) not in found:
            size = processes(case)
            group = [other for other in cases if processes(other) == size]
            folder = tmp_path_factory.mktemp("layouts")
            (folder / "cases.json").write_text(json.dumps(group))
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
            job = [*launch, str(PROGRAM), str(folder / "cases.json"), str(folder / "results.json")]
            done = subprocess.run(job, capture_output=True, text=True, timeout=1800, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            ranks = json.loads((folder / "results.json").read_text())
            found.update({name(other): each for other, each in zip(group, ranks, strict=True)})
        return found[name(case)]

    return results


def check(case, ranks):
    expected, tolerance = alone(case), 1e-5 if case.get("precision", "float32") == "float32" else 1e-2
    for found in ranks:
        assert found["initial"] == expected["initial"]
        assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance)
        assert found["norms"] == pytest.approx(expected["norms"], rel=tolerance)
        assert found["scale"] == expected["scale"]
        assert found["weights"] == ranks[0]["weights"]
    assert ranks[0]["losses"][-1] < ranks[0]["losses"][0]
    assert ranks[0]["weights"] == pytest.approx(expected["weights"], rel=1e-2, abs=0.05)
    assert ranks[0]["averages"] == pytest.approx(expected["averages"], rel=1e-2, abs=0.05)


@pytest.mark.parametrize("case", FEW, ids=name)
def test_a_layout_trains_as_one_process(trained, case):
    check(case, trained(case, FEW))


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=name)
def test_all_layouts_train_as_one_process(trained, case):
    check(case, trained(case, ALL))


def test_four_shards_hold_at_most_three_tenths_of_the_memory(trained):
    case = FEW[-1]
    whole, ranks = alone(case), trained(case, FEW)
    for found in ranks:
        assert found["memory"] <= 0.30 * whole["memory"]
        assert found["saved"] <= 0.30 * whole["saved"]  # in addition, while it is written
    assert sum(found["saved"] for found in ranks) == whole["saved"]
