"""`regrow sparsify`: zeros in the weight matrices, in one shot, without recovery."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from regrow.cli import options as o
from regrow.cli.prune import measured_text, present


def sparsify(
    model: o.Model,
    out: o.Out,
    pattern: Annotated[str, typer.Option(help="share of zeros (50%) or kept of every so many (2:4, 2:8)")] = "50%",
    criterion: Annotated[
        str | None,
        typer.Option(help="wanda, sparsegpt, magnitude ... (`regrow ls weight-criteria`), or a solver such as dsnot"),
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="none, update, refit, mrp, alps, dsnot; several with commas, in turn")
    ] = None,
    option: Annotated[str | None, typer.Option(help="options of the solvers: NAME=VALUE,...")] = None,
    spread: Annotated[str | None, typer.Option(help="uniform, owl or hessian")] = None,
    damping: Annotated[
        float | None, typer.Option(help="of the Gram matrices, as a share of their mean diagonal")
    ] = None,
    inputs: Annotated[str | None, typer.Option(help="what a block reads: pruned, dense (one pass) or both")] = None,
    mend: Annotated[
        float | None, typer.Option(help="with inputs both: how far to aim at the dense model's outputs, 0 to 1")
    ] = None,
    keep_statistics: Annotated[
        bool | None,
        typer.Option(help="keep what dense inputs gave: another pattern or solver then reads no text"),
    ] = None,
    leave: Annotated[str | None, typer.Option(help="ends of names of linears that stay dense")] = None,
    also: Annotated[str | None, typer.Option(help="routers, embedding or head that become sparse too")] = None,
    existing: Annotated[str | None, typer.Option(help="zeros that are there already: refuse or keep")] = None,
    calibration: o.Calibration = None,
    calibration_tokens: o.CalibrationTokens = None,
    calibration_block: o.CalibrationBlock = None,
    text: o.Text = None,
    tasks: o.Tasks = None,
    limit: o.Limit = None,
    speed: o.Speed = False,
    seed: o.Seed = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.Trust = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Make a model sparse, unstructured or N:M, and write a folder that stock tools load."""
    from regrow.cli.finish import finish
    from regrow.settings import SPARSE_CALIBRATION, parse

    asked = present(
        pattern=pattern,
        criterion=criterion,
        solver=o.names(solver),
        options={k: o.scalar(v) for k, v in o.pairs(option, "option").items()} or None,
        spread=spread,
        damping=damping,
        inputs=inputs,
        mend=mend,
        keep_statistics=keep_statistics,
        leave=o.names(leave),
        also=o.names(also),
        existing=existing,
    )
    data: dict[str, Any] = present(
        name="sparsify",
        model=model,
        sparsify=asked,
        calibration=SPARSE_CALIBRATION | present(text=calibration, tokens=calibration_tokens, block=calibration_block),
        evaluate=present(tasks=o.names(tasks), limit=limit, speed=speed) | measured_text(text),
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    finish(parse({**data, "keep": None}, "the command line"), out, as_json=as_json, quiet=quiet)
