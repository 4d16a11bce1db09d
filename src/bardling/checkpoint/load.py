"""Open any model a user points at: a run, one of its checkpoints (its folder, `RUN@step-000400` or `RUN@best`), a folder of
`transformers`, a model on the hub, a GGUF file, a checkpoint of nanoGPT (`ckpt.pt` or its folder) or of nano-gpt
(`checkpoint_005000.bin`); and what a resumed run continues from.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from bardling.checkpoint.contents import Checkpoint, read_checkpoint, read_model
from bardling.checkpoint.run_folder import RunFolder, open_run
from bardling.config import ModelConfig
from bardling.config.architecture import GPT2_VOCAB_SIZE
from bardling.data.text.download import cache_root
from bardling.data.tokens.bpe_files import has_tokenizer, missing_tokenizer
from bardling.data.tokens.gguf_vocabulary import tokenizer_from_metadata
from bardling.data.tokens.gpt2_bpe import gpt2_tokenizer_file
from bardling.data.tokens.text_interface import TextFiles, read_text_files
from bardling.data.tokens.token_files import gpt2_tokenizer, read_meta
from bardling.data.tokens.tokenizer import Tokenizer, load_tokenizer
from bardling.distributed.context import Context
from bardling.distributed.global_state import NEUTRAL
from bardling.errors import UserError
from bardling.files.digests import json_sha256
from bardling.files.paths import expand_home, shell_path, similar
from bardling.files.streams import tell
from bardling.interop.gguf_file import is_gguf, read_header
from bardling.interop.gguf_model import read_gguf_model
from bardling.interop.huggingface import dropout_note, hf_dtype, read_hf_folder
from bardling.interop.imported import ImportedCheckpoint
from bardling.interop.nano_gpt import read_nano_gpt_checkpoint
from bardling.interop.nanogpt_checkpoint import read_nanogpt_checkpoint
from bardling.interop.peft import ADAPTER_CONFIG, AdapterFolder, is_adapter, merged, read_adapter, rows_needed, stated_base
from bardling.interop.pretrained import fetch_model, is_hub_name, is_shadowed
from bardling.model.gpt import GPT
from bardling.model.init import crop_block_size, extend_vocabulary

_LARGEST_MULTIPLE = 1024  # to which trainers pad a vocabulary


@dataclass(frozen=True)
class Loaded:
    """A model and what is known about it; its training state is present only if requested and available."""

    config: ModelConfig
    state: dict[str, Tensor]  # GPT.state_dict()
    tokenizer: Tokenizer | None = None
    optimizer_tensors: dict[str, Tensor] = field(default_factory=dict)
    optimizer_meta: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    best_val_loss: float | None = None
    imported: ImportedCheckpoint | None = None  # the content of another trainer's file
    find_tokenizer: Callable[[], Tokenizer] | None = None  # fetches the tokenizer, or says why there is none
    note: str = ""  # what differs from the files
    dtype: str = "float32"  # of the weights in the files; here they are float32
    adapter: AdapterFolder | None = None  # the adapter that `state` contains already
    text: TextFiles = field(default_factory=TextFiles)  # of a model without a tokenizer: what its files say about its text

    def needed_tokenizer(self) -> Tokenizer:
        """The tokenizer, for work with text; if there is none, a `UserError` says why. No other is ever used in its place."""
        if self.tokenizer is not None or self.find_tokenizer is None:
            return self.tokenizer or _refuse("the model has no tokenizer")
        return self.find_tokenizer()

    def cropped(self, block_size: int) -> "Loaded":
        """A copy with at most `block_size` positions, in the weights and in the optimizer state."""
        if block_size >= self.config.block_size:
            return self
        return dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, block_size=block_size),
            state=crop_block_size(self.state, block_size),
            optimizer_tensors=crop_block_size(self.optimizer_tensors, block_size),
        )

    def extended(self, tokenizer: Tokenizer) -> "Loaded":
        """A copy with a tokenizer that extends the model's; the embeddings of new tokens are the mean of all others."""
        known = self.config.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size
        return dataclasses.replace(self._with_tokens(known, tokenizer.vocab_size), tokenizer=tokenizer)

    def _with_tokens(self, known: int, size: int) -> "Loaded":
        rows = self.config.vocab_size
        if size <= known:
            return self
        config = dataclasses.replace(self.config, vocab_size=max(rows, size))
        state = extend_vocabulary(self.state, min(known, rows), size, config.padded_vocab_size)
        return dataclasses.replace(self, config=config, state=state)

    def build(self) -> GPT:
        """Build the model in host memory and evaluation mode."""
        model = GPT(self.config, seed=None)
        model.load_state_dict(self.state)
        return model.eval()


def load(spec: str | Path, *, best: bool = False, training: bool = False, adapters: bool = True) -> Loaded:
    """Open a model: a run, a checkpoint, a folder or file of another trainer, or a name on the hub.

    `best`: of a run, the checkpoint with the best validation loss instead of the latest. `training`: also read the optimizer
    state, if there is one. `adapters`: whether it may be a LoRA adapter, which is then merged into its base model. Raises a
    `UserError` if there is no such model, or it is damaged or unsafe.
    """
    spec = expand_home(spec) if isinstance(spec, str) else spec
    path, from_hub = Path(spec), is_hub_name(spec)
    if not from_hub and path.is_file():
        return _load_gguf(path) if is_gguf(path) else _load_imported(path)
    if not from_hub and not (path / "config.toml").is_file() and (path / "ckpt.pt").is_file():
        return _load_imported(path / "ckpt.pt")
    folder = fetch_model(str(spec)) if from_hub else find_checkpoint(path, best=best)
    if is_adapter(folder):
        return _load_adapter(folder) if adapters else _refuse(f"{spec}: is itself an adapter: merge it first")
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    found = Loaded(ModelConfig(), {}, tokenizer, find_tokenizer=partial(_refuse, missing_tokenizer(folder)))
    if not (folder / "training.json").is_file():
        config, state = read_hf_folder(folder)
        note, text = dropout_note(folder / "config.json"), found.text if tokenizer else read_text_files(folder)
        return dataclasses.replace(found, config=config, state=state, note=note, dtype=hf_dtype(folder), text=text)
    if not training:
        config, weights = read_model(folder)
        return dataclasses.replace(found, config=config, state=dict(weights))
    content = read_checkpoint(folder)
    return dataclasses.replace(
        found,
        config=content.model_config,
        state=dict(content.model_state),
        optimizer_tensors=dict(content.optimizer_tensors),
        optimizer_meta=content.optimizer_meta,
        step=content.training["step"],
        best_val_loss=content.training["best_val_loss"],
    )


@NEUTRAL.applied()
def load_model(spec: Path | str, *, best: bool = False) -> GPT:
    """Load the model `spec` (see `load`) in host memory and evaluation mode."""
    return load(spec, best=best).build()


def _load_gguf(path: Path) -> Loaded:
    """Load a GGUF file; if its tokenizer is of a kind that is not read, text is refused with the reason."""
    header = read_header(path)
    config, state = read_gguf_model(header)
    tokenizer, reason = None, f"{path}: has no tokenizer: only its original model folder encodes text"
    try:
        tokenizer = tokenizer_from_metadata(header.metadata, str(path))
    except UserError as error:
        reason = str(error)
    return Loaded(config, state, tokenizer, find_tokenizer=partial(_refuse, reason))


def _load_imported(path: Path) -> Loaded:
    """Load a checkpoint file of nano-gpt (`.bin`) or nanoGPT (any other name)."""
    found = read_nano_gpt_checkpoint(path) if path.suffix == ".bin" else read_nanogpt_checkpoint(path)
    tokenizer, find = _imported_tokenizer(path, found)
    optimizer = found.optimizer or {}
    meta = found.optimizer_meta if optimizer else {}
    return Loaded(found.config, found.weights, tokenizer, optimizer, meta, found.step, found.best_val_loss, found, find)


def _imported_tokenizer(path: Path, found: ImportedCheckpoint) -> tuple[Tokenizer | None, Callable[[], Tokenizer]]:
    """The tokenizer of a nanoGPT checkpoint, and how to find one that is not on this machine.

    It is one beside the checkpoint, else that of a meta.pkl beside it or in its dataset's folder, else GPT-2's, as in nanoGPT.
    """
    size, folders, dataset = found.config.vocab_size, [path.parent], found.settings.get("dataset")
    if has_tokenizer(path.parent):
        return load_tokenizer(path.parent), partial(_refuse, "")
    if isinstance(dataset, str):
        folders += [base / "data" / dataset for base in (Path(), path.parent, path.parent.parent)]
    copy = f"copy the tokenizer.json, or nanoGPT's meta.pkl, of its data to {path.parent}"
    for meta in (folder / "meta.pkl" for folder in folders):
        if meta.is_file():
            known, tokenizer = read_meta(meta)
            fault = f"does not say how text is encoded: {copy}"
            if known > size:
                tokenizer, fault = None, f"has a vocabulary of {known:,} tokens, but {path} only {size:,}: {copy}"
            return tokenizer, partial(_refuse, f"{meta}: {fault}")
    # The embedding may have rows up to a multiple of some power of 2.
    if GPT2_VOCAB_SIZE <= size <= -(-GPT2_VOCAB_SIZE // _LARGEST_MULTIPLE) * _LARGEST_MULTIPLE:
        return gpt2_tokenizer(), partial(_fetch_gpt2_tokenizer, str(path))
    return None, partial(_refuse, f"{path}: no tokenizer of its vocabulary of {size:,} tokens was found: {copy}")


def _fetch_gpt2_tokenizer(path: str) -> Tokenizer:
    try:
        return load_tokenizer(gpt2_tokenizer_file())
    except UserError as error:
        raise UserError(f"{path}: has GPT-2's vocabulary, but its tokenizer is not available: {error}") from error


def _refuse(reason: str) -> NoReturn:
    raise UserError(reason)


def _load_adapter(folder: Path) -> Loaded:
    """Load a LoRA adapter and the model that it changes; both together are one model."""
    adapter, spec = read_adapter(folder), base_of(folder)
    try:
        base = load(spec, adapters=False)
    except UserError as error:
        remedy = f"correct base_model_name_or_path in {folder / ADAPTER_CONFIG}"
        raise UserError(f"{folder}: is an adapter for {spec}, which cannot be opened ({error}): {remedy}") from error
    base = base._with_tokens(base.config.vocab_size, rows_needed(adapter))
    loaded = dataclasses.replace(base, state=merged(adapter, base.state, base.config), adapter=adapter)
    if has_tokenizer(folder):
        loaded = dataclasses.replace(loaded, tokenizer=_with_generation_of(base.tokenizer, load_tokenizer(folder)))
    return loaded


def _with_generation_of(base: Tokenizer | None, tokenizer: Tokenizer) -> Tokenizer:
    """An adapter's tokenizer. TRL saves it without a generation config; further tokens that end a text are then the base's."""
    files = tokenizer.interface.files
    if base is None or files.generation or files.model:
        return tokenizer
    known = base.interface.files
    files = dataclasses.replace(files, generation=known.generation, model=known.model)
    return Tokenizer(dict(tokenizer.content), tokenizer.name, None, files)


def names_adapter(spec: str) -> bool:
    """Whether a model is a LoRA adapter; what `load` refuses is none."""
    path = Path(spec)
    if is_hub_name(spec):
        return is_adapter(fetch_model(spec, weights=False))
    return path.is_dir() and not (path / "ckpt.pt").is_file() and is_adapter(find_checkpoint(path))


def base_of(adapter: Path) -> str:
    """The model that the adapter in a folder was trained on: of a run, its own copy, wherever the run is now."""
    own = RunFolder(adapter.parent.parent).base
    return str(own) if adapter.parent.name == "checkpoints" and own.is_dir() else stated_base(adapter)


def _refuse_weights_alone(folder: Path) -> None:
    """Name the weights in a folder that has no `config.json`."""
    kinds = ("*.safetensors", "*.gguf", "pytorch_model*.bin")
    file = next((path for kind in kinds for path in sorted(folder.glob(kind))), None)
    if file is not None and file.suffix == ".gguf":
        raise UserError(f"{folder}: holds a GGUF file: give that file instead, {file}")
    if file is not None:
        raise UserError(f"{file}: there is no config.json beside it: copy the model's config.json to {folder}")


def tokenizer_file(tokenizer: Tokenizer) -> str:
    """The path of a copy of a tokenizer in the cache, for `data.tokenizer`: it stays where it is when the model moves."""
    template = tokenizer.interface.chat_template
    name = tokenizer.data_key if template is None else f"{tokenizer.data_key}-{json_sha256(template)[:8]}"
    folder = cache_root() / "tokenizers" / name
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    return str(folder / "tokenizer.json")


def find_checkpoint(path: Path, *, best: bool = False) -> Path:
    """The checkpoint folder for `path`: itself, the checkpoint that `RUN@step-000400` or `RUN@best` names, or the latest valid
    (or the best) checkpoint of a run."""
    if (path / "config.json").is_file() or is_adapter(path):
        return path
    if (named := _named_checkpoint(path)) is not None:
        if best:
            raise UserError(f"{path}: names a checkpoint already: omit --best")
        return named
    if not (path / "config.toml").is_file():
        _refuse_weights_alone(path)
    if not path.exists() and path.parent.is_dir() and is_shadowed(path) and not any(path.parent.glob("*/config.toml")):
        where = f"it is not looked for on the hub, because there is a folder {path.parent} here"
        raise UserError(f"{path}: no such folder{similar(path)}; {where}: correct the name, or run the command elsewhere")
    run = open_run(path)
    found = run.store().best() if best else run.store().latest(_report)
    if found is None and not run.store().steps():
        _refuse_lost(run)
    if found is None:
        kind = "best checkpoint" if best else "checkpoint"
        raise UserError(f"{path}: has no {kind} yet; continue the run with `bardling resume {shell_path(path)}`")
    return found


def _named_checkpoint(path: Path) -> Path | None:
    """The checkpoint that `RUN@step-000400`, `RUN@step-400` or `RUN@best` names; None if `path` does not have this form."""
    run, at, name = str(path).rpartition("@")
    if not at or path.exists() or not (Path(run) / "config.toml").is_file():
        return None
    store = RunFolder(Path(run)).store()
    steps = {f"step-{step}": step for step in store.steps()}
    number = re.sub("^step-0+(?=[0-9])", "step-", name)
    if number in steps:
        return store.path(steps[number])
    if name == "best" and (best := store.best()) is not None:
        return best
    names = [*(store.path(step).name for step in steps.values()), *(["best"] if store.best() is not None else [])]
    raise UserError(f"{path}: no such checkpoint; {run} has {', '.join(names) or 'none yet'}")


def checkpoint_specs(spec: str) -> tuple[str, ...]:
    """`spec` itself, or, for `RUN@all`, `RUN@step-N` for each checkpoint of the run in ascending order."""
    run = spec.removesuffix("@all")
    if run == spec or Path(spec).exists():
        return (spec,)
    folder = open_run(Path(run))
    if not (steps := folder.store().steps()):
        raise UserError(f"{spec}: {run} has no checkpoint yet; continue the run with `bardling resume {shell_path(run)}`")
    return tuple(f"{run}@step-{step:06d}" for step in steps)


def step_of(spec: str, *, best: bool = False) -> int | None:
    """The step of the checkpoint that `load` opens for `spec`; None if that is not a checkpoint of a run."""
    path = Path(spec)
    if is_hub_name(spec) or path.is_file() or (path / "ckpt.pt").is_file():
        return None
    found = re.fullmatch(r"step-(\d{6,18})", find_checkpoint(path, best=best).name)
    return None if found is None else int(found[1])


def load_tokenizer_of(spec: Path | str) -> Tokenizer:
    """Load the tokenizer of a run, a checkpoint or a model folder."""
    folder = fetch_model(str(spec), weights=False) if is_hub_name(spec) else Path(spec)
    if has_tokenizer(folder):
        return load_tokenizer(folder)
    if folder.is_file() or (folder / "ckpt.pt").is_file():
        return load(spec).needed_tokenizer()
    found = find_checkpoint(folder)
    return load(found).needed_tokenizer() if is_adapter(found) and not has_tokenizer(found) else load_tokenizer(found)


def run_of(spec: Path | str) -> RunFolder | None:
    """The run at `spec`, or the run that the checkpoint `spec` belongs to; None if it names a model on the hub."""
    if is_hub_name(spec):
        return None
    path = Path(spec)
    if not path.exists():
        path = find_checkpoint(path)
    runs = map(RunFolder, (path, path.absolute().parent.parent))
    return next((run for run in runs if run.config_file.is_file()), None)


def latest_checkpoint(folder: RunFolder, context: Context) -> Checkpoint | None:
    """The latest valid checkpoint of a run; None if there are none, a `UserError` if all are damaged."""
    checkpoint: Checkpoint | None = None

    def find() -> int | None:
        nonlocal checkpoint
        checkpoint = _latest(folder, lazy=context.world_size > 1)  # a process may hold a shard only
        return None if checkpoint is None else checkpoint.training["step"]

    step = context.on_primary(find)  # for all: processes must not start with different checkpoints
    return checkpoint if context.is_primary or step is None else read_checkpoint(folder.store().path(step), lazy=True)


def _latest(folder: RunFolder, *, lazy: bool) -> Checkpoint | None:
    store = folder.store()
    for path in store.valid_checkpoints(_report):
        try:
            return read_checkpoint(path, lazy=lazy)
        except UserError as unreadable:  # all checksums match, and yet the content is not usable
            _report(f"{path}: cannot be used and is skipped: {unreadable}")
    if store.steps():
        raise UserError(
            f"{store.path(store.steps()[-1])}: every checkpoint of this run is damaged (see above): restore one from a copy, "
            "or start a new run"
        )
    _refuse_lost(folder)
    return None


def _refuse_lost(run: RunFolder) -> None:
    """Refuse a run without checkpoints that has had some: starting again at step 0 would also delete its metrics."""
    if run.has_saved():
        raise UserError(f"{run.checkpoints}: every checkpoint of this run is gone: restore one from a copy, or start a new run")


def _report(message: str) -> None:
    tell(message)
