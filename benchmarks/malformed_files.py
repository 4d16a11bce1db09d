"""Malformed and malicious files: what a failing disk, a bad copy or an attacker could put in place of a file.

There are two kinds of changes. Byte changes know no format: cut, flip, insert, repeat, increase numbers. Structural changes
keep a file readable (JSON, TOML, safetensors, pickles, PyTorch archives, NumPy arrays) and change its content: other types,
sizes of terabytes, deep nesting, reference cycles, and pickles that would create the canary folder if anything executed them.
Every change is drawn from the given generator, so cases can be repeated.
"""

import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

DEEP = "@deep@"  # placeholder for nesting deeper than an encoder would write
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 255, 2**16, 2**24, 2**31 - 1, 2**31, 2**40, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"), "", "\0", "x", "\ud800", "é" * 300,
    "a" * 20_000, "../../../etc/passwd", "/dev/zero", "%s%n", "{}", "$(touch x)", "nan", "1e999", [], {}, [[]], [None],
    {"": {}},
    [0] * 50, [[1, 2], [3]], {"type": "x"}, DEEP,
]  # fmt: skip
SNIPPETS = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"'", b"\\", b"[" * 100_000, b'{"a":' * 50_000, b"(" * 5000, b"9" * 5000,
    b"1e999",
    b"NaN", b"-Infinity", b"\n", b"\r", b"\x80\x04", b"\x80\x05.", b"null", b"-", b"=", b"__import__('os').system('x')",
    b"\xed\xa0\x80",
]  # fmt: skip


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Make one to three changes that are independent of the format."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice((1, 2, 8, 64, 1000)))
        match draw.randrange(10):
            case 0:
                data = data[:at]
            case 1 | 2:
                changed = bytearray(data)
                for _ in range(draw.choice((1, 1, 2, 8)) if changed else 0):
                    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
                data = bytes(changed)
            case 3:
                data = data[:at] + draw.randbytes(draw.choice((1, 4, 100))) + data[at:]
            case 4:
                data = data[:at] + draw.choice(SNIPPETS) + data[at:]
            case 5:
                data = data[:at] + data[end:]
            case 6:
                data = data[:end] + data[at:end] * draw.choice((1, 10)) + data[end:]
            case 7:
                data = data[:at] + draw.choice((b"\0", b"\xff")) * (end - at) + data[end:]
            case 8:
                numbers = list(re.finditer(rb"\d+", data[:200_000]))
                if numbers:
                    one = draw.choice(numbers)
                    bigger = draw.choice((b"-1", b"0", b"9" * 12, b"9" * 19, b"9" * 400, one[0] + b"0", b"1e400"))
                    data = data[: one.start()] + bigger + data[one.end() :]
            case _:
                width = draw.choice((4, 8))
                size = draw.choice((-1, 2**31 - 1, 1 << (8 * width - 2)))
                data = data[:at] + size.to_bytes(width, "little", signed=True) + data[at + width :]
    return data


def mutate_tree(value: Any, draw: random.Random, odd: list[Any] | None = None) -> Any:
    """The nested value with one to three elements replaced, removed, duplicated or renamed."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = _change(value, draw, odd or ODD)
    return value


def _change(value: Any, draw: random.Random, odd: list[Any]) -> Any:
    inner = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list | tuple) else []
    if not inner or draw.random() < 0.08:
        if type(value) is int and draw.random() < 0.4:
            return draw.choice((value + 1, value - 1, -value, value << draw.choice((1, 8, 40)), float(value)))
        return draw.choice(odd)
    key = draw.choice(inner)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    match draw.randrange(10):
        case 0:
            del copy[key]
        case 1 if isinstance(copy, dict):
            copy[draw.choice((f"{key}x", "", "__class__", "../x", "0", str(key).upper()))] = copy[key]
        case 1:
            copy.append(copy[key])
        case 2 if isinstance(copy, dict):
            copy[f"{key}_"] = copy.pop(key)
        case _:
            copy[key] = _change(copy[key], draw, odd)
    return tuple(copy) if isinstance(value, tuple) else copy


def to_json(value: Any, draw: random.Random) -> bytes:
    """JSON, with `DEEP` replaced by deep nesting."""
    depth = draw.choice((20, 200, 990, 3000, 100_000))
    opening, closing = draw.choice((("[", "]"), ('{"a":', "}")))
    return json.dumps(value).replace(json.dumps(DEEP), opening * depth + "0" + closing * depth).encode()


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    return to_json(mutate_tree(json.loads(data), draw), draw)


def mutate_jsonl(data: bytes, draw: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = draw.randrange(max(1, len(lines) - 1))
    lines[at : at + 1] = draw.choice(([mutate_json(lines[at], draw)], [lines[at], lines[at]], [], [b"[]"], [b"{}"]))
    return b"\n".join(lines)


def mutate_toml(data: bytes, draw: random.Random) -> bytes:
    """Replace the value of one line, or move, duplicate or rename a line."""
    lines = data.decode().split("\n")
    at = draw.randrange(len(lines))
    key, equals, _ = lines[at].partition("=")
    odd = draw.choice(ODD)
    text = "[" * draw.choice((50, 900, 50_000)) if odd is DEEP else json.dumps(odd) if odd is not None else "1979-05-27"
    match draw.randrange(5):
        case 0 | 1 | 2 if equals:
            lines[at] = f"{key}= {text.replace('Infinity', 'inf').replace('NaN', 'nan')}"
        case 3 if equals:
            lines[at] = f"{key.strip()}.x = 1" if draw.random() < 0.3 else f"{key.strip()}s = 1"
        case _:
            lines.insert(draw.randrange(len(lines)), draw.choice((lines[at], f"[{'a.' * 3000}a]", "[[model]]", "x = {" * 900)))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "latin-1", "shift_jis", "utf-7", "cp500")
ODD_TEXT = (
    "\0", "\ufeff", "\ufffe", "\r", "\r\n", "\x85", "\u2028", "\x1a", "<|endoftext|>", "<s>", "▁", "é" * 300, "🙂", "e\u0301",
    "\u202e", "\x1b[2J", "a" * 20_000, " " * 20_000, "\n" * 5000, "\ud7ff", "\U0010ffff",
)  # fmt: skip


def mutate_text(data: bytes, draw: random.Random) -> bytes:
    """Text in another encoding, with marks, control characters and long words, perhaps cut within a character."""
    text = data.decode()
    for _ in range(draw.choice((0, 1, 2, 5))):
        at = draw.randrange(len(text) + 1)
        text = text[:at] + draw.choice(ODD_TEXT) + text[at:]
    if draw.random() < 0.3:
        text = text.replace("\n", draw.choice(("\r\n", "\r", "\x0b", "\u2028")))
    made = text.encode(draw.choice(("utf-8", *ENCODINGS)), "replace")
    if draw.random() < 0.3:  # two encodings in one file, or a cut
        made = made[: draw.randrange(len(made) + 1)] + (
            b"" if draw.random() < 0.5 else text[:200].encode(draw.choice(ENCODINGS), "replace")
        )
    return (
        draw.choice((b"", b"", b"", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\xff\xfe\0\0", b"\x1f\x8b", b"PK\3\4")) + made
    )


EXPRESSIONS = [
    "9**9**9", "'a' * 10**9", "-" * 3000 + "1", "(" * 90 + "1" + ")" * 90, "[" * 300, "1 << 99999", "int('9' * 5000)",
    "1 / 0", "1e308 * 10",
    "__import__('os').mkdir('{canary}')", "exec('x')", "open('{canary}', 'w')", "().__class__.__mro__", "lambda: 0", "f'{1}'",
    "{**{}}", "0x" + "f" * 300,
    "time.sleep(9)", "float('nan')", "str(10**300)", "-(10**76)", "10**30", "1j", "None", "True", "''", "b''", "'\\ud800'",
    "'\\0'", "...",
    "[x for x in range(9)]", "max_iters", "learning_rate ** -99999", "0.0 ** -1", "(-8) ** 0.5", "10 % 0", "'%s' % 1", "a := 1",
]  # fmt: skip


def mutate_python(data: bytes, draw: random.Random, canary: Path) -> bytes:
    """Give a setting a malicious expression, or insert a malicious line."""
    lines = data.decode().split("\n")
    at = draw.randrange(len(lines))
    expression = draw.choice([*EXPRESSIONS, repr(draw.choice([odd for odd in ODD if odd != DEEP]))]).replace(
        "{canary}", str(canary)
    )
    key = lines[at].partition("=")[0].strip() or "batch_size"
    match draw.randrange(4):
        case 0 | 1 | 2:
            lines[at] = f"{key} = {expression}"
        case _:
            more = (
                f"import os; os.mkdir({str(canary)!r})",
                f"{key} += {expression}",
                f"while True: {key} = 1",
                expression,
                f"del {key}",
            )
            lines.insert(at, draw.choice(more))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutate_safetensors(data: bytes, draw: random.Random) -> bytes:
    """Change the header, with a correct or wrong length: names, dtypes, shapes of terabytes, overlapping offsets."""
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    if draw.random() < 0.5:
        name = draw.choice([name for name in header if name != "__metadata__"])
        entry = dict(header[name])
        match draw.randrange(4):
            case 0:
                entry["shape"] = draw.choice(
                    ([1 << 40], [1 << 62, 1 << 62], [], [0], [-1], entry["shape"][::-1], [2**64], [1.5])
                )
            case 1:
                first, last = entry["data_offsets"]
                entry["data_offsets"] = draw.choice(
                    ([0, 1 << 50], [last, first], [first, last + 4], [2**63, 2**64], [first], [0, 0])
                )
            case 2:
                entry["dtype"] = draw.choice(("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "", "C64", 7))
            case _:
                entry["shape"], entry["dtype"] = [*entry["shape"], 1], entry["dtype"]
        header[name] = entry
    else:
        header = mutate_tree(header, draw)
    text = to_json(header, draw)
    claimed = len(text) if draw.random() < 0.8 else draw.choice((0, 2, len(text) * 2, 1 << 27, 1 << 40, (1 << 64) - 1))
    if draw.random() < 0.15:  # NaN or infinity
        rest = rest[:-4] + struct.pack("<f", draw.choice((float("nan"), float("inf"))))
    return claimed.to_bytes(8, "little") + text + rest


class _Program:
    """An object whose pickle calls a function."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.call, self.arguments


def malicious_pickle(draw: random.Random, canary: Path) -> bytes:
    """A pickle that creates the canary folder when executed, or that expands, nests deeply or contains cycles."""
    where = str(canary)
    cycle: list[Any] = []
    cycle.append(cycle)
    table: dict[str, Any] = {}
    table["vocab_size"] = table
    bomb: list[Any] = ["x" * 1000]
    for _ in range(40):
        bomb = [bomb, bomb]
    program = draw.choice((
        _Program(os.mkdir, where), _Program(os.system, f"mkdir {where}"), _Program(eval, f"__import__('os').mkdir({where!r})"),
        _Program(exec, f"import os; os.mkdir({where!r})"), _Program(subprocess.Popen, ["mkdir", where]), _Program(getattr, os,
        "mkdir"),
        _Program(open, where, "w"), _Program(torch.load, where), _Program(bytearray, 1 << 33), _Program(torch.zeros, 1 << 33),
    ))  # fmt: skip
    made = draw.choice(
        (program, program, {"vocab_size": 2, "stoi": program}, {"model": program, "model_args": {}}, cycle, table, bomb)
    )
    raw = (
        f"cos\nmkdir\n(S'{where}'\ntR.".encode(),
        f"(S'{where}'\nios\nmkdir\n.".encode(),
        b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c" + bytes([len(where)]) + where.encode() + b"\x85R.",
        b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b"x.",
        b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".",
        b"\x80\x04" + b"(" * 100_000 + b"." + b"l" * 100,
        b"\x80\x04" + b"]" + b"]a" * 5000 + b".",
        b"\x80\x04r\xff\xff\xff\xff.",
        b"I" + b"9" * 5000 + b"\n.",
    )
    return draw.choice((pickle.dumps(made, draw.randrange(6)), draw.choice(raw)))


def mutate_pickle(data: bytes, draw: random.Random, canary: Path) -> bytes:
    if draw.random() < 0.4:
        return malicious_pickle(draw, canary)
    return pickle.dumps(mutate_tree(pickle.loads(data), draw), draw.randrange(6))


def odd_tensors() -> list[Any]:
    """Tensors that claim far more data than they have, or of types that are not valid as weights."""
    one = torch.ones(1)
    return [
        one.expand(1 << 40), torch.zeros(1, 1).expand(1 << 20, 1 << 20), torch.ones(0), torch.tensor(float("nan")),
        torch.ones(3, dtype=torch.bool),
        torch.ones(3, dtype=torch.complex64), torch.eye(3).to_sparse(), torch.ones(2, 2).t(), torch.ones(4,
        dtype=torch.float64), torch.tensor(2**62),
        torch.nn.Parameter(one), torch.empty(5, device="meta"),
    ]  # fmt: skip


def mutate_torch(data: bytes, draw: random.Random, canary: Path) -> bytes:
    """Change the content, pickle or members of a PyTorch archive."""
    kind = draw.random()
    if kind < 0.55:
        content = torch.load(io.BytesIO(data), weights_only=True)
        changed = mutate_tree(content, draw, [*ODD, *odd_tensors()])
        if draw.random() < 0.05 and isinstance(changed, dict):
            changed[draw.choice(list(changed) or ["model"])] = changed
        made = io.BytesIO()
        torch.save(changed, made)
        return made.getvalue()
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        victim = draw.choice(old.namelist())
        for name in old.namelist():
            body = old.read(name)
            if name.endswith("data.pkl") and kind < 0.85:
                body = malicious_pickle(draw, canary) if kind < 0.7 else mutate_bytes(body, draw)
            elif name == victim:
                body = mutate_bytes(body, draw)
                name = draw.choice((name, name, "../" + name, str(canary), name + "x", name.replace("data", "date")))
            new.writestr(name, body, draw.choice((zipfile.ZIP_STORED,) * 6 + (zipfile.ZIP_DEFLATED,)))
            if name == victim and draw.random() < 0.1:
                new.writestr("archive/data.pkl", malicious_pickle(draw, canary))
    return made.getvalue()


def mutate_npy(data: bytes, draw: random.Random, canary: Path) -> bytes:
    """A NumPy array with a changed header, or of pickled objects."""
    made = io.BytesIO()
    if draw.random() < 0.2:
        np.save(made, np.array([_Program(os.mkdir, str(canary))], object), allow_pickle=True)
        return made.getvalue()
    header = draw.choice((
        "{'descr': '<u2', 'fortran_order': False, 'shape': (1152921504606846976,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (9,), }",
        "{'descr': '<u2', 'fortran_order': False, 'shape': (-1,), }",
        "{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (9,), }",
        "{'descr': '<u2', 'fortran_order': True, 'shape': (3, 3), }", "(" * 400, "__import__('os').mkdir('x')",
        "{'shape': (9,)}", "[" * 9000, "{}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (9,), }",
        "{'descr': '>u2', 'fortran_order': False, 'shape': (9,), }",
        "{'descr': '<u2', 'fortran_order': False, 'shape': (9.5,), }", "{'descr': None, 'fortran_order': False, 'shape': (), }",
    ))  # fmt: skip
    version = draw.choice((b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\x09\x09"))
    text = header.encode().ljust(117) + b"\n"
    length = (len(text) if draw.random() < 0.8 else 60_000).to_bytes(2 if version == b"\1\0" else 4, "little")
    return b"\x93NUMPY" + version + length + text + data[128:]


def put_special_file(path: Path, draw: random.Random) -> str:
    """Replace a file by something that is not a regular file, or by one of huge size; returns a description."""
    path.unlink()
    match draw.randrange(7):
        case 0:
            path.mkdir()
            return "a folder"
        case 1:
            path.symlink_to(path.name)
            return "a link to itself"
        case 2:
            path.symlink_to("nowhere")
            return "a link to nothing"
        case 3:
            path.symlink_to("/dev/zero")
            return "a link to /dev/zero"
        case 4:
            os.mkfifo(path)
            return "a pipe"
        case 5:
            path.write_bytes(b"")
            return "an empty file"
        case _:
            path.write_bytes(b"{")
            os.truncate(path, draw.choice((5 << 30, 1 << 40)))
            return "a file of zeros of " + ("5 GiB" if path.stat().st_size < 1 << 40 else "1 TiB")
