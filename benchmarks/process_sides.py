"""What the workers of `processes.py` run: the library in one or several processes, and FSDP2 in plain PyTorch.

The program starts the other ranks itself, as `torchrun` would, and is rank 0. All ranks read the same requests: rank 0 passes
them on. Only rank 0 responds; the last line that any rank prints to standard error is reported if the worker exits.

`plain` shares no code with the library: `fully_shard` for each block and for the whole of `PlainGPT`, fused AdamW on the
sharded parameters, `clip_grad_norm_`, and one collective per step for the loss.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import IO, Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from implementations import RandomSequences, Shares, initial_weights, run_ours
from plain import PlainGPT, make_adamw, plain_steps
from workers import Spec, StepServer, run_worker


class _Requests:
    """Standard input of rank 0, passed on to the other ranks."""

    def __init__(self, source: IO[str], others: list["subprocess.Popen[str]"]) -> None:
        self._source, self._others = source, others

    def readline(self) -> str:
        line = self._source.readline()
        for other in self._others:
            assert other.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # the next collective reports it
                if line:
                    other.stdin.write(line)
                    other.stdin.flush()
                else:
                    other.stdin.close()
        return line


@contextlib.contextmanager
def all_ranks(count: int) -> Iterator[None]:
    """Start ranks 1 to `count` - 1 with the same program and arguments, and be rank 0."""
    if count == 1 or "RANK" in os.environ:
        yield
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    others = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={**os.environ, "RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(1, count)
    ]
    os.environ["RANK"] = "0"
    sys.stdin = _Requests(sys.stdin, others)  # type: ignore[assignment]
    try:
        yield
    finally:
        for other in others:
            assert other.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                other.stdin.close()
            try:
                other.wait(timeout=20)
            except subprocess.TimeoutExpired:  # it waits for a rank that has failed
                other.kill()
                other.wait()


def run_plain_fsdp(spec: Spec, server: StepServer) -> None:
    """FSDP2 as PyTorch's documentation shows it."""
    dist.init_process_group("gloo")
    model = PlainGPT(spec.model, int(spec.model["vocab_size"]))
    model.load_state_dict(initial_weights(spec, int(spec.model["vocab_size"])))
    for block in model.transformer["h"]:
        fully_shard(block, reshard_after_forward=spec.reshard)
    fully_shard(model)
    optimizer = make_adamw(model, fused=True)
    server.ready(model, precision="float32", compiled=False)
    steps = plain_steps(
        model,
        model,
        optimizer,
        _own_batches(spec),
        accumulation=spec.accumulation,
        rate=spec.rate,
        autocast=contextlib.nullcontext,
    )
    try:
        while True:
            server.before()
            loss = next(steps)
            dist.all_reduce(loss, op=dist.ReduceOp.SUM)
            server.after(loss / dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _own_batches(spec: Spec) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's rows of each batch."""
    source = Shares(RandomSequences(int(spec.model["vocab_size"]), int(spec.model["block_size"])), spec.batch)
    rows = spec.batch // dist.get_world_size()
    first = dist.get_rank() * rows
    while True:
        batch = source.batch(first, rows)
        yield batch.inputs, batch.targets
        first += spec.batch


def _main(values: dict[str, Any], server: StepServer) -> None:
    spec = Spec(**{**values, "without": tuple(values["without"]), "more": tuple(values["more"])})
    (run_plain_fsdp if spec.kind == "plain" else run_ours)(spec, server)


if __name__ == "__main__":
    with all_ranks(json.loads(sys.argv[1])["processes"]):
        run_worker(_main)
