"""One recovery by two processes: the first measures and writes, and the weights are those of one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prompt import Command
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")
ACCELERATE = ("accelerate.commands.launch", "--num_processes=2", "--multi_gpu", "--mixed_precision=no",
              "--num_machines=1", "--dynamo_backend=no")  # fmt: skip
MIXED = ("--set", "recover.mixture={demo:squad: 2, demo:coqa: 1}", "--set", "recover.balance=dynamic",
         "--set", "recover.balance_every=256")  # fmt: skip
SHORT = ("--adapter", "full", "--learning-rate", 1e-3, "--tokens", 768, "--text", "none", "--set", "recover.block=64",
         "--set", "recover.batch=4", "--set", "recover.micro_batch=2", "--set", "evaluate.samples=[]")  # fmt: skip


def narrow(regrow: Command, model: Path, out: Path) -> Path:
    done = regrow("prune", model, "--keep", "80%", "--axes", "neuron,channel", "--uniform", "--criterion", "magnitude",
                  "--divisors", "neuron=8,channel=16", "--text", "none", "--out", out, "--quiet")  # fmt: skip
    assert done.code == 0, done.err
    return out


@pytest.mark.parametrize(
    ("launcher", "how"),
    [(TORCHRUN, "online_rate=1e-3"), (ACCELERATE, "on_policy=0.5")],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_leave_what_one_leaves(
    regrow: Command, sprout_dir: Path, tmp_path: Path, launcher: tuple[str, ...], how: str
) -> None:
    """A teacher with other widths and adapters that learn, states compared through a projection: both are averaged over
    processes too; what the student writes itself; text of two domains, whose weights change after every step, and are
    the same in both."""
    cut = narrow(regrow, sprout_dir, tmp_path / "cut")
    states = ("--set", "recover.distil.states=[0,1]")
    also = ("--set", f"recover.distil.{how}")
    asked = ["recover", cut, "--teacher", sprout_dir, "--loss", "forward_kl", *states, *also, *MIXED, *SHORT]
    two, one = tmp_path / "two", tmp_path / "one"
    command = [sys.executable, "-m", *launcher, "-m", "regrow", *asked, "--out", two, "--json"]
    own = {**os.environ, "REGROW_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=400, check=False, env=own)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("{"))
    assert json.loads(line)["out"] == str(two), "the first process alone speaks"
    alone = regrow(*asked, "--out", one)
    assert alone.code == 0, alone.err
    ours, theirs = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    before = load_file(cut / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert any(not torch.equal(ours[name], before[name]) for name in ours), "it learnt something"
    for name, value in ours.items():
        assert torch.allclose(value.float(), theirs[name].float(), atol=1e-5), name
    reports = [json.loads((folder / "report.json").read_text()) for folder in (one, two)]
    assert [report["machine"]["processes"] for report in reports] == [1, 2]
    losses = [report["training"] for report in reports]
    for name in ("loss", "weight demo:squad"):
        assert [x[name] for x in losses[0]] == pytest.approx([x[name] for x in losses[1]], abs=1e-5)


def test_gates_learned_by_two_processes_are_those_of_one(regrow: Command, sprout_dir: Path, tmp_path: Path) -> None:
    """The same draw on both, gradients of gates and multipliers averaged, the same teachers."""
    changes = {"block": 32, "batch": 4, "micro_batch": 4, "lag": 1, "spacing": 0.002, "rise": 0.5, "tolerance": 1,
               "logits": 1, "learning_rate": 1e-4, "multiplier_rate": 0.1}  # fmt: skip
    sets = [word for name, value in changes.items() for word in ("--set", f"learn.{name}={value}")]
    exact = tmp_path / "exact"  # rounded to sixteen bits, values that are equal enough can end a step apart
    shutil.copytree(sprout_dir, exact)
    AutoModelForCausalLM.from_pretrained(sprout_dir, dtype=torch.float32).save_pretrained(exact)
    asked = ["learn", exact, "--keep", "80%", "--learn-tokens", 16 * 4 * 32, "--text", "none", *sets,
             "--set", "evaluate.samples=[]"]  # fmt: skip
    two, one = tmp_path / "two", tmp_path / "one"
    command = [sys.executable, "-m", *TORCHRUN, "-m", "regrow", *asked, "--out", two, "--json"]
    own = {**os.environ, "REGROW_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=400, check=False, env=own)
    assert done.returncode == 0, done.stderr
    alone = regrow(*asked, "--out", one)
    assert alone.code == 0, alone.err
    ours, theirs = (json.loads((folder / "report.json").read_text())["learning"] for folder in (one, two))
    for name in ("loss", "sparsity", "multiplier", "teacher"):
        assert [x[name] for x in ours] == pytest.approx([x[name] for x in theirs], abs=1e-5), name
    assert max(x["teacher"] for x in ours) > 0
    plans = [json.loads((folder / "plan.json").read_text())["layers"] for folder in (one, two)]
    assert plans[0] == plans[1]
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for name, value in first.items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, second[name], rtol=0, atol=1e-5), name


def test_a_device_for_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never run on GPUs here: what would be asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    from regrow.stages.load import pick_device

    assert pick_device("auto") == "cuda:1" == pick_device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert pick_device("auto") == "cuda"
