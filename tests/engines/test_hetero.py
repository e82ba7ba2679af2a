"""Which class holds a cut model, and every known trap of models whose layers differ in width."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from models import (
    VOCAB,
    Cut,
    anatomy_of,
    config_of,
    cut,
    difference,
    families,
    ids,
    logits,
    make,
    plan,
    randomise,
    tokenizer,
    without,
)
from regrow.artifacts.plan import LayerPlan, Plan
from regrow.artifacts.shape import count
from regrow.engines import checkpoint
from regrow.engines.hetero import CODE_FILE, build, config_class, holder, model_class, render
from regrow.engines.surgery import slice_model

EXACT = 1e-5
KINDS = [kind for kind, _ in families()]


def mixed(kind: str) -> Cut:
    """Everything cut, layer by layer in its own way, and no attention in the first layer."""
    anatomy = anatomy_of(make(kind))
    kept = plan(anatomy, [u for u in anatomy.supported if u != "layer"], uniform=False)
    first = LayerPlan(0, (), (), kept.layers[0].neurons)
    return cut(make(kind), Plan(kept.channels, (first, *kept.layers[1:])))


@pytest.fixture(scope="module")
def zoo() -> dict[str, Cut]:
    return {kind: mixed(kind) for kind in KINDS}


# ---- one trap a test


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_looks_ahead(zoo: dict[str, Cut], kind: str, attention: str) -> None:
    """Changing the last token must not move an earlier logit: a layer without the live configuration has no mask."""
    found = zoo[kind]
    assert found.holder.kind == "heterogeneous"
    if attention == "sdpa" and not type(found.model)._supports_sdpa:
        attention = "eager"  # Gemma 2
    model = copy.deepcopy(found.model)
    model.set_attn_implementation(attention)
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "layer_idx")} == {attention}
    later = ids()
    later[:, -1] = 3 + (later[:, -1] - 2) % (VOCAB - 4)
    before, after = logits(model, ids()), logits(model, later)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert difference(before[:, -1], after[:, -1]) > 1e-3
    assert difference(found.masked, before) <= EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_comes_back(zoo: dict[str, Cut], kind: str, tmp_path: Path) -> None:
    config = zoo[kind].model.config
    config.save_pretrained(tmp_path)
    again = config_class(kind).from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.model_type == f"regrow_{kind}"
    assert checkpoint.read_config(tmp_path).to_dict() == config.to_dict()
    for ours, theirs in zip(config.per_layer_config, again.per_layer_config, strict=True):
        assert ours.to_dict() == theirs.to_dict()
    assert again.per_layer_config[0].skip == ["attention"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_says_where_its_code_is(zoo: dict[str, Cut], kind: str) -> None:
    found = zoo[kind].holder
    assert set(found.config.auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert found.config.architectures == [type(zoo[kind].model).__name__]
    assert found.code is not None
    assert found.code == render(found.config)
    for place in found.config.auto_map.values():
        module, _, name = place.partition(".")
        assert module + ".py" == CODE_FILE
        assert f"class {name}(" in found.code
    assert "regrow" not in [line.split()[1] for line in found.code.splitlines() if line.startswith(("import", "from"))]
    compile(found.code, CODE_FILE, "exec")


FRESH = """
import sys
sys.modules["regrow"] = None
import json, torch
from pathlib import Path
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
root = Path(sys.argv[1])
ids, expected = torch.load(root / "ids.pt"), torch.load(root / "logits.pt")
answers = {}
for kind, reference in expected.items():
    folder = root / kind
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        refused = "it loaded"
    except ValueError as error:
        refused = str(error)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    body = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        found = model(ids).logits
        states = [m(ids).last_hidden_state for m in (body, model.get_decoder())]
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    answers[kind] = {
        "error": float((found - reference).abs().max() / reference.abs().max()),
        "body": float((states[0] - states[1]).abs().max()),
        "static": torch.equal(*(model.generate(ids, **options, cache_implementation=c) for c in ("dynamic", "static"))),
        "words": AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("w3 w9 w63")["input_ids"],
        "refused": refused,
        "type": AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type,
        "home": type(model).__module__.partition(".")[0],
    }
print(json.dumps(answers))
"""


def test_a_machine_without_regrow_loads_every_folder(zoo: dict[str, Cut], tmp_path: Path) -> None:
    """One fresh process for all families, in which `import regrow` fails."""
    for kind, found in zoo.items():
        folder = tmp_path / kind
        folder.mkdir()
        checkpoint.write(copy.deepcopy(found.model), tokenizer(), folder, torch.float32, found.holder.code)
    torch.save(ids(), tmp_path / "ids.pt")
    torch.save({kind: logits(found.model, ids()) for kind, found in zoo.items()}, tmp_path / "logits.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout[done.stdout.index("{") :])  # a question about trust comes first
    assert list(answers) == KINDS
    for kind, answer in answers.items():
        assert answer["error"] <= EXACT, kind
        assert answer["body"] == 0, kind
        assert answer["static"], kind
        assert answer["words"] == [3, 9, 63], kind
        assert "trust_remote_code=True" in answer["refused"], kind
        assert answer["type"] == f"regrow_{kind}"
        assert answer["home"] == "transformers_modules", kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_static_cache_generates_what_a_dynamic_one_does(zoo: dict[str, Cut], kind: str) -> None:
    model = zoo[kind].model
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids())}
    without_cache = model.generate(ids(), use_cache=False, **options)
    assert torch.equal(model.generate(ids(), **options), without_cache)
    assert torch.equal(model.generate(ids(), cache_implementation="static", **options), without_cache)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gpt_neox"])
def test_the_cache_holds_as_many_heads_as_each_layer_has(kind: str) -> None:
    found = cut(make(kind), plan(anatomy_of(make(kind)), ("group", "head"), uniform=False))
    with torch.no_grad():
        cache = found.model(ids(), use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == [layer.groups for layer in found.plan.shape().layers]
    assert len({layer.groups for layer in found.plan.shape().layers}) > 1


def test_lora_goes_on_top() -> None:
    from peft import LoraConfig, get_peft_model

    found = mixed("llama")
    before = logits(found.model, ids())
    model: Any = get_peft_model(found.model, LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"]))
    assert torch.equal(logits(model, ids()), before)  # adapters begin at zero
    model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    touched = [p for n, p in model.named_parameters() if "lora_B" in n and p.grad is not None and p.grad.any()]
    assert len(touched) == 2 * 3 + 1  # q, o and down in two layers, down alone in the first
    with torch.no_grad():
        for parameter in touched:
            parameter.add_(0.1)
    tuned = logits(model, ids())
    assert difference(before, tuned) > 1e-2
    assert difference(tuned, logits(model.merge_and_unload(), ids())) <= EXACT


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox"])
def test_it_trains_with_gradient_checkpointing(zoo: dict[str, Cut], kind: str) -> None:
    model = copy.deepcopy(zoo[kind].model)
    slopes = []
    for _ in range(2):
        model.train()
        model.zero_grad()
        model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
        slopes.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, slope in slopes[0].items():
        torch.testing.assert_close(slope, slopes[1][name])


# ---- which class holds it


def kept_three_heads(kind: str, **changes: Any) -> tuple[Any, Plan]:
    """3 heads in a width of 16: a stock Llama or Gemma configuration wants the width divisible by the heads."""
    model = make(kind, **changes)
    anatomy = anatomy_of(model)
    heads = plan(anatomy, ("head",), uniform=True)
    return model, Plan(tuple(range(16)), heads.layers)


def test_llama_with_a_width_it_refuses_is_carried_by_mistral() -> None:
    model, kept = kept_three_heads("llama", attention_bias=False, mlp_bias=False)
    found = cut(model, kept)
    assert found.error() <= EXACT
    assert (found.holder.kind, found.holder.config.model_type) == ("carrier", "mistral")
    assert found.holder.config.sliding_window is None
    assert found.holder.config.architectures == ["MistralForCausalLM"]
    assert found.holder.code is None
    assert "3 heads with width 16" in found.holder.note
    assert sum(p.numel() for p in found.model.parameters()) == count(found.anatomy, kept.shape())
    assert difference(logits(found.model, ids())[:, -8:], checkpoint.cached_logits(found.model, ids(), 8)) <= EXACT


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_carrier_without_biases_does_not_take_a_model_that_has_them(bias: str) -> None:
    model, kept = kept_three_heads("llama", **{"attention_bias": False, "mlp_bias": False, bias: True})
    found = cut(model, kept)
    assert found.holder.kind == "heterogeneous"
    assert found.error() <= EXACT


def test_gemma2_with_a_width_it_refuses_becomes_heterogeneous(tmp_path: Path) -> None:
    model, kept = kept_three_heads("gemma2")
    found = cut(model, kept)
    assert (found.holder.kind, found.holder.note) == (
        "heterogeneous",
        "no stock gemma2 configuration takes this shape",
    )
    assert found.error() <= EXACT
    before = logits(found.model, checkpoint.probe(VOCAB))
    checkpoint.write(found.model, tokenizer(), tmp_path, torch.float32, found.holder.code)
    checkpoint.reread(tmp_path, before, checkpoint.probe(VOCAB))


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1],
    "long_factor": [2.0, 2.5],
    "original_max_position_embeddings": 32,  # the probe is longer, so both factors are used
    "factor": 2.0,
}


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "differing"])
@pytest.mark.parametrize(
    ("units", "stock"),
    [(("neuron",), True), (("layer",), True), (("channel",), False), (("group", "head", "channel"), False)],
)
def test_phi3_longrope(tmp_path: Path, units: Any, stock: bool, uniform: bool) -> None:
    """Its configuration takes the head dimension for width / heads: other widths need the class without that check."""
    model: Any = AutoModelForCausalLM.from_config(config_of("phi3", rope_parameters=LONGROPE)).eval()
    randomise(model, gains=1.0)
    anatomy = anatomy_of(model)
    kept = plan(anatomy, units, uniform=uniform)
    found = cut(model, kept)
    assert found.error() <= EXACT
    assert found.holder.kind == ("stock" if stock and kept.shape().uniform else "heterogeneous")
    before = logits(found.model, checkpoint.probe(VOCAB))
    checkpoint.write(found.model, tokenizer(), tmp_path, torch.float32, found.holder.code)
    checkpoint.reread(tmp_path, before, checkpoint.probe(VOCAB))


def test_lists_with_an_entry_a_layer_lose_the_entries_of_layers_that_go() -> None:
    model = make("gemma2")
    anatomy = anatomy_of(model)
    kept = Plan.everything(anatomy)
    found = holder(model.config, anatomy, Plan(kept.channels, (kept.layers[0], kept.layers[2])))
    assert found.config.layer_types == ["sliding_attention", "full_attention"]
    model.config.no_rope_layers = [1, 0, 1]
    found = holder(model.config, anatomy, Plan(kept.channels, kept.layers[1:]))
    assert found.config.no_rope_layers == [0, 1]
    assert found.config.layer_types == ["full_attention", "full_attention"]


def test_the_base_folders_own_code_is_not_promised() -> None:
    """A base that came with `auto_map` (Phi-3 did) is cut into a folder without that file."""
    model = make("phi3")
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    anatomy = anatomy_of(model)
    stock = holder(model.config, anatomy, plan(anatomy, ("neuron",), uniform=True))
    assert stock.kind == "stock"
    assert getattr(stock.config, "auto_map", None) is None
    other = holder(model.config, anatomy, plan(anatomy, ("neuron",), uniform=False))
    assert "modeling_phi3" not in json.dumps(other.config.auto_map)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_and_disk_run_the_same_code(kind: str) -> None:
    config = holder(
        make(kind).config, anatomy_of(make(kind)), without(anatomy_of(make(kind)), 1, attention=True)
    ).config
    made = model_class(config)
    module = sys.modules[made.__module__]
    assert "".join(__import__("linecache").getlines(module.__file__)) == render(config)
    assert config_class(kind) is config_class(f"regrow_{kind}") is type(config)


def test_built_tensors_are_not_copied() -> None:
    model = make("llama")
    anatomy = anatomy_of(model)
    kept = plan(anatomy, ("neuron",), uniform=False)
    weights = dict(slice_model(model, anatomy, kept))
    found = build(holder(model.config, anatomy, kept).config, weights)
    for name, parameter in found.named_parameters():
        assert parameter.data_ptr() == weights[name].data_ptr(), name
        assert parameter.requires_grad
    assert not found.training


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gemma2"])
@pytest.mark.parametrize("units", [("neuron",), ("head", "channel"), ("group",)], ids=["stock", "carrier", "other"])
def test_the_tokenizer_cuts_text_as_before(tmp_path: Path, sprout_dir: Path, kind: str, units: Any) -> None:
    """Which class reads tokenizer files hangs on the model type; a new type must not change what text becomes."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(sprout_dir, base, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(sprout_dir / "tokenizer_config.json", base)
    out.mkdir()
    free = {"attention_bias": False, "mlp_bias": False} if kind == "llama" else {}
    make(kind, vocab_size=2048, **free).save_pretrained(base)
    model, words = checkpoint.read(base)
    kept = plan(anatomy_of(model), units, uniform="group" not in units)
    found = cut(model, Plan(kept.channels[:16], kept.layers) if "channel" in units else kept)
    checkpoint.write(found.model, words, out, torch.float32, found.holder.code)
    _, again = checkpoint.read(out)
    text = "Once upon a time, in 1984, there was\n\n  a café — and 33 'cats'."
    assert again(text)["input_ids"] == words(text)["input_ids"]
    assert again.decode(words(text)["input_ids"]) == words.decode(words(text)["input_ids"])
