"""Vocabularies built here: bytes, characters, and byte-level BPE, each as the content of a `tokenizer.json`.

All three decode to exactly the text that was encoded: no normalization, no added space.
"""

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, cast

from bardling.errors import UserError

EOT = "<|endoftext|>"  # the end-of-text token, which ends a document, as in GPT-2
ANY_CHARACTER = r"[\s\S]"  # regular expression that splits a text into characters
_PIECE = 1 << 20  # characters; longer texts are encoded in pieces, to bound memory and use all cores
_LONGEST_WORD = 256  # bytes
_SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")


_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_SUBSTITUTES = iter(range(0x100, 0x200))
BYTE_OF = {chr(byte if byte in _PRINTABLE else next(_SUBSTITUTES)): byte for byte in range(256)}
"""The byte that each character represents in byte-level vocabularies, in the order of the bytes, as in GPT-2.

Bytes that are printable in Latin-1 represent themselves; the others map, in order, to U+0100 and up."""


def pieces(text: str) -> Iterator[str]:
    """Cut a long text at places where no token of a GPT-2 style byte-level BPE changes.

    These are single line breaks between two words: pre-tokenization restarts there, whatever the context.
    """
    start = 0
    while len(text) - start > _PIECE and (cut := _SAFE_CUT.search(text, start + _PIECE)):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def byte_content() -> dict[str, Any]:
    """Bytes as ids 0 to 255, then `EOT` as 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    library = Tokenizer(models.BPE(BYTE_OF, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    return _content(library, with_eot=True)


def char_content(texts: Iterable[str]) -> dict[str, Any]:
    """The characters of the texts by code point, as in nanoGPT, then `EOT` if there are several texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters: set[str] = set()
    count = 0
    for count, text in enumerate(texts, 1):  # noqa: B007 (used below)
        characters.update(text)
    if not characters:
        raise UserError("data.tokenizer = 'char': the text is empty, so there are no characters to build a vocabulary from")
    library = Tokenizer(models.WordLevel({character: i for i, character in enumerate(sorted(characters))}))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(ANY_CHARACTER), "isolated")
    library.decoder = decoders.Fuse()
    return _content(library, with_eot=count > 1)


_WORDS = (ANY_CHARACTER, r"\w+|[^\w\s]", r"\w+|[^\w\s]+", r"\S+", r"\w+|[^\w\s]|\s", r"\w+|[^\w\s]+|\s+")
_NAME = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]|UNK")  # an entry that is no word
_UNKNOWN = ("<unk>", "<UNK>", "[UNK]", "UNK")


def word_content(ids: dict[str, int]) -> dict[str, Any] | None:
    """Whole words with the given ids, as in word-level variants of nanoGPT; None if it is not clear where words begin.

    They begin where the first of the patterns `_WORDS` that fits all of them says. If no word is a space, decoded words are
    separated by one, as in nanoGPT's variants.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    unknown = next((name for name in _UNKNOWN if name in ids), None)
    names = [token for token in ids if _NAME.fullmatch(token)]
    words = [token for token in ids if token not in names]
    pattern = next((pattern for pattern in _WORDS if all(re.fullmatch(pattern, word) for word in words)), None)
    if pattern is None:
        return None
    library = Tokenizer(models.WordLevel(ids, **({} if unknown is None else {"unk_token": unknown})))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    if pattern == ANY_CHARACTER or any(word.isspace() for word in words):
        library.decoder = decoders.Fuse()
    library.add_special_tokens(names)
    return cast(dict[str, Any], json.loads(library.to_str()))


def train_bpe_content(texts: Iterable[str], size: int) -> dict[str, Any]:
    """Byte-level BPE (R. Sennrich et al., ACL 2016; over bytes as in GPT-2) with `size` entries: bytes, merges, then `EOT`.

    Deterministic: equally frequent pairs are merged in order of their ids. Words of more than `_LONGEST_WORD` bytes (DNA,
    base64, a minified script) are cut for training only, because its time is quadratic in the length of a word.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut = pre_tokenizers.Split(Regex(f"{ANY_CHARACTER}{{1,{_LONGEST_WORD}}}"), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([words, cut])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=list(BYTE_OF), show_progress=False)
    characters = 0
    stopped = threading.Event()

    def until_stopped() -> Iterator[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            for piece in pieces(text):
                if stopped.is_set():
                    raise InterruptedError("the process is about to end")
                yield piece

    _interruptible(lambda: library.train_from_iterator(until_stopped(), trainer), stopped)
    if not characters:
        raise UserError(f"data.tokenizer = 'bpe:{size}': the text is empty, so there is nothing to train on")
    library.pre_tokenizer = words
    return _content(library, with_eot=True)


def _interruptible(work: Callable[[], None], stopped: threading.Event) -> None:
    """Run a library call in a thread, so that signals are handled while it runs; one of them sets `stopped`."""
    done: Future[None] = Future()

    def call() -> None:
        try:
            work()
            done.set_result(None)
        except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
            done.set_exception(error)

    thread = threading.Thread(target=call, name="library", daemon=True)
    thread.start()
    try:
        done.result()
    except BaseException:
        # Stop feeding it. Once it has all texts it may compute for minutes; being a daemon, it then ends with the process.
        stopped.set()
        thread.join(1.0)
        raise


def _content(library: Any, *, with_eot: bool) -> dict[str, Any]:
    if with_eot:
        library.add_special_tokens([EOT])
    return cast(dict[str, Any], json.loads(library.to_str()))
