"""Models from the Hugging Face hub: only configuration, safetensors and tokenizer files are fetched, nothing that could run."""

import os
import re
from pathlib import Path

from bardling.errors import UserError

# The names that both older trainers use, and where these models live today.
GPT2_NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}

_WANTED = ("config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_name(spec: str) -> bool:
    """Whether `spec` names a model on the hub: one of GPT-2's names, or USER/REPO where no such file exists."""
    return spec in GPT2_NAMES or (bool(_REPOSITORY.fullmatch(spec)) and not Path(spec).exists())


def fetch_model(spec: str) -> Path:
    """Download a model (or find it in the hub's cache); returns its folder.

    Raises:
        UserError: the `hf` extra is missing, or the hub does not have the model or cannot be reached.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise UserError(f"{spec}: models from the hub need the 'hf' extra: pip install 'bardling[hf]'") from None
    repository = GPT2_NAMES.get(spec, spec)
    try:
        # The endpoint is read now, so that setting HF_ENDPOINT in a script works after the library was imported.
        endpoint = os.environ.get("HF_ENDPOINT") or None
        return Path(snapshot_download(repository, allow_patterns=list(_WANTED), endpoint=endpoint))
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{spec}: the hub has no model {repository}, and there is no such folder here") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{spec}: could not be fetched ({reason}): check the network, or give the folder of a copy") from None
