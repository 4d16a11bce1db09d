"""A run from its configuration to its last checkpoint: `train` starts one, `resume` goes on with one.

Both put the same parts together (data, model, optimizer, hooks) and differ only in where the state comes from. Everything that
`auto` decided is written into the run's configuration, so that a resumed run computes as before.
"""

import dataclasses
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bardling
from bardling.checkpoint.load import Loaded, load
from bardling.checkpoint.runfolder import RunFolder, create_run, open_run, write_whole
from bardling.checkpoint.state import read_checkpoint, restore_rng, rng_state, write_checkpoint
from bardling.config import DataConfig, ModelConfig, RunConfig
from bardling.configfile import config_to_dict
from bardling.data.loader import EvalWindows, Prefetcher, TrainWindows
from bardling.data.order import WindowOrder
from bardling.data.shards import TokenDataset
from bardling.data.tokenizer import load_tokenizer
from bardling.distributed.context import Context, distributed
from bardling.distributed.device import DTYPES, choose_precision, device_name, matmul_flops, prepare_backend
from bardling.errors import UserError
from bardling.interop.dataset import open_data
from bardling.model.arithmetic import flops_per_token
from bardling.model.gpt import GPT
from bardling.model.peaks import peak_flops
from bardling.monitor.services import check_services
from bardling.optim.build import build_optimizer
from bardling.optim.schedule import learning_rate
from bardling.optim.state import load_optimizer_tensors, optimizer_tensors
from bardling.train.compiling import compile_pays
from bardling.train.hooks import Checkpoint, Log, Sample, StepTimer, Validate
from bardling.train.loop import Hook, fit
from bardling.train.monitoring import RunMonitor
from bardling.train.plan import TrainPlan, make_plan
from bardling.train.signals import Stopped, StopSignals
from bardling.train.state import TrainState


@dataclass(frozen=True)
class RunResult:
    """How a call of `train` or `resume` ended."""

    folder: Path
    step: int  # steps done in all
    finished: bool  # False when a signal stopped the run before its last step
    best_val_loss: float
    exit_status: int  # 0, or 128 + the signal


def train(config: RunConfig, out: Path | str, *, continue_from: str | None = None, quiet: bool = False) -> RunResult:
    """Train a new run in the folder `out`, which must not exist yet.

    Args:
        continue_from: a checkpoint, another trainer's say, whose training the run goes on with: weights, optimizer and step.
            (`config.model.init` takes only the weights.)

    Raises:
        UserError: the configuration does not fit the data or the machine; nothing has been written then.
    """
    with distributed(config.device) as context:
        config = dataclasses.replace(config, data=absolute(config.data))
        return _Run(context, config, RunFolder(Path(out)), quiet=quiet, resumed=False, continue_from=continue_from).go()


def resume(run: Path | str, config: RunConfig | None = None, *, quiet: bool = False) -> RunResult:
    """Go on with a run from its newest sound checkpoint, as if it had never stopped.

    Args:
        config: the run's configuration with changes (`train.steps` raised, say); absent: as it was.

    Raises:
        UserError: there is no such run, its data has changed, or a change is one that a trained model cannot follow.
    """
    folder = open_run(Path(run))
    before = folder.config()
    config = settle(config or before, before)
    changes = check_changes(before, config)
    with distributed(config.device) as context:
        return _Run(context, config, folder, quiet=quiet, resumed=True, changes=changes).go()


def settle(config: RunConfig, before: RunConfig) -> RunConfig:
    """`config` with what it leaves open (vocabulary, precision, compilation) as it was decided `before`."""
    return dataclasses.replace(
        config,
        precision=before.precision if config.precision == "auto" else config.precision,
        compile=before.compile if config.compile == "auto" else config.compile,
        model=dataclasses.replace(config.model, vocab_size=config.model.vocab_size or before.model.vocab_size),
        data=absolute(config.data),
    )


def absolute(config: DataConfig) -> DataConfig:
    """`config` with its paths made absolute, so that the run can be resumed from any folder."""

    def settled(spec: str) -> str:
        path = Path(spec.split(":", 1)[0])
        is_path = path.exists() or any(sign in spec for sign in "*?[")
        return str(Path.cwd() / spec) if is_path and not path.is_absolute() else spec

    return dataclasses.replace(config, source=settled(config.source), tokenizer=settled(config.tokenizer))


# A model that has been trained is bound to these; what else changes on resume takes effect, and is said.
_FIXED = ("seed", "data.source", "data.tokenizer", "data.val_fraction")


def check_changes(before: RunConfig, after: RunConfig) -> list[str]:
    """Describe what changed between two configurations of one run ("train.steps: 100 -> 200").

    Raises:
        UserError: a change that the trained weights or the exact data order cannot follow.
    """
    old, new = _flat(config_to_dict(before)), _flat(config_to_dict(after))
    changes = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key):
            continue
        if key in _FIXED or (key.startswith("model.") and key != "model.dropout"):
            raise UserError(
                f"{key} = {new.get(key)!r}: a run that has started keeps {old.get(key)!r}; start a new run for another"
            )
        changes.append(f"{key}: {old.get(key)} -> {new.get(key)}")
    return changes


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


class _Run:
    """The parts of one run, put together in the order in which they need each other."""

    def __init__(
        self,
        context: Context,
        config: RunConfig,
        folder: RunFolder,
        *,
        quiet: bool,
        resumed: bool,
        changes: Sequence[str] = (),
        continue_from: str | None = None,
    ) -> None:
        self.context, self.folder, self.quiet, self.resumed, self.changes = context, folder, quiet, resumed, changes
        if not resumed and context.is_primary:
            refuse_existing(folder)
        if context.is_primary:
            check_services(config.monitor)
        self.dataset = _open_dataset(config, context)
        self.tokenizer = self.dataset.tokenizer
        if resumed:
            check_dataset(self.dataset, folder)
        self.continues = continue_from is not None
        origin = continue_from or config.model.init
        self.start = load(origin, training=self.continues) if origin and not resumed else None
        self._settle_vocabulary(config.model.vocab_size if self.start is None else self.start.config.vocab_size)
        self.config = self._resolve(config)
        self.plan: TrainPlan = make_plan(self.config.train, self.config.model.block_size, context.world_size)
        self.order = WindowOrder(self.config.seed, len(self.dataset.split("train")), self.config.model.block_size)

    def _settle_vocabulary(self, vocab_size: int) -> None:
        """Let tokens of unknown origin follow the model that is there already.

        A nanoGPT folder without a meta.pkl passes for having nanoGPT's vocabulary, which is GPT-2's rounded up to a multiple of
        64. For a model with GPT-2's own, the ids must be below that (each read checks it), and its tokenizer is theirs.
        """
        if self.tokenizer is not None or self.dataset.vocab_size != -(-vocab_size // 64) * 64:
            return
        self.dataset.vocab_size = vocab_size
        if self.start is not None:
            self.tokenizer = self.start.tokenizer
        elif self.resumed and (self.folder.path / "tokenizer.json").is_file():
            self.tokenizer = load_tokenizer(self.folder.path)
        if self.tokenizer is not None and self.tokenizer.vocab_size < vocab_size:
            self.tokenizer = None

    def _resolve(self, config: RunConfig) -> RunConfig:
        """The configuration with every `auto` decided, for all processes as the primary decides."""
        vocab_size = self.dataset.vocab_size
        if config.model.vocab_size and config.model.vocab_size < vocab_size:
            raise UserError(
                f"model.vocab_size = {config.model.vocab_size} is smaller than the tokenizer's {vocab_size}: "
                "leave it out, or set it to at least that"
            )
        model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or vocab_size)
        if self.start is not None:
            model = self._started_model(config.model, self.start)
        self.precision = choose_precision(config.precision, self.context.device)
        # As the primary measured it: processes must not compute in different formats.
        name, why = self.context.broadcast((self.precision.name, self.precision.why))
        self.precision = dataclasses.replace(self.precision, name=name, why=why)
        if self.context.device.type == "cpu":
            self.peak: float | None = matmul_flops(self.context.device, DTYPES[name])
        else:
            self.peak = peak_flops(device_name(self.context.device), name, tf32=not config.deterministic)
        self.compile_why = "as asked"
        compiled: Literal["auto", "on", "off"] = config.compile
        if compiled == "auto":
            flops = flops_per_token(model, model.block_size) * config.train.batch_size * model.block_size
            pays, self.compile_why = compile_pays(
                flops * config.train.steps / self.context.world_size, self.peak, self.context.device
            )
            compiled = "on" if self.context.broadcast(pays) else "off"
        return dataclasses.replace(config, model=model, precision=name, compile=compiled)

    def _started_model(self, wanted: ModelConfig, start: Loaded) -> ModelConfig:
        """The architecture of the weights that the run starts from; the context may be shorter, the dropout any."""
        own, other = start.tokenizer, self.tokenizer
        if own is not None and other is not None and own.fingerprint != other.fingerprint:
            raise UserError(
                f"{self.dataset.path}: was made with another tokenizer ({other.fingerprint}) than the model "
                f"({own.fingerprint}): use the model's own tokenizer.json as data.tokenizer"
            )
        if start.config.vocab_size < self.dataset.vocab_size:
            raise UserError(
                f"{self.dataset.path}: has a vocabulary of {self.dataset.vocab_size} tokens, the model one of "
                f"{start.config.vocab_size}: prepare the text with the model's tokenizer"
            )
        block_size = min(wanted.block_size, start.config.block_size)
        model = dataclasses.replace(start.config, block_size=block_size, dropout=wanted.dropout, init=wanted.init)
        shape = ("n_layer", "n_head", "n_embd", "block_size", "bias", "gelu")
        differs = {
            key: (getattr(wanted, key), getattr(model, key)) for key in shape if getattr(wanted, key) != getattr(model, key)
        }
        self.changes = [*self.changes, *(f"model.{key}: {a} -> {b}, as the weights are" for key, (a, b) in differs.items())]
        return model

    def go(self) -> RunResult:
        """Build the state, train it to the end or until a signal, and say how it ended."""
        context, config = self.context, self.config
        undo = prepare_backend(context.device, deterministic=config.deterministic)
        with StopSignals() as signals:
            state = self._state()
            if context.is_primary:
                self._write_folder(state)
            context.barrier()
            monitor = RunMonitor(self.folder, config, state.step, primary=context.is_primary, quiet=self.quiet)
            try:
                self._announce(monitor, state)
                self._fit(state, monitor, signals)
            except Stopped:
                context.barrier()
                self._save(state)
                monitor.note(f"stopped at step {state.step} and saved; go on with: bardling resume {self.folder.path}")
                status = signals.exit_status if signals.requested() else 143
                return RunResult(self.folder.path, state.step, False, state.best_val_loss, status)
            finally:
                monitor.close()
                undo()
        return RunResult(self.folder.path, state.step, True, state.best_val_loss, 0)

    def _state(self) -> TrainState:
        """A new state, or the one of the newest sound checkpoint."""
        config, device = self.config, self.context.device
        checkpoint = None
        if self.resumed:
            store = self.folder.store()
            path = store.latest(self._report)
            if path is None and store.steps():
                raise UserError(
                    f"{store.path(store.steps()[-1])}: every checkpoint of this run is damaged (see above): restore one from a "
                    "copy, or start a new run"
                )
            checkpoint = None if path is None else read_checkpoint(path)
        start = None if self.start is None or checkpoint is not None else self.start.cropped(config.model.block_size)
        model = GPT(config.model, seed=config.seed if checkpoint is None and start is None else None)
        if checkpoint is not None:
            model.load_state_dict(checkpoint.model_state)
        elif start is not None:
            model.load_state_dict(start.state)
        model.to(device)  # before the optimizer exists: its state belongs where the weights are
        optimizer = build_optimizer(model.named_parameters(), config.optim, device)
        state = TrainState(model, optimizer)
        if self.precision.needs_scaler:
            state.scaler = torch.amp.GradScaler(device.type)
        if checkpoint is not None:
            load_optimizer_tensors(
                optimizer, dict(model.named_parameters()), checkpoint.optimizer_tensors, checkpoint.optimizer_meta
            )
            training = checkpoint.training
            state.step, state.samples = training["step"], training["samples"]
            state.best_val_loss, state.best_step = training["best_val_loss"], training["best_step"]
            state.hooks_done = dict(training["hooks_done"])
            if state.scaler is not None and training.get("scaler"):
                state.scaler.load_state_dict(training["scaler"])
            restore_rng(checkpoint.rng)
        elif start is not None and self.continues:
            if start.optimizer_tensors:
                load_optimizer_tensors(optimizer, dict(model.named_parameters()), start.optimizer_tensors, start.optimizer_meta)
            state.step, state.samples = start.step, start.step * self.plan.samples_per_step
            if start.best_val_loss is not None:
                state.best_val_loss, state.best_step = start.best_val_loss, start.step
        return state

    def _report(self, message: str) -> None:
        if self.context.is_primary:
            print(f"bardling: {message}", file=sys.stderr)

    def _write_folder(self, state: TrainState) -> None:
        """What a run folder holds besides figures and checkpoints."""
        if self.resumed:
            self.folder.write_config(self.config)
        else:
            create_run(self.folder.path, self.config, beside=self.continues)
            write_whole(self.folder.dataset_file, dataset_record(self.dataset))
            if self.tokenizer is not None:
                self.tokenizer.save(self.folder.path)
        self.folder.add_environment(environment(self.context, state.step))

    def _announce(self, monitor: RunMonitor, state: TrainState) -> None:
        """Say what will be trained, on what, and what `auto` chose."""
        config, plan = self.config, self.plan
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
        epochs = plan.steps * plan.samples_per_step / self.order.windows_per_epoch
        where = f"{device_name(self.context.device)}" + (f" x {plan.world_size}" if plan.world_size > 1 else "")
        monitor.note(
            f"{parameters / 1e6:.2f}M parameters, {plan.steps:,} steps of {plan.samples_per_step} x {config.model.block_size} "
            f"tokens ({plan.accumulation} forward passes of {plan.micro_batch}), {epochs:.2f} "
            f"epochs of {len(self.dataset.split('train')):,} tokens"
        )
        monitor.note(
            f"{where}; precision {config.precision} ({self.precision.why}); compile {config.compile} ({self.compile_why})"
        )
        if self.resumed:
            monitor.note(f"resuming {self.folder.path} at step {state.step:,} of {plan.steps:,}")
        for change in self.changes:
            monitor.note(f"changed: {change}")

    def _fit(self, state: TrainState, monitor: RunMonitor, signals: StopSignals) -> None:
        config, plan, context = self.config, self.plan, self.context
        timer = StepTimer(context.device)
        table = None if self.tokenizer is None else torch.from_numpy(self.tokenizer.bytes_per_token()).to(context.device)
        last = plan.steps
        hooks: list[Hook] = [
            Log(
                monitor,
                plan,
                timer,
                every=config.train.log_every,
                windows_per_epoch=self.order.windows_per_epoch,
                flops_per_token=flops_per_token(config.model, config.model.block_size),
                peak_flops=self.peak,
            ),
            Validate(
                monitor,
                timer,
                EvalWindows(self.dataset.split("val"), config.model.block_size, config.eval.windows),
                every=config.eval.every,
                last=last,
                batch_size=plan.micro_batch,
                precision=self.precision,
                context=context,
                bytes_per_token=table,
                stop_requested=signals.requested,
            ),
        ]
        if self.tokenizer is not None:
            hooks.append(
                Sample(
                    monitor,
                    timer,
                    config.sample,
                    self.tokenizer,
                    last=last,
                    seed=config.seed,
                    precision=self.precision,
                    context=context,
                    stop_requested=signals.requested,
                )
            )
        hooks.append(
            Checkpoint(
                monitor, timer, self._save, every=config.checkpoint.every, last=last, save_best=config.checkpoint.save_best
            )
        )
        source = TrainWindows(self.dataset.split("train"), self.order)
        requests = plan.requests(state.samples, plan.steps - state.step, context.rank)
        with Prefetcher(source, requests, context.device) as batches:
            fit(
                state,
                batches,
                plan,
                lr_at=lambda step: learning_rate(step, config.optim, plan.steps),
                grad_clip=config.train.grad_clip,
                seed=config.seed,
                forward=_wrap(state.model, config.compile == "on", context),
                precision=self.precision,
                context=context,
                hooks=hooks,
                bytes_per_token=table,
                stop_requested=signals.requested,
            )

    def _save(self, state: TrainState) -> None:
        """Save one checkpoint (the primary process); the others wait until it is there."""
        if self.context.is_primary:
            tensors, meta = optimizer_tensors(state.optimizer, dict(state.model.named_parameters()))

            def write(folder: Path) -> None:
                write_checkpoint(
                    folder,
                    model_state=state.model.state_dict(),
                    model_config=self.config.model,
                    optimizer_tensors=tensors,
                    optimizer_meta=meta,
                    training={
                        "step": state.step,
                        "samples": state.samples,
                        "best_val_loss": state.best_val_loss,
                        "best_step": state.best_step,
                        "hooks_done": state.hooks_done,
                        "scaler": None if state.scaler is None else state.scaler.state_dict(),
                    },
                    rng=rng_state(),
                    tokenizer=self.tokenizer,
                    run_config=config_to_dict(self.config),
                )

            self.folder.store(self.config.checkpoint.keep_last).save(state.step, write, best=state.best_step == state.step)
        self.context.barrier()


def _wrap(model: GPT, compiled: bool, context: Context) -> nn.Module | Callable[..., torch.Tensor]:
    """The model as the step calls it: compiled if asked, gradients synchronised if there are several processes."""
    forward: Any = torch.compile(model) if compiled else model
    if context.world_size > 1:
        ids = [context.device.index] if context.device.type == "cuda" else None
        # Every parameter takes part in every step, and there are no buffers to keep equal.
        forward = DistributedDataParallel(forward, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    return forward  # type: ignore[no-any-return]


def _open_dataset(config: RunConfig, context: Context) -> TokenDataset:
    """The dataset; when it has to be made first, the primary process makes it while the others wait."""
    if context.is_primary:
        dataset = open_data(config.data)
        context.barrier()
        return dataset
    context.barrier()
    return open_data(config.data)


def dataset_record(dataset: TokenDataset) -> str:
    """JSON that lets a resumed run check that it reads the same data."""
    import json

    facts = {
        "path": str(dataset.path),
        "fingerprint": dataset.fingerprint,
        "train_tokens": len(dataset.split("train")),
        "val_tokens": len(dataset.split("val")),
    }
    return json.dumps(facts, indent=2) + "\n"


def check_dataset(dataset: TokenDataset, folder: RunFolder) -> None:
    """Refuse to go on with other data than the run began with."""
    before = folder.dataset_record()
    if before.get("fingerprint") != dataset.fingerprint:
        raise UserError(
            f"{dataset.path}: is not the dataset that {folder.path} began with (fingerprint {dataset.fingerprint}, was "
            f"{before.get('fingerprint')}): restore the data, or start a new run"
        )


def refuse_existing(folder: RunFolder) -> None:
    """Fail early, before any work, when a new run's folder is taken."""
    if folder.config_file.exists():
        raise UserError(
            f"{folder.path}: a run is there already: go on with `bardling resume {folder.path}`, or choose another --out"
        )


def environment(context: Context, step: int) -> dict[str, Any]:
    """Facts about this start of the run that explain its figures later."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "first_step": step,
        "bardling": bardling.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(context.device),
        "processes": context.world_size,
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "command": sys.argv,
    }


def _git_commit() -> str | None:
    """The commit of the folder that the command was given in, if it is a git checkout."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
