"""`regrow estimate` of sparse recipes: what is asked for is what is reckoned, and refused as a run would refuse it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prompt import Command, Refused

from models import make
from regrow.artifacts.linear import SOLVERS
from regrow.artifacts.shape import costs
from regrow.dryrun import WORK, dry_run, inputs_of, sparse_bytes
from regrow.engines.bind import bind
from regrow.engines.checkpoint import read_config
from regrow.settings import Sparsify, parse
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
    one_pass = stages(regrow, *ask, "--set", "sparsify.inputs=dense")["sparsify and write"]
    assert still["tokens"] == 0 < plain["tokens"]
    assert still["peak_gb"] < plain["peak_gb"]
    assert one_pass["minutes"] == pytest.approx(plain["minutes"] / 2, abs=0.02)
    assert not [name for name in stages(regrow, *ask) if name.startswith("spread")]
    owl, hessian = (stages(regrow, *ask, "--set", f"sparsify.spread={name}") for name in ("owl", "hessian"))
    assert owl["spread owl"]["tokens"] == plain["tokens"]
    assert hessian["spread hessian"]["tokens"] == 4 * 512  # four probes of a block
    both = [stages(regrow, *ask, *more, "--set", "sparsify.inputs=both") for more in ((), ("--criterion", "wanda"))]
    three, two = (found["sparsify and write"]["minutes"] for found in both)
    assert three == pytest.approx(1.5 * plain["minutes"], abs=0.02)
    assert two == pytest.approx(plain["minutes"], abs=0.02)
    assert hessian["spread hessian"]["peak_gb"] > owl["spread owl"]["peak_gb"]


def test_recovery_by_hand(sprout_dir: Path) -> None:
    """Weights, gradients and two moments, logits of a micro-batch; a teacher beside, its pass, and pieces of logits."""
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
    (block,) = inputs_of(anatomy)
    found = sorted((count, channels) for count, channels, _ in block)
    assert found == sorted([(1, 24), (1, inside), (experts, 24), (experts, middle)])


def test_layers_of_all_kinds_and_what_was_named_besides() -> None:
    """Every second layer has experts; the router reads with them, the head alone, and what is left is not read."""
    model = make("qwen3_moe", hidden_size=24, num_hidden_layers=2, decoder_sparse_step=2, tie_word_embeddings=False)
    anatomy = bind(model.config, model)
    experts, _, middle = model.model.layers[1].mlp.experts.down_proj.shape
    wide, heads = model.model.layers[0].mlp.up_proj.out_features, model.model.layers[0].self_attn
    q, inside = heads.q_proj.out_features, heads.o_proj.in_features
    dense = ((1, 24, q), (1, inside, 24), (1, 24, wide), (1, wide, 24))
    routed = ((1, 24, q), (1, inside, 24), (experts, 24, 2 * middle), (experts, middle, 24))
    assert inputs_of(anatomy) == {dense, routed}
    assert inputs_of(anatomy, also=["lm_head", "gate"]) == {dense, routed, ((1, 24, model.config.vocab_size),)}
    assert inputs_of(anatomy, leave=["q_proj", "k_proj", "v_proj", "experts.down_proj"]) == {dense[1:], routed[1:3]}
    method = choose(Sparsify(criterion="sparsegpt"))
    head = choose(Sparsify(criterion="sparsegpt", also=("lm_head",)))
    assert sparse_bytes(anatomy, head, tokens=64, block=16) > sparse_bytes(anatomy, method, tokens=64, block=16)


def test_memory_hangs_on_what_is_read() -> None:
    """The dense stream beside costs memory where there is a Gram matrix, and only there."""
    model = make("llama")
    anatomy = bind(model.config, model)

    def needs(**settings: Any) -> int:
        return sparse_bytes(anatomy, choose(Sparsify(**settings)), tokens=4096, block=128)

    assert needs(criterion="wanda", inputs="both") == needs(criterion="wanda")
    assert needs(criterion="sparsegpt", inputs="both") > needs(criterion="sparsegpt") > needs(criterion="wanda")


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (50, {"wanda": 10_500, "dsnot": 30_000, "sparsegpt": 13_200, "refit": 23_700, "alps": 13_200}),
        (5, {"wanda": 1_050, "dsnot": 3_000, "sparsegpt": 5_490, "refit": 5_490, "alps": 9_180}),
    ],
)
def test_memory_of_solvers_by_hand(monkeypatch: pytest.MonkeyPatch, outputs: int, expected: dict[str, int]) -> None:
    """One linear of 30 inputs: a mask 7 of it and 3 Gram matrices, a factor 6.1, and what a solver needs."""
    assert set(WORK) < set(SOLVERS.names())
    monkeypatch.setattr("regrow.dryrun.inputs_of", lambda *_, **__: {((1, 30, outputs),)})
    model = make("llama")
    anatomy = bind(model.config, model)
    for name, numbers in expected.items():
        found = sparse_bytes(anatomy, choose(Sparsify(criterion=name)), tokens=100, block=1)
        passing = 6 * 24 + 4 * 20 + (name not in ("wanda", "dsnot")) * 900
        assert found == 4 * (100 * 24 + max(numbers, passing)), name
