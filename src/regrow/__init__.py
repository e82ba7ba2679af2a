"""regrow: cut a large language model back and let it regrow.

The one door. Names are imported when they are first used, so `import regrow` is quick and quiet.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regrow.artifacts.budget import Budget
    from regrow.artifacts.family import Branch, Cut, Family, declare
    from regrow.artifacts.plan import Plan
    from regrow.artifacts.report import Report
    from regrow.artifacts.scores import Scores
    from regrow.artifacts.shape import Shape, costs, count
    from regrow.artifacts.sight import Sight, criterion
    from regrow.door import prune, recover, sparsify
    from regrow.engines.gates import gated
    from regrow.engines.spp import SppConfig
    from regrow.errors import RegrowError
    from regrow.settings import Recipe
    from regrow.stages.load import load

_HOMES = {
    "Branch": "artifacts.family",
    "Budget": "artifacts.budget",
    "Cut": "artifacts.family",
    "Family": "artifacts.family",
    "Plan": "artifacts.plan",
    "Recipe": "settings",
    "RegrowError": "errors",
    "Report": "artifacts.report",
    "Scores": "artifacts.scores",
    "Shape": "artifacts.shape",
    "Sight": "artifacts.sight",
    "SppConfig": "engines.spp",
    "costs": "artifacts.shape",
    "count": "artifacts.shape",
    "criterion": "artifacts.sight",
    "declare": "artifacts.family",
    "gated": "engines.gates",
    "load": "stages.load",
    "prune": "door",
    "recover": "door",
    "sparsify": "door",
}

__version__ = "0.1.0"
__all__ = [
    "Branch", "Budget", "Cut", "Family", "Plan", "Recipe", "RegrowError", "Report", "Scores", "Shape", "Sight",
    "SppConfig",
    "costs", "count", "criterion", "declare", "gated", "load", "prune",
    "recover", "sparsify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'regrow' has no attribute {name!r}")
    return getattr(import_module(f"regrow.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
