"""`regrow`: the commands, and the one place where errors become messages and exit codes.

Nothing heavy is imported until a command runs, so `regrow --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys

import typer

from regrow.cli import (
    diff,
    doctor,
    estimate,
    evaluate,
    inspect,
    learn,
    listing,
    prune,
    recover,
    report,
    run,
    search,
    show,
    sparsify,
)
from regrow.errors import InputError, OutputError, RegrowError

INTERRUPTED = 130

app = typer.Typer(
    name="regrow",
    help="Cut a large language model back and let it regrow.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run.run)
app.command("prune")(prune.prune)
app.command("learn")(learn.learn)
app.command("search")(search.search)
app.command("sparsify")(sparsify.sparsify)
app.command("recover")(recover.recover)
app.command("eval")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("estimate")(estimate.estimate)
app.command("doctor")(doctor.doctor)
app.command("ls")(listing.ls)
app.command("show")(show.show)
app.command("diff")(diff.diff)
app.command("report")(report.report)


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit code (0 done, 1 the model or disk, 2 the input, 130 interrupted)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        result = app(arguments or ["--help"], standalone_mode=False, prog_name="regrow")
        code = result if isinstance(result, int) else 0
    except RegrowError as error:
        return _fail(arguments, error)
    except OSError as error:  # the cache, say: a full or read-only disk
        return _fail(arguments, OutputError(str(error), "a readable and writable disk", "make room; see REGROW_CACHE"))
    except typer.TyperException as error:  # what the parser refuses
        command = " ".join(["regrow", *(a for a in arguments[:1] if not a.startswith("-"))])
        message = error.format_message().rstrip(".")
        return _fail(arguments, InputError(message, f"what `{command} --help` lists", "correct the command line"))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:  # typer turns the interruption of a command into this code
        print("interrupted: nothing half-written was left; run the same command again to go on", file=sys.stderr)
    return code


def _fail(arguments: list[str], error: RegrowError) -> int:
    print(f"error: {error}", file=sys.stderr)
    if "--json" in arguments:
        kind = type(error).__name__
        print(json.dumps({"error": kind, "came": error.came, "allowed": error.allowed, "next": error.todo}))
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
