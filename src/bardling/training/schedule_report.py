"""What the learning rate of a start will do that its user may not expect, said before the first step, or refused.

A run follows its own schedule where that differs from the configured one (`followed_schedule`). Steps after the decay keep its
last learning rate; if that is 0 they change nothing, so they are refused. A resumed run may continue on another curve than it
was on: the learning rates of its next step on both are reported, a rise as a warning.
"""

import math

from bardling.checkpoint.load import Loaded
from bardling.config import OptimConfig, TrainConfig
from bardling.errors import UserError
from bardling.planning.schedules import followed_schedule, learning_rate
from bardling.training.facts import Facts


def check_schedule(
    optim: OptimConfig, train: TrainConfig, facts: Facts, start: Loaded | None, changes: list[str], warnings: list[str]
) -> OptimConfig:
    """The schedule that the run follows, as `optim` with another warmup or decay; adds sentences to `changes` and `warnings`.

    Raises:
        UserError: the run would end before its current step, whose steps so far would not fit the schedule, or train at a
            learning rate of 0. (With a deadline the number of steps is planned during the run, so any number is accepted.)
    """
    done, where = 0, ""
    if facts.checkpoint is not None:
        done, where = facts.checkpoint.training["step"], str(facts.folder.path)
    elif facts.continued and start is not None:
        done, where = start.step, facts.continued
    if train.deadline is None and train.steps < done:
        raise UserError(f"train.steps = {train.steps}: {where} has already completed {done} steps; set it to at least that")
    # The warmup of another trainer's run is as long as it was there.
    schedule = followed_schedule(optim, train, shorten=facts.origin is None)
    if schedule.warmup_steps < optim.warmup_steps:
        short = f"the run has only {train.steps}; resumed with more steps, it returns to {optim.warmup_steps}"
        changes.append(f"optim.warmup_steps: {optim.warmup_steps} -> {schedule.warmup_steps}, because {short}")
    end, left = schedule.decay_steps or train.steps, train.steps - done if train.deadline is None else 0
    if schedule.schedule != "constant" and end < train.steps and left > 0:
        if schedule.final_lr == 0:
            remedy = f"set train.steps = {max(end, done)}, optim.decay_steps = {train.steps}, or optim.min_lr above 0"
            fault = f"the decay ends at a learning rate of 0, so steps {end + 1:,} to {train.steps:,} would change nothing"
            raise UserError(f"optim.decay_steps = {end}: {fault}: {remedy}")
        constant = f"the learning rate stays at {schedule.final_lr:.3g} from step {end + 1:,} to step {train.steps:,}"
        changes.append(f"{constant}, because its decay from {schedule.lr:.3g} ends at optim.decay_steps = {end}")
    if left > 0:
        _report_jump(schedule, train, facts, done, changes, warnings)
    return schedule


def _report_jump(
    schedule: OptimConfig, train: TrainConfig, facts: Facts, done: int, changes: list[str], warnings: list[str]
) -> None:
    """Report how the next step's learning rate has changed since the checkpoint was saved; a rise is a warning."""
    previous, checkpoint = facts.previous, facts.checkpoint
    if previous is None or checkpoint is None:
        return
    old = followed_schedule(previous.optim, previous.train, shorten=facts.origin is None)
    end = previous.train.steps if previous.train.deadline is None else checkpoint.training.get("planned_steps", 0)
    if not isinstance(end, int):  # damaged; restoring the checkpoint refuses it
        return
    before, after = learning_rate(done, old, end), learning_rate(done, schedule, train.steps)
    if math.isclose(before, after, rel_tol=1e-3):
        return
    if after < before:
        changes.append(f"learning rate of step {done + 1:,}: {before:.3g} -> {after:.3g}")
        return
    # Steps after the end of the previous decay can stay where it ended, unless that is a learning rate of 0.
    stays = done >= end > schedule.warmup_steps and schedule.decay_steps is None and before == schedule.final_lr > 0
    remedy = f"; --optim.decay_steps {end} keeps it at {before:.3g}" if stays and schedule.schedule != "constant" else ""
    warnings.append(
        f"the learning rate rises from {before:.3g} to {after:.3g} at step {done + 1:,}, the first of this start{remedy}"
    )
