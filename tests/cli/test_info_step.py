"""`bardling info RUN --step N`, compared with the actual batches and texts."""

import json
import re

import pytest

from bardling.cli.info import run as info
from bardling.data.tokens.dataset import open_data
from bardling.errors import UserError
from bardling.training import loop
from bardling.training.run import resume, train


@pytest.fixture
def numbered(tmp_path):
    path = tmp_path / "numbered.jsonl"
    path.write_text("".join(json.dumps({"text": f"I am text {n}. " + "and on " * 9}) + "\n" for n in range(60)))
    return path


@pytest.fixture
def seen(monkeypatch):
    """The inputs of each step, by step."""
    found = {}
    original = loop.train_step

    def record(state, batches, *arguments, **options):
        found[state.step + 1] = [row.tolist() for batch in batches for row in batch.inputs]
        return original(state, batches, *arguments, **options)

    monkeypatch.setattr(loop, "train_step", record)
    return found


def sequences(output):
    return [
        tuple(map(int, pair)) for pair in re.findall(r"^sample [\d,]+: tokens (\d+) to (\d+);", output.replace(",", ""), re.M)
    ]


def test_it_names_the_sequences_and_documents_of_the_step(tiny, change, numbered, seen, tmp_path, capsys):
    config = change(tiny, data={"source": str(numbered)}, train={"steps": 12, "micro_batch": 2}, sample={"every": 0})
    run = train(config, tmp_path / "run", quiet=True).folder
    larger = change(config, train={"steps": 16, "batch_size": 6}, optim={"decay_steps": 12})
    resume(run, larger, quiet=True)  # from here on, a step has more samples
    dataset = open_data(config.data)
    split = dataset.split("train")
    for step in (1, 7, 12, 13, 16):
        capsys.readouterr()
        info([str(run), "--step", str(step)])
        output = capsys.readouterr().out
        found = sequences(output)
        assert [split.read(start, end - start).tolist() for start, end in found] == seen[step]
        assert len(found) == (4 if step <= 12 else 6)
        for block in output.split("\nsample ")[1:]:
            begin = int(re.search(r"tokens ([\d,]+)", block)[1].replace(",", ""))
            # The text of each document contains its number: compare it with the name.
            pattern = r"'numbered.jsonl:(\d+)' \(document \d+ tokens (\d+) to (\d+)\)"
            named = re.findall(pattern, block.replace(",", ""))
            assert named
            for number, first, last in (map(int, match) for match in named):
                assert dataset.tokenizer.decode(split.read(first, 13).tolist()).startswith(f"I am text {number - 1}")
                assert first <= begin + 16
                assert last >= begin
            assert re.search(r"begins '", block)


@pytest.mark.parametrize("step", [0, 31])
def test_a_step_that_the_run_does_not_have(tiny, tmp_path, step):
    run = train(tiny, tmp_path / "run", quiet=True).folder
    with pytest.raises(UserError, match=rf"--step {step}: .* has steps 1 to 30"):
        info([str(run), "--step", str(step)])


def test_missing_data_and_old_data_without_an_index(tiny, change, numbered, tmp_path, capsys):
    from bardling.data.tokens.prepare import prepare

    dataset = prepare(str(numbered), tmp_path / "set", "byte")
    config = change(tiny, data={"source": str(dataset.path)}, train={"steps": 6}, sample={"every": 0})
    run = train(config, tmp_path / "run", quiet=True).folder
    for path in dataset.path.glob("documents-*"):
        path.unlink()
    capsys.readouterr()
    info([str(run), "--step", "2"])
    output = capsys.readouterr().out
    assert "the document at tokens" in output
    assert "prepare the text again" in output
    dataset.path.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"dataset.json: the dataset cannot be opened"):
        info([str(run), "--step", "2"])
