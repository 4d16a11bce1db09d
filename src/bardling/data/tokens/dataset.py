"""Opens the dataset that a configuration names: a prepared folder, text to prepare first, or another trainer's token files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bardling.config import DataConfig
from bardling.data.text.download import cache_root
from bardling.data.text.folders import tag_cache
from bardling.data.text.named_datasets import is_source_name, source_for
from bardling.data.tokens.manifest import FORMAT
from bardling.data.tokens.prepare import METHOD, SPLIT_RULE, prepare
from bardling.data.tokens.shards import TokenDataset, open_dataset
from bardling.data.tokens.token_files import detect_token_folder, open_token_folder
from bardling.data.tokens.tokenizer import check_tokenizer_spec, is_tokenizer_path, load_tokenizer
from bardling.errors import UserError
from bardling.files.digests import json_sha256


def open_data(config: DataConfig, split_rule: int = SPLIT_RULE) -> TokenDataset:
    """Open the dataset of `config`. Text is prepared once, in data.cache, else $BARDLING_CACHE, else ~/.cache/bardling.

    A prepared text is found again by everything that determines its ids: the files, their encoding, the tokenizer with its
    end-of-text token, and how the text is split (`split_rule`; see `prepare`). If data.tokenizer is a file, a prepared dataset
    must have been made with it.
    """
    path, spec, kind = Path(config.source), config.tokenizer, _token_format(config.source)
    if kind == "foreign":
        return open_token_folder(path)
    tokenizer = load_tokenizer(spec) if is_tokenizer_path(spec) else None
    fingerprint, made_with = ("", spec) if tokenizer is None else (tokenizer.fingerprint, tokenizer.data_key)
    if kind == "prepared":
        dataset = open_dataset(path)
        if fingerprint not in ("", dataset.manifest.tokenizer):
            fault = f"has fingerprint {fingerprint}, but {dataset.path} was made with {dataset.manifest.tokenizer or 'none'}"
            remedy = "omit data.tokenizer, or prepare the source again with this tokenizer"
            raise UserError(f"data.tokenizer = {spec!r}: {fault}: {remedy}")
        return dataset
    check_tokenizer_spec(spec)
    cache = Path(config.cache).expanduser() if config.cache else cache_root()
    source = source_for(config.source, config.encoding)
    tag_cache(cache)
    key = json_sha256([FORMAT, METHOD, split_rule, source.identity(), made_with, config.val_fraction])[:16]
    cached = cache / "datasets" / f"{source.name}-{fingerprint or spec.replace(':', '')}-{key}"
    if not cached.exists():
        try:
            fraction, encoding = config.val_fraction, config.encoding
            return prepare(config.source, cached, spec, val_fraction=fraction, encoding=encoding, split_rule=split_rule)
        except UserError as error:
            if not (cached / "manifest.json").is_file():  # else another process has just prepared the same dataset
                if isinstance(error.__cause__, OSError) and str(cache) in str(error):
                    raise UserError(f"{error}; set data.cache or $BARDLING_CACHE to store datasets elsewhere") from error
                raise
    try:
        return open_dataset(cached)
    except UserError as error:
        raise UserError(f"{error}: remove {cached}, and it is prepared again from data.source") from error


def is_tokenized(source: str) -> bool:
    """Whether a source holds tokens, of a tokenizer that is given, instead of text."""
    return _token_format(source) is not None


def _token_format(source: str) -> Literal["prepared", "foreign"] | None:
    if is_source_name(source):
        return None
    path = Path(source)
    try:
        if (path / "manifest.json").is_file():
            return "prepared"
        return None if detect_token_folder(path) is None else "foreign"
    except OSError as error:  # for example, the name is too long
        raise UserError(f"data.source = {source[:100]!r}: cannot be opened ({error.strerror})") from None


def open_recorded(config: DataConfig, record: Mapping[str, Any], run: Path, remedy: str = "start a new run") -> TokenDataset:
    """The dataset that a run has recorded: its folder, else, if that is gone, prepared again from `config` by the same rule.

    Text or tokenizer files that have changed since do not matter as long as the folder is there. Raises a `UserError` if what
    is found has another digest than the `record`; `remedy` is what else to do then.
    """
    digest, path = record.get("fingerprint"), Path(str(record.get("path")))
    try:
        if (path / "manifest.json").is_file() and (found := open_dataset(path)).fingerprint == digest:
            return found
    except (UserError, OSError):  # damaged, or removed at this moment
        pass
    rule = record.get("split_rule", 1)  # runs of versions with a single rule recorded none
    found = open_data(config, rule if isinstance(rule, int) else SPLIT_RULE)
    if found.fingerprint != digest:
        fault = f"is not the dataset that {run} started with (fingerprint {found.fingerprint}, was {digest})"
        raise UserError(f"{found.path}: {fault}: restore the data, or {remedy}")
    return found
