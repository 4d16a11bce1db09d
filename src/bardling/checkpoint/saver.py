"""Saving while training continues.

A step waits only for a copy of the state to host memory (`checkpoint/host_copy.py`); the rest happens in a background thread,
one save at a time. The last save of a run needs no copy, since nothing changes the state any more, and is waited for. Metrics
are durable before the state is copied, hence before the checkpoint appears. A failed save (a full disk, say) never ends a run
that can continue: it is reported at the next step, older checkpoints are untouched, and the next interval tries again. Only if
the last save fails twice does the run end with an error.

The processes of a sharded model save together: the step waits until each has gathered the tensors that it writes, which needs
no further copy, and their background threads write one checkpoint (`checkpoint/joint_write.py`).
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from bardling.checkpoint.contents import Checkpoint, write_checkpoint, write_part
from bardling.checkpoint.host_copy import HostCopy
from bardling.checkpoint.joint_write import JointWrite
from bardling.checkpoint.rng import rng_state
from bardling.checkpoint.run_folder import RunFolder
from bardling.config import CheckpointConfig
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.distributed.context import Context
from bardling.distributed.heartbeat import LONG_PATIENCE
from bardling.errors import UserError
from bardling.files.paths import shell_path
from bardling.files.streams import tell

_OPTIMIZER = "optimizer:"  # prefix of the optimizer's tensors, so that they and the model's can share one dictionary


class Savable(Protocol):
    """A training state."""

    step: int

    def saved(self) -> Checkpoint:
        """What a checkpoint of it contains, without random number generators."""

    def facts(self) -> Mapping[str, Any]:
        """What it says in `training.json`."""


def _in_background(work: Callable[[], None]) -> Future[None]:
    """Do `work` in a thread, for which Python waits at exit.

    The thread ends with its work, and its OpenMP threads with it. As long as there are more of these than cores, OpenMP lets
    none of them spin, also not those of training, whose steps then take up to twice as long.
    """
    pool = ThreadPoolExecutor(1, "checkpoint-writer")
    job = pool.submit(work)
    pool.shutdown(wait=False)
    return job


class Saver:
    """Saves a run's checkpoints. In processes that write nothing it only takes part in `finish`.

    Args:
        joint: with shards, the processes that write together; None if this process writes alone or, with shards, nothing.
        sharded: whether all processes call `save` together.
        tokenizer, run_config: the run's; all checkpoints contain them.
        note: prints a line for the user.
        flush: makes the metrics logged so far durable.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: CheckpointConfig,
        context: Context,
        *,
        tokenizer: Tokenizer | None,
        run_config: Mapping[str, Any],
        note: Callable[[str], None],
        flush: Callable[[], None],
        joint: JointWrite | None = None,
        sharded: bool = False,
    ) -> None:
        self._folder, self._context = folder, context
        self._joint, self._sharded = joint, sharded
        self._tokenizer, self._run_config = tokenizer, run_config
        self._note, self._flush = note, flush
        self._store = folder.store(config)
        self._job: Future[None] | None = None
        self._memory = HostCopy()
        self._asynchronous = config.asynchronous
        self._prepared = False
        self._step, self._last = 0, False  # of the latest save; whether it is the run's last
        self._training: Mapping[str, Any] | None = None  # its training.json; None when it failed
        self._reason = ""  # why it failed

    def prepare(self, state: Savable) -> None:
        """Reserve the memory for copies in the background. Call it after a step, when the optimizer has its state."""
        if self._asynchronous and not self._prepared and not self._sharded and self._context.is_primary:
            self._prepared = True
            self.wait()
            self._job = _in_background(partial(self._memory.prepare, _tensors(state.saved())))

    def save(self, state: Savable, *, last: bool = False) -> None:
        """Begin to save `state`, which may change once this returns; after the `last` step, save it now, without a copy.
        Collective with shards."""
        if not (self._context.is_primary or self._sharded):
            return
        self._context.activity(f"saving step {state.step}", LONG_PATIENCE)  # may wait for the previous checkpoint to be written
        self.wait()
        goes_on = self._begin(state, last) if self._context.is_primary else True
        if self._sharded:
            goes_on = self._context.broadcast(goes_on)
        if not goes_on or (self._sharded and self._joint is None):
            return
        saved = state.saved()
        tensors = _tensors(saved)
        copied = self._asynchronous and not last and not self._sharded
        if copied:
            try:
                tensors = self._memory.take(tensors)
            except (OSError, RuntimeError) as error:  # RuntimeError: how PyTorch reports that memory ran out
                self._warn(f"no memory for copies of the state ({error}): training waits while checkpoints are written")
                self._asynchronous = copied = False
        self._job = _in_background(partial(self._write, saved, tensors, rng_state()))
        if last or not self._asynchronous:
            self.wait()

    def _begin(self, state: Savable, last: bool) -> bool:
        """Whether there is something to save; then everything before it is durable."""
        facts = state.facts()
        if facts == self._training:  # a signal came just after a save
            return False
        self._step, self._training, self._last = state.step, facts, last
        try:
            self._flush()
        except UserError as error:
            self._failed(error)
            return False
        return True

    def report(self) -> None:
        """Report a failure of the latest save, once it is over."""
        if self._job is not None and self._job.done():
            error, self._job = self._job.exception(), None
            if error is not None:
                self._failed(error)

    def wait(self) -> None:
        """Return when nothing is being written; a failure is reported."""
        if self._job is not None:
            wait([self._job])
        self.report()

    def finish(self, state: Savable) -> None:
        """Wait for the last save, and try a failed one once more; raises a `UserError` in all processes if that fails too."""
        self._context.activity(f"saving step {state.step}", LONG_PATIENCE)
        self.wait()
        if self._context.broadcast(self._training is None):
            self.save(state, last=True)

        def check() -> None:
            if self._training is None:
                raise UserError(
                    f"the state at step {state.step} could not be saved ({self._reason}); once that is fixed, continue from "
                    f"the latest checkpoint with: bardling resume {shell_path(self._folder.path)}"
                )

        self._context.on_primary(check)

    def _write(self, saved: Checkpoint, tensors: Mapping[str, Tensor], rng: dict[str, Tensor]) -> None:
        """What the writer's thread does; it touches nothing that training changes."""
        content = replace(
            saved,
            model_state={name: tensors[name] for name in saved.model_state},
            optimizer_tensors={name: tensors[_OPTIMIZER + name] for name in saved.optimizer_tensors},
            rng=rng,
        )
        step, best_step = saved.training["step"], saved.training["best_step"]
        save = partial(self._store.save, step, best=step == best_step)
        base = str(self._folder.base.absolute())
        write = partial(write_checkpoint, content=content, tokenizer=self._tokenizer, run_config=self._run_config, base=base)
        if self._joint is None:
            save(write)
        elif self._context.is_primary:
            self._joint.lead(save, write)
        else:
            self._joint.follow(partial(write_part, content=content, writer=self._joint.writer))
            return
        with suppress(OSError, UserError):  # the checkpoint is there, and the next save tries again
            self._folder.record_saved()

    def _failed(self, error: BaseException) -> None:
        self._training = None
        self._reason = " ".join(str(error).split()) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if not self._last:  # otherwise `finish` reports it
            self._warn(
                f"the checkpoint of step {self._step} was NOT saved: {self._reason}; training continues, and the next "
                "checkpoint will be tried"
            )

    def _warn(self, text: str) -> None:
        self._note(f"WARNING: {text}")
        tell(f"warning: {text}")


def _tensors(saved: Checkpoint) -> dict[str, Tensor]:
    """All tensors of the model and the optimizer in one dictionary."""
    return {**saved.model_state} | {_OPTIMIZER + name: tensor for name, tensor in saved.optimizer_tensors.items()}
