"""The GGUF container: metadata and named tensors in one file, as llama.cpp reads and writes it.

Writing and the quantization formats are those of the package `gguf`. The header is read here instead, because a file from
outside is not trusted: every count, length, type and offset is checked against the size of the file before anything is
allocated, and the tensors together take no more bytes than the file has. Nothing in a file is executed.

Limits: little-endian files of versions 2 and 3; up to 2^22 array items and 2^16 tensors; one file, not a split model; arrays
of arrays are refused.
"""

import math
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bardling.errors import UserError
from bardling.files.atomic import atomic_file, os_error_as_user_error

EXTRA = "pip install 'bardling[gguf]'"
GGUF_DTYPES = {
    "f32": "f32",
    "f16": "f16",
    "bf16": "bf16",
    "q8_0": "q8_0",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
}
"""The types that are written, also by their names in torch."""
_MAX_ENTRIES, _MAX_TENSORS, _MAX_ITEMS = 1 << 14, 1 << 16, 1 << 22
_MAX_NAME, _MAX_TEXT = 1 << 10, 16 << 20  # bytes
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


class GgufTensor(NamedTuple):
    """Where a tensor is in a file. `shape` is in the order of torch, the reverse of the file's."""

    shape: tuple[int, ...]
    kind: int  # `gguf.GGMLQuantizationType`
    start: int
    size: int  # bytes


class GgufFile(NamedTuple):
    """The header of a file: plain metadata values and where each tensor is."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"GGUF files need the package gguf: {EXTRA}") from error
    return gguf


class _Reader:
    """Reads the header's values from an open file and counts what they may take."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self._file, self._path, self._items = file, path, 0
        self.size = size

    def fail(self, problem: str) -> UserError:
        return UserError(f"{self._path}: is damaged or not a GGUF file ({problem}): restore it, or download it again")

    def bytes(self, count: int, limit: int) -> bytes:
        if count > min(limit, self.size - self._file.tell()):
            raise self.fail(f"{count:,} bytes at {self._file.tell():,} of {self.size:,}")
        return self._file.read(count)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form), 8))[0]

    def count(self, what: str, limit: int) -> int:
        value = int(self.number("<Q"))
        if value > limit:
            raise self.fail(f"{value:,} {what}; the limit is {limit:,}")
        return value

    def text(self, limit: int = _MAX_TEXT) -> str:
        data = self.bytes(self.number("<Q"), limit)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.fail(f"text that is not UTF-8: {data[:20]!r}") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            item, length = self.number("<I"), self.count("array items", _MAX_ITEMS)
            self._items += length
            if self._items > _MAX_ITEMS or item == _ARRAY:
                raise self.fail(f"more than {_MAX_ITEMS:,} array items, or arrays in an array")
            return [self.value(item) for _ in range(length)]
        if kind not in _SCALARS:
            raise self.fail(f"metadata of the unknown type {kind}")
        value = self.number(_SCALARS[kind])
        # The shortest decimal that is this float32: 1e-5, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def tell(self) -> int:
        return self._file.tell()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    with os_error_as_user_error(path, "read"):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
            raise UserError(f"{path}: is not a file")
        with path.open("rb") as file:
            yield file, status.st_size


def is_gguf(path: Path) -> bool:
    """Whether a file is, or claims to be, in this format."""
    with _opened(path) as (file, _):
        return path.suffix.lower() == ".gguf" or file.read(4) == b"GGUF"


def read_header(path: Path) -> GgufFile:
    """Read and check the metadata and the places of the tensors; a `UserError` if the file is not valid."""
    with _opened(path) as (file, size):
        reader = _Reader(file, size, path)
        if reader.bytes(min(size, 4), 4) != b"GGUF":
            raise reader.fail("it does not begin with GGUF")
        version = reader.number("<I")
        if version not in (2, 3):
            raise UserError(f"{path}: GGUF version {version} is not supported; only little-endian versions 2 and 3 are")
        tensors, entries = reader.count("tensors", _MAX_TENSORS), reader.count("metadata entries", _MAX_ENTRIES)
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = reader.text(_MAX_NAME)
            if key in metadata:
                raise reader.fail(f"{key!r} is given twice")
            metadata[key] = reader.value(reader.number("<I"))
        return GgufFile(path, metadata, _places(reader, tensors, metadata.get("general.alignment", 32)))


def _places(reader: _Reader, count: int, alignment: object) -> dict[str, GgufTensor]:
    """The tensors that the header lists, each inside the file."""
    if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment % 8:
        raise reader.fail(f"general.alignment = {alignment!r}"[:80])
    sizes, listed = _library().GGML_QUANT_SIZES, list[tuple[str, tuple[int, ...], int, int]]()
    for _ in range(count):
        name, dimensions = reader.text(_MAX_NAME), reader.number("<I")
        if not 1 <= dimensions <= 4:
            raise reader.fail(f"{name!r} has {dimensions} dimensions")
        shape = tuple(int(reader.number("<Q")) for _ in range(dimensions))[::-1]
        listed.append((name, shape, int(reader.number("<I")), int(reader.number("<Q"))))
    start, total = -(-reader.tell() // alignment) * alignment, 0
    places: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in listed:
        if kind not in sizes:
            raise reader.fail(f"{name!r} has the unknown type {kind}")
        block, block_bytes = sizes[kind]
        if name in places or 0 in shape or shape[-1] % block or offset % alignment:
            raise reader.fail(f"{name!r} is given twice, or has a wrong shape {list(shape)} or offset {offset:,}")
        size = math.prod(shape) // block * block_bytes
        total += size
        if start + offset + size > reader.size or total > reader.size:
            raise reader.fail(f"{name!r} with {size:,} bytes at {start + offset:,} of {reader.size:,}")
        places[name] = GgufTensor(shape, kind, start + offset, size)
    return places


def read_gguf_tensors(header: GgufFile) -> dict[str, Tensor]:
    """Read all tensors as float32 in new memory; a `UserError` if one has a type that `gguf` cannot dequantize."""
    library, result = _library(), dict[str, Tensor]()
    with _opened(header.path) as (file, _):
        for name, place in header.tensors.items():
            file.seek(place.start)
            data = np.frombuffer(file.read(place.size), np.uint8)
            kind = library.GGMLQuantizationType(place.kind)
            if data.size != place.size:
                raise UserError(f"{header.path}: {name} ends early: the file has changed while it was read")
            if kind.name in ("F32", "F16"):
                plain = data.view("<f4" if kind.name == "F32" else "<f2").astype(np.float32)
            else:
                try:
                    with np.errstate(all="ignore"):  # infinite scales are refused with the name of the tensor
                        rows = data.reshape(math.prod(place.shape[:-1]), -1)
                        plain = library.quants.dequantize(rows, kind).astype(np.float32, copy=True)
                except NotImplementedError:
                    raise UserError(f"{header.path}: {name} has the type {kind.name}, which gguf cannot dequantize") from None
            result[name] = torch.from_numpy(plain.reshape(place.shape))
    return result


def write_gguf(path: Path, arch: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: str) -> list[str]:
    """Write the new file `path`; vectors and positions stay float32, as llama.cpp requires. Returns notes for the user.

    Args:
        metadata: values by key: str, bool, int (written as uint32), float (float32), or a list of str, int (int32) or float.
        dtype: a value of `GGUF_DTYPES`. With q8_0, a matrix whose rows are not a multiple of 32 is written in f16.
    """
    library = _library()
    writer, kinds, narrow = library.GGUFWriter(None, arch), library.GGMLQuantizationType, list[str]()
    writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[dtype])
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    types = library.GGUFValueType
    kind_of = {str: types.STRING, bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, list: types.ARRAY}
    for key, value in metadata.items():
        item = {int: types.INT32, float: types.FLOAT32}.get(type(value[0])) if isinstance(value, list) and value else None
        writer.add_key_value(key, value, kind_of[type(value)], sub_type=item)
    for name, tensor in tensors.items():
        data = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        kind = kinds[dtype.upper()] if data.ndim > 1 and name != "position_embd.weight" else kinds.F32
        if kind == kinds.Q8_0 and data.shape[-1] % 32:
            kind = kinds.F16
            narrow.append(name)
        with np.errstate(over="ignore"):
            stored = library.quants.quantize(data, kind)
        if kind == kinds.F16 and not np.isfinite(stored).all():
            raise UserError(f"{name} exceeds the range of float16: choose --dtype bf16 or f32")
        writer.add_tensor(name, stored, raw_dtype=kind)
    with os_error_as_user_error(path, "write"), atomic_file(path) as file:
        writer.write_header_to_file(Path(file.name))
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    rows = f"{len(narrow)} matrices, such as {narrow[0]}, are f16: their rows are not a multiple of 32" if narrow else ""
    return [rows] if rows else []
