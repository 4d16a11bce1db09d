"""Which kernels compute attention on an NVIDIA GPU: those that come with PyTorch, or FlashAttention 3 or 4 from beside it.

PyTorch brings FlashAttention 2 (Dao 2023, arXiv:2307.08691) and cuDNN's kernels, and chooses between them. FlashAttention 3
(Shah et al. 2024, arXiv:2407.08608), for Hopper, and 4, for Hopper and Blackwell, are packages of their own. PyTorch calls
them in place of 2 once it is told to (`torch.nn.attention.activate_flash_attention_impl`). Queries, keys and values in 16 bits
are then theirs, in training, validation and samples, for windows of many documents too.

Limits: they know no dropout.
"""

from collections.abc import Callable
from typing import Literal

import torch

from bardling.errors import UserError

_MODULES = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}
_CAPABILITIES = {"fa3": (9,), "fa4": (9, 10)}
_INSTEAD = "leave attention out: PyTorch's own kernels run everywhere"


def use_attention(wanted: Literal["auto", "fa3", "fa4"], device: torch.device) -> Callable[[], None]:
    """Have PyTorch compute attention with the kernels asked for; returns an undo.

    Raises:
        UserError: they are not installed, or not for this device.
    """
    if wanted == "auto":
        return lambda: None
    asked = f"attention = {wanted!r}"
    if device.type != "cuda" or torch.version.hip is not None:
        raise UserError(f"{asked} on {device.type}: needs an NVIDIA GPU; {_INSTEAD}")
    major, minor = torch.cuda.get_device_capability(device)
    if major not in _CAPABILITIES[wanted]:
        known = " and ".join(f"{capability}.x" for capability in _CAPABILITIES[wanted])
        raise UserError(f"{asked}: this GPU has compute capability {major}.{minor}, the kernels are for {known}; {_INSTEAD}")
    from torch.nn import attention

    try:
        attention.activate_flash_attention_impl(wanted.upper())
    except (AttributeError, ImportError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{asked}: PyTorch {torch.__version__} could not load {_MODULES[wanted]} ({error}): install FlashAttention "
            f"{wanted[-1]}, or {_INSTEAD}"
        ) from None
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)  # on some GPUs PyTorch would choose it before any other

    def undo() -> None:
        if hasattr(attention, "restore_flash_attention_impl"):  # later than what activates them
            attention.restore_flash_attention_impl()
        torch.backends.cuda.enable_cudnn_sdp(cudnn)

    return undo
