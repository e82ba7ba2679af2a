"""The training after a cut in plain words: what a recipe may say of its recovery, and of the teacher in it.

Part of `settings`, whose rules are its rules. What this gives up: numbers that hang on the model; the defaults of the
rates are one for each method.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)  # else 16 and 16.0 are two keys


DROPOUT = 0.05  # LLM-Pruner's, for LoRA
BASE = "base"  # the teacher that is where everything began
KEEPS, KEEPS_CUT = "spp", "hira"  # how a sparse model recovers unless another way is named; of any width when it is cut
HELDOUT_TOKENS = 4096  # of each source, that the curve of a recovery is measured on
WHOLE = ("full", "ast", "cut")  # methods that train weights themselves
WEIGHED = ("references", "excess", "balance_every")  # words about weights that follow the losses
ADAPTED = ("rank", "alpha", "dropout")  # words about adapters, which those have not
RATES = {"lora": 3e-4, "lora-masked": 1e-3, "spp": 1e-2, "hira": 1e-2, "ia3": 1e-2}
RATES |= dict.fromkeys(("full", "cut", "ast"), 3e-5)
"""The peak rate of each way to recover. LoRA of a cut model: LLM-Pruner's. Of a sparse model: the best of three by
held-out loss (bench/spp.py); SPP, HiRA and IA3 multiply weights, and a factor that is nearer to 1 than about 1/400 is
rounded away in 16 bits. All weights: less than was best there (1e-4), since larger models bear less."""


class Distil(Part):
    """How a student learns from its teacher; without one nothing of this may be asked for."""

    options: dict[str, Any] = Field(default_factory=dict, description="options of the loss: temperature, beta")
    text: float = Field(
        default=0, ge=0, allow_inf_nan=False, description="weight of the text's next token beside the teacher"
    )
    states: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(),
        description="places where states are compared too: 0 is what the first block receives, n what the n-th block "
        "from the end gives; [0, 4] after a deep cut of layers, none otherwise",
    )
    likeness: str = Field(default="cosine", description="how states are compared; `regrow ls losses`")
    likeness_options: dict[str, Any] = Field(
        default_factory=dict, description="its options, such as heads of relations"
    )
    weight: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="of that comparison; null = in every pass as much as the loss has",
    )
    lag: int | None = Field(
        default=None,
        ge=1,
        description="of a model that grows sparse in levels: it learns from what it was so many of them before, and "
        "from the teacher until there are as many; null = from the teacher always",
    )
    teacher_dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None,
        description="what the teacher computes in; null = as the run does, on a GPU as its files are stored",
    )
    teacher_tokens: int = Field(
        default=0, ge=0, description="tokens of the same text on which the teacher itself is trained first, all of it"
    )
    teacher_share: float = Field(
        default=0.2,
        gt=0,
        allow_inf_nan=False,
        description="its peak rate, as a share of `recover.learning_rate`; where adapters learn, of the rate of `full`",
    )
    cache: int | None = Field(
        default=None,
        gt=100,
        description="ask the teacher once, before the training, and keep so many of the likeliest tokens of each "
        "position on disk (8 bytes each), with the chance of all others; null = it stays in memory and is asked anew",
    )
    preferences: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="instead of `loss`: what the teacher writes shall be so many nats likelier than what the student "
        "wrote at the start (PLaD's margin); null = off",
    )
    by_length: bool = Field(default=False, description="of `preferences`: nats a token, not of the whole continuation")
    prompt: float = Field(default=0.5, gt=0, lt=1, description="share of a block that models go on from")
    sampling: float = Field(default=0.9, gt=0, allow_inf_nan=False, description="temperature at which models write")
    on_policy: float = Field(
        default=0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of passes in which the student writes the rest of every block, and learns on that alone",
    )
    online_rate: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="peak rate of LoRA in the teacher, which learns beside the student; null = it stays as it is",
    )
    online_rank: int = Field(default=8, ge=1, description="of that LoRA")
    online_pull: float = Field(
        default=1,
        ge=0,
        allow_inf_nan=False,
        description="how heavily the student's predictions weigh in what the teacher learns, beside the text's next "
        "token; 0 = it is corrected beside its student",
    )


class Recover(Part):
    """Training after the cut. Only the recovery part of a source is used."""

    method: Literal["lora", "lora-masked", "spp", "hira", "ia3", "full", "cut", "ast"] = Field(
        default="lora",
        description="adapters that are merged, all weights (full, ast), or norms and what was cut (cut); of a sparse "
        "model, lora fills the zeros, "
        f"ast moves them, and the others keep every one: {KEEPS} is its default",
    )
    tokens: int = Field(default=100_000, ge=0, description="how many tokens are trained on; 0 = no recovery")
    text: str = Field(default="demo", description="as in `calibration`")
    mixture: dict[str, float] = Field(
        default_factory=dict,
        description="several sources instead of `text` and how much is read of each, relative: {demo:squad: 1, ...}",
    )
    balance: Literal["fixed", "dynamic"] = Field(
        default="fixed",
        description="weights of the mixture: fixed, or more of what is further above its reference (Sheared LLaMA)",
    )
    balance_every: int | None = Field(
        default=None, ge=1, description="tokens between two updates of the weights; null = 50 steps"
    )
    references: dict[str, float] = Field(
        default_factory=dict,
        description="a held-out loss in nats for each source, to compare with; empty = the teacher's, without one that "
        "of the model which the run begins with",
    )
    excess: Literal["signed", "positive"] = Field(
        default="signed",
        description="a source below its reference loses weight (signed), or counts as one that has reached it",
    )
    template: Literal["alpaca", "chat"] | None = Field(
        default=None,
        description="how instructions are written; null = chat where the tokenizer has a chat template, else alpaca",
    )
    learn: Literal["all", "answers"] = Field(
        default="all", description="of instructions: what is asked too (as SPP does), or answers alone"
    )
    block: int = Field(default=256, ge=8, description="tokens in a sequence")
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="the peak; null = the method's own: "
        + ", ".join(f"{name} {rate:g}" for name, rate in RATES.items()),
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine", description="of the learning rate; wsd: warm up, stay, decay over the last fifth"
    )
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps")
    floor: float = Field(default=0, ge=0, le=1, description="share of the peak rate that is left at the end")
    weight_decay: float = Field(default=0, ge=0, allow_inf_nan=False, description="of matrices; vectors do not decay")
    clip: float = Field(default=1, ge=0, allow_inf_nan=False, description="largest norm of a gradient; 0 = no limit")
    batch: int = Field(default=8, ge=1, description="sequences in a step")
    micro_batch: int = Field(default=4, ge=1, description="sequences in one pass; must divide `batch`")
    rank: int = Field(default=8, ge=1, description="of the adapters (not of ia3)")
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="adapters are scaled by alpha / rank (lora, lora-masked, spp); null = twice the rank",
    )
    dropout: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description=f"before the adapters; null = the method's own: {DROPOUT:g} of lora and lora-masked, else 0",
    )
    checkpointing: bool = Field(default=False, description="less memory, more time")
    autocast: Literal["fp32", "bf16"] = Field(
        default="fp32", description="what products are computed in while training, of weights in fp32"
    )
    evaluate_every: int | None = Field(
        default=None,
        ge=1,
        description="tokens between two losses on held-out text; null = a twentieth of all, or as many as are held "
        f"out ({HELDOUT_TOKENS:,} of each source) if that is more",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="stop when held-out loss has not been lower for so many of them, and keep the best; null = never",
    )
    report_to: tuple[str, ...] = Field(
        default=(), description="tensorboard, wandb ...: what transformers reports to; train.jsonl is always written"
    )
    resume: bool = Field(default=True, description="go on where an interrupted recovery of the same kind stopped")
    until: int | None = Field(
        default=None,
        ge=1,
        description="leave after so many tokens of it, with the rates of the whole; the same with a larger one goes on",
    )
    teacher: str | None = Field(
        default=None,
        description="learn from this model's predictions instead of the text's next token; same tokenizer; "
        "base = the model that all steps before began with",
    )
    loss: str = Field(default="forward-kl", description="how far from the teacher; `regrow ls losses`")
    distil: Distil = Field(default=Distil(), description="how the student learns from its teacher")

    @property
    def sources(self) -> tuple[str, ...]:
        """Where its text comes from."""
        return tuple(sorted(self.mixture)) or (self.text,)

    @property
    def by_pass(self) -> bool:
        """Whether it hangs on `micro_batch` where it ends: what a loss weighs, or a student writes, is of a pass."""
        asked = self.distil
        return self.teacher is not None and (asked.on_policy > 0 or (bool(asked.states) and asked.weight is None))

    @field_validator("alpha")
    @classmethod
    def _own_alpha(cls, alpha: float | None, info: ValidationInfo) -> float | None:
        return 2.0 * info.data["rank"] if alpha is None and "rank" in info.data else alpha

    @field_validator("dropout")
    @classmethod
    def _own_dropout(cls, dropout: float | None, info: ValidationInfo) -> float:
        """SPP's fastest form has none."""
        own = DROPOUT if str(info.data.get("method", "")).startswith("lora") else 0.0
        return own if dropout is None else dropout

    @field_validator("learning_rate")
    @classmethod
    def _own_rate(cls, rate: float | None, info: ValidationInfo) -> float | None:
        """A recipe says its rate wherever it is written down."""
        return RATES.get(info.data.get("method", "")) if rate is None else rate
