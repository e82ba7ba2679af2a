"""Settings are refused when they are set, and schedules begin and end where they say."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
from training import settings

from regrow.engines.train_settings import SCHEDULES, rate
from regrow.errors import InputError, SettingsError


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_ends(schedule: Any) -> None:
    chosen = settings(schedule=schedule, warmup=0.1, floor=0.1)
    curve = [rate(chosen, step, 100) for step in range(101)]
    assert curve[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert curve[10] == max(curve) == 1.0
    assert curve[100] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert all(a >= b for a, b in pairwise(curve[10:]))


def test_schedule_by_hand() -> None:
    assert rate(settings(schedule="cosine", warmup=0), 50, 100) == pytest.approx(0.5)
    assert rate(settings(schedule="linear", warmup=0), 25, 100) == pytest.approx(0.75)
    assert rate(settings(schedule="wsd", warmup=0), 80, 100) == pytest.approx(1.0)
    assert rate(settings(schedule="wsd", warmup=0), 90, 100) == pytest.approx(0.5)
    assert rate(settings(warmup=0.9), 1, 1) == 1.0, "one step of warm-up and nothing after"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tokens": 0}, "tokens = 0"),
        ({"micro_batch": 3}, "micro_batch = 3 does not divide batch = 4"),
        ({"schedule": "exponential"}, "schedule = 'exponential'\n  allowed: cosine, linear, constant, wsd"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"warmup": 1.0}, "warmup"),
        ({"floor": 1.1}, "floor"),
        ({"clip": -1.0}, "clip"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"seed": -1}, "seed"),
        ({"autocast": "fp16"}, "autocast"),
        ({"divergence": 0.0}, "divergence"),
        ({"minutes": 0.0}, "minutes"),
        ({"save_every": 0}, "save_every"),
    ],
)
def test_bad_settings(change: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        settings(**change)


def test_bad_input_exits_with_two() -> None:
    with pytest.raises(InputError) as caught:
        settings(tokens=0)
    assert caught.value.exit_code == 2


def test_no_torch_is_needed() -> None:
    code = "import sys, regrow.engines.train_settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
