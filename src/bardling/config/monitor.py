from dataclasses import dataclass
from typing import Literal

from bardling.extensions import SINKS


@dataclass(frozen=True)
class MonitorConfig:
    """Logging services, in addition to the run's own files and the terminal."""

    tensorboard: bool = False
    """Write TensorBoard event files to the run folder."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Log to Weights & Biases; 'offline' stores the log in the run folder until `wandb sync`."""
    wandb_project: str = "bardling"
    """Weights & Biases project."""
    wandb_name: str = ""
    """Weights & Biases run name; empty: the name of the run folder."""
    sinks: tuple[str, ...] = ()
    """Additional metrics sinks of installed extensions, by name."""

    def __post_init__(self) -> None:
        for sink in self.sinks:
            SINKS.check("monitor.sinks", sink)
