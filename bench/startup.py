"""How long a user waits: `regrow --help`, `import regrow`, and the whole demo run with a warm model cache.

The demo is `regrow run demo`, after installation and conversion of the model.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ledger import Ledger

REGROW = str(Path(sys.executable).with_name("regrow"))


def main() -> None:
    ledger = Ledger("startup", __doc__ or "", repeats=9)
    ledger.row("regrow --help", lambda: repeated([REGROW, "--help"]))
    ledger.row("import regrow", lambda: repeated([sys.executable, "-c", "import regrow"]))
    ledger.row("regrow run demo", demo)


def repeated(words: list[str]) -> dict[str, Any]:
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        subprocess.run(words, check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds[1:]), "std": statistics.stdev(seconds[1:])}


def demo() -> dict[str, Any]:
    """Once, with nothing in the cache but the converted model."""
    warm = Path(os.environ.get("REGROW_CACHE") or Path.home() / ".cache/regrow")
    with tempfile.TemporaryDirectory() as cache:
        (Path(cache) / "demo").symlink_to(warm / "demo")
        began = time.perf_counter()
        out = Path(cache) / "out"
        subprocess.run(
            [REGROW, "run", "demo", "--out", str(out), "-q"], check=True, env={**os.environ, "REGROW_CACHE": cache}
        )
        return {"seconds": time.perf_counter() - began}


if __name__ == "__main__":
    main()
