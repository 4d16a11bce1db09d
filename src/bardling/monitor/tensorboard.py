"""Metrics for TensorBoard: event files in the run folder, shown by `tensorboard --logdir RUN`.

Every number in a record becomes a scalar `kind/name` at its step (`train/loss`), stored as float32, with the record's time as
the event time. A resumed run writes another file into the same folder; its `purge_step` makes TensorBoard drop the steps
after the checkpoint. The configuration appears as hyperparameters and as text.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from bardling.config.monitor import MonitorConfig
from bardling.errors import UserError
from bardling.monitor import RunInfo


class TensorBoardSink:
    """Writes event files into the run folder's `tensorboard/`."""

    title: ClassVar[str] = "TensorBoard"

    def __init__(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        resumed = folder.is_dir() and any(folder.iterdir())
        # 30 seconds: as long as someone watching the curves is willing to wait.
        self._writer: Any = SummaryWriter(str(folder), purge_step=run.step + 1 if resumed else None, flush_secs=30)
        self._write_config(run)

    @staticmethod
    def enabled(config: MonitorConfig) -> bool:
        return config.tensorboard

    @staticmethod
    def check(config: MonitorConfig) -> None:
        """Raise `UserError` naming the extra if the package is not installed."""
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError("monitor.tensorboard = true: needs the package tensorboard: pip install 'bardling[tensorboard]'")

    def log(self, record: Mapping[str, object]) -> None:
        kind, step, time = record["kind"], record["step"], record.get("time")
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

    def _write_config(self, run: RunInfo) -> None:
        from torch.utils.tensorboard.summary import hparams

        # `SummaryWriter.add_hparams` would open a second run next to this one.
        summaries = hparams(flatten(run.values), {"val/loss": 0.0})  # type: ignore[no-untyped-call]
        for summary in summaries:
            self._writer.file_writer.add_summary(summary, run.step)
        self._writer.add_text("config", _verbatim(run.recipe), run.step)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings with dotted keys, in the types that hyperparameters may have."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def _verbatim(text: str) -> str:
    """`text` as a Markdown code block, so that Markdown in generated text has no effect."""
    clean = text.encode("utf-8", "replace").decode("utf-8")
    return "\n".join("    " + line for line in clean.splitlines())
