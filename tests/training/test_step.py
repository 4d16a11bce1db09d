"""One optimizer step: exact for every split of its batch, also with masked targets."""

import copy
import dataclasses
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bardling.config import ModelConfig, OptimConfig
from bardling.data.batches.loader import Batch
from bardling.distributed.context import SINGLE, Context
from bardling.distributed.device import Precision
from bardling.model.gpt import GPT
from bardling.optim.build import build_optimizer
from bardling.training.objective import NextToken
from bardling.training.recovery.signals import Stopped
from bardling.training.recovery.spikes import Limits
from bardling.training.state import TrainState
from bardling.training.step import StepSettings, seed_dropout, train_step

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=11, vocab_multiple=8)
FLOAT32 = Precision("float32", "test", "cpu")


def state(seed=0):
    model = GPT(CONFIG, seed=seed).train()
    return TrainState(model, build_optimizer(model.named_parameters(), OptimConfig(), torch.device("cpu")))


def batch(size=6, masked=True):
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (size, 13), generator=random)
    targets = tokens[:, 1:].clone()
    if masked:  # very unevenly, so that a mean of means would be far off
        targets[0, 1:] = -100
        targets[3, :9] = -100
    return Batch(tokens[:, :-1].contiguous(), targets)


def step(state, batches, **options):
    given = {name: options.pop(name) for name in ("lr", "limits", "forward") if name in options}
    if "on_device" in options:
        options["skip_on_device"] = options.pop("on_device")
    defaults = {"grad_clip": 0.0, "precision": FLOAT32, "context": SINGLE}
    settings = StepSettings(NextToken(options.pop("bytes_per_token", None)), **{**defaults, **options})
    return train_step(state, batches, settings, **{"forward": state.model, "lr": 1e-3, **given})


def test_loss_and_gradient_are_the_mean_over_all_target_tokens():
    ours, whole = state(), batch()
    logits = ours.model(whole.inputs)
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole.targets.flatten(), ignore_index=-100)
    gradients = torch.autograd.grad(reference, list(ours.model.parameters()))
    result = step(ours, [whole])
    assert result.loss.item() == pytest.approx(reference.item(), rel=1e-6)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    for parameter, gradient in zip(ours.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("sizes", [(3, 3), (2, 2, 2), (1, 1, 1, 1, 1, 1), (1, 5)])
def test_any_split_into_forward_passes_gives_the_same_update(sizes):
    once, split, whole = state(), state(), batch()
    result = step(once, [whole])
    parts = [Batch(*pair) for pair in zip(whole.inputs.split(sizes), whole.targets.split(sizes), strict=True)]
    again = step(split, parts)
    assert again.loss.item() == pytest.approx(result.loss.item(), rel=1e-6)
    assert again.tokens.item() == result.tokens.item() == (whole.targets != -100).sum().item()
    for one, other in zip(once.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_clipping_limits_the_norm_and_reports_it_before_clipping():
    ours = state()
    result = step(ours, [batch()], grad_clip=0.01)
    after = torch.nn.utils.get_total_norm([parameter.grad for parameter in ours.model.parameters()])
    assert result.grad_norm.item() > 0.01
    assert after.item() == pytest.approx(0.01, rel=1e-3)


def test_ignored_targets_add_no_bytes():
    table = torch.arange(11)
    whole = batch()
    expected = sum(int(token) for token in whole.targets.flatten() if token != -100)
    assert step(state(), [whole], bytes_per_token=table).sums["bytes"].item() == expected


def test_a_stop_between_forward_passes_leaves_the_state_unchanged():
    ours, answers = state(), iter([False, True])
    before = copy.deepcopy(ours.model.state_dict())
    with pytest.raises(Stopped):
        step(ours, [batch(), batch()], stop_requested=lambda: next(answers))
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in ours.model.parameters())


def test_the_learning_rate_is_the_one_given():
    ours = state()
    step(ours, [batch()], lr=0.0)
    untouched = state()
    for one, other in zip(ours.model.parameters(), untouched.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_float16_scaling_gives_the_same_gradient():
    # The scaler works on CPU tensors too: the scaled and unscaled gradient must agree exactly, powers of two being exact.
    plain, scaled, whole = state(), state(), batch()
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    step(plain, [whole])
    step(scaled, [whole])
    for one, other in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-8)


def test_dropout_is_keyed_by_seed_step_and_rank():
    draws = set()
    for seed, number, rank in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        seed_dropout(seed, number, rank)
        draws.add(torch.rand(1).item())
    seed_dropout(0, 0, 0)
    assert torch.rand(1).item() in draws
    assert len(draws) == 4


# --- shared by the tests below ---------------------------------------------------------------------------------------


def state64(seed=0):
    """A float64 state: AdamW divides by tiny numbers, which amplifies float32 rounding errors."""
    ours = state(seed)
    ours.model.double()
    return ours


def sgd_state():
    """A state whose optimizer cannot skip an update by itself."""
    ours = state()
    return TrainState(ours.model, torch.optim.SGD(ours.model.parameters(), lr=0.1, momentum=0.9))


def scaled_state(scale, growth_interval=1):
    ours = state()
    ours.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    return ours


def split(whole, sizes):
    return [Batch(*pair) for pair in zip(whole.inputs.split(sizes), whole.targets.split(sizes), strict=True)]


def reference_step(state, whole, lr, grad_clip):
    """The same step in plain PyTorch, with the full logits."""
    state.optimizer.zero_grad()
    logits = state.model(whole.inputs)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole.targets.flatten(), ignore_index=-100).backward()
    if grad_clip:
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), grad_clip)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()


def multiplied(state, factor):
    """A forward pass whose loss is `factor` times that of the model."""
    return lambda *inputs, **options: state.model(*inputs, **options) * factor


def snapshot(state):
    """Weights and optimizer state, copied."""
    return copy.deepcopy((state.model.state_dict(), state.optimizer.state_dict()["state"]))


def is_unchanged(state, before):
    weights, moments = state.model.state_dict(), state.optimizer.state_dict()["state"]
    return all(torch.equal(value, before[0][name]) for name, value in weights.items()) and all(
        torch.equal(value, before[1][number][name]) for number, values in moments.items() for name, value in values.items()
    )


def assert_same_weights(one, other, **tolerances):
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerances)


class Meeting:
    """Where threads that act as the processes of a job exchange values."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.values = [None] * size

    def exchange(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


@dataclasses.dataclass(frozen=True)
class ThreadContext(Context):
    """The context of a process that is a thread of this one."""

    meeting: Meeting | None = None

    def sum(self, tensor, axes=()):
        return tensor.copy_(torch.stack(self.meeting.exchange(self.rank, tensor.clone())).sum(0))

    def largest(self, value):
        return max(self.meeting.exchange(self.rank, value))


@dataclasses.dataclass(frozen=True)
class RecordingContext(Context):
    """A context that records activities."""

    activities: list = dataclasses.field(default_factory=list)

    def activity(self, name, patience=None, *, shared=False):
        self.activities.append(name)


def in_processes(*jobs):
    """Call each job, a function of a context, in a process of its own; returns what they return."""
    meeting = Meeting(len(jobs))
    with ThreadPoolExecutor(len(jobs)) as pool:
        contexts = [ThreadContext(rank, len(jobs), torch.device("cpu"), meeting=meeting) for rank in range(len(jobs))]
        return [job.result() for job in [pool.submit(*pair) for pair in zip(jobs, contexts, strict=True)]]


# --- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_gradients", [False, True])
@pytest.mark.parametrize("grad_clip", [0.0, 0.1])
def test_several_steps_equal_those_of_a_plain_training_loop(grad_clip, keep_gradients):
    ours, reference = state64(), state64()
    for lr, whole in ((1e-2, batch()), (3e-3, batch(masked=False)), (5e-3, batch())):
        step(ours, split(whole, (2, 4)), lr=lr, grad_clip=grad_clip, keep_gradients=keep_gradients)
        reference_step(reference, whole, lr, grad_clip)
    assert not is_unchanged(ours, snapshot(state64()))
    assert_same_weights(ours, reference, rtol=1e-6, atol=1e-6)


def test_kept_gradients_stay_in_the_same_tensors():
    ours = state()
    step(ours, [batch()], keep_gradients=True)
    kept = [parameter.grad for parameter in ours.model.parameters()]
    step(ours, [batch()], keep_gradients=True)
    assert all(parameter.grad is gradient for parameter, gradient in zip(ours.model.parameters(), kept, strict=True))


def test_kept_gradients_exist_before_the_first_forward_pass():
    ours, seen = state(), []
    ours.model.register_forward_pre_hook(lambda *_: seen.append([p.grad is not None for p in ours.model.parameters()]))
    step(ours, [batch()], keep_gradients=True)
    assert len(seen) == 1
    assert all(seen[0])


@pytest.mark.parametrize("keep_gradients", [False, True])
def test_frozen_parameters_have_no_gradient_and_do_not_move(keep_gradients):
    ours = state()
    frozen = ours.model.transformer.wpe.weight.requires_grad_(False)
    before = frozen.clone()
    result = step(ours, [batch()], keep_gradients=keep_gradients)
    assert frozen.grad is None
    assert torch.equal(frozen, before)
    norms = [parameter.grad.norm() for parameter in ours.model.parameters() if parameter.requires_grad]
    assert result.grad_norm.item() == pytest.approx(torch.stack(norms).norm().item(), rel=1e-5)


def test_each_pass_is_announced_with_its_number_and_step():
    ours, context = state(), RecordingContext(0, 1, torch.device("cpu"))
    ours.step = 7
    step(ours, split(batch(), (2, 2, 2)), context=context)
    numbers = [[int(number) for number in re.findall(r"\d+", activity)] for activity in context.activities]
    assert numbers == [[1, 3, 8], [2, 3, 8], [3, 3, 8]], "pass, passes, step, all counted from 1"


# --- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_give_the_metrics_and_the_gradient_of_one():
    alone, table = state(), torch.arange(3, 14)
    whole = batch()
    expected = step(alone, [whole], bytes_per_token=table)
    states, parts = [state(), state()], split(whole, (2, 4))

    def job(rank):
        return lambda context: step(states[rank], [parts[rank]], context=context, bytes_per_token=table)

    for result in in_processes(job(0), job(1)):
        assert result.tokens.item() == expected.tokens.item()
        assert result.sums["bytes"].item() == expected.sums["bytes"].item()
        assert result.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-6)
        assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    # Data parallelism averages the gradients of the processes.
    for one, two, reference in zip(*(each.model.parameters() for each in (*states, alone)), strict=True):
        torch.testing.assert_close((one.grad + two.grad) / 2, reference.grad, rtol=1e-4, atol=1e-7)


def test_a_stop_requested_in_one_process_stops_all():
    states = [state(), state()]
    before = [snapshot(each) for each in states]

    def job(rank):
        def run(context):
            with pytest.raises(Stopped):
                step(states[rank], [batch()], context=context, stop_requested=lambda: rank == 1)

        return run

    in_processes(job(0), job(1))
    assert all(is_unchanged(each, old) for each, old in zip(states, before, strict=True))


def test_several_processes_vote_once_per_step():
    """So a signal that arrives later stops them before the next step."""
    states, votes = [state(), state()], [[], []]

    def job(rank):
        def run(context):
            parts = [batch(), batch(), batch()]
            step(states[rank], parts, context=context, stop_requested=lambda: votes[rank].append(1) or len(votes[rank]) > 1)
            with pytest.raises(Stopped):
                step(states[rank], parts, context=context, stop_requested=lambda: votes[rank].append(1) or True)

        return run

    in_processes(job(0), job(1))
    assert votes == [[1, 1], [1, 1]]


def test_a_bad_gradient_in_one_process_skips_the_update_in_all():
    states = [state(), state()]
    before = [snapshot(each) for each in states]
    limits = [Limits(grad_norm=0.0), Limits()]

    def job(rank):
        return lambda context: step(states[rank], [batch()], context=context, limits=limits[rank])

    assert [result.bad.item() for result in in_processes(job(0), job(1))] == [1.0, 1.0]
    assert all(is_unchanged(each, old) for each, old in zip(states, before, strict=True))


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_distributed_gradients_are_exchanged_in_the_last_pass_only(process_group, passes):
    ours, plain, done, exchanged = state(), state(), [], []
    ours.model.register_forward_hook(lambda *_: done.append(1))
    forward = DistributedDataParallel(ours.model)

    def exchange(_, bucket):
        exchanged.append(len(done))
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    forward.register_comm_hook(None, exchange)
    parts = split(batch(), (6 // passes,) * passes)
    step(ours, parts, forward=forward)
    step(plain, parts)
    assert set(exchanged) == {passes}
    assert_same_weights(ours, plain)


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_device", [None, False, True])
@pytest.mark.parametrize("make", [state, sgd_state])
def test_a_step_exactly_at_its_limits_is_made(make, on_device):
    ours, free = make(), make()
    expected = step(free, [batch()], grad_clip=0.1)
    assert expected.bad is None
    limits = Limits(expected.loss.item(), expected.grad_norm.item())
    result = step(ours, [batch()], grad_clip=0.1, limits=limits, on_device=on_device)
    assert result.bad.item() == 0
    assert result.loss.item() == expected.loss.item()
    assert_same_weights(ours, free, rtol=0, atol=0)
    assert not is_unchanged(ours, snapshot(make()))


@pytest.mark.parametrize("on_device", [None, False, True])
@pytest.mark.parametrize("make", [state, sgd_state])
@pytest.mark.parametrize("too_large", ["loss", "grad_norm"])
def test_a_step_above_a_limit_changes_nothing(make, on_device, too_large):
    ours = make()
    step(ours, [batch()])
    before = snapshot(ours)
    expected = step(copy.deepcopy(ours), [batch()])
    limits = Limits(**{too_large: getattr(expected, too_large).item() * 0.999})
    result = step(ours, [batch()], limits=limits, on_device=on_device)
    assert result.bad.item() == 1
    assert result.loss.item() == expected.loss.item()
    assert is_unchanged(ours, before)


@pytest.mark.parametrize("on_device", [None, False, True])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_nonfinite_loss_changes_nothing(on_device, factor):
    ours = state()
    step(ours, [batch()])
    before = snapshot(ours)
    result = step(ours, [batch()], forward=multiplied(ours, factor), limits=Limits(), on_device=on_device)
    assert result.bad.item() == 1
    assert is_unchanged(ours, before)
    step(ours, [batch()], limits=Limits(), on_device=on_device)
    assert not is_unchanged(ours, before), "the next step is made"


@pytest.mark.parametrize(("on_device", "flags"), [(True, [0.0, 1.0]), (False, [None]), (None, [None])])
def test_the_optimizer_gets_the_flag_only_when_the_device_decides(on_device, flags):
    """On the device every step calls the optimizer, with a flag; elsewhere only a good one does, without a flag."""
    ours, seen = state(), []

    def before_update(optimizer, *_):
        flag = getattr(optimizer, "found_inf", None)
        seen.append(None if flag is None else flag.item())

    ours.optimizer.register_step_pre_hook(before_update)
    for factor in (1.0, math.nan):
        step(ours, [batch()], forward=multiplied(ours, factor), limits=Limits(), on_device=on_device)
    assert seen == flags
    assert getattr(ours.optimizer, "found_inf", None) is None, "no flag is left for the next update"


# --- loss scaling ----------------------------------------------------------------------------------------------------

GUARDS = [{}, {"limits": Limits()}, {"limits": Limits(), "on_device": True}]


@pytest.mark.parametrize("guard", GUARDS, ids=["unguarded", "host", "device"])
def test_scaled_steps_equal_unscaled_ones_and_the_scale_grows(guard):
    plain, scaled = state(), scaled_state(2.0**10)
    for number in (1, 2):
        expected = step(plain, [batch()], grad_clip=0.1)
        result = step(scaled, [batch()], grad_clip=0.1, **guard)
        assert result.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-5)
        assert scaled.scaler.get_scale() == 2.0 ** (10 + number)
        assert_same_weights(scaled, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("guard", GUARDS, ids=["unguarded", "host", "device"])
def test_an_overflow_skips_the_update_and_halves_the_scale(guard):
    ours = scaled_state(2.0**10, growth_interval=100)
    step(ours, [batch()], **guard)
    before = snapshot(ours)
    step(ours, [batch()], forward=multiplied(ours, math.inf), **guard)
    assert is_unchanged(ours, before)
    assert ours.scaler.get_scale() == 2.0**9
    step(ours, [batch()], **guard)
    assert not is_unchanged(ours, before)


# --- random numbers --------------------------------------------------------------------------------------------------


def test_the_random_numbers_of_a_step_are_the_same_in_every_version():
    """A run that is resumed with a later version draws the dropout masks it would have drawn with its own."""
    seeds = {
        (0, 0, 0): 0,
        (1, 0, 0): 2177342782468422677,
        (0, 1, 0): 4564476756301768121,
        (0, 0, 1): 1499779743744070123,
        (1337, 0, 0): 5745108551026739629,
        (1337, 500, 3): 5086560793158610114,
        (42, 123456, 17): 7168650376768015437,
    }
    for key, seed in seeds.items():
        seed_dropout(*key)
        assert torch.initial_seed() == seed, key


def test_no_two_of_many_steps_share_their_random_numbers():
    seeds = set()
    for seed in (0, 1, 1337):
        for number in range(20):
            for rank in range(3):
                seed_dropout(seed, number, rank)
                seeds.add(torch.initial_seed())
    assert len(seeds) == 3 * 20 * 3
