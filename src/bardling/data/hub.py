"""Files of the Hugging Face hub: which ones make up a dataset, and fetching them checked.

`huggingface_hub` does the talking, so that its cache, its resumed downloads and its environment (HF_ENDPOINT, HF_TOKEN,
HF_HOME, HF_HUB_OFFLINE) hold here too. A dataset is found in this order: the files that its card names for the
configuration and split; files that are called as is usual (`data/train-*.parquet`); the copy that the hub itself makes of
datasets in other formats (branch `refs/convert/parquet`, folders CONFIG/SPLIT). What was found is kept under
$BARDLING_CACHE/hub with the commit, so that the same name stays the same text, and later runs need no network for it.

No code of a dataset is ever run. Limits: Parquet and JSON Lines (also gzipped). Of large datasets in other formats the hub
converts only a first part, which is taken only when it is asked for by its name, `partial-train`.
"""

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from bardling.data.download import cache_root, file_sha256
from bardling.data.gpt2bpe import GPT2_DIGEST, vocabulary_digest
from bardling.errors import UserError, closest
from bardling.files import told_plainly, write_whole

EXTRA = "pip install 'bardling[datasets]'"
SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")
_CONVERTED = "refs/convert/parquet"
_USUAL = ("data/{0}-*.parquet", "{0}-*.parquet", "data/{0}.parquet", "{0}.parquet", "data/{0}/*.parquet", "{0}/*.parquet")
_GPT2_REPOSITORIES = ("openai-community/gpt2", "gpt2")

Result = TypeVar("Result")


@dataclass(frozen=True)
class HubFile:
    """One file: its path in the repository, its bytes, and its SHA-256 where the hub knows it."""

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
    """What a dataset's split consists of; asked of the hub once, then kept.

    Args:
        repository: NAME or OWNER/NAME.
        config: the configuration; empty takes the default one.
        split: such as 'train'.

    Raises:
        UserError: if there is no such dataset, configuration or split, or the hub cannot be asked.
    """
    key = hashlib.sha256(json.dumps([_endpoint(), repository, config, split]).encode()).hexdigest()[:16]
    kept = cache_root() / "hub" / f"{repository.replace('/', '--')}-{key}.json"
    if kept.is_file():
        with told_plainly(kept, "read"):
            data = kept.read_bytes()
        try:
            content = json.loads(data)
            return Listing(**{**content, "files": tuple(HubFile(**file) for file in content["files"])})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{kept}: is damaged: remove it, and the hub is asked again") from error
    found = _ask(repository, config, split)
    with told_plainly(kept, "write"):
        kept.parent.mkdir(parents=True, exist_ok=True)
    write_whole(kept, json.dumps(asdict(found), indent=1).encode())
    return found


def fetch(found: Listing, file: HubFile) -> Path:
    """The path of a file on this machine; downloaded and checked if it is not there yet.

    Raises:
        UserError: if it cannot be had, or is not what the hub's list says; a wrong one is removed.
    """
    path = _get(found.repository, file.path, found.revision, "dataset")
    with told_plainly(path, "read"):
        size, changed = path.stat().st_size, path.stat().st_mtime_ns
        sound = size == file.size and (not file.sha256 or _sum_of(path, size, changed) == file.sha256)
    if not sound:
        with told_plainly(path, "remove"):
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        raise UserError(
            f"{found.repository}: {file.path} came damaged ({size:,} of {file.size:,} bytes, or a wrong checksum) and was "
            "removed: try again"
        )
    return path


@lru_cache(maxsize=256)
def _sum_of(path: Path, size: int, changed: int) -> str:
    """A file's checksum, worked out once as long as it does not change: some are gigabytes and are opened several times."""
    return file_sha256(path)


def gpt2_tokenizer_file() -> Path:
    """GPT-2's `tokenizer.json`, from the hub's cache on this machine or from the hub.

    Raises:
        UserError: if it cannot be had, or has another vocabulary than GPT-2's.
    """
    from_cache = _library("try_to_load_from_cache")
    found = (from_cache(repository, "tokenizer.json") for repository in _GPT2_REPOSITORIES)
    cached = next((path for path in found if isinstance(path, str)), None)
    try:
        path = Path(cached) if cached else _get(_GPT2_REPOSITORIES[0], "tokenizer.json", None, "model")
    except UserError as error:
        raise UserError(
            f"data.tokenizer = 'gpt2': {error}; or name a copy of GPT-2's tokenizer.json: --data.tokenizer PATH/tokenizer.json"
        ) from error
    if not _is_gpt2(path):
        raise UserError(
            f"{path}: is not GPT-2's tokenizer: remove it, or name another with --data.tokenizer PATH/tokenizer.json"
        )
    return path


def _is_gpt2(path: Path) -> bool:
    with told_plainly(path, "read"):
        data = path.read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and vocabulary_digest(content) == GPT2_DIGEST


def _library(name: str) -> Any:
    """A name of `huggingface_hub`, or an error that says how to install it."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"the Hugging Face hub needs the package huggingface_hub: {EXTRA}, or use local files") from error
    return getattr(huggingface_hub, name)


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _asked(what: str, call: Callable[[], Result]) -> Result:
    """Call the library and turn its errors into one line."""
    _library("HfApi")
    from huggingface_hub import errors

    try:
        return call()
    except errors.GatedRepoError as error:
        raise UserError(f"{what}: its owner asks for consent: give it at {_endpoint()}, then set HF_TOKEN") from error
    except errors.RevisionNotFoundError:
        raise
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{what}: the hub has none of that name, or it is private: check the name, or set HF_TOKEN") from error
    except errors.HFValidationError as error:
        raise UserError(f"{what}: is no name that the hub could have") from error
    except Exception as error:  # its transport has kinds of its own, which differ between its versions
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"{what}: {_endpoint()} does not serve it ({reason}): check the connection and try again, or use local files"
        ) from error


def _get(repository: str, path: str, revision: str | None, kind: str) -> Path:
    download = _library("hf_hub_download")
    return Path(
        _asked(
            f"{repository}/{path}",
            lambda: download(repository, path, repo_type=kind, revision=revision, endpoint=_endpoint()),
        )
    )


def _ask(repository: str, config: str, split: str) -> Listing:
    api = _library("HfApi")(endpoint=_endpoint())
    info = _asked(f"hf:{repository}", lambda: api.dataset_info(repository))
    files = _tree(api, repository, info.sha)
    card = info.card_data.to_dict() if info.card_data is not None else {}
    configs = [entry for entry in card.get("configs") or [] if isinstance(entry, dict) and entry.get("data_files")]
    chosen = _named_by_card(configs, config, split, files) if configs else _called_as_usual(config, split, files)
    if chosen:
        return Listing(repository, info.sha, config, split, tuple(chosen))
    known = [str(entry.get("config_name")) for entry in configs]
    return _converted(api, repository, config, split, known)


def _tree(api: Any, repository: str, revision: str) -> list[HubFile]:
    def call() -> list[HubFile]:
        entries = api.list_repo_tree(repository, repo_type="dataset", revision=revision, recursive=True)
        files = [entry for entry in entries if hasattr(entry, "blob_id")]
        return [HubFile(file.path, file.size, file.lfs.sha256 if file.lfs else "") for file in files]

    return sorted(_asked(f"hf:{repository}", call), key=lambda file: file.path)


def _named_by_card(configs: list[dict[str, Any]], config: str, split: str, files: list[HubFile]) -> list[HubFile]:
    """The files that the card names; none if they are in a format that is not read here."""
    entry = _default(configs) if not config else next((one for one in configs if one.get("config_name") == config), None)
    if entry is None:
        return []
    patterns = _patterns(entry["data_files"], split)
    folder = str(entry.get("data_dir") or "").strip("/")
    matches = [re.compile(_glob(f"{folder}/{pattern}" if folder else pattern)) for pattern in patterns]
    chosen = [file for file in files if any(match.fullmatch(file.path) for match in matches)]
    return chosen if all(file.path.endswith(SUFFIXES) for file in chosen) else []


def _default(configs: list[dict[str, Any]]) -> dict[str, Any]:
    marked = [entry for entry in configs if entry.get("default") or entry.get("config_name") == "default"]
    return (marked or configs)[0]


def _patterns(data_files: Any, split: str) -> list[str]:
    """The patterns of one split in a card's `data_files`: a pattern, a list of them, or a list with a split for each."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    found: list[str] = []
    for entry in entries:
        path, of = (entry.get("path"), entry.get("split", "train")) if isinstance(entry, Mapping) else (entry, "train")
        if of == split:
            found += [str(one) for one in (path if isinstance(path, list) else [path])]
    return [pattern.removeprefix("./") for pattern in found]


def _called_as_usual(config: str, split: str, files: list[HubFile]) -> list[HubFile]:
    prefix = f"{config}/" if config and config != "default" else ""
    for pattern in _USUAL:
        match = re.compile(_glob(prefix + pattern.format(split)))
        if chosen := [file for file in files if match.fullmatch(file.path)]:
            return chosen
    return []


def _glob(pattern: str) -> str:
    """A regular expression for a pattern in which `*` stays within a folder and `**` does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]*\])", pattern)
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        special.get(part) or (fnmatch.translate(part)[4:-3] if part[:1] == "[" and part[-1:] == "]" else re.escape(part))
        for part in parts
    )


def _converted(api: Any, repository: str, config: str, split: str, known: list[str]) -> Listing:
    """The split in the hub's own Parquet copy."""
    from huggingface_hub import errors

    try:
        info = _asked(f"hf:{repository}", lambda: api.dataset_info(repository, revision=_CONVERTED))
        files = _tree(api, repository, info.sha)
    except errors.RevisionNotFoundError:
        _not_there(repository, "configuration or split", f"{config or 'default'}:{split}", known)
    configs = sorted({file.path.split("/")[0] for file in files if file.path.count("/") >= 2})
    if not config:
        config = "default" if "default" in configs else configs[0] if len(configs) == 1 else ""
    if config not in configs:
        _not_there(repository, "configuration", config or "default", configs)
    inside = {file for file in files if file.path.startswith(f"{config}/") and file.path.endswith(".parquet")}
    chosen = tuple(sorted((f for f in inside if f.path.split("/")[1] == split), key=lambda file: file.path))
    splits = sorted({file.path.split("/")[1] for file in inside})
    if not chosen and f"partial-{split}" in splits:
        raise UserError(
            f"hf:{repository}: the hub has only the first part of it as Parquet: take that with "
            f"hf:{repository}:{config}:partial-{split}, or name another copy of the dataset"
        )
    if not chosen:
        _not_there(repository, "split", split, splits)
    return Listing(repository, info.sha, config, split, chosen)


def _not_there(repository: str, what: str, name: str, names: list[str]) -> NoReturn:
    have = f"; it has {', '.join(names[:12])}" if names else ", as Parquet or JSON Lines"
    raise UserError(
        f"hf:{repository}: has no {what} {name!r}{closest(name, names)}{have}: name one as hf:NAME:CONFIG:SPLIT:FIELD"
    )
