"""Stopping and resuming: bit for bit as if nothing had happened, and never on the wrong run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training import STEP, Stop, patterns, pull_plug, same, settings, tiny, weights

from models import ids, make
from regrow.engines.adapters import add_adapters
from regrow.engines.resume import fingerprint, newest, open_run, weights_fingerprint
from regrow.engines.train import train
from regrow.errors import BrokenModel, OutputError, SettingsError


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("after", [2, 3, 4])
def test_resume_is_bit_exact(adapters: bool, after: int, tmp_path: Path) -> None:
    """Interrupted before, at and after the checkpoint of step 3 with dropout on: as if nothing had happened."""

    def make() -> nn.Module:
        return add_adapters(tiny(), rank=2, dropout=0.2) if adapters else tiny(dropout=0.2)

    whole, cut = make(), make()
    expected = train(whole, patterns(), settings(), folder=tmp_path / "whole", heldout=patterns(3))
    with pytest.raises(Stop):
        train(cut, patterns(), settings(), folder=tmp_path / "cut", heldout=patterns(3), progress=pull_plug(after))
    again = make()
    result = train(again, patterns(), settings(), folder=tmp_path / "cut", heldout=patterns(3))
    assert same(weights(whole), weights(again))
    assert result.losses == expected.losses
    assert (tmp_path / "cut/train.jsonl").read_text() == (tmp_path / "whole/train.jsonl").read_text()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_neox", "gemma2"])
def test_weights_come_back_in_every_layout(kind: str, tmp_path: Path) -> None:
    """Some families save their weights under names that they do not have in memory."""
    text, whole, again = ids(8, STEP // 4), make(kind), make(kind)
    wanted = settings(learning_rate=1e-3)
    train(whole, text, wanted, folder=tmp_path / "whole")
    with pytest.raises(Stop):
        train(make(kind), text, wanted, folder=tmp_path / "cut", progress=pull_plug(4))
    train(again, text, wanted, folder=tmp_path / "cut")
    assert same(weights(whole), weights(again))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(tiny(), patterns(), settings(), folder=tmp_path, progress=pull_plug(4))
    path = tmp_path / "checkpoint-3/model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj" in name)
    save_file({k: v for k, v in tensors.items() if k != name}, path, metadata={"format": "pt"})
    with pytest.raises(BrokenModel, match=name):
        train(tiny(), patterns(), settings(), folder=tmp_path)


def test_the_newest_is_the_one_of_the_most_steps(tmp_path: Path) -> None:
    for step in (75, 100, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "complete").touch()
    (tmp_path / "checkpoint-200").mkdir()
    assert newest(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("text", ["", '{"tokens": 3', None])
def test_checkpoints_of_a_run_that_nobody_knows(tmp_path: Path, text: str | None) -> None:
    with pytest.raises(Stop):
        train(tiny(), patterns(), settings(), folder=tmp_path, progress=pull_plug(4))
    record = tmp_path / "run.json"
    record.unlink()
    if text is not None:
        record.write_text(text)
    with pytest.raises(SettingsError, match=r"run\.json, which says of which run, is missing or no JSON"):
        train(tiny(), patterns(), settings(), folder=tmp_path)
    assert newest(tmp_path) is not None
    train(tiny(), patterns(), settings(), folder=tmp_path, resume=False)
    assert record.exists()


def test_dropout_was_on(tmp_path: Path) -> None:
    """The test above would be blind if every run drew the same noise."""
    ends = []
    for seed in (0, 1):
        model = tiny(dropout=0.2)
        train(model, patterns(1), settings(seed=seed), folder=tmp_path / str(seed))
        ends.append(weights(model))
    assert not same(*ends)


def test_resume_of_a_finished_run_trains_no_more(tmp_path: Path) -> None:
    model, again = tiny(), tiny()
    first = train(model, patterns(), settings(), folder=tmp_path)
    second = train(again, patterns(), settings(), folder=tmp_path, progress=pull_plug(0))
    assert same(weights(model), weights(again))
    assert (second.steps, second.losses) == (first.steps, first.losses)


def test_incomplete_checkpoints_do_not_count(tmp_path: Path) -> None:
    model, again = tiny(), tiny()
    train(model, patterns(), settings(), folder=tmp_path)
    (tmp_path / "checkpoint-6/complete").unlink()
    (tmp_path / "checkpoint-6/optimizer.pt").write_bytes(b"torn")
    assert newest(tmp_path) == tmp_path / "checkpoint-3"
    train(again, patterns(), settings(), folder=tmp_path)
    assert same(weights(model), weights(again))


def test_two_processes_clean_up_at_once(tmp_path: Path) -> None:
    """As they do when a run starts again after it was killed while it wrote."""
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        for step in range(3):
            torn = folder / f"checkpoint-{step}" / "inner"
            torn.mkdir(parents=True)
            for i in range(20):
                (torn / f"file{i}").write_text("x")
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda _, folder=folder: open_run(folder, {"a": 1}, resume=True), range(2)))
        assert found == [None, None]
        assert sorted(path.name for path in folder.iterdir()) == ["run.json"]


def test_starting_over(tmp_path: Path) -> None:
    train(tiny(), patterns(), settings(), folder=tmp_path)
    result = train(tiny(), patterns(), settings(tokens=STEP), folder=tmp_path, resume=False)
    assert result.steps == 1
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"learning_rate": 2e-2}, r"learning_rate: 0\.01 there, 0\.02 now"),
        ({"tokens": 9 * STEP}, "tokens: "),
    ],
)
def test_another_run_is_not_continued(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    train(tiny(), patterns(), settings(tokens=STEP), folder=tmp_path)
    with pytest.raises(SettingsError, match=match):
        train(tiny(), patterns(), settings(**{"tokens": STEP, **change}), folder=tmp_path)


def test_other_text_is_not_continued(tmp_path: Path) -> None:
    train(tiny(), patterns(), settings(), folder=tmp_path)
    with pytest.raises(SettingsError, match="blocks: "):
        train(tiny(), patterns(seed=1), settings(), folder=tmp_path)


def test_another_model_is_not_continued(tmp_path: Path) -> None:
    """Adapters trained on one cut model must not land on another of the same shape."""
    model = tiny()
    train(add_adapters(model, rank=2), patterns(), settings(tokens=STEP), folder=tmp_path)
    other = tiny()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(SettingsError, match="weights: "):
        train(add_adapters(other, rank=2), patterns(), settings(tokens=STEP), folder=tmp_path)


def test_a_resumed_run_may_run_otherwise(tmp_path: Path) -> None:
    """A smaller micro-batch after running out of memory: same steps, same text."""
    whole, again = tiny(), tiny()
    train(whole, patterns(), settings(micro_batch=4, learning_rate=1e-3), folder=tmp_path / "whole")
    chosen = settings(micro_batch=4, learning_rate=1e-3)
    with pytest.raises(Stop):
        train(tiny(), patterns(), chosen, folder=tmp_path / "cut", progress=pull_plug(4))
    train(again, patterns(), settings(micro_batch=1, learning_rate=1e-3), folder=tmp_path / "cut")
    for name, value in whole.state_dict().items():
        assert torch.allclose(value, again.state_dict()[name], atol=1e-6), name


def test_time_is_up(tmp_path: Path) -> None:
    result = train(tiny(), patterns(), settings(minutes=1e-9), folder=tmp_path, heldout=patterns(2))
    assert (result.steps, result.tokens) == (1, STEP)
    assert result.stopped == "1e-09 minutes were up after step 1 of 6"
    assert newest(tmp_path) == tmp_path / "checkpoint-1"
    assert "heldout_loss" in result.losses[-1]
    rest = train(tiny(), patterns(), settings(), folder=tmp_path)
    assert (rest.steps, rest.stopped) == (6, None)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        train(tiny(), patterns(), settings(), folder=tmp_path / "file")


def test_fingerprints_see_every_bit() -> None:
    model, blocks = tiny(), patterns()
    assert weights_fingerprint(model) == weights_fingerprint(tiny())
    assert fingerprint(blocks) == fingerprint(patterns())
    assert len({fingerprint(x) for x in (blocks, blocks[:6], blocks.int(), blocks.T, blocks.flip(0))}) == 5
    with torch.no_grad():
        weight = model.model.norm.weight
        weight[0] = torch.nextafter(weight[0], torch.tensor(2.0))
    assert weights_fingerprint(model) != weights_fingerprint(tiny())
    assert weights_fingerprint(tiny().bfloat16()) != weights_fingerprint(tiny())
