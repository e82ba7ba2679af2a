"""`regrow estimate` of sparse recipes: what is asked for is what is reckoned, and refused as a run would refuse it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prompt import Command, Refused

from models import make
from regrow.dryrun import _inputs, sparse_bytes
from regrow.engines.bind import bind
from regrow.settings import Sparsify
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
    assert hessian["spread hessian"]["peak_gb"] > owl["spread owl"]["peak_gb"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--criterion", "nonsense"), "nonsense"),
        (("--set", "sparsify.pattern=5:4"), "5:4"),
        (("--set", "sparsify.spread=butter"), "butter"),
        (("--keep", "50%"), "keep = 50% and sparsify in one run"),
    ],
)
def test_what_a_run_refuses_is_refused(refused: Refused, sprout_dir: Path, flags: tuple[str, ...], says: str) -> None:
    refused("estimate", sprout_dir, "--recipe", "sparsegpt", *flags, says=(says,))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_every_expert_has_its_own_statistics(kind: str) -> None:
    """Attention's input, its output's, that of the experts, and the middle of each; the router does not count."""
    model = make(kind, hidden_size=24, intermediate_size=16, num_hidden_layers=2)
    anatomy = bind(model.config, model)
    experts, _, middle = model.model.layers[0].mlp.experts.down_proj.shape
    inside = model.model.layers[0].self_attn.o_proj.in_features
    found = sorted((count, channels) for count, channels, _ in _inputs(anatomy))
    assert found == sorted([(1, 24), (1, inside), (experts, 24), (experts, middle)])


def test_memory_hangs_on_what_is_read() -> None:
    """The dense stream beside costs memory where there is a Gram matrix, and only there."""
    model = make("llama")
    anatomy = bind(model.config, model)

    def needs(**settings: Any) -> int:
        return sparse_bytes(anatomy, choose(Sparsify(**settings)), tokens=4096, block=128)

    assert needs(criterion="wanda", inputs="both") == needs(criterion="wanda")
    assert needs(criterion="sparsegpt", inputs="both") > needs(criterion="sparsegpt") > needs(criterion="wanda")
