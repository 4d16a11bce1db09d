"""The chunked loss against plain cross-entropy over full logits: values and gradients, however it is cut."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bardling.model.kernels import head_loss as loss_module
from bardling.model.kernels.head_loss import full_logits_loss, head_loss, soft_cap

VOCAB, ROWS, WIDTH = 75, 128, 24


def problem(dtype: torch.dtype, *, ignored: bool, count: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, count // 2, WIDTH, generator=generator, dtype=torch.float64)
    weight = 0.3 * torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    weight[VOCAB:] = 0
    targets = torch.randint(0, VOCAB, (2, count // 2), generator=generator)
    if ignored:
        targets[0, 3:17] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token, by the textbook."""
    logits = hidden @ weight[:VOCAB].T
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=-100).view(targets.shape)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_reference_is_the_textbooks_loss_and_the_chunked_one_equals_it(
    chunks: int, dtype: torch.dtype, softcap: float
) -> None:
    hidden, weight, targets = problem(torch.float64 if dtype == torch.float64 else torch.float32, ignored=True)
    flat, ids = hidden.flatten(0, 1), targets.flatten()
    reference = full_logits_loss(flat, weight, ids, vocab_size=VOCAB, dtype=dtype, softcap=softcap)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        total = head_loss(hidden, weight, targets, vocab_size=VOCAB, softcap=softcap)
        with torch.no_grad():
            each = head_loss(hidden, weight, targets, vocab_size=VOCAB, softcap=softcap, reduction="none")
    torch.testing.assert_close(each.flatten(), reference)
    torch.testing.assert_close(total, reference.sum())
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-5
    theirs = torch.autograd.grad(reference.sum(), (hidden, weight))
    for mine, expected in zip(torch.autograd.grad(total, (hidden, weight)), theirs, strict=True):
        assert float((mine - expected).norm() / expected.norm()) < rtol
    if not softcap and dtype != torch.bfloat16:
        torch.testing.assert_close(reference, plain(hidden, weight, targets).flatten())


@pytest.fixture(params=[(1, 1), (3, 1), (4, 2), (7, 7)])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Have 50 tokens cut into about this many chunks, whose slopes are used in about this many groups."""
    for name, count in zip(("CHUNK_BYTES", "SLOPE_BYTES"), request.param, strict=True):
        monkeypatch.setattr(loss_module, name, {"cpu": -(-50 * VOCAB * 4 // count)})
    return int(request.param[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_value_and_gradients(chunks: int, dtype: torch.dtype, tolerance: float, ignored: bool, reduction: str) -> None:
    hidden, weight, targets = problem(dtype, ignored=ignored)
    expected = plain(hidden, weight, targets)
    loss = head_loss(hidden, weight, targets, vocab_size=VOCAB, reduction=reduction)  # type: ignore[arg-type]
    above = torch.linspace(0.5, 2.0, targets.numel(), dtype=dtype).view(targets.shape) if reduction == "none" else 3.0
    theirs = torch.autograd.grad((expected * above).sum(), (hidden, weight))
    ours = torch.autograd.grad((loss * above).sum(), (hidden, weight))
    torch.testing.assert_close(loss, expected.sum() if reduction == "sum" else expected, rtol=tolerance, atol=tolerance)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance)
    assert torch.all(ours[1][VOCAB:] == 0)


@torch.no_grad()
@pytest.mark.parametrize("ignored", [False, True])
def test_value_without_gradients(chunks: int, ignored: bool) -> None:
    hidden, weight, targets = problem(torch.float64, ignored=ignored)
    expected = plain(hidden, weight, targets)
    torch.testing.assert_close(head_loss(hidden, weight, targets, vocab_size=VOCAB, reduction="none"), expected)
    torch.testing.assert_close(head_loss(hidden, weight, targets, vocab_size=VOCAB), expected.sum())


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_get_no_gradient(chunks: int, frozen: str) -> None:
    hidden, weight, targets = problem(torch.float64, ignored=True)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    other = weight if frozen == "hidden" else hidden
    (theirs,) = torch.autograd.grad(plain(hidden, weight, targets).sum(), other)
    (ours,) = torch.autograd.grad(head_loss(hidden, weight, targets, vocab_size=VOCAB), other)
    torch.testing.assert_close(ours, theirs)


def test_multiplied_padding_does_not_contribute(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that accelerators take, where matrix products keep the padded shape."""
    monkeypatch.setattr(loss_module, "head_rows", lambda weight, vocab_size: weight.size(0))
    hidden, weight, targets = problem(torch.float64, ignored=True)
    theirs = torch.autograd.grad(plain(hidden, weight, targets).sum(), (hidden, weight))
    ours = torch.autograd.grad(head_loss(hidden, weight, targets, vocab_size=VOCAB), (hidden, weight))
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference)
    with torch.no_grad():
        each = head_loss(hidden, weight, targets, vocab_size=VOCAB, reduction="none")
        torch.testing.assert_close(each, plain(hidden, weight, targets))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_autocast_keeps_float32_results(chunks: int, dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, targets = problem(torch.float32, ignored=True)
    expected = plain(hidden, weight, targets).sum()
    theirs = torch.autograd.grad(expected, (hidden, weight))
    with torch.autocast("cpu", dtype):
        loss = head_loss(hidden, weight, targets, vocab_size=VOCAB)
    ours = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - reference).norm() / reference.norm()) < tolerance


def test_float16_gradients_survive_a_scaler_and_many_equal_tokens() -> None:
    """A row's gradient over 40,000 tokens is far beyond float16's range, and the scaler's factor more so."""
    hidden = torch.full((1, 40_000, WIDTH), 4.0, requires_grad=True)
    weight = torch.zeros(ROWS, WIDTH, requires_grad=True)
    targets = torch.zeros(1, 40_000, dtype=torch.int64)
    with torch.autocast("cpu", torch.float16):
        loss = head_loss(hidden, weight, targets, vocab_size=VOCAB)
    (ours,) = torch.autograd.grad(loss * 65536.0, weight)
    assert float(ours[0, 0]) == pytest.approx(-65536.0 * 40_000 * 4.0 * (1 - 1 / VOCAB), rel=1e-3)
    assert torch.all(torch.isfinite(ours))


def test_all_targets_ignored_is_a_loss_of_zero_without_nan() -> None:
    hidden, weight, targets = problem(torch.float32, ignored=False)
    loss = head_loss(hidden, weight, torch.full_like(targets, -100), vocab_size=VOCAB)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == 0
    assert all(torch.all(gradient == 0) for gradient in gradients)


def test_a_second_backward_pass_is_an_error_not_a_wrong_number() -> None:
    hidden, weight, targets = problem(torch.float32, ignored=False)
    loss = head_loss(hidden, weight, targets, vocab_size=VOCAB) * 2
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_a_target_outside_the_vocabulary_is_an_error() -> None:
    hidden, weight, targets = problem(torch.float32, ignored=False)
    targets[0, 0] = VOCAB
    with pytest.raises((RuntimeError, IndexError)):
        head_loss(hidden, weight, targets, vocab_size=VOCAB)


def test_full_logits_never_exist_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", {"cpu": 16 * VOCAB * 4})
    hidden, weight, targets = problem(torch.float32, ignored=False)
    seen: list[int] = []
    softmax = F.log_softmax

    def watched(logits: Tensor, dim: int) -> Tensor:
        seen.append(logits.size(0))
        return softmax(logits, dim=dim)

    monkeypatch.setattr(F, "log_softmax", watched)
    head_loss(hidden, weight, targets, vocab_size=VOCAB).backward()
    assert seen == [16, 16, 16, 2]


# --- shared by the tests below ---------------------------------------------------------------------------------------


def capped(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Loss of each token with soft-capped logits, from full logits."""
    logits = cap * torch.tanh(hidden @ weight[:VOCAB].T / cap)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=-100).view(targets.shape)


def whole_numbers(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A problem whose logits are small integers, which every dtype represents exactly."""
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randint(-1, 2, (2, count // 2, WIDTH), generator=generator).float()
    weight = torch.randint(-2, 3, (ROWS, WIDTH), generator=generator).float()
    targets = torch.randint(0, VOCAB, (2, count // 2), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


class Results(TorchDispatchMode):
    """Records every tensor that an operator returns, and the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, torch.Size, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.found.append((func.name(), result.shape, result.dtype))
        return result

    def largest(self, dtype: torch.dtype) -> int:
        """Bytes of the largest tensor of this dtype."""
        return max(shape.numel() * dtype.itemsize for _, shape, kind in self.found if kind == dtype)

    def rows(self, name: str) -> list[int]:
        """First dimension of each result of an operator."""
        return [shape[0] for operator, shape, _ in self.found if operator == name]


def limit_chunks(monkeypatch: pytest.MonkeyPatch, *, logits: int, slopes: int) -> None:
    """Set the largest size of a chunk's logits and of a group's slopes, in bytes."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", {"cpu": logits})
    monkeypatch.setattr(loss_module, "SLOPE_BYTES", {"cpu": slopes})


# --- soft-capping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("cap", [0.5, 2.0, 30.0])
def test_soft_capped_value_and_gradients(chunks: int, cap: float, reduction: str, ignored: bool) -> None:
    hidden, weight, targets = problem(torch.float64, ignored=ignored)
    expected = capped(hidden, weight, targets, cap)
    loss = head_loss(hidden, weight, targets, vocab_size=VOCAB, reduction=reduction, softcap=cap)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, expected.sum() if reduction == "sum" else expected)
    theirs = torch.autograd.grad(expected.sum(), (hidden, weight))
    for mine, reference in zip(torch.autograd.grad(loss.sum(), (hidden, weight)), theirs, strict=True):
        torch.testing.assert_close(mine, reference)
    with torch.no_grad():
        again = head_loss(hidden, weight, targets, vocab_size=VOCAB, reduction=reduction, softcap=cap)  # type: ignore[arg-type]
    torch.testing.assert_close(again, loss.detach())


def test_soft_cap_bounds_logits_and_leaves_small_ones_alone() -> None:
    logits = torch.tensor([-1e4, -1e-3, 0.0, 1.0, 5.0, 1e4], dtype=torch.float64)
    torch.testing.assert_close(soft_cap(logits, 5.0), 5 * (logits / 5).tanh())
    assert soft_cap(logits, 5.0).abs().max() <= 5
    assert torch.equal(soft_cap(logits, 0.0), logits)


# --- ids and shapes at the edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_every_id_is_a_target_next_to_ignored_positions(chunks: int, reduction: str) -> None:
    hidden, weight, targets = problem(torch.float64, ignored=False, count=2 * VOCAB)
    targets = torch.arange(2 * VOCAB).view(2, VOCAB) % VOCAB
    targets[1, 5:9] = -100
    expected = plain(hidden, weight, targets)
    loss = head_loss(hidden, weight, targets, vocab_size=VOCAB, reduction=reduction)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, expected.sum() if reduction == "sum" else expected)
    theirs = torch.autograd.grad(expected.sum(), (hidden, weight))
    for mine, reference in zip(torch.autograd.grad(loss.sum(), (hidden, weight)), theirs, strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_tokens_and_few_tokens(count: int, reduction: str) -> None:
    hidden, weight, targets = problem(torch.float64, ignored=False, count=count)
    expected = plain(hidden, weight, targets)
    loss = head_loss(hidden, weight, targets, vocab_size=VOCAB, reduction=reduction)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, expected.sum() if reduction == "sum" else expected)
    theirs = torch.autograd.grad(expected.sum(), (hidden, weight))
    for mine, reference in zip(torch.autograd.grad(loss.sum(), (hidden, weight)), theirs, strict=True):
        torch.testing.assert_close(mine, reference)
    with torch.no_grad():
        again = head_loss(hidden, weight, targets, vocab_size=VOCAB, reduction=reduction)  # type: ignore[arg-type]
    torch.testing.assert_close(again, loss.detach())


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="mean"):
        head_loss(*problem(torch.float32, ignored=False), vocab_size=VOCAB, reduction="mean")  # type: ignore[arg-type]


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_matrix_products_but_not_the_loss(chunks: int, dtype: torch.dtype) -> None:
    """With logits that the narrow dtype represents exactly, the loss is as accurate as in float32."""
    hidden, weight, targets = whole_numbers(50)
    expected = plain(hidden.double(), weight.double(), targets)
    with torch.autocast("cpu", dtype):
        total = head_loss(hidden, weight, targets, vocab_size=VOCAB)
        with torch.no_grad():
            each = head_loss(hidden, weight, targets, vocab_size=VOCAB, reduction="none")
    assert total.dtype == each.dtype == torch.float32
    torch.testing.assert_close(total.double(), expected.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(each.double(), expected, rtol=1e-5, atol=1e-5)


def test_autocast_reaches_every_row_of_a_large_vocabulary() -> None:
    generator = torch.Generator().manual_seed(2)
    targets = torch.tensor([0, 1, 4095, 4096, 4097, 5999, 8191, 8192, 8999])
    hidden = torch.randn(len(targets), 4, generator=generator)
    weight = torch.randn(9000, 4, generator=generator, requires_grad=True)
    (reference,) = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets, reduction="sum"), weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_loss(hidden, weight, targets, vocab_size=9000)
    (ours,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(ours, reference, rtol=2e-2, atol=1e-3)


def test_compiled_loss_equals_the_eager_one_without_a_graph_break() -> None:
    hidden, weight, targets = problem(torch.float32, ignored=True)
    compiled: Callable[..., Tensor] = torch.compile(head_loss, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (loss(hidden, weight, targets, vocab_size=VOCAB) for loss in (compiled, head_loss))
    torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, theirs))
    for mine, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, eager)


# --- memory and compute ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_no_tensor_is_larger_than_the_limits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, training: bool) -> None:
    logits, slopes = 32 * VOCAB * 4, 64 * VOCAB * dtype.itemsize
    limit_chunks(monkeypatch, logits=logits, slopes=slopes)
    hidden, weight = torch.randn(256, 4, requires_grad=True), torch.randn(ROWS, 4, requires_grad=True)
    targets = torch.arange(256) % VOCAB
    results = Results()
    with results, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), torch.set_grad_enabled(training):
        head_loss(hidden, weight, targets, vocab_size=VOCAB)
    assert results.largest(dtype) <= (slopes if training else logits)
    assert results.largest(torch.float32) <= (slopes if training and dtype == torch.float32 else logits)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("count", "limit", "sizes"),
    [(50, 50, [50]), (50, 49, [32, 18]), (50, 16, [16, 16, 16, 2]), (33, 32, [32, 1]), (1, 50, [1]), (96, 48, [48, 48])],
)
def test_tokens_are_cut_into_equal_chunks_only_where_they_exceed_the_limit(
    monkeypatch: pytest.MonkeyPatch, count: int, limit: int, sizes: list[int], training: bool
) -> None:
    limit_chunks(monkeypatch, logits=limit * VOCAB * 4, slopes=1 << 20)
    hidden, weight, targets = problem(torch.float32, ignored=False, count=96)
    results = Results()
    with results, torch.set_grad_enabled(training):
        head_loss(hidden.flatten(0, 1)[:count], weight, targets.flatten()[:count], vocab_size=VOCAB)
    assert results.rows("aten::_log_softmax") == sizes


@torch.no_grad()
def test_a_cpu_does_not_multiply_padding_rows() -> None:
    hidden, weight, targets = problem(torch.float32, ignored=False)
    with FlopCounterMode(display=False) as counter:
        head_loss(hidden, weight, targets, vocab_size=VOCAB)
    assert counter.get_total_flops() == 2 * 50 * WIDTH * VOCAB


@pytest.mark.parametrize("training", [False, True])
def test_a_cpu_multiplies_only_tokens_that_count(training: bool) -> None:
    flops = []
    for ignored in (True, False):
        hidden, weight, targets = problem(torch.float32, ignored=ignored)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            head_loss(hidden, weight, targets, vocab_size=VOCAB)
        flops.append(counter.get_total_flops())
    assert 0 < flops[0] < 0.9 * flops[1]


@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_greedy_tells_which_targets_are_the_likeliest(chunks: int, ignored: bool, softcap: float) -> None:
    hidden, weight, targets = problem(torch.float32, ignored=ignored)
    likeliest = (hidden @ weight[:VOCAB].T).argmax(-1)
    targets[0, ::3] = likeliest[0, ::3]
    if ignored:
        targets[0, 3:17] = -100
    with torch.no_grad():
        losses, hits = head_loss(hidden, weight, targets, vocab_size=VOCAB, softcap=softcap, reduction="none", greedy=True)
        alone = head_loss(hidden, weight, targets, vocab_size=VOCAB, softcap=softcap, reduction="none")
    assert losses.shape == hits.shape == targets.shape
    assert torch.equal(hits.bool(), likeliest == targets)
    assert 0 < int(hits.sum()) < hits.numel()
    torch.testing.assert_close(losses, alone)
    assert not ignored or bool((losses[0, 3:17] == 0).all())


def test_greedy_needs_a_loss_for_each_target_without_gradients() -> None:
    hidden, weight, targets = problem(torch.float32, ignored=False)
    with pytest.raises(ValueError, match="greedy"):
        head_loss(hidden, weight, targets, vocab_size=VOCAB, reduction="none", greedy=True)
    with torch.no_grad(), pytest.raises(ValueError, match="greedy"):
        head_loss(hidden, weight, targets, vocab_size=VOCAB, greedy=True)
