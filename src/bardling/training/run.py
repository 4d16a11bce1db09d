"""Runs: `train` starts one in a new folder, `resume` continues one.

The path from a configuration to a trained model goes straight down: `resolve` decides everything that the configuration leaves
open, `Session` assembles the parts and trains, and each part receives only its own section of the configuration.
"""

import signal
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bardling.checkpoint.run_folder import RunFolder, open_run, refuse_existing, run_lock
from bardling.config import MonitorConfig, RunConfig
from bardling.distributed.context import distributed
from bardling.distributed.device import backend
from bardling.distributed.global_state import isolated
from bardling.distributed.rendezvous import environment_number
from bardling.evaluate.benchmarks import check_spec
from bardling.files.paths import expand_home
from bardling.monitor.services import check_services
from bardling.training.environment import config_fingerprint, started_by_this_job
from bardling.training.facts import Facts
from bardling.training.resolve import resolve
from bardling.training.session import RunResult, Session
from bardling.training.shared_folder import require_shared_folder


@isolated()
def train(
    config: RunConfig,
    out: Path | str,
    *,
    continue_from: str | None = None,
    quiet: bool = False,
    given: AbstractSet[str] | None = None,
) -> RunResult:
    """Train a new run in the folder `out`, which must not exist yet.

    Args:
        continue_from: a checkpoint, possibly of another trainer, whose training the run continues: weights, optimizer and step.
            (`config.model.init` takes only the weights.)
        given: dotted names of the settings that the user set, which `model.depth` leaves as they are; None: those that differ
            from the default.

    Raises:
        UserError: the configuration does not fit the data or the machine; nothing has been written then.
        KeyboardInterrupt, SystemExit: a signal stopped the run, which is saved first.
    """
    folder, fingerprint = RunFolder(Path(expand_home(str(out)))), config_fingerprint(config)
    with distributed(config.device, rank_timeout=config.train.rank_timeout) as context, ExitStack() as cleanup:
        folder = RunFolder(Path(context.broadcast(str(folder.path))))  # its default name differs between processes
        if context.broadcast(context.is_primary and started_by_this_job(folder, fingerprint)):
            # torchrun or Slurm has restarted the job: continue its run.
            require_shared_folder(context, folder.path)
            cleanup.enter_context(run_lock(folder, context))
            config, facts = folder.config(), Facts(context, folder, resumed=True, continue_from=continue_from)
        else:
            context.on_primary(lambda: refuse_existing(folder.path))
            require_shared_folder(context, folder.path)
            facts = Facts(context, folder, continue_from=continue_from, given=given)
        context.on_primary(partial(_check_requirements, config.monitor, config.eval.tasks, facts.previous))
        cleanup.enter_context(backend(context.device, deterministic=config.deterministic, attention=config.attention))
        session = Session(resolve(config, facts), facts, fingerprint=fingerprint, quiet=quiet)
        result = session.train()
    _pass_on(session.stopped_by)
    return result


@isolated()
def resume(run: Path | str, config: RunConfig | None = None, *, quiet: bool = False) -> RunResult:
    """Continue a run from its latest valid checkpoint, as if it had never stopped.

    Args:
        config: the run's configuration with changes (`train.steps` raised, say); None: as it was.

    Raises:
        UserError: there is no such run, its data has changed, or a change is one that a trained model cannot follow.
        KeyboardInterrupt, SystemExit: as for `train`.
    """
    folder = RunFolder(Path(expand_home(str(run))))
    unseen = environment_number("WORLD_SIZE", 1, 1, 2**31) > 1 and not folder.config_file.is_file()
    # A process that does not see the run meets the others nevertheless, so that all can refuse and name its host.
    config = config or (RunConfig() if unseen else open_run(folder.path).config())
    with distributed(config.device, rank_timeout=config.train.rank_timeout) as context, ExitStack() as cleanup:
        require_shared_folder(context, folder.path)
        open_run(folder.path)
        cleanup.enter_context(run_lock(folder, context))
        facts, fingerprint = Facts(context, folder, resumed=True), config_fingerprint(config)
        context.on_primary(partial(_check_requirements, config.monitor, config.eval.tasks, facts.previous))
        cleanup.enter_context(backend(context.device, deterministic=config.deterministic, attention=config.attention))
        session = Session(resolve(config, facts), facts, fingerprint=fingerprint, quiet=quiet)
        result = session.train()
    _pass_on(session.stopped_by)
    return result


def _pass_on(stopped_by: int | None) -> None:
    """A signal that has stopped the run reaches the caller as if there were no run: Ctrl-C as KeyboardInterrupt, unless the
    program handles SIGINT in its own way, and any other as SystemExit."""
    if stopped_by == signal.SIGINT and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        raise KeyboardInterrupt
    if stopped_by is not None:
        raise SystemExit(128 + stopped_by)


def _check_requirements(monitor: MonitorConfig, tasks: tuple[str, ...], previous: RunConfig | None) -> None:
    """Check what a run needs from outside. What a resumed run had already is no reason to refuse it: it continues without."""
    if previous is None or monitor != previous.monitor:
        check_services(monitor)
    for task in tasks:
        if previous is None or task not in previous.eval.tasks:
            check_spec(task)
