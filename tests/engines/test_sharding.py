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
from safetensors.torch import load_file
from sharded import corrected, llama, trained
from torch import nn
from training import tiny

from regrow.engines import sharding
from regrow.engines.objective import Objective, next_token
from regrow.engines.on_policy import OnPolicy, Policy
from regrow.engines.sharding import shard_teacher, whole_again
from regrow.errors import SettingsError


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave."""
    out, script = tmp_path_factory.mktemp("two"), Path(__file__).with_name("sharded.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, out]
    done = subprocess.run([str(part) for part in launch], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_a_sharded_student_of_a_sharded_teacher_learns_the_same(two: Path) -> None:
    """Losses, held-out losses by domain and weights, however the models are spread, with head and embedding tied or
    not; and what comes back is a plain model."""
    report = json.loads((two / "raw.json").read_text())
    assert len(report) == 6
    for how, each in report.items():
        assert each["found"]["losses"] == pytest.approx(each["expected"]["losses"], abs=1e-5), how
        assert each["found"]["held"] == pytest.approx(each["expected"]["held"], abs=1e-5), how
        assert each["off"] < 1e-5 < 1e-2 < each["moved"], how
        assert each["logits"] < 1e-4, how
        assert each["plain"], how
        assert each["tied"] == how.endswith("True"), how


@pytest.mark.parametrize("adapters", [False, True])
def test_the_same_by_way_of_accelerate(two: Path, tmp_path: Path, adapters: bool) -> None:
    """Interrupted and gone on with, weights of domains that change, a teacher; all weights, or adapters."""
    model, records = trained(tmp_path, micro_batch=2, adapters=adapters)
    found = torch.load(two / f"adapters-{adapters}" / "end.pt")
    state = model.state_dict()
    assert found["state"].keys() == state.keys()
    for name, value in state.items():
        assert torch.allclose(value, found["state"][name], atol=1e-6), name
    assert len(found["records"]) == len(records)
    for ours, theirs in zip(records, found["records"], strict=True):
        assert theirs == pytest.approx(ours, abs=1e-5)
    assert (two / f"adapters-{adapters}" / "checkpoint-6" / "pytorch_model_fsdp_0").is_dir(), "it was sharded"


def test_a_teacher_that_was_sharded_is_kept_as_it_ended(two: Path, tmp_path: Path) -> None:
    """The file holds what one process would have learnt, not what it began with."""
    teacher, kept = corrected(tmp_path, micro_batch=4)
    for name, value in load_file(kept).items():
        assert torch.equal(value, teacher.get_parameter(name)), name
    found, start = load_file(two / "teacher/kept.safetensors"), llama(16, 24, False, 0).state_dict()
    assert max((found[name] - value).abs().max().item() for name, value in start.items()) > 1e-3
    assert max((found[name] - value).abs().max().item() for name, value in teacher.state_dict().items()) < 1e-5


def accelerator(version: int = 2, saved: str = "SHARDED") -> Any:
    """What this house asks of an accelerator that was told of FSDP."""
    plugin = SimpleNamespace(
        reshard_after_forward=True,
        cpu_offload="offload",
        mixed_precision_policy="bf16",
        state_dict_type=f"StateDictType.{saved}_STATE_DICT",
    )
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
    with pytest.raises(SettingsError, match="whole weights"):
        shard_teacher(Objective(next_token), accelerator(saved="FULL"))
    with pytest.raises(SettingsError, match="beside a sharded model"):
        shard_teacher(Objective(next_token, beside=nn.Linear(1, 1)), accelerator())
    writes = OnPolicy(Objective(next_token), Policy(0.5, 0.5, 1.0, 10), seed=0)
    with pytest.raises(SettingsError, match="writes its own text"):
        shard_teacher(writes.objective, accelerator())


def test_a_model_that_is_not_sharded_stays_as_it_is() -> None:
    model = tiny()
    before = dict(model.named_parameters())
    with whole_again(model):
        model.model.norm.register_forward_hook(lambda *_: None)
    assert all(value is before[name] for name, value in model.named_parameters())
    assert len(model.model.norm._forward_hooks) == 1
    assert torch.is_tensor(model.lm_head.weight)
