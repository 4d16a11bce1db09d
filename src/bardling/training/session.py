"""One start of a run, from a resolved configuration to its last checkpoint."""

import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bardling.checkpoint.disk_space import check_space
from bardling.checkpoint.run_folder import create_run, run_lock
from bardling.checkpoint.saver import Saver
from bardling.data.batches.loader import Prefetcher, TrainSequences
from bardling.data.batches.order import SequenceOrder
from bardling.data.batches.packing import document_start
from bardling.distributed.context import SINGLE, Context
from bardling.distributed.heartbeat import LONG_PATIENCE
from bardling.errors import UserError
from bardling.extensions import EXPORT_FORMATS
from bardling.files.atomic import remove_partial_files, write_atomically
from bardling.monitor import RunInfo
from bardling.planning.schedules import learning_rate
from bardling.training.announce import opening, resumption
from bardling.training.build import Assembly, Execution, build
from bardling.training.environment import dataset_record, environment_facts
from bardling.training.facts import Facts
from bardling.training.hooks.base import HookContext, StepTimer
from bardling.training.hooks.make import make_hooks
from bardling.training.hooks.save import Save
from bardling.training.loop import Hook, fit
from bardling.training.objective import build_objective
from bardling.training.recovery.deadline import UNBOUNDED_STEPS, Deadline, estimate_finishing_time
from bardling.training.recovery.explain import Explainer
from bardling.training.recovery.guard import Guard, RollbackRequested
from bardling.training.recovery.memory import (
    FIRST_STEPS,
    UpdateTracker,
    out_of_memory,
    out_of_memory_error,
    reduced_micro_batch,
)
from bardling.training.recovery.rollback import load_rollbacks, roll_back
from bardling.training.recovery.signals import StopOnSignal, Stopped
from bardling.training.recovery.trace import sample_position
from bardling.training.resolve import ResolvedRun
from bardling.training.run_monitor import RunMonitor
from bardling.training.state import TrainState
from bardling.training.step import StepSettings


@dataclass(frozen=True)
class RunResult:
    """How a call of `train` or `resume` ended."""

    folder: Path
    step: int  # steps completed over all starts
    finished: bool  # False when a signal stopped the run before its last step
    best_val_loss: float
    exit_status: int  # 0, or 128 + the signal


class Session:
    """One start of a run."""

    def __init__(self, run: ResolvedRun, facts: Facts, *, fingerprint: str, quiet: bool) -> None:
        self.run, self.facts, self.fingerprint, self.quiet = run, facts, fingerprint, quiet
        self.recipe, self.settings = run.recipe, run.settings
        self.context, self.folder = facts.context.arranged(run.layout), facts.folder
        config = run.config
        for name in config.checkpoint.export:
            if refusal := EXPORT_FORMATS.get("checkpoint.export", name).refusal(config.model):
                raise UserError(f"checkpoint.export = {name!r}: the model {refusal}")
        self.dataset = facts.dataset(config.data)
        self.start = facts.start(config.model.init)
        self.document_start = document_start(config.data.document_mask, self.dataset, run.tokenizer)
        self.order = SequenceOrder(config.seed, len(self.dataset.split("train")), config.model.block_size)
        self.objective = build_objective(config.train, run.tokenizer, self.context.device)

    def train(self) -> RunResult:
        """Train to the end or until a signal."""
        context = self.context
        with StopOnSignal() as signals, ExitStack() as cleanup:
            assembly = self._assemble()
            state = assembly.state
            self.seconds_before = state.seconds
            if self.facts.resumed and context.is_primary:
                self._remove_leftovers()
            warning = self._check_space(state)
            if not self.facts.resumed:
                cleanup.enter_context(run_lock(self.folder, context))
            context.on_primary(lambda: self._write_folder(state))
            monitor = cleanup.enter_context(self._monitor(state))
            self._new_saver(monitor)
            cleanup.callback(lambda: self.saver.wait())  # the latest saver, which may not be this one
            try:
                self._announce(monitor, state)
                if warning:
                    monitor.note(f"WARNING: {warning}")
                self._fit_in_memory(assembly, monitor, signals)
                self.saver.finish(state)
                self._export(monitor, state)
            except Stopped:
                # All processes exit with the same status, including those that received no signal.
                number = context.largest(signals.signal or 0) or signal.SIGTERM
                context.activity(f"saving step {state.step}", LONG_PATIENCE)
                self.saver.save(state, last=True)
                self.saver.finish(state)
                monitor.note(f"stopped at step {state.step} and saved; continue with: bardling resume {self.folder.path}")
                return RunResult(self.folder.path, state.step, False, state.best_val_loss, 128 + number)
        return RunResult(self.folder.path, state.step, True, state.best_val_loss, 0)

    def _assemble(self) -> Assembly:
        """Model, optimizer and the rest, at the step where this start begins."""
        checkpoint = self.facts.checkpoint
        assembly = self._build(self.run.execution, self.context, restoring=checkpoint is not None)
        if checkpoint is not None:
            assembly.state.restore(checkpoint)
            self.facts.release_checkpoint()
        return assembly

    def _initial_state(self) -> TrainState:
        """The state in which the run started, in host memory."""
        if self.facts.resumed:  # this start may have had a checkpoint, which replaces the weights to start from
            self.facts = replace(self.facts)  # forgets it
            self.start = self.facts.start(self.run.config.model.init)
        return self._build(replace(self.run.execution, compiled=False, cuda_graphs=False), SINGLE).state

    def _build(self, execution: Execution, context: Context, *, restoring: bool = False) -> Assembly:
        """Assemble the run as it started; when `restoring`, without initial weights."""
        config, seed = self.run.config, None if restoring else self.run.config.seed
        start = None if self.start is None else self.start.cropped(config.model.block_size)
        weights = None if start is None else start.state
        assembly = build(config.model, config.optim, execution, context, seed=seed, weights=weights)
        if start is not None and self.facts.continued:
            assembly.state.take_over(start, self.run.plan.samples_before)
        return assembly

    def _remove_leftovers(self) -> None:
        """Remove the leftovers of a killed start, before the free space is checked."""
        remove_partial_files(self.folder.path)
        with suppress(OSError):  # the first save reports it
            self.folder.store().tidy(exclusive=True)

    def _check_space(self, state: TrainState) -> str | None:
        """Check that the checkpoints will fit on the disk, before anything is written; returns a warning if space is tight."""
        config, steps = self.run.config, self.run.plan.steps - state.step
        validations = steps // config.eval.every if config.eval.every else 1
        checkpoint_bytes = state.checkpoint_bytes()

        def check() -> str | None:
            return check_space(
                self.folder.checkpoints, checkpoint_bytes, config.checkpoint, steps=steps, best_steps=validations
            )

        return self.context.on_primary(check)

    def _write_folder(self, state: TrainState) -> None:
        """Write the files of a run folder other than metrics and checkpoints."""
        facts = {
            **environment_facts(self.context, state.step, self.fingerprint, self.facts.continued),
            **sample_position(self.run.config.train, state.samples),
            "reasons": [{"setting": r.setting, "value": r.value, "why": r.why} for r in self.run.reasons],
        }
        if self.facts.resumed:
            self.folder.write_config(self.recipe)
            self.folder.add_environment(facts)
            return

        def write_files() -> None:
            write_atomically(self.folder.dataset_file, dataset_record(self.dataset).encode())
            if self.run.tokenizer is not None:
                self.run.tokenizer.save(self.folder.path)
            self.folder.add_environment(facts)

        create_run(self.folder.path, self.recipe, share_folder=bool(self.facts.continued), write_files=write_files)

    def _monitor(self, state: TrainState) -> RunMonitor:
        config, primary = self.run.config, self.context.is_primary
        info = RunInfo(
            folder=self.folder.path,
            step=state.step,
            config=config.monitor,
            values=self.settings,
            recipe=self.recipe,
            report=print,
        )
        return RunMonitor(
            self.folder, info, self.run.plan.steps, prompt=config.sample.prompt, primary=primary, quiet=self.quiet
        )

    def _new_saver(self, monitor: RunMonitor) -> None:
        self.saver = Saver(
            self.folder,
            self.run.config.checkpoint,
            self.context,
            tokenizer=self.run.tokenizer,
            run_config=self.settings,
            note=monitor.note,
            flush=monitor.flush,
        )

    def _announce(self, monitor: RunMonitor, state: TrainState) -> None:
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
        for line in opening(self.run, self.order, parameters, self.context.device):
            monitor.note(line)
        if self.facts.resumed:
            deadline = self.run.config.train.deadline is not None
            monitor.note(resumption(self.folder.path, state.step, self.run.plan, deadline=deadline))
        for change in self.run.changes:
            monitor.note(f"changed: {change}")

    def _fit_in_memory(self, assembly: Assembly, monitor: RunMonitor, signals: StopOnSignal) -> None:
        """Train; if memory runs out in the first steps, with smaller forward passes."""
        state, update = assembly.state, UpdateTracker(assembly.state.optimizer)
        first = state.step
        while True:
            plan = self.run.plan
            try:
                self._fit(assembly, monitor, signals)
                return
            except Exception as error:
                if not out_of_memory(error):
                    raise
                early = state.step - max(first, plan.at(state.step).first_step) < FIRST_STEPS
                micro = reduced_micro_batch(error, plan, state.model, early=early, updating=update.updating)
                if micro is None:
                    raise out_of_memory_error(plan, state.model, self.context.device, state.step, self.folder.path) from None
            self.saver.wait()
            self.run = self.run.with_micro_batch(micro)
            self.recipe, self.settings = self.run.recipe, self.run.settings
            self.folder.write_config(self.recipe)
            self._new_saver(monitor)
            monitor.note(
                f"memory ran out at step {state.step + 1}: continuing with {self.run.plan.accumulation} passes of {micro} "
                f"sequences per step instead of {plan.accumulation} of {plan.micro_batch}, which gives the same gradients"
            )

    def _fit(self, assembly: Assembly, monitor: RunMonitor, signals: StopOnSignal) -> None:
        """Train to the end, returning to earlier checkpoints as the guard requests."""
        config, plan, context, state = self.run.config, self.run.plan, self.context, assembly.state

        def stop_requested() -> bool:  # called wherever work progresses
            context.progressed()
            return signals.requested()

        settings = StepSettings(
            self.objective,
            self.run.execution.precision,
            context,
            grad_clip=config.train.grad_clip,
            keep_gradients=config.cuda_graphs,
            stop_requested=stop_requested,
        )
        guard = self._guard(state, monitor)
        hooks = self._hooks(guard, monitor, stop_requested)
        # With a deadline, the decay ends there.
        optim = config.optim if config.train.deadline is None else replace(config.optim, decay_steps=None)

        def lr_at(step: int) -> float:
            return learning_rate(step, optim, plan.steps)

        while True:
            source = TrainSequences(self.dataset.split("train"), guard.order, self.document_start)
            ahead = plan.steps - state.step if config.train.deadline is None else UNBOUNDED_STEPS
            requests = plan.requests(state.samples, ahead, context.data_rank, state.step)
            try:
                with Prefetcher(source, requests, context.device) as batches:
                    fit(assembly, batches, plan, settings, lr_at=lr_at, seed=config.seed, hooks=hooks, guard=guard)
                return
            except RollbackRequested as request:
                initial = self._initial_state
                roll_back(request, guard, state, self.folder, context, saver=self.saver, monitor=monitor, initial_state=initial)

    def _export(self, monitor: RunMonitor, state: TrainState) -> None:
        """Export the final model to the formats that the configuration names."""
        for name in self.run.config.checkpoint.export if self.context.is_primary else ():
            out = self.folder.path / "exports" / f"{name}-step-{state.step:06d}"
            if not out.exists():
                EXPORT_FORMATS.get("checkpoint.export", name).write(str(self.folder.path), out, best=False, dataset="bardling")
                monitor.note(f"exported to {out}")

    def _guard(self, state: TrainState, monitor: RunMonitor) -> Guard:
        config, context, order, plan = self.run.config.guard, self.context, self.order, self.run.plan
        device, precision, start = context.device, self.run.execution.precision, self.document_start
        explainer = Explainer(self.dataset, order, self.objective, device, precision, plan.micro_batch, start)
        rollbacks = load_rollbacks(self.folder, state, context)
        return Guard(config, context, order, rollbacks, explainer, plan=plan, log=monitor.log, note=monitor.note)

    def _hooks(self, guard: Guard, monitor: RunMonitor, stop_requested: Callable[[], bool]) -> list[Hook]:
        device, tokenizer = self.context.device, self.run.tokenizer
        shared = HookContext(
            monitor,
            StepTimer(device),
            self.run.plan,
            self.context,
            self.run.execution.precision,
            seed=self.run.config.seed,
            tokenizer=tokenizer,
            bytes_per_token=None if tokenizer is None else torch.from_numpy(tokenizer.bytes_per_token()).to(device),
            stop_requested=stop_requested,
        )
        config, plan = self.run.config, self.run.plan
        per_epoch, start = self.order.sequences_per_epoch, self.document_start
        hooks = make_hooks(self.run, shared, self.dataset, sequences_per_epoch=per_epoch, document_start=start)
        hooks.append(Save(shared, self.saver, config.checkpoint, check=guard.judge_pending))
        seconds = config.train.deadline_seconds
        if seconds is not None:
            deadline = Deadline(
                seconds,
                plan.horizon,
                self.context,
                started_at=self.facts.started_at,
                seconds_before=self.seconds_before,
                finishing_time=estimate_finishing_time(hooks, seconds, config.eval.windows / plan.samples_per_step / 2),
                on_change=monitor.planned,
            )
            hooks.insert(0, deadline)
        return hooks
