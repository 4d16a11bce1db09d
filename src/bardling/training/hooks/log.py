"""Logs the metrics of every `every`-th step, and of the first and the last one."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass

from bardling.distributed.device import memory_used
from bardling.monitor.format import si
from bardling.monitor.records import TrainRecord
from bardling.training.hooks.base import HookContext, due
from bardling.training.state import TrainState
from bardling.training.step import StepResult


@dataclass
class Log:
    run: HookContext
    _: KW_ONLY
    every: int
    sequences_per_epoch: int | None  # to report epochs; None if the size of the dataset is unknown
    flops_per_token: Callable[[int], int]  # FLOPs of a token, as a function of the context length
    epochs: Callable[[int], Mapping[str, float]] = lambda samples: {}  # of each source of a mixture, by name
    peak_flops: float | None  # of one process's device (FLOP/s); None if unknown
    _steps: int = 0  # since the latest record

    def __call__(self, state: TrainState, result: StepResult | None) -> None:
        plan, timer = self.run.plan, self.run.timer
        if result is None:
            timer.resume()
            return
        timer.step()
        self._steps += 1
        if state.step != 1 and not due(state.step, self.every, plan.steps):
            return
        loss = result.loss.item()  # waits for the device
        text_loss, size = (result.sums[name].item() if name in result.sums else 0.0 for name in ("text_loss", "bytes"))
        digest, seconds = state.digest_samples(), timer.take()
        # Steps between two records may belong to several stages; steps that a rollback undid had the same shapes.
        first = max(state.step - self._steps, 0)
        tokens = plan.cost(lambda context: 1, first, state.step) / (state.step - first)
        flops = plan.cost(self.flops_per_token, first, state.step) / (state.step - first)
        self._steps = 0
        mfu = self._mfu(flops / seconds)
        self.run.monitor.log(
            TrainRecord(
                step=state.step,
                loss=loss,
                bits_per_byte=text_loss / math.log(2) / size if size else None,
                lr=result.lr,
                grad_norm=result.grad_norm.item(),
                epoch=None if self.sequences_per_epoch is None else state.samples / self.sequences_per_epoch,
                tokens=state.samples * plan.block_size,
                tokens_per_second=tokens / seconds,
                mfu=mfu,
                memory_bytes=memory_used(result.loss.device),
                seconds_left=plan.cost(self.flops_per_token, state.step) / flops * seconds,
                time=time.time(),
                sources={f"epoch/{name}": value for name, value in self.epochs(state.samples).items()},
                order_digest=None if digest is None else str(digest),
            )
        )

    def _mfu(self, speed: float) -> float | None:
        """The fraction of the peak; a peak that turns out to be too low is unknown from then on."""
        if self.peak_flops is None:
            return None
        context, mfu = self.run.context, speed / (self.peak_flops * self.run.context.world_size)
        if mfu <= 1:
            return mfu
        if context.is_primary:
            self.run.monitor.warn(
                f"MFU is no longer logged, because the peak is unknown: the run computes {si(speed, 'FLOP/s')}, more than "
                f"{context.world_size} x {si(self.peak_flops, 'FLOP/s')}, measured while other programs ran, or a vendor's"
            )
        self.peak_flops = None
        return None
