import numpy as np
import pytest

from bardling.planning.scaling_laws import (
    APPROACH_2_POINTS,
    approach_2_line,
    approach_2_tokens,
    approach_3_loss,
    approach_3_tokens,
    chinchilla_optimal,
)


@pytest.mark.parametrize("flops", [1e17, 2.21e19, 1e21, 1e26])
def test_closed_form_is_the_numeric_minimum(flops: float) -> None:
    best = chinchilla_optimal(flops)[1]
    n_best, d_best = best.parameters, best.tokens
    assert 6 * n_best * d_best == pytest.approx(flops)
    ns = 10 ** np.linspace(5, 14, 90_001)
    losses = 1.69 + 406.4 / ns**0.34 + 410.7 / (flops / 6 / ns) ** 0.28
    assert n_best == pytest.approx(ns[np.argmin(losses)], rel=1e-2)
    assert approach_3_loss(n_best, d_best) <= losses.min() + 1e-12


def test_notebook_figures_of_approach_3() -> None:
    # The notebook's grids are coarse (316.23M and 11.65B for 2.21e19; 399.54M, 14.43B and 2.76 for a model of 400M).
    best = chinchilla_optimal(2.21e19)[1]
    assert best.parameters == pytest.approx(316.23e6, rel=0.05)
    assert best.tokens == pytest.approx(11.65e9, rel=0.05)
    assert approach_3_tokens(399.54e6) == pytest.approx(14.43e9, rel=2e-3)
    assert round(approach_3_loss(399.54e6, 14.43e9), 2) == 2.76


def test_notebook_figures_of_approach_2() -> None:
    slope, intercept = approach_2_line()
    assert slope == pytest.approx(1.0409573169995892)
    assert intercept == pytest.approx(0.9353887152390791)
    assert approach_2_tokens(124e6) == pytest.approx(2.292426e9, rel=1e-6)
    logs = np.log10(np.array(APPROACH_2_POINTS))
    assert np.polyfit(logs[:, 0], logs[:, 1], 1) == pytest.approx([slope, intercept])


def test_optima_spend_the_budget() -> None:
    for best in chinchilla_optimal(3e20):
        assert 6 * best.parameters * best.tokens == pytest.approx(3e20)
    two, three = chinchilla_optimal(3e20)
    assert approach_2_tokens(two.parameters) == pytest.approx(two.tokens)
    assert approach_3_tokens(three.parameters) == pytest.approx(three.tokens)
    assert three.loss <= two.loss


@pytest.mark.parametrize("flops", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_must_be_positive(flops: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        chinchilla_optimal(flops)


def chinchilla_parameters(*, n_layer: int, d_model: int, ffw_size: int, vocab_size: int = 32_000) -> int:
    """Parameters of a model of the paper's family (table A9), including the output layer but not the input embedding.

    Unlike GPT-2, these models use relative positions: a projection of width d_model and two biases per block.
    """
    attention = 5 * d_model * d_model + 6 * d_model  # query, key, value, output (with biases), relative keys and two biases
    mlp = 2 * d_model * ffw_size + ffw_size + d_model
    norms = 4 * d_model
    return n_layer * (attention + mlp + norms) + 2 * d_model + d_model * vocab_size


def chinchilla_flops(*, n_layer: int, n_head: int, d_model: int, ffw_size: int, context: int = 2048) -> int:
    """FLOPs to train a model of the paper's family on one sequence, as counted in table A4 (appendix F).

    Appendix F also lists the embedding and the logits, but the numbers in table A4 exclude them.
    """
    projections = 2 * context * 4 * d_model * d_model
    attention = 2 * 2 * context * context * d_model
    softmax = 3 * n_head * context * context
    mlp = 2 * 2 * context * d_model * ffw_size
    return 3 * n_layer * (projections + attention + softmax + mlp)


def test_parameters_of_the_papers_family() -> None:
    # Rows of table A9: published size, d_model, ffw_size, layers. They are matched closely where heads * 128 = d_model.
    for size, d_model, ffw_size, n_layer in ((74e6, 640, 2560, 10), (306e6, 1024, 4096, 20), (16_183e6, 5120, 20480, 47)):
        assert chinchilla_parameters(n_layer=n_layer, d_model=d_model, ffw_size=ffw_size) == pytest.approx(size, rel=3e-3)


def test_flops_of_the_papers_family() -> None:
    # Table A4: FLOPs by appendix F over 6ND; six models, context 2048.
    rows = (
        (10, 640, 10, 1.03),
        (20, 1024, 16, 1.10),
        (24, 1280, 10, 1.08),
        (26, 1792, 14, 1.04),
        (28, 2048, 16, 1.03),
        (40, 3584, 28, 0.99),
    )
    for n_layer, d_model, n_head, ratio in rows:
        n = chinchilla_parameters(n_layer=n_layer, d_model=d_model, ffw_size=4 * d_model)
        flops = chinchilla_flops(n_layer=n_layer, n_head=n_head, d_model=d_model, ffw_size=4 * d_model)
        assert round(flops / (6 * n * 2048), 2) == ratio
    assert chinchilla_flops(n_layer=10, n_head=10, d_model=640, ffw_size=2560) == 929_877_196_800
