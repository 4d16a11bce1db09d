"""Back to the last checkpoint, within the process, past the windows that led to bad numbers.

What is passed over is on the disk before anything else happens. The state is then put where the newest sound checkpoint was
saved (or where the run began, before the first one), in place: wrappers and compiled code keep their weights. Figures of
steps that are undone are removed, as a resumed run removes them; so a run that went back and one that was killed meanwhile and
resumed are the same to the byte.
"""

from collections.abc import Callable

from bardling.checkpoint.runfolder import RunFolder
from bardling.distributed.context import Context
from bardling.distributed.watch import LONG
from bardling.errors import UserError
from bardling.optim.state import load_optimizer_tensors, optimizer_tensors
from bardling.train.guard import Guard, RollBack
from bardling.train.monitoring import RunMonitor
from bardling.train.persist import newest_checkpoint, restore
from bardling.train.rollbacks import Rollback, read_rollbacks, skips_file, write_rollbacks
from bardling.train.saving import Saver
from bardling.train.state import TrainState


def rollbacks_of(folder: RunFolder, state: TrainState, context: Context) -> tuple[Rollback, ...]:
    """The rollbacks of a run that starts with `state`, as the primary process reads them.

    Raises:
        UserError: the file is damaged, or lacks some that led to `state`.
    """
    rollbacks: tuple[Rollback, ...] = ()
    problem = None
    if context.is_primary:
        try:
            rollbacks = read_rollbacks(folder)
        except UserError as error:
            problem = str(error)
    rollbacks, problem = context.broadcast((rollbacks, problem))
    if problem is None and len(rollbacks) < state.recent.rollbacks:
        problem = (
            f"{skips_file(folder)}: has {len(rollbacks)} rollbacks, but the checkpoint of step {state.step} knows "
            f"{state.recent.rollbacks}: restore it from a copy, for it decides the order of the data"
        )
    if problem is not None:
        raise UserError(problem)
    state.recent.rollbacks = len(rollbacks)
    return rollbacks


def go_back(
    found: RollBack,
    guard: Guard,
    state: TrainState,
    *,
    folder: RunFolder,
    context: Context,
    saver: Saver,
    monitor: RunMonitor,
    begin: Callable[[], TrainState],
) -> None:
    """Record the rollback and put `state` back.

    Args:
        begin: makes the state that the run began with.

    Raises:
        UserError: the record cannot be written, or there are checkpoints but none is sound.
    """
    context.doing(f"going back from step {state.step} to the last checkpoint", LONG)
    problem = None
    if context.is_primary:
        saver.wait()
        try:
            write_rollbacks(folder, [*guard.rollbacks, found.rollback])
        except UserError as error:
            problem = str(error)
    problem = context.broadcast(problem)
    if problem is not None:
        raise UserError(problem)
    guard.pass_over(found.rollback)
    checkpoint = newest_checkpoint(folder, context)
    if checkpoint is not None:
        restore(state, checkpoint)
    else:
        _begin_again(state, begin())
    state.recent.rollbacks = len(guard.rollbacks)
    state.optimizer.zero_grad(set_to_none=True)
    monitor.rewind(state.step)
    monitor.note(f"back at step {state.step:,}")


def _begin_again(state: TrainState, start: TrainState) -> None:
    state.model.load_state_dict(start.model.state_dict())
    tensors, meta = optimizer_tensors(start.optimizer, dict(start.model.named_parameters()))
    load_optimizer_tensors(state.optimizer, dict(state.model.named_parameters()), tensors, meta)
    if state.scaler is not None and start.scaler is not None:
        state.scaler.load_state_dict(start.scaler.state_dict())
    if state.ema is not None and start.ema is not None:
        state.ema.load_tensors(start.ema.tensors())
    state.step, state.samples = start.step, start.samples
    state.best_val_loss, state.best_step = start.best_val_loss, start.best_step
    state.hooks_done, state.recent = start.hooks_done, start.recent
