"""`regrow estimate` of sparse recipes: what is asked for is what is reckoned, and refused as a run would refuse it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prompt import Command, Refused

from models import make
from regrow.artifacts.linear import SOLVERS
from regrow.artifacts.pattern import Pattern
from regrow.artifacts.shape import costs
from regrow.dryrun import dry_run
from regrow.engines.bind import bind
from regrow.engines.checkpoint import read_config
from regrow.settings import Sparsify, parse
from regrow.sparse_costs import FACTOR, WORK, Site, sites_of, sparse_bytes, sparse_flops
from regrow.stages.sparsify import choose


@pytest.fixture(autouse=True)
def _items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow.engines.tasks.count_items", lambda *_: 100)


def stages(regrow: Command, *arguments: object) -> dict[str, dict[str, Any]]:
    done = regrow("estimate", *arguments, "--gflops", 10, "--json")
    assert done.code == 0, done.err
    return {row["stage"]: row for row in done.json["stages"]}


def test_flags_reach_the_zeros(regrow: Command, sprout_dir: Path) -> None:
    ask = (sprout_dir, "--recipe", "sparsegpt")
    plain = stages(regrow, *ask)["sparsify and write"]
    still = stages(regrow, *ask, "--criterion", "magnitude")["sparsify and write"]
    wanda = (*ask, "--criterion", "wanda")
    passes, one_pass = (
        stages(regrow, *wanda, "--set", f"sparsify.inputs={kind}")["sparsify and write"] for kind in ("pruned", "dense")
    )
    assert still["tokens"] == 0 < plain["tokens"]
    assert still["peak_gb"] < plain["peak_gb"]
    assert one_pass["minutes"] == pytest.approx(passes["minutes"] / 2, abs=0.02)
    assert plain["minutes"] > passes["minutes"]  # Gram matrices, factors and the update
    assert not [name for name in stages(regrow, *ask) if name.startswith("spread")]
    owl, hessian = (stages(regrow, *ask, "--set", f"sparsify.spread={name}") for name in ("owl", "hessian"))
    assert owl["spread owl"]["tokens"] == plain["tokens"]
    assert hessian["spread hessian"]["tokens"] == 4 * 512  # four probes of a block
    both = [stages(regrow, *more, "--set", "sparsify.inputs=both") for more in (ask, wanda)]
    three, two = (found["sparsify and write"]["minutes"] for found in both)
    assert three > plain["minutes"] + one_pass["minutes"]
    assert two == passes["minutes"]
    assert hessian["spread hessian"]["peak_gb"] > owl["spread owl"]["peak_gb"]


def test_recovery_by_hand(sprout_dir: Path) -> None:
    """Weights, gradients and two moments, logits of a micro-batch; a teacher beside, its pass, and pieces of logits.
    A student that writes, or a teacher that learns, reads each token once more.
    """
    found = {}
    for method, teacher in (("spp", None), ("full", None), ("ast", None), ("spp", "base")):
        asked = {"method": method, "tokens": 10**7, "block": 32, "micro_batch": 2, "teacher": teacher}
        recipe = parse({"model": str(sprout_dir), "keep": None, "recover": {**asked, "batch": 2}}, "here")
        (found[method, teacher],) = (row for row in dry_run(recipe, gflops=10)["stages"] if row["stage"] == "recover")
    anatomy = bind(read_config(sprout_dir))
    dense = costs(anatomy, anatomy.dense)
    whole, logits = 4 * dense.parameters, 2 * 32 * 3 * 4 * 2048
    peaks = {"spp": whole + logits, "full": 4 * whole + logits, "ast": 5.25 * whole + logits}
    for method, peak in peaks.items():
        assert found[method, None]["peak_gb"] == pytest.approx(peak / 1e9, abs=6e-4)
        assert found[method, None]["minutes"] == pytest.approx(3 * 1e7 * dense.flops_per_token / 6e9 / 60, rel=0.01)
    taught = found["spp", "base"]
    assert taught["minutes"] == pytest.approx(4 / 3 * found["spp", None]["minutes"], rel=0.01)
    assert taught["peak_gb"] == pytest.approx((2 * whole + 4 * 6 * 2**22) / 1e9, abs=6e-4)
    for distil, more in (({"on_policy": 0.5}, 0.5), ({"online_rate": 0.0}, 1)):
        recover = {"method": "spp", "tokens": 10**7, "block": 32, "teacher": "base", "distil": distil}
        (row,) = (
            row
            for row in dry_run(parse({"model": str(sprout_dir), "keep": None, "recover": recover}), gflops=10)["stages"]
            if row["stage"] == "recover"
        )
        assert row["minutes"] == pytest.approx((4 + more) / 3 * found["spp", None]["minutes"], rel=0.01)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--criterion", "nonsense"), "nonsense"),
        (("--set", "sparsify.pattern=5:4"), "5:4"),
        (("--set", "sparsify.pattern=3:5"), "3:5 on model.layers.0.self_attn.q_proj"),
        (("--set", "sparsify.leave=[nose]"), "leave = 'nose', which names no linear"),
        (("--set", "recover.loss=forward-kll"), "unknown loss 'forward-kll'"),
        (("--set", "recover.method=full", "--set", "dtype=bf16"), "recovery of all weights in bf16"),
        (("--set", "sparsify.spread=butter"), "butter"),
        (("--keep", "50%"), "keep = 50% and sparsify in one run"),
    ],
)
def test_what_a_run_refuses_is_refused(refused: Refused, sprout_dir: Path, flags: tuple[str, ...], says: str) -> None:
    refused("estimate", sprout_dir, "--recipe", "spp", *flags, says=(says,))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_every_expert_has_its_own_statistics(kind: str) -> None:
    """Attention's input, its output's, that of the experts, and the middle of each; the router does not count."""
    model = make(kind, hidden_size=24, intermediate_size=16, num_hidden_layers=2)
    anatomy = bind(model.config, model)
    experts, _, middle = model.model.layers[0].mlp.experts.down_proj.shape
    inside = model.model.layers[0].self_attn.o_proj.in_features
    first, second = sites_of(anatomy)
    assert first == second
    found = sorted((site.experts, site.channels) for site in first)
    assert found == sorted([(1, 24), (1, inside), (experts, 24), (experts, middle)])


def test_layers_of_all_kinds_and_what_was_named_besides() -> None:
    """Every second layer has experts; the router reads with them, the head alone, and what is left is not read."""
    kind = {"hidden_size": 24, "num_hidden_layers": 2, "decoder_sparse_step": 2, "tie_word_embeddings": False}
    model = make("qwen3_moe", vocab_size=512, **kind)
    anatomy = bind(model.config, model)
    experts, _, middle = model.model.layers[1].mlp.experts.down_proj.shape
    wide, heads = model.model.layers[0].mlp.up_proj.out_features, model.model.layers[0].self_attn
    q, kv, inside = heads.q_proj.out_features, heads.k_proj.out_features, heads.o_proj.in_features
    dense = [Site(1, 24, q, q + 2 * kv), Site(1, inside, 24, 24), Site(1, 24, wide, 2 * wide), Site(1, wide, 24, 24)]
    routed = [*dense[:2], Site(experts, 24, 2 * middle, 2 * middle), Site(experts, middle, 24, 24)]
    assert sites_of(anatomy) == [dense, routed]
    router = Site(experts, 24, max(2 * middle, experts), 2 * middle + experts)
    head = Site(1, 24, model.config.vocab_size, model.config.vocab_size)
    assert sites_of(anatomy, also=["lm_head", "gate"]) == [dense, [*dense[:2], router, routed[3]], [head]]
    assert sites_of(anatomy, leave=["q_proj", "k_proj", "v_proj", "experts.down_proj"]) == [dense[1:], routed[1:3]]
    method = choose(Sparsify(criterion="sparsegpt"))
    more = choose(Sparsify(criterion="sparsegpt", also=("lm_head",)))
    half = Pattern.parse("50%")
    assert sparse_bytes(anatomy, more, half, tokens=64, block=16) > sparse_bytes(
        anatomy, method, half, tokens=64, block=16
    )


def test_operations_of_solvers_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four experts with 30 inputs and 50 outputs, of which a token meets two."""
    monkeypatch.setattr("regrow.sparse_costs.sites_of", lambda *_, **__: [[Site(4, 30, 40, 50)], [Site(1, 10, 7, 7)]])
    model = make("mixtral")
    anatomy = bind(model.config, model)
    assert anatomy.sizes["A"] == 2

    def found(**asked: Any) -> float:
        return sparse_flops(anatomy, choose(Sparsify(**asked)), tokens=1000)

    grams = 2 * 1000 * 900 + 1000 * 100
    cubes, products = 4 * 27_000 + 1000, 4 * 50 * 900 + 7 * 100
    assert found(criterion="wanda") == found(criterion="magnitude") == 0
    assert found(criterion="sparsegpt") == pytest.approx(grams + 2 / 3 * cubes + 2 * products)
    assert found(criterion="sparsegpt", inputs="both") == pytest.approx(3 * grams + 2 / 3 * cubes + 2 * products)
    eigen, steps = (
        getattr(FACTOR, kind) + sum(getattr(work, kind) for work in WORK["alps"]) for kind in ("cubes", "products")
    )
    assert found(criterion="alps") == pytest.approx(grams + eigen * cubes + steps * products)
    assert found(criterion="alps") > 20 * found(criterion="sparsegpt") - 19 * grams


def test_memory_hangs_on_what_is_read() -> None:
    """The dense stream beside costs memory where there is a Gram matrix, and only there."""
    model = make("llama")
    anatomy = bind(model.config, model)

    def needs(**settings: Any) -> int:
        return sparse_bytes(anatomy, choose(Sparsify(**settings)), Pattern.parse("2:4"), tokens=4096, block=128)

    assert needs(criterion="wanda", inputs="both") == needs(criterion="wanda")
    assert needs(criterion="sparsegpt", inputs="both") > needs(criterion="sparsegpt") > needs(criterion="wanda")


def test_aiming_at_the_dense_model_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second stream, a second Gram matrix, and twice the weights of the linear at work."""
    monkeypatch.setattr("regrow.sparse_costs.sites_of", lambda *_, **__: [[Site(1, 30, 50, 50)]])
    model = make("llama")
    anatomy = bind(model.config, model)
    one, both = (
        sparse_bytes(anatomy, choose(Sparsify(inputs=inputs)), Pattern.parse("50%"), tokens=100, block=1)
        for inputs in ("pruned", "both")
    )
    assert both - one == 4 * (100 * 24 + 900 + 2 * 30 * 50)


def test_experts_that_wait_keep_their_grams(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one of four is at work, three Gram matrices of its own site and one of the next are in memory."""
    monkeypatch.setattr("regrow.sparse_costs.sites_of", lambda *_, **__: [[Site(4, 30, 5, 5), Site(1, 10, 7, 7)]])
    model = make("mixtral")
    found = sparse_bytes(
        bind(model.config, model), choose(Sparsify(criterion="sparsegpt")), Pattern.parse("2:4"), tokens=100, block=1
    )
    assert found == 4 * (100 * model.config.hidden_size + FACTOR.grams * 900 + 3 * 900 + 100)


@pytest.mark.parametrize(
    ("pattern", "outputs", "expected"),
    [
        ("50%", 50, {"wanda": 11_100, "dsnot": 30_000, "sparsegpt": 13_800, "refit": 23_700, "alps": 19_200}),
        ("2:4", 50, {"wanda": 8_550, "dsnot": 30_000, "sparsegpt": 11_250, "refit": 23_700, "alps": 19_200}),
        ("2:4", 5, {"wanda": 855, "dsnot": 3_000, "sparsegpt": 4_500, "refit": 4_800, "alps": 5_985}),
    ],
)
def test_memory_of_solvers_by_hand(
    monkeypatch: pytest.MonkeyPatch, pattern: str, outputs: int, expected: dict[str, int]
) -> None:
    """One linear of 30 inputs: a mask 7.4 or 5.7 of it and 3 Gram matrices, a factor 5, and what a solver needs."""
    assert set(WORK) < set(SOLVERS.names())
    monkeypatch.setattr("regrow.sparse_costs.sites_of", lambda *_, **__: [[Site(1, 30, outputs, outputs)]])
    model = make("llama")
    anatomy = bind(model.config, model)
    for name, numbers in expected.items():
        found = sparse_bytes(anatomy, choose(Sparsify(criterion=name)), Pattern.parse(pattern), tokens=100, block=1)
        passing = 6 * 24 + 4 * 20 + (name not in ("wanda", "dsnot")) * 900
        assert found == 4 * (100 * 24 + max(numbers, passing)), name
