"""Runs on a mixture: the same samples whatever interrupts them, a validation loss for each source, and changes refused."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from bardling.checkpoint.load import load
from bardling.checkpoint.model_card import model_card
from bardling.checkpoint.run_folder import RunFolder
from bardling.cli import eval as eval_command
from bardling.cli import info
from bardling.config import SourceConfig
from bardling.config.recipes import config_to_toml, load_recipe, parse_recipe
from bardling.distributed.context import SINGLE
from bardling.distributed.device import choose_precision
from bardling.errors import UserError
from bardling.monitor.records import TIMING_FIELDS
from bardling.tools.scores import Wanted, measure
from bardling.training.recovery.trace import trace_step
from bardling.training.run import resume, train

WORDS = {"web": "the a of and", "code": "def if return else", "books": "whale sea ship captain"}


def metrics(run, kind="train"):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if k not in TIMING_FIELDS} for record in records if record["kind"] == kind]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    chance, folder = random.Random(0), tmp_path_factory.mktemp("sources")
    for name, words in WORDS.items():
        rows = [" ".join(chance.choices(words.split(), k=chance.randint(5, 60))) for _ in range(150)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


@pytest.fixture
def mixture(tiny, change, texts):
    """80 / 15 / 5 for three quarters of 64 steps of 16 samples, then 20 / 60 / 20."""
    weights = {"web": (0.8, 0.2), "code": (0.15, 0.6), "books": (0.05, 0.2)}
    sources = tuple(SourceConfig(str(texts / f"{name}.jsonl"), weight) for name, weight in weights.items())
    data = {"source": "", "sources": sources, "stages": (0.75,), "tokenizer": "byte"}
    config = change(tiny, data=data, train={"steps": 64, "batch_size": 16}, eval={"every": 16})
    return change(config, sample={"every": 0}, checkpoint={"every": 16, "keep_last": 9})


def test_a_mixture_resumes_exactly_on_one_and_two_processes(mixture, change, tmp_path, torchrun, stopped_at, weights):
    one = tmp_path / "one"
    train(mixture, one, quiet=True)
    assert load_recipe(str(one / "config.toml")).data.stages == (768,), "the run records where the stage begins"
    before = stopped_at(32, one, tmp_path / "before")
    resume(before, quiet=True)  # through the change
    assert metrics(before) == metrics(one)
    assert weights(before, 64) == weights(one, 64)
    after = stopped_at(48, one, tmp_path / "after")
    done = torchrun(2, "resume", stopped_at(32, one, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    resume(after, quiet=True)
    digests = [[record["order_digest"] for record in metrics(run)] for run in (one, after, tmp_path / "two")]
    assert digests[0] == digests[1] == digests[2]

    # What each step saw, according to the run itself: the weights, to a sample.
    counts = {"web": [0, 0], "code": [0, 0], "books": [0, 0]}
    for step in range(1, 65):
        for sequence in trace_step(RunFolder(tmp_path / "two"), step).sequences:
            counts[sequence.source][step > 48] += 1
    assert counts == {"web": [614, 51], "code": [115, 154], "books": [39, 51]}
    epochs = {name: metrics(one)[-1][f"epoch/{name}"] for name in WORDS}
    assert all(0 < value < 10 for value in epochs.values())

    # The loss of all is the mean of those of the sources with the last weights.
    for record in metrics(one, "val"):
        mean = sum(share * record[f"loss/{name}"] for name, share in zip(WORDS, (0.2, 0.6, 0.2), strict=True))
        assert record["loss"] == pytest.approx(mean, rel=1e-12)
    two = metrics(tmp_path / "two", "val")[-1]
    assert two["loss/code"] == pytest.approx(metrics(one, "val")[-1]["loss/code"], rel=1e-4)

    # More steps leave the stage where it was.
    longer = change(load_recipe(str(one / "config.toml")), train={"steps": 66})
    assert resume(one, longer, quiet=True).step == 66
    assert load_recipe(str(one / "config.toml")).data.stages == (768,)
    assert metrics(one)[-3]["order_digest"] == digests[0][-1]


def test_a_started_mixture_keeps_its_sources_and_weights(mixture, change, tmp_path):
    config = change(mixture, train={"steps": 4}, eval={"every": 0})
    train(config, tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match=r"^data.sources: web has [\d,]+ training tokens, but one sequence needs .*: add text"):
        train(change(config, model={"block_size": 50_000}), tmp_path / "long", quiet=True)
    web, code, books = load_recipe(str(tmp_path / "run" / "config.toml")).data.sources
    for values in (
        {"sources": (web, code)},
        {"sources": (web, code, SourceConfig(books.source, (0.1, 0.2)))},
        {"stages": (0.9,)},
        {"sources": (), "stages": (), "source": web.source},
    ):
        with pytest.raises(UserError, match=r"^data\.\w+ = .*: a run that has started keeps"):
            resume(tmp_path / "run", change(config, data=values), quiet=True)
    assert resume(tmp_path / "run", change(config, train={"steps": 5}, data={"stages": (48,)}), quiet=True).step == 5


def test_a_validation_text_of_its_own(mixture, change, tmp_path, texts):
    config = change(mixture, data={"val_source": str(texts / "books.jsonl")}, train={"steps": 4}, eval={"windows": 10_000})
    train(config, tmp_path / "run", quiet=True)
    record = RunFolder(tmp_path / "run").dataset_record()
    assert [part["val_tokens"] for part in record["sources"]] == [0, 0, 0]
    assert [part["train_documents"] for part in record["sources"]] == [150, 150, 150]
    assert record["validation"][0]["train_tokens"] == 0
    rows = [json.loads(line)["text"] for line in (texts / "books.jsonl").read_text().splitlines()]
    assert record["val_tokens"] == sum(len(row) + 1 for row in rows), "all of it, and an end-of-text token for each row"
    measured = measure(str(tmp_path / "run"), Wanted(batch_size=8), choose_precision("float32", SINGLE.device), SINGLE)
    assert measured.loss.loss == pytest.approx(metrics(tmp_path / "run", "val")[-1]["loss"], rel=1e-6)
    fraction = change(config, data={"val_fraction": 0.5})
    train(fraction, tmp_path / "other", quiet=True)
    assert metrics(tmp_path / "other") == metrics(tmp_path / "run"), "data.val_fraction does not apply"


def test_what_happened_to_the_validation_text_is_told(mixture, change, tmp_path, texts, capsys):
    path = tmp_path / "val.jsonl"
    path.write_text((texts / "books.jsonl").read_text() + '{"text": null}\n')
    config = change(mixture, data={"val_source": str(path)}, train={"steps": 2}, eval={"every": 0})
    train(config, tmp_path / "run")
    assert f"{path}: left out: 1 x empty file or row" in capsys.readouterr().out
    path.write_text(path.read_text() + '{"text": "more"}\n')
    resume(tmp_path / "run", change(config, train={"steps": 3}))
    assert f"{path}: has changed since it was prepared" in capsys.readouterr().out


def test_mixtures_of_the_same_names_are_not_taken_for_the_same_text(mixture, change, tmp_path, texts, capsys):
    config, runs = change(mixture, train={"steps": 2}, eval={"every": 0}), list[str]()
    for names in (("web", "code"), ("books", "code")):
        named = [SourceConfig(str(texts / f"{name}.jsonl"), name=f"s{number}") for number, name in enumerate(names)]
        run = tmp_path / names[0]
        train(change(config, data={"sources": tuple(named), "stages": ()}), run, quiet=True)
        runs.append(str(run))
    eval_command.run([*runs, "--device", "cpu"])
    assert len(re.findall(r"^measured on .* the mixture of s0, s1", capsys.readouterr().out, re.MULTILINE)) == 2


def test_one_source_in_a_list_is_that_source(mixture, change, tmp_path):
    (source, *_) = mixture.data.sources
    alone = change(mixture, data={"sources": (), "stages": (), "source": source.source}, train={"steps": 6})
    listed = change(mixture, data={"sources": (SourceConfig(source.source),), "stages": ()}, train={"steps": 6})
    train(alone, tmp_path / "alone", quiet=True)
    train(listed, tmp_path / "listed", quiet=True)
    for kind in ("train", "val"):
        assert metrics(tmp_path / "listed", kind) == metrics(tmp_path / "alone", kind)


def test_packed_documents_resume_even_if_the_rows_are_gone(mixture, change, tmp_path, stopped_at, weights):
    data = {"packing": "documents", "cache": str(tmp_path / "cache"), "stages": (100,)}
    config = change(mixture, data=data, train={"steps": 16}, eval={"every": 8, "windows": 10_000}, checkpoint={"every": 8})
    run = tmp_path / "run"
    train(config, run, quiet=True)
    seen = trace_step(RunFolder(run), 16)
    assert {sequence.length for sequence in seen.sequences} == {17}
    assert all(document.name.startswith(each.source) for each in seen.sequences for document in each.documents)
    measured = measure(str(run), Wanted(batch_size=8), choose_precision("float32", SINGLE.device), SINGLE)
    assert measured.loss.loss == pytest.approx(metrics(run, "val")[-1]["loss"], rel=1e-6)
    for name, result in measured.loss.sources.items():
        assert result.loss == pytest.approx(metrics(run, "val")[-1][f"loss/{name}"], rel=1e-6)
    copy = stopped_at(8, run, tmp_path / "copy")
    shutil.rmtree(tmp_path / "cache")
    resume(copy, quiet=True)
    assert metrics(copy) == metrics(run)
    assert weights(copy, 16) == weights(run, 16)
    with pytest.raises(UserError, match=r"data.packing = 'concat': a run that has started keeps 'documents'"):
        resume(run, change(config, data={"packing": "concat"}), quiet=True)
    with pytest.raises(UserError, match=r"train.context_start: rows are packed for the whole context"):
        train(change(config, train={"context_start": 8}), tmp_path / "other", quiet=True)


def test_every_command_names_the_sources(mixture, change, tmp_path, capsys):
    run = tmp_path / "run"
    train(change(mixture, train={"steps": 4}, eval={"every": 4}), run, quiet=True)
    capsys.readouterr()
    info.run([str(run)])
    about = " ".join(capsys.readouterr().out.split())
    assert "mixture of 3 sources, tokenizer byte, weights change at sample 48" in about
    assert re.search(r"web\.jsonl, weight 0\.8 -> 0\.2, \d\.\d\d epochs, validation loss \d\.\d{4}", about)
    eval_command.run([str(run), "--device", "cpu", "--precision", "float32"])
    evaluated = capsys.readouterr().out
    assert re.search(r"code +\d\.\d{4} nats per token", evaluated)
    assert "of the mixture of web, code, books" in evaluated
    card = model_card(str(run), load(run), best=False, name="mixed", dtype="float32")
    assert "`web.jsonl` (weight 0.8 then 0.2), `code.jsonl` (weight 0.15 then 0.6)" in card
    recipe = re.search(r"```toml\n(.*?)```", card, re.DOTALL)[1]
    assert parse_recipe(recipe, "card").data.sources[0] == SourceConfig("web.jsonl", (0.8, 0.2))


@pytest.mark.slow
def test_a_mixture_that_is_killed_ends_like_one_that_is_not(mixture, change, tmp_path):
    config = change(mixture, train={"steps": 640}, checkpoint={"every": 20}, eval={"every": 160})
    train(config, tmp_path / "one", quiet=True)
    (tmp_path / "mix.toml").write_text(config_to_toml(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "bardling"]
    run, kills = tmp_path / "killed", 0
    commands = [
        [*launcher, "train", tmp_path / "mix.toml", "--out", run],
        [sys.executable, "-m", "bardling", "resume", run],
        [*launcher, "resume", run],
    ]
    for command, until in zip(commands, (300, 500, None), strict=True):  # before and after the change at step 480
        process = subprocess.Popen(list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
        while process.poll() is None:
            if until is not None and (run / "checkpoints" / f"step-{until:06d}").is_dir():
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
            time.sleep(0.02)
    assert kills == 2
    assert [record["order_digest"] for record in metrics(run)] == [
        record["order_digest"] for record in metrics(tmp_path / "one")
    ]
    total = dict.fromkeys(WORDS, 0)
    for step in range(1, 481):
        for sequence in trace_step(RunFolder(run), step).sequences:
            total[sequence.source] += 1
    assert {name: total[name] / 7680 for name in total} == pytest.approx({"web": 0.8, "code": 0.15, "books": 0.05}, abs=0.001)
