"""The `tokenizers` library behind `Tokenizer`: loading a file's content, errors, and control tokens, which text never becomes.

The library can leave special tokens in a text alone, but it still parses added tokens that are not marked as special, and
models that look up whole words find control tokens in their vocabulary. For such tokenizers, text is encoded by a copy whose
control tokens have names that no text contains; everything else, ids included, stays the same.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from bardling.errors import UserError

_MARKUP = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn an error or panic of the library, which is no `Exception`, into a `UserError` that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(f"{what} ({' '.join(str(error).split())[:200]})") from error
        raise


def load_library(content: Mapping[str, Any], name: str) -> Any:
    """The library's tokenizer with the `content` of a `tokenizer.json`, which errors call `name`."""
    from tokenizers import Tokenizer as Library

    with library_errors(f"{name}: is not a readable tokenizer"):
        return Library.from_str(json.dumps(content))


def is_control(added: Mapping[str, Any]) -> bool:
    """Whether an added token controls the model instead of being text: it is special, or looks like markup."""
    return bool(added.get("special")) or _MARKUP.fullmatch(added["content"]) is not None


def text_reaches_control_tokens(content: Mapping[str, Any]) -> bool:
    """Whether ordinary text could be encoded as control tokens although the library leaves special tokens alone."""
    control = [entry for entry in content.get("added_tokens") or () if is_control(entry)]
    model, names = content["model"], {entry["content"] for entry in control}
    if not all(entry.get("special") for entry in control):
        return True
    if model.get("merges") is not None and not model.get("ignore_merges"):
        return bool(names) and any("".join(_pair(merge)) in names for merge in model["merges"])
    vocab = model.get("vocab") or {}
    return not names.isdisjoint(vocab if isinstance(vocab, dict) else [entry[0] for entry in vocab])


def with_unwritable_names(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer with control tokens that no text can contain (U+FDD0 and U+FDD1 are not characters)."""
    names = {entry["content"] for entry in content.get("added_tokens") or () if is_control(entry)}
    new = {name: f"\ufdd0{number}\ufdd1" for number, name in enumerate(sorted(names))}
    model = dict(content["model"])
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {new.get(token, token): index for token, index in model["vocab"].items()}
    elif model.get("vocab"):
        model["vocab"] = [[new.get(token, token), score] for token, score in model["vocab"]]
    if model.get("merges"):
        pairs = map(_pair, model["merges"])
        model["merges"] = [pair for pair in pairs if names.isdisjoint([*pair, "".join(pair)])]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = new.get(model["unk_token"], model["unk_token"])
    added = [{**entry, "content": new.get(entry["content"], entry["content"])} for entry in content.get("added_tokens") or ()]
    return {**content, "model": model, "added_tokens": added}


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge
