"""The two sides of `sft.py`: the program of each process that `workers.py` starts.

`bardling`: a whole run of the recipe `chat`, with an extension hook that waits for its turn between steps. `trl`: an SFTTrainer
whose batches are the conversations of the same steps, in the same order. All else is TRL's: template, tokens, marks of answers
(`assistant_only_loss`), collation, model, loss, optimizer, loop.
"""

import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bardling.checkpoint.run_folder import open_run
from bardling.config import RunConfig
from bardling.config.recipes import load_recipe
from bardling.errors import UserError
from bardling.extensions import HOOKS
from bardling.training.recovery.trace import trace_step
from bardling.training.run import train
from workers import StepServer, run_worker

Messages = list[dict[str, str]]
Steps = list[list[list[Messages]]]
"""For each step, for each of its forward passes, conversations."""

BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass(frozen=True)
class SideSpec:
    """What one worker trains."""

    kind: str  # bardling or trl
    model: str  # the exported folder to start from
    steps: int  # of the run
    rows: int  # packed sequences of a step
    context: int
    lr: float  # of the first step; falls linearly to 0
    precision: str  # float32 or bfloat16
    data: str  # bardling: the file of conversations; trl: `Steps` as JSON
    out: str = ""  # bardling: the run folder
    compile: str = "off"
    padding_free: bool = False  # trl: the conversations of a forward pass are one sequence
    clock: str = "wall"  # or cpu: the CPU time of the process
    device: str = "cpu"


def chat_run(spec: SideSpec) -> RunConfig:
    """The run of the side `bardling`."""
    recipe = load_recipe("chat")
    return replace(
        recipe,
        device=spec.device,
        precision=spec.precision,
        compile=spec.compile,
        model=replace(recipe.model, init=spec.model, block_size=spec.context),
        data=replace(recipe.data, source=spec.data, chat_template="", too_long="drop"),
        optim=replace(
            recipe.optim,
            lr=spec.lr,
            schedule="linear",
            warmup_steps=0,
            min_lr=0.0,
            betas=BETAS,
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
        ),
        train=replace(
            recipe.train, steps=spec.steps, batch_size=spec.rows, micro_batch=spec.rows, grad_clip=CLIP, hooks=("turns",)
        ),
        eval=replace(recipe.eval, every=0),
        sample=replace(recipe.sample, every=0),
        checkpoint=replace(recipe.checkpoint, every=0),
    )


def run_bardling(spec: SideSpec, server: StepServer) -> None:
    """Train the run; it waits at the beginning of each step. Before the first, it reports the conversations of all."""

    def turns(_: object) -> Any:
        def hook(state: Any, result: Any) -> None:
            if result is None:
                run = open_run(Path(spec.out))
                steps = [trace_step(run, step).sequences for step in range(1, spec.steps + 1)]
                names = [[[part.name for part in sequence.documents] for sequence in step] for step in steps]
                server.ready(state.model, names=names)
            else:
                server.after(result.loss)
            server.before()

        return hook

    HOOKS.register("turns", turns)
    train(chat_run(spec), spec.out, quiet=True)


def run_trl(spec: SideSpec, server: StepServer) -> None:
    """Train with TRL; it waits at the beginning of each step."""
    try:
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install trl") from None

    steps: Steps = json.loads(Path(spec.data).read_text(encoding="utf-8"))
    passes = [conversations for step in steps for conversations in step]

    class InOrder(SFTTrainer):
        """Takes the conversations as they are listed, and keeps the losses of a step."""

        losses: list[Tensor] = []  # noqa: RUF012  of the forward passes: their sum is the step's

        def get_train_dataloader(self) -> Any:
            counted = iter(range(sum(map(len, passes))))
            batches = [[next(counted) for _ in conversations] for conversations in passes]
            data = self.train_dataset.select_columns(["input_ids", "labels"])
            loader = torch.utils.data.DataLoader(data, batch_sampler=batches, collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

        def training_step(self, *values: Any, **named: Any) -> Tensor:
            loss: Tensor = super().training_step(*values, **named)
            self.losses.append(loss)
            return loss

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            server.before()

        def on_step_end(self, *_: object, **__: object) -> None:
            server.after(torch.stack(trainer.losses).sum())
            trainer.losses.clear()

    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=spec.steps,
            per_device_train_batch_size=max(map(len, passes)),  # of no effect, since the batches are given
            gradient_accumulation_steps=len(steps[0]),
            assistant_only_loss=True,
            max_length=None if spec.padding_free else spec.context,
            padding_free=spec.padding_free,
            gradient_checkpointing=False,
            learning_rate=spec.lr,
            lr_scheduler_type="linear",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP,
            bf16=spec.precision == "bfloat16",
            use_cpu=spec.device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        data = Dataset.from_list([{"messages": messages} for conversations in passes for messages in conversations])
        trainer = InOrder(model=spec.model, args=arguments, train_dataset=data, callbacks=[Turns()])
        server.ready(trainer.model, passes=len(steps[0]), sizes=_sizes(steps, trainer.train_dataset))
        trainer.train()


def _sizes(steps: Steps, dataset: Any) -> list[tuple[int, int, int, int]]:
    """Conversations, tokens, tokens of answers, and tokens with the padding of each forward pass, of each step."""
    lengths = [len(ids) for ids in dataset["input_ids"]]
    answers = [sum(label != -100 for label in labels) for labels in dataset["labels"]]
    if len(lengths) != sum(len(conversations) for step in steps for conversations in step):
        raise UserError("TRL has left out conversations, so that the sides would not train on the same ones")
    sizes, at = [], 0
    for step in steps:
        begin, padded = at, 0
        for conversations in step:
            padded += len(conversations) * max(lengths[at : at + len(conversations)])
            at += len(conversations)
        sizes.append((at - begin, sum(lengths[begin:at]), sum(answers[begin:at]), padded))
    return sizes


def _main(values: dict[str, Any], server: StepServer) -> None:
    spec = SideSpec(**values)
    server.clock = time.perf_counter if spec.clock == "wall" else time.process_time
    {"bardling": run_bardling, "trl": run_trl}[spec.kind](spec, server)


if __name__ == "__main__":
    run_worker(_main)
