"""Figures for Weights & Biases, online or kept in the run folder for `wandb sync`.

Every figure is `kind/name` (`train/loss`) over the axis `step`; samples are tables; the configuration is the run's there. All
that the library keeps goes to `RUN/wandb/`, and nothing of the user's code is sent.

A resumed run continues the same record: its id stands in `RUN/wandb.json`. W&B numbers the rows of a record upwards and takes
none back, so a run that resumes some steps before its end cannot rewrite them there. Each record is therefore a row of its own;
`wandb.json` counts the rows and remembers the last step of each kind, and steps that are done a second time are not sent twice:
an exact repetition has the same figures.

Limits: when a run is resumed with other settings, the steps between its checkpoint and its kill keep their first figures there;
when the process is killed outright, what it logged in the last second may be missing. `metrics.jsonl` is right in both cases.
"""

import importlib.util
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bardling.config import RunConfig
from bardling.configfile import config_to_dict
from bardling.errors import UserError
from bardling.files import replacing

INIT_SECONDS = 30.0  # longest wait for the server at the start; afterwards the record is kept for `wandb sync`
FINISH_SECONDS = 30.0  # longest wait for uploads at the end, as schedulers give before they kill
FLUSH_SECONDS = 1.0  # between writes to the record's file


def check_wandb(mode: Literal["online", "offline"]) -> None:
    """Make sure that the package and, online, a key are there. Asks nobody and reaches no server.

    Raises:
        UserError: one of them is missing.
    """
    if importlib.util.find_spec("wandb") is None:
        raise UserError(f"monitor.wandb = {mode!r}: needs the package wandb: pip install 'bardling[wandb]'")
    if mode == "offline":
        return
    import wandb

    remedy = "log in with `wandb login`, set WANDB_API_KEY, or use --monitor.wandb offline"
    try:
        wandb.setup(settings=wandb.Settings(silent=True, mode="online"))
        found = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        raise UserError(f"monitor.wandb = 'online': {_line(error)}: {remedy}") from None
    if not found:
        raise UserError(f"monitor.wandb = 'online': no API key for Weights & Biases: {remedy}")


class WandbSink:
    """Sends figures to one W&B run, the same one for every start of a run folder.

    Args:
        folder: the run's folder.
        config: the whole configuration.
        tell: says a line to the person who watches: where the record is, or that the server cannot be reached.

    Raises:
        UserError: wandb.json is damaged, or the server does not accept the key.
    """

    name = "Weights & Biases"

    def __init__(self, folder: Path, config: RunConfig, tell: Callable[[str], None]) -> None:
        import wandb

        self._file = folder / "wandb.json"
        self._state = _read_state(self._file)
        _write_state(self._file, self._state)  # before the record exists: a kill must not lose its id
        self._table: Callable[..., Any] = wandb.Table
        mode = config.monitor.wandb
        try:
            self._run = self._begin(folder, config, mode)
        except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            raise UserError(
                f"monitor.wandb = {mode!r}: {_line(error)}: log in with `wandb login`, or use --monitor.wandb offline"
            ) from None
        except wandb.Error as error:
            if mode == "offline":
                raise
            wandb.teardown()  # or the library holds the id for taken
            self._run = self._begin(folder, config, "offline")
            tell(f"Weights & Biases cannot be reached: {_line(error)}")
            mode = "offline"
        sync = f"kept in the run folder; to upload it: wandb sync {folder / 'wandb'}/offline-run-*"
        tell(f"Weights & Biases: {self._run.url if mode == 'online' else sync}")

    def _begin(self, folder: Path, config: RunConfig, mode: str) -> Any:
        import wandb

        run = wandb.init(
            project=config.monitor.wandb_project,
            name=config.monitor.wandb_name or folder.resolve().name,
            id=self._state.id,
            resume="allow",
            dir=str(folder.resolve()),
            config=config_to_dict(config),
            allow_val_change=True,  # a resumed run may have more steps, say
            mode=mode,  # type: ignore[arg-type]
            reinit="create_new",  # a caller may have a run of its own
            save_code=False,
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                x_transaction_log_flush_interval=FLUSH_SECONDS,
            ),
        )
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        return run

    def log(self, values: Mapping[str, object]) -> None:
        """Send the figures of one record, unless an earlier start has done so."""
        kind = str(values["kind"])
        figures = {f"{kind}/{name}": value for name, value in values.items() if name not in ("kind", "step")}
        self._row(kind, _step(values), figures)

    def sample(self, step: int, prompt: str, texts: Sequence[str]) -> None:
        """Send texts of the model as a table."""
        rows = [[step, _sendable(prompt), _sendable(text)] for text in texts]
        self._row("sample", step, {"samples": self._table(columns=["step", "prompt", "text"], data=rows)})

    def _row(self, kind: str, step: int, figures: dict[str, object]) -> None:
        if step <= self._state.done.get(kind, -1):
            return
        self._run.log({**figures, "step": step}, step=self._state.rows)
        self._state.rows += 1
        self._state.done[kind] = step
        _write_state(self._file, self._state)

    def flush(self) -> None:
        """Nothing to do: the library writes on its own, every second."""

    def close(self) -> None:
        """Wait a moment for what is not uploaded yet, and end the record."""
        self._run.finish()


@dataclass
class _State:
    """What `wandb.json` holds."""

    id: str
    rows: int = 0  # in the record so far
    done: dict[str, int] = field(default_factory=dict)  # kind of record -> last step sent


def _read_state(path: Path) -> _State:
    """The state of an earlier start, or a new one."""
    try:
        values = json.loads(path.read_bytes()[:65536])
        state = _State(values["id"], values["rows"], values["done"])
        sound = (
            re.fullmatch(r"[A-Za-z0-9_-]{1,64}", state.id) is not None
            and type(state.rows) is int
            and all(type(step) is int for step in state.done.values())
        )
    except FileNotFoundError:
        return _State(secrets.token_hex(6))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{path}: is damaged: remove it to begin a new record at Weights & Biases")
    return state


def _write_state(path: Path, state: _State) -> None:
    """Replace the file at once; it need not survive the machine, only this process."""
    with replacing(path, durable=False) as file:
        file.write((json.dumps({"id": state.id, "rows": state.rows, "done": state.done}) + "\n").encode())


def _step(values: Mapping[str, object]) -> int:
    step = values["step"]
    assert isinstance(step, int)  # every record has one
    return step


def _sendable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
