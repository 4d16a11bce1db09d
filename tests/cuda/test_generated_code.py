"""No generated kernel reads what it has written, unless all of its threads have met in between.

PyTorch's compiler, up to 2.13 at least, splits a reduction over more than 1024 channels into loops. A later loop may read what
an earlier one has stored, and threads may divide the two loops differently (pytorch/pytorch#190519).
"""

import dataclasses
import re

import pytest
from test_numbers import MODELS, batch

from bardling.config import OptimConfig
from bardling.distributed.context import SINGLE
from bardling.distributed.device import Precision
from bardling.training.build import Execution, build

KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", re.DOTALL)
MEETING = re.compile(
    r"debug_barrier|tl\.(sum|max|min|reduce)\(|triton_helpers\.(welford|online_softmax_reduce|max2|min2|any)\("
)
ACCESS = re.compile(r"tl\.(load|store)\((\w+) \+ ")


def races(code: str) -> list[str]:
    """Kernels with a load of what has been stored since threads last met: kernel and pointer."""
    found = []
    for name, body in KERNEL.findall(code):
        stored: set[str] = set()
        for line in body.splitlines():
            if MEETING.search(line):
                stored.clear()
            if (access := ACCESS.search(line)) is None:
                continue
            if access[1] == "store":
                stored.add(access[2])
            elif access[2] in stored:
                found.append(f"{name}: {access[2]}")
    return found


def test_a_race_is_found():
    kernel = "async_compile.triton('k', '''\n{}\n''', device_str='cuda')"
    lines = ["tl.store(in_out_ptr0 + (x), v)", "a = tl.load(in_out_ptr0 + (x))"]
    assert races(kernel.format("\n".join(lines))) == ["k: in_out_ptr0"]
    assert races(kernel.format("\n".join([lines[0], "tl.debug_barrier()", lines[1]]))) == []


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("width", [128, 1600])
def test_compiled_passes_have_no_race(gpu, name, width):
    from torch._inductor.utils import run_and_get_code

    wide = {"n_embd": 1600, "n_head": 25, "n_kv_head": 5 if MODELS[name].n_kv_head else None} if width > 128 else {}
    execution = Execution(Precision("bfloat16", "", "cuda"), compiled=True)
    context = dataclasses.replace(SINGLE, device=gpu)
    assembly = build(dataclasses.replace(MODELS[name], **wide), OptimConfig(), execution, context)
    given = batch(gpu)

    def passes() -> None:
        with execution.precision.autocast():
            loss = assembly.forward(given.inputs, given.targets)
        loss.backward()

    _, sources = run_and_get_code(passes)
    assert sources
    assert [race for source in sources for race in races(source)] == []
