"""The hooks of a run, in the order in which they are called."""

from dataclasses import replace
from functools import cache, partial

from bardling.data.batches.loader import EvalSequences
from bardling.data.tokens.shards import TokenDataset
from bardling.extensions import HOOKS
from bardling.planning.costs import flops_per_token
from bardling.training.hooks.base import HookContext
from bardling.training.hooks.log import Log
from bardling.training.hooks.new_shapes import NewShapes
from bardling.training.hooks.sample import Sample
from bardling.training.hooks.tasks import Tasks
from bardling.training.hooks.validate import Validate
from bardling.training.loop import Hook
from bardling.training.resolve import ResolvedRun


def make_hooks(
    run: ResolvedRun,
    shared: HookContext,
    dataset: TokenDataset,
    *,
    sequences_per_epoch: int,
    document_start: int | None,
) -> list[Hook]:
    """Create all hooks except those for checkpoints and the deadline.

    Args:
        document_start: token that opens a document, if documents are kept apart.
    """
    config = run.config
    validation = EvalSequences(dataset.split("val"), config.model.block_size, config.eval.windows, document_start)
    hooks: list[Hook] = [
        NewShapes(run.plan, shared.context, compiled=run.execution.compiled),
        Log(
            shared,
            every=config.train.log_every,
            sequences_per_epoch=sequences_per_epoch,
            flops_per_token=cache(partial(flops_per_token, config.model)),
            peak_flops=run.peak_flops,
        ),
        Validate(shared, validation, every=config.eval.every, batch_size=run.plan.micro_batch),
    ]
    if run.tokenizer is not None:
        # Text of a single document has no end-of-text token to start after, so an empty prompt becomes a line break.
        single = dataset.manifest.train.documents == 1
        sample = replace(config.sample, prompt=config.sample.prompt or ("\n" if single else ""))
        hooks.append(Sample(shared, sample, run.tokenizer))
        if config.eval.tasks:
            hooks.append(Tasks(shared, config.eval, run.tokenizer))
    return [*hooks, *(HOOKS.get("train.hooks", name)(shared) for name in config.train.hooks)]
