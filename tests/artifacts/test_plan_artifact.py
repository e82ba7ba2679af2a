"""A plan says what stays: its shape, its refusals, its way to disk and back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig

from regrow.artifacts.plan import LayerPlan, Plan
from regrow.artifacts.shape import Anatomy, LayerShape, Shape
from regrow.engines.bind import bind
from regrow.errors import SettingsError


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return bind(
        LlamaConfig(
            hidden_size=8,
            intermediate_size=5,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=2,
            vocab_size=9,
        )
    )


def plan(**changes: Any) -> Plan:
    layers = (LayerPlan(0, (0, 1), (0, 3), (0, 2, 4)), LayerPlan(2, (1,), (2, 3), (1,)))
    return replace(Plan((0, 1, 5), layers, True, {"budget": "50%"}), **changes)


def layer(**changes: Any) -> Plan:
    return plan(layers=(replace(plan().layers[0], **changes), plan().layers[1]))


def merging(*merged: tuple[int, int]) -> Plan:
    return replace(layer(merged=merged), merge="laco")


def test_shape_of_a_plan(anatomy: Anatomy) -> None:
    plan().check(anatomy)
    assert plan().shape() == Shape(3, (LayerShape(2, 1, 3), LayerShape(1, 2, 1)))
    assert layer(groups=(), heads=(), neurons=()).shape().layers[0] == LayerShape(0, 0, 0)


def test_everything_is_dense(anatomy: Anatomy) -> None:
    whole = Plan.everything(anatomy)
    whole.check(anatomy)
    assert whole.shape() == anatomy.dense


def test_a_branch_may_be_gone(anatomy: Anatomy) -> None:
    layer(groups=(), heads=()).check(anatomy)
    layer(neurons=()).check(anatomy)


REFUSED = {
    "no channels": plan(channels=()),
    "channel out of range": plan(channels=(0, 8)),
    "channel below zero": plan(channels=(-1, 0)),
    "channels unordered": plan(channels=(1, 0)),
    "channel twice": plan(channels=(1, 1)),
    "no layers": plan(layers=()),
    "layer out of range": plan(layers=(replace(plan().layers[0], index=3),)),
    "layers unordered": plan(layers=plan().layers[::-1]),
    "layer twice": plan(layers=plan().layers[:1] * 2),
    "group out of range": layer(groups=(0, 2)),
    "neurons unordered": layer(neurons=(2, 0)),
    "neuron out of range": layer(neurons=(5,)),
    "head out of range": layer(heads=(0, 4)),
    "uneven heads": layer(heads=(0, 1, 3)),
    "head of a group that is gone": layer(groups=(0,), heads=(0, 3)),
    "group without heads": layer(heads=(0, 1)),
    "heads without groups": layer(groups=()),
    "groups without any head": layer(heads=()),
    "merged in no known way": layer(merged=((0, 1),)),
    "merged into one that goes": merging((1, 2)),
    "merged away, though it stays": merging((0, 3)),
    "merged away twice": merging((0, 1), (0, 1)),
    "merged into itself": merging((0, 0)),
    "merged into another group": merging((0, 2)),
    "merged after it went": merging((0, 1), (1, 2)),
    "merged out of range": merging((3, 4)),
}


@pytest.mark.parametrize("bad", REFUSED.values(), ids=REFUSED.keys())
def test_a_plan_that_does_not_fit_is_refused(anatomy: Anatomy, bad: Plan) -> None:
    with pytest.raises(SettingsError, match="plan:"):
        bad.check(anatomy)


def test_heads_may_be_merged(anatomy: Anatomy) -> None:
    merging((0, 1), (3, 2)).check(anatomy)


def test_there_and_back() -> None:
    for made in (plan(), merging((0, 1), (3, 2))):
        assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_a_plan_from_before_heads_were_merged() -> None:
    data = plan().to_json()
    del data["merge"]
    for row in data["layers"]:
        del row["merged"]
    assert Plan.from_json(data) == plan()


BENT = {**plan().to_json(), "layers": [{**plan().to_json()["layers"][0], "merged": [[0]]}]}


@pytest.mark.parametrize(
    "data", [{}, {"layers": 5}, {"layers": [[1, 2]]}, {"layers": [{"index": 0}]}, {"layers": []}, BENT]
)
def test_what_is_no_plan(data: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"not a plan"):
        Plan.from_json(data)
