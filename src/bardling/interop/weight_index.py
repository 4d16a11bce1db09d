"""The index of weights that are split into several files; without torch, because commands read it before they load anything."""

import re
from pathlib import Path

from bardling.errors import UserError
from bardling.files.reading import read_json_object

INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20  # an index of a thousand shards is far smaller
_WEIGHT_FILE = re.compile(r"[^/\\\0]*\.safetensors")


def indexed_files(index: Path) -> dict[Path, list[str]]:
    """The weight files in an index, and the tensors in each."""
    weight_map = read_json_object(index, limit=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map must map each tensor's name to a file")
    files: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _WEIGHT_FILE.fullmatch(file) or len(file) > 200:
            raise UserError(f"{index}: {file!r} is not the name of a .safetensors file in this folder")
        files.setdefault(index.with_name(file), []).append(name)
    return files
