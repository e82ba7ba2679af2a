"""What learns beside a model, when a run stops early, and what a full disk spoils."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import STEP, Stop, patterns, pull_plug, same, settings, tiny, weights

from limits import files_up_to
from regrow.engines import watch
from regrow.engines.loop import Loop
from regrow.engines.objective import Objective, next_token
from regrow.engines.resume import newest
from regrow.engines.train import train
from regrow.errors import OutputError, SettingsError

# --- what learns beside the model


class Scaled(nn.Module):
    """A loss with a number of its own, and what it remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if model.training:
            self.seen += 1
        return next_token(model, batch) + (self.factor - 3).square()


def beside(folder: Path, **changes: Any) -> tuple[Scaled, list[dict[str, float]]]:
    loss = Scaled()
    result = train(tiny(), patterns(), settings(**changes), folder=folder, loss=Objective(loss, beside=loss))
    return loss, list(result.losses)


def test_what_is_beside_the_model_learns_and_remembers(tmp_path: Path) -> None:
    """By hand: its gradient is 2 (factor - 3), whatever the micro-batches, and AdamW's first step is the rate."""
    one, _ = beside(tmp_path / "one", tokens=STEP, warmup=0, schedule="constant", micro_batch=4)
    two, _ = beside(tmp_path / "two", tokens=STEP, warmup=0, schedule="constant", micro_batch=1)
    assert one.factor.item() == pytest.approx(1 + 1e-2, rel=1e-5) == two.factor.item()
    assert (int(one.seen), int(two.seen)) == (1, 4)
    long, records = beside(tmp_path / "long", tokens=40 * STEP, schedule="constant", warmup=0)
    assert 1.2 < long.factor.item() < 1.45, "forty steps of a hundredth: gradients of steps before are not added"
    assert records[0]["loss"] > 4


def test_groups_may_name_what_is_beside(tmp_path: Path) -> None:
    loss, model = Scaled(), tiny()
    groups = [{"params": [model.lm_head.weight]}, {"params": list(loss.parameters()), "lr": 0.5, "maximize": True}]
    train(
        model, patterns(), settings(warmup=0, divergence=math.inf), folder=tmp_path, loss=Objective(loss, groups, loss)
    )
    assert loss.factor.item() < -0.5, "maximised at its own rate"
    with pytest.raises(SettingsError, match="nor beside it"):
        train(model, patterns(), settings(), folder=tmp_path, loss=Objective(loss, groups), resume=False)


# --- stopping early


def rising(lowest: float) -> Callable[..., Tensor]:
    """A loss that is lowest when the model has made so many steps: held-out losses are (steps - lowest)^2."""

    def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        weight = model.model.norm.weight[0]
        start = 1.0
        made = (start - weight) / 1e-2  # each step of AdamW is the rate
        return (made - lowest).square() if not model.training else weight * 1.0 + 0 * next_token(model, batch)

    return loss


def early(folder: Path, **changes: Any) -> tuple[Any, Any]:
    model = tiny()
    asked = settings(tokens=12 * STEP, schedule="constant", warmup=0, evaluate_every=1, save_every=100, **changes)
    return model, train(model, patterns(), asked, folder=folder, loss=rising(4), heldout=patterns(3))


def test_a_run_stops_when_held_out_loss_rises_and_keeps_the_best(tmp_path: Path) -> None:
    model, result = early(tmp_path, patience=3)
    held = [x["heldout_loss"] for x in result.losses]
    assert result.steps == 7
    assert held.index(min(held)) == 3
    assert result.stopped is not None
    assert "lowest" in result.stopped
    assert "after step 4, and not in 3 evaluations since" in result.stopped
    assert model.model.norm.weight[0].item() == pytest.approx(1 - 4e-2, abs=1e-3), "the weights of step 4"
    without, whole = early(tmp_path / "without")
    assert (whole.steps, whole.stopped) == (12, None)
    assert without.model.norm.weight[0].item() == pytest.approx(1 - 12e-2, abs=1e-3)


def test_patience_survives_an_interruption(tmp_path: Path) -> None:
    whole, expected = early(tmp_path / "whole", patience=3)
    model = tiny()
    asked = settings(tokens=12 * STEP, schedule="constant", warmup=0, evaluate_every=1, save_every=1, patience=3)
    with pytest.raises(Stop):
        train(model, patterns(), asked, folder=tmp_path, loss=rising(4), heldout=patterns(3), progress=pull_plug(6))
    model = tiny()
    found = train(model, patterns(), asked, folder=tmp_path, loss=rising(4), heldout=patterns(3))
    assert (found.steps, found.stopped) == (expected.steps, expected.stopped)
    assert same(weights(model), weights(whole))


def test_what_has_stopped_stays_stopped(tmp_path: Path) -> None:
    """A process that died after its training, before the folder was written: the same weights, not a step more."""
    first, expected = early(tmp_path, patience=3)
    for _ in range(2):
        again, found = early(tmp_path, patience=3)
        assert (found.steps, found.stopped, found.losses) == (expected.steps, expected.stopped, expected.losses)
        assert same(weights(first), weights(again))


@pytest.mark.parametrize("patience", [3, 9], ids=["stopped", "ended"])
def test_the_best_is_found_where_the_folder_lies_now(tmp_path: Path, patience: int) -> None:
    first, _ = early(tmp_path / "here", patience=patience)
    shutil.move(tmp_path / "here", tmp_path / "there")
    again, _ = early(tmp_path / "there", patience=patience)
    assert again.model.norm.weight[0].item() == pytest.approx(1 - 4e-2, abs=1e-3), "the weights of step 4"
    assert same(weights(first), weights(again))


def test_what_is_judged_by_decides_where_a_run_ends(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"tokens": 4 * STEP, "evaluate_every": 1}
    train(tiny(), patterns(), settings(**asked), folder=tmp_path / "free", heldout=patterns(3))
    train(tiny(), patterns(), settings(**asked), folder=tmp_path / "free", heldout=patterns(5))
    train(tiny(), patterns(), settings(**asked, patience=2), folder=tmp_path / "judged", heldout=patterns(3))
    with pytest.raises(SettingsError, match="heldout"):
        train(tiny(), patterns(), settings(**asked, patience=2), folder=tmp_path / "judged", heldout=patterns(5))


def test_the_optimiser_goes_when_the_training_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it remembers, that is: two numbers for every weight. Whoever trains next wants the room at once."""
    made, real = list[torch.optim.Optimizer](), Loop.create_optimizer

    def create(self: Loop, model: nn.Module | None = None) -> torch.optim.Optimizer:
        made.append(real(self, model))
        return made[-1]

    monkeypatch.setattr(Loop, "create_optimizer", create)
    train(tiny(), patterns(), settings(), folder=tmp_path)
    assert [dict(optimizer.state) for optimizer in made] == [{}]


def test_one_that_was_left_is_judged_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Left at step 5, between evaluations of every second step: the best so far is of step 4, and so it is later."""
    asked: dict[str, Any] = {"tokens": 12 * STEP, "schedule": "constant", "warmup": 0, "save_every": 100, "patience": 2}
    goes: dict[str, Any] = {"loss": rising(4.8), "heldout": patterns(3)}
    whole = tiny()
    expected = train(whole, patterns(), settings(**asked, evaluate_every=2), folder=tmp_path / "whole", **goes)
    assert expected.stopped is not None
    assert "after step 4, and not in 2 evaluations" in expected.stopped
    short = settings(**asked, evaluate_every=2, until=5 * STEP)
    for _ in range(2):
        model = tiny()
        left = train(model, patterns(), short, folder=tmp_path / "left", **goes)
        assert (left.steps, left.stopped) == (5, f"{5 * STEP} tokens were seen after step 5 of 12")
        assert model.model.norm.weight[0].item() == pytest.approx(1 - 4e-2, abs=1e-3), "the weights of step 4"
    model = tiny()
    found = train(model, patterns(), settings(**asked, evaluate_every=2), folder=tmp_path / "left", **goes)
    assert (found.steps, found.stopped) == (expected.steps, expected.stopped)
    assert same(weights(model), weights(whole))


def test_how_often_it_looks_decides_when_it_may_stop(tmp_path: Path) -> None:
    train(tiny(), patterns(), settings(patience=2), folder=tmp_path, heldout=patterns(3))
    with pytest.raises(SettingsError, match="evaluate_every"):
        train(tiny(), patterns(), settings(patience=2, evaluate_every=7), folder=tmp_path, heldout=patterns(3))


@pytest.mark.parametrize("what", ["optimizer.pt", "beside.safetensors", "complete"])
def test_no_room_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The one before stays good, and the run goes on from it. Two files fail for real, at a size that they exceed."""

    def start(folder: Path, **named: Any) -> dict[str, Tensor]:
        model, loss = tiny(), Big()
        train(model, patterns(), settings(), folder=folder, loss=Objective(loss, beside=loss), **named)
        return weights(model)

    with monkeypatch.context() as patch, ExitStack() as stack:

        def progress(done: int, *_: Any) -> None:
            if done == 4 * STEP:
                first = tmp_path / "checkpoint-3"
                if what == "complete":
                    patch.setattr(watch, "mark_complete", full)
                else:
                    stack.enter_context(files_up_to((first / what).stat().st_size - 100))

        with pytest.raises(OutputError, match="checkpoint of step 6 cannot be written"):
            start(tmp_path, progress=progress)
    found = newest(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-3"
    assert same(start(tmp_path), start(tmp_path / "whole"))


class Big(Scaled):
    """Larger beside the model than the optimiser's numbers are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("much", torch.zeros(100_000))


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_no_room_for_the_record(tmp_path: Path) -> None:
    long = settings(tokens=60 * STEP, save_every=100)
    with pytest.raises(OutputError, match=r"record of step \d+ cannot be written"), files_up_to(2000):
        train(tiny(), patterns(), long, folder=tmp_path)
