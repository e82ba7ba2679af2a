"""Weights spread over processes (FSDP2), and whole again: a teacher is spread as accelerate spreads its student.

Tested on two processes without a GPU, where accelerate must be talked into it; never run on GPUs. What this gives up:
FSDP of version 1, checkpoints of whole weights, and loading less than the whole model in every process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from regrow.engines.match import blocks_of
from regrow.engines.objective import Objective
from regrow.engines.on_policy import OnPolicy
from regrow.errors import SettingsError

HOOKED = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
FLAGGED = tuple(f"_forward_{which}_with_kwargs" for which in ("hooks", "pre_hooks"))


def shard(model: Any, **policy: Any) -> None:
    """Spread every block of a causal model by itself, and the rest with its root, in place.

    `policy`: what torch's `fully_shard` takes. Raises `UnsupportedModel` for a decoder without a list of blocks.
    """
    from torch.distributed.fsdp import fully_shard

    for block in blocks_of(model):
        fully_shard(block, **policy)
    fully_shard(model, **{name: value for name, value in policy.items() if name != "reshard_after_forward"})


def shard_teacher(objective: Objective, accelerator: Any) -> None:
    """Where accelerate is about to spread the student, spread the teacher of its loss by the same policy.

    Raises `SettingsError` for FSDP of version 1, for checkpoints of whole weights, which are not read back, for
    weights beside the model, which accelerate cannot place, and for a student that writes in some passes of some
    processes.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if not accelerator.is_fsdp2:
        raise SettingsError("FSDP of version 1", "fsdp_version: 2", "change it in accelerate's configuration")
    kind = str(plugin.state_dict_type)
    if "SHARDED" not in kind:
        raise SettingsError(
            f"checkpoints of whole weights ({kind})",
            "fsdp_state_dict_type: SHARDED_STATE_DICT",
            "change it in accelerate's configuration",
        )
    if objective.beside is not None and any(True for _ in objective.beside.parameters()):
        raise SettingsError(
            "weights that learn beside a sharded model, such as a projection between states",
            "a loss without any",
            "compare states of equal width or none, or train whole copies: `accelerate launch --multi_gpu`",
        )
    if isinstance(objective.loss, OnPolicy):
        raise SettingsError(
            "a sharded student that writes its own text: processes would wait for each other's passes for ever",
            "text as it is",
            "leave on_policy out, or train whole copies: `accelerate launch --multi_gpu`",
        )
    teacher = getattr(objective.loss, "teacher", None)
    if teacher is not None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        shard(
            teacher,
            reshard_after_forward=plugin.reshard_after_forward,
            offload_policy=plugin.cpu_offload,
            mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        )


@contextmanager
def whole_again(model: nn.Module) -> Iterator[None]:
    """Gives back, with whole weights on every process, a model that is sharded meanwhile; others as they are.

    Nothing is gathered after an error: other processes may not be there any more.
    """
    before: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = [
        (module, type(module), {name: module.__dict__[name].copy() for name in (*HOOKED, *FLAGGED)})
        for module in model.modules()
    ]
    yield
    spread: list[Any] = [module for module in model.modules() if hasattr(module, "reshard")]
    for module in spread:
        module.reshard()
    if not spread:
        return
    gathered: dict[int, nn.Parameter] = {}  # tied weights once
    for module, kind, hooks in before:
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            if hasattr(weight, "full_tensor") and id(weight) not in gathered:
                full: Tensor = cast(Any, weight.detach()).full_tensor()
                gathered[id(weight)] = nn.Parameter(full, weight.requires_grad)
            module._parameters[name] = gathered.get(id(weight), weight)
        module.__class__ = kind
        module.__dict__.update(hooks)
