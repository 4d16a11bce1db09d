"""A running mean of the weights, which usually does better on held-out text than the weights that training ends with.

    mean <- decay_t mean + (1 - decay_t) weight        with decay_t = min(decay, (1 + t) / (10 + t))

after update t = 0, 1, ...; the smaller decay of early updates lets the mean forget the initial weights (averaging: Polyak and
Juditsky 1992; the ramp: TensorFlow's ExponentialMovingAverage). The step counts from the run's start and comes from the
caller, so that the means are the whole state. Means are float32, or the weights' own format where that is wider.

Limits: one more copy of the weights on the device; norms and embeddings are averaged as everything else is.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from bardling.errors import UserError


class Ema:
    """Running means of the trained parameters of one model.

    Args:
        named_parameters: the model's parameters by name; each mean starts at its parameter's value.
        decay: at least 0 and below 1; larger remembers longer (0.999: about a thousand updates).
    """

    def __init__(self, named_parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay = {decay}: must be at least 0 and below 1")
        self._decay = decay
        self._parameters = {name: p for name, p in named_parameters.items() if p.requires_grad}
        self._means = {name: _wide(p.detach()).clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update `step`, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        weights = [_wide(parameter.detach()) for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._means.values()), weights, 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """The means by parameter name: the whole state. They are not copies: write them before the next update."""
        return dict(self._means)

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` returned; nothing changes unless everything fits.

        Raises:
            UserError: means of other parameters than this model's.
        """
        different = sorted(tensors.keys() ^ self._means.keys())
        if different:
            raise UserError(f"the running mean of the weights is of another model: {different[0]!r} is only in one of them")
        for name, mean in self._means.items():
            if tensors[name].shape != mean.shape or not tensors[name].is_floating_point():
                found = f"{str(tensors[name].dtype).removeprefix('torch.')}{list(tensors[name].shape)}"
                raise UserError(f"the running mean of {name!r} is {found}, but its parameter has the shape {list(mean.shape)}")
        for name, mean in self._means.items():
            mean.copy_(tensors[name])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """While this lasts the model's parameters have the means as values; afterwards their own again, to the bit."""
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


def _wide(tensor: Tensor) -> Tensor:
    """`tensor` in a format in which small differences still add up."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
