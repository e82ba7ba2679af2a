"""Runs every bench that needs no evaluation text, one after the other, then makes the pages.

The table of criteria is apart, since it reads the evaluation text: `python bench/criteria.py --text PATH`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BENCHES = ("defaults", "scoring_time", "latency", "memory", "products", "startup", "render")

if __name__ == "__main__":
    for name in BENCHES:
        subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=True)
