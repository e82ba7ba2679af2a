"""Reads models and writes Hugging Face folders; success means that what was written equals what is in memory.

A folder is made beside its final place, flushed to disk, reread, and only then renamed: a partial one never looks
whole. Weights are computed in fp32 and stored in the base's own 16-bit type (fp32 stays fp32); rounding happens before
anything is measured. What this gives up: pickled checkpoints are not read, quantised ones are refused.
"""

from __future__ import annotations

import errno
import gc
import json
import math
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion

from regrow.cache import settle
from regrow.engines import hetero
from regrow.engines.demo import demo_model
from regrow.engines.room import give_back
from regrow.engines.tokens import check_vocabulary
from regrow.errors import BrokenModel, IdentityError, ModelError, OutputError, QuantisedModel, RegrowWarning

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of logits, relative to their largest, that rounding in a type may make."""
_SMALL = ["*.json", "*.py", "*.jinja", "*.txt", "*.model", "README.md"]  # all but the weights of a hub model
_LAYER = re.compile(r"\.(\d+)\.")  # in the name of a weight: a layer's number behind the list
_FILE = 5 * 10**9  # bytes, as transformers writes
_PIECE = 2**20  # numbers of a tensor that are looked at together
CACHE_SLACK = 10  # a cache adds up in another order


def locate(model: str, *, weights: bool = True) -> Path:
    """The local folder of `demo`, a folder, or a hub id (cached or downloaded; `weights=False` spares the weights)."""
    if model == "demo":
        return demo_model()
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise BrokenModel(
                f"{model} has no config.json",
                "a Hugging Face model folder",
                "check the path; an interrupted run leaves none",
            )
        return folder
    try:
        wanted = [*_SMALL, "model*.safetensors"] if weights else _SMALL
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {model!r} is neither a folder here nor to be had from the hub ({type(error).__name__})",
            "a hub id such as HuggingFaceTB/SmolLM2-135M, a local folder, or demo",
            "check the spelling, the path and the network",
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        raise BrokenModel(f"{path} cannot be read: {error}", "complete JSON", "download or write it again") from error


def _brief(error: Exception) -> str:
    return shorten(str(error), 300)


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration. Raises `QuantisedModel` for weights that are not plain floating point."""
    data = read_json(folder / "config.json")
    try:
        if str(data.get("model_type", "")).startswith(hetero.PREFIX):
            config = hetero.config_class(data["model_type"]).from_pretrained(folder)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        raise ModelError(
            f"the configuration in {folder} is not understood: {_brief(error)}",
            "model types of the installed transformers",
            "a model with its own code needs --trust-remote-code; a newer one a newer transformers",
        ) from error
    if getattr(config, "quantization_config", None):
        method = dict(data["quantization_config"]).get("quant_method", "unknown method")
        raise QuantisedModel(
            f"{folder.name} is quantised ({method})",
            "weights in fp32, bf16 or fp16",
            "cut the model it was quantised from, then quantise the result",
        )
    return cast("PreTrainedConfig", config)


MASKS = (".attention.bias", ".attn.bias", ".masked_bias")  # causal masks that old folders store as weights
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weight_files(folder: Path) -> list[str]:
    """Names of the files that `from_pretrained` reads: one of all weights, or those of an index."""
    index = folder / "model.safetensors.index.json"
    whole = (folder / "model.safetensors").exists() or not index.exists()
    return ["model.safetensors"] if whole else sorted(set(read_json(index)["weight_map"].values()))


def count(folder: Path) -> int:
    """Numbers in the weight files of a folder."""
    total = 0
    for name in weight_files(folder):
        with safe_open(folder / name, "pt") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return total


def check_files(folder: Path) -> torch.dtype:
    """Open every weight file and return the type that most weights are stored in; masks and counters may be integers.

    Raises `BrokenModel` naming a truncated, corrupt or missing file, `QuantisedModel` for weights in anything else.
    """
    found: list[str] = []
    for name in weight_files(folder):
        try:
            with safe_open(folder / name, "pt") as file:
                kinds = [file.get_slice(key).get_dtype() for key in file.keys() if "weight" in key]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BrokenModel(
                f"{folder / name} cannot be read: {error}",
                "complete safetensors files",
                "download or write the model again; pickled checkpoints must be converted to safetensors first",
            ) from error
        if not set(kinds) <= set(FLOATS):
            raise QuantisedModel(
                f"{name} holds {', '.join(sorted(set(kinds)))} weights",
                "weights in fp32, bf16 or fp16",
                "cut the model it was quantised from, then quantise the result",
            )
        found += kinds
    return FLOATS[Counter(found).most_common(1)[0][0]] if found else torch.float32


def read(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (eval mode, computing in `dtype`) and tokenizer.

    Raises `BrokenModel` for missing, misshapen or NaN weights and for a tokenizer that does not fit.
    """
    config = read_config(folder, trust_remote_code=trust_remote_code)
    check_files(folder)
    options: dict[str, Any] = {"dtype": dtype, "config": config}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
    if config.model_type.startswith(hetero.PREFIX):
        model, info = hetero.model_class(config).from_pretrained(folder, **options)
    else:
        model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    for what, names in (
        ("are missing", sorted(info["missing_keys"])),
        ("do not fit the configuration", sorted(key for key, *_ in info["mismatched_keys"])),
    ):
        if names:
            raise BrokenModel(
                f"{folder}: weights that {what}: {', '.join(names[:3])}{' ...' * (len(names) > 3)}",
                "every weight of the model, in the shape config.json says",
                "download or write the model again",
            )
    odd = [key for key in info["unexpected_keys"] if key.endswith((".weight", ".bias"))]
    unused = sorted(key for key in odd if not key.endswith(MASKS))
    if unused:
        said = f"{folder}: {len(unused)} weights of the files have no place in the model that config.json describes"
        warnings.warn(f"{said}, and are left out: {', '.join(unused[:3])}", RegrowWarning, stacklevel=2)
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            raise BrokenModel(f"{name} holds NaN or infinite weights", "finite weights", "use another checkpoint")
    tokenizer = read_tokenizer(folder, config, trust_remote_code=trust_remote_code)
    return cast("PreTrainedModel", model.to(device).eval()), tokenizer


def read_tokenizer(
    folder: Path, config: PreTrainedConfig, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises `BrokenModel` for none, and for one that does not fit the model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises nothing more exact
        raise BrokenModel(
            f"{folder} has no readable tokenizer: {_brief(error)}",
            "a tokenizer beside the model",
            "copy the tokenizer files of the base model into the folder",
        ) from error
    check_vocabulary(tokenizer, config.vocab_size)
    return cast("PreTrainedTokenizerBase", tokenizer)


def _finite(weights: Tensor) -> bool:
    """A piece at a time: the test makes copies, and an embedding is a large part of a small model."""
    return all(bool(piece.isfinite().all()) for piece in _pieces(weights.detach()))


def _pieces(weights: Tensor) -> Sequence[Tensor]:
    """Views of a few rows each."""
    return torch.split(weights, max(1, _PIECE * len(weights) // max(1, weights.numel())))


@torch.no_grad()
def round_to(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to a storage type and back, in place, a piece at a time; what vanishes is +0."""
    for parameter in model.parameters():
        for piece in _pieces(parameter):
            piece.copy_(piece.to(dtype)).add_(0.0)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    Raises `OutputError` when `out` exists, its parent cannot be written, or the disk is full.
    """
    if out.exists():
        raise OutputError(f"{out} exists", "a folder that does not exist yet", "choose another --out, or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise _cannot_write(out, error) from error
    try:
        yield folder
        _flush(folder)
        folder.rename(out)
    except OSError as error:
        raise _cannot_write(out, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_out(out: Path) -> None:
    """Raise `OutputError` now rather than after hours of work."""
    with staged(out) as folder:
        (folder / "probe").write_bytes(b"0")
    shutil.rmtree(out)


def _cannot_write(what: object, error: Exception) -> OutputError:
    full = getattr(error, "errno", None) == errno.ENOSPC
    why = "the disk is full" if full else getattr(error, "strerror", None) or error
    return OutputError(
        f"{what} cannot be written: {why}", "a writable folder with room", "choose another --out, or make room"
    )


def _flush(folder: Path) -> None:
    """Everything on disk, and readable by those who may read the folder, before the name appears."""
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    settle(folder)


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype, code: str | None
) -> None:
    """Weights in `dtype`, configuration, generation settings, tokenizer, and the modelling file if there is one.

    Without such a file weights have the names, and experts the layout, that the base's folder has, or else checkpoints
    of its class. The model itself is in `dtype` afterwards: a copy in storage type would be half a model more.
    """
    kept = set(model.state_dict())
    buffers = {name: value for name, value in model.named_buffers() if name in kept}  # as they are
    model.to(dtype)
    give_back()
    weights: dict[str, Tensor] = {name: value.detach() for name, value in model.named_parameters()} | buffers
    try:
        _save(model, weights, folder, revert_weight_conversion if code is None else lambda _, part: part)
    except (OSError, SafetensorError) as error:
        raise _cannot_write("the weights", error) from error
    config = model.config
    config.dtype = dtype
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises nothing more exact
        raise _cannot_write("the tokenizer", error) from error
    if code is not None:
        (folder / hetero.CODE_FILE).write_text(code, encoding="utf-8")


def _save(model: Any, weights: dict[str, Tensor], folder: Path, named: Callable[..., dict[str, Tensor]]) -> None:
    """A file, or several and their index, as `from_pretrained` reads them; `named` gives a file its names and layout.

    Experts are copied when a stack is taken apart, so that is done for one file at a time.
    """
    files = list(_files(weights))
    where: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        found = {name: value.contiguous() for name, value in named(model, part).items()}
        save_file(found, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(found, file))
    if len(files) > 1:
        size = sum(value.nbytes for value in weights.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _files(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Runs of whole layers, and of single weights outside of them, of about `_FILE` bytes."""
    part: dict[str, Tensor] = {}
    for _, together in groupby(weights, lambda name: _LAYER.split(name, 1)[:2]):
        run = {name: weights[name] for name in together}
        if part and sum(value.nbytes for value in (*part.values(), *run.values())) > _FILE:
            yield part
            part = {}
        part |= run
    yield part


def probe(vocab_size: int, length: int = 48) -> Tensor:  # (1, length) int64
    """Token ids, the same for equal arguments, on which two forms of a model are compared."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (1, length), generator=generator)


@torch.inference_mode()
def logits(model: Any, ids: Tensor) -> Tensor:  # (1, T, V) fp32 on the CPU
    output: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return output.float().cpu()


def check_equal(what: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype = torch.float32, slack: float = 1) -> float:
    """The largest difference of two logits relative to their scale, computed in `dtype`.

    Raises `IdentityError` above the type's tolerance times `slack`: a wrong cut shows at 1e-5 in fp32, while in 16 bits
    only a coarse one does.
    """
    tolerance = slack * TOLERANCE[dtype]
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    if not difference <= tolerance:
        raise IdentityError(
            f"{what} differ by {difference:.1e} of the logits' scale",
            f"at most {tolerance:.0e}",
            "nothing was written; this is a layout regrow cuts wrongly: please report the model type",
        )
    return difference


def reread(
    folder: Path, reference: Tensor, ids: Tensor, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Load the folder and hold it against logits from memory, then generation with a cache against without."""
    gc.collect()
    give_back()
    model, _ = read(folder, device=device, dtype=dtype)
    check_equal("the reloaded folder and the model in memory", reference, logits(model, ids), dtype)
    what, steps = "generation with and without a cache", 8
    try:
        check_equal(what, reference[:, -steps:], cached_logits(model, ids, steps), dtype, CACHE_SLACK)
    except IdentityError:
        if dtype != torch.float32 or model.device.type == "mps":  # has no fp64
            raise
        model.double()  # some models make a thousand times more of a rounding; a wrong layout is as wrong here
        check_equal(what, logits(model, ids)[:, -steps:], cached_logits(model, ids, steps), dtype, CACHE_SLACK)
        model.float()
    return model


@torch.inference_mode()
def cached_logits(model: Any, ids: Tensor, steps: int) -> Tensor:  # (1, steps, V)
    """Logits of the last `steps` positions, one token at a time through the key/value cache."""
    ids = ids.to(model.device)
    start = ids.shape[1] - steps
    output = model(input_ids=ids[:, :start], use_cache=True)
    found = []
    for position in range(start, ids.shape[1]):
        output = model(
            input_ids=ids[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True
        )
        found.append(output.logits[:, -1].float().cpu())
    return torch.stack(found, 1)
