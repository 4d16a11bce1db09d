"""Vocabularies made here: bytes, characters, and byte-level BPE, each as the content of a `tokenizer.json`.

All three reproduce every text that they encode: no normalisation, no added space.
"""

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bardling.errors import UserError

EOT = "<|endoftext|>"
"""The token that ends a document, as in GPT-2."""
ANY_CHARACTER = r"[\s\S]"
"""Regular expression that splits a text into characters."""
_PIECE = 1 << 20  # characters; longer texts are handled in pieces, to bound memory and use all cores
_SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies, as in GPT-2.

    Bytes that print in Latin-1 stand for themselves; the others are moved, in order, to U+0100 and up.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


def valid_text(text: str) -> str:
    """The text, with U+FFFD for lone surrogates, which UTF-8 cannot say."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def pieces(text: str) -> Iterator[str]:
    """Cut a long text where that changes no token of a GPT-2 style byte-level BPE.

    That is after a single line break between two words: the splitting of words starts anew there, whatever stands around it.
    """
    start = 0
    while len(text) - start > _PIECE and (cut := _SAFE_CUT.search(text, start + _PIECE)):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def byte_content() -> dict[str, Any]:
    """Ids 0 to 255 are the bytes, 256 is `EOT`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    library = Tokenizer(models.BPE({character: byte for byte, character in enumerate(byte_alphabet())}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    return _content(library, with_end=True)


def char_content(texts: Iterable[str]) -> dict[str, Any]:
    """The characters of the texts in order of their code points, as in nanoGPT; `EOT` after them if there are several texts.

    Raises:
        UserError: if the texts are empty.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters: set[str] = set()
    count = 0
    for text in texts:
        characters.update(text)
        count += 1
    if not characters:
        raise UserError("data.tokenizer = 'char': the text is empty, so it has no characters to make a vocabulary of")
    library = Tokenizer(models.WordLevel({character: i for i, character in enumerate(sorted(characters))}))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(ANY_CHARACTER), "isolated")
    library.decoder = decoders.Fuse()
    return _content(library, with_end=count > 1)


def train_bpe_content(texts: Iterable[str], size: int) -> dict[str, Any]:
    """Byte-level BPE (R. Sennrich et al., ACL 2016; over bytes as in GPT-2) of `size` entries: bytes, merges, `EOT` last.

    The same texts give the same vocabulary: equally frequent pairs are merged in order of their ids.

    Raises:
        UserError: if the texts are empty.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=byte_alphabet(), show_progress=False)
    characters = 0

    def counted() -> Iterator[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield from pieces(text)

    _interruptible(lambda texts: library.train_from_iterator(texts, trainer), counted())
    if not characters:
        raise UserError(f"data.tokenizer = 'bpe:{size}': the text is empty, so there is nothing to train on")
    return _content(library, with_end=True)


def _interruptible(work: Callable[[Iterator[str]], None], texts: Iterator[str]) -> None:
    """Have a library work on `texts` in a thread, so that a signal need not wait for its end."""
    failure: list[BaseException] = []
    left = threading.Event()

    def until_left() -> Iterator[str]:
        for text in texts:
            if left.is_set():
                raise InterruptedError("the process is about to end")
            yield text

    def call() -> None:
        try:
            work(until_left())
        except BaseException as error:  # noqa: BLE001 (raised again where it belongs)
            failure.append(error)

    thread = threading.Thread(target=call, name="library", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        # It is to ask for no more texts. If it only computes by now, that may take minutes, and ends with the process.
        left.set()
        thread.join(1.0)
        raise
    if failure:
        raise failure[0]


def _content(library: Any, *, with_end: bool) -> dict[str, Any]:
    if with_end:
        library.add_special_tokens([EOT])
    content: dict[str, Any] = json.loads(library.to_str())
    return content
