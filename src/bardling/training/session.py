"""One start of a run, from a resolved configuration to its last checkpoint."""

import signal
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from bardling.checkpoint.base_model import load_base, write_base
from bardling.checkpoint.disk_space import check_space
from bardling.checkpoint.joint_write import JointWrite
from bardling.checkpoint.load import Loaded, latest_checkpoint
from bardling.checkpoint.run_folder import create_run, discard_run, run_lock
from bardling.checkpoint.saver import Saver
from bardling.config.recipes import config_to_dict, config_to_toml
from bardling.data.batches.assemble import data_order, source_epochs, validation_sets
from bardling.data.batches.loader import Prefetcher, TrainSequences
from bardling.data.batches.order import DataOrder
from bardling.data.batches.order_digest import OrderDigest
from bardling.data.batches.packing import document_start
from bardling.distributed.context import SINGLE, Context
from bardling.distributed.device import remove_damaged_code
from bardling.distributed.heartbeat import LONG_PATIENCE
from bardling.errors import JobLost, UserError, out_of_memory
from bardling.extensions import EXPORT_FORMATS, HOOKS
from bardling.files.atomic import remove_partial_files, write_atomically
from bardling.files.paths import shell_path
from bardling.monitor import RunInfo
from bardling.planning.costs import flops_per_token
from bardling.planning.schedules import learning_rate
from bardling.training.announcement import announce
from bardling.training.build import Assembly, Execution, build
from bardling.training.environment import dataset_record, environment_facts
from bardling.training.facts import Facts
from bardling.training.hooks.base import HookContext, StepTimer
from bardling.training.hooks.log import Log
from bardling.training.hooks.new_shapes import NewShapes
from bardling.training.hooks.sample import Sample
from bardling.training.hooks.save import Save
from bardling.training.hooks.tasks import Tasks
from bardling.training.hooks.validate import Validate
from bardling.training.loop import Hook, fit
from bardling.training.objective import build_objective, bytes_per_token
from bardling.training.recovery.deadline import UNBOUNDED_STEPS, Deadline, finishing_time
from bardling.training.recovery.explain import Explainer
from bardling.training.recovery.guard import Guard, RollbackRequested
from bardling.training.recovery.memory import FIRST_STEPS, UpdateTracker, reduced_micro_batch
from bardling.training.recovery.rollback_log import Rollback, load_rollbacks, read_rollbacks, write_rollbacks
from bardling.training.recovery.signals import StopOnSignal, Stopped
from bardling.training.recovery.trace import order_after, sample_position
from bardling.training.resolve import ResolvedRun
from bardling.training.run_monitor import RunMonitor
from bardling.training.state import TrainState
from bardling.training.step import StepSettings
from bardling.training.texts import load_texts

MAX_DIGESTED = 4_000_000
"""Samples of which a missing digest is computed when a run is resumed, which takes some seconds."""


@dataclass(frozen=True)
class RunResult:
    """What a call of `train` or `resume` has achieved; one that a signal stops raises an exception instead."""

    folder: Path
    step: int  # steps completed over all starts
    best_val_loss: float


class Session:
    def __init__(self, run: ResolvedRun, facts: Facts, *, fingerprint: str, quiet: bool) -> None:
        self.run, self.facts, self.fingerprint, self.quiet = run, facts, fingerprint, quiet
        self.context, self.folder = facts.arranged(run.layout), facts.folder
        config = run.config
        for name in config.checkpoint.export:
            if refusal := EXPORT_FORMATS.get("checkpoint.export", name).refusal(config.model):
                raise UserError(f"checkpoint.export = {name!r}: the model {refusal}")
        self.dataset = facts.dataset(config.data)
        self.start = self._weights_to_start_from()
        self.document_start = document_start(config.data.document_mask, self.dataset, run.tokenizer)
        self.order = data_order(self.dataset, config.data, config.seed, config.model.block_size)
        self.objective = build_objective(config.train, run.tokenizer, self.context.device)
        self.context.activity("checking the sample prompt and the tasks", LONG_PATIENCE)
        self.created = False  # whether this process has created the run's folder
        self.stopped_by: int | None = None  # the signal that has stopped the run
        self.texts = self.context.on_primary(lambda: load_texts(config, facts.previous, run.tokenizer, self.dataset))

    def train(self) -> RunResult:
        """Train to the end, or until a signal: `stopped_by`. All processes must call this together."""
        context = self.context
        with StopOnSignal() as signals, ExitStack() as cleanup:
            assembly = self._assemble()
            state = assembly.state
            self.seconds_before = state.seconds
            if self.facts.resumed and context.is_primary:  # a killed start left files that take space
                remove_partial_files(self.folder.path)
                with suppress(OSError):  # the first save reports it
                    self.folder.store().tidy(exclusive=True)
            warning = self._check_space(state)
            if not self.facts.resumed:
                cleanup.push(partial(self._discard_failed_start, state, state.step))
                cleanup.enter_context(run_lock(self.folder, context))
            context.on_primary(lambda: self._write_folder(state))
            monitor = cleanup.enter_context(self._monitor(state))
            self._new_saver(monitor, state)
            cleanup.callback(lambda: self.saver.wait())  # the latest saver, which may not be this one
            signals.begin(monitor.note)
            try:
                announce(self.run, self.facts, self.dataset, self.order, state, monitor.note)
                if warning:
                    monitor.note(f"WARNING: {warning}")
                for text in self.texts.warnings if context.is_primary else ():
                    monitor.warn(text)
                self._fit_in_memory(assembly, monitor, signals)
                self.saver.finish(state)
                self._export(monitor, state)
                if self.dataset.manifest.holds_conversations:
                    monitor.note(f"ask it something: bardling chat {shell_path(self.folder.path)}")
            except Stopped:
                # All processes exit with the same status, including those that received no signal.
                number = context.largest(signals.signal or 0) or signal.SIGTERM
                context.activity(f"saving step {state.step}", LONG_PATIENCE)
                self.saver.save(state, last=True)
                self.saver.finish(state)
                monitor.note(
                    f"stopped at step {state.step} and saved; continue with: bardling resume {shell_path(self.folder.path)}"
                )
                self.stopped_by = number
        return RunResult(self.folder.path, state.step, state.best_val_loss)

    def _discard_failed_start(self, state: TrainState, first: int, kind: type[BaseException] | None, *_: object) -> None:
        """Remove the folder of a run that failed before its first step, unless only a process of the job was lost."""
        failed = kind is not None and not issubclass(kind, JobLost) and state.step == first
        if failed and self.created and not self.folder.store().steps():
            with suppress(OSError):
                discard_run(self.folder, share_folder=bool(self.facts.continued))

    def _assemble(self) -> Assembly:
        checkpoint = self.facts.checkpoint
        assembly = self._build(self.run.execution, self.context, restoring=checkpoint is not None)
        if checkpoint is not None:
            assembly.state.restore(checkpoint)
            self.facts.checkpoint = None  # frees its tensors
        rollbacks = self.context.on_primary(lambda: read_rollbacks(self.folder)) if self.facts.resumed else ()
        self._continue_digest(assembly.state, order_after(self.order, rollbacks))
        return assembly

    def _continue_digest(self, state: TrainState, order: DataOrder) -> None:
        """Continue the digest with `order`. If a checkpoint of an earlier version lacks it, it begins with the first sample,
        unless there are too many or their length has changed."""
        digest = state.order_digest
        if digest is None:
            previous = self.facts.previous
            known = state.samples <= MAX_DIGESTED and (previous is None or previous.model.block_size == order.block_size)
            digest = OrderDigest() if known else OrderDigest(state.samples, state.samples)
        state.order_digest = replace(digest, order=order).upto(state.samples)

    def _initial_state(self) -> TrainState:
        """The state in which the run started, in host memory."""
        if self.facts.resumed:  # this start may have had a checkpoint, which replaces the weights to start from
            self.facts = replace(self.facts)  # forgets it
            self.start = self._weights_to_start_from()
        execution = replace(self.run.execution, compiled=False, cuda_graphs=False)
        return self._build(execution, self.context if self.run.layout.divided else SINGLE).state

    def _weights_to_start_from(self) -> Loaded | None:
        """What `model.init` names, for the run's context and tokens, unless a checkpoint replaces it; with LoRA, the run's own
        copy of it."""
        config, tokenizer = self.run.config, self.run.tokenizer
        if config.tune.lora_rank and self.facts.resumed:
            return load_base(self.folder)
        start = self.facts.start(config.model.init)
        start = None if start is None else start.cropped(config.model.block_size)
        return start if start is None or tokenizer is None else start.extended(tokenizer)

    def _build(self, execution: Execution, context: Context, *, restoring: bool = False) -> Assembly:
        """Assemble the run as it started; when `restoring`, without initial weights."""
        config = self.run.config
        seed = None if restoring and not config.tune.lora_rank else config.seed
        weights = None if self.start is None else self.start.state
        assembly = build(config.model, config.optim, execution, context, seed=seed, weights=weights, tune=config.tune)
        if self.start is not None and self.facts.continued:
            assembly.state.take_over(self.start, self.run.plan.samples_before)
        return assembly

    def _check_space(self, state: TrainState) -> str | None:
        """Check that the checkpoints will fit on the disk, before anything is written; returns a warning if space is tight."""
        config, steps, size = self.run.config, self.run.plan.steps - state.step, state.checkpoint_bytes()
        validations = steps // config.eval.every if config.eval.every else 1
        folder = self.folder.checkpoints
        return self.context.on_primary(
            lambda: check_space(folder, size, config.checkpoint, steps=steps, best_steps=validations)
        )

    def _write_folder(self, state: TrainState) -> None:
        """Write the files of a run folder other than metrics and checkpoints."""
        facts = {
            **environment_facts(self.context, state.step, self.fingerprint, self.facts.continued),
            **sample_position(self.run.config.train, state.samples),
            "reasons": [{"setting": r.setting, "value": r.value, "why": r.why} for r in self.run.reasons],
        }
        if self.facts.resumed:
            self.folder.write_config(config_to_toml(self.run.config))
            self.folder.add_environment(facts)
            if state.step and not self.facts.continued:
                self.folder.record_saved()
            return

        def write_files() -> None:
            write_atomically(self.folder.dataset_file, dataset_record(self.dataset).encode())
            if self.run.tokenizer is not None:
                self.run.tokenizer.save(self.folder.path)
            if self.run.config.tune.lora_rank:
                assert self.start is not None
                write_base(self.folder, self.start, self.run.tokenizer)
            self.folder.add_environment(facts)

        recipe, shared = config_to_toml(self.run.config), bool(self.facts.continued)
        create_run(self.folder.path, recipe, share_folder=shared, write_files=write_files)
        self.created = True

    def _monitor(self, state: TrainState) -> RunMonitor:
        config, steps, primary = self.run.config, self.run.plan.steps, self.context.is_primary
        values, recipe = config_to_dict(config), config_to_toml(config)
        info = RunInfo(self.folder.path, state.step, config.monitor, values, recipe, report=print)
        prompt, quiet, resumed = config.sample.prompt, self.quiet, self.facts.resumed
        return RunMonitor(self.folder, info, steps, prompt=prompt, primary=primary, quiet=quiet, resumed=resumed)

    def _new_saver(self, monitor: RunMonitor, state: TrainState) -> None:
        config, shards = self.run.config, state.shards
        self.saver = Saver(
            self.folder,
            config.checkpoint,
            self.context,
            tokenizer=self.run.tokenizer,
            run_config=config_to_dict(config),
            note=monitor.note,
            flush=monitor.flush,
            joint=None if shards is None or shards.copy else JointWrite(self.context, shards.rank, shards.count),
            sharded=shards is not None,
        )

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
                if (file := remove_damaged_code(error)) is not None:
                    raise UserError(
                        f"{file}: was damaged when a compilation was killed, and is removed: start again"
                    ) from error
                if not out_of_memory(error):
                    raise
                early = state.step - max(first, plan.at(state.step).first_step) < FIRST_STEPS
                retry = early and not update.updating
                device, begun = self.context.device, state.step > first or self.facts.resumed
                run = self.folder.path if begun else None
                micro = reduced_micro_batch(plan, state.model, device, state.step, run, retry=retry)
            self.saver.wait()
            self.run = self.run.with_micro_batch(micro)
            self.folder.write_config(config_to_toml(self.run.config))
            self._new_saver(monitor, state)
            monitor.note(
                f"memory ran out at step {state.step + 1}: continuing with {self.run.plan.accumulation} passes of {micro} "
                f"sequences per step instead of {plan.accumulation} of {plan.micro_batch}, which gives the same gradients"
            )

    def _fit(self, assembly: Assembly, monitor: RunMonitor, signals: StopOnSignal) -> None:
        """Train to the end, returning to earlier checkpoints as the guard requests."""
        config, plan, context, state = self.run.config, self.run.plan, self.context, assembly.state
        order, precision, compiled = self.order, self.run.execution.precision, self.run.execution.compiled

        def stop_requested() -> bool:  # called wherever work progresses
            context.progressed()
            return signals.signal is not None

        settings = StepSettings(
            self.objective,
            precision,
            context,
            grad_clip=config.train.grad_clip,
            keep_gradients=config.cuda_graphs,
            whole_gradients=self.run.execution.whole_gradients,
            stop_requested=stop_requested,
            interruptible=signals.interruptible if compiled and context.world_size == 1 else nullcontext,
        )
        explainer = Explainer(self.dataset, order, self.objective, context, precision, plan.micro_batch, self.document_start)
        rollbacks = load_rollbacks(self.folder, state, context)
        guard = Guard(config.guard, context, order, rollbacks, explainer, plan=plan, log=monitor.log, note=monitor.note)
        hooks = self._hooks(guard, monitor, stop_requested)

        def lr_at(step: int) -> float:
            return learning_rate(step, self.run.schedule, plan.steps)

        while True:
            source = TrainSequences(self.dataset.split("train"), guard.order, self.document_start)
            ahead = plan.steps - state.step if config.train.deadline is None else UNBOUNDED_STEPS
            requests = plan.requests(state.samples, ahead, context.data_rank, state.step)
            try:
                with Prefetcher(source, requests, context.device) as batches:
                    fit(assembly, batches, plan, settings, lr_at=lr_at, seed=config.seed, hooks=hooks, guard=guard)
                return
            except RollbackRequested as request:
                self._roll_back(request.rollback, guard, state, monitor)

    def _roll_back(self, rollback: Rollback, guard: Guard, state: TrainState, monitor: RunMonitor) -> None:
        """Record the rollback, return `state` to the latest valid checkpoint or the start of the run, and undo later metrics.

        The record comes first, and metrics are removed as a resumed run removes them, so a run that rolled back and one that
        was killed meanwhile and resumed are identical byte for byte. The state changes in place: wrappers and compiled code
        keep their weights.
        """
        context, folder = self.context, self.folder
        context.activity(f"rolling back from step {state.step} to the latest checkpoint", LONG_PATIENCE)

        def record() -> None:
            self.saver.wait()
            write_rollbacks(folder, [*guard.rollbacks, rollback])

        context.on_primary(record)
        guard.add_rollback(rollback)
        checkpoint = latest_checkpoint(folder, context)
        if checkpoint is not None:
            state.restore(checkpoint)
        else:
            state.reset(self._initial_state())
        self._continue_digest(state, guard.order)
        state.history.rollbacks = len(guard.rollbacks)
        state.optimizer.zero_grad(set_to_none=True)
        monitor.rewind(state.step)
        monitor.note(f"rolled back to step {state.step:,}")

    def _export(self, monitor: RunMonitor, state: TrainState) -> None:
        """Export the final model to the formats that the configuration names."""
        for name in self.run.config.checkpoint.export if self.context.is_primary else ():
            target = EXPORT_FORMATS.get("checkpoint.export", name)
            out = self.folder.path / "exports" / f"{name}-step-{state.step:06d}{target.suffix}"
            if not out.exists():
                target.write(str(self.folder.path), out, best=False, dataset="bardling")
                monitor.note(f"exported to {out}")

    def _hooks(self, guard: Guard, monitor: RunMonitor, stop_requested: Callable[[], bool]) -> list[Hook]:
        """What acts between steps, in the order of the calls."""
        run, config, plan, context = self.run, self.run.config, self.run.plan, self.context
        tokenizer, timer = run.tokenizer, StepTimer(context.device)
        shared = HookContext(
            monitor,
            timer,
            plan,
            context,
            run.execution.precision,
            seed=config.seed,
            tokenizer=tokenizer,
            bytes_per_token=bytes_per_token(tokenizer, context.device),
            stop_requested=stop_requested,
        )
        remedy = "add text" if config.data.val_source else "add text, or raise data.val_fraction"
        size, windows = config.model.block_size, config.eval.windows
        validation = validation_sets(self.dataset, config.data, size, windows, self.document_start, remedy)
        hooks: list[Hook] = [
            NewShapes(plan, context, run.execution.compiled, monitor.note),
            Log(
                shared,
                every=config.train.log_every,
                sequences_per_epoch=self.order.sequences_per_epoch,
                epochs=partial(source_epochs, self.dataset, self.order),
                flops_per_token=cache(partial(flops_per_token, config.model, tune=config.tune)),
                peak_flops=run.peak_flops,
            ),
            Validate(shared, validation, every=config.eval.every, batch_size=plan.micro_batch),
        ]
        if tokenizer is not None:
            if self.texts.sample is not None:
                hooks.append(Sample(shared, self.texts.sample, tokenizer, self.texts.prompts))
            if self.texts.tasks:
                hooks.append(Tasks(shared, config.eval, tokenizer, self.texts.tasks))
        hooks += [HOOKS.get("train.hooks", name)(shared) for name in config.train.hooks]
        hooks.append(Save(shared, self.saver, config.checkpoint, check=guard.judge_pending))
        seconds = config.train.deadline_seconds
        if seconds is not None:
            deadline = Deadline(
                seconds,
                plan.horizon,
                context,
                started_at=self.facts.started_at,
                seconds_before=self.seconds_before,
                finishing_time=partial(finishing_time, hooks, seconds, config.eval.windows / plan.samples_per_step / 2),
                lr_at=lambda step, steps: learning_rate(step, run.schedule, steps),
                on_change=monitor.planned,
            )
            hooks.insert(0, deadline)
        return hooks
