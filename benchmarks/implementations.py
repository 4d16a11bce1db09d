"""The implementations that benchmarks compare: the program of each process that `workers.py` starts.

`ours`: the library's parts as a run uses them (`build`, `Prefetcher`, `fit`). `plain`: `plain.py`. `nanogpt`:
model and optimizer of a checkout, stepped like its train.py. `transformers`: GPT2LMHeadModel with its Trainer if `accelerate`
is installed, else in the plain loop. All use the same batches, and all but transformers start from the same weights. Each
calls its `StepServer` before and after every step.
"""

import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardling.config import OptimConfig, TrainConfig
from bardling.data.batches.loader import Batch, Prefetcher
from bardling.distributed.context import distributed
from bardling.distributed.device import DTYPES, backend, choose_precision, device_name, matmul_flops
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.planning.batching import make_plan
from bardling.planning.costs import flops_per_token
from bardling.planning.devices import peak_flops
from bardling.planning.layout import Layout
from bardling.training.build import Assembly, Execution, build
from bardling.training.compile_choice import choose_compile
from bardling.training.loop import fit
from bardling.training.objective import NextToken
from bardling.training.step import StepSettings
from plain import PlainGPT, make_adamw, plain_steps
from workers import Spec, StepServer, run_worker


class RandomSequences:
    """Learnable random batches: half of the tokens are skewed towards small ids, half repeat the previous token."""

    def __init__(self, vocab_size: int, block_size: int) -> None:
        self._vocab, self._time = vocab_size, block_size

    def batch(self, first_sample: int, size: int) -> Batch:
        """[size, block_size] inputs and targets, a pure function of the arguments."""
        rng = np.random.default_rng(first_sample)
        sequences = (self._vocab * rng.random((size, self._time + 1)) ** 3).astype(np.int64)  # [B, T + 1]
        copied = rng.random(sequences.shape) < 0.5
        sequences[:, 1:] = np.where(copied[:, 1:], sequences[:, :-1], sequences[:, 1:])
        tokens = torch.from_numpy(sequences)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


class Shares:
    """The batches of `source` with `whole` samples each, of which every request reads some rows."""

    def __init__(self, source: RandomSequences, whole: int) -> None:
        self._source, self._whole = source, whole

    def batch(self, first_sample: int, size: int) -> Batch:
        """[size, block_size] inputs and targets."""
        skipped = first_sample % self._whole
        batch, rows = self._source.batch(first_sample - skipped, self._whole), slice(skipped, skipped + size)
        return Batch(batch.inputs[rows], batch.targets[rows])


def batches(spec: Spec, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, one per forward pass, created on demand."""
    sequences, first = RandomSequences(int(spec.model["vocab_size"]), int(spec.model["block_size"])), 0
    while True:
        batch = sequences.batch(first, spec.batch)
        yield batch.inputs.to(device), batch.targets.to(device)
        first += spec.batch


def initial_weights(spec: Spec, rows: int) -> dict[str, Tensor]:
    """The library's initial weights for other implementations; the embedding is cut or zero-padded to `rows`."""
    weights = dict(GPT(spec.config, seed=0).state_dict())
    table = weights["transformer.wte.weight"][: int(spec.model["vocab_size"])]
    weights["transformer.wte.weight"] = F.pad(table, (0, 0, 0, rows - table.size(0)))
    return weights


def _autocast(precision: str, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """Autocast for implementations other than ours; float32 by default."""
    if precision in ("bfloat16", "float16"):
        return lambda: torch.autocast(device.type, dtype=DTYPES[precision])
    return contextlib.nullcontext


def run_ours(spec: Spec, server: StepServer) -> None:
    """The library, assembled as in a run."""
    without, more = set(spec.without), set(spec.more)
    attention: Any = next((name for name in ("fa3", "fa4") if name in more), "auto")
    with (
        distributed(spec.device, rank_timeout=TrainConfig().rank_timeout) as joined,
        backend(joined.device, deterministic=False, attention=attention),
    ):
        axis = "shard" if spec.layout == "fsdp" else "replicate"
        context = joined.arranged(Layout(**{axis: joined.world_size}))
        precision = choose_precision("float32" if "bf16" in without else spec.precision, context.device)  # type: ignore[arg-type]
        name = device_name(context.device)
        peak = peak_flops(name, precision.name) or matmul_flops(context.device, DTYPES[precision.name], seconds=0.2)
        graphs = "cuda-graphs" in more
        setting = "off" if "compile" in without else spec.compile
        work = float(flops_per_token(spec.config)) * spec.tokens_per_step * spec.run_steps
        compiled, _ = choose_compile(setting, graphs, context.device, work, peak)
        shards = {"reshard": spec.reshard, "whole_gradients": spec.accumulation > 1}
        execution = Execution(precision, compiled, graphs, "fp8" in more, spec.recompute == "blocks", **shards)
        assembly = build(spec.config, OptimConfig(lr=spec.lr), execution, context)
        if "fused-optimizer" in without:
            assembly.state.optimizer = make_adamw(assembly.state.model, fused=False, foreach=False)
        if "flash" in without:
            for switch in ("enable_flash_sdp", "enable_cudnn_sdp", "enable_mem_efficient_sdp"):
                getattr(torch.backends.cuda, switch)(False)
        if "chunked-loss" in without:
            assembly = Assembly(assembly.state, _full_logits(assembly.state.model, execution.compiled))
        # Steps continue until `Shutdown`.
        rows = spec.batch // context.data_size
        train = TrainConfig(steps=sys.maxsize, batch_size=spec.batch * spec.accumulation, micro_batch=rows)
        plan = make_plan(train, spec.config.block_size, context.data_size)
        server.ready(assembly.state.model, precision=precision.name, compiled=execution.compiled)

        def hook(_: object, result: Any) -> None:
            if result is not None:
                server.after(result.loss)
            server.before()

        source = Shares(RandomSequences(spec.config.vocab_size, spec.config.block_size), spec.batch)
        with contextlib.ExitStack() as stack:
            if "prefetch" in without:
                stream: Any = (Batch(*pair) for pair in batches(spec, context.device))
            else:
                requests = plan.requests(0, sys.maxsize, context.data_rank)
                stream = stack.enter_context(Prefetcher(source, requests, context.device))
            settings = StepSettings(NextToken(), precision, context, grad_clip=train.grad_clip, keep_gradients=graphs)
            fit(assembly, stream, plan, settings, lr_at=spec.rate, hooks=[hook])


def _full_logits(model: GPT, compiled: bool) -> Callable[..., Tensor]:
    """The summed loss computed from full logits."""

    def forward(tokens: Tensor, targets: Tensor, *, reduction: str = "sum", documents: None = None) -> Tensor:
        logits = model(tokens)  # [B, T, V]
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), reduction=reduction)

    return torch.compile(forward) if compiled else forward


def run_plain(spec: Spec, server: StepServer) -> None:
    """`plain.py`; with `fast`: compiled, bfloat16, fused AdamW and a padded vocabulary."""
    vocab = int(spec.model["vocab_size"])
    rows = -(-vocab // 64) * 64 if spec.fast else vocab
    if server.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    model = PlainGPT(spec.model, rows)
    model.load_state_dict(initial_weights(spec, rows))
    model.to(server.device)
    optimizer = make_adamw(model, fused=True) if spec.fast else make_adamw(model)
    precision = "bfloat16" if spec.fast or spec.precision == "bfloat16" else "float32"
    forward = torch.compile(model) if spec.fast else model
    server.ready(model, precision=precision, compiled=spec.fast)
    _drive(spec, server, forward, model, optimizer, precision)


def _drive(
    spec: Spec,
    server: StepServer,
    forward: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    optimizer: Any,
    precision: str,
) -> None:
    """Run plain steps until `Shutdown`."""
    steps = plain_steps(
        forward,
        model,
        optimizer,
        batches(spec, server.device),
        accumulation=spec.accumulation,
        rate=spec.rate,
        autocast=_autocast(precision, server.device),
    )
    while True:
        server.before()
        server.after(next(steps))


def run_nanogpt(spec: Spec, server: StepServer) -> None:
    """Model and optimizer of a nanoGPT checkout, stepped like its train.py (which uses float32 on a CPU)."""
    found = importlib.util.spec_from_file_location("nanogpt_model", Path(spec.path) / "model.py")
    if found is None or found.loader is None or not (Path(spec.path) / "model.py").is_file():
        raise UserError(f"{spec.path}: has no model.py; give a nanoGPT checkout")
    module = importlib.util.module_from_spec(found)
    sys.modules["nanogpt_model"] = module  # its dataclass looks up its own module there
    found.loader.exec_module(module)
    keys = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
    model = module.GPT(module.GPTConfig(**{key: spec.model[key] for key in keys}, dropout=0.0))
    model.load_state_dict(
        initial_weights(spec, int(spec.model["vocab_size"])), strict=False
    )  # its head is tied to the embedding
    model.to(server.device)
    optimizer = model.configure_optimizers(0.1, spec.lr, (0.9, 0.95), server.device.type)
    precision = "bfloat16" if spec.fast or spec.precision == "bfloat16" else "float32"
    forward = torch.compile(model) if spec.fast else model
    server.ready(model, precision=precision, compiled=spec.fast)
    _drive(spec, server, lambda tokens, targets: forward(tokens, targets)[1], model, optimizer, precision)


def run_transformers(spec: Spec, server: StepServer) -> None:
    """GPT2LMHeadModel with transformers' Trainer, or in the plain loop if `accelerate`, which the Trainer needs, is missing."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError("transformers is not installed: pip install 'bardling[hf]'") from None
    shape = spec.model
    config = GPT2Config(
        vocab_size=shape["vocab_size"],
        n_positions=shape["block_size"],
        n_embd=shape["n_embd"],
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        activation_function="gelu_new" if shape["gelu"] == "tanh" else "gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).to(server.device).train()
    precision = "bfloat16" if spec.precision == "bfloat16" else "float32"
    trainer = importlib.util.find_spec("accelerate") is not None
    server.ready(model, precision=precision, compiled=False, how="Trainer" if trainer else "plain loop (no accelerate)")
    if trainer:
        _drive_trainer(spec, server, model, precision)
    else:
        _drive(spec, server, lambda tokens, _: model(tokens, labels=tokens).loss, model, make_adamw(model), precision)


def _drive_trainer(spec: Spec, server: StepServer, model: Any, precision: str) -> None:
    """Train with the Trainer, which waits at the beginning of each step."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    sequences = RandomSequences(int(spec.model["vocab_size"]), int(spec.model["block_size"]))

    class Rows(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            first = 0
            while True:
                batch = sequences.batch(first, spec.batch)
                for row in batch.inputs:
                    yield {"input_ids": row, "labels": row}
                first += spec.batch

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            server.before()

        def on_step_end(self, *_: object, **__: object) -> None:
            server.after(None)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=spec.batch,
            gradient_accumulation_steps=spec.accumulation,
            max_steps=10**9,
            learning_rate=spec.lr,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            max_grad_norm=1.0,
            bf16=precision == "bfloat16",
            use_cpu=server.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Turns()]).train()


IMPLEMENTATIONS = {"ours": run_ours, "plain": run_plain, "nanogpt": run_nanogpt, "transformers": run_transformers}


def _main(values: dict[str, Any], server: StepServer) -> None:
    spec = Spec(**{**values, "without": tuple(values["without"])})
    IMPLEMENTATIONS[spec.kind](spec, server)


if __name__ == "__main__":
    run_worker(_main)
