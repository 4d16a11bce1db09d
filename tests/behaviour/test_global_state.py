"""A library call leaves the process as it found it, and its results do not depend on what the caller has set."""

import contextlib
import random
import signal
import warnings

import numpy as np
import pytest
import torch

import bardling
from bardling.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, RunConfig, SampleConfig, TrainConfig
from bardling.distributed.global_state import Ambient
from bardling.model.gpt import GPT
from bardling.optim.adamw import AdamW


@contextlib.contextmanager
def restored(set_value, new, old):
    set_value(new)
    try:
        yield
    finally:
        set_value(old)


SURROUNDINGS = {
    "float64": lambda: restored(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: restored(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device": lambda: restored(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "matmul precision": lambda: restored(torch.set_float32_matmul_precision, "medium", "highest"),
    "generators": lambda: restored(torch.manual_seed, 4321, 1),
    "threads": lambda: restored(torch.set_num_threads, 2, 1),
}


def state():
    """Everything that a program may notice after a call."""
    numpy = np.random.get_state()
    return [
        Ambient.current(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        (numpy[0], numpy[1].tolist(), *numpy[2:]),
        torch.get_num_threads(),
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        list(warnings.filters),
    ]


@pytest.fixture(autouse=True)
def one_thread():
    with restored(torch.set_num_threads, 1, torch.get_num_threads()):
        yield


@pytest.fixture(scope="module")
def short(corpus):
    return RunConfig(
        device="cpu",
        precision="float32",
        compile="off",
        model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_multiple=8, dropout=0.1, family="llama"),
        data=DataConfig(source=str(corpus), tokenizer="char", val_fraction=0.1),
        optim=OptimConfig(warmup_steps=1, decay_steps=4),
        train=TrainConfig(steps=4, batch_size=4, log_every=1),
        eval=EvalConfig(every=2, windows=8),
        sample=SampleConfig(every=2, max_new_tokens=8),
    )


@pytest.fixture(scope="module")
def plain(short, tmp_path_factory):
    """A run without special surroundings."""
    return bardling.train(short, tmp_path_factory.mktemp("plain") / "run", quiet=True).folder


WEIGHTS = "checkpoints/step-000004/model.safetensors"


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_training_and_resuming_give_the_same_weights_and_change_nothing(name, short, change, tmp_path, plain):
    folder = tmp_path / "run"
    with SURROUNDINGS[name]():
        before = state()
        bardling.train(change(short, train={"steps": 2}), folder, quiet=True)
        bardling.resume(folder, short, quiet=True)
        assert state() == before
    assert (folder / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_loaded_model_generates_the_same_and_can_be_trained(name, plain):
    def text():
        model = bardling.load_model(plain)
        return model, list(bardling.generate(model, [[1, 2], [3]], max_new_tokens=20, top_k=5))

    with SURROUNDINGS[name]():
        before = state()
        model, found = text()
        assert state() == before
    assert found == text()[1]
    model.train()(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()  # no inference tensors, none in another dtype
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_caller_keeps_its_state_between_the_tokens():
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=11, vocab_multiple=1)).train()
    for _ in bardling.generate(model, [[1]], max_new_tokens=3):
        assert model.training
        assert Ambient.current() == Ambient()


def test_a_failed_call_restores_the_state_too(short, change, tmp_path):
    before = state()
    with pytest.raises(bardling.UserError):
        bardling.train(change(short, data={"source": str(tmp_path / "none")}), tmp_path / "run")
    assert state() == before


def test_random_numbers_of_the_caller_differ_after_every_run(short, tmp_path):
    draws = []
    torch.manual_seed(5)
    for number in range(2):
        bardling.train(short, tmp_path / f"run{number}", quiet=True)
        draws.append(torch.rand(()).item())
    torch.manual_seed(5)
    assert draws == [torch.rand(()).item(), torch.rand(()).item()]


def fitted(batches, **options):
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=11, vocab_multiple=1, dropout=0.2))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    train = TrainConfig(steps=4, batch_size=2, log_every=1)
    bardling.fit_batches(model, optimizer, batches, train, OptimConfig(warmup_steps=1), **options)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def random_pairs():
    while True:
        tokens = torch.randint(11, (2, 9))
        yield tokens[:, :-1], tokens[:, 1:]


def test_batches_drawn_during_training_are_those_drawn_before_it():
    pairs = random_pairs()
    torch.manual_seed(7)
    before = fitted([next(pairs) for _ in range(4)])
    after_list = torch.rand(())
    torch.manual_seed(7)
    assert torch.equal(before, fitted(random_pairs()))
    assert torch.equal(after_list, torch.rand(()))


def test_callbacks_of_fit_batches_run_with_the_callers_defaults():
    seen = []
    with SURROUNDINGS["float64"]():
        pairs = random_pairs()
        fitted(pairs, after_step=lambda state: seen.append(torch.ones(()).dtype), on_record=lambda record: seen.append(1.0))
    assert seen == [1.0, torch.float64] * 4
