"""The drawings: well-formed, one row a layer, widths in proportion, and the cut marked where it was made."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from regrow.artifacts.plan import LayerPlan, Plan
from regrow.artifacts.shape import LayerShape, Shape
from regrow.page.curve import curve, path, ticks
from regrow.page.heat import COLUMNS, LEVELS, heat_map, maps
from regrow.page.layers import draw, layer_views
from regrow.page.svg import picture, tag


def rects(element: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [rect for rect in element.iter("rect") if rect.get("class") == kind]


def layer_rows(svg: str) -> list[ElementTree.Element]:
    return [g for g in ElementTree.fromstring(svg).iter("g") if (g.get("class") or "").startswith("layer")]


def dense(layers: int, groups: int = 4, heads: int = 2, neurons: int = 100) -> Shape:
    return Shape(64, (LayerShape(groups, heads, neurons),) * layers)


PLAN = Plan(  # of four layers with 2 groups of 2 heads and 8 neurons: 1 gone, 2 without attention, 3 without MLP
    tuple(range(48)),
    (
        LayerPlan(0, (1,), (2,), (0, 1, 2, 3, 4, 7)),
        LayerPlan(2, (), (), tuple(range(8))),
        LayerPlan(3, (0, 1), (0, 2), ()),
    ),
)


@pytest.mark.parametrize("layers", [1, 6, 30, 80])
@pytest.mark.parametrize("groups", [1, 8, 64])
def test_a_row_a_layer(layers: int, groups: int) -> None:
    svg = draw(dense(layers, groups), dense(layers, groups), None)
    rows = layer_rows(svg)
    assert len(rows) == layers
    assert all(len(rects(row, "kept-group")) == groups and not rects(row, "cut") for row in rows)
    assert float(ElementTree.fromstring(svg).get("height") or 0) < 900


def test_what_is_drawn_is_what_is_left() -> None:
    svg = draw(dense(4, 2, 2, 8), PLAN.shape(), PLAN)
    rows = layer_rows(svg)
    assert [row.get("class") for row in rows] == ["layer", "layer gone", "layer", "layer"]
    assert [row.findtext("title") for row in rows] == [
        "Layer 0: 1 of 2 groups with 1 of 2 heads each, 6 of 8 neurons",
        "Layer 1: gone",
        "Layer 2: 0 of 2 groups with 0 of 2 heads each, 8 of 8 neurons",
        "Layer 3: 2 of 2 groups with 1 of 2 heads each, 0 of 8 neurons",
    ]
    assert [len(rects(row, "kept-group")) for row in rows] == [1, 0, 0, 2]
    assert [len(rects(row, "kept")) for row in rows] == [1, 0, 1, 0]
    width = {kind: float(rects(rows[0], kind)[-1].get("width") or 0) for kind in ("kept", "cut")}
    assert width["kept"] == pytest.approx(width["cut"] * 6 / 8, rel=1e-4)
    full, kept = (float(rects(rows[0], kind)[1 - i].get("width") or 0) for i, kind in enumerate(("cut", "kept-group")))
    assert kept == pytest.approx(full / 2)  # one of two heads of the group that stays
    assert rects(rows[0], "kept-group")[0].get("x") == rects(rows[0], "cut")[1].get("x")  # group 1, not group 0


def test_without_a_plan_layers_that_are_gone_have_no_name() -> None:
    views = layer_views(dense(4), Shape(64, dense(3).layers), None)
    assert [view.name for view in views] == ["·"] * 4
    assert [view.left is None for view in views] == [False, False, False, True]
    assert [view.name for view in layer_views(dense(2), dense(2), None)] == ["0", "1"]


def colours(svg: str) -> dict[str, str]:
    return {p.get("class") or "": p.get("d") or "" for p in ElementTree.fromstring(svg).iter("path")}


def test_neurons_are_sorted_kept_first_and_the_cut_begins_where_it_should() -> None:
    plan = Plan((0,), (LayerPlan(0, (0,), (0,), (0, 2)),))
    found = heat_map("neuron", [[1.0, 8.0, 4.0, 2.0]], plan)  # kept 4 1, cut 8 2
    assert found is not None
    svg = ElementTree.fromstring(found.svg)
    (veil,), (edge,) = rects(svg, "veil"), rects(svg, "edge")
    assert (float(veil.get("x") or 0), float(veil.get("width") or 0)) == (34 + 300, 300)
    assert float(edge.get("x") or 0) == pytest.approx(334 - 0.5)
    starts = {name: [float(x) for x in re.findall(r"M([\d.]+) ", d)] for name, d in colours(found.svg).items()}
    assert starts[f"h{LEVELS - 1}"] == [334.0]  # 8, the highest, is the first of the cut
    assert starts["h0"] == [184.0]  # 1, the lowest, is the last of the kept
    assert (found.low, found.high) == ("×0.35", "×2.8")  # geometric mean of the row: 2.83


def test_a_map_compares_inside_a_layer() -> None:
    plain = heat_map("group", [[1.0, 2.0], [1.0, 2.0]], None)
    scaled = heat_map("group", [[1.0, 2.0], [1000.0, 2000.0]], None)
    other = heat_map("group", [[1.0, 2.0], [1000.0, 1.0]], None)
    assert plain == scaled != other


def test_marks_follow_the_plan() -> None:
    found = {m.unit: ElementTree.fromstring(m.svg) for m in maps(table(4, 2, 4, 8, 64), PLAN)}
    counts = {unit: len(rects(svg, "veil")) for unit, svg in found.items()}
    # groups: 0 of layer 0, layers 1 and 2 whole; heads: 0..1 and 3, layers 1 and 2, 1 and 3 of layer 3;
    # neurons: the tail of layer 0, layers 1 and 3 whole; the last 16 channels; layer 1
    assert counts == {"group": 3, "head": 6, "neuron": 3, "channel": 1, "layer": 1}
    assert all(not rects(ElementTree.fromstring(m.svg), "veil") for m in maps(table(4, 2, 4, 8, 64), None))


def table(layers: int, groups: int, heads: int, neurons: int, channels: int) -> dict[str, list[list[float]]]:
    def rows(count: int, width: int) -> list[list[float]]:
        return [[1.5 + math.sin(1 + i * 7 + j * 3) for j in range(width)] for i in range(count)]

    found = {"group": rows(layers, groups), "head": rows(layers, heads), "neuron": rows(layers, neurons)}
    return found | {"channel": rows(1, channels), "layer": rows(1, layers)}


def test_large_models_make_small_maps() -> None:
    found = maps(table(80, 8, 64, 2048, 8192), None)
    assert sum(len(m.svg) for m in found) < 600_000
    neurons = next(m for m in found if m.unit == "neuron")
    widths = {float(w) for d in colours(neurons.svg).values() for w in re.findall(r"h([\d.]+)v", d)}
    assert min(widths) >= 600 / COLUMNS * 0.99


def test_scores_that_are_odd() -> None:
    runs = heat_map("layer", [[math.nan, 1.0, 2.0], [math.nan, math.nan, 3.0]], None)
    assert runs is not None
    assert "runs" in runs.about
    signed = heat_map("neuron", [[-1.0, 1.0, math.nan, math.inf]], None)
    assert signed is not None
    assert (signed.low, signed.high) == ("−1 deviations", "+1 deviations")
    equal = heat_map("group", [[1.0, 1.0]], None)
    assert equal is not None
    assert set(colours(equal.svg)) == {f"h{LEVELS // 2}"}
    assert heat_map("group", [[math.nan]], None) is None
    assert maps(None, None) == maps({}, None) == maps({"group": []}, None) == []


def test_the_curve_falls_when_the_loss_does() -> None:
    rows = [{"step": float(i), "tokens": 100.0 * i, "loss": 5.0 - 0.01 * i} for i in range(300)]
    svg = curve(rows)
    assert svg is not None
    lines = {p.get("class"): p.get("d") or "" for p in ElementTree.fromstring(svg).iter("path")}
    points = [tuple(map(float, pair.split())) for pair in lines["line s0"][1:].split("L")]
    assert all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(points))  # y counts downwards
    assert "tokens" in svg
    assert "loss 2." in svg


def test_the_path_of_gates_in_per_cent() -> None:
    rows = [{"tokens": 100.0 * i, "sparsity": 0.002 * i, "asked": 0.0025 * i, "teacher": 0.001 * i} for i in range(41)]
    svg = path(rows)
    assert svg is not None
    ends = [t.text for t in ElementTree.fromstring(svg).iter("text") if (t.get("class") or "").startswith("label")]
    assert {"sparsity 8", "asked for 10", "teacher 4"} == {" ".join((text or "").split()) for text in ends}
    assert path(()) is None
    assert "teacher" not in str(path([{k: v for k, v in row.items() if k != "teacher"} for row in rows]))


def test_long_logs_are_thinned() -> None:
    rows = [{"step": float(i), "loss": float(i), "aux_loss": 1.0} for i in range(5000)]
    svg = curve(rows)
    assert svg is not None
    lines = {p.get("class"): (p.get("d") or "").count("L") for p in ElementTree.fromstring(svg).iter("path")}
    assert lines["raw s0"] < 400
    assert "aux loss 1" in svg
    assert "step" in svg


@pytest.mark.parametrize("count", [60, 300])
def test_the_smooth_line_of_a_straight_one_is_that(count: int) -> None:
    """It lies on it, from end to end, and neither behind nor before."""
    svg = curve([{"step": float(i), "loss": 2.0 * i} for i in range(count)])
    assert svg is not None
    drawn = {p.get("class"): p.get("d") or "" for p in ElementTree.fromstring(svg).iter("path")}
    raw, smooth = (
        [tuple(map(float, pair.split())) for pair in drawn[name][1:].split("L")] for name in ("raw s0", "line s0")
    )
    assert len(raw) == len(smooth) == count
    assert all(a[0] == b[0] for a, b in zip(raw, smooth, strict=True))
    whole = [(a[1], b[1]) for a, b in zip(raw, smooth, strict=True)][: count - count // 25]
    assert all(a == pytest.approx(b, abs=0.11) for a, b in whole)


def test_no_curve_without_two_losses() -> None:
    assert curve(()) is None
    assert curve([{"step": 1.0, "tokens": 8.0, "loss": 3.0}]) is None
    assert curve([{"step": 1.0, "lr": 3.0}, {"step": 2.0, "lr": 2.0}]) is None
    assert curve([{"step": 1.0, "loss": math.nan}, {"step": 2.0, "loss": 2.0}]) is None
    assert curve([{"step": 0.0, "loss": 2.0}, {"step": 0.0, "loss": 2.0}]) is not None


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(0.0, 10.0, [0, 2, 4, 6, 8, 10]), (0.3, 2.6, [0.5, 1.0, 1.5, 2.0, 2.5]), (3.0, 3.0, [3.0, 6.0]), (0, 0, [0, 1])],
)
def test_ticks(low: float, high: float, found: list[float]) -> None:
    assert ticks(low, high, 5) == pytest.approx(found)


def test_elements_escape_what_they_hold() -> None:
    assert tag("text", "<b>", x=1.5, class_='"', y=None) == '<text x="1.5" class="&#34;">&lt;b&gt;</text>'
    assert "&lt;i&gt;" in picture(1, 1, "<i>")
