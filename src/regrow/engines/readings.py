"""What the blocks of a dense model read, kept on disk: another ratio, pattern or solver on the same text runs no block.

Only a pass over dense inputs can be kept; behind pruned blocks every method reads something else. One file a block,
half of each Gram matrix. What this gives up: disk, four bytes for every pair of inputs that a linear reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from regrow.cache import replacing
from regrow.engines.inputs import Reading

SERVED_BY = {
    "inputs": ("inputs", "moments", "gram", "all"),
    "moments": ("moments", "all"),
    "gram": ("gram", "all"),
    "all": ("all",),
}
"""What was read for one purpose holds what another needs."""


@dataclass(frozen=True, slots=True)
class Readings:
    """Those of one model on one text, in `folder`; `layers` blocks."""

    folder: Path
    layers: int

    def holds(self, sees: str, routed: bool) -> bool:
        """Whether every block's readings are there."""
        return self._kind(sees, routed) is not None

    def load(self, layer: int, sees: str, routed: bool, device: torch.device) -> dict[str, Reading]:
        """The readings of a block by site, on `device`; linears with one input share one object."""
        kind = self._kind(sees, routed)
        assert kind is not None
        with safe_open(self._path(layer, kind), "pt", device=str(device)) as file:
            leaders: dict[str, str] = file.metadata()
            names = {leader: [k for k in file.keys() if k.startswith(f"{leader}:")] for leader in leaders.values()}  # noqa: SIM118
            found = {
                leader: Reading.made_of({key.partition(":")[2]: file.get_tensor(key) for key in keys}, sees)
                for leader, keys in names.items()
            }
        return {site: found[leader] for site, leader in leaders.items()}

    def save(self, layer: int, sees: str, routed: bool, readings: dict[str, Reading]) -> None:
        leaders: dict[int, str] = {}
        for site, reading in readings.items():
            leaders.setdefault(id(reading), site)
        tensors = {
            f"{leader}:{name}": tensor
            for leader in leaders.values()
            for name, tensor in readings[leader].tensors().items()
        }
        shared = {site: leaders[id(reading)] for site, reading in readings.items()}
        with replacing(self._path(layer, _kind(sees, routed))) as partial:
            save_file(tensors, partial, metadata=shared)

    def _kind(self, sees: str, routed: bool) -> str | None:
        """The first kind of reading that serves and is there for every block."""
        for kind in (_kind(other, routed) for other in SERVED_BY[sees]):
            if all(self._path(layer, kind).exists() for layer in range(self.layers)):
                return kind
        return None

    def _path(self, layer: int, kind: str) -> Path:
        return self.folder / f"{kind}-{layer}.safetensors"


def _kind(sees: str, routed: bool) -> str:
    return f"{sees}-routed" if routed else sees
