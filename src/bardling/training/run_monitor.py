"""Where a run's records go: its own files, the terminal, and the services that the configuration names."""

from dataclasses import replace
from types import TracebackType

from bardling.checkpoint.run_folder import RunFolder
from bardling.monitor import RunInfo, Sink
from bardling.monitor.console import Console
from bardling.monitor.jsonl import JsonlSink, truncate_after
from bardling.monitor.records import EventRecord, Record, SampleRecord
from bardling.monitor.services import Services


class RunMonitor:
    """Receives every record; does nothing except in the primary process. A context manager that closes its files.

    Args:
        info: what services show about the run; its `step` is the one that the run starts or resumes at.
        steps: the run's last step, as planned now.
        prompt: of samples, as the user wrote it.
    """

    def __init__(self, folder: RunFolder, info: RunInfo, steps: int, *, prompt: str, primary: bool, quiet: bool) -> None:
        self._folder, self._info, self._prompt, self._primary = folder, info, prompt, primary
        self._metrics: JsonlSink | None = None
        self._samples: JsonlSink | None = None
        self._services: Services | None = None
        self._console = Console(steps, info.step) if primary and not quiet else None
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
        self._services = Services(replace(self._info, step=step, report=self.note))

    def _written(self) -> list[Sink | JsonlSink]:
        """The open destinations besides the terminal."""
        return [sink for sink in (self._metrics, self._samples, self._services) if sink is not None]

    def rewind(self, step: int) -> None:
        """Remove the records of steps after `step`, to which the run has returned, as if it had been resumed there."""
        for sink in self._written():
            sink.close()
        self._open(step)

    def log(self, record: Record) -> None:
        values, file = record.as_dict(), self._samples if isinstance(record, SampleRecord) else self._metrics
        if file is not None:
            file.log(values)
        if isinstance(record, EventRecord):  # not a point of a curve; the guard also prints it
            return
        sinks: tuple[Sink | None, ...] = (self._console, self._services)
        for sink in filter(None, sinks):
            if isinstance(record, SampleRecord):
                # As `bardling sample`, the terminal shows the requested prompt, then the completion.
                sink.sample(record.step, self._prompt if sink is self._console else record.prompt, record.texts)
            else:
                sink.log(values)

    def note(self, text: str) -> None:
        if self._console is not None:
            self._console.note(text)

    def planned(self, steps: int, text: str) -> None:
        """Update the last step, and print `text` unless it is empty."""
        if self._console is not None:
            self._console.set_steps(steps)
        if text:
            self.note(text)

    def progress(self, label: str, done: int, total: int) -> None:
        if self._console is not None:
            self._console.progress(label, done, total)

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
        for sink in (*self._written(), *([self._console] if self._console else [])):
            try:
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
            if error is None:  # otherwise the error that ends the run is reported: it tells how to continue
                raise
