"""Which single weights matter: by size, by size times input, or by what the output loses when others make up for them.

What this gives up: every linear is judged by its own output, not by the model's loss.
"""

import torch

from regrow.artifacts.weight_sight import WeightSight, weight_criterion


@weight_criterion(sees="nothing", within="matrix", paper="-")
def weight_magnitude(sight: WeightSight) -> torch.Tensor:
    """|w|, over the whole linear."""
    return sight.weight.abs()  # (m, n)


@weight_criterion(sees="inputs", paper="arXiv:2306.11695 (Wanda)")
def wanda(sight: WeightSight) -> torch.Tensor:
    """|w| times the L2 norm of its input, within an output."""
    assert sight.norm is not None  # (n,)
    return sight.weight.abs() * sight.norm  # (m, n)


@weight_criterion(sees="inputs", within="matrix", paper="arXiv:2306.11695 (Wanda, variant)")
def wanda_variant(sight: WeightSight) -> torch.Tensor:
    """What share of its output's scores goes when it goes with all below it: rows may lose unequal counts.

    The paper's code bisects for one share that all rows of a linear lose; these scores over the whole linear give that
    share with an exact count. Inside a row the order is Wanda's, so in groups of N:M both are the same.
    """
    scores, order = wanda(sight).sort(dim=1, stable=True)  # (m, n) rising
    gone = scores.cumsum(1)  # (m, n)
    whole = gone[:, -1:]  # (m, 1), 0 of an output that is 0
    share = torch.where(whole > 0, gone / whole, 0)
    return torch.empty_like(share).scatter_(1, order, share)  # (m, n)


@weight_criterion(sees="gram", within="block", solver="update", adapts=True, paper="arXiv:2301.00774 (SparseGPT)")
def sparsegpt(sight: WeightSight) -> torch.Tensor:
    """What removing the weight costs when later inputs make up for it: w^2 / U_jj^2."""
    assert sight.pivot is not None  # (n,)
    return (sight.weight / sight.pivot).square()  # (m, n)


@weight_criterion(sees="gram", within="block", solver="update", adapts=True, paper="arXiv:2310.09499 (ISC)")
def isc(sight: WeightSight) -> torch.Tensor:
    """OBS and OBD terms together: w^2 / (2 [H^-1]_jj) + w^2 H_jj / 2."""
    assert sight.diagonal is not None
    assert sight.inverse_diagonal is not None
    return sight.weight.square() * (1 / sight.inverse_diagonal + sight.diagonal) / 2  # (m, n)


@weight_criterion(sees="routed", paper="arXiv:2410.12013 (MoE-Pruner)")
def moe_pruner(sight: WeightSight) -> torch.Tensor:
    """|w| times the L2 norm of its input weighted by the router; Wanda where there is no router."""
    assert sight.norm is not None
    return sight.weight.abs() * sight.norm  # (m, n)
