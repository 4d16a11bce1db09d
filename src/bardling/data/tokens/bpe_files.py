"""Tokenizers without a `tokenizer.json`: the pair `vocab.json` and `merges.txt` of a byte-level BPE.

The pair holds only the BPE. How text is normalized and split before it is decided by the tokenizer's class, so the class has to
be known: it is named in `tokenizer_config.json`, or follows from the model type in `config.json`. For the classes listed here
the result is what `transformers` builds; any other class, and any other file format, is refused by name.

Limits: files of up to 64 MiB. Special tokens that do not follow the vocabulary without gaps are refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from bardling.data.tokens.vocabulary import EOT
from bardling.errors import UserError
from bardling.files.reading import read_json_object, read_small_bytes

UNREAD_TOKENIZERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "tekken.json", "qwen.tiktoken")
"""Files of tokenizers that only other software reads."""
_CONFIG = "tokenizer_config.json"
_MAX_BYTES = 64 << 20
_CLASSES: dict[str, Literal["gpt2", "qwen"]] = {"GPT2Tokenizer": "gpt2", "Qwen2Tokenizer": "qwen"}
_MODELS: dict[Any, Literal["gpt2", "qwen"]] = {None: "gpt2", "gpt2": "gpt2", "qwen3": "qwen"}
"""By the `model_type` of a folder that names no class; None: without a `config.json`, as beside a nanoGPT checkpoint."""
_QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED = ("extra_special_tokens", "additional_special_tokens")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer in a format that is read: a `tokenizer.json`, or a `vocab.json` and a `merges.txt`."""
    return (folder / "tokenizer.json").is_file() or _has_pair(folder)


def _has_pair(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))


def missing_tokenizer(folder: Path) -> str:
    """Why a folder without a tokenizer that is read has none, and what to do about it, on one line."""
    found = [name for name in (*UNREAD_TOKENIZERS, "vocab.json", "merges.txt") if (folder / name).is_file()]
    if not found:
        return f"{folder}: has no tokenizer: copy the model's tokenizer.json there"
    return f"{folder / found[0]}: a tokenizer in this format is not read, without a tokenizer.json: {_conversion(folder)}"


def refuse_other_format(path: Path) -> None:
    """Raise a `UserError` if the file `path` belongs to a tokenizer in another format than `tokenizer.json`."""
    folder = path.parent
    if path.name in ("vocab.json", "merges.txt"):
        whole = _has_pair(folder) or (folder / "tokenizer.json").is_file()
        remedy = f"name the folder instead, {folder}" if whole else _conversion(folder)
        raise UserError(f"{path}: is only one of the files of a tokenizer: {remedy}")
    if path.name in UNREAD_TOKENIZERS:
        found = folder / "tokenizer.json"
        remedy = f"name {found} instead" if found.is_file() else _conversion(folder)
        raise UserError(f"{path}: a tokenizer in this format is not read: {remedy}")


def _conversion(folder: Path) -> str:
    remedy = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    return f"convert it with transformers (which may need the package sentencepiece): {remedy}"


def pair_content(folder: Path) -> dict[str, Any]:
    """The `tokenizer.json` of a folder that has a `vocab.json` and a `merges.txt` instead."""
    if not _has_pair(folder):
        raise UserError(missing_tokenizer(folder))
    try:
        content: dict[str, Any] = json.loads(_build(folder, _class(folder)).to_str())
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (the library raises nothing more specific)
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{folder}: vocab.json and merges.txt do not form a tokenizer ({reason})") from None
    return content


def _build(folder: Path, kind: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    config, vocabulary, merges = _json(folder / _CONFIG), _vocabulary(folder / "vocab.json"), _merges(folder / "merges.txt")
    library = Tokenizer(models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False))
    library.decoder = decoders.ByteLevel()
    spaced = bool(config.get("add_prefix_space", False))
    if kind == "gpt2":
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    else:
        words = pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated", invert=False)
        characters = pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=False)
        library.normalizer = normalizers.NFC()
        library.pre_tokenizer = pre_tokenizers.Sequence([words, characters])
    _add_tokens(library, folder, config, kind)
    return library


def _class(folder: Path) -> Literal["gpt2", "qwen"]:
    """What surrounds the BPE, from the name of the tokenizer's class or the type of the model."""
    values = _json(folder / "config.json")
    name = _json(folder / _CONFIG).get("tokenizer_class") or values.get("tokenizer_class")
    if name is None:
        kind = values.get("model_type")
        if isinstance(kind, str | None) and kind in _MODELS:
            return _MODELS[kind]
        raise UserError(
            f"{folder}: vocab.json and merges.txt do not say how text is split for model_type = {kind!r}: {_conversion(folder)}"
        )
    if not isinstance(name, str) or name.removesuffix("Fast") not in _CLASSES:
        raise UserError(
            f"{folder / _CONFIG}: tokenizer_class = {name!r} is not supported without a tokenizer.json: {_conversion(folder)}"
        )
    return _CLASSES[name.removesuffix("Fast")]


def _json(path: Path) -> dict[str, Any]:
    return read_json_object(path, limit=_MAX_BYTES) if path.is_file() else {}


def _vocabulary(path: Path) -> dict[str, int]:
    vocabulary = read_json_object(path, limit=_MAX_BYTES)
    for token, index in vocabulary.items():
        if type(index) is not int or not 0 <= index < 1 << 24:
            raise UserError(f"{path}: {token[:40]!r} has the id {index!r:.40}: must be an integer from 0 to 2^24 - 1")
    return vocabulary


def _merges(path: Path) -> list[tuple[str, str]]:
    try:
        text = read_small_bytes(path, limit=_MAX_BYTES).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    merges = []
    # Only newlines end a line: other characters that Python takes for line ends occur within tokens.
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise UserError(f"{path}: line {number}: {line[:40]!r} is not two tokens separated by a space")
        merges.append((parts[0], parts[1]))
    return merges


def _add_tokens(library: Any, folder: Path, config: dict[str, Any], kind: str) -> None:
    """Add the special tokens, in the order of `transformers`: those with an id, then the named ones."""
    listed = config.get("added_tokens_decoder")
    given = config if listed is not None else {**config, **_json(folder / "special_tokens_map.json")}
    named: dict[str, Any] = {**dict.fromkeys(_NAMED), "unk_token": EOT, "eos_token": EOT}
    named |= {"bos_token": EOT} if kind == "gpt2" else {"pad_token": EOT}
    named |= {key: given[key] for key in _NAMED if key in given}
    special = [token for token in (*named.values(), *_several(given)) if token is not None]
    names = {_content(token, folder) for token in special}
    if listed is None:
        tokens = _json(folder / "added_tokens.json").items()
        numbered = [(index, {"content": name, "normalized": name not in names}) for name, index in tokens]
    elif isinstance(listed, dict):
        numbered = list(listed.items())
    else:
        raise UserError(f"{folder / _CONFIG}: added_tokens_decoder must be an object")
    wanted: list[tuple[int | None, Any]] = [(_index(key, folder), _added(token, folder, names)) for key, token in numbered]
    wanted.sort(key=lambda pair: pair[0] or 0)
    wanted += [(None, _added(token, folder, names)) for token in special]
    known: set[str] = set()
    for index, token in wanted:
        if token.content in known:
            continue
        known.add(token.content)
        library.add_tokens([token])
        found = library.token_to_id(token.content)
        if index not in (None, found):
            raise UserError(f"{folder}: the added token {token.content!r} has id {index}, but {found} follows from vocab.json")
    _set_template(library, config, named, folder)


def _set_template(library: Any, config: dict[str, Any], named: dict[str, Any], folder: Path) -> None:
    """Let the tokenizer begin or end texts with a special token, if it is configured to."""
    from tokenizers import processors

    ends = [named[key] if config.get(f"add_{key}") else None for key in ("bos_token", "eos_token")]
    if ends == [None, None]:
        return
    bos, eos = ("" if token is None else f"{_content(token, folder)}:0" for token in ends)
    tokens = [(name, library.token_to_id(name)) for name in (part.removesuffix(":0") for part in (bos, eos)) if name]
    library.post_processor = processors.TemplateProcessing(single=" ".join(f"{bos} $A:0 {eos}".split()), special_tokens=tokens)


def _several(given: dict[str, Any]) -> Iterator[Any]:
    for key in _LISTED:
        tokens = given.get(key)
        yield from tokens.values() if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else ()


def _index(key: object, folder: Path) -> int:
    digits = str(key)
    if digits.isascii() and digits.isdigit() and len(digits) <= 8:
        return int(digits)
    raise UserError(f"{folder}: an added token has the id {digits[:40]!r}, which is not a number of at most 8 digits")


def _content(token: object, folder: Path) -> str:
    name = token.get("content") if isinstance(token, dict) else token
    if not isinstance(name, str) or not name:
        raise UserError(f"{folder}: {str(token)[:80]!r} is not a special token: must be a string or an object with 'content'")
    return name


def _added(token: Any, folder: Path, names: set[str]) -> Any:
    """A token to add; `names` are those of the special ones."""
    from tokenizers import AddedToken

    name, options = _content(token, folder), token if isinstance(token, dict) else {}
    flags = {key: bool(options[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in options}
    return AddedToken(name, special=name in names or bool(options.get("special", False)), **flags)
