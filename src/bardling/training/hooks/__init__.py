"""What happens between steps, one file per hook: log, validate, sample, measure tasks, save.

A hook is called after every step and decides from the step alone whether it is due. It records in `TrainState.hooks_done` the
latest step at which it completed its work. A checkpoint contains these records: work interrupted by a signal is done when the
run resumes, and completed work is not repeated. Every process runs the same forward passes, so that a hook also works with
sharded weights.

What does not belong here: what a step computes (`training/step.py`) and how a run survives faults (`training/recovery`).
"""
