"""Which layers matter: by the angle they turn the stream, by the loss without them, or as one contiguous run.

What this gives up: layers are judged one at a time (runs excepted), so errors of several gaps add up unseen.
"""

import torch

from regrow.artifacts.sight import Sight, criterion


@criterion(sees="angles", paper="arXiv:2403.03853 (ShortGPT)", units=("layer",), comparable=True)
def block_influence(sight: Sight) -> torch.Tensor:
    """1 - mean cosine between a layer's input and its output."""
    assert sight.angles is not None  # (L+1, L+1)
    return 1 - sight.angles.diagonal(1)  # (L,)


@criterion(sees="removal", paper="arXiv:2402.02834 (Shortened LLaMA)", units=("layer",), comparable=True)
def perplexity(sight: Sight) -> torch.Tensor:
    """Loss of the model without the layer, minus its loss with it."""
    assert sight.removal is not None  # (L,)
    return sight.removal


@criterion(sees="angles", paper="arXiv:2403.17887 (Gromov et al.)", units=("layer",), comparable=True)
def contiguous(sight: Sight) -> torch.Tensor:
    """1 - mean cosine between the streams at the two ends of every run of layers; the cheapest run goes as one.

    The paper takes the angle at the last token; this is the mean over all tokens, as in block influence.
    """
    assert sight.angles is not None  # (L+1, L+1)
    return (1 - sight.angles).triu()[:-1]  # (L, L+1): [i, j] = cost of removing layers i..j-1


@criterion(sees="task", paper="arXiv:2408.11796 (Minitron in practice)", units=("layer",), comparable=True)
def contiguous_task(sight: Sight, task: str = "winogrande", limit: int = 200) -> torch.Tensor:
    """Items of a task that go wrong without a run of layers, as a share of `limit`; the cheapest run goes as one.

    Of runs that cost as many items, the one goes without which the right answers are likelier: their bits a byte, b,
    count b / (1 + b) of an item. `task` and `limit` (its first items) say what is asked.
    """
    assert sight.runs is not None
    wrong, bits = sight.runs[task].unbind()
    return (wrong + 1 - 1 / (1 + bits)) / limit  # (L, L+1)
