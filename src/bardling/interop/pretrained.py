"""Models from the Hugging Face hub: only configuration, safetensors and tokenizer files are downloaded, no code."""

import re
from pathlib import Path

from bardling.data.text.hub import call_hub, hub_endpoint, hub_library

# The names that nanoGPT and nano-gpt use, and where these models are on the hub.
GPT2_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
_FILES = ("config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")
_REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")  # not ./NAME, which is a path


def is_hub_name(spec: str | Path) -> bool:
    """Whether `spec` names a model on the hub: one of GPT-2's names, or USER/REPO unless this path exists.

    GPT-2's names take precedence over files and folders: `./gpt2` is a path, and so is an existing `Path`.
    """
    name = str(spec)
    if name in GPT2_NAMES and isinstance(spec, str):
        return True
    return (name in GPT2_NAMES or bool(_REPOSITORY.fullmatch(name))) and not Path(name).exists()


def fetch_model(spec: str) -> Path:
    """Download a model, or find it in the hub's cache, and return its folder."""
    download, repository = hub_library("snapshot_download"), GPT2_NAMES.get(spec, spec)
    what = f"{spec}: no such local folder, and the model {repository}"
    return Path(call_hub(what, lambda: download(repository, allow_patterns=list(_FILES), endpoint=hub_endpoint())))
