"""Peak FLOP/s of accelerators from vendor specs, for the denominator of MFU.

Numbers are for dense matrices with float32 accumulation. Data sheets often state twice as much, for structured sparsity, which
training here does not use. A device must match by its full name; a device that is not in the table, or a MIG slice of one that
is, has no known peak, because another device's peak would make MFU meaningless.

Limits: vendor specs assume the boost clock; a lower power limit lowers the actual peak. Sources: NVIDIA's data sheets of each
product; for GeForce cards the Ampere GA102, Ada and RTX Blackwell architecture papers; AMD's MI300X data sheet.
"""

import re
from dataclasses import dataclass

from bardling.config import ModelConfig
from bardling.planning.costs import fp8_fraction

TERA = 1e12
GIGA = 10**9


@dataclass(frozen=True)
class Accelerator:
    """One product, with its names and vendor specs."""

    key: str  # short name, as users type it
    pattern: str  # regex that must match the full name reported by the driver, in lower case and without the vendor
    bfloat16: float | None  # TFLOP/s, as for the columns below; None if not supported
    float16: float | None
    tf32: float | None  # float32 matmuls with a 10-bit mantissa
    float32: float  # without tensor cores
    memory_gb: float | None  # marketed GB; None if the product comes in several sizes, which the driver's name tells
    float8: float | None = None  # None also if not verified


# Columns after the pattern: bfloat16, float16, tf32, float32 (TFLOP/s), memory (GB), float8 (TFLOP/s).
ACCELERATORS = (
    Accelerator("V100-SXM", r"(tesla )?v100[ -]sxm[23]?([ -]\d+gb)?(-ls)?", None, 125.0, None, 15.7, None),
    Accelerator("V100-PCIe", r"(tesla )?v100[ -]pcie([ -]\d+gb)?", None, 112.0, None, 14.0, None),
    Accelerator("T4", r"(tesla )?t4", None, 65.0, None, 8.1, 16.0),
    Accelerator("A10", r"a10", 125.0, 125.0, 62.5, 31.2, 24.0),
    Accelerator("A30", r"a30", 165.0, 165.0, 82.0, 10.3, 24.0),
    Accelerator("A40", r"a40", 149.7, 149.7, 74.8, 37.4, 48.0),
    Accelerator("A100", r"a100([ -](sxm4?|pcie))?([ -](40|80)gb)?( pcie)?", 312.0, 312.0, 156.0, 19.5, None),
    Accelerator("H100-SXM", r"h100( 80gb hbm3|[ -]sxm5?([ -]80gb)?)", 989.0, 989.0, 494.5, 67.0, 80.0, 1979.0),
    Accelerator("H100-PCIe", r"h100[ -]pcie", 756.0, 756.0, 378.0, 51.0, 80.0),
    Accelerator("H100-NVL", r"h100[ -]nvl", 835.0, 835.0, 417.5, 60.0, 94.0),
    Accelerator("H200-SXM", r"h200([ -]sxm)?", 989.0, 989.0, 494.5, 67.0, 141.0, 1979.0),
    Accelerator("H200-NVL", r"h200[ -]nvl", 835.0, 835.0, 417.5, 60.0, 141.0),
    Accelerator("GH200", r"gh200( (120|480)gb)?", 989.0, 989.0, 494.5, 67.0, 96.0),
    Accelerator("B200", r"b200", 2250.0, 2250.0, 1125.0, 75.0, 180.0),
    Accelerator("L4", r"l4", 121.0, 121.0, 60.0, 30.3, 24.0),
    Accelerator("L40", r"l40", 181.0, 181.0, 90.5, 90.5, 48.0),
    Accelerator("L40S", r"l40s", 362.0, 362.0, 183.0, 91.6, 48.0),
    Accelerator("RTX-A6000", r"rtx[ -]a6000", 154.8, 154.8, 77.4, 38.7, 48.0),
    Accelerator("RTX-6000-Ada", r"rtx[ -]6000[ -]ada([ -]generation)?", 364.2, 364.2, 182.1, 91.1, 48.0),
    Accelerator("RTX-3090", r"(geforce )?rtx[ -]3090", 71.0, 71.0, 35.6, 35.6, 24.0),
    Accelerator("RTX-4080", r"(geforce )?rtx[ -]4080", 97.5, 97.5, 48.7, 48.7, 16.0),
    Accelerator("RTX-4090", r"(geforce )?rtx[ -]4090", 165.0, 165.0, 82.6, 82.6, 24.0),
    Accelerator("RTX-5090", r"(geforce )?rtx[ -]5090", 209.5, 209.5, 104.8, 104.8, 32.0),
    Accelerator("MI300X", r"(instinct )?mi300x", 1307.4, 1307.4, None, 163.4, 192.0),
)


def find_accelerator(device_name: str) -> Accelerator | None:
    """Look up a device by the driver's name ('NVIDIA H100 80GB HBM3') or its short name ('H100-SXM'); None if unknown."""
    name = re.sub(r"\s+", " ", device_name.strip().lower())
    name = re.sub(r"^(nvidia|amd) ", "", name)
    return next((device for device in ACCELERATORS if re.fullmatch(device.pattern, name)), None)


def peak_flops(device_name: str, precision: str, *, tf32: bool = True, fp8: ModelConfig | None = None) -> float | None:
    """Dense peak of one device (FLOP/s), or None if unknown.

    If part of the model runs in float8, this is the speed of the whole model with each part at its own peak, so that MFU stays
    a fraction of what is possible.

    Args:
        device_name: from `torch.cuda.get_device_name`, or a short name in the table.
        precision: 'bfloat16', 'float16' or 'float32'.
        tf32: whether float32 matmuls may use TF32, as they do on CUDA unless the run is `deterministic`.
        fp8: the model, if the linear layers of its blocks run in float8.

    Raises:
        ValueError: `precision` is not one of the three.
    """
    if precision not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"precision = {precision!r}: expected bfloat16, float16 or float32")
    device = find_accelerator(device_name)
    if device is None:
        return None
    tera: float | None = getattr(device, precision)
    if precision == "float32" and tf32 and device.tf32 is not None:
        tera = device.tf32
    if fp8 is not None and tera is not None:
        fraction = fp8_fraction(fp8)
        tera = None if device.float8 is None else 1 / (fraction / device.float8 + (1 - fraction) / tera)
    return None if tera is None else tera * TERA


def device_memory(device_name: str) -> int | None:
    """Memory of one device (bytes), from the table or from the size in its name ('A100-SXM4-40GB'); None if unknown.

    A marketed GB counts as 10^9 bytes. Most devices have 2^30 bytes per marketed GB, which leaves 7% for the driver and
    fragmentation.
    """
    device = find_accelerator(device_name)
    if device is None:
        return None
    if device.memory_gb is not None:
        return int(device.memory_gb * GIGA)
    size = re.search(r"(\d+)\s?gb", device_name.lower())
    return int(size[1]) * GIGA if size else None
