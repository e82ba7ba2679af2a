"""Gates that learn: published constants, frequencies, gradients, and what is left of them without chance."""

from __future__ import annotations

import math

import pytest
import torch

from regrow.engines.hard_concrete import LIMIT, SHIFT, draw, keep, logit, settled, soft


def at(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_published_constants() -> None:
    assert pytest.approx(1.5985968, abs=1e-7) == SHIFT
    assert keep(at(-LIMIT, LIMIT)).tolist() == pytest.approx([0.0471298, 0.9979823], abs=1e-7)
    assert soft(at(LIMIT, 0)).tolist() == pytest.approx([0.9960347, 0.5], abs=1e-7)
    assert logit(0.99) == pytest.approx(4.59512, abs=1e-5)


@pytest.mark.parametrize("a", [-LIMIT, -1.0, 0.0, 1.0, LIMIT])
def test_draws_are_0_and_1_as_often_as_the_formulas_say(a: float) -> None:
    """Within three standard deviations of 200,000 draws."""
    count = 200_000
    noise = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = draw(torch.full((count,), a, dtype=torch.float64), noise)
    for share, chance in (
        ((z == 0).double().mean(), 1 - 1 / (1 + math.exp(-a - SHIFT))),
        ((z == 1).double().mean(), 1 / (1 + math.exp(-a + SHIFT))),
    ):
        assert abs(float(share) - chance) <= 3 * math.sqrt(chance * (1 - chance) / count) + 2e-6  # noise is kept inside
    assert float(keep(at(a))) == pytest.approx(float((z != 0).double().mean()), abs=5e-3)


def test_a_draw_by_hand() -> None:
    """u = 1/2 and a = 0: sigmoid(0) stretched by 1.2 and moved by -0.1 is 0.5."""
    assert float(draw(at(0), at(0.5))) == pytest.approx(0.5)
    assert float(draw(at(1), at(0.5))) == pytest.approx(1.2 / (1 + math.exp(-1.5)) - 0.1)


def test_gradients_flow_where_nothing_is_clipped() -> None:
    a = at(0.3, 9, -9).requires_grad_()
    draw(a, at(0.4, 0.4, 0.4)).sum().backward()
    assert a.grad is not None
    assert a.grad[0] > 0.1
    assert a.grad[1:].tolist() == [0, 0]
    noise = at(0.1, 0.5, 0.8)
    inner = at(0.2, -0.4, 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: draw(x, noise), (inner,))


def test_settled_by_hand() -> None:
    """keep(-2) = 0.401, keep(4) = 0.996, keep(-4) = 0.083: 1.48 are expected, so one stays, and it stays soft."""
    found = settled(at(-2, 4, -4))
    assert found.tolist() == [0, pytest.approx(1 / (1 + math.exp(-4.8))), 0]
    rows = settled(torch.stack([at(-2, 4, -4), at(LIMIT, LIMIT, LIMIT)]))
    assert (rows != 0).sum(-1).tolist() == [1, 3]
    assert settled(at(0, 0)).tolist() == [0.5, 0.5]  # 1.66 of two
    assert settled(at(-1, -1)).tolist()[1] == 0  # 1.29 of two: the first stays


def test_even_fully_open_gates_lose_some() -> None:
    """LLaMA-7B at the upper limit: 8 of 4096 channels and 22 of 11008 neurons, no head."""
    for units, lost in ((4096, 8), (11008, 22), (32, 0)):
        assert int((settled(torch.full((units,), LIMIT, dtype=torch.float64)) == 0).sum()) == lost
