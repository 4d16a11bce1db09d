"""Models from the Hugging Face hub: one set of weights, configurations and the tokenizer are downloaded, nothing else, no code.

A repository often holds the same weights several times: in other formats, precisions and folders (`onnx/`,
`consolidated.safetensors`, `model.fp16.safetensors`). Small files are fetched first; they tell which of the large ones are
needed.
"""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from bardling.data.text.hub import call_hub, hub_endpoint, hub_library
from bardling.data.tokens.bpe_files import UNREAD_TOKENIZERS
from bardling.errors import closest
from bardling.interop.weight_index import INDEX, indexed_files

# The names that nanoGPT and nano-gpt use, and where these models are on the hub.
GPT2_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_SMALL = ("config.json", "generation_config.json", "adapter_config.json", INDEX, *_TOKENIZER)
_WEIGHTS, _ADAPTER = "model.safetensors", "adapter_model.safetensors"
_OTHER_TOKENIZERS = ("vocab.json", "merges.txt", *UNREAD_TOKENIZERS)
"""Instead of a `tokenizer.json`."""
_REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")  # not ./NAME, which is a path


def is_hub_name(spec: str | Path) -> bool:
    """Whether `spec` names a model on the hub: one of GPT-2's names, or USER/REPO unless that looks like a path here.

    GPT-2's names take precedence over files and folders: `./gpt2` is a path, and so is an existing `Path`.
    """
    name = str(spec)
    if name in GPT2_NAMES and isinstance(spec, str):
        return True
    if name in GPT2_NAMES:
        return not Path(name).exists()
    return bool(_REPOSITORY.fullmatch(name)) and not is_shadowed(name)


def is_shadowed(name: str | Path) -> bool:
    """Whether USER/REPO is taken for a path: a folder USER exists here, or a folder of a similar name with a run REPO."""
    path = Path(name)
    if not _REPOSITORY.fullmatch(str(name)):
        return False
    folders = [run.parts[0] for run in Path().glob(f"*/{path.name}/config.toml")]
    return path.parent.is_dir() or bool(closest(path.parent.name, folders))


def fetch_model(spec: str, *, weights: bool = True) -> Path:
    """Download a model, or find it in the hub's cache, and return its folder. `weights`: not only its small files."""
    folder = _fetch(spec, [*_SMALL, _WEIGHTS, _ADAPTER] if weights else _SMALL)
    more: list[str] = []
    if weights and not (folder / _WEIGHTS).is_file() and (folder / INDEX).is_file():
        more += [glob.escape(file.name) for file in indexed_files(folder / INDEX)]
    if not (folder / "tokenizer.json").is_file():
        more += _OTHER_TOKENIZERS
    return _fetch(spec, more) if more else folder


def _fetch(spec: str, patterns: Sequence[str]) -> Path:
    download, repository = hub_library("snapshot_download"), GPT2_NAMES.get(spec, spec)

    def get() -> str | Path:
        try:
            return str(download(repository, allow_patterns=list(patterns), endpoint=hub_endpoint()))
        except Exception as error:
            # Without a connection, a copy that an earlier version downloaded is used: it may lack small files, but no weights.
            cached = Path(getattr(error, "snapshot_path", None) or "")
            if not _has_weights(cached):
                raise
            return cached

    return Path(call_hub(f"{spec}: no such local folder, and the model {repository}", get))


def _has_weights(folder: Path) -> bool:
    if any((folder / name).is_file() for name in (_WEIGHTS, _ADAPTER)):
        return True
    return (folder / INDEX).is_file() and all(file.is_file() for file in indexed_files(folder / INDEX))
