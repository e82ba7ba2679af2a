"""Gates that learn what to cut, in plain words: what a recipe may say of the training that decides which units stay.

Part of `settings`, whose rules are its rules. It is a training, so it has all words of `recovery`.
What this gives up: numbers that hang on the model.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from regrow.recovery import Recover

LEARN_RATES = {"lora": 1e-3, "full": 1e-4, "none": 6e-3}
"""The peak rate of the weights beside the gates: NutePrune's of LoRA, Sheared LLaMA's of all weights; that of chances
where no weight learns (arXiv:2406.10576)."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Learn(Recover):
    """A training in which gates learn which units stay, beside the weights; all keys of `recover` hold here too.

    Of the teacher: it is the model itself, as `teachers` says, so `teacher` stays null; of `distil` there are
    `options`, `text` and `likeness`.
    """

    method: Literal["lora", "full", "none"] = Field(  # type: ignore[assignment]
        default="lora", description="what learns beside the gates; none: policy-gradient, whose rate it is then"
    )
    tokens: int = Field(default=160_000, ge=1, description="how many tokens are trained on")
    block: int = Field(default=128, ge=8, description="tokens in a sequence")
    batch: int = Field(default=2, ge=1, description="sequences in a step; gates need hundreds of steps")
    micro_batch: int = Field(default=2, ge=1, description="sequences in one pass, which has one draw of the gates")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="linear", description="of the rate of the weights; gates have their own"
    )
    warmup: float = Field(default=0, ge=0, lt=1, description="share of the steps, of the rate of the weights")
    gates: Literal["hard-concrete", "sheared", "policy-gradient"] = Field(
        default="hard-concrete",
        description="how they learn: with gradients towards a share of the weights, or towards widths that are the "
        "same in every layer (sheared), or from losses of drawn masks alone, with no gradient and no other training",
    )
    targets: tuple[str, ...] = Field(
        default=(), description="ends of names of linears that get adapters; empty = every one inside the layers"
    )
    teachers: Literal["numerous", "dense", "none"] = Field(
        default="numerous",
        description="whom it learns from: what it was when it was a little less sparse, the model as it was, or the "
        "text alone",
    )
    choice: Literal["count", "gap"] = Field(
        default="count", description="which of them: so many records behind (`lag`), or about so far away (`gap`)"
    )
    spacing: float = Field(default=0.01, gt=0, lt=1, description="sparsity between two records of it")
    lag: int = Field(default=10, ge=1, description="how many records the teacher is behind")
    gap: Positive = Field(default=0.1, description="nats a token that the teacher shall be away, with `choice: gap`")
    records: Literal["memory", "disk"] = Field(default="memory", description="where records are kept")
    most_records: int = Field(default=200, ge=1, description="more of them are refused: each has gates and adapters")
    logits: Positive = Field(
        default=51.2,
        description="weight of the loss of predictions, a token on average (NutePrune's at 512 tokens), which has the "
        "temperature squared in it",
    )
    hidden: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0.9, description="weight of the comparison of states, summed over blocks"
    )
    places: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None,
        description="blocks whose states are compared: n is the n-th from the end, 1 what the head receives; "
        "null = all of them",
    )
    gate_rate: Positive = Field(default=0.1, description="rate of the gates")
    multiplier_rate: Positive | None = Field(
        default=None,
        description="rate of the multipliers that pull to the size; null = NutePrune's 0.1, and as much more as there "
        "are fewer than 12,000 steps",
    )
    start: Literal["scores", "even"] = Field(
        default="scores",
        description="where gates begin: the lower the score of a unit by `criterion`, the lower; or all alike, as "
        "published",
    )
    unwind: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1,
        description="share of its pull that a multiplier loses in a step in which its aim is passed; 0 as published",
    )
    follow: bool = Field(default=False, description="these two rise and fall as that of the weights does")
    ramp: str = Field(default="linear", description="how the sparsity rises: linear or cubic; `regrow ls ramps`")
    rise: Share = Field(default=0.4, description="share of the steps in which it rises")
    anneal: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        default=0, description="share of the steps, the last, in which the units that stay are fixed and gates go to 1"
    )
    tolerance: Positive = Field(
        default=0.02, description="how far from its aim the sparsity may end; more, and nothing is cut"
    )
    skip: int = Field(default=10, ge=0, description="steps at most that may be left out for a loss that is not finite")
    masks: int = Field(default=2, ge=2, description="of policy-gradient: masks that are tried in a step")
    window: int = Field(default=5, ge=1, description="of policy-gradient: steps that the usual loss is a mean of")

    @property
    def scored(self) -> bool:
        """Whether it begins after scores."""
        return self.gates == "policy-gradient" or self.start == "scores"

    @field_validator("alpha")
    @classmethod
    def _own_alpha(cls, alpha: float | None, info: ValidationInfo) -> float | None:
        return float(info.data["rank"]) if alpha is None and "rank" in info.data else alpha

    @field_validator("dropout")
    @classmethod
    def _own_dropout(cls, dropout: float | None, info: ValidationInfo) -> float:  # noqa: ARG003
        return dropout or 0.0

    @field_validator("learning_rate")
    @classmethod
    def _own_rate(cls, rate: float | None, info: ValidationInfo) -> float | None:
        return LEARN_RATES.get(info.data.get("method", "")) if rate is None else rate
