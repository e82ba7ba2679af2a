"""A corrected teacher knows the text better, is the same after an interruption, and is not trained twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from training import Stop, patterns, pull_plug, same, settings, tiny, weights

from regrow.engines import chunks, correction
from regrow.engines.correction import correct, heldout_loss
from regrow.engines.packed import Packed
from regrow.engines.resume import newest
from regrow.errors import OutputError, SettingsError


def test_it_knows_the_text_better(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Frozen before and after; the second time the weights are read, to the bit."""
    teacher, again, text = tiny().requires_grad_(False), tiny().requires_grad_(False), Packed(patterns())
    how: dict[str, Any] = {"kept": tmp_path / "kept.safetensors", "heldout": Packed(patterns(4, seed=7))}
    found = correct(teacher, text, settings(tokens=20 * 64), folder=tmp_path / "a", **how)
    assert found.before is not None
    assert found.after is not None
    assert found.after < found.before - 0.05
    assert found.after == pytest.approx(heldout_loss(teacher, how["heldout"], 3), rel=1e-5)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    monkeypatch.setattr(correction, "train", None)
    assert correct(again, text, settings(tokens=20 * 64), folder=tmp_path / "a", **how) == found
    assert same(weights(teacher), weights(again))


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, again, text = tiny(), tiny(), Packed(patterns())
    correct(whole, text, settings(), folder=tmp_path / "whole", kept=tmp_path / "whole.safetensors")
    kept = tmp_path / "again.safetensors"
    with pytest.raises(Stop):
        correct(again, text, settings(), folder=tmp_path / "again", kept=kept, progress=pull_plug(4))
    assert not kept.exists()
    again = tiny()
    found = correct(again, text, settings(), folder=tmp_path / "again", kept=kept)
    assert found == (None, None)
    assert same(weights(whole), weights(again))


def test_a_corrected_teacher_is_whole_or_not_kept(tmp_path: Path) -> None:
    """A training that ends before its last token is no correction, whatever made it end."""
    kept = tmp_path / "kept.safetensors"
    with pytest.raises(SettingsError, match="a correction that may end early"):
        correct(tiny(), Packed(patterns()), settings(until=64), folder=tmp_path / "a", kept=kept)
    assert not kept.exists()


def test_no_room_for_what_was_learnt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(chunks, "save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        correct(tiny(), Packed(patterns()), settings(), folder=tmp_path / "a", kept=tmp_path / "kept.safetensors")
    assert not (tmp_path / "kept.safetensors").exists()
    assert newest(tmp_path / "a") is not None, "the same command goes on from here"


def test_the_held_out_loss_is_of_what_is_learnt() -> None:
    ids = patterns(5)
    learn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    with torch.no_grad():
        logs = tiny()(input_ids=ids).logits.log_softmax(-1)[:, :-1]  # (5, T - 1, V)
    each = -logs.gather(-1, ids[:, 1:, None])[..., 0][learn[:, 1:]]
    assert heldout_loss(tiny(), Packed(ids, learn), 2) == pytest.approx(each.mean().item(), rel=1e-5)
    assert heldout_loss(tiny(), None, 2) is None


def test_no_weights_in_16_bits(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="weights to train in bfloat16"):
        correct(tiny().bfloat16(), Packed(patterns()), settings(), folder=tmp_path, kept=tmp_path / "x.safetensors")
