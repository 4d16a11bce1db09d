"""The sides of a comparison: what each process does that `children.py` starts.

`ours`: the library's own parts of a run (`build_state`, `wrap`, `Prefetcher`, `fit`). `plain`: `plain.py`. `nanogpt`: model
and optimizer of a checkout, stepped as its train.py does. `transformers`: GPT2LMHeadModel under its Trainer where
`accelerate` is installed, else in the plain loop. All draw the same batches; all but transformers begin with the same
weights. Each asks its desk before a step, and tells it after.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardling.config import OptimConfig, RunConfig, TrainConfig
from bardling.data.loader import Batch, Prefetcher
from bardling.distributed.context import distributed
from bardling.distributed.device import DTYPES, choose_device, choose_precision, device_name, matmul_flops, prepare_backend
from bardling.errors import UserError
from bardling.model.arithmetic import flops_per_token
from bardling.model.gpt import GPT
from bardling.model.peaks import peak_flops
from bardling.train.compiling import compile_pays, wrap
from bardling.train.loop import fit
from bardling.train.persist import build_state
from bardling.train.plan import make_plan
from children import Desk, Leave, Spec
from plain import PlainGPT, make_adamw, plain_steps


class Windows:
    """Batches for every side: half the tokens skewed to small ids, half copied from the place before, so that one can learn."""

    def __init__(self, vocab_size: int, block_size: int) -> None:
        self._vocab, self._time = vocab_size, block_size

    def batch(self, first_sample: int, size: int) -> Batch:
        """[size, block_size] inputs and targets, a function of the arguments alone."""
        rng = np.random.default_rng(first_sample)
        windows = (self._vocab * rng.random((size, self._time + 1)) ** 3).astype(np.int64)  # [B, T + 1]
        copied = rng.random(windows.shape) < 0.5
        windows[:, 1:] = np.where(copied[:, 1:], windows[:, :-1], windows[:, 1:])
        tokens = torch.from_numpy(windows)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def batches(spec: Spec, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, one forward pass each, made when they are asked for."""
    windows, first = Windows(int(spec.model["vocab_size"]), int(spec.model["block_size"])), 0
    while True:
        batch = windows.batch(first, spec.batch)
        yield batch.inputs.to(device), batch.targets.to(device)
        first += spec.batch


def start_weights(spec: Spec, rows: int) -> dict[str, Tensor]:
    """The library's initial weights, for other sides; the embedding cut or padded (with zeros) to `rows`."""
    weights = dict(GPT(spec.config, seed=0).state_dict())
    table = weights["transformer.wte.weight"][: int(spec.model["vocab_size"])]
    weights["transformer.wte.weight"] = F.pad(table, (0, 0, 0, rows - table.size(0)))
    return weights


def _autocast(precision: str, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """What a side other than ours computes in: float32 unless asked."""
    if precision in ("bfloat16", "float16"):
        return lambda: torch.autocast(device.type, dtype=DTYPES[precision])
    return contextlib.nullcontext


def run_ours(spec: Spec, desk: Desk) -> None:
    """The library, put together as a run puts it together."""
    without, more = set(spec.without), set(spec.more)
    with distributed(spec.device) as context:
        attention: Any = next((name for name in ("fa3", "fa4") if name in more), "auto")
        prepare_backend(context.device, deterministic=False, attention=attention)
        precision = choose_precision("float32" if "bf16" in without else spec.precision, context.device)  # type: ignore[arg-type]
        name = device_name(context.device)
        peak = peak_flops(name, precision.name) or matmul_flops(context.device, DTYPES[precision.name], seconds=0.2)
        compiled = spec.compile == "on"
        if spec.compile == "auto":
            work = float(flops_per_token(spec.config)) * spec.tokens_per_step * spec.run_steps
            compiled, _ = compile_pays(work, peak, context.device)
        compiled = compiled and "compile" not in without
        config = RunConfig(
            seed=0,
            device=spec.device,
            precision=precision.name,
            compile="on" if compiled else "off",
            fp8="fp8" in more,
            cuda_graphs="cuda-graphs" in more,
            attention=attention,
            model=spec.config,
            optim=OptimConfig(lr=spec.lr, warmup_steps=0, schedule="constant"),
            train=TrainConfig(
                steps=spec.run_steps,
                batch_size=spec.batch * spec.accumulation,
                micro_batch=spec.batch,
                recompute=spec.recompute,  # type: ignore[arg-type]
            ),
        )
        state = build_state(config, context)
        if "fused-optimizer" in without:
            state.optimizer = make_adamw(state.model, fused=False, foreach=False)
        if "flash" in without:
            for switch in ("enable_flash_sdp", "enable_cudnn_sdp", "enable_mem_efficient_sdp"):
                getattr(torch.backends.cuda, switch)(False)
        forward: Any = wrap(state.model, compiled=compiled, graphs=config.cuda_graphs, context=context)
        if "chunked-loss" in without:
            forward = _full_logits(state.model, compiled)
        plan = make_plan(
            dataclasses.replace(config.train, steps=sys.maxsize), config.model.block_size, 1
        )  # until told to leave
        desk.ready(state.model, precision=precision.name, compiled=compiled)

        def hook(_: object, result: Any) -> None:
            if result is not None:
                desk.after(result.loss)
            desk.before()

        source = Windows(config.model.vocab_size, config.model.block_size)
        with contextlib.ExitStack() as stack:
            if "prefetch" in without:
                stream: Any = (Batch(*pair) for pair in batches(spec, context.device))
            else:
                requests = ((number * spec.batch, spec.batch) for number in range(sys.maxsize))
                stream = stack.enter_context(Prefetcher(source, requests, context.device))
            fit(
                state,
                stream,
                plan,
                lr_at=spec.rate,
                grad_clip=config.train.grad_clip,
                forward=forward,
                precision=precision,
                context=context,
                keep_gradients=config.cuda_graphs,
                hooks=[hook],
            )


def _full_logits(model: GPT, compiled: bool) -> Callable[..., Tensor]:
    """The summed loss by way of all logits at once."""

    def forward(tokens: Tensor, targets: Tensor, *, reduction: str = "sum") -> Tensor:
        logits = model(tokens)  # [B, T, V]
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), reduction=reduction)

    return torch.compile(forward) if compiled else forward


def run_plain(spec: Spec, desk: Desk) -> None:
    """`plain.py`; with `fast` compiled, in bfloat16, fused, and with a vocabulary that suits a GPU."""
    vocab = int(spec.model["vocab_size"])
    rows = -(-vocab // 64) * 64 if spec.fast else vocab
    if desk.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    model = PlainGPT(spec.model, rows)
    model.load_state_dict(start_weights(spec, rows))
    model.to(desk.device)
    optimizer = make_adamw(model, fused=True) if spec.fast else make_adamw(model)
    precision = "bfloat16" if spec.fast or spec.precision == "bfloat16" else "float32"
    forward = torch.compile(model) if spec.fast else model
    desk.ready(model, precision=precision, compiled=spec.fast)
    _drive(spec, desk, forward, model, optimizer, precision)


def _drive(
    spec: Spec, desk: Desk, forward: Callable[[Tensor, Tensor], Tensor], model: nn.Module, optimizer: Any, precision: str
) -> None:
    """Do plain steps for ever."""
    steps = plain_steps(
        forward,
        model,
        optimizer,
        batches(spec, desk.device),
        accumulation=spec.accumulation,
        rate=spec.rate,
        autocast=_autocast(precision, desk.device),
    )
    while True:
        desk.before()
        desk.after(next(steps))


def run_nanogpt(spec: Spec, desk: Desk) -> None:
    """Model and optimizer of a nanoGPT checkout, stepped as its train.py does (float32 on a CPU, by its own rule)."""
    found = importlib.util.spec_from_file_location("nanogpt_model", Path(spec.path) / "model.py")
    if found is None or found.loader is None or not (Path(spec.path) / "model.py").is_file():
        raise UserError(f"{spec.path}: has no model.py; name a checkout of nanoGPT")
    module = importlib.util.module_from_spec(found)
    sys.modules["nanogpt_model"] = module  # its dataclass looks itself up there
    found.loader.exec_module(module)
    keys = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
    model = module.GPT(module.GPTConfig(**{key: spec.model[key] for key in keys}, dropout=0.0))
    model.load_state_dict(start_weights(spec, int(spec.model["vocab_size"])), strict=False)  # its head is the embedding
    model.to(desk.device)
    optimizer = model.configure_optimizers(0.1, spec.lr, (0.9, 0.95), desk.device.type)
    precision = "bfloat16" if spec.fast or spec.precision == "bfloat16" else "float32"
    forward = torch.compile(model) if spec.fast else model
    desk.ready(model, precision=precision, compiled=spec.fast)
    _drive(spec, desk, lambda tokens, targets: forward(tokens, targets)[1], model, optimizer, precision)


def run_transformers(spec: Spec, desk: Desk) -> None:
    """GPT2LMHeadModel in transformers' Trainer; without `accelerate`, which that needs, in the plain loop."""
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
    model = GPT2LMHeadModel(config).to(desk.device).train()
    precision = "bfloat16" if spec.precision == "bfloat16" else "float32"
    trainer = importlib.util.find_spec("accelerate") is not None
    desk.ready(model, precision=precision, compiled=False, how="Trainer" if trainer else "plain loop (no accelerate)")
    if trainer:
        _drive_trainer(spec, desk, model, precision)
    else:
        _drive(spec, desk, lambda tokens, _: model(tokens, labels=tokens).loss, model, make_adamw(model), precision)


def _drive_trainer(spec: Spec, desk: Desk, model: Any, precision: str) -> None:
    """Let the Trainer train; it waits at each step's beginning."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    windows = Windows(int(spec.model["vocab_size"]), int(spec.model["block_size"]))

    class Rows(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            first = 0
            while True:
                batch = windows.batch(first, spec.batch)
                for row in batch.inputs:
                    yield {"input_ids": row, "labels": row}
                first += spec.batch

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            desk.before()

        def on_step_end(self, *_: object, **__: object) -> None:
            desk.after(None)

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
            use_cpu=desk.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Turns()]).train()


SIDES = {"ours": run_ours, "plain": run_plain, "nanogpt": run_nanogpt, "transformers": run_transformers}


def _main() -> None:
    """The child: what libraries print goes to stderr, so that stdout carries answers only."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    values = json.loads(sys.argv[1])
    spec = Spec(**{**values, "without": tuple(values["without"])})
    try:
        SIDES[spec.kind](spec, Desk(choose_device(spec.device), answers))
    except Leave:
        pass
    except UserError as error:
        answers.write(json.dumps({"error": str(error)}) + "\n")
    except torch.OutOfMemoryError:
        answers.write(json.dumps({"error": "out of memory"}) + "\n")
    answers.close()


if __name__ == "__main__":
    _main()
