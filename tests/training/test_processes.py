"""Several processes train like one: the same losses, one log, one set of checkpoints."""

import json

import pytest

from bardling.config.recipes import config_to_toml
from bardling.training.run import train


def records(run, kind):
    return [record for line in (run / "metrics.jsonl").read_text().splitlines() if (record := json.loads(line))["kind"] == kind]


@pytest.mark.parametrize("saving", [False, True], ids=["plain", "recomputation and document mask"])
def test_two_processes_give_the_losses_of_one(tiny, change, tmp_path, torchrun, corpus, saving):
    config = change(tiny, train={"steps": 20, "batch_size": 8, "micro_batch": 2}, eval={"windows": 9})
    if saving:
        lines = corpus.read_text().splitlines()
        (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        data = {"source": str(tmp_path / "text.jsonl"), "tokenizer": "byte", "document_mask": True}
        config = change(config, data=data, train={"recompute": "blocks"}, model={"block_size": 48})
    (tmp_path / "two.toml").write_text(config_to_toml(config))
    done = torchrun(2, "train", tmp_path / "two.toml", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    train(config, tmp_path / "one", quiet=True)
    for kind in ("train", "val"):
        one, two = records(tmp_path / "one", kind), records(tmp_path / "two", kind)
        assert [record["step"] for record in one] == [record["step"] for record in two]
        assert [record["loss"] for record in two] == pytest.approx([record["loss"] for record in one], rel=1e-5)
        assert [record["bits_per_byte"] for record in two] == pytest.approx(
            [record["bits_per_byte"] for record in one], rel=1e-5
        )
    norms = [[record["grad_norm"] for record in records(tmp_path / name, "train")] for name in ("one", "two")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert done.stdout.count("parameters,") == 1, "only the primary process prints"
    assert "Warning" not in done.stderr

    # One process continues a run that two started: the batches are the same.
    longer = change(config, train={"steps": 24})
    (tmp_path / "longer.toml").write_text(config_to_toml(longer))
    from bardling.training.run import resume

    assert resume(tmp_path / "two", change(longer, optim={"decay_steps": 20}), quiet=True).step == 24
    resume(tmp_path / "one", change(longer, optim={"decay_steps": 20}), quiet=True)
    ends = [records(tmp_path / name, "train")[-1]["loss"] for name in ("one", "two")]
    assert ends[1] == pytest.approx(ends[0], rel=1e-5)


def test_two_processes_print_no_warning_and_consume_the_samples_of_one(tiny, change, tmp_path, torchrun, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    config = change(tiny, train={"steps": 6, "batch_size": 8}, optim={"name": "muon", "ema_decay": 0.9})
    config = change(config, sample={"every": 0}, eval={"every": 3})
    (tmp_path / "two.toml").write_text(config_to_toml(config))
    done = torchrun(2, "train", tmp_path / "two.toml", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    train(change(config, train={"micro_batch": 2}), tmp_path / "one", quiet=True)
    one, two = ([record["order_digest"] for record in records(tmp_path / name, "train")] for name in ("one", "two"))
    assert len(set(one)) == 6
    assert two == one
    train(change(config, seed=7), tmp_path / "other", quiet=True)
    other = [record["order_digest"] for record in records(tmp_path / "other", "train")]
    assert not set(other) & set(one)


def test_an_error_in_all_processes_is_reported(tiny, change, tmp_path, torchrun):
    config = change(tiny, train={"batch_size": 5})
    (tmp_path / "odd.toml").write_text(config_to_toml(config))
    done = torchrun(2, "train", tmp_path / "odd.toml", "--out", tmp_path / "run")
    assert done.returncode != 0
    assert "does not divide among 2 processes: use 4 or 6" in done.stderr
    assert "Traceback (most recent call last)" not in done.stdout
    assert not (tmp_path / "run").exists()
