"""Loss of the model without each of its layers, at about half the price of running it once a layer.

The stream up to the missing layer is computed once and shared: L removals cost L(L-1)/2 layers, not L*L.
Blocks are called with the arguments each really receives (masks differ by layer in Gemma, Qwen2 and others): the
model's own forward runs once with layers replaced by stubs that record them.
What this gives up: a key/value cache; one batch of the stream is kept while its removals run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regrow.artifacts.shape import Anatomy
from regrow.engines.perplexity import head_losses
from regrow.engines.walk import Progress, body, check_finite


@torch.inference_mode()
def loss_without_layers(
    model: Any, anatomy: Anatomy, blocks: Tensor, *, progress: Progress | None = None
) -> tuple[float, Tensor]:  # loss with all layers, (L,) fp64 losses without each
    """Mean next-token loss over `blocks` (n, T) with every layer, and without each one.

    Raises `BrokenModel` naming the layer when what it adds, or the loss without it, is not finite.
    """
    layers = list(model.get_submodule(anatomy.family.layers).children())
    norm = model.get_submodule(anatomy.family.final_norm)
    whole, without = 0.0, torch.zeros(len(layers), dtype=torch.float64)
    for done, ids in enumerate(torch.split(blocks, 1), 1):
        ids = ids.to(model.device)
        first, calls = layer_arguments(model, layers, ids)

        def loss(stream: Tensor, ids: Tensor = ids) -> float:
            return float(head_losses(model, norm(stream), ids).mean())

        stream = first  # (1, T, d) entering layer i
        for i in range(len(layers)):
            skipped = stream
            for layer, (args, kwargs) in zip(layers[i + 1 :], calls[i + 1 :], strict=True):
                skipped = run_layer(layer, skipped, args, kwargs)
            without[i] += loss(skipped)
            stream = run_layer(layers[i], stream, *calls[i])
            check_finite(f"activations leaving {anatomy.family.layers}.{i}", stream)
        whole += loss(stream)
        if progress is not None:
            progress(done, len(blocks))
    for i, value in enumerate(without):
        check_finite(f"losses without {anatomy.family.layers}.{i}", value)
    return whole / len(blocks), without / len(blocks)


def run_layer(layer: nn.Module, stream: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Call a block on a stream (b, T, d) with recorded arguments."""
    output: Tensor | tuple[Tensor, ...] = layer(stream, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def layer_arguments(
    model: Any, layers: list[nn.Module], ids: Tensor
) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The stream that enters the first layer (b, T, d), and what each layer receives beside it."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    streams: list[Tensor] = []
    with _stubs(layers, calls, streams):
        body(model)(input_ids=ids, use_cache=False)
    return streams[0], calls


def enter(model: Any, layers: list[nn.Module], blocks: Tensor) -> tuple[Tensor, list[Any]]:
    """The stream (n, T, d) that enters the first block, and each block's other arguments for one sequence."""
    first, calls = layer_arguments(model, layers, blocks[:1].to(model.device))
    stream = torch.empty(len(blocks), *first.shape[1:], dtype=first.dtype, device=first.device)
    for i, ids in enumerate(torch.split(blocks, 1)):
        stream[i : i + 1], _ = layer_arguments(model, layers, ids.to(model.device))
    return stream, calls


@contextmanager
def _stubs(
    layers: list[nn.Module], calls: list[tuple[tuple[Any, ...], dict[str, Any]]], streams: list[Tensor]
) -> Iterator[None]:
    def stub(*args: Any, **kwargs: Any) -> Tensor:
        stream: Tensor = args[0] if args else kwargs.pop("hidden_states")
        streams.append(stream)
        calls.append((args[1:], kwargs))
        return stream

    try:
        for layer in layers:
            layer.forward = stub
        yield
    finally:
        for layer in layers:
            del layer.forward
