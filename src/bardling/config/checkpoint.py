from dataclasses import dataclass

from bardling.config.checks import duration_seconds, require, require_at_least
from bardling.extensions import EXPORT_FORMATS


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved and which ones are kept."""

    every: int | str = 250
    """Steps between checkpoints, or a time such as '15m' or '2h'; 0 saves only after the last step, which is always saved."""
    keep_last: int = 2
    """Number of latest checkpoints to keep."""
    keep_best: int = 1
    """Number of best checkpoints (by validation loss) to keep (0 disables this)."""
    keep_every: int = 0
    """Keep every checkpoint whose step is divisible by this number (0 disables this)."""
    save_best: bool = True
    """Also save whenever the validation loss reaches a new minimum."""
    asynchronous: bool = True
    """Write checkpoints in the background while training continues; needs host memory for one checkpoint."""

    export: tuple[str, ...] = ()
    """Formats to export the final model to, in exports/ of the run: hf, peft, gguf, onnx, nanogpt, or one of an extension."""

    def __post_init__(self) -> None:
        for name in self.export:
            EXPORT_FORMATS.check("checkpoint.export", name)
        if isinstance(self.every, str):
            rule = "must be a number of steps, or a time with a unit, such as '90s', '15m' or '1h30m'"
            require(bool(self.every_seconds) and not self.every.strip()[-1].isdigit(), "checkpoint.every", self.every, rule)
        else:
            require_at_least(0, self, "checkpoint", "every")
        require_at_least(1, self, "checkpoint", "keep_last")
        require_at_least(0, self, "checkpoint", "keep_best", "keep_every")

    @property
    def every_steps(self) -> int:
        """Steps between checkpoints; 0 if checkpoints are saved by time or only at the end."""
        return self.every if isinstance(self.every, int) else 0

    @property
    def every_seconds(self) -> float | None:
        """Seconds between checkpoints; None if they are saved by step."""
        return duration_seconds(self.every, "checkpoint.every") if isinstance(self.every, str) else None
