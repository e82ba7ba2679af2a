"""How strongly a unit fires, from one forward pass and no gradients (Minitron, section 2.2).

Neurons are read at the input of the down projection, heads at the input of the output projection, channels at the
output of every norm. What this gives up: the weights that read the unit; a loud unit nobody listens to scores high.
"""

import torch

from regrow.artifacts.sight import Reduction, Sight, criterion


@criterion(sees="flow", paper="arXiv:2407.14679 (Minitron)", units=("group", "head", "neuron", "channel"))
def activation(sight: Sight, sequence: Reduction = "mean", batch: Reduction = "l2") -> torch.Tensor:
    """|x| averaged over each sequence, L2 over sequences, L2 over the unit's channels."""
    assert sight.flow is not None
    return sight.flow[sequence].reduce(batch).square().sum(1).sqrt()  # (units, width) -> (units,)
