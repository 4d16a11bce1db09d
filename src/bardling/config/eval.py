from dataclasses import dataclass

from bardling.config.checks import expand_paths, require_at_least


@dataclass(frozen=True)
class EvalConfig:
    """Validation loss and benchmark tasks during training."""

    every: int = 250
    """Steps between validations; 0 validates only after the last step."""
    windows: int = 64
    """Validation sequences of block_size tokens, evenly spaced over the validation split and the same every time.
    Those of a mixture are divided evenly among its sources."""
    tasks: tuple[str, ...] = ()
    """Tasks to evaluate: 'hellaswag', the path of a JSON Lines or JSON file in the same format, lm-eval:NAME for a task of the
    language model evaluation harness (or the YAML file of one), or core:FOLDER for DCLM's CORE."""
    tasks_every: int | None = None
    """Steps between task evaluations; unset: eval.every."""
    task_items: int | None = None
    """Number of items per task, a fixed random subset; unset: all items."""

    def __post_init__(self) -> None:
        expand_paths(self, "tasks")
        require_at_least(0, self, "eval", "every", "tasks_every")
        require_at_least(1, self, "eval", "windows", "task_items")
