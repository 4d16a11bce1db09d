"""Figures for TensorBoard: event files in the run folder, shown by `tensorboard --logdir RUN`.

Every number of a record becomes a scalar `kind/name` at its step (`train/loss`); its time of day is the event's. A resumed run
writes another file into the same folder and names the first step that it will do again: TensorBoard then leaves out what a kill
had undone (`purge_step`). The configuration appears as hyperparameters and as a text.

Limits: TensorBoard stores scalars as float32.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bardling.config import RunConfig
from bardling.configfile import config_to_dict, config_to_toml
from bardling.errors import UserError


def check_tensorboard() -> None:
    """Make sure that the package is there.

    Raises:
        UserError: it is not; names the extra.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("monitor.tensorboard = true: needs the package tensorboard: pip install 'bardling[tensorboard]'")


class TensorBoardSink:
    """Writes event files into `folder`.

    Args:
        folder: made if need be; a resumed run uses its first start's.
        config: shown as hyperparameters.
        step: the step that the run starts (0) or resumes at; events of later steps, from an earlier start, are taken back.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, config: RunConfig, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        again = folder.is_dir() and any(folder.iterdir())
        # Half a minute: what a person who watches is ready to wait.
        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1 if again else None, flush_secs=30)
        self._write_config(config, step)

    def log(self, values: Mapping[str, object]) -> None:
        """Write the numbers of one record."""
        kind, step, time = values["kind"], values["step"], values.get("time")
        for name, value in values.items():
            if name not in ("kind", "step", "time") and isinstance(value, int | float):
                self._writer.add_scalar(f"{kind}/{name}", float(value), step, walltime=time)

    def sample(self, step: int, prompt: str, texts: Sequence[str]) -> None:
        """Write texts of the model, each under its own tag."""
        for number, text in enumerate(texts, 1):
            self._writer.add_text(f"sample/{number}", _verbatim(prompt + text), step)

    def flush(self) -> None:
        """Write everything to the file."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()

    def _write_config(self, config: RunConfig, step: int) -> None:
        from torch.utils.tensorboard.summary import hparams

        # `SummaryWriter.add_hparams` would open a second run beside this one.
        summaries = hparams(flat(config_to_dict(config)), {"val/loss": 0.0})  # type: ignore[no-untyped-call]
        for summary in summaries:
            self._writer.file_writer.add_summary(summary, step)
        self._writer.add_text("config", _verbatim(config_to_toml(config)), step)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings as dotted ones, in the types that hyperparameters may have."""
    found: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def _verbatim(text: str) -> str:
    """`text` as a Markdown block that is shown as it is, whatever a model wrote into it."""
    clean = text.encode("utf-8", "replace").decode("utf-8")
    return "\n".join("    " + line for line in clean.splitlines())
