"""`regrow doctor`: does a model fit, and what of it can be cut."""

from __future__ import annotations

from pathlib import Path

from regrow.cli import console
from regrow.cli import options as o


def doctor(
    model: o.Model,
    _seed: o.NoSeed = None,
    trust_remote_code: o.Trust = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Which family fits a model, what can be cut, what cannot and why. Weights of a hub model are not downloaded."""
    console.hush()
    from regrow.artifacts.family import UNITS
    from regrow.engines.bind import bind, sizes_of, why_not
    from regrow.engines.checkpoint import check_files, locate, read_config

    folder = locate(model, weights=False)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    here = model == "demo" or Path(model).expanduser().is_dir()
    if here:
        check_files(folder)
    anatomy = bind(config)
    sizes = sizes_of(config)
    reasons = {unit: why_not(anatomy.family, sizes, unit) for unit in UNITS}
    if not quiet:
        print(f"model type {config.model_type}: family {anatomy.family.name}")
        rows = [
            [unit, str(anatomy.units(unit)), "yes" if why is None else "no", why or ""] for unit, why in reasons.items()
        ]
        console.table("", ["unit", "count", "can be cut", "why not"], rows)
        print("head tied to the embedding" if anatomy.tied else "head apart from the embedding")
        print(f"weights: {'whole, in plain floating point' if here else 'on the hub, not looked at'}")
    if as_json:
        console.emit(
            {
                "model_type": config.model_type,
                "family": anatomy.family.name,
                "sizes": sizes,
                "tied": anatomy.tied,
                "weights_checked": here,
                "cut": {u: w is None for u, w in reasons.items()},
                "why_not": {u: w for u, w in reasons.items() if w},
            }
        )
