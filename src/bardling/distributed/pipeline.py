"""Pipeline parallelism: each process holds some of the layers, a stage, and passes hidden states on to the next.

The micro-batches of a training step are in the pipeline together (GPipe, Huang et al. 2019, arXiv:1811.06965; 1F1B, Narayanan
et al. 2019, PipeDream, DOI 10.1145/3341301.3359646), scheduled by `torch.distributed.pipelining`. The embedding belongs to the
first stage, the final norm and the head to the last, which computes the loss. Copies of a pipeline train on different samples;
gradients are averaged over them once per step.

Without gradients, a `Stage` is a drop-in for the whole model: the stages call it together with the same arguments, and all get
the result of the last one.

Limits: an untied head; no value embeddings, which the first and the last layers share. One evaluation pass at a time is in the
pipeline. PyTorch keeps memory to receive hidden states and gradients of all micro-batches of a step. Gradients are averaged
after the last backward pass, not during it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bardling.config import ModelConfig
from bardling.data.batches.loader import Batch
from bardling.distributed.context import Context
from bardling.distributed.sharding import Shards, SharedScaler
from bardling.model.cache import KVCache
from bardling.model.gpt import GPT, Block
from bardling.planning.layout import stage_layers, stage_of

AXIS = ("pipeline",)

Loss = Callable[[Callable[..., Tensor], Batch], Tensor]
Autocast = Callable[[], AbstractContextManager[Any]]

_BUCKET = 25 * 2**20  # bytes of gradients that are averaged at once


class Stage(GPT):
    """Some layers of a model, with undefined weights under the same names as in the whole model.

    `forward` and `head` are collective over the stages, without gradients and return float32.
    """

    def __init__(self, config: ModelConfig, context: Context) -> None:
        with torch.device("meta"):
            super().__init__(config, seed=None)
        self.index, self.count = context.stage, context.size("pipeline")
        self.group = context.group(AXIS)
        self.is_first, self.is_last = self.index == 0, self.index == self.count - 1
        self.holders = {name: stage_of(name, config.n_layer, self.count) for name, _ in self.named_parameters()}
        """The stage that holds each parameter of the whole model."""
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}
        own = stage_layers(config.n_layer, self.count)[self.index]
        for layer, block in enumerate(cast(list[Block], list(self.transformer.h))):
            if layer in own:
                block.attn.layer = layer - own.start  # the place of its keys and values in the cache
            else:
                del self.transformer.h._modules[str(layer)]  # deleting the item would rename the layers after it
        transformer = self.transformer
        elsewhere: list[tuple[nn.Module, str]] = [] if self.is_first else [(transformer, "wte"), (transformer, "wpe")]
        elsewhere += [] if self.is_last else [(transformer, "ln_f"), (self, "lm_head")]
        for parent, name in elsewhere:
            parent._modules.pop(name, None)
        self.to_empty(device=context.device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [padded_vocab_size, C]; without values where the stage has none."""
        if self.is_last:
            return super().head_weight
        return torch.empty(self.config.padded_vocab_size, self.config.n_embd, device="meta")

    def part(self, x: Tensor, tokens: Tensor, cache: KVCache | None = None, documents: Tensor | None = None) -> Tensor:
        """This stage's part of the transformer, with gradients.

        Args:
            x: hidden states [B, T, C] from the stage before; ignored by the first.
        """
        transformer = self.transformer
        x = transformer.wte(tokens) if self.is_first else x
        places, positions = transformer.locate(x, tokens, cache, documents)
        x = transformer.enter(x, places) if self.is_first else x
        x = transformer.layers(x, positions, tokens)
        return transformer.ln_f(x) if self.is_last else x

    @torch.no_grad()
    def forward(self, tokens: Tensor, targets: Tensor | None = None, **options: Any) -> Tensor:
        """As `GPT.forward`, except that `transformer` is ignored."""
        output = options.pop("output", None) or ("logits" if targets is None else "loss")
        cache, documents = options.pop("cache", None), options.get("documents")
        hidden = super().forward(tokens, cache=cache, documents=documents, output="hidden", transformer=self._receive_and_send)
        if output == "hidden":
            return self._from_last(hidden, hidden.shape)
        if output == "logits":
            return self.head(hidden)
        shape = tokens.shape if options.get("reduction") == "none" else () if options.get("tally") is None else (2,)
        if self.is_last:
            hidden = self.after(hidden)(tokens, targets, output=output, **options)
        return self._from_last(hidden, (2, *tokens.shape) if output == "scores" else shape)

    def after(self, hidden: Tensor) -> Callable[..., Tensor]:
        """In the last stage: `GPT.forward`, given the final hidden states, with gradients."""
        return partial(super().forward, transformer=lambda *_: hidden)

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        logits = super().head(hidden) if self.is_last else hidden
        return self._from_last(logits, (*hidden.shape[:-1], self.config.vocab_size))

    def _receive_and_send(self, tokens: Tensor, cache: KVCache | None, documents: Tensor | None, table: None) -> Tensor:
        x = torch.empty(*tokens.shape, self.config.n_embd, device=tokens.device)
        if not self.is_first:
            dist.recv(x, group=self.group, group_src=self.index - 1)
        if cache is not None:
            cache.layers = len(self.transformer.h)
        x = self.part(x, tokens, cache, documents)
        if not self.is_last:
            dist.send(x.contiguous(), group=self.group, group_dst=self.index + 1)
        return x

    def _from_last(self, result: Tensor, shape: Sequence[int]) -> Tensor:
        """The last stage's `result`, which has the given shape, in all stages."""
        result = result.float().contiguous() if self.is_last else result.new_empty(shape, dtype=torch.float32)
        dist.broadcast(result, group=self.group, group_src=self.count - 1)
        return result


class StageParameters(Shards):
    """The parameters of a stage, all whole: this process's part of the model.

    `parameters` has those that this process holds; `shapes` and `owners`, their stages, those of the whole model.
    """

    def __init__(self, stage: Stage, context: Context) -> None:
        self._context = context
        self.group, self.rank, self.count, self.copy = stage.group, stage.index, stage.count, context.data_rank
        self.parameters = dict(stage.named_parameters())
        self.shapes, self.owners = stage.shapes, stage.holders

    def rows(self, name: str, rank: int) -> tuple[int, int]:
        return (0, self.shapes[name][0]) if self.owners[name] == rank else (0, 0)

    def gather(self, name: str, local: Tensor) -> Tensor:
        return local

    def writer(self, name: str, kind: int) -> int:
        return self.owners[name]

    def holds(self, key: str) -> bool:
        return self.owners.get(self.parameter_of(key), self.rank) == self.rank

    def merged(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, dict(facts), group=self.group)
        merged: dict[str, Any] = parts[0]
        for key, value in merged.items():
            if isinstance(value, dict):
                merged[key] = {name: entry for part in parts for name, entry in part[key].items()}
            elif isinstance(value, list):
                merged[key] = [entry for part in parts for entry in part[key]]
        return merged

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Average the gradients over the copies of the pipeline. Collective over these."""
        size = self._context.data_size
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        for bucket in _buckets(gradients) if size > 1 else ():
            mean = self._context.sum(torch.cat([gradient.flatten() for gradient in bucket])).div_(size)
            parts = torch.split(mean, [gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view_as(gradient) for part, gradient in zip(parts, bucket, strict=True)])

    def gradient_scaler(self, device: torch.device) -> torch.amp.GradScaler:
        scaler = SharedScaler(device.type, self.group)
        scaler.scale(torch.zeros((), device=device))  # its first use creates the factor, also where there is no loss to scale
        return scaler

    def zero_gradients(self) -> None:
        """Nothing: the optimizer has these parameters."""


class Pipeline:
    """Runs the training passes of a stage's process.

    Args:
        loss, autocast: below, the loss of a batch, given the model's forward, and what creates the context of a forward pass.
    """

    def __init__(self, stage: Stage, schedule: Literal["1f1b", "gpipe"]) -> None:
        self.stage, self._kind = stage, schedule
        self._batches: Sequence[Batch] = ()
        self._schedule: Any = None
        self._scheduled: tuple[object, ...] = ()  # what `_schedule` is for
        self._names: tuple[str, ...] | None = None

    def run(self, batches: Sequence[Batch], loss: Loss, autocast: Autocast) -> None:
        """Forward and backward passes of `batches`, all of the same shape. The last stage calls `loss` for each, in order.
        Collective over the stages."""
        self._batches, self._loss, self._autocast = batches, loss, autocast
        numbers = torch.arange(len(batches))  # PyTorch splits the arguments of all micro-batches; a number says which one it is
        schedule = self._schedule_for(batches[0].inputs.shape, len(batches))
        schedule.step(*([numbers] if self.stage.is_first else []), number=numbers, target=numbers, return_outputs=False)
        self._batches = ()

    def rehearse(self, batch: Batch, passes: int, loss: Loss, autocast: Autocast) -> int:
        """Run the passes that the stage has at a time in a step of `passes`, to measure them; returns their number.

        This is not collective, so that some processes may run out of memory.
        """
        stage, results = self.stage, list[Tensor]()
        flying = min(passes, stage.count - stage.index) if self._interleaves(passes) else passes
        for _ in range(flying):
            received = torch.zeros(*batch.inputs.shape, stage.config.n_embd, device=stage.device, requires_grad=True)
            with autocast():
                hidden = stage.part(received, batch.inputs, documents=batch.documents)
                results.append(loss(stage.after(hidden), batch) if stage.is_last else hidden.sum())
        for result in results:
            result.backward()  # type: ignore[no-untyped-call]
        return flying

    def share(self, totals: Tensor | None, names: tuple[str, ...]) -> tuple[Tensor, tuple[str, ...]]:
        """The last stage's totals of a step [1 + names] and the names of all but the first, in all stages. Collective."""
        stage, last = self.stage, self.stage.count - 1
        if self._names is None:  # they are the same in every step
            box = [names]
            dist.broadcast_object_list(box, group=stage.group, group_src=last)
            self._names = box[0]
        totals = torch.zeros(1 + len(self._names), device=stage.device) if totals is None else totals
        dist.broadcast(totals, group=stage.group, group_src=last)
        return totals, self._names

    def _interleaves(self, passes: int) -> bool:
        """Whether a step is 1F1B, which needs a pass for each stage."""
        return self._kind == "1f1b" and passes >= self.stage.count

    def _schedule_for(self, shape: torch.Size, passes: int) -> Any:
        """PyTorch's schedule of passes of micro-batches [B, T]."""
        if self._scheduled == (shape, passes):
            return self._schedule
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

        stage, device = self.stage, self.stage.device
        hidden = torch.empty(*shape, stage.config.n_embd, device="meta", requires_grad=True)  # the residual stream: float32
        number = torch.empty(1, dtype=torch.int64, device="meta")
        inputs = number if stage.is_first else hidden
        kind = Schedule1F1B if self._interleaves(passes) else ScheduleGPipe
        part = PipelineStage(_Part(self), stage.index, stage.count, device, inputs, hidden, group=stage.group)
        self._schedule = kind(part, passes, loss_fn=self._loss_of, scale_grads=False)
        self._scheduled = (shape, passes)
        return self._schedule

    def _part(self, hidden: Tensor, number: Tensor) -> Tensor:
        batch = self._batches[int(number)]
        with self._autocast():
            return self.stage.part(hidden, batch.inputs, documents=batch.documents)

    def _loss_of(self, hidden: Tensor, number: Tensor) -> Tensor:
        return self._loss(self.stage.after(hidden), self._batches[int(number)])


class _Part(nn.Module):
    """The module that PyTorch's schedule calls with the hidden states and the number of a micro-batch."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self._call = pipeline._part

    def forward(self, hidden: Tensor, number: Tensor) -> Tensor:
        return self._call(hidden, number)


def build_stage(config: ModelConfig, context: Context, *, recompute: bool, compiled: bool) -> tuple[Stage, StageParameters]:
    """This process's stage of a model, with undefined weights; with `compiled`, each block is, all with the same code."""
    stage = Stage(config, context)
    stage.recompute = recompute
    for block in stage.transformer.h if compiled else ():
        block.forward = torch.compile(block.forward, dynamic=False)
    return stage, StageParameters(stage, context)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of about `_BUCKET` bytes."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(each.nbytes for each in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
