"""Models from the Hugging Face hub: only configuration, safetensors and tokenizer files are downloaded, no code."""

import os
import re
from pathlib import Path

from bardling.errors import UserError

# The names that nanoGPT and nano-gpt use, and where these models are on the hub.
GPT2_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
_FILES = ("config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_name(spec: str) -> bool:
    """Whether `spec` names a model on the hub, one of GPT-2's names or USER/REPO; a path that exists takes precedence."""
    return (spec in GPT2_NAMES or bool(_REPOSITORY.fullmatch(spec))) and not Path(spec).exists()


def fetch_model(spec: str) -> Path:
    """Download a model, or find it in the hub's cache, and return its folder."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise UserError(f"{spec}: models from the hub need the 'hf' extra: pip install 'bardling[hf]'") from None
    repository = GPT2_NAMES.get(spec, spec)
    try:
        # Read the endpoint now, so that setting HF_ENDPOINT works even after huggingface_hub was imported.
        endpoint = os.environ.get("HF_ENDPOINT") or None
        return Path(snapshot_download(repository, allow_patterns=list(_FILES), endpoint=endpoint))
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{spec}: the hub has no model {repository}, and there is no such local folder") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{spec}: download failed ({reason}): check the network, or give a local folder") from None
