"""Opens the dataset that a configuration names: a prepared folder, text to prepare first, or another trainer's token files."""

from pathlib import Path

from bardling.config import DataConfig
from bardling.data.text.download import cache_root
from bardling.data.text.named_datasets import source_for
from bardling.data.tokens.manifest import FORMAT
from bardling.data.tokens.prepare import METHOD, prepare
from bardling.data.tokens.shards import TokenDataset, open_dataset
from bardling.data.tokens.token_files import detect_token_folder, open_token_folder
from bardling.data.tokens.tokenizer import check_tokenizer_spec, is_tokenizer_path, load_tokenizer
from bardling.errors import UserError
from bardling.files.digests import json_sha256


def open_data(config: DataConfig) -> TokenDataset:
    """Open the dataset of `config`. Text is prepared once, in data.cache, else $BARDLING_CACHE, else ~/.cache/bardling.

    If data.tokenizer is a file, a prepared dataset must have been made with it.
    """
    path, spec = Path(config.source).expanduser(), config.tokenizer
    try:
        prepared = (path / "manifest.json").is_file()
        foreign = not prepared and detect_token_folder(path) is not None
    except OSError as error:  # for example, the name is too long
        raise UserError(f"data.source = {config.source[:100]!r}: cannot be opened ({error.strerror})") from None
    if foreign:
        return open_token_folder(path)
    tokenizer = load_tokenizer(spec) if is_tokenizer_path(spec) else None
    fingerprint, made_with = ("", spec) if tokenizer is None else (tokenizer.fingerprint, tokenizer.data_key)
    if prepared:
        dataset = open_dataset(path)
        if fingerprint not in ("", dataset.manifest.tokenizer):
            fault = f"has fingerprint {fingerprint}, but {dataset.path} was made with {dataset.manifest.tokenizer or 'none'}"
            remedy = "omit data.tokenizer, or prepare the source again with this tokenizer"
            raise UserError(f"data.tokenizer = {spec!r}: {fault}: {remedy}")
        return dataset
    check_tokenizer_spec(spec)
    source = source_for(config.source)
    key = json_sha256([FORMAT, METHOD, source.identity(), made_with, config.val_fraction])[:16]
    cache = Path(config.cache).expanduser() if config.cache else cache_root()
    cached = cache / "datasets" / f"{source.name}-{fingerprint or spec.replace(':', '')}-{key}"
    if not cached.exists():
        try:
            return prepare(config.source, cached, spec, val_fraction=config.val_fraction)
        except UserError as error:
            if not (cached / "manifest.json").is_file():  # else another process has just prepared the same dataset
                if isinstance(error.__cause__, OSError) and str(cache) in str(error):
                    raise UserError(f"{error}; set data.cache or $BARDLING_CACHE to store datasets elsewhere") from error
                raise
    try:
        return open_dataset(cached)
    except UserError as error:
        raise UserError(f"{error}: remove {cached}, and it is prepared again from data.source") from error
