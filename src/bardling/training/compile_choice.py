"""Whether `compile = "auto"` compiles: only when compilation works here and the run is long enough for it to pay off."""

from functools import partial

import torch

from bardling.config import ModelConfig, TuneConfig
from bardling.errors import UserError
from bardling.planning.batching import TrainPlan
from bardling.planning.costs import flops_per_token, recomputed_flops_per_token
from bardling.training.build import Execution

AS_CONFIGURED = "as configured"

# Measured on GPT-2 shapes: how long compilation takes, and the fraction of a step's time that it saves.
_COST_SECONDS = {"cpu": 45.0, "cuda": 60.0}
_SAVED_FRACTION = {"cpu": 0.15, "cuda": 0.35}
_TYPICAL_MFU = {"cpu": 0.5, "cuda": 0.3}


def choose_compile(
    setting: str,
    cuda_graphs: bool,
    device: torch.device,
    flops: float,
    peak_flops: float | None,
    shapes: int = 1,
    *,
    deadline: float | None = None,
) -> tuple[bool, str]:
    """Whether to compile, and why: as configured, or if that saves time over the whole run.

    Args:
        flops: FLOPs that this process's device will compute in the whole run.
        peak_flops: peak of the device (FLOP/s), or None when unknown.
        shapes: number of different batch shapes; each is compiled separately.
        deadline: seconds that the run lasts whatever its number of steps, if it has a deadline.

    Raises:
        UserError: CUDA graphs are requested on a device that is not an NVIDIA GPU.
    """
    if cuda_graphs and device.type != "cuda":
        raise UserError(f"cuda_graphs = True on {device.type}: only NVIDIA GPUs have CUDA graphs; leave it out")
    if setting != "auto":
        return setting == "on", AS_CONFIGURED
    if cuda_graphs:
        return True, "for CUDA graphs"
    if device.type not in _COST_SECONDS:
        return False, f"not reliable on {device.type}"
    if peak_flops is None:
        peak_flops = 100e12  # an unknown GPU: far above a CPU, which is all that matters here
    seconds = flops / (peak_flops * _TYPICAL_MFU[device.type]) if deadline is None else deadline
    saved, cost = seconds * _SAVED_FRACTION[device.type], _COST_SECONDS[device.type] * shapes
    if saved > 2 * cost:
        return True, f"saves about {saved:.0f} s for about {cost:.0f} s of compiling"
    return False, f"would save about {saved:.0f} s and cost about {cost:.0f} s"


def without_compiler(problem: str, setting: str, cuda_graphs: bool) -> str:
    """Why a run that would compile runs eagerly, as `compile = "auto"` may.

    Args:
        problem: why compilation fails on this machine.

    Raises:
        UserError: the run has to compile.
    """
    if setting != "auto" or cuda_graphs:
        asked = f"compile = {setting!r}" if setting != "auto" else f"cuda_graphs = {cuda_graphs}"
        instead = "use --compile off" + (" and --cuda_graphs false" if cuda_graphs else "")
        raise UserError(f"{asked}: torch.compile does not work here, because {problem}; {instead}")
    return problem


def run_flops(model: ModelConfig, tune: TuneConfig, plan: TrainPlan, execution: Execution) -> float:
    """FLOPs of the whole run, over all processes."""
    flops = plan.cost(partial(flops_per_token, model, tune=tune))
    if execution.recompute:
        name, kind = execution.precision.name, execution.precision.device_type
        cost = partial(recomputed_flops_per_token, model, precision=name, device_type=kind, fp8=execution.fp8)
        flops += plan.cost(cost)
    return flops
