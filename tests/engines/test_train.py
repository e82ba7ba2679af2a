"""One loop: exact tokens, exact schedule, exact accumulation, and a stop before anything is spoilt."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training import STEP, VOCAB, T, patterns, same, settings, tiny, weights

from regrow.engines.adapters import add_adapters
from regrow.engines.objective import Objective, next_token
from regrow.engines.packed import order
from regrow.engines.resume import newest
from regrow.engines.train import train
from regrow.engines.train_settings import rate
from regrow.errors import BrokenModel, SettingsError, TextError

# --- what it computes


def test_next_token_by_hand() -> None:
    """Mean over the pairs (token, next), from probabilities; the last position counts for nothing."""
    model, ids = tiny(), patterns(3)
    chances = model(input_ids=ids).logits.detach().softmax(-1)
    pairs = [-math.log(chances[b, t, ids[b, t + 1]]) for b in range(3) for t in range(T - 1)]
    assert next_token(model, {"input_ids": ids}).item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    model = tiny()
    result = train(model, patterns(), settings(tokens=60 * STEP), folder=tmp_path, heldout=patterns())
    assert result.losses[0]["loss"] == pytest.approx(math.log(VOCAB), abs=0.5)
    assert result.losses[-1]["loss"] < 1.0
    assert next_token(model, {"input_ids": patterns()}).item() == pytest.approx(result.losses[-1]["heldout_loss"], 1e-5)


def test_first_step_is_adamw(tmp_path: Path) -> None:
    """With one step from zero moments AdamW moves every weight by the rate times the gradient's sign."""
    model, before = tiny(), weights(tiny())
    train(model, patterns(4), settings(tokens=1, warmup=0, clip=0, betas=(0.9, 0.999)), folder=tmp_path)
    reference = tiny()
    next_token(reference, {"input_ids": patterns(4)}).backward()
    for name, parameter in reference.named_parameters():
        clear = parameter.grad.abs() > 1e-5
        moved = (model.state_dict()[name] - before[name])[clear]
        assert torch.allclose(moved, -1e-2 * parameter.grad[clear].sign(), rtol=2e-3), name


def test_steps_are_adamws_own(tmp_path: Path) -> None:
    """Three of them beside torch's loop, with moments that are not the usual ones."""
    chosen = settings(tokens=3 * STEP, warmup=0, clip=0, betas=(0.5, 0.6), schedule="constant", learning_rate=1e-3)
    model, reference = tiny(), tiny()
    train(model, patterns(), chosen, folder=tmp_path)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=(0.5, 0.6), weight_decay=0.0)
    for rows in order(12, 12, seed=0).split(4):
        optimizer.zero_grad()
        next_token(reference, {"input_ids": patterns()[rows]}).backward()
        optimizer.step()
    for name, value in reference.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-6), name


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_gradients_are_clipped(tmp_path: Path, clip: float) -> None:
    norms: list[float] = []

    def see(optimizer: Any, *_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))

    handle = register_optimizer_step_pre_hook(see)
    try:
        train(tiny(), patterns(), settings(clip=clip), folder=tmp_path)
    finally:
        handle.remove()
    assert len(norms) == 6
    assert max(norms) == pytest.approx(1e-3, rel=1e-3) if clip else min(norms) > 0.01


def test_held_out_loss_is_without_dropout(tmp_path: Path) -> None:
    model = tiny(dropout=0.5)
    result = train(model, patterns(), settings(), folder=tmp_path, heldout=patterns(3))
    expected = next_token(model.eval(), {"input_ids": patterns(3)}).item()
    assert result.losses[-1]["heldout_loss"] == pytest.approx(expected, rel=1e-5)
    dropped = next_token(model.train(), {"input_ids": patterns(3)}).item()
    assert dropped != pytest.approx(expected, rel=1e-4)


def test_accumulation_equals_the_big_batch(tmp_path: Path) -> None:
    ends = []
    for micro in (1, 2, 4):
        model = tiny()
        train(model, patterns(), settings(micro_batch=micro, learning_rate=1e-3), folder=tmp_path / str(micro))
        ends.append(weights(model))
    for name in ends[0]:
        assert torch.allclose(ends[0][name], ends[2][name], atol=1e-6), name
        assert torch.allclose(ends[1][name], ends[2][name], atol=1e-6), name


def test_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, recomputed = tiny(), tiny()
    seen: list[bool] = []

    def spy(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        seen.append(model.is_activation_checkpointing)
        return next_token(model, batch)

    train(plain, patterns(), settings(), folder=tmp_path / "a", loss=spy)
    train(recomputed, patterns(), settings(checkpointing=True), folder=tmp_path / "b", loss=spy)
    assert seen == [False] * 12 + [True] * 12
    assert same(weights(plain), weights(recomputed))
    assert not recomputed.is_activation_checkpointing


# --- tokens, order, schedule


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (STEP, 1), (STEP + 1, 2), (7 * STEP, 7)])
def test_tokens_are_counted_exactly(tokens: int, steps: int, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def spy(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        seen.append(batch["input_ids"])
        return next_token(model, batch)

    result = train(tiny(), patterns(), settings(tokens=tokens), folder=tmp_path, loss=spy)
    assert (result.steps, result.tokens, result.stopped) == (steps, steps * STEP, None)
    assert sum(batch.numel() for batch in seen) == result.tokens
    assert result.losses[-1]["tokens"] == result.tokens
    expected = patterns()[order(12, steps * 4, seed=0)]
    assert torch.equal(torch.cat(seen), expected)


def test_order_shows_every_block_before_any_again() -> None:
    long = order(5, 15, seed=3)
    assert all(sorted(part.tolist()) == list(range(5)) for part in long.split(5))
    assert torch.equal(order(5, 7, seed=3), long[:7])
    assert not torch.equal(long[:5], long[5:10])
    assert not torch.equal(order(5, 15, seed=4), long)


def test_recorded_rates_are_the_ones_used(tmp_path: Path) -> None:
    chosen = settings(schedule="linear", warmup=0.34)
    result = train(tiny(), patterns(), chosen, folder=tmp_path)
    assert [x["learning_rate"] for x in result.losses] == pytest.approx([1e-2 * rate(chosen, i, 6) for i in range(6)])


def test_two_processes_equal_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch; from pathlib import Path; from regrow.engines.train import train; from training import *\n"
        "model, folder = tiny(), Path(sys.argv[1])\n"
        "train(model, patterns(), settings(micro_batch=1, learning_rate=1e-3), folder=folder, heldout=patterns(3))\n"
        "if os.environ['RANK'] == '0': torch.save(model.state_dict(), folder / 'end.pt')\n"
    )
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        script,
        tmp_path / "two",
    ]
    done = subprocess.run([str(part) for part in launch], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    model = tiny()
    one = train(model, patterns(), settings(learning_rate=1e-3), folder=tmp_path / "one", heldout=patterns(3))
    two = torch.load(tmp_path / "two/end.pt")
    for name, value in model.state_dict().items():
        assert torch.allclose(value, two[name], atol=1e-6), name
    records = [json.loads(line) for line in (tmp_path / "two/train.jsonl").read_text().splitlines()]
    assert [x["loss"] for x in records] == pytest.approx([x["loss"] for x in one.losses], abs=1e-5)


# --- records


def test_records(tmp_path: Path) -> None:
    """A record averages the steps since the last; saves and evaluations force one."""

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        return next_token(model, batch), {"two": 2.0}

    chosen = settings(tokens=8 * STEP, log_every=100, save_every=5, evaluate_every=4)
    result = train(tiny(), patterns(), chosen, folder=tmp_path, loss=loss, heldout=patterns(5, seed=1))
    assert [x["step"] for x in result.losses] == [4, 5, 8]
    assert ["heldout_loss" in x for x in result.losses] == [True, False, True]
    assert all(x["two"] == 2.0 for x in result.losses)
    assert [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()] == list(result.losses)
    every = train(tiny(), patterns(), replace(chosen, log_every=1), folder=tmp_path / "b", loss=loss)
    assert result.losses[0]["loss"] == pytest.approx(sum(x["loss"] for x in every.losses[:4]) / 4)


def test_progress_and_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[int, int, str]] = []
    train(tiny(), patterns(), settings(log_every=2), folder=tmp_path, progress=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(i * STEP, 6 * STEP) for i in range(1, 7)]
    assert all(call[2].startswith("loss ") for call in calls)
    assert capfd.readouterr() == ("", "")


def test_the_model_comes_back_as_it_was(tmp_path: Path) -> None:
    model = tiny()
    model.config.use_cache = True
    assert not model.training
    train(model, patterns(), settings(autocast="bf16", checkpointing=True, tokens=1), folder=tmp_path)
    assert not model.training
    assert model.config.use_cache is True
    assert "forward" not in model.__dict__
    fresh = tiny()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(patterns()).logits, fresh(patterns()).logits), "no autocast may be left behind"


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tmp_path: Path) -> None:
    dtypes: set[torch.dtype] = set()
    model = tiny()
    mlp = model.model.layers[0].mlp
    handle = mlp.register_forward_hook(lambda *call: dtypes.add(call[2].dtype))
    train(model, patterns(), settings(autocast="bf16", tokens=1), folder=tmp_path)
    handle.remove()
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# --- what is trained


def test_groups_of_their_own(tmp_path: Path) -> None:
    """One group climbs (maximize), one descends, the rest stays."""
    model, before = tiny(), weights(tiny())
    up, down = model.model.norm.weight, model.lm_head.weight
    goal = Objective(next_token, [{"params": [down]}, {"params": [up], "maximize": True, "lr": 1e-3}])
    train(model, patterns(4), settings(tokens=1, warmup=0), folder=tmp_path, loss=goal)
    reference = tiny()
    next_token(reference, {"input_ids": patterns(4)}).backward()
    moved = {name: value - before[name] for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert set(moved) == {"model.norm.weight", "lm_head.weight"}
    assert (moved["model.norm.weight"] * reference.model.norm.weight.grad).sum() > 0
    assert (moved["lm_head.weight"] * reference.lm_head.weight.grad).sum() < 0
    assert moved["model.norm.weight"].abs().max() == pytest.approx(1e-3, rel=0.01)


def test_weight_decay_spares_vectors(tmp_path: Path) -> None:
    def flat(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return 0.0 * next_token(model, batch)

    model, before = tiny(), weights(tiny())
    chosen = settings(tokens=1, warmup=0, weight_decay=0.5)
    train(model, patterns(), chosen, folder=tmp_path, loss=flat)
    for name, value in model.state_dict().items():
        expected = before[name] * (1 - 1e-2 * 0.5) if value.ndim > 1 else before[name]
        assert torch.allclose(value, expected), name


def test_adapters_alone_are_trained_and_saved(tmp_path: Path) -> None:
    model = add_adapters(tiny(), rank=2)
    before = weights(model)
    train(model, patterns(), settings(), folder=tmp_path)
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    saved = {path.name for path in newest(tmp_path).iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved


# --- what goes wrong


def fault(at: int, kind: str) -> Any:
    """A loss that is fine until optimiser step `at` (from 0)."""
    calls = [0]

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        value = next_token(model, batch)
        calls[0] += 1
        if (calls[0] - 1) // 2 < at:
            return value
        return {"nan": value * torch.nan, "inf": value / 0.0, "grad": (value - value.detach()).sqrt() + 1}[kind]

    return loss


@pytest.mark.parametrize(
    ("kind", "what"), [("nan", "the loss is nan"), ("inf", "the loss is inf"), ("grad", "gradient")]
)
def test_not_finite_stops_before_the_weights_are_spoilt(kind: str, what: str, tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(BrokenModel, match=rf"step 5 of 6 \(320 tokens\): .*{what}") as caught:
        train(model, patterns(), settings(), folder=tmp_path, loss=fault(4, kind))
    assert f"the last good checkpoint is {tmp_path / 'checkpoint-3'};" in str(caught.value)
    assert newest(tmp_path) == tmp_path / "checkpoint-3"
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not model.training


def test_one_that_broke_is_gone_on_with(tmp_path: Path) -> None:
    """Once the loss is sound: from the last good checkpoint, as if nothing had happened."""
    with pytest.raises(BrokenModel):
        train(tiny(), patterns(), settings(), folder=tmp_path / "torn", loss=fault(4, "nan"))
    ends, sound = [], fault(1000, "nan")
    for folder in ("torn", "whole"):
        model, calls = tiny(), [0]

        def loss(model: nn.Module, batch: Mapping[str, Tensor], calls: list[int] = calls) -> Tensor:
            calls[0] += 1
            return sound(model, batch)

        result = train(model, patterns(), settings(), folder=tmp_path / folder, loss=loss)
        ends.append((weights(model), result.losses, calls[0]))
    assert [calls for _, _, calls in ends] == [2 * 3, 2 * 6]
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("kind", ["nan", "inf", "grad"])
def test_steps_that_may_be_left_out_are_counted(kind: str, tmp_path: Path) -> None:
    """Weights are where the last good step left them, and one step too many ends the run."""
    sound = tiny()
    train(sound, patterns(), settings(until=2 * STEP), folder=tmp_path / "sound", loss=fault(1000, kind))
    model = tiny()
    result = train(model, patterns(), settings(skip=4), folder=tmp_path / "skips", loss=fault(2, kind))
    assert same(weights(model), weights(sound))
    assert [row.get("skipped", 0) for row in result.losses] == [0, 0, 1, 2, 3, 4]
    assert all("loss" not in row for row in result.losses[2:])
    with pytest.raises(BrokenModel, match="training broke in step 6 of 6"):
        train(tiny(), patterns(), settings(skip=3), folder=tmp_path / "breaks", loss=fault(2, kind))


def test_not_finite_before_any_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BrokenModel, match="no checkpoint had been written yet"):
        train(tiny(), patterns(), settings(), folder=tmp_path, loss=fault(0, "nan"))


def test_divergence_stops_before_the_checkpoint(tmp_path: Path) -> None:
    calls = [0]

    def rising(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        calls[0] += 1
        return next_token(model, batch) + (4.0 if calls[0] > 10 else 0.0)

    with pytest.raises(BrokenModel, match=r"step 6 of 6 .*the loss rose from \d.\d+ to \d.\d+"):
        train(tiny(), patterns(), settings(), folder=tmp_path, loss=rising)
    assert newest(tmp_path) == tmp_path / "checkpoint-3"
    calls[0] = 0
    train(tiny(), patterns(), settings(divergence=math.inf), folder=tmp_path / "b", loss=rising)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda model: model.requires_grad_(False), "no weight requires a gradient"),
        (lambda model: model.to(torch.bfloat16), "weights to train in bfloat16"),
    ],
)
def test_nothing_fit_to_train(spoil: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=match):
        train(spoil(tiny()), patterns(), settings(), folder=tmp_path)


def test_foreign_tensors_are_refused(tmp_path: Path) -> None:
    goal = Objective(next_token, [{"params": [nn.Parameter(torch.zeros(3))]}])
    with pytest.raises(SettingsError, match="not a trainable parameter of the model"):
        train(tiny(), patterns(), settings(), folder=tmp_path, loss=goal)


def test_processes_must_fit_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(SettingsError, match="3 processes of micro_batch = 2 do not divide batch = 4"):
        train(tiny(), patterns(), settings(), folder=tmp_path, resume=False)
    assert (tmp_path / "checkpoint-3").exists(), "a refused call deletes nothing"


@pytest.mark.parametrize("blocks", [torch.zeros(0, T).long(), torch.zeros(3, 1).long(), torch.zeros(T).long()])
def test_no_text(blocks: Tensor, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="blocks of shape"):
        train(tiny(), blocks, settings(), folder=tmp_path)
    with pytest.raises(TextError, match="blocks of shape"):
        train(tiny(), patterns(), settings(), folder=tmp_path, heldout=blocks)
