"""Models of experts: each expert has the pattern, routers are left alone, and recovery keeps both."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt import Command, Sparsifier
from safetensors.torch import load_file
from sparse_folders import (
    check_manifest,
    check_pattern,
    kept_as_they_were,
    matrices,
    read,
    read_report,
    untouched,
    weights,
)

from models import make, tokenizer
from regrow.artifacts.pattern import Pattern
from regrow.engines import checkpoint

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
TRAIN = ("--tokens", 256, "--set", "recover.block=32", "--set", "recover.batch=2", "--text", "none")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are continued and memory collected by other tests."""
    monkeypatch.setattr("regrow.run.write_samples", lambda *seen: ["" for _ in seen[2]])
    monkeypatch.setattr(checkpoint.gc, "collect", lambda: 0)


def written(kind: str, folder: Path, change: Callable[[Any], None] = lambda _: None, **more: Any) -> Path:
    """A tiny random model of experts with a tokenizer of a word a token."""
    model = make(kind, hidden_size=24, intermediate_size=16, num_hidden_layers=2, **{**EXPERTS[kind], **more})
    with torch.no_grad():
        change(model)
    folder.mkdir()
    checkpoint.write(model, tokenizer(), folder, torch.float32, None)
    return folder


# ---- sparsify


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "moe-pruner"])
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts(sparsify: Sparsifier, tmp_path: Path, kind: str, criterion: str) -> None:
    source = written(kind, tmp_path / kind)
    folder, done = sparsify(source, "--criterion", criterion, "--pattern", "2:4")
    before, after = weights(source), weights(folder)
    stacks = [n for n in matrices(before) if "experts" in n]
    assert len(stacks) == 4
    assert all(before[n].dim() == 3 for n in stacks)
    check_pattern(after, Pattern.parse("2:4"))
    check_manifest(folder, Pattern.parse("2:4"))
    untouched(before, after)
    assert sum(n.endswith("mlp.gate.weight") for n in set(before) - set(matrices(before))) == 2
    assert kept_as_they_were(before, after) is (criterion != "sparsegpt")
    assert "50 % zeros (2 of 4 kept); 50.00 %" in done.out


def test_the_router_weighs_inputs(sparsify: Sparsifier, tmp_path: Path) -> None:
    """MoE-Pruner is Wanda where there is no router, and something else on experts."""
    source = written("mixtral", tmp_path / "model")
    found = [weights(sparsify(source, "--criterion", c, out=c)[0]) for c in ("wanda", "moe-pruner")]
    first = [n for n in matrices(found[0]) if ".layers.0." in n]
    same = {n.rpartition("layers.0.")[2]: torch.equal(found[0][n], found[1][n]) for n in first}
    assert {n for n, equal in same.items() if not equal} == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def test_an_expert_that_saw_no_token_keeps_its_weights(sparsify: Sparsifier, tmp_path: Path) -> None:
    """The router's rows are a, -a, 0, 0: one of the first two always wins."""

    def deaf(model: Any) -> None:
        gate = model.model.layers[0].mlp.gate.weight
        gate[1] = -gate[0]
        gate[2:] = 0

    source = written("mixtral", tmp_path / "model", deaf, num_experts_per_tok=1)
    folder, done = sparsify(source, "--criterion", "sparsegpt", "--pattern", "2:4")
    before, after = weights(source), weights(folder)
    unseen = [f"model.layers.0.mlp.experts.{part}[{e}]" for part in ("gate_up_proj", "down_proj") for e in (2, 3)]
    said = [note.removesuffix(": saw no token") for note in read_report(folder).notes if "saw no token" in note]
    assert set(unseen) <= set(said)
    assert not any(".layers.0." in name for name in set(said) - set(unseen))
    assert all(f"note: {name}: saw no token" in done.out for name in unseen)
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"):
        assert torch.equal(before[name][2:], after[name][2:])
        check_pattern({name: after[name][:2]}, Pattern.parse("2:4"))
    share = Fraction(sum(int((w == 0).sum()) for w in matrices(after).values()))
    total = sum(w.numel() for w in matrices(after).values())
    assert read(folder, "regrow.json")["sparsity"]["share"] == pytest.approx(float(share / total))
    assert share / total < Fraction(1, 2)


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_as_the_hub_has_them(regrow: Command, sparsify: Sparsifier, tmp_path: Path, kind: str) -> None:
    """Stock checkpoints hold one expert at a time; they are read, counted and compared all the same."""
    source = written(kind, tmp_path / kind)
    usual = sparsify(source, "--criterion", "wanda", "--pattern", "2:4", out="usual")[0]
    model: Any = make(kind, hidden_size=24, intermediate_size=16, num_hidden_layers=2, **EXPERTS[kind])
    model.save_pretrained(source)
    assert any(".experts.3." in name for name in load_file(source / "model.safetensors"))
    folder = sparsify(source, "--criterion", "wanda", "--pattern", "2:4", out="from-hub")[0]
    assert read(folder, "sparsity.json") == read(usual, "sparsity.json")
    found = regrow("inspect", source, "--sparse", "--json").json["sparsity"]
    assert (found["zeros"], found["weights"]) == (0, read(folder, "sparsity.json")["sparsity"]["weights"])
    compared = regrow("diff", folder, source, "--weights", "--json").json
    assert (compared["intact"], compared["share"]) == (False, [0.5, 0.0])
    assert compared["lost"] * 2 == found["weights"]


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("mixtral", "--criterion magnitude --pattern 75%"),
        ("mixtral", "--criterion dsnot --pattern 2:8"),
        ("mixtral", "--criterion sparsegpt --pattern 50%"),
        ("mixtral", "--criterion wanda --pattern 2:4 --solver update --inputs both"),
        ("mixtral", "--criterion wanda --pattern 2:4 --solver refit"),
        ("mixtral", "--criterion wanda --pattern 2:4 --solver mrp --spread owl"),
        ("mixtral", "--criterion wanda --pattern 2:4 --solver alps --spread hessian"),
        ("qwen3_moe", "--criterion magnitude --pattern 2:8"),
        ("qwen3_moe", "--criterion dsnot --pattern 50%"),
        ("qwen3_moe", "--criterion sparsegpt --pattern 75%"),
        ("qwen3_moe", "--criterion wanda --pattern 2:4 --solver update --spread hessian"),
        ("qwen3_moe", "--criterion wanda --pattern 2:4 --solver refit --spread owl"),
        ("qwen3_moe", "--criterion wanda --pattern 2:4 --solver mrp"),
        ("qwen3_moe", "--criterion wanda --pattern 2:4 --solver alps --inputs both"),
    ],
)
def test_every_method_on_experts(sparsify: Sparsifier, tmp_path: Path, kind: str, asked: str) -> None:
    """Each expert for itself has its layer's pattern exactly, but those that saw no token."""
    source = written(kind, tmp_path / kind, head_dim=8)
    folder, _ = sparsify(source, *asked.split())
    before, after = weights(source), weights(folder)
    untouched(before, after)
    assert sum(n.endswith("mlp.gate.weight") for n in set(before) - set(matrices(before))) == 2
    said = read(folder, "sparsity.json")
    unseen = {note.removesuffix(": saw no token") for note in said["notes"]}
    layers = [re.search(r"\((\d+) of (\d+) kept\)", text) for text in said["layers"]]
    patterns = [Pattern.groups(int(f[1]), int(f[2])) if f else Pattern.parse(said["pattern"]) for f in layers]
    assert (len(set(patterns)) > 1) is ("--spread" in asked)
    seen = 0
    for name, stack in matrices(after).items():
        parts = {f"{name}[{e}]": part for e, part in enumerate(stack)} if stack.dim() == 3 else {name: stack}
        for part, weight in parts.items():
            if part not in unseen:
                check_pattern({name: weight}, patterns[int(name.split(".")[2])])
                seen += stack.dim() == 3
    assert seen >= 12  # of 16


# ---- recover


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both kinds with two of four."""
    from regrow.cli.main import main

    folder = tmp_path_factory.mktemp("experts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGROW_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("regrow.run.write_samples", lambda *seen: ["" for _ in seen[2]])
        for kind in EXPERTS:
            source = written(kind, folder / kind)
            ask = ("sparsify", source, "--criterion", "magnitude", "--pattern", "2:4", "--text", "none", "-q")
            assert main([str(a) for a in (*ask, "--out", folder / f"{kind}-sparse")]) == 0
    return {kind: folder / f"{kind}-sparse" for kind in EXPERTS}


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        *((kind, adapter) for kind in EXPERTS for adapter in ("spp", "ast")),
        *(("mixtral", adapter) for adapter in ("hira", "ia3")),
        *(("qwen3_moe", adapter) for adapter in ("full", "lora-masked")),
    ],
)
def test_recovery_of_experts_keeps_the_pattern(
    regrow: Command, sparse: dict[str, Path], tale: Path, tmp_path: Path, kind: str, adapter: str
) -> None:
    """The same zeros; by ast as many, of which some have moved after ten steps."""
    out = tmp_path / "tuned"
    ask = ("recover", sparse[kind], "--adapter", adapter, *TRAIN, "--train", tale, "--learning-rate", 0.01)
    own = {"ast": ("--set", "recover.block=16", "--set", "recover.batch=1"), "spp": ("--rank", 2)}
    more = own.get(adapter, ())
    done = regrow(*ask, *more, "--out", out)
    assert done.code == 0, done.err
    before, after = weights(sparse[kind]), weights(out)
    check_pattern(after, Pattern.parse("2:4"))
    assert any(not torch.equal(old, after[name]) for name, old in matrices(before).items())
    changed = {name.rpartition("layers.")[2][2:] for name, old in before.items() if not torch.equal(old, after[name])}
    assert ({f"mlp.experts.{part}_proj" for part in ("gate_up", "down")} < changed) is (
        adapter in ("spp", "full", "ast")
    )
    moved = {name for name, old in matrices(before).items() if not torch.equal(old == 0, after[name] == 0)}
    assert any("experts" in name for name in moved) if adapter == "ast" else not moved
    assert all(int((old == 0).sum()) == int((after[name] == 0).sum()) for name, old in matrices(before).items())
    assert regrow("inspect", out, "--sparse", "--json").json["sparsity"]["mask_intact"] is True


def test_experts_drop_nothing(regrow: Command, sparse: dict[str, Path], tale: Path, tmp_path: Path) -> None:
    ask = (
        "recover",
        sparse["mixtral"],
        "--adapter",
        "spp",
        "--rank",
        2,
        *TRAIN,
        "--train",
        tale,
        "--out",
        tmp_path / "out",
    )
    done = regrow(*ask, "--dropout", 0.1)
    assert done.code == 2
    assert "SPP with dropout 0.1 on model.layers.0.mlp.experts, a stack of experts" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", EXPERTS)
def test_zeros_that_were_filled_leave_no_name_behind(
    regrow: Command, sparse: dict[str, Path], tale: Path, tmp_path: Path, kind: str
) -> None:
    """Plain LoRA fills the zeros of attention and reaches no expert: the model is sparse still, but 2:4 no more."""
    ask = ("recover", sparse[kind], "--adapter", "lora", *TRAIN, "--train", tale, "--out", tmp_path / "filled")
    done = regrow(*ask)
    assert done.code == 0, done.err
    noted = read(tmp_path / "filled", "regrow.json")["sparsity"]
    assert noted["share"] > 0.05
    assert noted["pattern"] is None
    assert regrow("inspect", tmp_path / "filled", "--sparse", "--json").json["sparsity"]["groups"] is None


def test_what_else_is_named_becomes_sparse_too(regrow: Command, tale: Path, tmp_path: Path) -> None:
    """Routers and a head of its own: cut by what they read, counted, hashed, and held while all weights are trained."""
    source = written("mixtral", tmp_path / "model", tie_word_embeddings=False)
    words = ("--calibration", tale, "--calibration-tokens", 256, "--calibration-block", 64, "--text", "none")
    ask = ("sparsify", source, "--pattern", "2:4", *words, "--also", "gate,lm_head")
    extra = ("lm_head.weight", "model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight")
    found = {}
    for criterion in ("magnitude", "sparsegpt"):
        done = regrow(*ask, "--criterion", criterion, "--out", tmp_path / criterion)
        assert done.code == 0, done.err
        found[criterion] = weights(tmp_path / criterion)
        for name in extra:
            assert set((found[criterion][name] != 0).reshape(-1, 4).sum(-1).tolist()) == {2}, name
        assert torch.equal(found[criterion]["model.embed_tokens.weight"], weights(source)["model.embed_tokens.weight"])
    assert all(not torch.equal(found["magnitude"][n] == 0, found["sparsegpt"][n] == 0) for n in extra)
    data = regrow("inspect", tmp_path / "sparsegpt", "--sparse", "--json").json["sparsity"]
    assert set(extra) < set(data["matrices"])
    assert (data["share"], data["groups"], data["mask_intact"]) == (0.5, "2:4", True)
    tuned = ("recover", tmp_path / "sparsegpt", "--adapter", "full", *TRAIN, "--train", tale, "--learning-rate", 0.01)
    assert regrow(*tuned, "--out", tmp_path / "tuned").code == 0
    after = weights(tmp_path / "tuned")
    assert all(torch.equal(after[n] == 0, found["sparsegpt"][n] == 0) for n in extra)
    assert not torch.equal(after["lm_head.weight"], found["sparsegpt"]["lm_head.weight"])


def test_an_embedding_is_judged_by_its_weights(regrow: Command, tale: Path, tmp_path: Path) -> None:
    source = written("mixtral", tmp_path / "model", tie_word_embeddings=True)
    ask = ("sparsify", source, "--pattern", "2:4", "--calibration", tale, "--text", "none", "--out", tmp_path / "out")
    for flags, says in (
        (("--criterion", "wanda", "--also", "embed_tokens"), "an embedding reads no numbers"),
        (("--criterion", "magnitude", "--also", "lm_head"), "which names no router, no embedding and no head"),
        (("--also", "gate", "--keep-statistics", "--inputs", "dense"), "keep_statistics with also = gate"),
    ):
        done = regrow(*ask, *flags)
        assert (done.code, says in done.err) == (2, True), done.err
        assert not (tmp_path / "out").exists()
    assert regrow(*ask, "--criterion", "magnitude", "--also", "embed_tokens").code == 0
    embedding = weights(tmp_path / "out")["model.embed_tokens.weight"]
    assert set((embedding != 0).reshape(-1, 4).sum(-1).tolist()) == {2}
