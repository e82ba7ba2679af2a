"""`regrow recover` from a teacher: what learns, what is compared, when it stops, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt import FEW, Command, Refused
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from regrow import door, prepare
from regrow.cache import cache_dir
from regrow.cli.run import laid
from regrow.errors import SettingsError
from regrow.recipe_files import dump, find_recipe, read_recipe, read_yaml
from regrow.recovery import Recover
from regrow.settings import Recipe, parse

RELATIONS = tuple(
    part
    for key in ("likeness=relations", "states=[1]", "likeness_options={heads: 5}")
    for part in ("--set", f"recover.distil.{key}")
)


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
        assert curve(tmp_path / str(until))[-1]["tokens"] == until
    assert list(cache_dir("recover").glob("*/checkpoint-*")), "still there"
    assert regrow("recover", cut, *how, "--out", tmp_path / "rest").code == 0
    whole, rest = weights(tmp_path / "whole"), weights(tmp_path / "rest")
    assert all(torch.equal(whole[name], rest[name]) for name in whole)
    assert not list(cache_dir("recover").glob("*/checkpoint-*"))


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
    refused(*asked, "recover.report_to=[tensorboard]", says=("tensorboard, which cannot be used", "install it"))


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
