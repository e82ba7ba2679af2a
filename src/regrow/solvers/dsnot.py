"""Swaps of pruned and kept weights that bring each output's mean back to the dense one (DSnoT); no weight changes.

Rows are independent and take their swaps side by side. A weight moves once at most. What this gives up: only the mean
error is looked at, so on few or odd inputs the output may get worse.
"""

from __future__ import annotations

import torch

from regrow.artifacts.linear import Linear, Sparse, solver


@solver(sees="moments", mask="moves", takes="mask", start="wanda", within="row", paper="arXiv:2310.08915 (DSnoT)")
def dsnot(task: Linear, start: Sparse, cycles: int = 50, threshold: float = 0.1, power: float = 1.0) -> Sparse:
    """Grows what explains the missing mean best and prunes what is worth least, up to `cycles` swaps a row."""
    assert task.inputs is not None
    share = task.weight * task.inputs.sums  # (m, n) what each weight adds to the mean output of a sequence
    limits = torch.finfo(share.dtype)
    worth = share / task.inputs.variance.pow(power).clamp_min(limits.tiny)
    worth = worth.clamp(limits.min, limits.max)  # of a constant input too, apart from what is not allowed
    wanda = task.weight.abs() * task.inputs.squares.sqrt()  # whatever chose the start
    gone, rows = start.gone.clone(), torch.arange(len(share), device=share.device)
    error = (share * gone).sum(1)  # (m,) mean output that is missing
    away = start.gone & (task.inputs.squares > 0)  # (m, n) what may return: not the weights of inputs always zero
    away = away if task.empty is None else away & ~task.empty
    grow, most = _orders(worth, away), away.sum(1)  # (m, n) from one end for an error above zero, else from the other
    signed = torch.stack([share < 0, share > 0]) & ~start.gone  # (2, m, n) what lowers an error above, raises one below
    prune = _orders(-wanda.expand(2, -1, -1), signed)
    grown, pruned = torch.zeros(2, len(rows)).to(rows), torch.zeros(2, len(rows)).to(rows)  # pointers into the orders
    going = torch.ones_like(rows, dtype=torch.bool)
    for _ in range(cycles):
        side = (error <= 0).long()
        going = going & (error.abs() > threshold) & (grown.sum(0) < most)
        place = torch.where(side == 0, grown[0], most - 1 - grown[1])
        back = grow[rows, place.clamp(0, share.shape[1] - 1)]  # (m,) column that would return
        if task.pattern.of:
            out, valid = _cheapest_of_group(task, start.gone, gone, back)
        else:
            left = pruned[side, rows] < signed.sum(2)[side, rows]
            out = prune[side, rows, pruned[side, rows].clamp_max(share.shape[1] - 1)]
            going, valid = going & left, left
        after = error + share[rows, out] - share[rows, back]
        if task.pattern.of:  # swaps that overshoot or make it worse are passed over
            valid = valid & (after * error >= 0) & (after.abs() <= error.abs())
        if not bool(going.any()):
            break
        grown[side, rows] += going
        swap = going & valid
        pruned[side, rows] += swap
        gone[rows[swap], back[swap]] = False
        gone[rows[swap], out[swap]] = True
        error = torch.where(swap, after, error)
    return Sparse(task.weight.masked_fill(gone, 0), gone)


def _orders(keys: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:  # (..., n) -> (..., n) int64
    """Columns by falling key, those allowed first."""
    return keys.masked_fill(~allowed, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def _cheapest_of_group(
    task: Linear, before: torch.Tensor, gone: torch.Tensor, back: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:  # (m,) column, (m,) bool
    """In the group of `back`, the lowest score among weights kept from the start and still kept; is there one?"""
    size = task.pattern.of
    columns = (back // size * size)[:, None] + torch.arange(size, device=back.device)  # (m, M)
    free = ~(before | gone).gather(1, columns)
    lowest = task.scores.gather(1, columns).masked_fill(~free, torch.inf).min(1)
    return columns.gather(1, lowest.indices[:, None]).squeeze(1), lowest.values.isfinite()
