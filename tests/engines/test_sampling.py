"""What is drawn follows the model's predictions and the numbers given, and nothing else."""

from __future__ import annotations

import pytest
import torch
from training import VOCAB, patterns, tiny

from models import make, randomise
from regrow.engines.sampling import continued, drawn


def test_drawn_by_hand() -> None:
    """Of chances 1/2, 0, 1/4, 1/4 each token has its part of the numbers from 0 to 1."""
    logits = torch.tensor([[1 / 2, 0, 1 / 4, 1 / 4]]).log().expand(6, -1)
    luck = torch.tensor([[0.0], [0.49], [0.5], [0.74], [0.76], [1 - 2**-24]])
    assert drawn(logits, luck).flatten().tolist() == [0, 0, 2, 2, 3, 3]


def test_drawn_as_often_as_likely() -> None:
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    luck = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(1))
    found = torch.bincount(drawn(logits.expand(20_000, -1), luck).flatten(), minlength=8) / 20_000
    assert torch.allclose(found, logits.softmax(-1)[0], atol=0.01)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_each_token_is_of_the_prediction_after_all_before_it(kind: str) -> None:
    """Step by step with a cache equals the whole text read again for every token."""
    model = make(kind)
    randomise(model, gains=1.0, seed=9)
    source = torch.Generator().manual_seed(0)
    given = torch.randint(model.config.vocab_size, (3, 5), generator=source)
    luck = torch.rand(3, 9, generator=source)
    found = continued(model, given, luck, temperature=0.7, rows=40)
    assert found.shape == (3, 14)
    assert torch.equal(found[:, :5], given)
    assert int(found[:, 5:].max()) < 40
    with torch.no_grad():
        for step in range(9):
            logits = model(input_ids=found[:, : 5 + step], use_cache=False).logits[:, -1, :40]
            assert torch.equal(found[:, 5 + step], drawn(logits / 0.7, luck[:, step, None])[:, 0])


def test_rows_do_not_hang_on_each_other() -> None:
    model, given, luck = tiny(), patterns()[:, :6], torch.rand(12, 10, generator=torch.Generator().manual_seed(2))
    whole = continued(model, given, luck, temperature=1.0, rows=VOCAB)
    assert torch.equal(continued(model, given[3:5], luck[3:5], temperature=1.0, rows=VOCAB), whole[3:5])
    assert len({tuple(row) for row in whole.tolist()}) == 12


def test_nearly_cold_is_greedy() -> None:
    model, given = tiny(), patterns()[:3, :6]
    luck = torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
    found = continued(model, given, luck, temperature=1e-4, rows=VOCAB)
    with torch.no_grad():
        assert torch.equal(found[:, 6], model(input_ids=given).logits[:, -1].argmax(-1))
