"""The ``paralm`` command: its groups, its options, its exit codes. The commands are in ``commands/``.

Nothing heavy is imported here: ``paralm --help`` and an error in a configuration cost no torch.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import paralm
from paralm_launch import errors
from paralm_launch.commands import cluster, config, data, export, plan, results, runs, serve, tools

app = typer.Typer(
    name="paralm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train recurrent language models in parallel over time, evaluate them, and generate text.",
    epilog="Start with: paralm run quickstart. "
    "Exit codes: 0 done, 1 a bug, 2 something to mend in what was given, 3 training diverged, "
    "75 stopped on request after saving (the same command continues).",
)
runs.add_to(app)
cluster.add_to(app)
data.add_to(app)
results.add_to(app)
export.add_to(app)
serve.add_to(app)
config.add_to(app)
plan.add_to(app)
tools.add_to(app)

_verbose = False


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"paralm {paralm.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what happens inside, and where an error came from.")
    ] = False,
) -> None:
    global _verbose
    _verbose = verbose
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code; everything is reported."""
    global _verbose
    _verbose = False
    try:
        code = app(args=list(arguments), prog_name="paralm", standalone_mode=False)
        sys.stdout.flush()
        if code == errors.EXIT_INTERRUPTED:  # typer's answer to Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # Whoever read the output has left (paralm … | head): no error, and nothing more to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.EXIT_PIPE
    except (Exception, KeyboardInterrupt) as error:
        return errors.report(error, _verbose)


def main() -> None:
    """The console script."""
    # Threads that spin for long starve each other on a shared CPU: a training step of 3.5 s took 20 to 38 s beside two
    # busy processes (2 cores, 2 threads). Threads that never spin cost a quiet machine half as much again. So they
    # spin briefly. It must be set before torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # '?' for what the terminal's encoding lacks, such as an arrow
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
