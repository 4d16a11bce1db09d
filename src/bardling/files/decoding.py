"""Bytes to text, by one rule for training text, prompts, standard input and recipes.

A byte order mark decides (UTF-8, UTF-16, UTF-32) and is not part of the text. Without one, the text has the encoding that the
user names, else UTF-8. Everything else is kept: line endings, NUL characters, U+FEFF inside the text. No encoding is guessed,
because a wrong guess would change the text silently; guesses only appear in the message of a refusal, with a remedy.
"""

import codecs
import shlex
from pathlib import PurePath

from bardling.errors import UserError

MARK = "\ufeff"  # U+FEFF, the byte order mark
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
)
HEAD = 1 << 16  # bytes at the start of a file that are enough to recognise its format

_ARCHIVE = "extract it and name the folder, `{} {{file}}`"
_UNPACK = "decompress it, `{} -dc {{file}} > {{text}}`"
_OTHER = "choose text files"
_FORMATS = (  # offset and bytes that identify a format, its name, and what to do
    (0, b"\x1f\x8b\x08", "gzip data", _UNPACK.format("gzip")),
    (0, b"\x28\xb5\x2f\xfd", "Zstandard data", _UNPACK.format("zstd")),
    (0, b"\xfd7zXZ\0", "xz data", _UNPACK.format("xz")),
    (4, b"1AY&SY", "bzip2 data", _UNPACK.format("bzip2")),
    (0, b"\x04\x22\x4d\x18", "LZ4 data", _UNPACK.format("lz4")),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _ARCHIVE.format("7z x")),
    (0, b"Rar!\x1a\x07", "a RAR archive", _ARCHIVE.format("unrar x")),
    (257, b"ustar", "a tar archive", _ARCHIVE.format("tar -xf")),
    (0, b"PK\x03\x04", "a zip archive (or a document in one)", _ARCHIVE.format("unzip")),
    (0, b"PAR1\x15", "a Parquet file", _OTHER),
    (0, b"ARROW1\0\0", "an Arrow file", _OTHER),
    (0, b"%PDF-", "a PDF file", "extract its text, `pdftotext {file} {text}`"),
    (0, b"{\\rtf", "an RTF document", "convert it, `pandoc {file} -t plain -o {text}`"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1", "a Microsoft Office document", "save it as plain text"),
    (0, b"SQLite format 3\0", "an SQLite database", "export its text as JSON Lines"),
    (0, b"GGUF\x03\0\0\0", "a GGUF model", _OTHER),
    (0, b"\x93NUMPY", "a NumPy array", _OTHER),
    (0, b"\x89HDF\r\n", "an HDF5 file", _OTHER),
    (0, b"\x89PNG\r\n", "a PNG image", _OTHER),
    (0, b"\xff\xd8\xff", "a JPEG image", _OTHER),
    (0, b"GIF8", "a GIF image", _OTHER),
    (0, b"\x7fELF", "a program", _OTHER),
)


def known_format(head: bytes, file: str) -> tuple[str, str] | None:
    """The format of a `file` that is not plain text, by its first bytes, and what to do; None if it is not recognised."""
    found = next(((name, remedy) for offset, magic, name, remedy in _FORMATS if head.startswith(magic, offset)), None)
    if found is None:
        return None
    path = PurePath(file)
    text = path.with_suffix("") if len(path.suffixes) > 1 else path.with_suffix(".txt")
    return found[0], found[1].format(file=shlex.quote(file), text=shlex.quote(str(text)))


def byte_order_mark(head: bytes) -> tuple[str, int]:
    """The encoding that a byte order mark names, and the bytes of the mark; ('', 0) if there is none."""
    if head.startswith(codecs.BOM_UTF32_LE) and (len(head) < 8 or (head[7] == 0 and head[6] <= 0x10)):
        return "utf-32-le", 4  # the same bytes could be UTF-16 text that begins with NUL
    return next(((name, len(mark)) for mark, name in _MARKS if head.startswith(mark)), ("", 0))


def wide_encoding(head: bytes) -> str:
    """UTF-16 or UTF-32 by the places of NUL bytes, in text of mostly ASCII; empty if it is not. Such text is valid UTF-8."""
    size = len(head) // 4 * 4
    if size < 4 or b"\0" not in head:
        return ""
    nul = [head[i:size:4].count(0) / (size // 4) for i in range(4)]
    for name, zeros in (("utf-32-le", "0111"), ("utf-32-be", "1110"), ("utf-16-le", "0101"), ("utf-16-be", "1010")):
        if all(share > 0.6 if zero == "1" else share < 0.2 for share, zero in zip(nul, zeros, strict=True)):
            return name
    return ""


def legacy_guess(data: bytes) -> str:
    """'cp1252' if text that is not UTF-8 looks Western European (most letters are ASCII), else empty."""
    head = data[:HEAD]
    high, letters = sum(byte >= 0x80 for byte in head), sum(bytes([byte]).isalpha() for byte in head)
    undefined = any(byte in head for byte in (0x81, 0x8D, 0x8F, 0x90, 0x9D))
    return "" if undefined or high > letters else "cp1252"


def decode_text(data: bytes, name: str, encoding: str = "", *, setting: str = "", file: str = "") -> str:
    """The text of `data`, which errors call `name`.

    Args:
        encoding: of data without a byte order mark; empty: UTF-8.
        setting: the option that sets `encoding`, for messages; empty if there is none.
        file: the path of the data, for messages; default: `name`.
    """
    file = file or name
    marked, skip = byte_order_mark(data)
    chosen = marked or encoding or "utf-8"
    try:
        text = data[skip:].decode(chosen)
    except UnicodeError as error:
        place = skip + getattr(error, "start", 0)  # some codecs do not tell
        raise UserError(f"{name}: {_fault(data, file, encoding, setting, marked, place)}") from None
    if not marked and not encoding and (guess := wide_encoding(data[:HEAD])):
        raise UserError(f"{name}: looks like {guess.upper()} without a byte order mark: {_remedy(file, guess, setting)}")
    return text.lstrip(MARK)


def _fault(data: bytes, file: str, encoding: str, setting: str, marked: str, place: int) -> str:
    where = f"byte {place:,} is 0x{data[place]:02x}" if place < len(data) else "it ends inside a character"
    if marked:
        return f"has the byte order mark of {marked.upper()} but is not {marked.upper()} text ({where}): restore the file"
    if encoding:
        return f"is not {encoding} text ({where}): set {setting or 'the encoding'} to the one that it was written in"
    if known := known_format(data[:HEAD], file):
        return f"is {known[0]}, not text: {known[1]}"
    guess = wide_encoding(data[:HEAD]) or legacy_guess(data)
    looks = f"; it looks like {guess}" if guess else ""
    return f"is not UTF-8 text ({where}){looks}: {_remedy(file, guess, setting)}"


def _remedy(file: str, guess: str, setting: str) -> str:
    encoding = guess or "ENCODING"
    iconv = encoding.upper().replace("UTF-16-", "UTF-16").replace("UTF-32-", "UTF-32")
    given = "" if guess else ", where ENCODING is for example cp1251, shift_jis or gb18030"
    convert = f"convert it, `iconv -f {iconv} -t UTF-8 {shlex.quote(file)} > NEW`{given}"
    return f"set {setting} {encoding}, or {convert}" if setting else convert
