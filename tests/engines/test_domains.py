"""Several domains in one training: what is drawn, what the weights become, and the same after an interruption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import STEP, VOCAB, Stop, T, patterns, pull_plug, same, settings, tiny, weights

from regrow.engines.domains import Drawn, by_domain, joined, mean_loss
from regrow.engines.mixture import Mixture, Weights
from regrow.engines.objective import next_token
from regrow.engines.packed import Packed
from regrow.engines.train import train
from regrow.errors import SettingsError, TextError

EASY, HARD = "easy", "hard"


def text(seed: int = 0, count: int = 12) -> Packed:
    """One domain that is soon learnt, and one of noise."""
    source = torch.Generator().manual_seed(seed)
    return joined([Packed(patterns(count, seed)), Packed(torch.randint(VOCAB, (count, T), generator=source))])


def mixed(every: int = 2, **changes: Any) -> Mixture:
    return Mixture((EASY, HARD), (1.0, 1.0), every, (0.0, 0.0) if every else (), **changes)


def run(folder: Path, *, seen: list[Tensor] | None = None, **changes: Any) -> tuple[Any, Any]:
    usual = {"tokens": 12 * STEP, "mixture": mixed(), "evaluate_every": 4, "learning_rate": 3e-3}
    progress = changes.pop("progress", None)

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if seen is not None and model.training:
            seen.append(batch["input_ids"])
        return next_token(model, batch)

    model = tiny(dropout=0.1)
    asked = settings(**{**usual, **changes})
    return model, train(model, text(), asked, folder=folder, loss=loss, heldout=text(1, 3), progress=progress)


# --- what is drawn


def test_domains_are_drawn_by_weight_and_blocks_in_their_own_order() -> None:
    mixture = Mixture((EASY, HARD), (3.0, 1.0))
    stream = Drawn(text(), Weights(mixture), 500, settings())
    assert len(stream) == 2000
    got = [stream[i]["input_ids"] for i in range(2000)]
    where = [stream.sequence[i] for i in range(2000)]
    assert all(torch.equal(ids, text().ids[row]) for ids, row in zip(got, where, strict=True))
    hard = [row for row in where if row >= 12]
    assert len(hard) / 2000 == pytest.approx(0.25, abs=0.04), "four standard errors"
    for own in (hard, [row for row in where if row < 12]):
        rounds = [own[i : i + 12] for i in range(0, len(own) - 11, 12)]
        assert all(len(set(part)) == 12 for part in rounds), "each block once a round"
        assert rounds[0] != rounds[1]


def test_what_is_drawn_does_not_depend_on_who_asks_first() -> None:
    one, two = (Drawn(text(), Weights(mixed(0)), 6, settings()) for _ in range(2))
    backwards = [one[i]["input_ids"] for i in reversed(range(24))][::-1]
    assert torch.equal(torch.stack(backwards), torch.stack([two[i]["input_ids"] for i in range(24)]))
    assert Drawn(text(), Weights(mixed(0)), 6, settings(seed=1))[0]["input_ids"].tolist() != backwards[0].tolist()


def test_a_change_of_weights_leaves_the_steps_before_as_they_were() -> None:
    changed = Weights(mixed())
    changed.update(2, (0.0, 50.0))
    plain, other = (Drawn(text(), w, 40, settings()) for w in (Weights(mixed()), changed))
    a, b = ([stream[159] and row for row in stream.sequence] for stream in (plain, other))
    assert a[: 3 * 4] == b[: 3 * 4], "after step 2, so from step 4 on"
    assert all(row >= 12 for row in b[3 * 4 :]), "nearly all of the weight"


def test_the_usual_number_of_targets_is_of_the_step() -> None:
    learn = torch.ones(24, T, dtype=torch.bool)
    learn[12:, : T // 2] = False
    packed = Packed(text().ids, learn, text().domain)
    stream = Drawn(packed, Weights(mixed(0)), 5, settings())
    for index in range(20):
        step = [stream[i]["learn"][1:].sum() for i in range(index // 4 * 4, index // 4 * 4 + 4)]
        assert stream[index]["usual"] == torch.stack(step).float().mean()


# --- losses


def test_losses_by_domain() -> None:
    model, held = tiny().train(), text(1, 3)
    found = by_domain(model, next_token, held, 4, torch.device("cpu"))
    assert model.training
    expected = [next_token(model, {"input_ids": part}).item() for part in held.ids.split(3)]
    assert found == pytest.approx(expected, rel=1e-5)
    assert mean_loss(model, next_token, held, 4, torch.device("cpu")) == pytest.approx(sum(expected) / 2, rel=1e-5)


# --- in a training


def test_what_stays_hard_is_read_more(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    _, result = run(tmp_path, seen=seen, tokens=60 * STEP, mixture=mixed(5), log_every=100, save_every=100)
    found = [row for row in result.losses if "weight hard" in row]
    assert [row["step"] for row in found] == sorted({*range(4, 61, 4), *range(5, 61, 5)})
    assert all(row["weight easy"] + row["weight hard"] == pytest.approx(1) for row in found)
    assert found[0]["weight hard"] == 0.5
    assert found[-1]["weight hard"] > 0.8
    assert found[-1]["heldout hard"] > found[-1]["heldout easy"]
    wholes = [row for row in found if "heldout_loss" in row]
    assert [row["step"] for row in wholes] == list(range(4, 61, 4))
    last = wholes[-1]
    assert last["heldout_loss"] == pytest.approx((last["heldout easy"] + last["heldout hard"]) / 2, rel=1e-4)
    late = torch.cat(seen)[-40:]
    noise = (late[:, :4] != late[:, 4:8]).any(1)  # (40,)
    assert noise.float().mean() > 0.6


def test_a_run_reads_what_its_weights_say(tmp_path: Path) -> None:
    """The loader was never ahead of the weights: a stream that knows all of them from the start draws the same."""
    seen: list[Tensor] = []
    run(tmp_path, seen=seen, save_every=12)
    known = Weights(mixed())
    known.restore(json.loads((tmp_path / "checkpoint-12/weights.json").read_text()))
    assert [done for done, _ in known.updates] == [2, 4, 6, 8, 10, 12]
    stream = Drawn(text(), known, 12, settings(tokens=12 * STEP))
    assert torch.equal(torch.cat(seen), torch.stack([stream[i]["input_ids"] for i in range(48)]))


@pytest.mark.parametrize("at", [5, 7, 9])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(tmp_path: Path, at: int) -> None:
    whole, expected = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "cut", progress=pull_plug(at))
    seen: list[Tensor] = []
    again, found = run(tmp_path / "cut", seen=seen)
    assert len(seen) < 24, "it went on"
    assert same(weights(whole), weights(again))
    assert found.losses == expected.losses
    both = [(tmp_path / name / "checkpoint-12/weights.json").read_text() for name in ("whole", "cut")]
    assert both[0] == both[1]


def test_another_mixture_is_another_run(tmp_path: Path) -> None:
    run(tmp_path, tokens=3 * STEP)
    with pytest.raises(SettingsError, match="mixture"):
        run(tmp_path, tokens=3 * STEP, mixture=mixed(3))


def test_what_is_refused(tmp_path: Path) -> None:
    asked = settings(mixture=mixed())
    for blocks, held in ((patterns(), text()), (text(), patterns()), (text(), None)):
        with pytest.raises(TextError, match="of each of 2"):
            train(tiny(), blocks, asked, folder=tmp_path, heldout=held)
    without = settings(mixture=Mixture((EASY, HARD), (1, 1), 2))
    with pytest.raises(SettingsError, match="no losses to compare with"):
        train(tiny(), text(), without, folder=tmp_path, heldout=text())
    fixed = settings(mixture=mixed(0), tokens=STEP)
    assert "weight hard" not in train(tiny(), text(), fixed, folder=tmp_path).losses[-1]
