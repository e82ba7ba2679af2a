"""Fixtures every floor may use."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def sprout_dir() -> Path:
    """The small trained model (`scripts/train_sprout.py`); read it, never write into it."""
    return Path(__file__).parent / "sprout"
