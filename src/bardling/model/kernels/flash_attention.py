"""Which attention kernels an NVIDIA GPU uses: PyTorch's own, or FlashAttention 3 or 4 if installed.

PyTorch includes FlashAttention 2 (Dao 2023, arXiv:2307.08691) and cuDNN's kernels, and chooses between them. FlashAttention 3
(Shah et al. 2024, arXiv:2407.08608), for Hopper, and 4, for Hopper and Blackwell, are separate packages. Once activated
(`torch.nn.attention.activate_flash_attention_impl`), PyTorch calls them in place of 2 for 16-bit queries, keys and values: in
training, validation and samples, and for sequences of several documents.

Limits: they do not support dropout.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from bardling.errors import UserError

_MODULES = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}
_CAPABILITIES = {"fa3": (9,), "fa4": (9, 10)}
_REMEDY = "leave attention unset: PyTorch's own kernels run on every device"


@contextmanager
def attention_backend(wanted: Literal["auto", "fa3", "fa4"], device: torch.device) -> Iterator[None]:
    """A context in which PyTorch computes attention with the wanted kernels.

    Raises:
        UserError: they are not installed, or do not support this device.
    """
    if wanted == "auto":
        yield
        return
    setting = f"attention = {wanted!r}"
    if device.type != "cuda" or torch.version.hip is not None:
        raise UserError(f"{setting} on {device.type}: needs an NVIDIA GPU; {_REMEDY}")
    major, minor = torch.cuda.get_device_capability(device)
    if major not in _CAPABILITIES[wanted]:
        supported = " and ".join(f"{capability}.x" for capability in _CAPABILITIES[wanted])
        raise UserError(
            f"{setting}: this GPU has compute capability {major}.{minor}, the kernels support {supported}; {_REMEDY}"
        )
    from torch.nn import attention

    try:
        attention.activate_flash_attention_impl(wanted.upper())
    except (AttributeError, ImportError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{setting}: PyTorch {torch.__version__} could not load {_MODULES[wanted]} ({error}): install FlashAttention "
            f"{wanted[-1]}, or {_REMEDY}"
        ) from None
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)  # on some GPUs PyTorch would prefer it to all others
    try:
        yield
    finally:
        if hasattr(attention, "restore_flash_attention_impl"):  # newer than `activate_flash_attention_impl`
            attention.restore_flash_attention_impl()
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
