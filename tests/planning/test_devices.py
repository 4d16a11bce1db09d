import re

import pytest

from bardling.planning.devices import ACCELERATORS, device_memory, find_accelerator, peak_flops


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("A100-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_known_devices(name: str, tera: float) -> None:
    assert peak_flops(name, "bfloat16") == tera * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Intel(R) Xeon(R) Processor",
        "Apple GPU",
        "NVIDIA H100",  # which of three?
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",  # a slice is not the whole
        "NVIDIA A100-SXM-64GB",
        "NVIDIA A10G",
        "NVIDIA H20",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA L400",
    ],
)
def test_unknown_devices_borrow_no_peak(name: str) -> None:
    assert peak_flops(name, "bfloat16") is None
    assert device_memory(name) is None


def test_precision_decides() -> None:
    assert peak_flops("Tesla T4", "bfloat16") is None
    assert peak_flops("Tesla T4", "float16") == 65e12
    assert peak_flops("Tesla T4", "float32") == 8.1e12
    assert peak_flops("Tesla V100-SXM2-16GB", "float16") == 125e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "float32") == 156e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "float32", tf32=False) == 19.5e12
    with pytest.raises(ValueError, match="float8"):
        peak_flops("NVIDIA L4", "float8")


def test_memory() -> None:
    assert device_memory("NVIDIA A100-SXM4-40GB") == 40 * 10**9
    assert device_memory("NVIDIA H200") == 141 * 10**9
    assert device_memory("NVIDIA GH200 480GB") == 96 * 10**9  # its name gives the processor's memory
    assert device_memory("A100") is None  # there are two


def test_the_table_is_consistent() -> None:
    for device in ACCELERATORS:
        assert find_accelerator(device.key) is device, device.key
        others = [
            other.key for other in ACCELERATORS if other is not device and re.fullmatch(other.pattern, device.key.lower())
        ]
        assert not others
        # Sparse figures are twice the dense ones, so that a mistaken one would stand out against TF32.
        if device.bfloat16 and device.tf32:
            assert 1.9 < device.bfloat16 / device.tf32 < 2.1, device.key
