"""The state of a run at one moment: everything that must be saved to continue as if nothing had happened."""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bardling.checkpoint.contents import Checkpoint
from bardling.checkpoint.load import Loaded
from bardling.checkpoint.rng import restore_rng
from bardling.data.batches.order_digest import OrderDigest
from bardling.distributed.sharding import Shards
from bardling.errors import UserError
from bardling.interop.tensor_file import Computed
from bardling.model.gpt import GPT
from bardling.model.lora import trained_state
from bardling.optim.ema import Ema
from bardling.optim.serialization import load_optimizer_tensors, optimizer_tensors
from bardling.training.recovery.spikes import StepHistory

RAW = "weights:"  # prefix of weights in training, if the model file contains their EMA


@dataclass
class TrainState:
    """The model, its optimizer, and the position of the run. Everything else is a function of these and the configuration."""

    model: GPT
    optimizer: torch.optim.Optimizer
    shards: Shards | None = None  # what this process holds of a sharded model
    scaler: torch.amp.GradScaler | None = None  # float16 only
    ema: Ema | None = None
    step: int = 0  # optimizer steps completed
    samples: int = 0  # sequences seen: the data loader's whole state
    best_val_loss: float = math.inf
    best_step: int = -1  # step of best_val_loss
    hooks_done: dict[str, int] = field(default_factory=dict)  # hook -> last step at which it completed its work
    seconds: float = 0.0  # time spent in all starts; counted for a deadline only
    planned: int = 0  # last step planned for the deadline; 0: no deadline
    order_digest: OrderDigest | None = None  # as of its last use; None: not computed, as in checkpoints of earlier versions
    history: StepHistory = field(default_factory=StepHistory)  # recent good steps, which the guard compares with

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer updates, by name: the model's parameters, or this process's shards of them."""
        named = self.model.named_parameters() if self.shards is None else self.shards.parameters.items()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def zero_gradients(self, *, keep: bool = False) -> None:
        """Free the gradients, or `keep` their memory."""
        self.optimizer.zero_grad(set_to_none=not keep)
        if self.shards is not None:
            self.shards.zero_gradients()

    def evaluation_weights(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the model has the weights that users get: the EMA, if there is one."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    def digest_samples(self) -> OrderDigest | None:
        """The digest of the samples seen so far."""
        if self.order_digest is not None:
            self.order_digest = self.order_digest.upto(self.samples)
        return self.order_digest

    def saved(self) -> Checkpoint:
        """The contents of a checkpoint without random number generators; the tensors are not copies.

        Of a sharded model, each process gets whole copies of the tensors that it writes, in host memory. Collective then.
        """
        content, shards = self._held(), self.shards
        if shards is None:
            return content
        model, optimizer = (dict(shards.owned(found)) for found in (content.model_state, content.optimizer_tensors))
        meta = shards.merged(content.optimizer_meta)
        content = replace(content, model_state=model, optimizer_tensors=optimizer, optimizer_meta=meta)
        return replace(content, owners=shards.owners, writers=shards.count)

    def _held(self) -> Checkpoint:
        """What this process holds of the contents of a checkpoint."""
        parameters = self.parameters
        optimizer, meta = optimizer_tensors(self.optimizer, parameters)
        model = trained_state(self.model) if self.shards is None else {name: p.detach() for name, p in parameters.items()}
        if self.ema is not None:  # the model file gets the EMA, which is what was validated
            optimizer |= {RAW + name: model[name] for name in self.ema.tensors()}
            model = {**model, **self.ema.tensors()}
        return Checkpoint(self.model.config, model, optimizer, meta, self.facts(), tune=self.model.lora)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of the run in `training.json`."""
        digest = self.digest_samples()
        return {
            "step": self.step,
            "samples": self.samples,
            "best_val_loss": self.best_val_loss,
            "best_step": self.best_step,
            "hooks_done": dict(self.hooks_done),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "guard": asdict(self.history),
            **({} if digest is None else {"order_digest": digest.as_json()}),
            **({"seconds": self.seconds, "planned_steps": self.planned} if self.planned else {}),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Return to the state in `checkpoint`, in place: wrappers and compiled code keep their weights.

        Raises:
            UserError: the checkpoint is of another model, or damaged.
        """
        self._load(checkpoint)
        restore_rng(checkpoint.rng)

    def reset(self, start: "TrainState") -> None:
        """Become a copy of `start`, in place, except for the plan of a deadline."""
        planned = self.planned
        self._load(start._held())
        self.planned = planned

    def _load(self, saved: Checkpoint) -> None:
        """Take over everything in `saved` but the random number generators."""
        training = saved.training
        self._load_weights(saved.model_state, saved.optimizer_tensors, saved.optimizer_meta)
        self.step, self.samples = training["step"], training["samples"]
        self.best_val_loss, self.best_step = training["best_val_loss"], training["best_step"]
        self.hooks_done = dict(training["hooks_done"])
        if self.scaler is not None and training.get("scaler"):
            self.scaler.load_state_dict(training["scaler"])
        where = f"the checkpoint of step {self.step}"
        seconds, planned = training.get("seconds", 0.0), training.get("planned_steps", 0)
        if not isinstance(seconds, int | float) or not isinstance(planned, int) or not 0 <= seconds < 1e12 or planned < 0:
            found = f"seconds = {seconds!r}, planned_steps = {planned!r}"
            raise UserError(f"{where}: {found}: the checkpoint is damaged; resume from another one")
        self.seconds, self.planned = float(seconds), planned
        try:
            digest = training.get("order_digest")
            self.order_digest = None if digest is None else OrderDigest.from_json(digest, self.samples)
        except ValueError as error:
            raise UserError(f"{where}: {error}: the checkpoint is damaged; resume from another one") from None
        self.history = StepHistory.from_json(training.get("guard"), where)

    def _load_weights(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Load the model, its EMA and its optimizer from what `saved` gives."""
        names, shards = self.parameters, self.shards
        if shards is not None:
            optimizer = Computed({key: partial(optimizer.__getitem__, key) for key in optimizer if shards.holds(key)})
            if isinstance(scalars := meta.get("scalars"), Mapping):
                meta = {**meta, "scalars": {key: value for key, value in scalars.items() if shards.holds(str(key))}}
        for name in (name.removeprefix(RAW) for name in optimizer if name.startswith(RAW)):
            tensor = optimizer[RAW + name] if name in names else None
            tensor = tensor if tensor is None or shards is None else shards.take(name, tensor)
            if tensor is None or tensor.shape != names[name].shape or not tensor.is_floating_point():
                raise UserError(
                    f"the checkpoint's optimizer.safetensors contains {name!r}, which is not a weight of this model"
                )
        if shards is None:
            fixed = {} if self.model.lora is None else self.model.state_dict()
            raw = {name: optimizer[RAW + name] for name in names if RAW + name in optimizer}
            self.model.load_state_dict({**fixed, **model, **raw})
        else:
            shards.load(lambda name: optimizer[RAW + name] if RAW + name in optimizer else model[name])
        take = (lambda name, tensor: tensor) if shards is None else shards.take
        if self.ema is not None:
            self.ema.load_tensors({name: take(name, model[name]) for name in names})
        held = Computed({name: partial(optimizer.__getitem__, name) for name in optimizer if not name.startswith(RAW)})
        load_optimizer_tensors(self.optimizer, names, held, meta, take)

    def take_over(self, start: Loaded, samples_before: Callable[[int], int]) -> None:
        """Continue the training of a checkpoint, possibly of another trainer, whose weights the model already has.

        Args:
            samples_before: number of the first sample of a step.
        """
        if start.optimizer_tensors:
            self._load_weights(start.state, start.optimizer_tensors, start.optimizer_meta)
        self.step, self.samples = start.step, samples_before(start.step)
        self.order_digest = OrderDigest(self.samples, self.samples)
        if start.best_val_loss is not None:
            self.best_val_loss, self.best_step = start.best_val_loss, start.step

    def checkpoint_bytes(self) -> int:
        """Approximate size of a checkpoint: weights, two moments of each (one of Muon's matrices), small files."""
        whole = {name: tensor.numel() for name, tensor in trained_state(self.model).items()}
        if self.shards is not None:
            whole = {name: math.prod(shape) for name, shape in self.shards.shapes.items()}
        weights, parameters = 4 * sum(whole.values()), self.parameters
        muon = {id(p) for group in self.optimizer.param_groups if group.get("muon") for p in group["params"]}
        bytes_of = {name: whole[name] * (4 if id(p) in muon else 8) for name, p in parameters.items()}
        # Other stages of a pipeline hold about the same kinds of parameters as this one.
        moments = round(sum(bytes_of.values()) * sum(whole.values()) / sum(whole[name] for name in parameters))
        return weights * (1 if self.ema is None else 2) + moments + 100_000
