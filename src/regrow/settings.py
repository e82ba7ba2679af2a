"""A run in plain words: what a recipe file may say, checked key by key before anything is loaded.

A recipe is complete: the same file gives the same run. Flags override it. Descriptions here are the text of
docs/recipes.md; defaults of criterion, spread and calibration were chosen on held-out text (bench/defaults.py).
What this gives up: settings that hang on each other in ways that only a model can tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from regrow.errors import InputError, SettingsError, UnknownName, guess

Axis = Literal["layer", "group", "head", "neuron", "channel"]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Step = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)  # else 16 and 16.0 are two keys


class Calibration(_Part):
    """Text that scores are measured on and zeros chosen by. Only the calibration part of a source is used.

    `regrow sparsify` and `regrow.sparsify` take 8,192 tokens in blocks of 512 unless told otherwise.
    """

    text: str = Field(
        default="demo", description="demo, demo:DOMAIN, a .txt, .json, .jsonl or .parquet file, or hub:OWNER/NAME"
    )
    tokens: int = Field(default=4096, ge=1, description="how many tokens are read")
    block: int = Field(default=128, ge=8, description="tokens in a sequence")


class Sparsify(_Part):
    """Zeros in the weight matrices of the decoder layers; shapes stay. A recipe has `keep: null` then."""

    pattern: str = Field(
        default="50%",
        coerce_numbers_to_str=True,
        description="a percentage of zeros, or kept of every so many neighbours: 2:4, 2:8",
    )
    criterion: str = Field(
        default="sparsegpt", description="what scores a weight, or a solver that brings its own start; `regrow ls`"
    )
    solver: tuple[str, ...] = Field(
        default=(),
        description="what becomes of the kept weights, in turn; empty = what the criterion was published with",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="options of the solvers, by name")
    spread: str = Field(default="uniform", description="how zeros are shared among layers: uniform, owl, hessian")
    damping: float = Field(
        default=0.01, ge=0, allow_inf_nan=False, description="of the Gram matrices, as a share of their mean diagonal"
    )
    inputs: Literal["pruned", "dense", "both"] = Field(
        default="pruned",
        description="what a block reads: as pruned before it, as in the dense model (one pass), or pruned with the "
        "dense model's outputs as the target",
    )
    mend: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="with `inputs: both`, how far the target goes towards the dense model's outputs; 1 = all the way",
    )
    keep_statistics: bool = Field(
        default=False,
        description="keep what dense inputs gave, so that another pattern, criterion or solver reads no text; needs "
        "`inputs: dense`",
    )
    leave: tuple[str, ...] = Field(default=(), description="ends of names of linears that stay dense")
    also: tuple[str, ...] = Field(
        default=(), description="ends of names of routers, the embedding or the head, which stay dense unless named"
    )
    existing: Literal["refuse", "keep"] = Field(
        default="refuse", description="a model that is sparse already: refuse it, or keep every zero it has"
    )


DROPOUT = 0.05  # LLM-Pruner's, for LoRA
BASE = "base"  # the teacher that is where everything began
KEEPS, KEEPS_CUT = "spp", "hira"  # how a sparse model recovers unless another way is named; of any width when it is cut
RATES = {"lora": 3e-4, "lora-masked": 1e-3, "spp": 1e-2, "hira": 1e-2, "ia3": 1e-2}
RATES |= dict.fromkeys(("full", "cut", "ast"), 3e-5)
"""The peak rate of each way to recover. LoRA of a cut model: LLM-Pruner's. Of a sparse model: the best of three by
held-out loss (bench/spp.py); SPP, HiRA and IA3 multiply weights, and a factor that is nearer to 1 than about 1/400 is
rounded away in 16 bits. All weights: less than was best there (1e-4), since larger models bear less."""


SPARSE_CALIBRATION = {"tokens": 8192, "block": 512}
"""What zeros are chosen on where a command or the Python door is not told otherwise."""


class Distil(_Part):
    """How a student learns from its teacher; without one nothing of this is read."""

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


class Recover(_Part):
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
        default=None, ge=1, description="tokens between two losses on held-out text; null = a twentieth of all"
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


class Evaluate(_Part):
    """What is measured before and after, with the same settings."""

    text: str | None = Field(
        default="demo",
        description="the whole of a file; the held-out part of heldout:FILE or a source; null = none",
    )
    seqlen: int = Field(default=1024, ge=8, description="tokens in a block; at most what the model allows")
    max_tokens: int | None = Field(default=8192, ge=8, description="only the first so many tokens; null = all")
    tasks: tuple[str, ...] = Field(default=(), description="zero-shot tasks; `regrow ls tasks`")
    limit: int | None = Field(default=None, ge=1, description="the first so many items of each task; null = all")
    batch: int = Field(default=8, ge=1, description="choices of a task that are scored at a time")
    speed: bool = Field(default=True, description="measure speed and peak memory too")
    repeats: int = Field(default=3, ge=1, description="of each speed measurement")
    samples: tuple[str, ...] = Field(
        default=("The largest river of the continent", "Why does bread rise?", "She opened the door and"),
        description="prompts that both models continue, for the report",
    )


class Recipe(_Part):
    """A complete run."""

    name: str = Field(default="prune", description="what the report calls the run")
    about: str = Field(default="", description="one line for `regrow ls recipes`")
    paper: str = Field(default="", description="where the method is from")
    model: str = Field(default="demo", description="a hub id, a local folder, or demo")
    keep: str | None = Field(
        default="80%", description="the budget: 80%, 108M, 220MB, kv=75%, kv=12KB, flops=70%; null = no unit goes"
    )
    axes: tuple[Axis, ...] = Field(default=("neuron", "group"), min_length=1, description="kinds of units that may go")
    split: dict[Axis, Share] = Field(
        default_factory=dict, description="how much each axis loses, relative; 1 unless named"
    )
    criterion: str = Field(default="taylor-second", description="what scores the units; `regrow ls criteria`")
    criteria: dict[Axis, str] = Field(default_factory=dict, description="another criterion for single axes")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the criteria, by name")
    reduce: Literal["sum", "mean", "max", "prod", "first"] = Field(
        default="sum", description="how the scores of a unit's tensors are put together"
    )
    spread: str = Field(default="ends", description="how kept units are shared among layers; `regrow ls spreads`")
    uniform: bool = Field(default=False, description="the same widths in every layer, so that a stock class holds them")
    divisors: dict[Axis, Step] = Field(
        default_factory=dict, description="widths are multiples; 32 neurons and 64 channels when uniform, else 1"
    )
    rescale_norms: bool = Field(default=False, description="norms keep statistics over the old width (channels)")
    calibration: Calibration = Field(default=Calibration(), description="text that scores are measured on")
    sparsify: Sparsify | None = Field(default=None, description="zeros in what stays; null = none")
    recover: Recover | None = Field(default=None, description="training after the cut; null = none")
    evaluate: Evaluate = Field(default=Evaluate(), description="what is measured before and after")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of every random choice")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:N, mps")
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="what is computed in; stored in it too where the checkpoint has more bits"
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")


PARTS: dict[str, type[_Part]] = {
    "calibration": Calibration,
    "sparsify": Sparsify,
    "recover": Recover,
    "recover.distil": Distil,
    "evaluate": Evaluate,
}


def parse(data: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain data. Raises `UnknownName` for a key nobody knows and `SettingsError` for a bad value."""
    try:
        return Recipe.model_validate(dict(data))
    except ValidationError as error:
        raise _explained(error, where) from error


def _explained(error: ValidationError, where: str) -> InputError:
    """The first complaint in our words."""
    first = error.errors()[0]
    path, came = [str(part) for part in first["loc"] if part != "[key]"], first["input"]
    if first["type"] == "extra_forbidden":
        return UnknownName("recipe key", ".".join(path), _keys(path[:-1]), f"correct the key in {where}")
    if first["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        what = "axis" if path[0] in ("axes", "split", "criteria", "divisors") else ".".join(path)
        return SettingsError(
            f"{where}: unknown {what} {came!r}{guess(str(came), known)}", ", ".join(known), "name one of them"
        )
    return SettingsError(f"{where}: {'.'.join(path)} = {came!r}", first["msg"], "correct the value")


def _keys(path: list[str]) -> list[str]:
    """The keys allowed at a place in a recipe, as paths."""
    part: Any = PARTS.get(".".join(path)) if path else Recipe
    return [".".join([*path, name]) for name in (part or Recipe).model_fields]
