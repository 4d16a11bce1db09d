"""Wraps the model for the training step: compilation, and gradient synchronization between processes.

A sharded model (`sharding.py`) comes here wrapped already.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bardling.distributed.context import Context
from bardling.model.gpt import GPT


class _CompiledBody(nn.Module):
    """The model on a CPU with a compiled transformer and an eager head. The head loss works in place, chunk by chunk; compiled
    code would hold several copies of the weight gradient and be no faster."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model
        self.body = torch.compile(model.transformer, dynamic=False)

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """As `GPT.forward`."""
        result: Tensor = self.model(*arguments, transformer=self.body, **options)
        return result


class _CudaGraphModel(nn.Module):
    """The model compiled to CUDA graphs: one call launches all kernels of a pass, so a slow host does not delay the GPU.

    A graph writes its results, including gradients, to the same memory in every pass. The training step must therefore read the
    loss and add the gradients to its own memory before the next pass (`StepSettings.keep_gradients`).
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = torch.compile(model, dynamic=False, mode="reduce-overhead")

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """As `GPT.forward`."""
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        loss: Tensor = self.model(*arguments, **options)
        return loss


def wrap(model: GPT, *, compiled: bool, cuda_graphs: bool = False, context: Context) -> nn.Module:
    """Wrap the model for the training step.

    If batch or context grow, each shape is compiled when it first occurs, because code for fixed sizes is the fastest. PyTorch
    keeps eight compiled shapes; a ninth would run eagerly, with a warning.

    Args:
        cuda_graphs: on CUDA, replay compiled passes as CUDA graphs; steps must then keep gradients in place.
    """
    forward: nn.Module = model
    if compiled:
        if context.device.type == "cpu":
            forward = _CompiledBody(model)
        elif cuda_graphs:
            forward = _CudaGraphModel(model)
        else:
            forward = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    if context.data_size > 1:
        ids = [context.device.index] if context.device.type == "cuda" else None
        # Every parameter takes part in every step, and there are no buffers to synchronize. (The option to disable that differs
        # between PyTorch versions, and the old name prints a warning.)
        group = context.group()
        forward = DistributedDataParallel(forward, device_ids=ids, process_group=group, gradient_as_bucket_view=True)
    return forward


@contextlib.contextmanager
def gradient_sync(forward: Any, *, on: bool) -> Iterator[None]:
    """A context in which backward passes synchronize gradients between processes, or accumulate them locally."""
    if isinstance(forward, DistributedDataParallel):
        with contextlib.nullcontext() if on else forward.no_sync():
            yield
        return
    if hasattr(forward, "set_requires_gradient_sync"):  # sharded
        forward.set_requires_gradient_sync(on)
    yield
