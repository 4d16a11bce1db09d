"""SentencePiece models (`tokenizer.model`): BPE and unigram, as the content of a `tokenizer.json` with the same ids.

A model is a protobuf message, of which only the fields that matter are read, within the bounds of the file. The text is
normalized by the model's own table, spaces are collapsed and become U+2581, and the whole text is then one word for the model.
Control tokens and the unknown token are added tokens, user-defined symbols are pieces that always win.

What has no exact counterpart is refused: word and character models, unused pieces, spaces that end words instead of beginning
them, user-defined symbols that the normalization would change, and a BPE with user-defined symbols whose pieces do not all
follow from their characters.

Limits: a table is replaced by NFKC and its exceptions for single characters, because the library applies tables to graphemes
and loses text. The ids differ for a ligature or another compatibility character with a combining mark after it, which NFKC
composes. Tables other than those of nmt_nfkc and nfkc are refused.
"""

import json
import re
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

from bardling.data.tokens.library import library_errors
from bardling.errors import UserError
from bardling.files.reading import read_small_bytes

_MAX_BYTES = 64 << 20
_MAX_PIECES = 1 << 21
_LONGEST_PIECE = 512  # characters
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
_SPACE = "\u2581"  # stands for a space
_GAP = "\ufdd0"  # the first of 32 code points that are no characters
_MOST_KEPT = 31
_ASSIGNED = 0x30000  # code points from here on are never normalized
_MOST_EXCEPTIONS = 256  # texts; the table of nmt_nfkc in SentencePiece 0.2 has 138
_BYTE_NAME = "<(?=0x[0-9A-F]{2}>)"
_NEVER = -1e6  # score of pieces that no text becomes
_EOS = 42  # field of the trainer's settings: the number of the token that ends a text


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


class _Model(NamedTuple):
    pieces: list[_Piece]
    kind: int
    eos: str | None
    byte_fallback: bool
    table: bytes  # of the normalization; empty: none
    adds_space: bool
    collapses_spaces: bool


def sentencepiece_content(path: Path) -> tuple[dict[str, Any], str, str | None]:
    """The `tokenizer.json` of a model, its name in messages, and the token that ends a text, if it has one.

    A `UserError` if the file is damaged, or the model has no exact counterpart.
    """
    data = read_small_bytes(path, limit=_MAX_BYTES)
    try:
        model = _read(data)
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not a readable SentencePiece model ({error}): fetch it again") from None
    with library_errors(f"{path}: cannot be converted"):
        if fault := _fault(model):
            remedy = "convert it with transformers, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            raise UserError(f"{path}: {fault}: {remedy}, and use the tokenizer.json")
        library = _unigram(model) if model.kind == _UNIGRAM else _bpe(model, path)
        _surround(library, model)
        return cast(dict[str, Any], json.loads(library.to_str())), str(path), model.eos


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message: an int, or the bytes of a text, a message or a 32-bit number."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield number, value
            continue
        if wire == 2:
            size, place = _varint(data, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {place}")
        if size > len(data) - place:
            raise ValueError(f"a field of {size} bytes goes beyond the end")
        yield number, data[place : place + size]
        place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("it ends within a number")
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & ((1 << 64) - 1), place
    raise ValueError("a number has more than ten bytes")


def _message(value: Any) -> memoryview:
    if not isinstance(value, memoryview):
        raise ValueError("a field has the wrong type")
    return value


def _read(data: bytes) -> _Model:
    pieces, trainer, normalizer = [], dict[int, Any](), dict[int, Any]()
    for number, value in _fields(memoryview(data)):
        if number == 1:
            content = dict(_fields(_message(value)))
            score = struct.unpack("<f", _message(content.get(2, memoryview(bytes(4)))))[0]
            pieces.append(_Piece(str(_message(content.get(1, memoryview(b""))), "utf-8"), score, content.get(3, _NORMAL)))
            if len(pieces) > _MAX_PIECES:
                raise ValueError(f"it has more than {_MAX_PIECES:,} pieces")
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(_fields(_message(value)))
    if not pieces or not trainer or not normalizer:
        raise ValueError("it has no pieces or no settings, as if truncated")
    if any(longest := [piece for piece in pieces if len(piece.text) > _LONGEST_PIECE]):
        raise ValueError(f"a piece has {len(longest[0].text):,} characters; the limit is {_LONGEST_PIECE}")
    if normalizer.get(5, 1) == 0 or trainer.get(24):
        raise ValueError("its spaces do not begin words")
    table = bytes(_message(normalizer.get(2, memoryview(b""))))
    spaces = (bool(normalizer.get(number, 1)) for number in (3, 4))
    eos = trainer.get(_EOS, 2)
    end = pieces[eos].text if eos < len(pieces) and pieces[eos].kind == _CONTROL else None
    return _Model(pieces, trainer.get(3, _UNIGRAM), end, bool(trainer.get(35)), table, *spaces)


def _fault(model: _Model) -> str:
    """Why a model has no counterpart; empty if it has one."""
    texts = [piece.text for piece in model.pieces]
    unknown = [piece for piece in model.pieces if piece.kind == _UNKNOWN]
    if model.kind not in (_UNIGRAM, _BPE):
        return f"model type {model.kind} (words or characters) is not read"
    if len(set(texts)) < len(texts) or "" in texts:
        return "has equal or empty pieces"
    if len(unknown) != 1:
        return f"has {len(unknown)} unknown tokens"
    if any(piece.kind not in (_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE) for piece in model.pieces):
        return "has unused pieces"
    if any(not -1e5 < piece.score < 1e5 for piece in model.pieces):
        return "has scores that are not finite"
    try:
        normalizer = _normalizer(model, prefix=False)
    except UserError as error:
        return str(error)
    changed = [text for text in _symbols(model) if normalizer.normalize_str(text) != text]
    return f"the normalization changes the user-defined symbol {changed[0]!r}" if changed else ""


def _symbols(model: _Model) -> list[str]:
    return [piece.text for piece in model.pieces if piece.kind == _USER]


def _normalizer(model: _Model, *, prefix: bool = True) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if model.table:
        composed, kept = normalizers.NFKC(), dict[str, str]()
        for text, characters in _exceptions(model.table):
            if composed.normalize_str(text) != text:  # NFKC would change it again
                place = chr(ord(_GAP) + 1 + len(kept))
                kept[place], text = text, place
            escaped = "".join(f"\\x{{{ord(character):x}}}" for character in characters)
            # A single text is found faster than a pattern.
            steps.append(normalizers.Replace(characters if len(characters) == 1 else Regex(f"[{escaped}]"), text))
        if len(kept) > _MOST_KEPT:
            raise UserError("the normalization leaves too many characters that NFKC changes")
        steps += [composed, *(normalizers.Replace(place, text) for place, text in kept.items())]
    if model.collapses_spaces:
        steps += [normalizers.Replace(Regex(rf"\A +|[ {_SPACE}]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix and model.adds_space:
        steps.append(normalizers.Prepend(_SPACE))
    if prefix:
        steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


@lru_cache(maxsize=4)
def _exceptions(table: bytes) -> list[tuple[str, str]]:
    """What a table makes of characters where this is not NFKC, and those characters."""
    from tokenizers import normalizers

    points = [point for point in range(_ASSIGNED) if not 0xD800 <= point < 0xE000 and chr(point) != _GAP]
    text = _GAP.join(map(chr, points))
    found, usual = (step.normalize_str(text).split(_GAP) for step in (normalizers.Precompiled(table), normalizers.NFKC()))
    if not len(found) == len(usual) == len(points):
        raise UserError("the normalization table changes U+FDD0")
    others = dict[str, str]()
    for point, made, expected in zip(points, found, usual, strict=True):
        if made != expected:
            others[made] = others.get(made, "") + chr(point)
    if len(others) > _MOST_EXCEPTIONS:
        raise UserError("the normalization is neither nmt_nfkc, nor nfkc, nor identity")
    return list(others.items())


def _unigram(model: _Model) -> Any:
    from tokenizers import Tokenizer, models

    highest = max((piece.score for piece in model.pieces if piece.kind == _NORMAL), default=0.0)
    unknown = next(index for index, piece in enumerate(model.pieces) if piece.kind == _UNKNOWN)

    def score(piece: _Piece) -> float:
        if piece.kind == _USER:  # as SentencePiece scores it
            return len(piece.text.encode()) * highest - 0.1
        return piece.score if piece.kind == _NORMAL else _NEVER

    vocabulary = [(piece.text, score(piece)) for piece in model.pieces]
    return Tokenizer(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=model.byte_fallback))


def _bpe(model: _Model, path: Path) -> Any:
    """A BPE whose merges are all splits of each piece into two others, in the order of the scores."""
    from tokenizers import Tokenizer, models

    ids = {piece.text: index for index, piece in enumerate(model.pieces)}
    plain = {piece.text: piece.score for piece in model.pieces if piece.kind == _NORMAL}
    pairs = [
        (text[:cut], text[cut:], score)
        for text, score in plain.items()
        for cut in range(1, len(text))
        if text[:cut] in plain and text[cut:] in plain
    ]
    pairs.sort(key=lambda pair: -pair[2])
    unknown = next(piece.text for piece in model.pieces if piece.kind == _UNKNOWN)
    options: dict[str, Any] = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": model.byte_fallback}
    library = Tokenizer(models.BPE(ids, [pair[:2] for pair in pairs], **options))
    if _symbols(model):
        broken = next((text for text in plain if library.encode(text, add_special_tokens=False).ids != [ids[text]]), None)
        if broken is not None:
            raise UserError(f"{path}: has user-defined symbols, and the piece {broken!r} does not follow from its characters")
        library = Tokenizer(models.BPE(ids, [pair[:2] for pair in pairs], **options, ignore_merges=True))
    return library


def _surround(library: Any, model: _Model) -> None:
    """Set what comes before and after the model, and register the control tokens."""
    from tokenizers import AddedToken, Regex, decoders, pre_tokenizers

    # Names of bytes in a text are cut, so that they do not become these bytes.
    patterns = [re.escape(text) for text in sorted(_symbols(model), key=len, reverse=True)] if model.kind == _BPE else []
    patterns += [_BYTE_NAME] * model.byte_fallback
    if patterns:
        library.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(patterns)), "isolated")
    library.normalizer = _normalizer(model)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if model.adds_space else steps)
    for piece in model.pieces:
        if piece.kind in (_CONTROL, _UNKNOWN):
            library.add_special_tokens([AddedToken(piece.text, special=True, normalized=False)])
