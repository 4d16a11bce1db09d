"""Growing batch size and context: equal to a plain loop, for any number of processes and restarts."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bardling.checkpoint.run_folder import RunFolder
from bardling.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from bardling.config.recipes import config_to_toml
from bardling.data.batches.loader import Batch
from bardling.distributed.context import SINGLE
from bardling.distributed.device import Precision
from bardling.distributed.wrap import wrap
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.optim.build import build_optimizer
from bardling.planning.batching import make_plan
from bardling.planning.plan import plan as plan_run
from bardling.planning.schedules import Ramp
from bardling.training.build import Assembly
from bardling.training.hooks.new_shapes import NewShapes
from bardling.training.library import fit_batches
from bardling.training.loop import fit
from bardling.training.objective import NextToken
from bardling.training.recovery.spikes import LARGEST, StepHistory
from bardling.training.recovery.trace import trace_step
from bardling.training.run import resume, train
from bardling.training.state import TrainState
from bardling.training.step import StepSettings

# Of 12 steps the first 9 grow, in two stages each: up to step ceil(4.5) = 5, and up to step 9.
RAMPS = {"steps": 12, "batch_size": 8, "micro_batch": 4, "batch_start": 2, "context_start": 4, "ramp": 0.75}
BATCHES = [2] * 5 + [4] * 4 + [8] * 3
CONTEXTS = [4] * 5 + [8] * 4 + [16] * 3


def records(run, kind="train"):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["kind"] == kind]


def losses(run, kind="train"):
    return [record["loss"] for record in records(run, kind)]


@pytest.fixture
def growing(tiny, change):
    return change(
        tiny,
        train=RAMPS,
        sample={"every": 0},
        eval={"every": 4, "windows": 5},
        checkpoint={"every": 1, "keep_last": 20, "asynchronous": False},
        model={"dropout": 0.1},
    )


# --- arithmetic ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 3), st.floats(0.01, 1), st.integers(1, 40), st.integers(0, 50))
def test_every_sample_is_read_once_and_stages_start_on_time(world, micro, doublings, part, steps, origin):
    least = world * 2
    config = TrainConfig(
        steps=steps, batch_size=least << doublings, micro_batch=micro if (2 << doublings) % micro == 0 else None,
        batch_start=least, context_start=4, ramp=part,
    )  # fmt: skip
    plan = make_plan(config, block_size=16, data_size=world)
    ramp = Ramp(doublings, part)
    for step in range(steps):
        assert plan.samples_before(step) == ramp.total_before(step, steps, config.batch_size)
        assert plan.at(step).samples == ramp.size_at(step, steps, config.batch_size)
        assert plan.at(step).micro_batch <= plan.micro_batch
    for begin in (0, steps // 2):
        seen = [
            sample
            for rank in range(world)
            for start, size in plan.requests(origin + plan.samples_before(begin), steps - begin, rank, begin)
            for sample in range(start, start + size)
        ]
        assert sorted(seen) == list(range(origin + plan.samples_before(begin), origin + plan.samples_before(steps)))
    assert plan.cost(lambda context: context) == sum(
        plan.at(step).samples * 16 * plan.at(step).context for step in range(steps)
    )


def test_early_stages_take_fewer_or_smaller_passes():
    plan = make_plan(TrainConfig(steps=10, batch_size=32, micro_batch=8, batch_start=4), block_size=8, data_size=2)
    assert [(stage.samples, stage.accumulation, stage.micro_batch) for stage in plan.stages] == [
        (4, 1, 2),
        (8, 1, 4),
        (16, 1, 8),
        (32, 2, 8),
    ]
    assert plan.shapes == 3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch_start": 12}, "train.batch_start = 12: must become train.batch_size = 32 by doubling: use 16"),
        ({"batch_start": 64}, "train.batch_start = 64: .* use 32"),
        ({"batch_start": 0}, "train.batch_start = 0: .* use 1"),
        ({"context_start": 48}, "train.context_start = 48: must become model.block_size = 256 by doubling: use 64"),
        ({"ramp": 0.0}, "train.ramp = 0.0: must be above 0"),
        ({"ramp": 1.5}, "train.ramp = 1.5: must be above 0 and at most 1"),
        ({"batch_start": 8, "deadline": "1h"}, "train.deadline = '1h' leaves the number of steps open.*set train.steps"),
        ({"context_start": 64, "deadline": 60}, "train.deadline = 60 leaves"),
    ],
)
def test_impossible_ramps_are_refused_in_one_line(settings, says):
    with pytest.raises(UserError, match=says) as error:
        RunConfig(train=TrainConfig(**settings))
    assert "\n" not in str(error.value)


def test_starting_at_the_full_size_is_no_ramp():
    train_config = TrainConfig(batch_start=32, context_start=256, deadline="1h")
    RunConfig(train=train_config)
    assert len(make_plan(train_config, 256, 1).stages) == 1


def test_the_first_batch_must_divide_among_processes():
    with pytest.raises(UserError, match=r"train.batch_start = 3 does not divide among 4 processes: use 12"):
        make_plan(TrainConfig(batch_size=24, batch_start=3), block_size=8, data_size=4)


# --- training --------------------------------------------------------------------------------------------------------


def small():
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=23, vocab_multiple=8), seed=3)
    return model, build_optimizer(model.named_parameters(), OptimConfig(), torch.device("cpu"))


def stream(count):
    tokens = torch.randint(23, (count, 17), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def plain_loop(rate=0.01):
    """Losses of a loop that uses only the sizes of each step."""
    model, optimizer = small()
    inputs, targets = stream(sum(BATCHES))
    found, seen = [], 0
    for batch, context in zip(BATCHES, CONTEXTS, strict=True):
        rows = slice(seen, seen + batch)
        seen += batch
        x, y = ([piece for row in part[rows] for piece in row.split(context)] for part in (inputs, targets))
        logits = model(torch.stack(x))[..., :23]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat(y))
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        found.append(loss.item())
    return found, model


def fitted(micro_batch, forward=lambda model: model):
    model, optimizer = small()
    inputs, targets = stream(sum(BATCHES))
    plan = make_plan(TrainConfig(**{**RAMPS, "micro_batch": micro_batch}), 16, 1)
    batches = (Batch(inputs[i : i + n], targets[i : i + n]) for i, n in plan.requests(0, 12, 0))
    found = []

    def note(state, result):
        if result is not None:
            found.append(result.loss.item())

    settings = StepSettings(NextToken(), Precision("float32", "test", "cpu"), SINGLE, grad_clip=0)
    assembly = Assembly(TrainState(model, optimizer), forward(model))
    fit(assembly, batches, plan, settings, lr_at=lambda step: 0.01, hooks=[note])
    return found, model


@pytest.mark.parametrize("micro_batch", [8, 4, 1])
def test_training_equals_a_plain_loop(micro_batch):
    expected, reference = plain_loop()
    found, model = fitted(micro_batch)
    assert found == pytest.approx(expected, rel=1e-5)
    for one, two in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=5e-4)


@pytest.mark.slow
def test_compiled_training_is_the_same_in_every_stage():
    from torch._dynamo.utils import counters

    from bardling.distributed.context import SINGLE

    counters.clear()
    found, _ = fitted(4, lambda model: wrap(model, compiled=True, context=SINGLE))
    assert found == pytest.approx(plain_loop()[0], rel=1e-4)
    assert counters["stats"]["unique_graphs"] == make_plan(TrainConfig(**RAMPS), 16, 1).shapes == 3


def test_custom_batches_must_suit_every_stage():
    model, optimizer = small()
    pairs = [(part[:4], other[:4]) for part, other in [stream(4)] * 40]
    with pytest.raises(UserError, match=r"4 rows, .* takes 2: set train.batch_start to at least 4"):
        fit_batches(model, optimizer, pairs, TrainConfig(**RAMPS))
    counted = []
    config = TrainConfig(**{**RAMPS, "batch_start": 4, "log_every": 1})
    state = fit_batches(model, optimizer, pairs, config, on_record=counted.append)
    assert state.samples == 4 * 9 + 8 * 3
    assert [record.tokens // 16 for record in counted] == [4 * step for step in range(1, 10)] + [44, 52, 60]


def test_a_run_counts_its_samples_and_tokens(growing, tmp_path):
    run = train(growing, tmp_path / "run", quiet=True).folder
    found = records(run)
    assert [record["tokens"] for record in found] == [16 * sum(BATCHES[: step + 1]) for step in range(12)]
    assert found[-1]["tokens"] == plan_run(RunFolder(run).config()).total_tokens
    samples = []
    for step, size in enumerate(BATCHES, 1):
        sequences = trace_step(RunFolder(run), step).sequences
        assert len(sequences) == size
        samples += [sequence.sample for sequence in sequences]
    assert samples == list(range(sum(BATCHES)))


def test_resuming_at_any_step_is_exact(growing, tmp_path, stopped_at):
    whole = train(growing, tmp_path / "whole", quiet=True).folder
    end = (whole / "checkpoints/step-000012/model.safetensors").read_bytes()
    for step in range(1, 12):
        run = stopped_at(step, whole, tmp_path / f"from-{step}")
        assert resume(run, quiet=True).step == 12
        assert (run / "checkpoints/step-000012/model.safetensors").read_bytes() == end, step
        assert losses(run) == losses(whole)
        shutil.rmtree(run)


def test_two_processes_train_as_one(growing, change, tmp_path, torchrun):
    config = change(growing, model={"dropout": 0.0}, train={"micro_batch": 2})
    (tmp_path / "two.toml").write_text(config_to_toml(config))
    done = torchrun(2, "train", tmp_path / "two.toml", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert "batch and context grow: 8 x 4 from step 1, 8 x 8 from step 6, 8 x 16 from step 10" in " ".join(done.stdout.split())
    train(config, tmp_path / "one", quiet=True)
    for kind in ("train", "val"):
        assert losses(tmp_path / "two", kind) == pytest.approx(losses(tmp_path / "one", kind), rel=1e-5)
    # One process continues what two started, in the middle of a stage.
    for later in range(8, 13):
        shutil.rmtree(tmp_path / f"two/checkpoints/step-{later:06d}")
    resume(tmp_path / "two", quiet=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@given(st.integers(1, 2000), st.integers(1, 2000), st.floats(0.01, 1), st.integers(1, 5))
def test_a_ramp_rescaled_to_more_steps_has_the_same_stages(steps, more, part, doublings):
    long = steps + more
    before, after = Ramp(doublings, part), Ramp(doublings, part * steps / long)
    assert [before.start(n, steps) for n in range(doublings + 1)] == [after.start(n, long) for n in range(doublings + 1)]


def test_an_extended_run_keeps_its_stages(growing, change, tmp_path):
    run = train(growing, tmp_path / "run", quiet=True).folder
    resume(run, change(RunFolder(run).config(), train={"steps": 30}, optim={"decay_steps": 12}), quiet=True)
    assert RunFolder(run).config().train.ramp == pytest.approx(0.3)
    found = [record["tokens"] // 16 for record in records(run)]
    assert [after - before for before, after in zip([0, *found], found, strict=False)] == BATCHES + [8] * 18
    assert len(trace_step(RunFolder(run), 30).sequences) == 8
    other = RunFolder(train(growing, tmp_path / "x").folder)
    assert trace_step(RunFolder(run), 7).sequences == trace_step(other, 7).sequences


def test_a_longer_context_is_no_spike():
    """The limits of a stage with a longer context ignore the losses of the previous stage."""
    from bardling.config import GuardConfig

    config, history = GuardConfig(window=8), StepHistory()
    for step in range(1, 20):
        history.add(step, 2.0, 1.0, config.window)
    assert history.limits(20, config).loss < 3.0
    assert history.limits(20, config, since=18).loss == LARGEST
    assert history.limits(20, config, since=5) == history.limits(20, config)
    assert "deviations" in history.reason(20, 9.0, 1.0, config)
    assert not history.reason(20, 9.0, 1.0, config, since=18)


def test_the_heartbeat_expects_steps_that_compile_a_new_shape():
    calls, notes = [], []

    class Watched:
        def warmed_up(self):
            calls.append("steady")

        def warming_up(self):
            calls.append("unsteady")

    state = TrainState(*small())
    for compiled in (True, False):
        state.step = 0
        notes.clear()
        hook = NewShapes(make_plan(TrainConfig(**RAMPS), 16, 1), Watched(), compiled, notes.append)
        hook(state, None)
        for state.step in range(1, 12):
            hook(state, object())
        assert len(notes) == (3 if compiled else 0)
    assert [step for step, word in enumerate(calls[:12]) if word == "unsteady"] == [0, 5, 9]
    assert set(calls[12:]) == {"steady"}


def test_depth_reaches_its_tokens_with_a_growing_batch():
    from bardling.planning.depth import apply_depth

    config = RunConfig(model=ModelConfig(depth=4), train=TrainConfig(batch_start=4, ramp=0.7))
    plain, grown = (
        apply_depth(made, {"train.batch_start", "train.ramp"}) for made in (RunConfig(model=ModelConfig(depth=4)), config)
    )
    assert grown.train.batch_size == plain.train.batch_size > 4
    seen = [plan_run(made).total_tokens for made in (plain, grown)]
    assert seen[1] == pytest.approx(seen[0], rel=0.01)
    assert grown.train.steps > 1.2 * plain.train.steps
    wide = RunConfig(model=ModelConfig(depth=4), train=TrainConfig(batch_start=512))
    with pytest.raises(UserError, match=r"train.batch_start = 512: must become train.batch_size = \d+ by doubling"):
        apply_depth(wide, {"train.batch_start"})


def test_running_out_of_memory_when_the_batch_grows_reduces_the_micro_batch(growing, change, tmp_path, monkeypatch):
    config = change(growing, train={"micro_batch": 8, "context_start": None}, model={"dropout": 0.0})
    whole = train(config, tmp_path / "whole", quiet=True).folder
    original = GPT.forward

    def forward(self, tokens, targets=None, **options):
        if self.training and len(tokens) > 4:
            raise torch.OutOfMemoryError("x")
        return original(self, tokens, targets, **options)

    monkeypatch.setattr(GPT, "forward", forward)
    run = train(config, tmp_path / "run", quiet=True).folder
    assert RunFolder(run).config().train.micro_batch == 4
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
