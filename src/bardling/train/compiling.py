"""The model as the step calls it: compiled when that pays, and with gradients synchronised between processes."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bardling.config import RunConfig
from bardling.distributed.context import Context
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.train.loop import Hook
from bardling.train.plan import TrainPlan
from bardling.train.state import TrainState
from bardling.train.step import StepResult

# What was measured on GPT-2 shapes: compilation takes about this long, and removes about this part of a step's time.
_COST_SECONDS = {"cpu": 45.0, "cuda": 60.0}
_SAVED_PART = {"cpu": 0.15, "cuda": 0.35}
_TYPICAL_MFU = {"cpu": 0.5, "cuda": 0.3}


def compile_pays(run_flops: float, peak_flops: float | None, device: torch.device, shapes: int = 1) -> tuple[bool, str]:
    """Judge whether compiling saves time over the whole run, with the reason.

    Args:
        run_flops: FLOPs that this process's device will compute in the whole run.
        peak_flops: the device's peak (FLOP/s), or None when it is unknown.
        shapes: of batches; each is compiled for itself.
    """
    if device.type not in _COST_SECONDS:
        return False, f"not reliable on {device.type}"
    if peak_flops is None:
        peak_flops = 100e12  # an unknown GPU: any of them is far above a CPU, which is all that matters here
    seconds = run_flops / (peak_flops * _TYPICAL_MFU[device.type])
    saved, cost = seconds * _SAVED_PART[device.type], _COST_SECONDS[device.type] * shapes
    if saved > 2 * cost:
        return True, f"saves about {saved:.0f} s for about {cost:.0f} s of compiling"
    return False, f"would save about {saved:.0f} s and cost about {cost:.0f} s"


def patience(plan: TrainPlan, context: Context, *, compiled: bool) -> Hook:
    """A hook that tells the watch over the processes after which steps the next one may take long: it compiles a new shape."""

    def after(state: TrainState, result: StepResult | None) -> None:
        if compiled and plan.at(state.step).first_step == state.step:
            context.unsteady()
        elif result is not None:
            context.steady()

    return after


def asked_to_compile(config: RunConfig, device: torch.device) -> tuple[bool | None, str]:
    """Whether the configuration says to compile, None where it leaves that open; and why.

    Raises:
        UserError: it wants CUDA graphs of another device.
    """
    if config.cuda_graphs and device.type != "cuda":
        raise UserError(f"cuda_graphs = True on {device.type}: there are none but on NVIDIA GPUs; leave it out")
    if config.compile == "auto":
        return (True, "for CUDA graphs") if config.cuda_graphs else (None, "")
    return config.compile == "on", "as asked"


class _CompiledBody(nn.Module):
    """The model on a CPU: its transformer compiled, its head as it is. What `model/loss.py` does chunk by chunk and in place,
    compiled code would do with several copies of the weight's gradient at a time, and no faster."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model
        self.body = torch.compile(model.transformer, dynamic=False)

    def forward(
        self, tokens: Tensor, targets: Tensor, *, reduction: Literal["sum"] = "sum", documents: Tensor | None = None
    ) -> Tensor:
        """As `GPT.forward`."""
        table, head = self.model.ends()
        return self.model.loss(self.body(tokens, None, documents, table), targets, head, reduction)


class _Replayed(nn.Module):
    """The model compiled into CUDA graphs: all kernels of a pass start with one call, so a host that is slower than the GPU no
    longer holds it up.

    A graph writes its results, gradients too, to the same memory in every pass. The training step must therefore add each
    pass' gradients to memory of its own before the next (`train_step`'s `keep_gradients`), and has read a loss by then.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = torch.compile(model, dynamic=False, mode="reduce-overhead")

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """As `GPT.forward`."""
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        loss: Tensor = self.model(*arguments, **options)
        return loss


def wrap(model: GPT, *, compiled: bool, graphs: bool = False, context: Context) -> nn.Module:
    """The model as the training step calls it: compiled if asked, gradients synchronised if there are several processes.

    Where batch or context grow, each shape is compiled when it first comes: code for fixed sizes is the fastest. PyTorch keeps
    eight of them; a ninth would run as it is, with a warning.

    Args:
        graphs: on CUDA, replay what is compiled as CUDA graphs; steps must then keep gradients in place.
    """
    forward: nn.Module = model
    if compiled:
        if context.device.type == "cpu":
            forward = _CompiledBody(model)
        elif graphs:
            forward = _Replayed(model)
        else:
            forward = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    if context.world_size > 1:
        ids = [context.device.index] if context.device.type == "cuda" else None
        # Every parameter takes part in every step, and there are no buffers to keep equal. (The option that says so has another
        # name from one version of PyTorch to the next, and the old one draws a warning.)
        forward = DistributedDataParallel(forward, device_ids=ids, gradient_as_bucket_view=True)
    return forward
