"""The chunked loss against plain cross-entropy over full logits: values and gradients, however it is cut."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bardling.model import loss as loss_module
from bardling.model.loss import head_loss

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
def test_what_is_frozen_gets_no_gradient(chunks: int, frozen: str) -> None:
    hidden, weight, targets = problem(torch.float64, ignored=True)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    other = weight if frozen == "hidden" else hidden
    (theirs,) = torch.autograd.grad(plain(hidden, weight, targets).sum(), other)
    (ours,) = torch.autograd.grad(head_loss(hidden, weight, targets, vocab_size=VOCAB), other)
    torch.testing.assert_close(ours, theirs)


def test_padding_that_is_multiplied_still_takes_no_part(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that accelerators take, where matrix products keep the padded shape."""
    monkeypatch.setattr(loss_module, "_used_rows", lambda weight, vocab_size: weight.size(0))
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
