"""Who speaks: one copy of a model's weights, and the adapters and gates of a student and of many teachers.

A teacher is not copied into the model: for one pass the adapters point at his numbers, and back afterwards, also after
an error. What this gives up: teachers that differ in more than adapters and gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regrow.artifacts.family import UNITS, Unit
from regrow.cache import replacing
from regrow.errors import BrokenModel, OutputError

ADAPTERS = "adapters"


@dataclass(frozen=True, slots=True)
class Record:
    """What a teacher is beside the weights that all share."""

    gates: Mapping[Unit, Tensor]
    adapters: Tensor  # (n,) fp32, all of them in a row

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {unit: value for unit, value in self.gates.items()}  # noqa: C416
        return {**found, ADAPTERS: self.adapters}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Record:
        return Record({unit: tensors[unit] for unit in UNITS if unit in tensors}, tensors[ADAPTERS])


class Bank:
    """The adapters of a model: what they say now, written down; and others in their place."""

    def __init__(self, model: Any) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self.layers: Sequence[Any] = layers
        self.parameters = [
            p for layer in layers for name in layer.adapter_layer_names for p in getattr(layer, name).parameters()
        ]

    @torch.no_grad()
    def written(self) -> Tensor:  # (n,) fp32, on the CPU
        if not self.parameters:
            return torch.zeros(0)
        return torch.cat([p.detach().flatten().float().cpu() for p in self.parameters])

    @contextmanager
    def speaking(self, adapters: Tensor | None) -> Iterator[None]:
        """For a pass without gradients: these adapters (n,) in place of the model's own; None turns them off."""
        own = [p.data for p in self.parameters]
        off = [layer._disable_adapters for layer in self.layers]  # its public switch freezes them too
        try:
            if adapters is None:
                for layer in self.layers:
                    layer._disable_adapters = True
            else:
                parts = torch.split(adapters, [p.numel() for p in self.parameters])
                for p, part in zip(self.parameters, parts, strict=True):
                    p.data = part.view_as(p).to(p)
            yield
        finally:
            for p, data in zip(self.parameters, own, strict=True):
                p.data = data
            for layer, was in zip(self.layers, off, strict=True):
                layer._disable_adapters = was


class Shelf(nn.Module):
    """Records in the order in which they were written, in memory or in a `folder`; part of a checkpoint in either case.

    In a folder they are a file each, and a checkpoint holds their number alone. What is read again is kept until
    another is.
    """

    count: Tensor  # () int64

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.folder, self.records = folder, list[Record]()
        self.last: tuple[int, Record] | None = None
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return int(self.count)

    def add(self, record: Record) -> None:
        """Raises `OutputError` when it cannot be written."""
        if self.folder is None:
            self.records.append(record)
        else:
            path = self._path(len(self))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as partial:
                    save_file({name: value.contiguous() for name, value in record.tensors().items()}, partial)
            except (OSError, SafetensorError) as error:
                raise OutputError(
                    f"a teacher's record cannot be written to {path}: {error}",
                    "room for adapters and gates of every teacher",
                    "free some, and give the same command again: it goes on from the newest checkpoint",
                ) from error
            self.last = None
        self.count += 1

    def __getitem__(self, index: int) -> Record:
        """Raises `BrokenModel` for a file that has gone."""
        if self.folder is None:
            return self.records[index]
        if self.last is None or self.last[0] != index:
            try:
                self.last = index, Record.of(load_file(self._path(index)))
            except (OSError, SafetensorError) as error:
                raise BrokenModel(
                    f"the record of a teacher, {self._path(index)}, cannot be read: {error}",
                    "the files of a training as it wrote them",
                    "start the training anew, with resume off",
                ) from error
        return self.last[1]

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{index:04}.safetensors"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for index, record in enumerate(self.records):
            for name, value in record.tensors().items():
                destination[f"{prefix}{index:04}.{name}"] = value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own: dict[str, dict[str, Tensor]] = {}
        for key in [key for key in state_dict if key.startswith(prefix) and key != f"{prefix}count"]:
            number, name = key.removeprefix(prefix).split(".", 1)
            own.setdefault(number, {})[name] = state_dict.pop(key)
        self.records, self.last = [Record.of(own[number]) for number in sorted(own)], None
        super()._load_from_state_dict(state_dict, prefix, *rest)
