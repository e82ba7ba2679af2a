"""Fixtures every floor may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread costs more than it brings


@pytest.fixture(scope="session")
def sprout_dir() -> Path:
    """The small trained model (`scripts/train_sprout.py`); read it, never write into it."""
    return Path(__file__).parent / "sprout"
