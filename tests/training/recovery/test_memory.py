"""Too little memory: smaller micro-batches in the first steps, an error later; and automatic micro-batches."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from bardling.config.recipes import load_recipe
from bardling.distributed.context import SINGLE, Context
from bardling.distributed.device import Precision
from bardling.errors import UserError, out_of_memory
from bardling.model.gpt import GPT
from bardling.planning.costs import weight_bytes
from bardling.planning.memory import optimizer_bytes
from bardling.planning.parameter_shapes import parameter_shapes
from bardling.training import run as run_module
from bardling.training.build import Execution
from bardling.training.objective import NextToken
from bardling.training.recovery import memory
from bardling.training.recovery.memory import TrialPasses, divisors, fastest_size
from bardling.training.run import resume, train

EXECUTION = Execution(Precision("float32", "", "cpu"))
ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    *(
        RuntimeError(f"[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: {words}: you tried to allocate 8 bytes.")
        for words in ("can't allocate memory", "not enough memory")
    ),
)


def records(run, kind="train"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == kind]


def fail_above(monkeypatch, rows, error, after=0):
    """Forward passes of more than `rows` sequences run out of memory, except the first `after` of them."""
    original, seen = GPT.forward, 0

    def forward(self, tokens, targets=None, **options):
        nonlocal seen
        if self.training and len(tokens) > rows:
            seen += 1
            if seen > after:
                raise error
        return original(self, tokens, targets, **options)

    monkeypatch.setattr(GPT, "forward", forward)


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "python", "linux", "windows"])
def test_the_first_steps_continue_with_smaller_passes_and_the_same_losses(tiny, change, tmp_path, monkeypatch, capsys, error):
    config = change(tiny, train={"batch_size": 8, "micro_batch": 8, "steps": 10})
    train(config, tmp_path / "calm", quiet=True)
    fail_above(monkeypatch, 2, error, after=1)
    train(config, tmp_path / "tight")
    calm, tight = records(tmp_path / "calm"), records(tmp_path / "tight")
    assert [step for step, _ in tight] == [step for step, _ in calm]
    assert [loss for _, loss in tight] == pytest.approx([loss for _, loss in calm], rel=1e-5)
    assert load_recipe(str(tmp_path / "tight" / "config.toml")).train.micro_batch == 2
    output = capsys.readouterr().out
    assert "continuing with 2 passes of 4 sequences per step instead of 1 of 8" in output
    assert "continuing with 4 passes of 2 sequences per step instead of 2 of 4" in output


def test_later_the_error_names_the_setting_with_which_the_run_can_continue(tiny, change, tmp_path, monkeypatch):
    config = change(tiny, train={"batch_size": 8, "micro_batch": 8, "steps": 12})
    fail_above(monkeypatch, 4, torch.OutOfMemoryError("x"), after=11)
    with pytest.raises(
        UserError, match=r"train.micro_batch = 8: the memory of cpu ran out at step 12: .*--train.micro_batch 4"
    ):
        train(config, tmp_path / "run", quiet=True)
    resume(tmp_path / "run", change(config, train={"micro_batch": 4}), quiet=True)


def test_a_single_sequence_that_does_not_fit_is_an_error(tiny, tmp_path, monkeypatch):
    fail_above(monkeypatch, 0, torch.OutOfMemoryError("x"))
    with pytest.raises(UserError, match=r"train.micro_batch = 1: .*block_size"):
        train(tiny, tmp_path / "run", quiet=True)


def test_an_interrupted_update_is_not_repeated(tiny, change, tmp_path, monkeypatch):
    def step(self, *args, **options):
        raise torch.OutOfMemoryError("x")

    monkeypatch.setattr(torch.optim.AdamW, "step", torch.optim.Optimizer.profile_hook_step(step))
    with pytest.raises(UserError, match=r"train.micro_batch = 4: .* ran out at step 1"):
        train(change(tiny, train={"micro_batch": 4}), tmp_path / "run", quiet=True)


def test_other_errors_do_not_count_as_out_of_memory():
    assert not out_of_memory(RuntimeError("shape mismatch"))
    assert not out_of_memory(ValueError("out of memory"))


def test_auto_is_decided_once_and_kept_on_resume(tiny, change, tmp_path):
    config = change(tiny, train={"batch_size": 12, "micro_batch": "auto", "steps": 10})
    train(config, tmp_path / "run", quiet=True)
    chosen = load_recipe(str(tmp_path / "run" / "config.toml")).train.micro_batch
    assert chosen in divisors(12)
    resume(tmp_path / "run", change(config, train={"steps": 12}), quiet=True)
    assert load_recipe(str(tmp_path / "run" / "config.toml")).train.micro_batch == chosen


def test_the_smallest_of_the_fastest_passes_is_chosen():
    cost = {1: 1.0, 2: 1.1, 4: 1.5, 8: 3.0, 16: 6.0}
    assert fastest_size(divisors(16), cost.get) == 4
    assert fastest_size([8, 4, 2, 1], lambda size: None if size > 2 else 1.0) == 2


def test_processes_agree_on_the_largest_pass_that_fits_all(tiny, change, monkeypatch):
    asked = []

    class Two(Context):
        """The other process has memory for three sequences."""

        def any(self, flag):
            asked.append(flag)
            return flag or sizes[len(asked) - 1] > 3

    sizes = divisors(12)
    config = change(tiny, model={"vocab_size": 16})
    passes = TrialPasses(config.model, config.optim, EXECUTION, Two(0, 2, torch.device("cpu")), False, NextToken())
    fail_above(monkeypatch, 6, torch.OutOfMemoryError("x"))
    assert passes.largest(sizes) == 3
    assert asked == [True, False, False, False]
    fail_above(monkeypatch, 0, torch.OutOfMemoryError("x"))
    with pytest.raises(UserError, match=r"train.micro_batch = 1: does not fit"):
        passes.largest([1])


@pytest.fixture
def no_gpu(monkeypatch):
    """A fake GPU without memory; returns the sizes in bytes of the allocations on it."""
    asked, real = [], torch.empty

    def empty(*shape, device=None, **options):
        if str(device) != "cuda":
            return real(*shape, device=device, **options)
        asked.append(shape[0])
        return real(0)

    def randint(*_, **__):
        raise torch.OutOfMemoryError("x")

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "randint", randint)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=3300))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return asked


@pytest.mark.parametrize(("name", "ema_decay"), [("adamw", 0.0), ("muon", 0.9)])
def test_a_trial_pass_reserves_memory_for_optimizer_and_ema(tiny, change, no_gpu, monkeypatch, name, ema_decay):
    config = change(tiny, model={"vocab_size": 16}, optim={"name": name, "ema_decay": ema_decay})
    monkeypatch.setattr(GPT, "to", lambda self, device: self)
    trial = TrialPasses(config.model, config.optim, EXECUTION, Context(0, 1, torch.device("cuda")), False, NextToken())
    assert trial.attempt(4) is None
    ema = [weight_bytes(config.model)] if ema_decay else []
    assert no_gpu == [optimizer_bytes(parameter_shapes(config.model), config.optim), 100, *ema]


@pytest.mark.parametrize(("ema_decay", "expected"), [(0.0, 8), (0.9, 4)])
def test_on_a_cpu_weights_and_ema_reduce_the_free_memory(tiny, change, monkeypatch, ema_decay, expected):
    config = change(tiny, model={"vocab_size": 16}, optim={"ema_decay": ema_decay})
    trial = TrialPasses(config.model, config.optim, EXECUTION, SINGLE, False, NextToken())
    weights, tried = weight_bytes(config.model), []
    monkeypatch.setattr(trial, "required_bytes", lambda size: weights * size // 10)  # 0.8 weights for 8 sequences
    monkeypatch.setattr(trial, "attempt", lambda size: tried.append(size) or 1.0)
    monkeypatch.setattr(memory, "free_memory", lambda device: int(2.8 * weights))
    trial.choose(16)
    assert max(tried) == expected


def test_the_backend_is_prepared_before_passes_are_tried(tiny, change, tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(run_module, "backend", lambda *_, **__: events.append("prepared") or nullcontext())
    monkeypatch.setattr(TrialPasses, "attempt", lambda self, size: events.append("tried") or 1.0)
    train(change(tiny, train={"micro_batch": "auto", "steps": 6}), tmp_path / "run", quiet=True)
    assert events[0] == "prepared"
    assert "tried" in events
