"""Where a run's state comes from: new weights, another model's, or the newest sound checkpoint."""

import sys
from collections.abc import Callable

import torch

from bardling.checkpoint.load import Loaded
from bardling.checkpoint.runfolder import RunFolder
from bardling.checkpoint.state import Checkpoint, read_checkpoint, restore_rng
from bardling.config import RunConfig
from bardling.distributed.context import Context
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.model.layers import use_fp8
from bardling.optim.build import build_optimizer, row_splits
from bardling.optim.ema import Ema
from bardling.optim.state import load_optimizer_tensors
from bardling.train.saving import RAW
from bardling.train.spikes import Recent
from bardling.train.state import TrainState


def newest_checkpoint(folder: RunFolder, context: Context) -> Checkpoint | None:
    """The newest sound checkpoint of a run; None when it was stopped before the first one.

    Raises:
        UserError: there are checkpoints, but none of them is sound.
    """

    checkpoint, step, error = None, None, None
    if context.is_primary:
        store = folder.store()
        try:
            for path in store.sound(_report):
                try:
                    checkpoint = read_checkpoint(path)
                except UserError as unreadable:  # every file is as it was written, and yet it makes no sense
                    _report(f"{path}: cannot be used and is passed over: {unreadable}")
                else:
                    step = checkpoint.training["step"]
                    break
            if checkpoint is None and store.steps():
                error = (
                    f"{store.path(store.steps()[-1])}: every checkpoint of this run is damaged (see above): restore one from "
                    "a copy, or start a new run"
                )
        except UserError as failure:
            error = str(failure)
    # As the primary found it: processes must not begin with different checkpoints.
    step, error = context.broadcast((step, error))
    if error is not None:
        raise UserError(error)
    return checkpoint if context.is_primary or step is None else read_checkpoint(folder.store().path(step))


def _report(message: str) -> None:
    print(f"bardling: {message}", file=sys.stderr)


def build_state(
    config: RunConfig,
    context: Context,
    *,
    checkpoint: Checkpoint | None = None,
    start: Loaded | None = None,
    continues: bool = False,
    samples_before: Callable[[int], int] = lambda step: 0,
) -> TrainState:
    """Make the state that training begins with.

    Args:
        config: resolved: vocabulary and precision are known.
        checkpoint: to resume; else
        start: weights to begin with; else weights are drawn with the run's seed.
        continues: take over the optimizer and the step of `start` too.
        samples_before: the number of a step's first sample, for a run that begins there.
    """
    start = None if start is None or checkpoint is not None else start.cropped(config.model.block_size)
    model = GPT(config.model, seed=config.seed if checkpoint is None and start is None else None)
    if start is not None:
        model.load_state_dict(start.state)
    use_fp8(model.transformer.h, config.fp8)
    model.recompute = config.train.recompute == "blocks"
    model.to(context.device)  # before the optimizer exists: its state belongs where the weights are
    names = dict(model.named_parameters())
    optimizer = build_optimizer(
        model.named_parameters(),
        config.optim,
        context.device,
        splits=row_splits(config.model),
        rank=context.rank,
        world_size=context.world_size,
        compiled=config.compile == "on",
    )
    state = TrainState(model, optimizer)
    if config.precision == "float16":
        state.scaler = torch.amp.GradScaler(context.device.type)
    if config.optim.ema_decay:
        state.ema = Ema(names, config.optim.ema_decay)
    if checkpoint is not None:
        restore(state, checkpoint)
    elif start is not None and continues:
        if start.optimizer_tensors:
            load_optimizer_tensors(state.optimizer, names, start.optimizer_tensors, start.optimizer_meta)
        state.step, state.samples = start.step, samples_before(start.step)
        if start.best_val_loss is not None:
            state.best_val_loss, state.best_step = start.best_val_loss, start.step
    return state


def restore(state: TrainState, checkpoint: Checkpoint) -> None:
    """Put `state`, as far as it may have come, where `checkpoint` was saved."""
    names = dict(state.model.named_parameters())
    # With a running mean, that is in the model's file, and the weights in training lie beside the optimizer's state.
    raw = {name[len(RAW) :]: tensor for name, tensor in checkpoint.optimizer_tensors.items() if name.startswith(RAW)}
    tensors = {name: tensor for name, tensor in checkpoint.optimizer_tensors.items() if not name.startswith(RAW)}
    for name, tensor in raw.items():
        if name not in names or tensor.shape != names[name].shape or not tensor.is_floating_point():
            raise UserError(f"the checkpoint's optimizer.safetensors holds {name!r}, which is no weight of this model")
    state.model.load_state_dict({**checkpoint.model_state, **raw})
    if state.ema is not None:
        state.ema.load_tensors({name: checkpoint.model_state[name] for name in names})
    load_optimizer_tensors(state.optimizer, names, tensors, checkpoint.optimizer_meta)
    training = checkpoint.training
    state.step, state.samples = training["step"], training["samples"]
    state.best_val_loss, state.best_step = training["best_val_loss"], training["best_step"]
    state.hooks_done = dict(training["hooks_done"])
    if state.scaler is not None and training.get("scaler"):
        state.scaler.load_state_dict(training["scaler"])
    seconds, planned = training.get("seconds", 0.0), training.get("planned_steps", 0)
    if not isinstance(seconds, int | float) or not isinstance(planned, int) or not 0 <= seconds < 1e12 or planned < 0:
        raise UserError(f"the checkpoint of step {state.step}: seconds = {seconds!r}, planned_steps = {planned!r}: is damaged")
    state.seconds, state.planned = float(seconds), planned
    state.recent = Recent.from_json(training.get("guard"), f"the checkpoint of step {state.step}")
    restore_rng(checkpoint.rng)
