"""`bardling sample`: what ends a completion, tables of probabilities, and output while it is generated."""

import ast
import io
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bardling.checkpoint.load import load
from bardling.cli.main import main
from bardling.generation.engine import Engine
from chat_models import write_scripted_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_scripted_model(folder / "base", ": one,\x1b[31m!\n", chat=False)
    return folder / "base"


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is sure of nothing."""
    from bardling.checkpoint.contents import write_model
    from bardling.model.gpt import GPT

    folder = write_scripted_model(tmp_path_factory.mktemp("models") / "wild", "ab", chat=False, block_size=64)
    loaded = load(folder)
    model = GPT(loaded.config, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 8
    (folder / "model.safetensors").unlink()
    write_model(folder, loaded.config, model.state_dict(), loaded.tokenizer)
    return folder


@pytest.fixture
def sample(capsys: pytest.CaptureFixture[str]) -> Any:
    """`sample(model, *options)`: what the command prints."""

    def run(model: Path, *options: str) -> str:
        main(["sample", str(model), "--device", "cpu", "--seed", "1", *options])
        return capsys.readouterr().out

    return run


def test_a_completion_ends_before_the_first_stop_string(base: Path, sample: Any) -> None:
    greedy = ("--prompt", "Count:", "--temperature", "0")
    assert sample(base, *greedy) == "Count: one,\x1b[31m!\n\n"
    assert sample(base, *greedy, "--stop", ",") == "Count: one\n"
    assert sample(base, *greedy, "--stop", "never", "--stop=ne", "--stop", "e,") == "Count: o\n"
    assert sample(base, *greedy, "--stop", "\n", "--stop", "one, two") == "Count: one,\x1b[31m!\n"


def test_the_table_has_the_probabilities_of_the_model(wild: Path, sample: Any) -> None:
    out = sample(wild, "--prompt", "ab", "--max_new_tokens", "5", "--logprobs", "3")
    table = out[out.rindex("likely") :].splitlines()[2:]
    loaded = load(wild)
    model, tokenizer = loaded.build(), loaded.needed_tokenizer()
    ids = [0, *tokenizer.encode("ab").tolist()]
    rows = [re.fullmatch(r"(\S+|' ') +([\d.]+)% +(-?[\d.]+) {3}(.*?) *", line) for line in table]
    assert 1 <= len(rows) <= 5
    for row in rows:
        assert row is not None
        with torch.no_grad():
            logprobs = model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].log_softmax(-1)
        ids.append(min(range(len(logprobs)), key=lambda token: abs(float(logprobs[token]) - float(row[3]))))
        assert float(row[3]) == pytest.approx(float(logprobs[ids[-1]]), abs=1e-4)
        assert float(row[2]) == pytest.approx(100 * math.exp(float(row[3])), abs=0.06)
        name = row[1]
        data = tokenizer.token_bytes(ids[-1])
        assert ast.literal_eval(name) in (data, data.decode("utf-8", "ignore"))
        likely = re.findall(r"(\S+|' ') ([\d.]+)%", row[4])
        assert [float(value) for _, value in likely] == pytest.approx((100 * logprobs.exp().topk(3).values).tolist(), abs=0.06)
    plain = sample(wild, "--prompt", "ab", "--max_new_tokens", "5")
    assert out.startswith(plain), "the text itself does not change"
    assert "most likely" not in sample(wild, "--prompt", "ab", "--max_new_tokens", "5", "--logprobs", "0")


def test_several_completions_have_a_title_and_a_table_each(wild: Path, sample: Any) -> None:
    out = sample(wild, "--prompt", "ab", "--max_new_tokens", "4", "--num_samples", "3", "--logprobs", "0")
    parts = re.split(r"--- sample (\d) of 3 ---\n", out)
    assert parts[0] == ""
    assert parts[1::2] == ["1", "2", "3"]
    assert all(part.startswith("ab") and part.count("token ") == 1 for part in parts[2::2])
    alone = sample(wild, "--prompt", "ab", "--max_new_tokens", "4", "--logprobs", "0")
    assert alone.split("\n\ntoken")[0] == parts[2].split("\n\ntoken")[0]


def test_min_p_one_is_greedy_and_a_penalty_avoids_repetition(wild: Path, sample: Any) -> None:
    options = ("--prompt", "ab", "--max_new_tokens", "30")
    greedy = sample(wild, *options, "--temperature", "0")
    assert sample(wild, *options, "--min_p", "1") == greedy
    assert sample(wild, *options) != greedy
    assert len(set(greedy)) < len(set(sample(wild, *options, "--temperature", "0", "--repetition_penalty", "50")))


@pytest.mark.parametrize("weights", ["auto", "float32", "bfloat16", "int8"])
def test_weights_of_fewer_bits_generate_the_same_clear_text(base: Path, sample: Any, weights: str) -> None:
    options = ("--prompt", "Count:", "--temperature", "0", "--weights", weights)
    assert sample(base, *options) == "Count: one,\x1b[31m!\n\n"


class Stream(io.StringIO):
    """Remembers what was printed before each step of the engine."""

    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self.terminal = terminal

    encoding = "utf-8"

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("count", [1, 3])
def test_text_is_printed_while_it_is_generated(base: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    stream, seen = Stream(), list[str]()
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: seen.append(stream.getvalue()) or step(engine))
    monkeypatch.setattr(sys, "stdout", stream)
    main(["sample", str(base), "--prompt", "Count:", "--temperature", "0", "--device", "cpu", "--num_samples", str(count)])
    title = f"--- sample 1 of {count} ---\n" if count > 1 else ""
    text = "Count: one,\x1b[31m!\n"
    assert seen == [title + text[:length] for length in range(6, 6 + len(seen))], "a step generates a token of each completion"
    titles = [f"--- sample {number} of {count} ---\n" if count > 1 else "" for number in range(1, count + 1)]
    assert stream.getvalue() == "".join(f"{title}{text}\n" for title in titles)


def test_a_terminal_receives_no_control_characters(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stream := Stream(terminal=True))
    main(["sample", str(base), "--prompt", "\x07:", "--temperature", "0", "--seed", "1", "--logprobs", "1"])
    assert stream.getvalue().startswith("\\x07: one,\\x1b[31m!\n")
    assert "\x1b[31m" not in stream.getvalue()
    assert "'\\x1b'" in stream.getvalue()


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--min_p=2", "min_p = 2.0: must be between 0 and 1"),
        ("--repetition_penalty=0", "repetition_penalty = 0.0: must be above 0 and finite"),
        ("--stop=", "stop = ('',): must not contain an empty string"),
        ("--logprobs=-1", "logprobs = -1: must be at least 0"),
        ("--seed=99999999999999999999", "seed = 99999999999999999999: must fit in 64 bits"),
        ("--num_samples=0", "--num_samples 0: must be at least 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(base: Path, capsys: pytest.CaptureFixture[str], option: str, says: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sample", str(base), option])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"bardling: {says}")
    assert printed.out == ""
