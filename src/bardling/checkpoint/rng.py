"""The state of this process's random number generators, as named tensors.

Covers Python's `random`, NumPy's global generator, and PyTorch's on the CPU and on each CUDA device (which dropout uses). The
states are tensors, so that a checkpoint needs no pickle.
"""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from bardling.errors import UserError


def rng_state() -> dict[str, Tensor]:
    """Capture the state of all generators.

    Entries: `python` int64[626] (version, 625 words), `python.gauss` float64[0 or 1], `numpy` int64[626] (624 words,
    position, has_gauss), `numpy.gauss` float64[1], `torch` uint8[...], `cuda.N` uint8[...].
    """
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=True)
    assert isinstance(legacy, tuple)
    _, keys, position, has_gauss, cached = legacy
    state = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return state | {f"cuda.{index}": torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())}


def restore_rng(state: Mapping[str, Tensor]) -> None:
    """Restore the generators; entries for CUDA devices that this machine lacks are ignored."""
    try:
        version, *words = state["python"].tolist()
        [*gauss] = state["python.gauss"].tolist()
        *keys, position, has_gauss = state["numpy"].tolist()
        random.setstate((version, tuple(words), gauss[0] if gauss else None))
        np.random.set_state(
            ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, float(state["numpy.gauss"].item()))
        )
        torch.set_rng_state(state["torch"])
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in state:
                torch.cuda.set_rng_state(state[f"cuda.{index}"], index)
    except (KeyError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise UserError(
            f"the checkpoint's random number generator states are malformed ({error}): use another checkpoint"
        ) from None
