"""Reports travel as JSON; retention is worked by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from regrow.artifacts.report import Measure, Report, errors_apart, retention
from regrow.errors import SettingsError


def accuracy(value: float, stderr: float = 0.02, chance: float = 0.25) -> Measure:
    return Measure(value, "share", "higher", stderr, 100, chance, {"limit": 100})


BEFORE = {
    "task/arc/acc_norm": replace(accuracy(0.45), each=(1.0, 0.0)),
    "task/arc/acc": accuracy(0.99),  # acc_norm is there, so this is not used
    "task/boolq/acc": accuracy(0.53, chance=0.5),  # 1.5 standard errors above chance: at chance
    "task/piqa/acc": accuracy(0.70, chance=0.5),
    "task/arc/gold_bits_per_byte": Measure(1.0, "bits/byte", "lower"),
    "task/piqa/gold_bits_per_byte": Measure(0.8, "bits/byte", "lower"),
    "text/x/perplexity": Measure(20.0, "perplexity", "lower"),
}
AFTER = {
    "task/arc/acc_norm": accuracy(0.35),
    "task/arc/acc": accuracy(0.10),
    "task/boolq/acc": accuracy(0.49, chance=0.5),
    "task/piqa/acc": accuracy(0.65, chance=0.5),
    "task/arc/gold_bits_per_byte": Measure(1.25, "bits/byte", "lower"),
    "task/piqa/gold_bits_per_byte": Measure(0.75, "bits/byte", "lower"),
    "text/x/perplexity": Measure(25.0, "perplexity", "lower"),
}


def test_retention_by_hand() -> None:
    found = retention(BEFORE, AFTER)
    assert found["raw"] == pytest.approx((0.35 + 0.49 + 0.65) / (0.45 + 0.53 + 0.70))
    assert found["above_chance"] == pytest.approx(((0.35 - 0.25) / (0.45 - 0.25) + 0.15 / 0.20) / 2)
    assert found["gold_bits"] == pytest.approx((1.0 + 0.8) / (1.25 + 0.75))
    assert (found["tasks"], found["tasks_above_chance"]) == (3, 2)


def test_a_task_at_chance_counts_only_as_raw() -> None:
    few = {k: v for k, v in BEFORE.items() if "boolq" in k}
    found = retention(few, AFTER)
    assert found["above_chance"] is None
    assert found["raw"] == pytest.approx(0.49 / 0.53)


def test_no_tasks_no_retention() -> None:
    text = {"text/x/perplexity": BEFORE["text/x/perplexity"]}
    found = retention(text, text)
    assert found == {"raw": None, "above_chance": None, "tasks": 0, "tasks_above_chance": 0, "gold_bits": None}


def test_a_task_without_a_chance_level_is_above_it() -> None:
    before = {"task/x/acc": Measure(0.5, "share", "higher")}
    after = {"task/x/acc": Measure(0.25, "share", "higher")}
    assert retention(before, after)["above_chance"] == 0.5


def test_a_task_measured_once_only_is_left_out() -> None:
    assert retention(BEFORE, {})["tasks"] == 0


def test_errors_apart_in_pairs_by_hand() -> None:
    before = Measure(3.0, "", "higher", stderr=9.0, each=(1.0, 3.0, 5.0))
    after = Measure(2.0, "", "higher", stderr=9.0, each=(0.0, 1.0, 5.0))  # changes -1, -2, 0: mean -1, deviation 1
    assert errors_apart(before, after) == pytest.approx(1 / (1 / 3**0.5))
    assert errors_apart(after, before) == errors_apart(before, after)


def test_errors_apart_without_pairs() -> None:
    one, other = Measure(3.0, "", "lower", stderr=0.3), Measure(4.0, "", "lower", stderr=0.4, each=(1.0, 2.0))
    assert errors_apart(one, other) == pytest.approx(2.0)
    counts = Measure(3, "", "lower"), Measure(4, "", "lower")
    assert errors_apart(*counts) == float("inf")
    assert errors_apart(counts[0], counts[0]) == 0


def report() -> Report:
    return Report(
        model={"id": "x", "licence": "mit"},
        made_by={"recipe": "prune", "seed": 0},
        shape={"before": {"channels": 2, "layers": [[1, 1, 3]]}, "after": {"channels": 2, "layers": [[1, 1, 2]]}},
        before=BEFORE,
        after=AFTER,
        samples=({"prompt": "a", "before": "b", "after": "c"},),
        machine={"cpu": "one"},
        notes=("n",),
        stages={"score": {"seconds": 1.5}},
        training=({"step": 1, "loss": 2.5},),
    )


def test_there_and_back() -> None:
    data = json.loads(json.dumps(report().to_json()))
    assert Report.from_json(data) == report()
    assert data["format"] == 1
    assert data["retention"]["tasks"] == 3


@pytest.mark.parametrize(
    "data", [{}, {"before": {}}, {"before": 5, "after": 5}, {"before": {"x": {"v": 1}}, "after": {}}]
)
def test_what_is_no_report(data: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="not a report"):
        Report.from_json(data)
