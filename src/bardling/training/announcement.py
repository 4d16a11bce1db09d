"""What a run says about itself before its first step."""

from collections.abc import Callable, Iterator

from bardling.config import DataConfig
from bardling.data.batches.order import DataOrder
from bardling.data.text.findings import describe_findings
from bardling.data.tokens.corpus import texts_of
from bardling.data.tokens.dataset import changed_text
from bardling.data.tokens.pack_documents import describe_packing
from bardling.data.tokens.shards import TokenDataset
from bardling.distributed.device import device_name
from bardling.planning.costs import parameters
from bardling.training.facts import Facts
from bardling.training.resolve import ResolvedRun
from bardling.training.state import TrainState


def announce(
    run: ResolvedRun, facts: Facts, dataset: TokenDataset, order: DataOrder, state: TrainState, note: Callable[[str], None]
) -> None:
    """Print the model, steps, data and device, what `auto` chose, and what changed."""
    config, plan = run.config, run.plan
    for reason in run.reasons:
        if reason.from_depth:
            note(str(reason))
    epochs = plan.samples_before(plan.steps) / order.sequences_per_epoch
    size, passes = parameters(config.model), "pass" if plan.accumulation == 1 else "passes"
    trained = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    fixed = f" and {trained / 1e6:.2f}M of adapters, which are trained" if config.tune.lora_rank else ""
    note(
        f"{size / 1e6:.2f}M parameters{fixed}, {plan.steps:,} steps of {plan.samples_per_step} x {plan.block_size} "
        f"tokens ({plan.accumulation} forward {passes} of {plan.micro_batch}), {epochs:.2f} epochs of "
        f"{order.n_tokens:,} tokens"
    )
    for line in _mixture(config.data, dataset, order, plan.samples_before(plan.steps)):
        note(line)
    for text, tokens in texts_of(config.data, dataset):
        if not facts.resumed:
            lines = [*describe_findings(tokens.manifest.source), describe_packing(tokens.manifest)]
            for line in filter(None, lines):
                note(f"{text.source}: {line}")
        elif change := changed_text(text, tokens):
            note(change)
    if len(plan.stages) > 1:
        note(f"batch and context grow: {plan.describe_stages()}")
    where = device_name(facts.context.device) + (f" x {run.layout.world_size}" if run.layout.world_size > 1 else "")
    precision, compiled = run.why("precision"), run.why("compile")
    if run.layout.world_size > 1:
        note(f"layout {run.layout}: {run.why('parallel.layout')}")
    note(f"{where}; precision {config.precision} ({precision}); compile {config.compile} ({compiled})")
    if facts.resumed:
        deadline, place = config.train.deadline is not None, facts.folder.path
        if state.step < plan.steps or deadline:  # with a deadline, only the run itself can tell whether it is finished
            digest = state.digest_samples()
            seen = "" if digest is None else f", sample order digest {digest}"
            if digest is not None and digest.first:
                seen += f" (from sample {digest.first + 1:,} on)"
            note(f"resuming {place} at step {state.step:,}" + ("" if deadline else f" of {plan.steps:,}") + seen)
        else:
            note(f"{place} is finished: all {state.step:,} steps are complete; raise --train.steps to continue it")
    for change in run.changes:
        note(f"changed: {change}")
    for warning in run.warnings:
        note(f"WARNING: {warning}")


def _mixture(config: DataConfig, dataset: TokenDataset, order: DataOrder, samples: int) -> Iterator[str]:
    """The shares and epochs of the sources of a mixture, one line each."""
    splits = dataset.splits("train")
    if len(splits) == 1:
        return
    columns = [source.weights(len(config.stages) + 1) for source in config.sources]
    totals = [sum(weights) for weights in zip(*columns, strict=True)]
    for (name, split), weights, epochs in zip(splits, columns, order.epochs(samples), strict=True):
        shares = " -> ".join(f"{weight / total:.1%}" for weight, total in zip(weights, totals, strict=True))
        yield f"  {name}: {shares} of the samples, {epochs:.2f} epochs of {len(split):,} tokens"
    if config.stages:
        yield f"  the shares change at sample {', '.join(f'{start:,}' for start in config.stages)} of {samples:,}"
