"""Golden losses of fifty float32 steps, which reveal any change of the numerics.

After an intended change of the numerics, delete `golden_losses.json` and run this test: it writes the file and fails, so that
the new losses are reviewed.
"""

import json
from pathlib import Path

import pytest

from bardling.training.run import train

GOLDEN = Path(__file__).parent / "golden_losses.json"


def test_fifty_steps_give_the_golden_losses(tiny, change, tmp_path):
    config = change(
        tiny,
        model={"n_embd": 32, "block_size": 32},
        train={"steps": 50, "batch_size": 8, "micro_batch": 4},
        eval={"every": 25},
        sample={"every": 0},
    )
    run = train(config, tmp_path / "run", quiet=True).folder
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {kind: [record["loss"] for record in records if record["kind"] == kind] for kind in ("train", "val")}
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{GOLDEN.name} was missing and has been written: review it, and run again")
    golden = json.loads(GOLDEN.read_text())
    # Other processors sum in another order; a wrong formula shows in the first three digits.
    assert found["train"] == pytest.approx(golden["train"], rel=2e-4)
    assert found["val"] == pytest.approx(golden["val"], rel=2e-4)
    assert found["val"][-1] < 0.7 * found["train"][0], "it learns"
