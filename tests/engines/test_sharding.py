"""Sharded models learn what whole ones learn: two processes without a GPU. Accelerate's own way needs GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from training import tiny

from regrow.engines import sharding
from regrow.engines.objective import Objective, next_token
from regrow.engines.sharding import shard_teacher, whole_again
from regrow.errors import SettingsError


def test_a_sharded_student_of_a_sharded_teacher_learns_the_same(tmp_path: Path) -> None:
    """Losses, held-out losses by domain and weights, however the models are spread, with head and embedding tied or
    not; and what comes back is a plain model."""
    out, script = tmp_path / "out.json", Path(__file__).with_name("sharded.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, out]
    done = subprocess.run([str(part) for part in launch], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert len(report) == 6
    for how, each in report.items():
        assert each["found"]["losses"] == pytest.approx(each["expected"]["losses"], abs=1e-5), how
        assert each["found"]["held"] == pytest.approx(each["expected"]["held"], abs=1e-5), how
        assert each["off"] < 1e-5 < 1e-2 < each["moved"], how
        assert each["logits"] < 1e-4, how
        assert each["plain"], how
        assert each["tied"] == how.endswith("True"), how


def accelerator(version: int = 2) -> Any:
    """What this house asks of an accelerator that was told of FSDP."""
    plugin = SimpleNamespace(reshard_after_forward=True, cpu_offload="offload", mixed_precision_policy="bf16")
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), is_fsdp2=version == 2)


def test_a_teacher_is_spread_by_the_policy_of_its_student(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(sharding, "shard", lambda model, **policy: calls.append((model, policy)))
    loss = SimpleNamespace(teacher="teacher")
    shard_teacher(Objective(next_token), accelerator())
    shard_teacher(Objective(loss), SimpleNamespace(state=SimpleNamespace()))  # type: ignore[arg-type]
    assert not calls
    shard_teacher(Objective(loss), accelerator())  # type: ignore[arg-type]
    policy = {"reshard_after_forward": True, "offload_policy": "offload", "mp_policy": "bf16"}
    assert calls == [("teacher", policy)]


def test_what_is_refused() -> None:
    with pytest.raises(SettingsError, match="fsdp_version: 2"):
        shard_teacher(Objective(next_token), accelerator(1))
    with pytest.raises(SettingsError, match="beside a sharded model"):
        shard_teacher(Objective(next_token, beside=nn.Linear(1, 1)), accelerator())


def test_a_model_that_is_not_sharded_stays_as_it_is() -> None:
    model = tiny()
    before = dict(model.named_parameters())
    with whole_again(model):
        model.model.norm.register_forward_hook(lambda *_: None)
    assert all(value is before[name] for name, value in model.named_parameters())
    assert len(model.model.norm._forward_hooks) == 1
    assert torch.is_tensor(model.lm_head.weight)
