"""FlashAttention 3 and 4: switched on where they are installed and the GPU has them, refused in one line elsewhere."""

import pytest
import torch
from torch.nn import attention
from torch.nn.attention import _registry as registry

from bardling.distributed.device import backend
from bardling.errors import UserError
from bardling.model.kernels.flash_attention import attention_backend

CUDA = torch.device("cuda", 0)


class Handle:
    removed = False

    def remove(self):
        self.removed = True


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(registry, "_FLASH_ATTENTION_IMPLS", dict(registry._FLASH_ATTENTION_IMPLS))
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_installed_kernels_are_used_until_the_run_ends(hopper, name):
    handle, cudnn = Handle(), torch.backends.cuda.cudnn_sdp_enabled()
    attention.register_flash_attention_impl(name.upper(), register_fn=lambda: handle)
    with attention_backend(name, CUDA):
        assert attention.current_flash_attention_impl() == name.upper()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert attention.current_flash_attention_impl() is None
    assert handle.removed
    assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn


@pytest.mark.parametrize(("name", "module"), [("fa3", "flash_attn_interface"), ("fa4", "flash_attn")])
def test_a_missing_package_is_named(hopper, name, module):
    with (
        pytest.raises(UserError, match=f"attention = '{name}': .*{module}.* install FlashAttention {name[-1]}, or leave"),
        attention_backend(name, CUDA),
    ):
        pass
    assert attention.current_flash_attention_impl() is None


def test_a_pytorch_that_knows_none_is_named(hopper, monkeypatch):
    monkeypatch.delattr(attention, "activate_flash_attention_impl")
    with pytest.raises(UserError, match=r"PyTorch .* could not load"), attention_backend("fa4", CUDA):
        pass


@pytest.mark.parametrize(("capability", "name"), [((8, 0), "fa3"), ((8, 9), "fa4"), ((10, 0), "fa3")])
def test_other_gpus_are_refused(hopper, monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    major, minor = capability
    with (
        pytest.raises(UserError, match=f"attention = '{name}': this GPU has compute capability {major}.{minor}, the kernels"),
        attention_backend(name, CUDA),
    ):
        pass


def test_other_devices_are_refused():
    cpu = backend(torch.device("cpu"), deterministic=False, attention="fa3")
    with pytest.raises(UserError, match="attention = 'fa3' on cpu: needs an NVIDIA GPU"), cpu:
        pass


def test_nothing_is_changed_unless_asked():
    with attention_backend("auto", CUDA):
        pass
    assert attention.current_flash_attention_impl() is None
