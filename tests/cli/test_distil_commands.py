"""`regrow recover` from a teacher: what learns, what is compared, when it stops, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt import FEW, Command, Refused
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from models import difference
from regrow import door, prepare
from regrow.cache import cache_dir
from regrow.cli.run import laid
from regrow.engines.bind import Subject
from regrow.engines.checkpoint import logits, probe
from regrow.engines.resume import newest, open_run
from regrow.errors import SettingsError
from regrow.recipe_files import dump, find_recipe, read_recipe, read_yaml
from regrow.recovery import DROPOUT, RATES, Recover
from regrow.settings import Recipe, parse
from regrow.stages.export import export

MIXED = ("--set", "recover.mixture={demo:squad: 2, demo:coqa: 1}")
RELATIONS = tuple(
    part
    for key in ("likeness=relations", "states=[1]", "likeness_options={heads: 5}")
    for part in ("--set", f"recover.distil.{key}")
)

BARE = ("--text", "none", "--set", "evaluate.speed=false", "--set", "evaluate.samples=[]")
SMALL = ("--adapter", "full", "--set", "recover.block=16", "--set", "recover.batch=4",
         "--set", "recover.evaluate_every=3840", *BARE)  # fmt: skip
"""Steps of 64 tokens, and nothing measured; a checkpoint after 25."""
SIXTY = ("--tokens", 60 * 64, *SMALL)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are continued by other tests."""
    monkeypatch.setattr("regrow.run.write_samples", lambda *seen: ["" for _ in seen[2]])


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def curve(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "report.json").read_text(encoding="utf-8"))["training"]
    return found


def test_norms_and_what_was_cut(regrow: Command, sprout_dir: Path, cut: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    how = ("--adapter", "cut", "--learning-rate", 1e-2, "--teacher", sprout_dir, "--loss", "reverse_kl")
    done = regrow("recover", cut, *how, *FEW, "--out", out)
    assert done.code == 0, done.err
    before, after = weights(cut), weights(out)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in moved if "norm" not in name} == {"gate_proj", "up_proj", "down_proj"}
    assert any("norm" in name for name in moved)


def test_states_are_on_the_record(regrow: Command, sprout_dir: Path, cut: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    how = ("--adapter", "lora", "--teacher", sprout_dir, "--set", "recover.distil.states=[0,1,4]")
    done = regrow("recover", cut, *how, "--set", "recover.distil.text=0.5", *FEW, "--out", out)
    assert done.code == 0, done.err
    assert {"loss", "divergence", "states", "next_token", "heldout_loss"} <= curve(out)[-1].keys()


def test_what_compares_states_is_not_written(
    regrow: Command, sprout_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student with fewer channels is compared through a projection, which is no part of it."""
    thin, out, seen = tmp_path / "thin", tmp_path / "out", []
    asked = ("--keep", "80%", "--axes", "channel", "--criterion", "magnitude", "--divisors", "channel=16")
    assert regrow("prune", sprout_dir, *asked, *BARE[:2], "--no-speed", "--out", thin).code == 0

    def spied(subject: Subject, *rest: Any) -> None:
        ids = probe(subject.anatomy.sizes["V"])
        seen.extend([ids, logits(subject.model, ids)])
        export(subject, *rest)

    monkeypatch.setattr("regrow.run.export", spied)
    how = ("--teacher", sprout_dir, "--set", "recover.distil.states=[0,1]", "--learning-rate", 1e-3)
    done = regrow("recover", thin, *how, *SMALL, "--tokens", 256, "--out", out)
    assert done.code == 0, done.err
    assert curve(out)[-1]["states"] > 0
    before, after = weights(thin), weights(out)
    assert {name: value.shape for name, value in after.items()} == {name: x.shape for name, x in before.items()}
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert (out / "config.json").read_text() == (thin / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert difference(logits(loaded, seen[0]), seen[1]) < 1e-5


def test_it_stops_when_nothing_is_gained(regrow: Command, sprout_dir: Path, cut: Path, tmp_path: Path) -> None:
    """At an absurd rate held-out loss rises at once."""
    out = tmp_path / "out"
    how = ("--adapter", "full", "--learning-rate", 0.02, "--teacher", sprout_dir, "--set", "recover.warmup=0")
    early = ("--set", "recover.evaluate_every=256", "--set", "recover.patience=2")
    done = regrow("recover", cut, *how, *early, *FEW, "--out", out)
    assert done.code == 0, done.err
    held = [x["heldout_loss"] for x in curve(out) if "heldout_loss" in x]
    assert len(held) < 8
    assert min(held) == held[-3]
    assert "not in 2 evaluations since" in done.out


def test_a_smaller_teacher_is_warned_of(regrow: Command, sprout_dir: Path, cut: Path, tmp_path: Path) -> None:
    for student, teacher, said in ((sprout_dir, cut, True), (cut, sprout_dir, False)):
        done = regrow("recover", student, "--teacher", teacher, *FEW, "--out", tmp_path / student.name)
        assert done.code == 0, done.err
        assert done.err.count("warning: teacher") == said == done.err.count("little is learnt from one that knows less")


def test_a_smaller_teacher_of_what_is_cut(regrow: Command, sprout_dir: Path, cut: Path, tmp_path: Path) -> None:
    """Known once it is known what stays: 80 % of the layers' weights are more than the teacher's 70 %."""
    for keep, said in (("80%", True), ("60%", False)):
        flags = ("--set", f"keep={keep}", "--set", "axes=[neuron]", "--set", "criterion=magnitude")
        teacher = ("--teacher", cut, "--adapter", "lora")
        done = regrow("recover", sprout_dir, *flags, *teacher, *FEW, "--out", tmp_path / keep[:2])
        assert done.code == 0, done.err
        assert done.err.count("little is learnt from one that knows less") == said


def test_one_that_is_left_is_gone_on_with(regrow: Command, sprout_dir: Path, cut: Path, tmp_path: Path) -> None:
    """As if it had not been left; then its checkpoints go."""
    how = ("--adapter", "full", "--learning-rate", 1e-3, "--teacher", sprout_dir, *FEW)
    assert regrow("recover", cut, *how, "--out", tmp_path / "whole").code == 0
    for until in (512, 1024):
        done = regrow("recover", cut, *how, "--set", f"recover.until={until}", "--out", tmp_path / str(until))
        assert done.code == 0, done.err
        assert f"{until:,} tokens were seen" in done.out
        report = json.loads((tmp_path / str(until) / "report.json").read_text(encoding="utf-8"))
        assert report["stages"]["recover"]["tokens"] == until
        assert curve(tmp_path / str(until))[-1]["tokens"] == until
    assert list(cache_dir("recover").glob("*/checkpoint-*")), "still there"
    assert regrow("recover", cut, *how, "--out", tmp_path / "rest").code == 0
    whole, rest = weights(tmp_path / "whole"), weights(tmp_path / "rest")
    assert all(torch.equal(whole[name], rest[name]) for name in whole)
    assert not list(cache_dir("recover").glob("*/checkpoint-*"))


def killed_at_a_checkpoint(command: list[str], cache: Path) -> Path:
    """Run a command in a process of its own, and kill it once a checkpoint is whole; the checkpoint."""
    own = {**os.environ, "REGROW_CACHE": str(cache), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "regrow", *command], env=own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not (whole := list(cache.glob("recover/*/checkpoint-*/complete"))):
            assert process.poll() is None, "it ended before"
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    return whole[0].parent


def test_one_that_is_killed_is_gone_on_with(
    regrow: Command, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word, in the middle of a training; the same command goes on, to the byte."""
    asked = ["recover", str(cut), "--learning-rate", "1e-3", *map(str, SIXTY), "--out"]
    assert regrow(*asked, tmp_path / "whole").code == 0
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "cache"))
    left = killed_at_a_checkpoint([*asked, str(tmp_path / "rest")], tmp_path / "cache")
    assert not (tmp_path / "rest").exists()
    began: list[Path | None] = []
    monkeypatch.setattr("regrow.engines.train.open_run", lambda *a, **k: began.append(open_run(*a, **k)) or began[-1])
    assert regrow(*asked, tmp_path / "rest").code == 0
    assert began == [left]
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("rest", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_one_that_breaks_names_its_last_good_checkpoint(
    refused: Refused, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At an absurd rate, reached after the first checkpoint: nothing is written but what it names."""
    monkeypatch.setattr("regrow.engines.loop.rate", lambda _, step, __: 1.0 if step < 25 else 1e6)
    how = ("--learning-rate", 1e-3, *SIXTY)
    done = refused("recover", cut, *how, "--out", tmp_path / "out", says=("training broke in step",), code=1)
    named = re.search(r"the last good checkpoint is (\S+);", done.err)
    assert named is not None
    assert (Path(named[1]) / "complete").exists()
    assert newest(Path(named[1]).parent) == Path(named[1])
    assert not (tmp_path / "out").exists()


class Told(TrainerCallback):  # type: ignore[misc]
    """Writes where TensorBoard would."""

    def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
        folder = Path(args.output_dir, "runs", "now")
        folder.mkdir(parents=True)
        (folder / "events").write_text("told", encoding="utf-8")


def test_what_trackers_were_told_is_kept(
    regrow: Command, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Told)
    done = regrow("recover", cut, "--set", "recover.report_to=[tensorboard]", *FEW, "--out", out)
    assert done.code == 0, done.err
    assert (out / "runs/now/events").read_text(encoding="utf-8") == "told"
    assert [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()] == curve(out)


def test_trackers_that_cannot_be(refused: Refused, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("it requires a package")

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", missing)
    asked = ("recover", cut, *FEW, "--out", tmp_path / "out", "--set")
    refused(*asked, "recover.report_to=[tensorbord]", says=("unknown tracker 'tensorbord'", "tensorboard"))
    refused(*asked, "recover.report_to=[tensorboard]", says=("tensorboard, which cannot be used", "install or"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--loss", "foward-kl"), ("unknown loss 'foward-kl'", "forward-kl")),
        (("--set", "recover.distil.options={heat: 2}"), ("unknown option 'heat'", "temperature")),
        (("--set", "recover.distil.options={temperature: 0}"), ("option temperature=0", "more than 0")),
        (("--loss", "jsd", "--set", "recover.distil.options={beta: 1.5}"), ("option beta=1.5", "0 to 1")),
        (("--set", "recover.distil.likeness=cosinus"), ("unknown loss of states 'cosinus'", "cosine")),
        (("--set", "recover.distil.states=[9]"), ("states at place 9", "to 6")),
        (RELATIONS, ("5 heads of relations", "divisors of")),
        (("--device", "cuda:1"), ("training on cuda:1", "CUDA_VISIBLE_DEVICES=1")),
        (("--set", "recover.distil.heat=2"), ("recover.distil.heat", "recover.distil.states")),
    ],
)
def test_what_is_refused(
    refused: Refused, sprout_dir: Path, cut: Path, tmp_path: Path, flags: tuple[str, ...], says: tuple[str, ...]
) -> None:
    refused("recover", cut, "--teacher", sprout_dir, *FEW, *flags, "--out", tmp_path / "out", says=says)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--loss", "reverse-kl"), ("recover.loss = reverse-kl without a teacher", "name the teacher")),
        (("--loss", "forward-kl"), ("recover.loss = forward-kl without a teacher",)),
        (("--set", "recover.distil.on_policy=0.5"), ("recover.distil.on_policy = 0.5 without a teacher", "base")),
        (("--set", "recover.distil={teacher_tokens: 9, cache: 256}"), ("teacher_tokens = 9, recover.distil.cache =",)),
        (("--adapter", "full", "--rank", 16), ("recover.rank = 16 of adapters", "recover.method = full has none")),
        (("--adapter", "full", "--rank", 8), ("recover.rank = 8 of adapters",)),
        (("--adapter", "cut", "--set", "recover.dropout=0.1"), ("recover.dropout = 0.1 of adapters", "cut has none")),
        (("--adapter", "ast", "--alpha", 4), ("recover.alpha = 4.0 of adapters", "leave it out")),
        (("--train", "demo", *MIXED), ("recover.text = demo beside recover.mixture",)),
        (("--train", "demo:drop", *MIXED), ("recover.text = demo:drop beside recover.mixture", "one of them")),
        ((*MIXED, "--set", "recover.excess=positive"), ("recover.excess = positive of weights", "balance=dynamic")),
        (("--set", "recover.balance_every=512"), ("recover.balance_every = 512 of weights",)),
    ],
)
def test_words_that_nobody_would_read(
    refused: Refused, sprout_dir: Path, tmp_path: Path, flags: tuple[Any, ...], says: tuple[str, ...]
) -> None:
    refused("recover", sprout_dir, *flags, *FEW, "--out", tmp_path / "out", says=says)


def test_words_that_a_recipe_would_have_read() -> None:
    """Of a teacher who was taken away; those of adapters go with the method that had them."""

    def asked(name: str, *sets: str) -> Recover:
        found = parse(laid(read_recipe(find_recipe(name)), {}, sets))
        prepare.check_words(found)
        again = parse(read_yaml(dump(found)))
        prepare.check_words(again)
        assert found.recover is not None
        return found.recover

    for name in ("gkd", "okd", "plad"):
        with pytest.raises(SettingsError, match=r"without a teacher.*\n.*\n.*recover\.distil=\{\}"):
            asked(name, "recover.teacher=null")
        asked(name, "recover.teacher=null", "recover.distil={}", "recover.loss=forward-kl")
    assert asked("minitron", "recover.teacher=null").loss == "forward-kl"
    for name in ("llm-pruner", "spp"):
        for method in ("full", "ast"):
            assert not {"rank", "alpha", "dropout"} & asked(name, f"recover.method={method}").model_fields_set
            with pytest.raises(SettingsError, match=r"recover\.rank = 3 of adapters"):
                asked(name, f"recover.method={method}", "recover.rank=3")
        assert asked(name, "recover.method=lora-masked").rank == asked(name).rank
    own = asked("llm-pruner").learning_rate
    assert own not in (RATES["full"], RATES["ia3"])
    for method in ("full", "ia3"):
        assert asked("llm-pruner", f"recover.method={method}").learning_rate == RATES[method]
        named = asked("llm-pruner", f"recover.method={method}", f"recover.learning_rate={own}")
        assert named.learning_rate == own, "said, though it is the recipe's"
    assert asked("llm-pruner", "recover.method=lora").learning_rate == own
    assert asked("spp", "recover.method=lora-masked").dropout == DROPOUT


def test_what_python_lays_over_a_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same as at the prompt."""
    seen: list[Recipe] = []
    monkeypatch.setattr(door, "run", lambda recipe, *_, **__: seen.append(recipe))
    door.prune("demo", tmp_path, recipe="llm-pruner", recover={"method": "full"})
    assert seen[0].recover is not None
    assert "rank" not in seen[0].recover.model_fields_set


def test_only_what_was_cut_of_a_model_that_was_not(refused: Refused, sprout_dir: Path, tmp_path: Path) -> None:
    refused("recover", sprout_dir, "--adapter", "cut", *FEW, "--out", tmp_path / "out", says=("no matrix is smaller",))
    layers = ("--set", "keep=80%", "--set", "axes=[layer]", "--set", "criterion=magnitude")
    asked = ("recover", sprout_dir, "--adapter", "cut", *layers, *FEW, "--out", tmp_path / "out")
    refused(*asked, says=("the cut makes no matrix smaller", "a cut of widths"))


def test_relations_of_what_a_cut_leaves(refused: Refused, sprout_dir: Path, tmp_path: Path) -> None:
    """Known from the plan: nothing is cut or trained for it."""
    teaching = ("--teacher", "base", "--set", "keep=80%", "--set", "axes=[neuron]", "--set", "criterion=magnitude")
    asked = ("recover", sprout_dir, *teaching, *RELATIONS, *FEW, "--out", tmp_path / "out")
    refused(*asked, says=("5 heads of relations", "divisors of"))
