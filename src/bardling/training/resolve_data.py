"""What `resolve` makes of the settings that name data: absolute paths, and the stages of a mixture as numbers of samples."""

import glob
from dataclasses import replace
from pathlib import Path

from bardling.config import DataConfig, RunConfig
from bardling.data.text.named_datasets import is_source_name
from bardling.data.tokens.tokenizer import is_tokenizer_path
from bardling.evaluate.benchmarks import absolute_spec
from bardling.interop.pretrained import is_hub_name
from bardling.planning.batching import TrainPlan


def absolute_paths(config: RunConfig) -> RunConfig:
    """Make paths absolute, so that the run can be resumed from any folder."""

    def absolute(spec: str, is_path: bool) -> str:
        return str(Path.cwd() / spec) if is_path else spec

    data, model, tasks = config.data, config.model, tuple(map(absolute_spec, config.eval.tasks))

    def absolute_source(source: str) -> str:
        file = source.rpartition(":")[0]  # of FILE:FIELD
        found = bool(source) and (Path(source).exists() or (file and Path(file).exists()) or glob.has_magic(source))
        return absolute(source, not is_source_name(source) and bool(found))

    source, val_source = absolute_source(data.source), absolute_source(data.val_source)
    # Names that follow from the paths stay as they are.
    sources = tuple(replace(each, source=absolute_source(each.source)) for each in data.sources)
    tokenizer = absolute(data.tokenizer, is_tokenizer_path(data.tokenizer))
    init = absolute(model.init, bool(model.init) and not is_hub_name(model.init) and Path(model.init).exists())
    cache = data.cache and str(Path(data.cache).absolute())
    data = replace(data, source=source, sources=sources, val_source=val_source, tokenizer=tokenizer, cache=cache)
    return replace(config, data=data, model=replace(model, init=init), eval=replace(config.eval, tasks=tasks))


def with_stages(data: DataConfig, plan: TrainPlan) -> DataConfig:
    """The stages of a mixture as numbers of samples, which stay when the number of steps changes later."""
    total = plan.samples_before(plan.steps)
    return replace(data, stages=tuple(s if isinstance(s, int) else max(1, round(s * total)) for s in data.stages))
