"""What a run prints: its size, samples with their prompt, and where it resumes."""

import json
import re

import pytest

from bardling.checkpoint.run_folder import RunFolder
from bardling.cli.main import main
from bardling.errors import UserError
from bardling.training import session
from bardling.training.run import resume, train
from bardling.training.state import TrainState


@pytest.mark.parametrize(("micro_batch", "message"), [(4, "(1 forward pass of 4)"), (2, "(2 forward passes of 2)")])
def test_forward_passes_are_counted_in_correct_grammar(tiny, change, tmp_path, capsys, micro_batch, message):
    train(change(tiny, train={"steps": 8, "micro_batch": micro_batch}), tmp_path / "run")
    assert message in capsys.readouterr().out


def test_samples_start_with_their_prompt_as_the_sample_command_prints_them(tiny, change, tmp_path, capsys):
    config = change(tiny, train={"steps": 8}, sample={"every": 8, "prompt": "the ", "max_new_tokens": 5})
    run = train(config, tmp_path / "run").folder
    printed = capsys.readouterr().out.split("--- sample at step 8 ---\n")[1].split("\n---\n")[0]
    assert printed.startswith("the ")
    argv = ["--prompt", "the ", "--max_new_tokens", "5", "--seed", str(config.seed + 8)]
    main(["sample", str(run), *argv])
    assert capsys.readouterr().out == printed + "\n"


def test_without_a_prompt_a_sample_is_the_completion_alone(tiny, change, tmp_path, capsys):
    """Text of a single document starts after a line break, which is not printed."""
    train(change(tiny, train={"steps": 8}, sample={"every": 8, "max_new_tokens": 5}), tmp_path / "run")
    printed = capsys.readouterr().out.split("--- sample at step 8 ---\n")[1].split("\n---\n")[0]
    assert len(printed) == 5


def test_a_finished_run_tells_how_to_continue_it(tiny, change, tmp_path, capsys):
    run = train(change(tiny, train={"steps": 8}), tmp_path / "run", quiet=True).folder
    main(["resume", str(run)])
    out = capsys.readouterr().out
    assert f"{run} is finished: all 8 steps are complete; raise --train.steps to continue it" in out
    assert "resuming" not in out
    main(["resume", str(run), "--train.steps", "9"])
    out = capsys.readouterr().out
    assert f"resuming {run} at step 8 of 9" in out
    assert "is finished" not in out


def test_steps_may_be_lowered_to_the_current_step_but_not_below(tiny, change, tmp_path, stopped_at):
    config = change(tiny, train={"batch_start": 1})
    run = stopped_at(20, train(config, tmp_path / "whole", quiet=True).folder, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"train.steps = 19: .*run has already completed 20 steps; set it to at least that"):
        resume(run, change(config, train={"steps": 19}), quiet=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert resume(run, change(config, train={"steps": 20}), quiet=True).step == 20


def test_a_deadline_overrides_the_configured_steps(tiny, change, tmp_path, capsys):
    config = change(tiny, train={"deadline": "3s", "steps": 3}, optim={"warmup_steps": 2}, sample={"every": 0})
    done = train(config, tmp_path / "run", quiet=True)
    assert done.step > 3
    assert resume(done.folder).step >= done.step
    assert f"resuming {done.folder} at step {done.step:,}, sample order digest " in capsys.readouterr().out
    main(["info", str(done.folder)])
    assert re.search(r"progress +step \d+, finished", capsys.readouterr().out)
    with pytest.raises(UserError, match=r"train.steps = 3: .*run has already completed \d+ steps"):
        resume(done.folder, change(RunFolder(done.folder).config(), train={"deadline": None}), quiet=True)


def test_steps_may_not_be_below_those_of_a_continued_checkpoint(tiny, change, tmp_path):
    config = change(tiny, train={"steps": 8})
    run = train(config, tmp_path / "run", quiet=True).folder
    main(["export", str(run), "--format", "nanogpt", "--out", str(tmp_path / "a")])
    with pytest.raises(UserError, match=r"train.steps = 7: .*ckpt.pt has already completed 8 steps"):
        train(change(config, train={"steps": 7}), tmp_path / "b", continue_from=str(tmp_path / "a" / "ckpt.pt"), quiet=True)
    with pytest.raises(UserError, match=r"holds the state of AdamW, but this run uses Muon: set optim.name to"):
        train(change(config, optim={"name": "muon"}), tmp_path / "b", continue_from=str(tmp_path / "a"), quiet=True)
    assert not (tmp_path / "b").exists()


def test_resuming_prints_the_digest_of_the_samples(tiny, change, tmp_path, monkeypatch, capsys):
    def digests(run):
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [record.get("order_digest") for record in lines if record["kind"] == "train"]

    config = change(tiny, sample={"every": 0})
    whole = digests(train(config, tmp_path / "whole", quiet=True).folder)
    shorter = change(config, train={"steps": 10}, optim={"decay_steps": 30})
    new = train(shorter, tmp_path / "new", quiet=True).folder
    resume(new, config)
    assert f"resuming {new} at step 10 of 30, sample order digest {whole[9]}\n" in capsys.readouterr().out
    assert digests(new) == whole

    # Checkpoints of earlier versions have no digest.
    for samples, known in ((40, True), (39, False)):
        with monkeypatch.context() as patch:
            patch.setattr(TrainState, "digest_samples", lambda state: None)
            old = train(shorter, tmp_path / f"old-{samples}", quiet=True).folder
        assert digests(old) == [None] * 10
        monkeypatch.setattr(session, "MAX_DIGESTED", samples)
        resume(old, config)
        said = f"at step 10 of 30, sample order digest {whole[9]}\n" if known else f"{'0' * 16} (from sample 41 on)\n"
        assert said in capsys.readouterr().out
        assert (digests(old)[10:] == whole[10:]) == known
