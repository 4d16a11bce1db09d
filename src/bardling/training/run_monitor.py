"""Where a run's records go: its own files, the terminal, and the services that the configuration names.

None of them can end a run: the first failure of each is a warning. Lines that a file does not accept are kept and tried again.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import TracebackType

from bardling.checkpoint.run_folder import RunFolder
from bardling.files.streams import tell
from bardling.monitor import RunInfo, Sink
from bardling.monitor.console import Console
from bardling.monitor.jsonl import JsonlSink, truncate_after
from bardling.monitor.records import EventRecord, Record, SampleRecord
from bardling.monitor.services import Services
from bardling.monitor.wandb import one_line


class RunMonitor:
    """Receives every record; does nothing except in the primary process. A context manager that closes its files.

    Args:
        info: what services show about the run; its `step` is the one that the run starts or resumes at.
        steps: the run's last step, as planned now.
        resumed: as in `Services`.
        prompt: of samples, as the user wrote it.
    """

    def __init__(
        self, folder: RunFolder, info: RunInfo, steps: int, *, prompt: str, primary: bool, quiet: bool, resumed: bool = False
    ) -> None:
        self._folder, self._info, self._prompt, self._primary, self._resumed = folder, info, prompt, primary, resumed
        self._metrics: JsonlSink | None = None
        self._samples: JsonlSink | None = None
        self._services: Services | None = None
        self._console = Console(steps, info.step) if primary and not quiet else None
        self._failed = set[str]()  # destinations whose failure has been reported
        try:
            self._open(info.step)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def _open(self, step: int) -> None:
        if not self._primary:
            return
        for path in (self._folder.metrics_file, self._folder.samples_file):
            truncate_after(path, step)  # records of steps that a kill undid
        self._metrics, self._samples = JsonlSink(self._folder.metrics_file), JsonlSink(self._folder.samples_file)
        self._services = Services(replace(self._info, step=step, report=self.note), resumed=self._resumed)

    def _written(self) -> list[Sink | JsonlSink]:
        """The open destinations besides the terminal."""
        return [sink for sink in (self._metrics, self._samples, self._services) if sink is not None]

    def rewind(self, step: int) -> None:
        """Remove the records of steps after `step`, to which the run has returned, as if it had been resumed there."""
        for sink in self._written():
            sink.close()
        self._resumed = True
        self._open(step)

    def log(self, record: Record) -> None:
        values, sampled = record.as_dict(), isinstance(record, SampleRecord)
        file = self._samples if sampled else self._metrics
        if file is not None:
            try:
                file.log(values)
            except Exception as error:  # noqa: BLE001  the run matters more
                self._report("samples.jsonl" if sampled else "metrics.jsonl", error)
        if isinstance(record, EventRecord):  # not a point of a curve; the guard also prints it
            return
        services = self._services
        if isinstance(record, SampleRecord):
            # As `bardling sample`, the terminal shows the requested prompt, then the completion.
            shown = record.prompt if record.prompt.strip() else self._prompt
            self._show(lambda console: console.sample(record.step, shown, record.texts))
            if services is not None:
                services.sample(record.step, record.prompt, record.texts)
        else:
            self._show(lambda console: console.log(values))
            if services is not None:
                services.log(values)

    def _show(self, action: Callable[[Console], None]) -> None:
        """Use the terminal display, if there is one. If it fails (the terminal has gone, say), it is closed."""
        console = self._console
        if console is None:
            return
        try:
            action(console)
        except Exception as error:  # noqa: BLE001  as above
            self._console = None
            with suppress(Exception):
                console.close()
            self._report("the terminal display", error)
        else:
            if console.failure is not None:
                self._console = None
                if not isinstance(console.failure, BrokenPipeError):  # a reader that exits means to
                    self._report("the terminal display", console.failure)

    def _report(self, title: str, error: Exception) -> None:
        if title not in self._failed:
            self._failed.add(title)
            self.warn(f"{title} failed; training continues: {one_line(error) or type(error).__name__}")

    def note(self, text: str) -> None:
        self._show(lambda console: console.note(text))

    def warn(self, text: str) -> None:
        """Print a warning in the display and, since that may be quiet or gone, on standard error; in any process."""
        self.note(f"WARNING: {text}")
        tell(f"warning: {text}")

    def planned(self, steps: int, text: str) -> None:
        """Update the last step, and print `text` unless it is empty."""
        self._show(lambda console: console.set_steps(steps))
        if text:
            self.note(text)

    def progress(self, label: str, done: int, total: int) -> None:
        self._show(lambda console: console.progress(label, done, total))

    def flush(self) -> None:
        """Make everything logged so far durable."""
        for sink in self._written():
            sink.flush()

    def close(self) -> None:
        """Flush and close everything, and restore the terminal.

        Raises:
            UserError: a file cannot be written; everything else is closed nevertheless.
        """
        failure: Exception | None = None
        for sink in self._written():
            try:
                sink.close()
            except Exception as error:  # noqa: BLE001  raised below, once the others are closed
                failure = failure or error
        self._show(lambda console: console.close())
        if failure is not None:
            raise failure

    def __enter__(self) -> "RunMonitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # otherwise the error that ends the run is reported: it tells how to continue
                raise
