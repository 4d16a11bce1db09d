"""Models from the Hugging Face hub: only configuration, safetensors and tokenizer files are downloaded, no code."""

import re
from pathlib import Path

from bardling.data.text.hub import call_hub, hub_endpoint, hub_library

# The names that nanoGPT and nano-gpt use, and where these models are on the hub.
GPT2_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
_FILES = ("config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_name(spec: str) -> bool:
    """Whether `spec` names a model on the hub, one of GPT-2's names or USER/REPO; a path that exists takes precedence."""
    return (spec in GPT2_NAMES or bool(_REPOSITORY.fullmatch(spec))) and not Path(spec).exists()


def fetch_model(spec: str) -> Path:
    """Download a model, or find it in the hub's cache, and return its folder."""
    download, repository = hub_library("snapshot_download"), GPT2_NAMES.get(spec, spec)
    what = f"{spec}: no such local folder, and the model {repository}"
    return Path(call_hub(what, lambda: download(repository, allow_patterns=list(_FILES), endpoint=hub_endpoint())))
