"""Opens the dataset that a configuration names: a prepared folder, text to prepare first, or another trainer's token files."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bardling.config import DataConfig
from bardling.data.text.conversations import has_conversations
from bardling.data.text.download import cache_root
from bardling.data.text.folders import tag_cache
from bardling.data.text.named_datasets import is_source_name, source_for
from bardling.data.text.opening import without_secrets
from bardling.data.tokens.conversations import Rows
from bardling.data.tokens.manifest import FORMAT
from bardling.data.tokens.pack_documents import pack_documents
from bardling.data.tokens.prepare import METHOD, SPLIT_RULE, prepare
from bardling.data.tokens.shards import TokenDataset, open_dataset
from bardling.data.tokens.token_files import detect_token_folder, open_token_folder
from bardling.data.tokens.tokenizer import Tokenizer, check_tokenizer_spec, is_tokenizer_path, load_tokenizer
from bardling.errors import UserError
from bardling.files.atomic import check_place
from bardling.files.digests import json_sha256

_ELSEWHERE = "set data.cache or $BARDLING_CACHE to store datasets elsewhere"


def has_rows(config: DataConfig) -> bool:
    """Whether the source holds conversations."""
    if config.format != "auto" or is_source_name(config.source) or is_tokenized(config.source):
        return config.format == "chat"
    return has_conversations(config.source, config.encoding)


def reading(config: DataConfig) -> dict[str, Any]:
    """How text is read: the arguments of `prepare` and `source_for` besides the source."""
    return {"encoding": config.encoding, "field": config.field, "separator": config.separator, "stream": config.stream}


def open_data(config: DataConfig, split_rule: int = SPLIT_RULE, context: int = 0) -> TokenDataset:
    """The dataset of `config`, as `_open` finds it; with data.packing = "documents", its documents in rows for a `context`."""
    dataset = _open(config, split_rule, context)
    if config.packing == "concat" or dataset.manifest.row:
        return dataset
    key = json_sha256([FORMAT, METHOD, dataset.fingerprint, context])[:16]
    packed = _cache(config) / "datasets" / f"{dataset.manifest.source.get('name', 'tokens')}-packed{context}-{key}"
    tag_cache(_cache(config))
    return open_dataset(packed) if packed.exists() else pack_documents(dataset, packed, context)


def _open(config: DataConfig, split_rule: int, context: int) -> TokenDataset:
    """Open the dataset of `config`. Text is prepared once, in data.cache, else $BARDLING_CACHE, else ~/.cache/bardling.

    A prepared text is found again by everything that determines its ids: the files, their encoding, the tokenizer with its
    end-of-text token, and how the text is split (`split_rule`; see `prepare`). If data.tokenizer is a file, a prepared dataset
    must have been made with it. Conversations are packed for a `context` (tokens).
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
    if without_secrets(config.source) != config.source:
        fault = "has a user, a password or a query, which a run would store in its configuration"
        remedy = "run `bardling prepare URL --out DIR`, which stores none, then name DIR"
        raise UserError(f"data.source = {without_secrets(config.source)!r}: {fault}: {remedy}")
    cache = _cache(config)
    rows = _rows(config, tokenizer, context) if has_rows(config) else None
    source = source_for(config.source, **reading(config))
    tag_cache(cache)
    parts = [FORMAT, METHOD, split_rule, source.identity(), made_with, config.val_fraction]
    if rows is not None and tokenizer is not None:
        parts += [rows.length, rows.too_long, tokenizer.interface.chat_template]
    key = json_sha256(parts)[:16]
    cached = cache / "datasets" / f"{source.name}-{fingerprint or spec.replace(':', '')}-{key}"
    if not cached.exists():
        try:
            check_place(cached)
        except UserError as error:
            raise UserError(f"{error}; {_ELSEWHERE}") from error
        try:
            settings: dict[str, Any] = {**reading(config), "split_rule": split_rule, "rows": rows}
            return prepare(config.source, cached, spec, val_fraction=config.val_fraction, **settings)
        except UserError as error:
            if not (cached / "manifest.json").is_file():  # else another process has just prepared the same dataset
                if isinstance(error.__cause__, OSError) and str(cache) in str(error):
                    raise UserError(f"{error}; {_ELSEWHERE}") from error
                raise
    try:
        return open_dataset(cached)
    except UserError as error:
        raise UserError(f"{error}: remove {cached}, and it is prepared again from data.source") from error


def _rows(config: DataConfig, tokenizer: Tokenizer | None, context: int) -> Rows:
    """How the conversations of a source are packed."""
    if is_source_name(config.source):
        raise UserError(
            f"data.format = 'chat': conversations are read from JSON files, not from {config.source}: download them"
        )
    if tokenizer is None or not context:
        remedy = "train a model with model.init or data.chat_template, which gives the chat template"
        raise UserError(f"{config.source}: holds conversations, which need a model's chat template: {remedy}")
    return Rows(context + 1, config.too_long)


def _cache(config: DataConfig) -> Path:
    return Path(config.cache).expanduser() if config.cache else cache_root()


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


def recorded_tokens(config: DataConfig, record: Mapping[str, Any]) -> TokenDataset | None:
    """The intact tokens that a run has recorded, in their folder or in one of its name in the cache; None if they are gone."""
    path = Path(str(record.get("path")))
    for folder in (path, _cache(config) / "datasets" / path.name):
        with contextlib.suppress(UserError, OSError):  # damaged, or removed at this moment
            if (folder / "manifest.json").is_file() and (found := open_dataset(folder)).fingerprint == record.get(
                "fingerprint"
            ):
                return found
    return None


def open_recorded(
    config: DataConfig, record: Mapping[str, Any], run: Path, remedy: str = "start a new run", context: int = 0
) -> TokenDataset:
    """The dataset that a run has recorded: its tokens, else, if they are gone, prepared again from `config` by the same rule.

    Text or tokenizer files that have changed since do not matter as long as the tokens are there. Raises a `UserError` if what
    is found has another digest than the `record`; `remedy` is what else to do then.
    """
    if (found := recorded_tokens(config, record)) is not None:
        return found
    digest, rule = record.get("fingerprint"), record.get("split_rule", 1)  # runs of versions with a single rule recorded none
    try:
        found = open_data(config, rule if isinstance(rule, int) else SPLIT_RULE, context)
    except UserError as error:
        fault = f"has no tokens any more ({record.get('path')}), and they cannot be prepared again ({error})"
        raise UserError(f"{run}: {fault}: restore them or their text, or {remedy}") from error
    if found.fingerprint != digest:
        fault = f"is not the dataset that {run} started with (fingerprint {found.fingerprint}, was {digest})"
        raise UserError(f"{found.path}: {fault}: restore the data, or {remedy}")
    return found


def changed_text(config: DataConfig, dataset: TokenDataset) -> str:
    """What has happened to the files that a dataset was prepared from, as a sentence; empty if nothing, or unknown."""
    identity = dataset.manifest.source.get("identity")
    if identity is None or is_source_name(config.source) or is_tokenized(config.source):
        return ""
    try:
        if source_for(config.source, **reading(config)).identity() == identity:
            return ""
        fault = "has changed since it was prepared"
    except UserError:
        fault = "cannot be read any more"
    return f"{config.source}: {fault}; its tokens in {dataset.path} are used"
