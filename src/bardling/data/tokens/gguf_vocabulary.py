"""Tokenizers in the metadata of a GGUF file (`tokenizer.ggml.*`, `tokenizer.chat_template`), and back.

llama.cpp knows a few kinds of vocabulary. A byte-level BPE is 'gpt2': tokens, merges, and the name of a list of regular
expressions that split a text (`_SPLITS`). A SentencePiece BPE is 'llama': tokens with scores, from which the merges follow.
Characters are 'rwkv', which takes the longest token at each place, so that each character is a token. A tokenizer that none
of these expresses is refused with the reason, because llama.cpp would encode texts differently.

Limits: llama.cpp does not normalize text to NFC, which Qwen's tokenizer does; it always parses special tokens in prompts; and
it refuses text with characters outside the vocabulary, where a SentencePiece BPE without byte tokens has its unknown token.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bardling.data.tokens.library import is_control, library_errors
from bardling.data.tokens.text_interface import MAX_TEMPLATE_BYTES, TextFiles
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.data.tokens.vocabulary import ANY_CHARACTER
from bardling.errors import UserError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN = _WORDS.replace("{DIGITS}", "{1,3}"), _WORDS.replace("{DIGITS}", "")
_DIGIT = r"\p{N}"
_SPLITS: dict[str, tuple[tuple[str, ...], bool]] = {  # tokenizer.ggml.pre: patterns in order, ignore_merges
    "gpt-2": ((_GPT2,), False),
    "smollm": ((_DIGIT, _GPT2), False),
    "llama-bpe": ((_LLAMA3,), True),
    "smaug-bpe": ((_LLAMA3,), False),
    "qwen2": ((_QWEN,), False),
    "default": ((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), False),
}
_ALIASES = {
    **dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "gigachat", "modern-bert"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral"), "llama-bpe"),
    **dict.fromkeys(("dbrx",), "smaug-bpe"),
    **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan"), "qwen2"),
}
_NORMAL, _UNKNOWN, _CONTROL, _WORD, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"  # SentencePiece's mark for a space
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_LONGEST_PIECE = 512  # characters of a SentencePiece token
_NO_MERGE = "\ufdd0 \ufdd1"  # llama.cpp requires merges; no text contains these two
_ESCAPES = {"\\": r"\\", "\n": r"\n", "\t": r"\t", "\r": r"\r"}
_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}
_KEY = "tokenizer.ggml."


def vocabulary_metadata(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The metadata of a tokenizer for a model with `rows` rows; a `UserError` if llama.cpp has nothing that equals it."""
    content, about = tokenizer.content, tokenizer.interface
    if tokenizer.vocab_size > rows:
        raise _refusal(f"it has {tokenizer.vocab_size:,} tokens, but the model only {rows:,}")
    if about.start not in ((), (about.bos,)):
        raise _refusal(f"it begins texts with the tokens {list(about.start)}, and llama.cpp only with bos_token")
    spm = tokenizer.kind == "other" and (content.get("model") or {}).get("byte_fallback")
    kind = "rwkv" if tokenizer.kind == "char" else "gpt2" if tokenizer.kind in ("byte", "bpe") else "llama" if spm else ""
    if not kind:
        raise _refusal("it is neither a byte-level BPE, nor a SentencePiece BPE with byte fallback, nor of characters")
    if not about.eos and kind != "rwkv":
        raise _refusal("it has no end-of-text token, and llama.cpp would take another token for it")
    metadata: dict[str, Any] = {f"{_KEY}model": kind, **_tokens(tokenizer, rows, kind)}
    if kind == "gpt2":
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"].get("merges") or ()]
        metadata |= {f"{_KEY}pre": _split_name(content, bool(merges)), f"{_KEY}merges": merges or [_NO_MERGE]}
    elif kind == "llama":
        metadata |= {f"{_KEY}scores": _scores(tokenizer, rows), f"{_KEY}add_space_prefix": _adds_space(content)}
    ids = dict(zip(_IDS.values(), (about.first, next(iter(about.eos), None), about.pad, about.unk), strict=True))
    metadata |= {f"{_KEY}{key}": index for key, index in ids.items() if index is not None and index < rows}
    if len(about.eos) > 1:
        metadata[f"{_KEY}eot_token_id"] = about.eos[1]
    metadata |= {f"{_KEY}add_bos_token": bool(about.start), f"{_KEY}add_eos_token": False}
    if about.chat_template:
        metadata["tokenizer.chat_template"] = about.chat_template
    return metadata


def _refusal(reason: str) -> UserError:
    return UserError(f"llama.cpp cannot express the tokenizer: {reason}: export with --format hf instead")


def _ids(content: Mapping[str, Any]) -> dict[str, int]:
    """The id of each token, as the file writes it."""
    return {**content["model"]["vocab"], **{entry["content"]: entry["id"] for entry in content.get("added_tokens") or ()}}


def _tokens(tokenizer: Tokenizer, rows: int, kind: str) -> dict[str, Any]:
    """The tokens and their types, with a placeholder for each row that no text reaches."""
    added = {entry["content"]: is_control(entry) for entry in tokenizer.content.get("added_tokens") or ()}
    names, types = list[str](), list[int]()
    known = {index: token for token, index in _ids(tokenizer.content).items()}
    for index in range(rows):
        if (token := known.get(index)) is None:
            names.append(f"[PAD{index}]")
            types.append(_UNUSED)
            continue
        names.append("".join(_ESCAPES.get(letter, letter) for letter in token) if kind == "rwkv" else token)
        if kind == "llama" and index == tokenizer.interface.unk:
            types.append(_UNKNOWN)
        elif token in added:
            types.append(_CONTROL if added[token] else _WORD)
        else:
            types.append(_BYTE if kind == "llama" and _BYTE_TOKEN.fullmatch(token) else _NORMAL)
    return {f"{_KEY}tokens": names, f"{_KEY}token_type": types}


def _split_name(content: Mapping[str, Any], merges: bool) -> str:
    """The name in llama.cpp of how the text is split into words before merging."""
    splitter = content.get("pre_tokenizer") or {}
    steps, patterns = splitter.get("pretokenizers") or [splitter], list[str]()
    for step in steps:
        if step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [_GPT2] if step.get("use_regex", True) else []
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            patterns.append(_DIGIT)
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append((step.get("pattern") or {}).get("Regex", ""))
        else:
            raise _refusal(f"its pre-tokenizer has the step {str(step)[:80]}")
    normalizer = (content.get("normalizer") or {}).get("type")
    ignoring = bool(content["model"].get("ignore_merges"))
    found = next((name for name, known in _SPLITS.items() if known == (tuple(patterns), ignoring)), None)
    if normalizer not in (None, "NFC"):
        raise _refusal(f"it has the normalizer {normalizer}")
    if found is None and merges:
        raise _refusal(f"it splits words with {str(patterns)[:200]}{', and ignores merges' if ignoring else ''}")
    return found or "gpt-2"


def _adds_space(content: Mapping[str, Any]) -> bool:
    steps = content.get("normalizer") or {}
    steps = steps.get("normalizers") or ([steps] if steps else [])
    splitter = content.get("pre_tokenizer") or {}
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if (
        splitter.get("type") == "Metaspace"
        and not steps
        and splitter.get("replacement") == _SPACE
        and not splitter.get("split")
    ):
        return bool(splitter.get("prepend_scheme") != "never")
    if splitter or steps not in ([replaces], [{"type": "Prepend", "prepend": _SPACE}, replaces]):
        raise _refusal(f"its normalizer is {str(steps)[:120]}")
    return len(steps) == 2


def _scores(tokenizer: Tokenizer, rows: int) -> list[float]:
    """Scores with which llama.cpp merges in the order of the merges: that of a token is the place of its first merge.

    Runs of spaces share one, as in SentencePiece; whatever the order of their merges, they grow from the left.
    """
    scores, first, last = [0.0] * rows, dict[str, float](), ""
    ids = _ids(tokenizer.content)
    splits = dict[str, set[tuple[str, str]]]()
    for place, merge in enumerate(tokenizer.content["model"].get("merges") or (), 1):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        whole = left + right
        group = whole if whole.strip(_SPACE) else _SPACE
        if group != last and group in first:
            raise _refusal(f"the merges of {whole!r} are not in succession, as those of a SentencePiece BPE are")
        scores[ids[whole]], last = first.setdefault(group, -float(place)), group
        splits.setdefault(whole, set()).add((left, right))
    for whole, pairs in splits.items():
        if pairs != {pair for pair in _pairs(whole) if ids.keys() >= set(pair)}:
            raise _refusal(f"{whole!r} lacks one of the merges that a SentencePiece BPE has")
    return scores


def _pairs(token: str) -> list[tuple[str, str]]:
    return [(token[:cut], token[cut:]) for cut in range(1, len(token))]


def tokenizer_from_metadata(metadata: Mapping[str, Any], name: str) -> Tokenizer | None:
    """The tokenizer in the metadata of the file `name`; None if there is none, a `UserError` if it is of another kind."""
    kind = metadata.get(f"{_KEY}model", "none")
    if kind in ("none", "no_vocab"):
        return None
    builders = {"gpt2": _byte_level, "llama": _sentencepiece, "rwkv": _characters}
    if kind not in builders:
        raise UserError(f"{name}: {_KEY}model = {str(kind)[:40]!r}: only the vocabularies {', '.join(builders)} are read")
    tokens, types = _strings(metadata, "tokens", name), metadata.get(f"{_KEY}token_type")
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{name}: {_KEY}tokens has a token twice: the file is damaged")
    if types is None:
        types = [_NORMAL] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens) or not all(type(value) is int for value in types):
        raise UserError(f"{name}: {_KEY}token_type must have one integer for each of the {len(tokens):,} tokens")
    used = next((index + 1 for index in reversed(range(len(types))) if types[index] != _UNUSED), 0)
    tokens, types = tokens[:used], types[:used]  # further rows of the model are not tokens
    special = {key: _special(metadata, theirs, len(tokens), name) for key, theirs in _IDS.items()}
    with library_errors(f"{name}: has no valid tokenizer"):
        library = builders[kind](metadata, tokens, types, name)
        _add(library, tokens, types)
        starts = metadata.get(f"{_KEY}add_bos_token", kind == "llama" or _split_of(metadata) == "llama-bpe")
        if starts is True and (bos := special["bos_token"]) is not None:
            from tokenizers import processors

            first = tokens[bos]
            library.post_processor = processors.TemplateProcessing(single=[first, "$A"], special_tokens=[(first, bos)])
        content = json.loads(library.to_str())
    config = {key: tokens[index] for key, index in special.items() if index is not None}
    ends = [special["eos_token"], _special(metadata, "eot_token_id", len(tokens), name)]
    eos = list(dict.fromkeys(index for index in ends if index is not None))
    template = metadata.get("tokenizer.chat_template")
    if template is not None and (not isinstance(template, str) or len(template) > MAX_TEMPLATE_BYTES):
        raise UserError(f"{name}: tokenizer.chat_template is not a text of at most {MAX_TEMPLATE_BYTES:,} bytes")
    files = TextFiles(
        config={"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config},
        generation={"eos_token_id": eos} if len(eos) > 1 else {},
        template=template,
        folder=name,
    )
    return Tokenizer(content, name, files=files)


def _strings(metadata: Mapping[str, Any], key: str, name: str) -> list[str]:
    value = metadata.get(f"{_KEY}{key}")
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise UserError(f"{name}: {_KEY}{key} must be a list of texts: the file is damaged, or has no tokenizer")
    return value


def _special(metadata: Mapping[str, Any], key: str, size: int, name: str) -> int | None:
    value = metadata.get(f"{_KEY}{key}")
    if value is not None and (type(value) is not int or value < 0):
        raise UserError(f"{name}: {_KEY}{key} = {str(value)[:40]!r}: must be the number of a token")
    return value if value is not None and value < size else None


def _split_of(metadata: Mapping[str, Any]) -> str:
    pre = metadata.get(f"{_KEY}pre", "default")
    return _ALIASES.get(str(pre), str(pre))


def _add(library: Any, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Register the control tokens and added words, whose ids follow from the vocabulary or from their order."""
    from tokenizers import AddedToken

    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _UNKNOWN, _WORD):
            library.add_tokens([AddedToken(token, special=kind != _WORD, normalized=False)])


def _vocabulary(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """The tokens with ids, without the added ones at the end."""
    last = len(tokens)
    while last and types[last - 1] in (_CONTROL, _WORD):
        last -= 1
    return {token: index for index, token in enumerate(tokens[:last])}


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], name: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    split = _split_of(metadata)
    if split not in _SPLITS:
        raise UserError(
            f"{name}: {_KEY}pre = {split[:40]!r}: how it splits text is not known here; known: {', '.join(_SPLITS)}"
        )
    merges: Any = [tuple(merge.split(" ", 1)) for merge in _strings(metadata, "merges", name) if merge != _NO_MERGE]
    patterns, ignoring = _SPLITS[split]
    library = Tokenizer(models.BPE(_vocabulary(tokens, types), merges, fuse_unk=False, ignore_merges=ignoring))
    if patterns == (_GPT2,):
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif patterns == (_DIGIT, _GPT2):
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        library.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        library.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split == "qwen2":
        library.normalizer = normalizers.NFC()
    library.decoder = decoders.ByteLevel()
    return library


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], name: str) -> Any:
    """A BPE whose merges are all splits of each token into two others, in the order of the scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get(f"{_KEY}scores")
    if not isinstance(scores, list) or len(scores) < len(tokens) or not all(type(score) is float for score in scores):
        raise UserError(f"{name}: {_KEY}scores must have a number for each of the {len(tokens):,} tokens")
    plain = {token: index for index, token in enumerate(tokens) if types[index] == _NORMAL}
    if (longest := max(map(len, plain), default=0)) > _LONGEST_PIECE:
        raise UserError(f"{name}: {_KEY}tokens has a token of {longest:,} characters; the limit is {_LONGEST_PIECE}")
    pairs = [
        (left, right, plain[token]) for token in plain for left, right in _pairs(token) if left in plain and right in plain
    ]
    pairs.sort(key=lambda pair: (-scores[pair[2]], -len(pair[0]), -len(pair[1])))  # ties as in transformers
    unknown = _special(metadata, "unknown_token_id", len(tokens), name)
    model = models.BPE(
        {token: index for index, token in enumerate(tokens)},
        [pair[:2] for pair in pairs],
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    library, adds_space = Tokenizer(model), metadata.get(f"{_KEY}add_space_prefix", True) is True
    replace = normalizers.Replace(" ", _SPACE)
    library.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if adds_space else replace
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if adds_space else steps)
    return library


def _characters(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], name: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = {escaped: letter for letter, escaped in _ESCAPES.items()}
    plain = {letters.get(token, token): index for token, index in _vocabulary(tokens, types).items()}
    if any(len(token) != 1 for token in plain):
        raise UserError(f"{name}: {_KEY}model = 'rwkv': only vocabularies of single characters are read")
    library = Tokenizer(models.WordLevel(plain))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(ANY_CHARACTER), "isolated")
    library.decoder = decoders.Fuse()
    return library
