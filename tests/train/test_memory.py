"""Too little memory: smaller passes in the first steps, a message later on; and passes that are chosen."""

import json
from types import SimpleNamespace

import pytest
import torch

from bardling.configfile import load_recipe
from bardling.distributed.context import SINGLE, Context
from bardling.distributed.device import Precision
from bardling.errors import UserError
from bardling.interop.shapes import parameter_shapes
from bardling.model.gpt import GPT
from bardling.optim.kinds import optimizer_bytes
from bardling.train.memory import Passes, divisors, fastest, out_of_memory
from bardling.train.persist import build_state
from bardling.train.run import resume, train

SAYS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."
    ),
)


def records(run, kind="train"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == kind]


def fail_above(monkeypatch, rows, error, after=0):
    """Forward passes of more than `rows` sequences run out of memory, from the one after `after` of them on."""
    original, seen = GPT.forward, 0

    def forward(self, tokens, targets=None, **options):
        nonlocal seen
        if self.training and len(tokens) > rows:
            seen += 1
            if seen > after:
                raise error
        return original(self, tokens, targets, **options)

    monkeypatch.setattr(GPT, "forward", forward)


@pytest.mark.parametrize("error", SAYS, ids=["gpu", "python", "cpu"])
def test_the_first_steps_go_on_with_smaller_passes_and_the_same_losses(tiny, change, tmp_path, monkeypatch, capsys, error):
    config = change(tiny, train={"batch_size": 8, "micro_batch": 8, "steps": 10})
    train(config, tmp_path / "calm", quiet=True)
    fail_above(monkeypatch, 2, error, after=1)
    result = train(config, tmp_path / "tight")
    assert result.finished
    calm, tight = records(tmp_path / "calm"), records(tmp_path / "tight")
    assert [step for step, _ in tight] == [step for step, _ in calm]
    assert [loss for _, loss in tight] == pytest.approx([loss for _, loss in calm], rel=1e-5)
    assert load_recipe(str(tmp_path / "tight" / "config.toml")).train.micro_batch == 2
    said = capsys.readouterr().out
    assert "going on with 2 passes of 4 sequences a step instead of 1 of 8" in said
    assert "going on with 4 passes of 2 sequences a step instead of 2 of 4" in said


def test_later_on_the_error_names_the_setting_and_the_run_can_go_on_with_it(tiny, change, tmp_path, monkeypatch):
    config = change(tiny, train={"batch_size": 8, "micro_batch": 8, "steps": 12})
    fail_above(monkeypatch, 4, torch.OutOfMemoryError("x"), after=11)
    with pytest.raises(
        UserError, match=r"train.micro_batch = 8: the memory of cpu ran out at step 12: .*--train.micro_batch 4"
    ):
        train(config, tmp_path / "run", quiet=True)
    assert resume(tmp_path / "run", change(config, train={"micro_batch": 4}), quiet=True).finished


def test_a_single_sequence_that_does_not_fit_is_an_error(tiny, tmp_path, monkeypatch):
    fail_above(monkeypatch, 0, torch.OutOfMemoryError("x"))
    with pytest.raises(UserError, match=r"train.micro_batch = 1: .*block_size"):
        train(tiny, tmp_path / "run", quiet=True)


def test_an_update_that_was_half_done_is_not_repeated(tiny, change, tmp_path, monkeypatch):
    def step(self, *args, **options):
        raise torch.OutOfMemoryError("x")

    monkeypatch.setattr(torch.optim.AdamW, "step", torch.optim.Optimizer.profile_hook_step(step))
    with pytest.raises(UserError, match=r"train.micro_batch = 4: .* ran out at step 1"):
        train(change(tiny, train={"micro_batch": 4}), tmp_path / "run", quiet=True)


def test_other_errors_are_not_taken_for_it():
    assert not out_of_memory(RuntimeError("shape mismatch"))
    assert not out_of_memory(ValueError("out of memory"))


def test_auto_is_decided_recorded_and_kept(tiny, change, tmp_path):
    config = change(tiny, train={"batch_size": 12, "micro_batch": "auto", "steps": 10})
    train(config, tmp_path / "run", quiet=True)
    chosen = load_recipe(str(tmp_path / "run" / "config.toml")).train.micro_batch
    assert chosen in divisors(12)
    resume(tmp_path / "run", change(config, train={"steps": 12}), quiet=True)
    assert load_recipe(str(tmp_path / "run" / "config.toml")).train.micro_batch == chosen


def test_the_fastest_pass_is_found_and_of_equals_the_smallest():
    cost = {1: 1.0, 2: 1.1, 4: 1.5, 8: 3.0, 16: 6.0}
    assert fastest(divisors(16), cost.get) == 4
    assert fastest([8, 4, 2, 1], lambda size: None if size > 2 else 1.0) == 2


def test_processes_agree_on_the_largest_pass_that_fits_all(tiny, change, monkeypatch):
    asked = []

    class Two(Context):
        """The other process has room for three sequences."""

        def any(self, flag):
            asked.append(flag)
            return flag or sizes[len(asked) - 1] > 3

    sizes = divisors(12)
    model = GPT(change(tiny, model={"vocab_size": 16}).model)
    before = [parameter.clone() for parameter in model.parameters()]
    passes = Passes(
        model, Two(0, 2, torch.device("cpu")), Precision("float32", "", "cpu"), change(tiny, model={"vocab_size": 16})
    )
    fail_above(monkeypatch, 6, torch.OutOfMemoryError("x"))
    assert passes.largest(sizes) == 3
    assert asked == [True, False, False, False]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    fail_above(monkeypatch, 0, torch.OutOfMemoryError("x"))
    with pytest.raises(UserError, match="not even this"):
        passes.largest([1])


@pytest.fixture
def no_gpu(monkeypatch):
    """A GPU that is only asked for memory, and gives none; the sizes in bytes that it was asked for."""
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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_pass_leaves_room_for_what_the_optimizer_does_not_hold_yet(tiny, change, no_gpu, name):
    config = change(tiny, model={"vocab_size": 16}, optim={"name": name})
    state = build_state(config, SINGLE)
    whole = optimizer_bytes(parameter_shapes(config.model), config.optim)

    def reserved(device):
        passes = Passes(
            state.model, Context(0, 1, torch.device("cuda")), Precision("float32", "", "cpu"), config, Elsewhere(device)
        )
        no_gpu.clear()
        assert passes.attempt(4) is None
        return no_gpu

    class Elsewhere:
        """The run's optimizer, with its tensors on another device."""

        def __init__(self, device):
            self.state = {
                parameter: {key: Far(value, device) if isinstance(value, torch.Tensor) else value for key, value in own.items()}
                for parameter, own in state.optimizer.state.items()
            }

    class Far(torch.Tensor):
        @staticmethod
        def __new__(cls, value, device):
            made = value.detach().as_subclass(cls)
            made.where = torch.device(device)
            return made

        @property
        def device(self):
            return self.where

    assert reserved("cuda") == [whole, 100, 0]
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    assert reserved("cpu") == [whole, 100, 0]
    assert reserved("cuda")[0] <= 0.01 * whole
    first = next(iter(state.optimizer.state))
    there = sum(value.nbytes for value in state.optimizer.state.pop(first).values() if isinstance(value, torch.Tensor))
    assert 0 < there <= reserved("cuda")[0] <= there + 0.01 * whole


def test_a_run_tells_passes_of_its_optimizer(tiny, change, tmp_path, monkeypatch):
    held = []

    def choose(passes, share):
        held.append(len(passes.optimizer.state))
        return share, "asked"

    train(tiny, tmp_path / "run", quiet=True)
    monkeypatch.setattr(Passes, "choose", choose)
    longer = change(tiny, train={"micro_batch": "auto", "steps": 31})
    train(longer, tmp_path / "longer", continue_from=str(tmp_path / "run"), quiet=True)
    assert held[0] > 10
