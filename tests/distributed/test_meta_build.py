"""One rank of eight builds its shard of a large model; the whole model never exists in its memory."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from bardling.config import ModelConfig
from bardling.distributed.context import Context
from bardling.distributed.device import Precision
from bardling.planning.layout import Layout
from bardling.training.build import Execution, build_sharded

rank, ranks, sizes = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())  # collectives do nothing
context = Context(rank, ranks, torch.device("cpu")).arranged(Layout(shard=ranks))
execution = Execution(Precision("float32", "", "cpu"))
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
    model, shards = build_sharded(ModelConfig(**sizes), execution, context, seed=0)
events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
peak = now = 0
for event in sorted(events, key=lambda event: event.start_ns()):
    now += event.nbytes()
    peak = max(peak, now)
parameters = {name: p.numel() * 4 for name, p in model.named_parameters()}  # of whole parameters
held = sum(p.numel() * 4 for p in shards.parameters.values())
print(json.dumps([peak, held, max(parameters.values()), sum(parameters.values())]))
"""
XL = {"n_layer": 48, "n_head": 25, "n_embd": 1600, "block_size": 1024, "vocab_size": 50257}
SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "vocab_size": 8192}


@pytest.mark.parametrize("sizes", [SMALL, pytest.param(XL, marks=pytest.mark.slow)], ids=["small", "1.5B"])
def test_the_peak_is_the_shard_and_one_parameter(sizes):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "3", "8", json.dumps(sizes)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    peak, held, largest, whole = json.loads(done.stdout.splitlines()[-1])
    assert held <= whole / 8 * 1.01
    assert held < peak <= held + largest * 1.001
