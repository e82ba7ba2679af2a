"""Counts the zeros of a model in memory or of a folder, tensor by tensor, and tells whether a pattern is intact.

Experts that a folder keeps apart are stacked as they are in memory, so both give one count and one hash. What this
gives up: a few zeros outside the decoder layers, which are nobody's pattern.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from regrow.artifacts.pattern import Pattern
from regrow.artifacts.shape import Anatomy
from regrow.artifacts.sparsity import GROUPS, SPARSE, Sparsity, Zeros
from regrow.engines.checkpoint import weight_files
from regrow.errors import BrokenModel

KERNELS = {"cuSPARSELt": (16, 16), "CUTLASS": (32, 64)}
"""Rows and columns of a 16-bit matrix are multiples of these for torch's semi-structured kernels
(torch/sparse/semi_structured.py)."""
APART: dict[str, tuple[tuple[str, ...], ...]] = {
    "mlp.experts.gate_up_proj": (
        ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
        ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
    ),
    "mlp.experts.down_proj": (("mlp.experts.{}.down_proj.weight",), ("block_sparse_moe.experts.{}.w2.weight",)),
}
"""What hubs call the parts of a stack of experts, one expert at a time; parts lie below each other."""

RENAMED = ((".mlp.gate.", ".block_sparse_moe.gate."), ("lm_head.", "embed_out."))
"""What matrices are called in memory, and in the files of Mixtral (its routers) and GPT-NeoX (its head)."""


def prunable(anatomy: Anatomy) -> list[str]:
    """Names of the weight matrices inside decoder layers, in the model's order; routers are not among them."""
    routers = tuple(f".{path}.weight" for path in anatomy.family.routers)
    return [
        tensor.name
        for tensor in anatomy.tensors
        if tensor.layer is not None and tensor.matrix and not (routers and tensor.name.endswith(routers))
    ]


def spared(anatomy: Anatomy) -> list[str]:
    """Names of the other matrices, which stay dense unless somebody names them: routers, the embedding, a head."""
    usual = set(prunable(anatomy))
    return [tensor.name for tensor in anatomy.tensors if tensor.matrix and tensor.name not in usual]


def counted(weights: Callable[[str], Tensor | None], anatomy: Anatomy) -> list[str]:
    """Names of the matrices whose zeros count: those inside decoder layers, and of the others what is sparse.

    Rows that are nothing but zeros are no sign of that: they pad, or belong to tokens and experts that nobody uses.
    """

    def sparse(weight: Tensor | None) -> bool:
        if weight is None:
            return False
        full = (weight != 0).sum(-1)  # (rows,) weights that are not zero
        live = int((full > 0).sum()) * weight.shape[-1]
        return live > 0 and live - int(full.sum()) >= SPARSE * live

    return [*prunable(anatomy), *(name for name in spared(anatomy) if sparse(weights(name)))]


def census(tensors: Iterable[tuple[str, Tensor]], pattern: Pattern | None = None) -> Sparsity:
    """Count (name, weight) one at a time; weights are (m, n), or (experts, m, n). Groups as large as those of the
    `pattern` are looked at too."""
    sizes = sorted({*GROUPS, pattern.of} if pattern is not None and pattern.of else GROUPS)
    digest, found = hashlib.sha256(), []
    for name, weight in tensors:
        empty = weight == 0
        digest.update(name.encode() + packed(empty))
        most = {}
        for of in sizes:
            if weight.shape[-1] % of == 0:
                groups = (~empty).reshape(*weight.shape[:-1], -1, of)
                most[of] = int(groups.sum(-1).max())
        found.append(Zeros(name, tuple(weight.shape), int(empty.sum()), most))
    return Sparsity(tuple(found), digest.hexdigest()[:16])


def packed(mask: Tensor) -> bytes:
    """A boolean tensor as bits."""
    import numpy as np

    return bytes(np.packbits(mask.cpu().numpy()).tobytes())


def of_model(model: Any, anatomy: Anatomy, pattern: Pattern | None = None) -> Sparsity:
    """The zeros of a model in memory, of what a cut has left of its anatomy."""
    return census(((name, weight.detach()) for name, weight in left(model, anatomy).items()), pattern)


def left(model: Any, anatomy: Anatomy) -> dict[str, Tensor]:
    """The weights whose zeros count, by name; layers that were removed have none."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in counted(parameters.get, anatomy) if name in parameters}


def of_folder(folder: Path, names: list[str], pattern: Pattern | None = None) -> Sparsity:
    """The zeros of a checkpoint, without building the model."""
    return census(stored(folder, names), pattern)


def names_in(folder: Path, anatomy: Anatomy) -> list[str]:
    """Names of the matrices of a checkpoint whose zeros count."""
    where = _places(folder)
    return counted(lambda name: _read(name, where) if _kept(name, where) else None, anatomy)


def stored(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) out of the safetensors files of a folder, one at a time, in the order of `names`.

    Raises `BrokenModel` for a name that is not there.
    """
    where = _places(folder)
    for name in names:
        yield name, torch.stack(experts) if (experts := _apart(name, where)) else _read(name, where)


def _places(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    where: dict[str, Path] = {}
    for name in weight_files(folder):
        with safe_open(folder / name, "pt") as file:
            where.update(dict.fromkeys(file.keys(), folder / name))
    return where


def _kept(name: str, where: Mapping[str, Path]) -> str | None:
    """What a folder calls a matrix; None when it has none."""
    names = (name, *(name.replace(*pair) for pair in RENAMED))
    return next((found for found in names if found in where), None)


def _read(name: str, where: Mapping[str, Path]) -> Tensor:
    kept = _kept(name, where)
    if kept is None:
        raise BrokenModel(
            f"no weight is called {name}",
            "a folder whose weights have the names of the model's parameters",
            "load the model with transformers and save it again",
        )
    with safe_open(where[kept], "pt") as file:
        found: Tensor = file.get_tensor(kept)
    return found


def _apart(name: str, where: Mapping[str, Path]) -> list[Tensor]:
    """The experts of a stack that a folder keeps one by one; none when it keeps the stack."""
    layer, _, stack = re.sub(r"(\.\d+)\.", r"\1\n", name, count=1).partition("\n")
    for parts in APART.get(stack, ()):
        found: list[Tensor] = []
        while f"{layer}.{parts[0].format(len(found))}" in where:
            expert = len(found)
            found.append(torch.cat([_read(f"{layer}.{part.format(expert)}", where) for part in parts]))
        if found:
            return found
    return []


def semi_structured(sparsity: Sparsity) -> dict[str, str]:
    """Why some of torch's 2:4 kernels on NVIDIA cannot use a matrix, by name; those that all can use are not listed."""
    found = {}
    for matrix in sparsity.matrices:
        rows, columns = matrix.shape[-2:]
        if not matrix.keeps(2, 4):
            found[matrix.name] = "some group of four has more than two weights"
        elif len(matrix.shape) > 2:
            found[matrix.name] = "experts are stacked in one tensor"
        else:
            unfit = [f"{a} x {b} ({kernel})" for kernel, (a, b) in KERNELS.items() if rows % a or columns % b]
            if unfit:
                found[matrix.name] = f"{rows} x {columns} is no multiple of {' or '.join(unfit)}"
    return found


@torch.no_grad()
def lost(before: Iterable[tuple[str, Tensor]], after: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Zeros of `before` that are none in `after`, by name; the same names in the same order."""
    found = {}
    for (name, old), (other, new) in zip(before, after, strict=True):
        assert name == other
        gone = int(((old == 0) & (new != 0)).sum())
        if gone:
            found[name] = gone
    return found
