"""Whether to compile: only when the run is long enough to earn the compilation back."""

import torch

# What was measured on GPT-2 shapes: compilation takes about this long, and removes about this part of a step's time.
_COST_SECONDS = {"cpu": 45.0, "cuda": 60.0}
_SAVED_PART = {"cpu": 0.15, "cuda": 0.35}
_TYPICAL_MFU = {"cpu": 0.5, "cuda": 0.3}


def compile_pays(run_flops: float, peak_flops: float | None, device: torch.device) -> tuple[bool, str]:
    """Judge whether compiling saves time over the whole run, with the reason.

    Args:
        run_flops: FLOPs that this process's device will compute in the whole run.
        peak_flops: the device's peak (FLOP/s), or None when it is unknown.
    """
    if device.type not in _COST_SECONDS:
        return False, f"not reliable on {device.type}"
    if peak_flops is None:
        peak_flops = 100e12  # an unknown GPU: any of them is far above a CPU, which is all that matters here
    seconds = run_flops / (peak_flops * _TYPICAL_MFU[device.type])
    saved, cost = seconds * _SAVED_PART[device.type], _COST_SECONDS[device.type]
    if saved > 2 * cost:
        return True, f"saves about {saved:.0f} s for about {cost:.0f} s of compiling"
    return False, f"would save about {saved:.0f} s and cost about {cost:.0f} s"
