"""nanoGPT-style configs are read without being executed."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bardling.errors import UserError
from bardling.interop.python_config import parse_flat_flags, read_nanogpt_arguments, read_py_config

KEYS = {
    "out_dir": str,
    "wandb_run_name": str,
    "max_iters": int,
    "lr_decay_iters": int,
    "gradient_accumulation_steps": int,
    "learning_rate": float,
    "grad_clip": float,
    "compile": bool,
    "top_k": int | None,
    "start": str,
}


def write(tmp_path: Path, text: str, name: str = "config.py") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def outcome(path: Path) -> tuple[dict[str, object], str]:
    """What the file sets, and the message of the only error that may come."""
    try:
        return read_py_config(path, KEYS), ""
    except UserError as error:
        return {}, str(error)


def test_every_construct_of_the_old_configs(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '''"""Finetunes something."""
# a comment
import time

out_dir = 'out-' + "plays"   # trailing comment
wandb_run_name = 'ft-' + str(time.time())
gradient_accumulation_steps = 5 * 8
max_iters = lr_decay_iters = 2_000
learning_rate=3e-5
grad_clip = -(-2) / 4
compile = not True
_gpus = 8
gradient_accumulation_steps *= _gpus
top_k, start = None, "\\n"
max_iters: int = int(lr_decay_iters * 1.5)
''',
    )
    before = time.time()
    values = read_py_config(path, KEYS)
    stamp = str(values.pop("wandb_run_name"))
    assert before <= float(stamp.removeprefix("ft-")) <= time.time()
    assert values == {
        "out_dir": "out-plays",
        "gradient_accumulation_steps": 320,
        "max_iters": 3000,
        "lr_decay_iters": 2000,
        "learning_rate": 3e-5,
        "grad_clip": 0.5,
        "compile": False,
        "top_k": None,
        "start": "\n",
    }
    assert isinstance(values["learning_rate"], float)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("max_iters = 1\nimport os", 2, "import os"),
        ("import time as t", 1, "not a setting"),
        ("from time import time", 1, "not a setting"),
        ("out_dir = open('x').read()", 1, "open('x')"),
        ("out_dir = __import__('os').getcwd()", 1, "literal"),
        ("max_iters = (lambda: 1)()", 1, "literal"),
        ("out_dir = ''.join(['a'])", 1, "literal"),
        ("out_dir = f'{1}'", 1, "literal"),
        ("exec('1')", 1, "not a setting"),
        ("for i in (1,):\n  pass", 1, "not a setting"),
        ("if True:\n  max_iters = 1", 1, "not a setting"),
        ("def f(): pass", 1, "not a setting"),
        ("\n\nmax_iter = 3", 3, "did you mean 'max_iters'?"),
        ("max_iters = lr_decay", 1, "has no value"),
        ("max_iters = 'many'", 1, "must be an integer"),
        ("max_iters = True", 1, "must be an integer"),
        ("max_iters = 1.5", 1, "must be an integer"),
        ("compile = 1", 1, "must be True or False"),
        ("max_iters = 9**9**9", 1, "too large"),
        ("max_iters = 1 << 9", 1, "literal"),
        ("max_iters = 1 // 0", 1, "cannot be computed"),
        ("learning_rate = 1e308 * 10", 1, "finite"),
        ("learning_rate = (-1) ** 0.5", 1, "finite"),
        ("learning_rate = 10.0 ** 400", 1, "cannot be computed"),
        ("out_dir = 'a' * 10**9", 1, "repeated"),
        ("out_dir = '%999999999d' % 1", 1, "arithmetic"),
        ("out_dir = 'a' + 1", 1, "str()"),
        ("max_iters = " + "-" * 300 + "1", 1, "levels"),
        ("max_iters = " + "(" * 5000 + "1" + ")" * 5000, 1, ""),
        ("max_iters = " + "9" * 200, 1, "too large"),
        ("max_iters = " + "9" * 9000, 1, ""),
        ("max_iters = 3 +", 1, "not valid Python"),
        ("max_iters = 3\n'text'", 2, "not a setting"),
        ("time.x = 3", 1, "not a name"),
        ("max_iters, compile = 3", 1, "not a name"),
        ("max_iters = [1][0]", 1, "literal"),
        ("max_iters = \x00", 1, "null"),
        ("_x = (1, 2)\n" + "_x = (_x, _x)\n" * 40 + "out_dir = str(_x)", 42, "neither a number nor a string"),
        ("_x = (1, 2)\n" + "_x = (_x, _x)\n" * 40 + "out_dir = _x", 42, "is a tuple"),
    ],
)
def test_what_is_not_a_setting_is_refused_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_py_config(path, KEYS)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert words in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 400


def test_a_file_that_would_act_does_nothing(tmp_path: Path) -> None:
    victim = tmp_path / "made"
    path = write(tmp_path, f"out_dir = str(open({str(victim)!r}, 'w').write('x'))")
    with pytest.raises(UserError):
        read_py_config(path, KEYS)
    assert not victim.exists()


def test_missing_binary_and_endless_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_py_config(tmp_path / "none.py", KEYS)
    for data, encoding in ((b"\x80abc", "UTF-8"), (b"\xff\xfe\x00", "UTF-16")):
        (tmp_path / "b.py").write_bytes(data)
        with pytest.raises(UserError, match=encoding):
            read_py_config(tmp_path / "b.py", KEYS)
    with pytest.raises(UserError, match="too large"):
        read_py_config(write(tmp_path, "# " + "x" * 300_000), KEYS)
    assert read_py_config(write(tmp_path, "\ufeff# mark\r\nmax_iters = 1\r\n"), KEYS) == {"max_iters": 1}
    assert read_py_config(write(tmp_path, ""), KEYS) == {}


def test_flags() -> None:
    flags = ["--max_iters=20", "--learning_rate=1", "--compile=False", "--start=a=b", "--out_dir=123", "--top_k=None"]
    assert parse_flat_flags(flags, KEYS) == {
        "max_iters": 20,
        "learning_rate": 1.0,
        "compile": False,
        "start": "a=b",
        "out_dir": "123",
        "top_k": None,
    }
    assert parse_flat_flags(["--start='x y'", "--max-iters=1e3", "--compile=true"], KEYS) == {
        "start": "x y",
        "max_iters": 1000,
        "compile": True,
    }
    assert parse_flat_flags(["--start=time.time()", "--out_dir="], KEYS) == {"start": "time.time()", "out_dir": ""}
    assert parse_flat_flags(["--start='"], KEYS) == {"start": "'"}
    assert isinstance(parse_flat_flags(["--learning_rate=1"], KEYS)["learning_rate"], float)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--max_iter=3", "did you mean 'max_iters'?"),
        ("--compile=maybe", "maybe"),
        ("--compile=1", "True or False"),
        ("--max_iters=", "not valid Python"),
        ("--max_iters=__import__('os')", "literal"),
        ("--max_iters", "--max_iters=VALUE"),
        ("max_iters=3", "form --key=value"),
        ("-x=3", "form --key=value"),
        ("--max_iters=9**9**9", "too large"),
    ],
)
def test_flags_that_do_not_fit(flag: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_flat_flags([flag], KEYS)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_left_to_right(tmp_path: Path) -> None:
    one = write(tmp_path, "max_iters = 10\ncompile = False", "one.py")
    two = write(tmp_path, "lr_decay_iters = max_iters * 2\nmax_iters = base", "two.py")
    with pytest.raises(UserError, match=r"two\.py:2"):
        read_nanogpt_arguments([str(one), str(two)], KEYS)
    two.write_text("lr_decay_iters = max_iters * 2\nmax_iters = 30\ngrad_clip = learning_rate")
    args = [str(one), "--max_iters=15", str(two), "--compile=True"]
    assert read_nanogpt_arguments(args, KEYS, {"learning_rate": 0.5}) == {
        "max_iters": 30,
        "compile": True,
        "lr_decay_iters": 30,
        "grad_clip": 0.5,
    }


ATOMS = st.sampled_from(
    ["1", "2.5", "'a'", "True", "None", "max_iters", "x", "time.time()", "str(3)", "open('f')", "10**90", "[1]"]
)
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "<", "and", "@"]), inner).map(
            lambda p: f"({p[0]}) {p[1]} ({p[2]})"
        ),
        inner.map(lambda e: f"-({e})"),
        inner.map(lambda e: f"str({e})"),
        inner.map(lambda e: f"({e}).__class__"),
        st.tuples(inner, inner).map(lambda p: f"({p[0]}, {p[1]})"),
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(key=st.sampled_from([*KEYS, "nokey", "_help"]), expression=EXPRESSIONS)
def test_any_expression_is_a_value_of_its_type_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, key: str, expression: str
) -> None:
    path = write(tmp_path_factory.getbasetemp(), f"max_iters = 4\n{key} = {expression}\n", "any.py")
    values, message = outcome(path)
    assert message == "" or message.startswith(f"{path}:2: ")
    assert set(values) <= set(KEYS)
    for name, value in values.items():
        assert isinstance(value, KEYS[name])


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_is_settings_or_an_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any_text.py"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert len(outcome(path)[1].splitlines()) <= 1
