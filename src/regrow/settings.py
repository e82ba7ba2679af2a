"""A run in plain words: what a recipe file may say, checked key by key before anything is loaded.

A recipe is complete: the same file gives the same run. Flags override it. Descriptions here are the text of
docs/recipes.md; defaults of criterion, spread and calibration were chosen on held-out text (bench/defaults.py).
What this gives up: settings that hang on each other in ways that only a model can tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_serializer, model_validator

from regrow.errors import InputError, SettingsError, UnknownName, guess
from regrow.learning import Learn
from regrow.recovery import Distil, Part, Recover

Axis = Literal["layer", "group", "head", "neuron", "channel"]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Step = Annotated[int, Field(ge=1)]


SECRET = re.compile(r"([?&\s][\w.-]*(?:pass|pwd|secret|token|odbc_connect)[\w.-]*=)[^&]*", re.IGNORECASE)


def hidden(text: str) -> str:
    """A database's URL, or what an error says of it, without its passwords: rather too little of it than too much.

    They stand before an @ and may hold anything, as in SQLAlchemy, or are parameters that are named so.
    """
    return re.sub(r"(://[^/:]*):.*@", r"\1:***@", SECRET.sub(r"\1***", text), flags=re.DOTALL)


class Calibration(Part):
    """Text that scores are measured on and zeros chosen by. Only the calibration part of a source is used.

    `regrow sparsify` and `regrow.sparsify` take 8,192 tokens in blocks of 512 unless told otherwise.
    """

    text: str = Field(
        default="demo", description="demo, demo:DOMAIN, a .txt, .json, .jsonl or .parquet file, or hub:OWNER/NAME"
    )
    tokens: int = Field(default=4096, ge=1, description="how many tokens are read")
    block: int = Field(default=128, ge=8, description="tokens in a sequence")


class Refit(Part):
    """Least squares behind a cut: linears that lose inputs are fitted anew on those that stay.

    Read from the text and in the blocks of `calibration`.
    """

    tokens: int = Field(default=16_384, ge=1, description="how many tokens are read; several for each input")
    damping: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="how strongly weights are held where they were, in means of the inputs' squares; null = of every "
        "linear what does best when it is fitted on one half of the text and judged on the other",
    )


class Sparsify(Part):
    """Zeros in the weight matrices of the decoder layers; shapes stay. A recipe has `keep: null` then."""

    pattern: str = Field(
        default="50%",
        coerce_numbers_to_str=True,
        description="a percentage of zeros, or kept of every so many neighbours: 2:4, 2:8",
    )
    levels: tuple[Annotated[str, Field(coerce_numbers_to_str=True)], ...] = Field(
        default=(),
        description="patterns on the way to `pattern`: [50%, 60%]; each is followed by an equal part of the recovery",
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


SPARSE_CALIBRATION = {"tokens": 8192, "block": 512}
"""What zeros are chosen on where a command or the Python door is not told otherwise."""


class Search(Part):
    """Which shape: many inside the budget are scored as cut, the best are trained a little, the best of these goes on.

    Shapes have the same widths in every layer. Trained as `recover` says, by default from the model itself.
    """

    method: Literal["grid", "random"] = Field(
        default="grid",
        description="grid: none that another exceeds in one axis and falls below in no axis; random: by lot among all",
    )
    choices: dict[Axis, tuple[Step, ...]] = Field(
        default_factory=dict,
        description="the values of an axis, a layer's (heads: a group's); from the whole down to 80 % of the layers "
        "and 60 % of the others unless named",
    )
    also: tuple[str, ...] = Field(default=(), description="budgets beside `keep`, such as kv=75%, flops=80%, 220MB")
    latency: str | None = Field(
        default=None, description="milliseconds a token written alone takes on this machine, or a share: 12ms, 80%"
    )
    band: float = Field(default=0.05, gt=0, le=1, description="share of the budget that a shape may leave unused")
    candidates: int = Field(default=24, ge=1, description="shapes that are scored as cut; by lot where there are more")
    tokens: int = Field(default=8192, ge=8, description="of calibration text that no score has seen, to judge by")
    top: int = Field(default=4, ge=1, description="how many of them are trained")
    rank_tokens: int = Field(
        default=20_000, ge=0, description="tokens each is trained on, in whole steps; 0 = as cut decides"
    )
    checkpoints: int = Field(
        default=4, ge=1, description="equal parts of that training, a step or more; the order is judged after each"
    )
    halving: bool = Field(default=False, description="after each part the worse half goes")
    stable: float = Field(
        default=0.9,
        ge=-1,
        le=1,
        description="Kendall's tau between two checkpoints at which the order counts as stable; twice, and it ends",
    )
    storage: str | None = Field(
        default=None,
        description="of the study, to share it: a file, or a database as sqlite:///FILE, postgresql://...; null = the "
        "cache",
    )

    @field_serializer("storage")
    def _no_password(self, storage: str | None) -> str | None:
        """What is written down may be read by anybody."""
        return None if storage is None else hidden(storage)


class Evaluate(Part):
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


class Recipe(Part):
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
    protect: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = Field(
        default=(0, 0),
        description="so many of the first and of the last layers never go; [4, 2] in Shortened LLaMA's +",
    )
    rescale_norms: bool = Field(default=False, description="norms keep statistics over the old width (channels)")
    merge_heads: Literal["off", "minitron", "laco"] = Field(
        default="off",
        description="add each query head that goes into one that stays: kept + (kept - gone), or kept + (gone - kept)",
    )
    stages: int = Field(
        default=1,
        ge=1,
        description="equal steps that the cut takes, scored anew before each; more than one when uniform",
    )
    calibration: Calibration = Field(default=Calibration(), description="text that scores are measured on")
    refit: Refit | None = Field(
        default=None,
        description="fit what reads the cut attention and MLP anew by least squares; null = leave it as it is",
    )
    shape: dict[Axis, Step] = Field(
        default_factory=dict,
        description="exact widths of every layer (heads: a group's); names the axes, in place of a budget and a search",
    )
    search: Search | None = Field(default=None, description="choose the shape by trial; null = by `split`")
    learn: Learn | None = Field(
        default=None, description="let gates learn which units stay, in place of scores; null = by `criterion`"
    )
    sparsify: Sparsify | None = Field(default=None, description="zeros in what stays; null = none")
    recover: Recover | None = Field(default=None, description="training after the cut; null = none")
    evaluate: Evaluate = Field(default=Evaluate(), description="what is measured before and after")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of every random choice")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:N, mps")
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="what is computed in; stored in it too where the checkpoint has more bits"
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")

    @model_validator(mode="before")
    @classmethod
    def _exact(cls, data: dict[str, Any]) -> dict[str, Any]:
        """A shape needs no budget and no search; it names its axes, and holds in every layer."""
        shape = data.get("shape")
        if not isinstance(shape, Mapping) or not shape:
            return data
        own = {
            name: {unit: value for unit, value in named.items() if unit in shape}
            for name in ("criteria", "divisors")
            if isinstance(named := data.get(name), Mapping)
        }
        return {"keep": None, **data, **own, "axes": list(shape), "split": {}, "uniform": True, "search": None}

    @property
    def cuts(self) -> bool:
        """Whether units go."""
        return self.keep is not None or bool(self.shape)


PARTS: dict[str, type[Part]] = {
    "calibration": Calibration,
    "refit": Refit,
    "search": Search,
    "sparsify": Sparsify,
    "learn": Learn,
    "learn.distil": Distil,
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
        what = "axis" if path[0] in ("axes", "split", "criteria", "divisors", "shape") else ".".join(path)
        return SettingsError(
            f"{where}: unknown {what} {came!r}{guess(str(came), known)}", ", ".join(known), "name one of them"
        )
    return SettingsError(f"{where}: {'.'.join(path)} = {came!r}", first["msg"], "correct the value")


def _keys(path: list[str]) -> list[str]:
    """The keys allowed at a place in a recipe, as paths."""
    part: Any = PARTS.get(".".join(path)) if path else Recipe
    return [".".join([*path, name]) for name in (part or Recipe).model_fields]
