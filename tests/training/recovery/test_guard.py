"""Bad steps are detected, explained, skipped and rolled back, alike in all processes and after any interruption."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bardling.config import CheckpointConfig, DataConfig, EvalConfig, GuardConfig, SampleConfig, TrainConfig
from bardling.config.recipes import config_to_toml
from bardling.data.tokens.documents import Documents
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.monitor.records import TIMING_FIELDS
from bardling.tools.bench import bench
from bardling.training.recovery.guard import Guard
from bardling.training.recovery.rollback_log import read_rollbacks
from bardling.training.recovery.spikes import LARGEST, Limits, StepHistory
from bardling.training.run import resume, train

MARKER = "§"
WINDOW = 16  # of the guard

# Multiplies the loss of all targets after a given token, as a broken document would.
EXPLODE = """
import sys
import torch
from bardling.model.gpt import GPT

def explode(token, factor):
    original = GPT.forward
    def forward(self, tokens, targets=None, *, reduction="sum", tally=None, **rest):
        if targets is None:
            return original(self, tokens, targets, reduction=reduction, **rest)
        losses = original(self, tokens, targets, reduction="none", **rest)
        losses = losses * torch.where((tokens == token).cumsum(1) > 0, factor, 1.0)
        if reduction == "none":
            return losses
        return losses.sum() if tally is None else losses.sum() * torch.ones(2)
    GPT.forward = forward
    return original
"""
space: dict = {}
exec(EXPLODE, space)
DRIVER = (
    EXPLODE
    + """
from pathlib import Path
from bardling.config.recipes import load_recipe
from bardling.training.run import train
explode(int(sys.argv[3]), float(sys.argv[4]))
train(load_recipe(sys.argv[1]), Path(sys.argv[2]))
"""
)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """14 documents, one of which contains the marker, in the training split."""
    path = tmp_path_factory.mktemp("marked") / "marked.jsonl"
    rows = []
    for number in range(14):
        words = ["king", "rose", "love"] * 5
        text = "".join(f"the {word} met the sea {(n + number) % 10} times. " for n, word in enumerate(words))
        rows.append(text[:200] + MARKER + text[201:] if number == 9 else text)
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def guarded(tiny, change, marked):
    """A run that meets the marker about twice."""
    return change(
        tiny,
        data=DataConfig(source=str(marked), tokenizer="char", val_fraction=0.1),
        train={"steps": 120, "batch_size": 4, "micro_batch": 2, "log_every": 1},
        eval=EvalConfig(every=20, windows=8),
        sample=SampleConfig(every=50, max_new_tokens=4),
        checkpoint=CheckpointConfig(every=10, keep_last=2),
        guard=GuardConfig(policy="rollback", window=WINDOW, max_rollbacks=8),
    )


@pytest.fixture
def marker(guarded):
    from bardling.data.tokens.dataset import open_data

    return open_data(guarded.data).tokenizer.encode_batch([MARKER])[0].tolist()[0]


@pytest.fixture
def explode(marker):
    def do(factor):
        originals.append(space["explode"](marker, factor))

    originals: list = []
    yield do
    if originals:
        GPT.forward = originals[0]


def records(run, kind=None):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [record for record in lines if kind in (None, record["kind"])]
    return [{key: value for key, value in record.items() if key not in TIMING_FIELDS} for record in kept]


def weights(run, step):
    return (run / "checkpoints" / f"step-{step:06d}" / "model.safetensors").read_bytes()


def launch_two(tmp_path, config, run, marker, factor):
    """Train in two processes with the driver."""
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "recipe.toml").write_text(config_to_toml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "driver.py"), str(tmp_path / "recipe.toml"), str(run), str(marker), str(factor)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_spike_scores_match_a_plain_computation():
    config, history = GuardConfig(window=20, loss_z=6.0, grad_norm_z=0.0), StepHistory()
    draw = torch.Generator().manual_seed(0)
    values = (3 + 0.1 * torch.randn(30, generator=draw)).tolist()
    for step, value in enumerate(values, 1):
        limits = history.limits(step, config)
        known = values[: max(0, step - 2)][-20:]
        if len(known) < 10:
            assert limits == Limits(LARGEST, LARGEST)
        else:
            seen = torch.tensor(known, dtype=torch.float64)
            middle = seen.quantile(0.5)
            spread = (seen - middle).abs().quantile(0.5) * 1.4826
            assert limits.loss == pytest.approx(float(middle + 6 * torch.clamp(spread, min=0.01 * middle)), rel=1e-9)
            assert limits.grad_norm == LARGEST
        history.add(step, value, value, config.window)
    assert "NaN" in history.reason(31, math.nan, 1.0, config)
    assert "the gradient norm is infinite" in history.reason(31, 3.0, math.inf, config)
    assert "deviations above" in history.reason(31, 9.0, 1.0, config)
    assert history.reason(31, 3.0, 1e9, config) == ""
    assert StepHistory.from_json(json.loads(json.dumps(asdict(history))), "here") == history


@pytest.mark.parametrize(
    "damage",
    [
        [],
        {"steps": [1], "loss": [], "grad_norm": [], "skipped": 0, "overflows": 0, "rollbacks": 0},
        {"steps": [1], "loss": [float("nan")], "grad_norm": [1.0], "skipped": 0, "overflows": 0, "rollbacks": 0},
        {"steps": [], "loss": [], "grad_norm": [], "skipped": -1, "overflows": 0, "rollbacks": 0},
    ],
)
def test_a_damaged_history_is_named(damage):
    with pytest.raises(UserError, match="here: its guard history is invalid"):
        StepHistory.from_json(damage, "here")


@pytest.mark.parametrize("factor", [60.0, math.nan])
def test_a_bad_step_is_skipped_and_explained(guarded, change, explode, tmp_path, factor):
    explode(factor)
    run = train(change(guarded, guard={"policy": "skip"}), tmp_path / "run", quiet=True).folder
    events = records(run, "event")
    assert events, "the run meets the marker"
    assert {event["action"] for event in events} == {"skip"}
    trained = records(run, "train")
    for event in events:
        step = trained[event["step"] - 1]
        assert step["loss"] == event["loss"]
        assert ("NaN" in event["reason"]) == math.isnan(factor)
        worst = event["windows"][0]
        assert worst["document"]["name"] == "marked.jsonl:10"
        assert len(event["tensors"]) == 5
        assert all(tensor["weight_rms"] > 0 for tensor in event["tensors"])
    bad = {event["step"] for event in events}
    assert all(math.isfinite(record["loss"]) and record["loss"] < 6 for record in trained if record["step"] not in bad)
    assert not (run / "skips.json").exists()


def test_a_skipped_update_changes_nothing(guarded, change, explode, tmp_path):
    """The step of the first event, with a learning rate of its own, leaves weights as the checkpoint before it."""
    explode(math.nan)
    run = train(change(guarded, guard={"policy": "skip"}), tmp_path / "run", quiet=True).folder
    step = records(run, "event")[0]["step"]
    every = change(guarded, guard={"policy": "skip"}, checkpoint={"every": 1, "keep_last": 200}, eval={"every": 0})
    train(change(every, train={"steps": step}, optim={"decay_steps": 120}), tmp_path / "each", quiet=True)
    assert weights(tmp_path / "each", step) == weights(tmp_path / "each", step - 1)
    assert weights(tmp_path / "each", step - 1) != weights(tmp_path / "each", step - 2)


def test_a_rollback_skips_the_sequences_for_good(guarded, explode, tmp_path):
    explode(60.0)
    run = train(guarded, tmp_path / "run", quiet=True).folder
    rollbacks = read_rollbacks_of(run)
    assert rollbacks
    events = records(run, "event")
    assert [event["step"] for event in events] == sorted(event["step"] for event in events)
    assert len(events) == len(rollbacks)
    assert {event["action"] for event in events} == {"rollback"}
    assert [record["step"] for record in records(run, "train")] == list(range(1, 121))
    assert max(record["loss"] for record in records(run, "train")) < 6, "no metrics of undone steps remain"
    for rollback in rollbacks:
        assert sum(count for _, count in rollback.ranges) == 4
        assert rollback.event.windows[0]["document"]["name"] == "marked.jsonl:10"
        first, count = rollback.ranges[0]
        assert first <= rollback.event.windows[0]["sample"] < first + count


def test_the_digest_of_the_samples_tells_of_a_rollback(guarded, change, explode, tmp_path):
    whole = records(train(guarded, tmp_path / "whole", quiet=True).folder, "train")
    explode(60.0)
    run = train(guarded, tmp_path / "run", quiet=True).folder
    trained, first = records(run, "train"), read_rollbacks_of(run)[0].event.step
    assert [record["order_digest"] for record in trained[: first - 1]] == [
        record["order_digest"] for record in whole[: first - 1]
    ]
    assert trained[first - 1]["order_digest"] != whole[first - 1]["order_digest"]


def read_rollbacks_of(run: Path):
    from bardling.checkpoint.run_folder import RunFolder

    return read_rollbacks(RunFolder(run))


def test_without_a_checkpoint_a_rollback_returns_to_the_start(guarded, change, explode, tmp_path):
    explode(60.0)
    rare = change(guarded, checkpoint={"every": 0, "save_best": False}, train={"steps": 100}, optim={"ema_decay": 0.9})
    run = train(rare, tmp_path / "run", quiet=True).folder
    assert read_rollbacks_of(run)
    often = train(change(rare, checkpoint={"every": 10}), tmp_path / "often", quiet=True).folder
    assert records(run) == records(often), "as from a checkpoint"
    assert weights(run, 100) == weights(often, 100)


@pytest.mark.parametrize("ramp", [{}, {"batch_start": 2, "context_start": 8, "ramp": 0.4}], ids=["whole", "growing"])
def test_a_run_killed_during_a_rollback_and_resumed_equals_an_uninterrupted_one(
    guarded, change, explode, tmp_path, monkeypatch, ramp
):
    from bardling.training import session
    from bardling.training.hooks.validate import Validate

    explode(60.0)
    guarded = change(guarded, train=ramp)
    whole = train(guarded, tmp_path / "whole", quiet=True).folder
    places = [
        ("before the record", session, "write_rollbacks", 1),
        ("after the record", session, "latest_checkpoint", 1),
        ("later", Validate, "work", 5),
    ]
    for name, owner, victim, number in places:
        original, calls = getattr(owner, victim), 0

        def killed(*args, original=original, number=number, **options):
            nonlocal calls
            calls += 1
            if calls == number:
                raise KeyboardInterrupt
            return original(*args, **options)

        run = tmp_path / name.replace(" ", "-")
        monkeypatch.setattr(owner, victim, killed)
        with pytest.raises(KeyboardInterrupt):
            train(guarded, run, quiet=True)
        monkeypatch.setattr(owner, victim, original)
        resume(run, quiet=True)
        assert records(run) == records(whole), name
        assert weights(run, 120) == weights(whole, 120), name
        assert read_rollbacks_of(run) == read_rollbacks_of(whole), name


def test_too_many_rollbacks_end_the_run_with_one_line(guarded, change, explode, tmp_path):
    explode(60.0)
    with pytest.raises(UserError, match=r"marked.jsonl:10.*training ends.*guard.max_rollbacks = 0") as said:
        train(change(guarded, guard={"max_rollbacks": 0}), tmp_path / "rollbacks", quiet=True)
    assert "\n" not in str(said.value)
    with pytest.raises(UserError, match=r"guard.policy = 'stop'"):
        train(change(guarded, guard={"policy": "stop"}), tmp_path / "stop", quiet=True)
    (event,) = records(tmp_path / "stop", "event")
    assert event["action"] == "stop"
    resume(tmp_path / "stop", change(guarded, guard={"policy": "skip"}), quiet=True)


def test_a_diverged_run_ends(guarded, change, tmp_path, monkeypatch):
    original = GPT.forward

    def broken(self, *args, **options):
        return original(self, *args, **options) * math.nan

    monkeypatch.setattr(GPT, "forward", broken)
    with pytest.raises(UserError, match=r"step 10: .*10 in a row \(guard.max_skips = 10\), so training has diverged"):
        train(change(guarded, guard={"policy": "skip"}, sample={"every": 0}), tmp_path / "run", quiet=True)


def no_gradient(monkeypatch):
    """Passes whose loss is right and whose gradients are all zero."""
    original = GPT.forward

    def forward(self, *args, **options):
        result = original(self, *args, **options)
        return result.detach() + 0 * result if self.training else result

    monkeypatch.setattr(GPT, "forward", forward)


def test_a_loss_without_gradients_ends_the_run_at_its_first_step(guarded, change, tmp_path, monkeypatch):
    no_gradient(monkeypatch)
    config = change(guarded, guard={"policy": "skip"}, sample={"every": 0})
    with pytest.raises(UserError, match=r"step 1: the loss is [\d.]+, but every gradient is zero, .*--compile off"):
        train(config, tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match="every gradient is zero"):
        bench(config, steps=1)


def test_a_lost_rollback_log_is_detected_on_resume(guarded, change, explode, tmp_path):
    explode(60.0)
    run = train(guarded, tmp_path / "run", quiet=True).folder
    kept = (run / "skips.json").read_text()
    (run / "skips.json").unlink()
    longer = change(guarded, train={"steps": 130}, optim={"decay_steps": 120})
    with pytest.raises(UserError, match=r"skips.json: lists 0 rollbacks, but \d+ preceded the checkpoint of step 120"):
        resume(run, longer, quiet=True)
    (run / "skips.json").write_text(kept.replace('"ranges"', '"range"'))
    with pytest.raises(UserError, match=r"skips.json: is damaged"):
        resume(run, longer, quiet=True)
    (run / "skips.json").write_text(kept)
    assert resume(run, longer, quiet=True).step == 130


def test_two_processes_roll_back_together_and_name_the_document(guarded, explode, marker, tmp_path):
    done = launch_two(tmp_path, guarded, tmp_path / "two", marker, 60.0)
    assert done.returncode == 0, done.stderr
    explode(60.0)
    one = train(guarded, tmp_path / "one", quiet=True).folder
    ours, theirs = read_rollbacks_of(one), read_rollbacks_of(tmp_path / "two")
    assert theirs
    assert [rollback.ranges for rollback in theirs] == [rollback.ranges for rollback in ours]
    for rollback in theirs:
        assert rollback.event.windows[0]["document"]["name"] == "marked.jsonl:10"
    assert "'marked.jsonl:10' (document 8" in done.stdout
    assert done.stdout.count("rolled back to step") == len(theirs), "only the primary process prints"
    both = [[record["loss"] for record in records(run, "train")] for run in (one, tmp_path / "two")]
    assert both[1] == pytest.approx(both[0], rel=1e-4), "both saw the same sequences, without a bad one"


def test_steps_may_be_judged_one_step_late_as_on_a_gpu(guarded, explode, tmp_path, monkeypatch):
    """The same sequences are skipped, and no bad state is ever saved."""
    from bardling.training import session as runs

    explode(60.0)
    prompt = train(guarded, tmp_path / "prompt", quiet=True).folder
    monkeypatch.setattr(runs, "Guard", lambda *args, **options: Guard(*args, **options, late=True))
    late = train(guarded, tmp_path / "late", quiet=True).folder
    assert [r.ranges for r in read_rollbacks_of(late)] == [r.ranges for r in read_rollbacks_of(prompt)]
    assert [r.event.windows for r in read_rollbacks_of(late)] != []
    assert weights(late, 120) == weights(prompt, 120)


def test_the_documents_named_contain_the_marker(guarded, marker, explode, tmp_path):
    """Compared with the tokens themselves."""
    from bardling.data.tokens.dataset import open_data

    explode(60.0)
    run = train(guarded, tmp_path / "run", quiet=True).folder
    dataset = open_data(guarded.data)
    split = dataset.split("train")
    place = split.read(0, len(split)).tolist().index(marker)
    (document,) = Documents(dataset, "train").at(place, 1)
    for rollback in read_rollbacks_of(run):
        worst = rollback.event.windows[0]
        assert worst["start"] <= place < worst["start"] + 17
        assert worst["document"]["begin"] == document.begin
        assert split.place(worst["start"]) == (worst["file"], worst["place"])


def small(scaled=False):
    from bardling.config import ModelConfig, OptimConfig
    from bardling.optim.build import build_optimizer
    from bardling.training.state import TrainState

    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=11, vocab_multiple=8), seed=0).train()
    state = TrainState(model, build_optimizer(model.named_parameters(), OptimConfig(), torch.device("cpu")))
    if scaled:
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return state


def take(state, **options):
    from bardling.data.batches.loader import Batch
    from bardling.distributed.context import SINGLE
    from bardling.distributed.device import Precision
    from bardling.training.objective import NextToken
    from bardling.training.step import StepSettings, train_step

    tokens = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    settings = StepSettings(NextToken(), Precision("float32", "test", "cpu"), SINGLE)
    return train_step(state, [batch], settings, **{"forward": state.model, "lr": 1e-2, **options})


def numbers(state):
    from bardling.optim.serialization import optimizer_tensors

    tensors, _ = optimizer_tensors(state.optimizer, dict(state.model.named_parameters()))
    return {name: value.clone() for name, value in {**state.model.state_dict(), **tensors}.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("on_device", [False, True])
def test_updates_above_the_limits_are_skipped_and_others_unchanged(scaled, on_device, monkeypatch):
    """The flag of the fused kernels works on a CPU too, where the step otherwise asks the host."""
    if on_device:
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    plain, ours = small(scaled), small(scaled)
    for _ in range(3):
        take(plain)
        assert take(ours, limits=Limits()).bad.item() == 0
    assert same(numbers(plain), numbers(ours)), "to the bit"
    before = numbers(ours)
    for limits in (Limits(loss=0.1), Limits(grad_norm=1e-3)):
        assert take(ours, limits=limits).bad.item() == 1
        assert same(numbers(ours), before)

    def spoiled(*args, **options):
        return ours.model(*args, **options) * math.nan

    assert take(ours, limits=Limits(), forward=spoiled).bad.item() == 1
    assert same(numbers(ours), before)
    take(plain)
    assert take(ours, limits=Limits()).bad.item() == 0
    if not scaled:  # the scale has been halved meanwhile, which rounds otherwise
        assert same(numbers(plain), numbers(ours))


def test_float16_overflows_are_bad_only_when_repeated():
    from bardling.data.batches.order import SequenceOrder
    from bardling.distributed.context import SINGLE
    from bardling.planning.batching import make_plan
    from bardling.training.step import StepResult

    logged = []
    order, config = SequenceOrder(0, 1000, 8), GuardConfig()
    plan = make_plan(TrainConfig(), 8, 1)
    guard = Guard(config, SINGLE, order, (), _NoExplanation(), plan=plan, log=logged.append, note=lambda text: None)
    state = small(scaled=True)

    def overflow(loss=2.0):
        state.step += 1
        state.samples += 3
        one, norm = torch.tensor(1.0), torch.tensor(math.inf)
        guard.judge(state, StepResult(torch.tensor(loss), one, one, None, norm, 0.1, one), 3)

    for _ in range(9):
        overflow()
    assert not logged
    overflow()
    assert [event.step for event in logged] == [10]
    assert "the gradient norm is infinite" in logged[0].reason
    overflow(loss=math.nan)
    assert len(logged) == 2, "a NaN loss is always bad"


class _NoExplanation:
    def worst_sequences(self, state, ranges, context):
        return []

    def largest_gradients(self, state, sample, context):
        return []
