"""A run from its configuration to its last checkpoint: `train` starts one, `resume` goes on with one.

Both put the same parts together (data, model, optimizer, hooks) and differ only in where the state comes from. Everything that
`auto` decided is written into the run's configuration, so that a resumed run computes as before.
"""

import dataclasses
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bardling.checkpoint.load import load
from bardling.checkpoint.runfolder import RunFolder, create_run, open_run, refuse_existing
from bardling.config import RunConfig, SampleConfig
from bardling.data.loader import EvalWindows, Prefetcher, TrainWindows
from bardling.data.order import WindowOrder
from bardling.data.packing import document_start
from bardling.distributed.context import Context, distributed
from bardling.distributed.device import prepare_backend
from bardling.distributed.watch import FOREVER, LONG
from bardling.evaluate.tasks import check_task
from bardling.files import remove_unfinished, write_whole
from bardling.interop.dataset import open_data
from bardling.model.arithmetic import flops_per_token
from bardling.model.depth import without_dial
from bardling.monitor.services import check_services
from bardling.optim.schedule import learning_rate
from bardling.train.alone import alone
from bardling.train.changes import absolute, check_changes, check_steps, settle
from bardling.train.compiling import patience, wrap
from bardling.train.deadline import FAR, Deadline, ending_of
from bardling.train.environment import (
    asked_fingerprint,
    began_by_this_job,
    check_dataset,
    continued_checkpoint,
    dataset_record,
    environment_facts,
)
from bardling.train.explain import Explainer
from bardling.train.goback import go_back, rollbacks_of
from bardling.train.guard import Guard, RollBack
from bardling.train.hooks import Checkpoint, Log, Sample, StepTimer, Tasks, Validate
from bardling.train.loop import Hook, fit
from bardling.train.memory import FIRST_STEPS, Passes, UpdateWatch, divisors, no_room, out_of_memory, shrunk
from bardling.train.monitoring import RunMonitor, opening, resumption
from bardling.train.persist import build_state, newest_checkpoint
from bardling.train.plan import TrainPlan, make_plan
from bardling.train.resolve import resolve, settle_vocabulary
from bardling.train.saving import Saver, check_room
from bardling.train.signals import Stopped, StopSignals
from bardling.train.state import TrainState
from bardling.train.trace import samples_facts


@dataclass(frozen=True)
class RunResult:
    """How a call of `train` or `resume` ended."""

    folder: Path
    step: int  # steps done in all
    finished: bool  # False when a signal stopped the run before its last step
    best_val_loss: float
    exit_status: int  # 0, or 128 + the signal


def train(config: RunConfig, out: Path | str, *, continue_from: str | None = None, quiet: bool = False) -> RunResult:
    """Train a new run in the folder `out`, which must not exist yet.

    Args:
        continue_from: a checkpoint, another trainer's say, whose training the run goes on with: weights, optimizer and step.
            (`config.model.init` takes only the weights.)

    Raises:
        UserError: the configuration does not fit the data or the machine; nothing has been written then.
    """
    with distributed(config.device, rank_timeout=config.train.rank_timeout) as context:
        config = absolute(without_dial(config))
        if context.broadcast(context.is_primary and began_by_this_job(Path(out), asked_fingerprint(config))):
            folder = RunFolder(Path(out))  # torchrun or Slurm has started the same job again: it goes on
            with alone(folder, context):
                return _Run(context, folder.config(), folder, quiet=quiet, resumed=True, continue_from=continue_from).go()
        return _Run(context, config, RunFolder(Path(out)), quiet=quiet, resumed=False, continue_from=continue_from).go()


def resume(run: Path | str, config: RunConfig | None = None, *, quiet: bool = False) -> RunResult:
    """Go on with a run from its newest sound checkpoint, as if it had never stopped.

    Args:
        config: the run's configuration with changes (`train.steps` raised, say); absent: as it was.

    Raises:
        UserError: there is no such run, its data has changed, or a change is one that a trained model cannot follow.
    """
    folder = open_run(Path(run))
    before = folder.config()
    config = settle(config or before, before)
    changes = check_changes(absolute(before), config)
    with distributed(config.device, rank_timeout=config.train.rank_timeout) as context, alone(folder, context):
        return _Run(context, config, folder, quiet=quiet, resumed=True, changes=changes).go()


class _Run:
    """The parts of one run, put together in the order in which they need each other."""

    def __init__(
        self,
        context: Context,
        config: RunConfig,
        folder: RunFolder,
        *,
        quiet: bool,
        resumed: bool,
        changes: Sequence[str] = (),
        continue_from: str | None = None,
    ) -> None:
        self.began = time.monotonic()
        self.context, self.folder, self.quiet, self.resumed = context, folder, quiet, resumed
        if not resumed and context.is_primary:
            refuse_existing(folder.path)
        if context.is_primary:
            check_services(config.monitor)
        for task in config.eval.tasks:
            check_task(task)
        context.doing("preparing the data", FOREVER)
        self.asked = asked_fingerprint(config)
        self.dataset = open_data(config.data)  # processes that need it made wait for the first to make it
        context.doing("setting up", LONG)
        if resumed:
            check_dataset(self.dataset, folder)
        self.checkpoint = newest_checkpoint(folder, context) if resumed else None
        if resumed and self.checkpoint is None:  # stopped before its first checkpoint, it begins anew, from the same weights
            continue_from = continue_from or continued_checkpoint(folder)
        self.continues = None if continue_from is None else str(Path(continue_from).absolute())
        origin = self.continues or config.model.init
        self.start = load(origin, training=bool(self.continues)) if origin and self.checkpoint is None else None
        if self.checkpoint is not None:
            check_steps(config.train, self.checkpoint.training["step"], folder.path)
        elif self.continues and self.start is not None:
            check_steps(config.train, self.start.step, self.continues)
        vocab_size = config.model.vocab_size if self.start is None else self.start.config.vocab_size
        self.tokenizer = settle_vocabulary(self.dataset, vocab_size, self.start, folder if resumed else None)
        resolved = resolve(config, self.dataset, self.tokenizer, self.start, context)
        self.config, self.precision, self.peak = resolved.config, resolved.precision, resolved.peak_flops
        self.compile_why, self.changes = resolved.compile_why, [*changes, *resolved.changes]
        self.start_id = document_start(self.config.data.document_mask, self.dataset, self.tokenizer)
        self.plan: TrainPlan = make_plan(self.config.train, self.config.model.block_size, context.world_size)
        self.order = WindowOrder(self.config.seed, len(self.dataset.split("train")), self.config.model.block_size)

    def go(self) -> RunResult:
        """Build the state, train it to the end or until a signal, and say how it ended."""
        context, config = self.context, self.config
        undo = prepare_backend(context.device, deterministic=config.deterministic, attention=config.attention)
        with StopSignals() as signals, ExitStack() as ends:
            ends.callback(undo)
            state = build_state(
                config,
                context,
                checkpoint=self.checkpoint,
                start=self.start,
                continues=bool(self.continues),
                samples_before=self.plan.samples_before,
            )
            self.seconds_before = state.seconds
            self.checkpoint = None  # its tensors are not needed any more
            self._settle_passes(state)
            config = self.config
            if self.resumed and context.is_primary:
                self._clear()
            crowded = check_room(state, self.folder, config, self.plan, context)
            if not self.resumed:
                ends.enter_context(alone(self.folder, context))
            if context.is_primary:
                self._write_folder(state)
            context.barrier()
            primary = context.is_primary
            monitor = ends.enter_context(RunMonitor(self.folder, config, state.step, primary=primary, quiet=self.quiet))
            self._new_saver(monitor)
            ends.callback(lambda: self.saver.wait())  # of the savers that there will be, the last
            try:
                self._announce(monitor, state)
                if crowded:
                    monitor.note(f"WARNING: {crowded}")
                self._fit_somehow(state, monitor, signals)
                self.saver.finish(state)
            except Stopped:
                # All leave with the same status, also those that no signal reached.
                number = context.largest(signals.signal or 0) or signal.SIGTERM
                self._save(state)
                monitor.note(f"stopped at step {state.step} and saved; go on with: bardling resume {self.folder.path}")
                return RunResult(self.folder.path, state.step, False, state.best_val_loss, 128 + number)
        return RunResult(self.folder.path, state.step, True, state.best_val_loss, 0)

    def _settle_passes(self, state: TrainState) -> None:
        """Decide how many sequences a forward pass takes, where that is open or several processes may run out of memory."""
        config, context, share = self.config, self.context, self.plan.micro_batch * self.plan.accumulation
        passes = Passes(state.model, context, self.precision, config, state.optimizer)
        micro, why = self.plan.micro_batch, ""
        if config.train.micro_batch == "auto":
            micro, why = passes.choose(share)
        elif context.world_size > 1 and context.device.type == "cuda":
            micro = passes.largest([size for size in divisors(share) if size <= micro])
            why = f"the memory of {context.device} holds no more"
        if why and micro != config.train.micro_batch:
            self._take_passes(micro)
            self.changes = [*self.changes, f"train.micro_batch: {config.train.micro_batch} -> {micro}, {why}"]

    def _take_passes(self, micro_batch: int) -> None:
        self.config = dataclasses.replace(self.config, train=dataclasses.replace(self.config.train, micro_batch=micro_batch))
        horizon = self.plan.horizon
        self.plan = make_plan(self.config.train, self.config.model.block_size, self.context.world_size)
        self.plan = dataclasses.replace(self.plan, horizon=horizon)

    def _new_saver(self, monitor: RunMonitor) -> None:
        self.saver = Saver(self.folder, self.config, self.tokenizer, self.context, tell=monitor.note, flush=monitor.flush)

    def _fit_somehow(self, state: TrainState, monitor: RunMonitor, signals: StopSignals) -> None:
        """Train; where memory runs out in the first steps, with smaller passes."""
        first, update = state.step, UpdateWatch(state.optimizer)
        while True:
            try:
                self._fit(state, monitor, signals)
                return
            except Exception as error:
                if not out_of_memory(error):
                    raise
                early = state.step - max(first, self.plan.at(state.step).first_step) < FIRST_STEPS
                micro = shrunk(error, self.plan, state.model, early=early, updating=update.under_way)
                if micro is None:
                    raise no_room(self.plan, state.model, self.context.device, state.step, self.folder.path) from None
            self.saver.wait()
            before = self.plan
            self._take_passes(micro)
            self.folder.write_config(self.config)
            self._new_saver(monitor)
            monitor.note(
                f"memory ran out at step {state.step + 1}: going on with {self.plan.accumulation} passes of {micro} sequences "
                f"a step instead of {before.accumulation} of {before.micro_batch}, which gives the same gradients"
            )

    def _clear(self) -> None:
        """Remove what a kill has left unfinished, before the free space is looked at."""
        remove_unfinished(self.folder.path)
        with suppress(OSError):  # the first save will say it
            self.folder.store().tidy(alone=True)

    def _write_folder(self, state: TrainState) -> None:
        """What a run folder holds besides figures and checkpoints."""
        facts = {
            **environment_facts(self.context, state.step, self.asked, self.continues),
            **samples_facts(self.config.train, state.samples),
        }
        if self.resumed:
            self.folder.write_config(self.config)
            self.folder.add_environment(facts)
            return

        def also() -> None:
            write_whole(self.folder.dataset_file, dataset_record(self.dataset).encode())
            if self.tokenizer is not None:
                self.tokenizer.save(self.folder.path)
            self.folder.add_environment(facts)

        create_run(self.folder.path, self.config, beside=bool(self.continues), also=also)

    def _sampling(self) -> SampleConfig:
        """How to sample: text of one document has no end-of-text token to begin after, so an empty prompt is a line break."""
        single = self.dataset.manifest.train.documents == 1
        return dataclasses.replace(self.config.sample, prompt=self.config.sample.prompt or ("\n" if single else ""))

    def _announce(self, monitor: RunMonitor, state: TrainState) -> None:
        why = (self.precision.why, self.compile_why)
        for line in opening(self.config, self.plan, self.order, self.context.device, state.model, why):
            monitor.note(line)
        if self.resumed:
            monitor.note(resumption(self.folder.path, state.step, self.config.train))
        for change in self.changes:
            monitor.note(f"changed: {change}")

    def _fit(self, state: TrainState, monitor: RunMonitor, signals: StopSignals) -> None:
        config, plan, context = self.config, self.plan, self.context

        def stop_requested() -> bool:  # asked wherever work goes on
            context.moved()
            return signals.requested()

        # With a deadline, the decay ends there.
        optim = config.optim if config.train.deadline is None else dataclasses.replace(config.optim, decay_steps=None)
        timer = StepTimer(context.device, context.doing)
        table = None if self.tokenizer is None else torch.from_numpy(self.tokenizer.bytes_per_token()).to(context.device)
        last = plan.horizon
        hooks: list[Hook] = [
            patience(plan, context, compiled=config.compile == "on"),
            Log(
                monitor,
                plan,
                timer,
                every=config.train.log_every,
                windows_per_epoch=self.order.windows_per_epoch,
                flops_per_token=partial(flops_per_token, config.model),
                peak_flops=self.peak,
            ),
            Validate(
                monitor,
                timer,
                EvalWindows(self.dataset.split("val"), config.model.block_size, config.eval.windows, self.start_id),
                every=config.eval.every,
                last=last,
                batch_size=plan.micro_batch,
                precision=self.precision,
                context=context,
                bytes_per_token=table,
                stop_requested=stop_requested,
            ),
        ]
        if self.tokenizer is not None:
            hooks.append(
                Sample(
                    monitor,
                    timer,
                    self._sampling(),
                    self.tokenizer,
                    last=last,
                    seed=config.seed,
                    precision=self.precision,
                    context=context,
                    stop_requested=stop_requested,
                )
            )
            if config.eval.tasks:
                hooks.append(
                    Tasks(
                        monitor,
                        timer,
                        config.eval,
                        self.tokenizer,
                        last=last,
                        seed=config.seed,
                        precision=self.precision,
                        context=context,
                        stop_requested=stop_requested,
                    )
                )
        guard = self._guard(state, monitor)
        hooks.append(Checkpoint(timer, self.saver, config.checkpoint, last=last, context=context, settle=guard.settle))
        deadline = config.train.deadline_seconds
        if deadline is not None:
            ending = ending_of(hooks, deadline, config.eval.windows / plan.samples_per_step / 2)
            hooks.insert(
                0,
                Deadline(
                    deadline,
                    last,
                    context,
                    began=self.began,
                    before=self.seconds_before,
                    ending=ending,
                    changed=monitor.planned,
                ),
            )
        forward = wrap(state.model, compiled=config.compile == "on", graphs=config.cuda_graphs, context=context)
        while True:
            source = TrainWindows(self.dataset.split("train"), guard.order, self.start_id)
            ahead = plan.steps - state.step if deadline is None else FAR
            requests = plan.requests(state.samples, ahead, context.rank, state.step)
            try:
                with Prefetcher(source, requests, context.device) as batches:
                    fit(
                        state,
                        batches,
                        plan,
                        lr_at=lambda step: learning_rate(step, optim, plan.steps),
                        grad_clip=config.train.grad_clip,
                        seed=config.seed,
                        forward=forward,
                        precision=self.precision,
                        context=context,
                        keep_gradients=config.cuda_graphs,
                        hooks=hooks,
                        bytes_per_token=table,
                        stop_requested=stop_requested,
                        guard=guard,
                    )
                return
            except RollBack as found:
                go_back(
                    found,
                    guard,
                    state,
                    folder=self.folder,
                    context=context,
                    saver=self.saver,
                    monitor=monitor,
                    begin=self._begin,
                )

    def _guard(self, state: TrainState, monitor: RunMonitor) -> Guard:
        context, rollbacks = self.context, rollbacks_of(self.folder, state, self.context)
        explainer = Explainer(
            self.dataset,
            self.order,
            device=context.device,
            precision=self.precision,
            micro_batch=self.plan.micro_batch,
            document_start=self.start_id,
        )
        return Guard(
            self.config.guard,
            context,
            self.order,
            rollbacks,
            explainer if context.is_primary else None,
            plan=self.plan,
            log=monitor.log,
            tell=monitor.note,
        )

    def _begin(self) -> TrainState:
        """The state that the run began with, in host memory."""
        return build_state(
            self.config,
            dataclasses.replace(self.context, device=torch.device("cpu")),
            start=self.start,
            continues=bool(self.continues),
            samples_before=self.plan.samples_before,
        )

    def _save(self, state: TrainState) -> None:
        self.context.doing(f"saving step {state.step}", LONG)
        self.saver.save(state, last=True)
        self.saver.finish(state)
