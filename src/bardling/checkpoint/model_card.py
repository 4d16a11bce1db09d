"""The model card of an exported model: a README.md that states where the model comes from, in numbers the run has recorded.

Everything is read from the run folder. What is not recorded is not claimed: a model of unknown origin gets a card that says so.
Paths are shortened to their last part, so that a published card tells nothing of the machine.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bardling.checkpoint.contents import read_training
from bardling.checkpoint.load import Loaded, find_checkpoint, run_of
from bardling.checkpoint.run_folder import RunFolder
from bardling.config import DataConfig, RunConfig
from bardling.config.recipes import changed_settings
from bardling.errors import UserError, closest
from bardling.interop.pretrained import is_hub_name
from bardling.monitor.format import count
from bardling.monitor.jsonl import metrics, read_jsonl
from bardling.planning.costs import parameters

_TITLES = {"gpt2": "GPT-2's", "llama": "Llama's", "qwen3": "Qwen3's"}
_LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0
h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl
zlib
"""  # identifiers that the hub knows
_PATHS = ("data.source", "data.val_source", "data.tokenizer", "model.init")
_LOCAL = (
    "data.cache",
    "device",
    "monitor.",
    "checkpoint.",
    "sample.",
    "eval.tasks",
)  # settings that say nothing about the model


def known_license(name: str) -> str:
    """The identifier as the hub writes it, in lower case; a `UserError` if it is none."""
    known = _LICENSES.split()
    if (found := name.lower()) not in known:
        remedy = f"use an identifier of the hub, such as mit or apache-2.0, or 'other'{closest(found, known)}"
        raise UserError(f"--license {name}: unknown license: {remedy}")
    return found


def model_card(
    spec: str,
    loaded: Loaded,
    *,
    best: bool,
    name: str,
    dtype: str,
    license: str = "unknown",
    adds_chat: bool = False,
    base: str = "",
) -> str:
    """The text of the card of the model `spec`.

    Args:
        name: under which others load the model: its folder's, or USER/REPO.
        license: an identifier of the hub.
        adds_chat: the export has added the chat template.
        base: of an adapter, the model that it changes.
    """
    config, family = loaded.config, loaded.config.architecture.transformers_family or ""
    about = [
        f"A language model with {_TITLES.get(family, 'its own')} architecture and {parameters(config):,} parameters "
        f"({config.n_layer} layers, {config.n_head} heads, width {config.n_embd}), a vocabulary of {config.vocab_size:,} "
        f"tokens and a context of {config.context:,} tokens. The weights are {dtype}.",
        "",
    ]
    library = "peft" if base else "transformers"
    header = [f"license: {license}", "pipeline_tag: text-generation", f"library_name: {library}", "tags:", "- bardling"]
    if base:
        header += [f"base_model: {base}"] if is_hub_name(base) else []
        about = [f"A LoRA adapter for `{_public(base)}`, to be loaded with PEFT. Both together are this model:", "", *about]
    if adds_chat:
        about += ["The chat template (ChatML) and its tokens were added after training: finetune the model to use them.", ""]
    parts = ["---", *header, "---", "", f"# {name.rpartition('/')[2]}", "", *about]
    found = _training(spec, best)
    parts += ["Its training is not recorded here.", ""] if found is None else _of_run(*found)
    has_template = loaded.tokenizer is not None and bool(loaded.tokenizer.interface.chat_template)
    chat = has_template and not adds_chat
    return "\n".join([*parts, *_usage(name, chat, adapter=bool(base)), *_limits(license, chat)])


def _training(spec: str, best: bool) -> tuple[RunFolder, int] | None:
    """The run that the model was trained in, and the step of its checkpoint."""
    if is_hub_name(spec) or Path(spec).is_file() or (run := run_of(spec)) is None:
        return None
    with contextlib.suppress(UserError):  # a nanoGPT checkpoint inside a run's folder
        state = find_checkpoint(Path(spec), best=best) / "training.json"
        return (run, read_training(state)["step"]) if state.is_file() else None
    return None


def _of_run(run: RunFolder, step: int) -> list[str]:
    """The sections about data, training and results."""
    config, data = run.trained_config(step), run.dataset_record()
    records = _records(run, step)
    trained, validated = metrics(records, "train"), metrics(records, "val")
    seen = trained[-1].get("tokens") if trained else None
    batch = f"{step:,} steps of {config.train.batch_size:,} sequences of {config.model.block_size:,} tokens"
    rates = f"learning rate {config.optim.lr:g}"
    if config.optim.name == "muon":
        rates = f"learning rates {config.optim.muon_lr:g} (matrices) and {config.optim.lr:g} (norms and biases)"
    rows = [
        ("training data", f"{_sources(config.data)}, {data.get('train_tokens', 0):,} tokens"),
        ("tokenizer", f"`{_public(config.data.tokenizer)}`, {config.model.vocab_size:,} tokens"),
        ("initial weights", f"`{_public(config.model.init)}`" if config.model.init else "random"),
        ("training", batch + (f"; {count(seen)} tokens seen" if seen else "")),
        ("optimizer", f"{config.optim.name}, {rates}, schedule {config.optim.schedule}"),
        ("precision", config.precision),
        *_hardware(run),
    ]
    text = ["## Training", "", *_table(("", ""), rows), ""]
    results: list[Sequence[object]] = []
    if validated:
        last = validated[-1]
        bits = f", {last['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in last else ""
        results.append(("validation loss", f"{last['loss']:.4f} nats per token{bits}", f"{last['step']:,}"))
    if trained:
        results.append(("training loss", f"{trained[-1]['loss']:.4f} nats per token (one batch)", f"{trained[-1]['step']:,}"))
    for task in {str(record.get("task")): record for record in records if record.get("kind") == "task"}.values():
        score = f"accuracy {float(task['accuracy_norm']):.3f} +/- {float(task['stderr']):.3f}, {int(task['items']):,} items"
        results.append((f"{task['task']}", score, f"{task['step']:,}"))
    text += ["## Results", "", *_table(("metric", "value", "step"), results), ""] if results else []
    return [
        *text,
        "## Recipe",
        "",
        "Settings of Bardling that differ from the defaults:",
        "",
        "```toml",
        *_recipe(config),
        "```",
        "",
    ]


def _records(run: RunFolder, step: int) -> list[dict[str, Any]]:
    """The metrics up to a step; none if they are missing or damaged."""
    with contextlib.suppress(UserError):
        found = read_jsonl(run.metrics_file) if run.metrics_file.is_file() else []
        return [record for record in found if isinstance(record.get("step"), int) and record["step"] <= step]
    return []


def _hardware(run: RunFolder) -> list[tuple[str, str]]:
    start: Mapping[str, Any] = next(iter(run.starts()[-1:]), {})
    if not start:
        return []
    versions = f"Bardling {start.get('bardling')}, PyTorch {start.get('torch')}"
    return [("hardware", f"{start.get('processes', 1)} x {start.get('device')}"), ("software", versions)]


def _recipe(config: RunConfig) -> list[str]:
    """The settings that differ from the defaults, as dotted keys of TOML, without those that are about this machine."""
    lines = []
    for key, (_, value) in changed_settings(RunConfig(), config).items():
        if value is not None and not key.startswith(_LOCAL):
            shown = _public(value) if key in _PATHS and isinstance(value, str) else value
            if key != "data.sources":
                lines.append(f"{key} = {json.dumps(shown, ensure_ascii=False)}")
    for source in config.data.sources:
        lines += ["", "[[data.sources]]", f"source = {json.dumps(_public(source.source), ensure_ascii=False)}"]
        lines.append(f"weight = {json.dumps(source.weight)}")
    return lines


def _sources(data: DataConfig) -> str:
    """What a model was trained on; of a mixture, each source with its weights."""
    if not data.sources:
        return f"`{_public(data.source)}`"
    weights = [" then ".join(f"{weight:g}" for weight in source.weights(1)) for source in data.sources]
    named = [f"`{_public(source.source)}` (weight {each})" for source, each in zip(data.sources, weights, strict=True)]
    return ", ".join(named)


def _public(value: str) -> str:
    """A name, or the last part of a path."""
    return value if value.startswith("hf:") or is_hub_name(value) else Path(value).name.replace("`", "'") or value


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _usage(name: str, chat: bool, *, adapter: bool) -> list[str]:
    model, imports = "AutoModelForCausalLM", ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if adapter:
        model, imports = "AutoPeftModelForCausalLM", ["from peft import AutoPeftModelForCausalLM"]
        imports += ["from transformers import AutoTokenizer"]
    prompt = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
    if chat:
        messages = '[{"role": "user", "content": "Hello"}]'
        options = 'add_generation_prompt=True, return_tensors="pt", return_dict=True'
        prompt = f"inputs = tokenizer.apply_chat_template({messages}, {options})"
    return [
        *("## Usage", "", "```python", *imports, ""),
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = {model}.from_pretrained("{name}")',
        *(prompt, "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))", "```", ""),
    ]


def _limits(license: str, chat: bool) -> list[str]:
    base = "" if chat else "This is a base model: it continues a text, and does not follow instructions. "
    stated = f"The license is `{license}`."
    if license == "unknown":
        stated = "No license has been stated yet, so assume no right to use the model. Its author can state one at the top of "
        stated += "this file, or with `bardling export --license`."
    return [
        "## Limits and license",
        "",
        f"{base}The model can repeat the errors, the bias and passages of its training data, and was not tested for safety. "
        + stated,
        "",
    ]
