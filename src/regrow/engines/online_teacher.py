"""A teacher that comes to meet its student: adapters in it learn beside the student, its own weights stay: OKD.

In every step the student lowers its distance from the teacher, and the teacher its loss of the next token and `pull`
times its distance from the student; each takes the other as it is. Which modules and weights the paper has is not known
here: they are LoRA on every linear of the layers, and 1 (arXiv:2409.12512). Without a pull the teacher learns the text
alone: it is corrected beside its student instead of before (Minitron, arXiv:2408.11796). The loss on record is the
student's.
What this gives up: a teacher without gradients, and with it memory and time; one that is as it was afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regrow.artifacts.goal import Divergence
from regrow.engines.adapters import add_adapters
from regrow.engines.distil import FromTeacher, targets
from regrow.engines.match import Matcher
from regrow.engines.objective import Answer, Objective
from regrow.engines.packed import learnt


class Online(NamedTuple):
    """How a teacher learns: adapters of `rank`, drawn from `seed`, at the peak rate `rate`; how heavily the student's
    predictions weigh beside the next token."""

    rate: float
    rank: int = 8
    seed: int = 0
    pull: float = 1.0


class FromOnlineTeacher(FromTeacher):
    """The loss (model, batch) of `FromTeacher`, and beside it what its teacher lowers.

    The teacher is given adapters that learn as `online` says, and stay in it. Raises `SettingsError`
    when it has no linear for them, and what `FromTeacher` raises.
    """

    def __init__(
        self,
        teacher: Any,
        divergence: Divergence,
        options: Mapping[str, Any] | None = None,
        *,
        online: Online,
        text: float = 0.0,
        matcher: Matcher | None = None,
    ) -> None:
        super().__init__(teacher, divergence, options, text=text, matcher=matcher)
        rate, rank, seed, self.pull = online
        adapted = add_adapters(teacher, rank=rank, alpha=2 * rank, dropout=0.0, seed=seed).eval()
        self.adapters = nn.ParameterList(p for p in adapted.parameters() if p.requires_grad)
        self.rate = rate
        self.__name__ += f", who learns too: rank {rank} at {rate:g} from seed {seed}, pulled by {self.pull:g}"

    @property
    def objective(self) -> Objective:
        parts = {"teacher": self.adapters, **({} if self.matcher is None else {"matcher": self.matcher})}
        apart = ({"params": list(self.adapters), "lr": self.rate},)
        return Objective(self, beside=nn.ModuleDict(parts), apart=apart)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Answer:
        ids, mask = batch["input_ids"], learnt(batch)  # (b, T), (b, T - 1)
        told = self.run(self.teacher, ids, mask, "teacher")
        own = self.run(model, ids, mask, "student")
        still = {place: state.detach() for place, state in told.heard.items()}
        answer = self.compare(told._replace(heard=still), own, batch)
        if not torch.is_grad_enabled():
            return answer
        loss, parts = answer if isinstance(answer, tuple) else (answer, {})
        taught, also = self.predictions(
            own.head, told.head, own.states, told.states, following=targets(batch), text=1.0, weight=self.pull
        )
        theirs = {f"teacher_{name}": value for name, value in also.items()}
        return loss + (taught - taught.detach()), {**parts, **theirs}  # the teacher's gradients, the student's number
