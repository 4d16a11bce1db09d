"""Rolling back to the latest checkpoint, within the process, and skipping the sequences that led to a bad step.

The skipped ranges are written to disk before anything else happens. The state then returns to the latest valid checkpoint (or
to the start of the run, if there is none yet), in place: wrappers and compiled code keep their weights. Metrics of undone steps
are removed, as a resumed run removes them, so a run that rolled back and one that was killed meanwhile and resumed are
identical byte for byte.
"""

from collections.abc import Callable

from bardling.checkpoint.load import latest_checkpoint
from bardling.checkpoint.run_folder import RunFolder
from bardling.checkpoint.saver import Saver
from bardling.distributed.context import Context
from bardling.distributed.heartbeat import LONG_PATIENCE
from bardling.errors import UserError
from bardling.training.recovery.guard import Guard, RollbackRequested
from bardling.training.recovery.rollback_log import Rollback, read_rollbacks, rollback_log, write_rollbacks
from bardling.training.run_monitor import RunMonitor
from bardling.training.state import TrainState


def load_rollbacks(folder: RunFolder, state: TrainState, context: Context) -> tuple[Rollback, ...]:
    """The rollbacks of a run that starts with `state`, as read by the primary process.

    Raises:
        UserError: the file is damaged, or lacks rollbacks that preceded `state`.
    """
    rollbacks = context.on_primary(lambda: read_rollbacks(folder))
    if len(rollbacks) < state.history.rollbacks:
        raise UserError(
            f"{rollback_log(folder)}: lists {len(rollbacks)} rollbacks, but {state.history.rollbacks} preceded the checkpoint "
            f"of step {state.step}: restore the file from a copy, because it decides the data order"
        )
    state.history.rollbacks = len(rollbacks)
    return rollbacks


def roll_back(
    request: RollbackRequested,
    guard: Guard,
    state: TrainState,
    folder: RunFolder,
    context: Context,
    *,
    saver: Saver,
    monitor: RunMonitor,
    initial_state: Callable[[], TrainState],
) -> None:
    """Record the rollback and return `state` to the latest checkpoint.

    Args:
        initial_state: creates the state in which the run started.

    Raises:
        UserError: the record cannot be written, or there are checkpoints but none is valid.
    """
    context.activity(f"rolling back from step {state.step} to the latest checkpoint", LONG_PATIENCE)

    def record() -> None:
        saver.wait()
        write_rollbacks(folder, [*guard.rollbacks, request.rollback])

    context.on_primary(record)
    guard.add_rollback(request.rollback)
    checkpoint = latest_checkpoint(folder, context)
    if checkpoint is not None:
        state.restore(checkpoint)
    else:
        state.reset(initial_state())
    state.history.rollbacks = len(guard.rollbacks)
    state.optimizer.zero_grad(set_to_none=True)
    monitor.rewind(state.step)
    monitor.note(f"rolled back to step {state.step:,}")
