"""Peak anonymous memory of `regrow prune` on SmolLM2, above importing the libraries, in copies of the model in fp32.

Each criterion runs in a process of its own. Measuring text, tasks and speed is switched off: what is asked is the
price of scoring, cutting, writing and rereading. One batch of activations is measured apart: a forward (or forward
and backward) over one calibration sequence, above the loaded model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from ledger import Ledger

CRITERIA = ("magnitude", "activation", "taylor", "taylor-vectorize", "taylor-second", "taylor-mix")
TOKENS, BLOCK = 1024, 128


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(batch(sys.argv[2] == "backward") if sys.argv[1] == "batch" else prune(sys.argv[1])))
        return
    ledger = Ledger("memory", __doc__ or "", model="demo", tokens=TOKENS, block=BLOCK, keep="80%")
    for kind in ("forward", "backward"):
        ledger.row(f"one batch {kind}", partial(child_of, __file__, "batch", kind))
    for criterion in CRITERIA:
        ledger.row(criterion, partial(child_of, __file__, criterion))


def child_of(script: str, *words: str) -> dict[str, Any]:
    """A script in a fresh process; its last line is JSON."""
    done = subprocess.run(
        [sys.executable, script, *words], stdout=subprocess.PIPE, text=True, check=True, env=os.environ
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def libraries() -> None:
    """Everything a run imports."""
    import lm_eval.models.huggingface
    import peft

    import regrow.run
    from regrow.cli.finish import pages

    assert all((peft, lm_eval, regrow.run, pages))


def prune(criterion: str) -> dict[str, Any]:
    libraries()
    from regrow.cli.console import hush
    from regrow.cli.finish import pages
    from regrow.engines.clock import PeakMemory
    from regrow.run import run
    from regrow.settings import parse

    hush()
    with tempfile.TemporaryDirectory() as cache:
        demo = Path(os.environ.get("REGROW_CACHE") or Path.home() / ".cache/regrow")
        (Path(cache) / "demo").symlink_to(demo / "demo")
        os.environ["REGROW_CACHE"] = cache
        asked = {
            "criterion": criterion,
            "calibration": {"tokens": TOKENS, "block": BLOCK},
            "evaluate": {"text": None, "speed": False, "samples": []},
        }
        with PeakMemory() as memory:
            report = run(parse(asked), Path(cache) / "out", page=pages)
    model = 4 * report.before["size/parameters"].value
    return {"bytes": memory.bytes, "copies": memory.bytes / model, "model_bytes": model, "how": memory.how}


def batch(backward: bool) -> dict[str, Any]:
    libraries()
    import torch

    from regrow.engines.clock import PeakMemory
    from regrow.stages.load import load

    subject = load("demo")
    model: Any = subject.model
    ids = torch.randint(0, 40000, (1, BLOCK))
    with PeakMemory() as memory:
        if backward:
            model.requires_grad_(False)
            embeddings = model.get_input_embeddings()(ids).requires_grad_(True)
            model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss.backward()
        else:
            with torch.inference_mode():
                model(input_ids=ids, use_cache=False)
    model_bytes = 4 * sum(p.numel() for p in model.parameters())
    return {"bytes": memory.bytes, "copies": memory.bytes / model_bytes, "model_bytes": model_bytes, "how": memory.how}


if __name__ == "__main__":
    main()
