"""Metrics for Weights & Biases, online or kept in the run folder for `wandb sync`.

Every metric is `kind/name` (`train/loss`) over the axis `step`; samples are tables; the configuration becomes the W&B run's
config. All files of the library go to `RUN/wandb/`, and none of the user's code is uploaded.

A resumed run continues the same W&B run, whose id is in `RUN/wandb.json`. W&B cannot rewrite rows, so each record is a row of
its own, and steps that a resumed run repeats are not sent again: `wandb.json` stores the number of rows and the last step of
each kind. If a run resumes with changed settings, the repeated steps keep their first metrics on W&B; if the process is killed
outright, the last second of logging may be missing. `metrics.jsonl` is right in both cases.
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from bardling.errors import UserError
from bardling.files.atomic import atomic_file
from bardling.monitor import RunInfo
from bardling.monitor.records import scope

INIT_SECONDS = 30.0  # longest wait for the server at start-up; after that, the record is kept for `wandb sync`
FINISH_SECONDS = 30.0  # longest wait for uploads at the end; schedulers kill a job after about this long
FLUSH_SECONDS = 1.0  # between writes to the local record


class WandbSink:
    """Sends metrics to one W&B run; a `UserError` if wandb.json is damaged, or the server rejects the API key."""

    title: ClassVar[str] = "Weights & Biases"
    package: ClassVar[str] = "wandb"

    def __init__(self, run: RunInfo) -> None:
        import wandb

        self._file = run.folder / "wandb.json"
        self._state = _read_state(self._file)
        _write_state(self._file, self._state)  # before the W&B run exists: a kill must not lose its id
        self._table: Callable[..., Any] = wandb.Table
        mode: str = run.config.wandb
        try:
            self._run = self._init(run, mode)
        except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            raise UserError(
                f"monitor.wandb = {mode!r}: {one_line(error)}: log in with `wandb login`, or use --monitor.wandb offline"
            ) from None
        except wandb.Error as error:
            if mode == "offline":
                raise
            wandb.teardown()  # otherwise the library considers the id taken
            mode = "offline"
            self._run = self._init(run, mode)
            run.report(f"Weights & Biases cannot be reached: {one_line(error)}")
        sync = f"kept in the run folder; to upload it: wandb sync {run.folder / 'wandb'}/offline-run-*"
        run.report(f"Weights & Biases: {self._run.url if mode == 'online' else sync}")

    def _init(self, run: RunInfo, mode: str) -> Any:
        import wandb

        wandb_run = wandb.init(
            project=run.config.wandb_project,
            name=run.config.wandb_name or run.folder.resolve().name,
            id=self._state.id,
            resume="allow",
            dir=str(run.folder.resolve()),
            config=run.values,
            allow_val_change=True,  # a resumed run may train for more steps, for example
            mode=mode,  # type: ignore[arg-type]
            reinit="create_new",  # the caller may have a W&B run of its own
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
        wandb_run.define_metric("step", hidden=True)
        wandb_run.define_metric("*", step_metric="step")
        return wandb_run

    def log(self, record: Mapping[str, object]) -> None:
        """Send one record, unless an earlier start of the run has sent this step."""
        kind, step = scope(record), record["step"]
        assert isinstance(step, int)  # every record has one
        metrics = {name: value for name, value in record.items() if name not in ("kind", "step", "task", "order_digest")}
        self._row(kind, step, {f"{kind}/{name}": value for name, value in metrics.items()})

    def sample(self, step: int, prompt: str, texts: Sequence[str]) -> None:
        rows = [[step, _encodable(prompt), _encodable(text)] for text in texts]
        self._row("sample", step, {"samples": self._table(columns=["step", "prompt", "text"], data=rows)})

    def _row(self, kind: str, step: int, values: dict[str, object]) -> None:
        if step <= self._state.done.get(kind, -1):
            return
        self._run.log({**values, "step": step}, step=self._state.rows)
        self._state.rows += 1
        self._state.done[kind] = step
        _write_state(self._file, self._state)

    def flush(self) -> None:
        """Do nothing: the library itself writes every second."""

    def close(self) -> None:
        """Wait up to `FINISH_SECONDS` for pending uploads and finish the W&B run."""
        self._run.finish()


def check_api_key() -> None:
    """Raise `UserError` if there is no API key. Neither prompts nor contacts the server."""
    import wandb

    problem = "no API key for Weights & Biases"
    try:
        wandb.setup(settings=wandb.Settings(silent=True, mode="online"))
        if wandb.login(prompt=False, verify=False):
            return
    except wandb.Error as error:
        problem = one_line(error)
    remedy = "log in with `wandb login`, set WANDB_API_KEY, or use --monitor.wandb offline"
    raise UserError(f"monitor.wandb = 'online': {problem}: {remedy}")


@dataclass
class _State:
    """The content of `wandb.json`."""

    id: str
    rows: int = 0  # sent so far
    done: dict[str, int] = field(default_factory=dict)  # kind of record -> last step sent


def _read_state(path: Path) -> _State:
    """The state left by an earlier start of the run, or a new one."""
    try:
        values = json.loads(path.read_bytes()[:65536])
        state = _State(values["id"], values["rows"], values["done"])
        if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", state.id) and {type(n) for n in (state.rows, *state.done.values())} == {int}:
            return state
    except FileNotFoundError:
        return _State(secrets.token_hex(6))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{path}: is damaged: remove it to start a new Weights & Biases run")


def _write_state(path: Path, state: _State) -> None:
    """Replace the file atomically; it has to survive this process, not a power cut."""
    with atomic_file(path, durable=False) as file:
        file.write((json.dumps(asdict(state)) + "\n").encode())


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
