"""Hugging Face hub: which files make up a dataset, and verified downloads of them.

All requests go through `huggingface_hub`, so its cache, resumed downloads and environment variables (HF_ENDPOINT, HF_TOKEN,
HF_HOME, HF_HUB_OFFLINE) apply. The files of a split are looked for in this order: those that the dataset card lists for the
configuration and split; those with a conventional name (`data/train-*.parquet`); those of the hub's own Parquet conversion
(branch `refs/convert/parquet`, folders CONFIG/SPLIT). The resulting list is stored with its commit under $BARDLING_CACHE/hub,
so the same name always means the same text, and later runs need no network to resolve it.

Dataset scripts are never run. Limits: Parquet and JSON Lines (optionally gzipped). The hub converts only the first part of
large datasets in other formats; that part is used only if requested by its name, `partial-train`.
"""

import fnmatch
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from bardling.data.text.compression import EXTRA
from bardling.data.text.download import cache_root
from bardling.data.text.opening import Remote
from bardling.errors import UserError, closest
from bardling.files.atomic import os_error_as_user_error, write_atomically
from bardling.files.digests import file_sha256, json_sha256
from bardling.files.reading import read_json_object

_SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")
_CONVERTED = "refs/convert/parquet"
_CONVENTIONAL = [f"{folder}{{0}}{end}" for end in ("-*.parquet", ".parquet", "/*.parquet") for folder in ("data/", "")]


@dataclass(frozen=True)
class HubFile:
    """One file of a repository; `sha256` is empty if the hub does not give one."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Listing:
    """The files of one split of a dataset at one commit."""

    repository: str
    revision: str
    config: str
    split: str
    files: tuple[HubFile, ...]


def listing(repository: str, config: str, split: str) -> Listing:
    """The files of a split of NAME or OWNER/NAME, requested once, then cached; an empty `config` is the default one."""
    key = json_sha256([hub_endpoint(), repository, config, split])[:16]
    cached = cache_root() / "hub" / f"{repository.replace('/', '--')}-{key}.json"
    if cached.is_file():
        try:
            content = read_json_object(cached)
            return Listing(**{**content, "files": tuple(HubFile(**file) for file in content["files"])})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{cached}: is damaged: delete it to request the list from the hub again") from error
    found = _request_listing(repository, config, split)
    with os_error_as_user_error(cached, "write"):
        cached.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cached, json.dumps(asdict(found), indent=1).encode())
    return found


def fetch(found: Listing, file: HubFile) -> Path:
    """Local path of a file, downloaded if it is not cached; if it differs from the hub's list, it is refused and removed."""
    path = hub_file(found.repository, file.path, found.revision, "dataset")
    with os_error_as_user_error(path, "read"):
        size, changed = path.stat().st_size, path.stat().st_mtime_ns
        if size == file.size and (not file.sha256 or _checksum(path, size, changed) == file.sha256):
            return path
    with os_error_as_user_error(path, "remove"):
        path.resolve().unlink()
        path.unlink(missing_ok=True)
    fault = f"{size:,} of {file.size:,} bytes, or a wrong checksum"
    raise UserError(f"{found.repository}: {file.path} arrived damaged ({fault}) and was removed: try again")


def remote(found: Listing, file: HubFile) -> Remote:
    """A file that is read over the network (by the hub's own file system, HfFileSystem), at the commit of the listing."""
    address = f"{found.repository}@{found.revision.replace('/', '%2F')}/{file.path}"
    return Remote(f"hf://datasets/{address}", file.size, file.sha256, (("endpoint", hub_endpoint()),))


@lru_cache(maxsize=256)
def _checksum(path: Path, size: int, changed: int) -> str:
    """A file's SHA-256, cached until its size or modification time changes: gigabytes are opened several times."""
    return file_sha256(path)


def hub_library(name: str) -> Any:
    """An attribute of `huggingface_hub`, or an error that names the extra to install."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"the hub needs the package huggingface_hub: {EXTRA}, or use local files") from error
    return getattr(huggingface_hub, name)


def hub_endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def call_hub(what: str, call: Callable[[], Any]) -> Any:
    """Call the library, turning its errors into one line about `what`."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.GatedRepoError as error:
        raise UserError(f"{what}: is gated: accept its terms at {hub_endpoint()}, then set HF_TOKEN") from error
    except errors.RevisionNotFoundError:
        raise
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{what}: does not exist on the hub, or is private: check the name, or set HF_TOKEN") from error
    except errors.HFValidationError as error:
        raise UserError(f"{what}: is not a valid repository name") from error
    except Exception as error:  # the classes of its HTTP client differ between versions
        first = error.__cause__ or error  # the library wraps the original error in advice
        reason = " ".join(str(first).split())[:160] or type(first).__name__
        remedy = "check the connection and retry, or use local files"
        raise UserError(f"{what}: cannot be downloaded from {hub_endpoint()} ({reason}): {remedy}") from error


def hub_file(repository: str, path: str, revision: str | None, kind: str) -> Path:
    """Local path of one file of a repository, downloaded if it is not cached; `kind` is 'model' or 'dataset'."""
    download = hub_library("hf_hub_download")
    options = {"repo_type": kind, "revision": revision, "endpoint": hub_endpoint()}
    return Path(call_hub(f"{repository}/{path}", lambda: download(repository, path, **options)))


def _request_listing(repository: str, config: str, split: str) -> Listing:
    api = hub_library("HfApi")(endpoint=hub_endpoint())
    info = call_hub(f"hf:{repository}", lambda: api.dataset_info(repository))
    files = _tree(api, repository, info.sha)
    card = info.card_data.to_dict() if info.card_data is not None else {}
    configs = [entry for entry in card.get("configs") or [] if isinstance(entry, dict) and entry.get("data_files")]
    chosen = _listed_in_card(configs, config, split, files) if configs else _conventionally_named(config, split, files)
    if chosen:
        return Listing(repository, info.sha, config, split, tuple(chosen))
    return _converted(api, repository, config, split, [str(entry.get("config_name")) for entry in configs])


def _tree(api: Any, repository: str, revision: str) -> list[HubFile]:
    options = {"repo_type": "dataset", "revision": revision, "recursive": True}
    entries = call_hub(f"hf:{repository}", lambda: list(api.list_repo_tree(repository, **options)))
    files = sorted((entry for entry in entries if hasattr(entry, "blob_id")), key=lambda file: file.path)
    return [HubFile(file.path, file.size, file.lfs.sha256 if file.lfs else "") for file in files]


def _listed_in_card(configs: list[dict[str, Any]], config: str, split: str, files: list[HubFile]) -> list[HubFile]:
    """The files that the card lists; none if their format is not supported."""
    wanted = config or "default"
    named = [entry for entry in configs if entry.get("config_name") == wanted or (not config and entry.get("default"))]
    if config and not named:
        return []
    entry = (named or configs)[0]
    folder = str(entry.get("data_dir") or "").strip("/")
    patterns = [f"{folder}/{pattern}" if folder else pattern for pattern in _patterns(entry["data_files"], split)]
    chosen = _matching(files, patterns)
    return chosen if all(file.path.endswith(_SUFFIXES) for file in chosen) else []


def _patterns(data_files: Any, split: str) -> list[str]:
    """The patterns of one split in a card's `data_files`: a pattern, a list of patterns, or a list of {split, path}."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    found: list[str] = []
    for entry in entries:
        path, of = (entry.get("path"), entry.get("split", "train")) if isinstance(entry, Mapping) else (entry, "train")
        if of == split:
            found += [str(one) for one in (path if isinstance(path, list) else [path])]
    return [pattern.removeprefix("./") for pattern in found]


def _conventionally_named(config: str, split: str, files: list[HubFile]) -> list[HubFile]:
    prefix = f"{config}/" if config and config != "default" else ""
    candidates = (_matching(files, [prefix + pattern.format(split)]) for pattern in _CONVENTIONAL)
    return next(filter(None, candidates), [])


def _matching(files: list[HubFile], patterns: list[str]) -> list[HubFile]:
    regexes = [re.compile(_glob(pattern)) for pattern in patterns]
    return [file for file in files if any(regex.fullmatch(file.path) for regex in regexes)]


def _glob(pattern: str) -> str:
    """A regular expression for a pattern in which `*` stays within a folder and `**` crosses folders."""
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}

    def translate(part: str) -> str:
        if part[:1] == "[" and part[-1:] == "]":
            return fnmatch.translate(part)[4:-3]
        return special.get(part) or re.escape(part)

    return "".join(map(translate, re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]*\])", pattern)))


def _converted(api: Any, repository: str, config: str, split: str, known: list[str]) -> Listing:
    """The split in the hub's own Parquet conversion."""
    from huggingface_hub import errors

    try:
        info = call_hub(f"hf:{repository}", lambda: api.dataset_info(repository, revision=_CONVERTED))
        files = _tree(api, repository, info.sha)
    except errors.RevisionNotFoundError:
        _raise_missing(repository, "configuration or split", f"{config or 'default'}:{split}", known)
    configs = sorted({file.path.split("/")[0] for file in files if file.path.count("/") >= 2})
    if not config:
        config = "default" if "default" in configs else configs[0] if len(configs) == 1 else ""
    if config not in configs:
        _raise_missing(repository, "configuration", config or "default", configs)
    inside = [file for file in files if file.path.startswith(f"{config}/") and file.path.endswith(".parquet")]
    splits = sorted({file.path.split("/")[1] for file in inside})
    if split not in splits and f"partial-{split}" in splits:
        part = f"hf:{repository}:{config}:partial-{split}"
        fault = "the hub has converted only the first part to Parquet"
        raise UserError(f"hf:{repository}: {fault}: use it with {part}, or choose another copy of the dataset")
    if split not in splits:
        _raise_missing(repository, "split", split, splits)
    chosen = tuple(file for file in inside if file.path.split("/")[1] == split)
    return Listing(repository, info.sha, config, split, chosen)


def _raise_missing(repository: str, what: str, name: str, names: list[str]) -> NoReturn:
    available = f"; it has {', '.join(names[:12])}" if names else " in Parquet or JSON Lines"
    fault = f"has no {what} {name!r}{closest(name, names)}{available}"
    raise UserError(f"hf:{repository}: {fault}: specify one as hf:NAME:CONFIG:SPLIT:FIELD")
