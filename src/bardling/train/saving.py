"""Saving while training goes on.

The step waits only for a copy of the state to host memory (`checkpoint/snapshot.py`). Its conversion, the files, checksums,
syncing, the rename and the deletion of what is no longer kept happen in a thread. At most one save is in flight: the next one
waits for it. The last save of a run needs no copy, since nothing changes the state any more, and is waited for.

A save that fails (the disk is full, say) never ends a run that can go on: it is said at the next step, older checkpoints are
untouched, and the next interval tries again. Only if the last save fails, twice, does the run end with an error.

Order: figures are durable before the state is copied, hence before the checkpoint appears.
"""

import contextlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bardling.checkpoint.background import Background
from bardling.checkpoint.rng import rng_state
from bardling.checkpoint.runfolder import RunFolder
from bardling.checkpoint.snapshot import HostCopy
from bardling.checkpoint.space import check_space
from bardling.checkpoint.state import write_checkpoint
from bardling.config import RunConfig
from bardling.configfile import config_to_dict
from bardling.data.tokenizer import Tokenizer
from bardling.distributed.context import Context
from bardling.distributed.watch import LONG
from bardling.errors import UserError
from bardling.optim.state import optimizer_tensors
from bardling.train.plan import TrainPlan
from bardling.train.state import TrainState

_OPTIMIZER = "optimizer:"  # before the names of its tensors, so that they and the model's can share one dictionary

RAW = "weights:"  # before the names of weights in training, where the model's file has their running mean


class Saver:
    """Saves a run's checkpoints. In all processes but the primary one it only takes part in `finish`.

    Args:
        tell: says a line to the person who watches.
        flush: makes the figures logged so far durable.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        tokenizer: Tokenizer | None,
        context: Context,
        *,
        tell: Callable[[str], None],
        flush: Callable[[], None],
    ) -> None:
        self._folder, self._config, self._tokenizer, self._context = folder, config, tokenizer, context
        self._tell, self._flush = tell, flush
        self._store = folder.store(config.checkpoint)
        self._background = Background("checkpoint-writer")
        self._memory = HostCopy()
        self._asynchronous = config.checkpoint.asynchronous and context.is_primary
        self._prepared = False
        self._step, self._last = 0, False  # of the last save that was begun; whether it is the run's last
        self._facts: dict[str, Any] | None = None  # its training.json; None when it failed
        self._reason = ""  # why it failed

    def prepare(self, state: TrainState) -> None:
        """Reserve the memory for copies, in the background; call it after a step, when the optimizer's state is there."""
        if not self._asynchronous or self._prepared:
            return
        self._prepared = True
        tensors, _ = _tensors(state)

        def prepare() -> None:
            with contextlib.suppress(OSError, RuntimeError):  # the first save will say it, if it still holds
                self._memory.prepare(tensors)

        self._background.start(prepare)

    def save(self, state: TrainState, *, last: bool = False) -> None:
        """Begin to save `state`; it may change when this returns.

        Args:
            last: nothing will change it any more: save it here and now, without a copy.
        """
        if not self._context.is_primary:
            return
        self._context.doing(f"saving step {state.step}", LONG)  # where the save before it is still being written, say
        self.wait()
        facts = _facts(state)
        if facts == self._facts:  # a signal came just after a save
            return
        self._step, self._facts, self._last = state.step, facts, last
        try:
            self._flush()
        except UserError as error:
            self._failed(error)
            return
        tensors, meta = _tensors(state)
        copied = self._asynchronous and not last
        if copied:
            try:
                tensors = self._memory.take(tensors)
            except (OSError, RuntimeError) as error:  # RuntimeError: PyTorch's way to say that memory has run out
                self._warn(f"no memory for copies of the state ({error}): checkpoints are written while training waits")
                self._asynchronous = copied = False
        self._background.start(self._job(state.step, state.best_step == state.step, tensors, meta, facts))
        if not copied:
            self.wait()

    def report(self) -> None:
        """Name a failure of the last save, once it is over."""
        if (error := self._background.take_failure()) is not None:
            self._failed(error)

    def wait(self) -> None:
        """Return when nothing is being written; a failure is reported."""
        self._background.wait()
        self.report()

    def finish(self, state: TrainState) -> None:
        """Make sure that `state`, which is saved already, is on the disk; a failed save is tried once more.

        Raises:
            UserError: it cannot be saved, in all processes.
        """
        message = None
        if self._context.is_primary:
            self._context.doing(f"saving step {state.step}", LONG)
            self.wait()
            if self._facts is None:
                self.save(state, last=True)
            if self._facts is None:
                message = (
                    f"the state at step {state.step} could not be saved ({self._reason}); once that is put right, go on from "
                    f"the newest checkpoint with: bardling resume {self._folder.path}"
                )
        message = self._context.broadcast(message)
        if message is not None:
            raise UserError(message)

    def _job(
        self, step: int, best: bool, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> Callable[[], object]:
        """What the writer does; it touches nothing that training changes."""
        model = {name: tensor for name, tensor in tensors.items() if not name.startswith(_OPTIMIZER)}
        optimizer = {name.removeprefix(_OPTIMIZER): tensors[name] for name in tensors if name.startswith(_OPTIMIZER)}
        random, run_config = rng_state(), config_to_dict(self._config)

        def write(place: Path) -> None:
            write_checkpoint(
                place,
                model_state=model,
                model_config=self._config.model,
                optimizer_tensors=optimizer,
                optimizer_meta=meta,
                training=facts,
                rng=random,
                tokenizer=self._tokenizer,
                run_config=run_config,
            )

        return lambda: self._store.save(step, write, best=best)

    def _failed(self, error: BaseException) -> None:
        self._facts = None
        self._reason = " ".join(str(error).split()) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if not self._last:  # otherwise `finish` has the last word
            self._warn(
                f"the checkpoint of step {self._step} was NOT saved: {self._reason}; training goes on, the next will be tried"
            )

    def _warn(self, text: str) -> None:
        self._tell(f"WARNING: {text}")
        print(f"bardling: warning: {text}", file=sys.stderr, flush=True)


def _tensors(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of the model and the optimizer, not copied, and the optimizer's other facts."""
    tensors, meta = optimizer_tensors(state.optimizer, dict(state.model.named_parameters()))
    model = state.model.state_dict()
    if state.ema is not None:  # the model's file gets the mean, which is what was validated
        tensors |= {RAW + name: model[name] for name in state.ema.tensors()}
        model = {**model, **state.ema.tensors()}
    return {**model, **{_OPTIMIZER + name: tensor for name, tensor in tensors.items()}}, meta


def _facts(state: TrainState) -> dict[str, Any]:
    """What `training.json` holds."""
    return {
        "step": state.step,
        "samples": state.samples,
        "best_val_loss": state.best_val_loss,
        "best_step": state.best_step,
        "hooks_done": dict(state.hooks_done),
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
        "guard": state.recent.to_json(),
        **({"seconds": state.seconds, "planned_steps": state.planned} if state.planned else {}),
    }


def state_bytes(state: TrainState) -> int:
    """About how large a checkpoint of `state` is: its weights, two moments of each (of Muon's matrices one), small files."""
    weights: int = sum(tensor.numel() * 4 for tensor in state.model.state_dict().values())
    groups = state.optimizer.param_groups
    moments: int = sum(p.numel() * (4 if group.get("muon") else 8) for group in groups for p in group["params"])
    return weights * (1 if state.ema is None else 2) + moments + 100_000


def check_room(state: TrainState, folder: RunFolder, config: RunConfig, plan: TrainPlan, context: Context) -> str | None:
    """Compare the space for checkpoints with what is free, before anything is written; a warning if it will be tight."""
    warning = error = None
    if context.is_primary:
        try:
            warning = check_space(
                folder.checkpoints,
                state_bytes(state),
                config.checkpoint,
                steps=plan.steps - state.step,
                best_steps=(plan.steps - state.step) // config.eval.every if config.eval.every else 1,
            )
        except UserError as failure:
            error = str(failure)
    warning, error = context.broadcast((warning, error))
    if error is not None:
        raise UserError(error)
    return warning
