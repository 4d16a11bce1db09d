"""Metrics for TensorBoard: event files in the run folder, shown by `tensorboard --logdir RUN`.

Every number in a record becomes a scalar `kind/name` at its step (`train/loss`, `task/hellaswag/accuracy`), stored as float32,
with the record's time as the event time. A resumed run writes another file into the same folder; its `purge_step` makes
TensorBoard drop the steps after the checkpoint. The configuration appears as hyperparameters and as text.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from bardling.config.recipes import flatten
from bardling.monitor import RunInfo
from bardling.monitor.records import scope


class TensorBoardSink:
    """Writes event files into the run folder's `tensorboard/`."""

    title: ClassVar[str] = "TensorBoard"
    package: ClassVar[str] = "tensorboard"

    def __init__(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = run.folder / "tensorboard"
        resumed = folder.is_dir() and any(folder.iterdir())
        # 30 seconds: as long as someone watching the curves is willing to wait.
        self._writer: Any = SummaryWriter(str(folder), purge_step=run.step + 1 if resumed else None, flush_secs=30)
        # `SummaryWriter.add_hparams` would open a second run next to this one.
        values = {key: value if isinstance(value, int | float) else str(value) for key, value in flatten(run.values).items()}
        for summary in hparams(values, {"val/loss": 0.0}):  # type: ignore[no-untyped-call]
            self._writer.file_writer.add_summary(summary, run.step)  # type: ignore[attr-defined]
        self._writer.add_text("config", _verbatim(run.recipe), run.step)

    def log(self, record: Mapping[str, object]) -> None:
        kind, step, time = scope(record), record["step"], record.get("time")
        for name, value in record.items():
            if name not in ("kind", "step", "time") and isinstance(value, int | float):
                self._writer.add_scalar(f"{kind}/{name}", float(value), step, walltime=time)

    def sample(self, step: int, prompt: str, texts: Sequence[str]) -> None:
        for number, text in enumerate(texts, 1):
            self._writer.add_text(f"sample/{number}", _verbatim(prompt + text), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _verbatim(text: str) -> str:
    """`text` as a Markdown code block, so that Markdown in generated text has no effect."""
    clean = text.encode("utf-8", "replace").decode("utf-8")
    return "\n".join("    " + line for line in clean.splitlines())
