"""EMA of the weights, which usually reaches a lower validation loss than the final weights.

    ema <- decay_t ema + (1 - decay_t) weight        with decay_t = min(decay, (1 + t) / (10 + t))

after update t = 0, 1, ...; the smaller decay of early updates lets the EMA forget the initial weights (averaging: Polyak and
Juditsky 1992; the ramp: TensorFlow's ExponentialMovingAverage). The caller passes the step, counted from the start of the run,
so the averages are the only state. They are float32, or float64 for float64 weights.

Limits: one more copy of the weights on the device; all parameters are averaged alike, including norms and embeddings.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from bardling.errors import UserError


class Ema:
    """EMA of the trained parameters of a model.

    Args:
        named_parameters: the model's parameters by name; each average starts at the parameter's value.
        decay: at least 0 and below 1; 0.999 averages over about a thousand updates.
    """

    def __init__(self, named_parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._decay = decay
        self._parameters = {name: p for name, p in named_parameters.items() if p.requires_grad}
        self._means = {name: _high_precision(p.detach()).clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages with the weights after update `step`, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        weights = [_high_precision(parameter.detach()) for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._means.values()), weights, 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name, which are the whole state; not copies, so save them before the next update."""
        return dict(self._means)

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the result of `tensors`; nothing changes unless all of it is valid.

        Raises:
            UserError: names, shapes or dtypes do not match the model.
        """
        different = sorted(tensors.keys() ^ self._means.keys())
        if different:
            raise UserError(f"the EMA belongs to a different model: only one of them has the parameter {different[0]!r}")
        for name, mean in self._means.items():
            if tensors[name].shape != mean.shape or not tensors[name].is_floating_point():
                found = f"{str(tensors[name].dtype).removeprefix('torch.')}{list(tensors[name].shape)}"
                raise UserError(f"the EMA of {name!r} is {found}, but its parameter has shape {list(mean.shape)}")
        for name, mean in self._means.items():
            mean.copy_(tensors[name])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the parameters have the averages as values; afterwards their own values are restored exactly."""
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            self._write(self._means)
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


def _high_precision(tensor: Tensor) -> Tensor:
    """`tensor` in a dtype that accumulates small differences."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
