"""The unpickler for plain data takes vocabularies and refuses everything that could run code or grow."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bardling.errors import UserError
from bardling.files.safe_pickle import MAX_PICKLE_BYTES, load_plain_pickle

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**100), 2**100) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    ),
    max_leaves=20,
)


def outcome(path: Path) -> tuple[object, str]:
    """What the pickle holds, and the message of the only error that may come."""
    try:
        return load_plain_pickle(path), ""
    except UserError as error:
        return None, str(error)


class Creates:
    """Pickles into a program that creates the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@settings(max_examples=150, deadline=None)
@given(value=PLAIN, protocol=st.integers(0, 5))
def test_plain_data_comes_back(tmp_path_factory: pytest.TempPathFactory, value: object, protocol: int) -> None:
    path = tmp_path_factory.getbasetemp() / "plain.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    loaded, message = outcome(path)
    # Protocols below 3 have no instruction for bytes: pickle writes them as a call, which is refused.
    assert loaded == value if not message else protocol < 3 and "refused" in message


def test_a_vocabulary(tmp_path: Path) -> None:
    chars = [chr(code) for code in range(32, 3000)]
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {char: i for i, char in enumerate(chars)}}
    for protocol in range(6):
        path = tmp_path / "meta.pkl"
        path.write_bytes(pickle.dumps(meta, protocol))
        assert load_plain_pickle(path) == meta


@pytest.mark.parametrize("protocol", range(6))
def test_a_program_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    victim = tmp_path / "made"
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps({"vocab_size": 3, "itos": Creates(victim)}, protocol))
    with pytest.raises(UserError, match=r"meta\.pkl: refused") as caught:
        load_plain_pickle(path)
    assert "\n" not in str(caught.value)
    assert not victim.exists()
    pickle.loads(path.read_bytes())  # the program does run where pickles are run: the test can fail
    assert victim.exists()


SHARED = [1]
NESTED: list[object] = []
for _ in range(100):
    NESTED = [NESTED]
ENDLESS: list[object] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    "value", [OrderedDict(a=1), {1, 2}, Path("x"), len, 1j, bytearray(b"a"), [SHARED, SHARED], NESTED, ENDLESS, 1 << 300]
)
def test_what_is_not_a_small_tree_of_plain_data(tmp_path: Path, value: object) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(UserError, match=r"meta\.pkl: refused"):
        load_plain_pickle(path)


UNKNOWN_VERSION = b"\x80\x09N."  # around a plain None, which reads well
DAMAGED = [
    *(b"", b".", b"NN.", b"t.", b"(.", b"((.", b"u.", b"(Nu.", b"N(s.", b"}(Nu.", b"h\x05.", b"\x85.", b"](h\x00e.", b"Na."),
    *(b"}Na.", b"I" + b"9" * 5000 + b"\n.", b"X\xff\xff\xff\x7fab.", b"X\x01\x00\x00\x00\xff.", b"q\x00.", b"garbage"),
    UNKNOWN_VERSION,
]


@pytest.mark.parametrize("data", DAMAGED)
def test_damaged_pickles(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(data)
    loaded, message = outcome(path)
    assert loaded is None
    assert str(path) in message or data == UNKNOWN_VERSION


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60))
def test_any_bytes_are_a_value_or_an_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.pkl"
    path.write_bytes(data)
    assert len(outcome(path)[1].splitlines()) <= 1


def test_missing_and_large_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_plain_pickle(tmp_path / "none.pkl")
    with (tmp_path / "large.pkl").open("wb") as file:
        file.truncate(MAX_PICKLE_BYTES + 1)
    with pytest.raises(UserError, match="too large"):
        load_plain_pickle(tmp_path / "large.pkl")
