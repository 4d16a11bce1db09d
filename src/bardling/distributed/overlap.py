"""FSDP2 on CPUs: exchanges go on while the model computes, as streams make them on CUDA.

PyTorch waits for each exchange on a CPU, and gloo sums gradients in all processes before each takes its part. Here the weights
of the next module are gathered during a module's forward pass, and gradients are exchanged by all-to-all and summed when they
are needed, or at the latest when `_OPEN` later modules have begun their exchanges, which bounds memory.

Limits: uses parts of PyTorch's FSDP2 that are not public; not for copies of shards (HSDP), where PyTorch goes on to exchange
the sums at once.
"""

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_OPEN = 2  # exchanges of gradients at the same time, each of which holds the gradients of a module


class Reductions:
    """The exchanges of gradients that have begun; `finish` must precede every use of the sharded gradients."""

    def __init__(self, modules: list[Any]) -> None:
        """Take over the exchanges of sharded modules, which run in this order."""
        from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

        outer = self

        class Reduction(ReduceScatter):
            def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
                return torch.empty(size, dtype=dtype, device=device)

            def __call__(
                self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
            ) -> None:
                outer.begin(self, output_tensor, input_tensor, group, average=op == dist.ReduceOp.AVG)

        self._open: deque[tuple[Any, Tensor, Tensor, bool]] = deque()
        self._begun = set[object]()
        for module, following in zip(modules, [*modules[1:], None], strict=True):
            module.set_custom_reduce_scatter(Reduction())
            module._set_unshard_async_op(True)
            if following is not None:
                module.set_modules_to_forward_prefetch([following])

    def begin(self, module: object, output: Tensor, gradients: Tensor, group: dist.ProcessGroup, *, average: bool) -> None:
        """Begin to set `output` to this process's part of the summed `gradients`, [processes x elements]."""
        received = torch.empty_like(gradients)
        work = dist.all_to_all_single(received, gradients, group=group, async_op=True)
        self._open.append((work, received.view(dist.get_world_size(group), -1), output, average))
        # PyTorch goes on computing with the output if it is no mean yet, and if it adds a second pass to the first.
        self._finish(_OPEN if average and module not in self._begun else 0)
        self._begun.add(module)

    def finish(self) -> None:
        """Wait for all exchanges."""
        self._finish(0)
        self._begun.clear()

    def _finish(self, most: int) -> None:
        while len(self._open) > most:
            work, received, output, average = self._open.popleft()
            work.wait()
            torch.sum(received, dim=0, out=output)
            if average:
                output.div_(len(received))
