"""Small tokenizers of every kind that models come with, as folders that AutoTokenizer opens, and references for their ids."""

import json
import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

BYTE_LEVEL = sorted(pre_tokenizers.ByteLevel.alphabet())
LETTERS = string.ascii_letters + string.digits + ".,!?'<>|_/[]"
KINDS = ("byte-level", "llama", "metaspace", "unigram", "wordpiece", "wordlevel")


def merged(rng: random.Random, alphabet: Sequence[str], count: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary and merges of random pairs, each of which is a new token."""
    vocabulary, merges = list(alphabet), []
    known = set(vocabulary)
    letters = [token for token in alphabet if token.isalpha() or token in "\u2581\u0120"]
    for _ in range(count):
        recent = letters + vocabulary[len(alphabet) :]
        left, right = rng.choice(recent), rng.choice(recent)
        if (token := left + right) not in known and "\u2581" not in right and "\u0120" not in right:
            merges.append((left, right))
            vocabulary.append(token)
            known.add(token)
    return {token: index for index, token in enumerate(vocabulary)}, merges


def words(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices("etaoinshr", k=rng.randint(1, 5))) for _ in range(count)]


def llama_decoder() -> Any:
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(steps)


def library(kind: str, seed: int = 0, special: Sequence[str] = ("<unk>", "<s>", "</s>"), **options: Any) -> Any:
    """A tokenizer of a kind whose first tokens are `special`; `options`: fallback (byte tokens), scheme (of Metaspace)."""
    rng = random.Random(f"{kind} {seed}")
    if kind == "byte-level":
        made = Tokenizer(models.BPE(*merged(rng, [*special, *BYTE_LEVEL], 60)))
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif kind in ("llama", "metaspace"):
        fallback = [f"<0x{byte:02X}>" for byte in range(256)] if options.get("fallback", True) else []
        vocabulary, merges = merged(rng, [*special, *fallback, "\u2581", *LETTERS], 60)
        made = Tokenizer(models.BPE(vocabulary, merges, unk_token=special[0], fuse_unk=True, byte_fallback=bool(fallback)))
        if kind == "llama":
            made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
            made.decoder = llama_decoder()
        else:
            scheme = options.get("scheme", "first")
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=options.get("split", False))
            made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    elif kind == "unigram":
        pieces = [*LETTERS, "\u2581", *words(rng, 40), *("\u2581" + word for word in words(rng, 40))]
        scored = [(token, 0.0) for token in special] + [(piece, -rng.uniform(2, 9)) for piece in dict.fromkeys(pieces)]
        made = Tokenizer(models.Unigram(scored, 0, False))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif kind == "wordpiece":
        pieces = dict.fromkeys(
            [*special, *LETTERS.lower(), *words(rng, 40), *("##" + part for part in [*LETTERS, *words(rng, 40)])]
        )
        made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token=special[0]))
        made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece(cleanup=False)
    else:
        entries = dict.fromkeys([*special, *LETTERS, *words(rng, 60)])
        made = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token=special[0]))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]+"), "removed", invert=True)
    made.add_special_tokens(list(special))
    return made


def surround(made: Any, start: Sequence[str], end: Sequence[str]) -> None:
    """Let the post-processor put tokens around a text."""
    if start or end:
        ids = [(token, made.token_to_id(token)) for token in dict.fromkeys([*start, *end])]
        made.post_processor = processors.TemplateProcessing(single=[*start, "$A", *end], pair=["$A", "$B"], special_tokens=ids)


def write(folder: Path, made: Any, **config: Any) -> Path:
    """Write `tokenizer.json` and a `tokenizer_config.json` with these settings."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def llama_folder(folder: Path, *, start: Sequence[str] = ("<s>",), end: Sequence[str] = (), **config: Any) -> Path:
    """A Llama-style tokenizer, whose post-processor prepends `<s>`."""
    made = library("llama")
    surround(made, start, end)
    return write(folder, made, **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config})


def added(made: Any, *tokens: tuple[str, bool]) -> None:
    """Add tokens; each is special or not."""
    for token, special in tokens:
        one = AddedToken(token, special=special, normalized=False)
        made.add_special_tokens([one]) if special else made.add_tokens([one])


def lm_eval_pair(theirs: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Context and continuation as the language model evaluation harness (0.4.13) encodes them for a causal model."""
    if not context:
        first = theirs.bos_token_id if theirs.bos_token_id is not None else theirs.eos_token_id
        return [first], theirs.encode(continuation, add_special_tokens=False)
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    alone = theirs.encode(context)
    return alone, theirs.encode(context + continuation)[len(alone) :]
