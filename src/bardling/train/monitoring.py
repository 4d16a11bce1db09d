"""Where a run's figures go: its own files always, the terminal, and the services that the configuration names; and what the run
says before there are any."""

from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from bardling.checkpoint.runfolder import RunFolder
from bardling.config import RunConfig, TrainConfig
from bardling.data.order import WindowOrder
from bardling.distributed.device import device_name
from bardling.monitor.console import Console
from bardling.monitor.jsonl import JsonlSink, truncate_after
from bardling.monitor.records import EventRecord, Record, SampleRecord
from bardling.monitor.services import Services
from bardling.train.plan import TrainPlan


class RunMonitor:
    """Takes every record; in all processes but the primary one it does nothing. As a context it is closed at the end."""

    def __init__(self, folder: RunFolder, config: RunConfig, step: int, *, primary: bool, quiet: bool) -> None:
        self._metrics: JsonlSink | None = None
        self._samples: JsonlSink | None = None
        self._console: Console | None = None
        self._services: Services | None = None
        self._folder, self._config, self._primary = folder, config, primary
        if primary and not quiet:
            self._console = Console(config.train.steps, step)
        try:
            self._open(step)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def _open(self, step: int) -> None:
        if not self._primary:
            return
        for path in (self._folder.metrics_file, self._folder.samples_file):
            truncate_after(path, step)  # figures of steps that a kill undid
        self._metrics, self._samples = JsonlSink(self._folder.metrics_file), JsonlSink(self._folder.samples_file)
        self._services = Services(self._folder.path, self._config, step, self.note)

    def rewind(self, step: int) -> None:
        """Forget the figures of steps after `step`, to which the run has gone back: as if it had been resumed there."""
        for sink in (self._metrics, self._samples, self._services):
            if sink is not None:
                sink.close()
        self._open(step)

    def log(self, record: Record) -> None:
        """Write a record where its kind belongs."""
        values = record.as_dict()
        if isinstance(record, SampleRecord):
            if self._samples is not None:
                self._samples.log(values)
            if self._console is not None:
                # As `bardling sample` writes it: the prompt that was asked for, and what the model goes on with.
                self._console.sample(record.step, [self._config.sample.prompt + text for text in record.texts])
            if self._services is not None:
                self._services.sample(record.step, record.prompt, record.texts)
            return
        if self._metrics is not None:
            self._metrics.log(values)
        if isinstance(record, EventRecord):  # said in words besides; no figure of a curve
            return
        if self._console is not None:
            self._console.log(values)
        if self._services is not None:
            self._services.log(values)

    def note(self, text: str) -> None:
        """Say something to the person who watches."""
        if self._console is not None:
            self._console.note(text)

    def planned(self, steps: int, text: str) -> None:
        """Take another last step, and say so if there is something to say."""
        if self._console is not None:
            self._console.planned(steps)
        if text:
            self.note(text)

    def progress(self, label: str, done: int, total: int) -> None:
        """Show how far some long work has come."""
        if self._console is not None:
            self._console.progress(label, done, total)

    def flush(self) -> None:
        """Make everything logged so far durable."""
        for sink in (self._metrics, self._samples, self._services):
            if sink is not None:
                sink.flush()

    def close(self) -> None:
        """Write what is left and give the terminal back.

        Raises:
            UserError: a file cannot be written; everything is closed nevertheless.
        """
        failure: Exception | None = None
        for sink in (self._metrics, self._samples, self._services, self._console):
            try:
                if sink is not None:
                    sink.close()
            except Exception as error:  # noqa: BLE001  raised below, once the others are closed
                failure = failure or error
        if failure is not None:
            raise failure

    def __enter__(self) -> "RunMonitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # otherwise the error that ends the run has the last word: it says how to go on
                raise


def opening(
    config: RunConfig, plan: TrainPlan, order: WindowOrder, device: torch.device, model: nn.Module, why: tuple[str, str]
) -> list[str]:
    """Lines that say what will be trained, on what, and what `auto` chose.

    Args:
        why: reasons for the precision and for compiling or not.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    epochs = plan.samples_before(plan.steps) / order.windows_per_epoch
    passes = "pass" if plan.accumulation == 1 else "passes"
    where = f"{device_name(device)}" + (f" x {plan.world_size}" if plan.world_size > 1 else "")
    lines = [
        f"{parameters / 1e6:.2f}M parameters, {plan.steps:,} steps of {plan.samples_per_step} x {config.model.block_size} "
        f"tokens ({plan.accumulation} forward {passes} of {plan.micro_batch}), {epochs:.2f} epochs of {order.n_tokens:,} tokens"
    ]
    if len(plan.stages) > 1:
        lines.append(f"batch and context grow: {plan.in_words()}")
    return [*lines, f"{where}; precision {config.precision} ({why[0]}); compile {config.compile} ({why[1]})"]


def resumption(run: Path, step: int, config: TrainConfig) -> str:
    """A line that says where a run goes on; of a finished one, how it can. With a deadline, its plan decides that, not this."""
    if step < config.steps or config.deadline is not None:
        return f"resuming {run} at step {step:,}" + (f" of {config.steps:,}" if config.deadline is None else "")
    return f"{run} is finished: its {step:,} steps are done; raise --train.steps to go on with it"
